"""A run that is killed at any moment, and started again, is the run that was not."""

import os
import random

import pytest
from support.faulty_runs import Command, assert_same_end, end_of
from support.run_cases import chat_file, tiny_config

KILLS = int(os.environ.get("SPIEL_JAX_KILLS", "25"))
METHODS = ("spiel_ag", "spiel_ma", "lora", "full")


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(METHODS)), ids=METHODS)
def test_killed_runs_are_the_uninterrupted_one(number, tmp_path, llama_folder):
    config = tiny_config(llama_folder, chat_file(tmp_path), METHODS[number])
    config.checkpoint_every = 1
    config.eval_every, config.eval_batches = 2, None
    command = Command.of(config, tmp_path)
    counted = tmp_path / "calls"
    assert command.run(tmp_path / "whole", CALLS=str(counted)).returncode == 0
    calls, expected = int(counted.read_text()), end_of(tmp_path / "whole")
    kills, chain = 0, 0
    while kills < KILLS / len(METHODS):
        draw = random.Random(f"{METHODS[number]} {chain}")
        workdir = tmp_path / f"run {chain}"
        for _ in range(6):
            at = draw.randrange(1, calls)
            moment = f":{draw.uniform(0, 0.3):.3f}" if draw.random() < 0.5 else ""
            done = command.run(workdir, f"kill:{at}{moment}")
            assert done.returncode in (0, -9), done.stderr[-3000:]
            if done.returncode == 0:
                break
            kills += 1
        else:
            done = command.run(workdir)
            assert done.returncode == 0, done.stderr[-3000:]
        assert_same_end(end_of(workdir), expected)
        chain += 1
