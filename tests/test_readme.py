"""The commands of the README and of the pages in docs/ do what they say."""

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
TUTORIAL = (ROOT / "docs" / "tutorial.md").read_text()
PAGES = {page: page.read_text() for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]}


def command(marker):
    found = re.search(rf"<!-- {marker} -->\n```bash\n(.*)\n```\n<!-- end -->", README)
    assert found, f"no one-line command marked {marker}"
    return found[1]


def test_it_is_short():
    assert 90 < README.count("\n") < 130


def test_keys_of_the_table_exist():
    from spiel_jax.config import default_config, flatten

    table = TUTORIAL[TUTORIAL.index("| key | what |") : TUTORIAL.index("Let gradients say")]
    named = re.findall(
        r"`([a-z_.]+)`", "\n".join(line.split("|")[1] for line in table.splitlines() if "|" in line)
    )
    assert len(named) > 8
    assert set(named) <= set(flatten(default_config()))


def test_python_files_named_in_commands_exist():
    named = [path for page in PAGES.values() for path in re.findall(r"--config=(\S+\.py)", page)]
    named = [path for path in named if path != "configs/mine.py"]  # which readers write
    assert len(named) > 5
    assert all((ROOT / path).exists() for path in named)


def test_modules_named_in_commands_exist():
    named = {name for page in PAGES.values() for name in re.findall(r"python -m ([\w.]+)", page)}
    assert {"spiel_jax.train", "spiel_jax.generate", "spiel_jax.plan", "spiel_jax.regrid"} <= named
    missing = {name for name in named - {"venv"} if importlib.util.find_spec(name) is None}
    assert not missing


def test_keys_set_in_commands_exist():
    from spiel_jax.config import default_config, flatten

    named = {key for page in PAGES.values() for key in re.findall(r"--config\.([a-z_.]+)=", page)}
    assert len(named) > 7
    assert named <= set(flatten(default_config()))


def test_files_that_the_pages_name_exist():
    for page, text in PAGES.items():
        for link in re.findall(r"\]\(([^)#:]+?)(?:#[^)]*)?\)", text):
            assert (page.parent / link).exists(), f"{page.name}: {link}"
        for named in re.findall(r"`((?:spiel_jax|docs|tests|configs|experiments)/[\w./]+)`", text):
            assert (ROOT / named).exists(), f"{page.name}: {named}"


def test_ci_runs_the_readmes_test_command(tmp_path):
    script = (ROOT / ".ci" / "run").read_text()
    stub = tmp_path / "run"
    stub.write_text(script.replace('eval "$1"', "true").replace('"$(dirname "$0")/.."', f'"{ROOT}"'))
    shown = subprocess.run(["bash", stub], capture_output=True, text=True, check=True).stdout
    first, *others = shown.splitlines()
    assert first == "+ " + command("tests")
    for line, tool in zip(others, ("ruff", "pyright", "mkdocs build --strict"), strict=True):
        assert line.startswith(f"+ .venv/bin/{tool}")


@pytest.mark.slow
def test_main_command_trains_and_replies(tmp_path):
    """The README's own command from the point where everything is installed, for a few steps."""
    words = shlex.split(command("train").rpartition("&&")[2])
    assert words[0].endswith("python")
    words = [sys.executable, *words[1:-1], f"--workdir={tmp_path}", "--config.steps=6"]
    environment = os.environ | {"PYTHONWARNINGS": "default", "XLA_FLAGS": ""}  # one device, as users have
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    losses = [float(x) for x in re.findall(r"held-out loss, step \d+ +([\d.]+)", done.stdout)]
    assert losses[-1] < losses[0]
    assert "  base: " in done.stdout
    assert " tuned: " in done.stdout
