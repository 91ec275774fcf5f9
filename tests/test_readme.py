"""The README's commands and code do what it says."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def command(marker):
    found = re.search(rf"<!-- {marker} -->\n```bash\n(.*)\n```\n<!-- end -->", README)
    assert found, f"no one-line command marked {marker}"
    return found[1]


def test_code_runs_and_learns(capsys):
    code = next(block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "optax" in block)
    exec(compile(code, "README.md", "exec"), {})
    before, after = map(float, capsys.readouterr().out.split(" -> "))
    assert after < before / 5


def test_keys_of_the_table_exist():
    from spiel_jax.config import default_config, flatten

    table = README[README.index("| key | what |") : README.index("The workdir holds")]
    named = re.findall(
        r"`([a-z_.]+)`", "\n".join(line.split("|")[1] for line in table.splitlines() if "|" in line)
    )
    assert len(named) > 8
    assert set(named) <= set(flatten(default_config()))


def test_python_files_named_in_commands_exist():
    for path in re.findall(r"--config=(\S+)", README):
        assert (ROOT / path).exists()


def test_ci_runs_the_readmes_test_command(tmp_path):
    script = (ROOT / ".ci" / "run").read_text()
    stub = tmp_path / "run"
    stub.write_text(script.replace('eval "$command"', "true").replace('"$(dirname "$0")/.."', f'"{ROOT}"'))
    shown = subprocess.run(["bash", stub], capture_output=True, text=True, check=True).stdout
    assert shown.strip() == "+ " + command("tests")


@pytest.mark.slow
def test_main_command_trains_and_replies(tmp_path):
    """The README's own command from the point where everything is installed, for a few steps."""
    words = shlex.split(command("train").rpartition("&&")[2])
    assert words[0].endswith("python")
    words = [sys.executable, *words[1:-1], f"--workdir={tmp_path}", "--config.steps=6"]
    environment = os.environ | {"PYTHONWARNINGS": "default"}
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    losses = [float(x) for x in re.findall(r"held-out loss, step \d+ +([\d.]+)", done.stdout)]
    assert losses[-1] < losses[0]
    assert "  base: " in done.stdout
    assert " tuned: " in done.stdout
