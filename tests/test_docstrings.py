"""The examples in the docstrings of the core do what they show."""

import doctest
import importlib

import pytest


@pytest.mark.parametrize(
    "name",
    [
        "optim.spiel",
        "planning.search",
        "planning.hlo",
        "optim.schedules",
        "ops.selection",
        "sparse.delta",
        "sparse.targets",
        "models.io.names",
    ],
)
def test_examples_run(name):
    result = doctest.testmod(importlib.import_module(f"spiel_jax.{name}"))
    assert result.attempted > 0
    assert result.failed == 0
