"""The scripts in docs/examples run, and what they tune gets better at what they print."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "docs" / "examples").glob("*.py"))
FALLS_TO = {"optax_in_another_model": 0.2, "own_criterion": 0.2, "restore_and_merge": 0.95}


def test_every_script_is_tested_and_shown():
    assert {script.stem for script in SCRIPTS} == FALLS_TO.keys()
    page = (ROOT / "docs" / "examples" / "index.md").read_text()
    assert set(re.findall(r'--8<-- "docs/examples/(\w+)\.py"', page)) == FALLS_TO.keys()


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_script_runs_and_learns(script):
    program = f"import runpy, sys; sys.path.insert(0, {str(ROOT)!r}); runpy.run_path({str(script)!r})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    before, after = map(float, done.stdout.splitlines()[-1].split(" -> "))
    assert after < FALLS_TO[script.stem] * before
