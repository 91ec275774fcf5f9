"""A run that is killed at any moment, and started again, is the run that was not."""

import os
import random

import pytest
from support.faulty_runs import assert_same_end, end_of, uninterrupted

KILLS = int(os.environ.get("SPIEL_JAX_KILLS", "25"))
METHODS = ("spiel_ag", "spiel_ma", "lora", "full")


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(METHODS)), ids=METHODS)
def test_killed_runs_are_the_uninterrupted_one(number, tmp_path, llama_folder):
    command, calls, expected = uninterrupted(METHODS[number], tmp_path, llama_folder, every=1)
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
