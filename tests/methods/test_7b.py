"""The whole of Llama 2 7B, with random weights, on a CPU: two steps with a reselection in between."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LIMIT = 19e9  # bytes


@pytest.mark.slow
def test_two_steps_of_llama2_7b(llama_folder, jsonl, tmp_path):
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    if free < LIMIT:
        pytest.skip(f"needs 19 GB of free memory, there are {free / 1e9:.0f}")
    rows = [{"prompt": f"What is {i} and {i}?", "completion": f"It is {2 * i}."} for i in range(40)]
    settings = {
        "method": "spiel_ma",
        "model.source": "random",
        "model.preset": "llama2_7b",
        "model.tokenizer": str(llama_folder),
        "data.sources": f"('{jsonl(rows)}',)",
        "data.heldout": 2,
        "data.sequence_length": 96,
        "batch_size": 2,
        "micro_batch_size": 2,
        "steps": 2,
        "spiel.every": 1,
        "spiel.accumulation": 1,
        "optimizer.learning_rate": 1e-3,
        "optimizer.warmup": 0.0,
        "checkpoint_every": 0,
    }
    environment = os.environ | {"XLA_FLAGS": ""}  # one device
    done = subprocess.run(
        [
            *(sys.executable, "-m", "spiel_jax.train", f"--config={ROOT / 'configs/llama2_7b.py'}"),
            *(f"--workdir={tmp_path}", *(f"--config.{key}={value}" for key, value in settings.items())),
        ],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    print(done.stdout)
    assert "159,907,744 (2.37% of 6,738,415,616)" in done.stdout
    peak = re.search(r"peak memory +([\d.]+) GiB", done.stdout)
    assert peak is not None
    assert float(peak[1]) * 2**30 <= LIMIT
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "replaced" in line]
    assert [line["replaced"] > 0.9 for line in steps] == [
        True,
        False,
    ]  # everything at first, and nothing last
    assert all(line["grad_norm"] > 0 for line in steps)
