"""``spiel_jax.__version__`` is what is installed, and something where nothing is."""

import importlib
import tomllib
from importlib import metadata
from pathlib import Path

import spiel_jax

ROOT = Path(__file__).parents[1]


def test_it_is_the_projects():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert spiel_jax.__version__ == project["version"]
    assert f"\nversion: {project['version']}\n" in (ROOT / "CITATION.cff").read_text()


def test_a_source_tree_has_one_too(monkeypatch):
    def version(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", version)
    assert importlib.reload(spiel_jax).__version__ == "0+unknown"
    monkeypatch.undo()
    importlib.reload(spiel_jax)
