"""The whole of Llama 2, with random weights, on a CPU: two steps with a reselection in between."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TUNED = {"llama2_7b": "159,907,744 (2.37% of 6,738,415,616)", "llama2_13b": "250,347,"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("preset", "config", "limit"),
    [
        ("llama2_7b", "llama2_7b", 19e9),
        ("llama2_7b", "llama2_7b_nf4", 8e9),
        ("llama2_13b", "llama2_13b_nf4", 14e9),
    ],
)
def test_two_steps(preset, config, limit, llama_folder, jsonl, tmp_path):
    """What a process holds at most, in bytes, is below the limit."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    if free < limit:
        pytest.skip(f"needs {limit / 1e9:.0f} GB of free memory, there are {free / 1e9:.0f}")
    rows = [{"prompt": f"What is {i} and {i}?", "completion": f"It is {2 * i}."} for i in range(40)]
    settings = {
        "method": "spiel_ma",
        "model.source": "random",
        "model.preset": preset,
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
            *(sys.executable, "-m", "spiel_jax.train", f"--config={ROOT / 'configs' / config}.py"),
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
    assert TUNED[preset] in done.stdout
    peak = re.search(r"peak memory +([\d.]+) GiB", done.stdout)
    assert peak is not None
    assert float(peak[1]) * 2**30 <= limit
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "replaced" in line]
    assert [line["replaced"] > 0.9 for line in steps] == [
        True,
        False,
    ]  # everything at first, and nothing last
    assert all(line["grad_norm"] > 0 for line in steps)
