"""The embedded default and its variants."""

from pathlib import Path

import pytest

from configs.smollm2_135m import RATES
from spiel_jax.config import ConfigError, check_config
from spiel_jax.config.file import load

FILE = str(Path(__file__).parents[2] / "configs" / "smollm2_135m.py")


@pytest.mark.parametrize("variant", RATES)
def test_a_variant_is_a_method_at_its_rate(variant):
    config = load(f"{FILE}:{variant}", {})
    check_config(config)
    method = "random" if variant == "evolving" else variant
    assert (config.method, config.optimizer.learning_rate) == (method, RATES[variant])


def test_random_entries_evolve_by_default_and_those_of_a_variant_as_its_method_says():
    evolving = load(FILE, {})
    assert evolving == load(f"{FILE}:evolving", {})
    assert (evolving.method, evolving.spiel.rate, evolving.spiel.drop_by) == ("random", 0.4, "age")
    for variant in ("random", "spiel_ag", "spiel_ma"):
        config = load(f"{FILE}:{variant}", {})
        assert (config.spiel.rate, config.spiel.drop_by) == (None, "value")
    assert load(FILE, {}).optimizer == load(f"{FILE}:random", {}).optimizer


def test_an_unknown_variant_is_named():
    with pytest.raises(ConfigError, match="unknown variant 'adalora': expected one of evolving, random"):
        load(f"{FILE}:adalora", {})
