"""The examples in the docstrings do what they show."""

import doctest
import importlib
from pathlib import Path

import pytest

import spiel_jax

PACKAGE = Path(spiel_jax.__file__).parent
FILES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py") if ">>> " in path.read_text())
MODULES = [".".join(("spiel_jax", *path.with_suffix("").parts)) for path in FILES]


def test_there_are_examples():
    assert len(MODULES) > 10


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name):
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted > 0
    assert result.failed == 0
