"""The step benchmark: its arithmetic by hand, and one run of it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.bench.methods import amortised
from experiments.bench.steps import parse

ROOT = Path(__file__).parents[1]


def test_amortised_by_hand():
    assert amortised({"ordinary": 2.0}, 20, 5) == 2.0
    assert amortised({"ordinary": 2.0, "reselecting": 4.0}, 20, 5) == pytest.approx((4 + 19 * 2) / 20)
    growing = {"ordinary": 1.0, "proposing": 3.0, "estimating": 2.0, "reselecting": 4.0}
    assert amortised(growing, 20, 5) == pytest.approx((3 + 3 * 2 + 4 + 15 * 1) / 20)


def test_parse_by_hand():
    assert parse("spiel_ma") == ("spiel_ma", {})
    assert parse("lora:lora.rank=8;lora.dropout=0") == ("lora", {"lora.rank": "8", "lora.dropout": "0"})


@pytest.mark.slow
def test_methods_side_by_side(tmp_path, llama_folder):
    methods = "spiel_ag,spiel_ma,lora:lora.rank=4,peft_lora:rank=4,peft_supertuning"
    command = [sys.executable, "-m", "experiments.bench.steps", f"--methods={methods}", "--rounds=2"]
    command += [f"--source={llama_folder}", "--batch=2", "--length=16", "--share=0.05", f"--out={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "steps.json").read_text())["results"]
    assert [result["method"] for result in results] == methods.split(",")
    assert set(results[0]["seconds"]) == {"ordinary", "proposing", "estimating", "reselecting"}
    assert set(results[1]["seconds"]) == {"ordinary", "reselecting"}
    assert results[0]["state_bytes"] == pytest.approx(36 * results[0]["tunable"], rel=0.02)
    assert results[1]["tunable"] == results[0]["tunable"]
    assert all(result["peak_mib"] > 100 for result in results)
    assert (tmp_path / "steps.png").stat().st_size > 1000
    assert "spiel_ma" in done.stdout
