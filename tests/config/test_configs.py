"""The embedded default and its variants."""

from pathlib import Path

import pytest

from configs.smollm2_135m import RATES
from spiel_jax.config import ConfigError, check_config
from spiel_jax.config.file import load

FILE = str(Path(__file__).parents[2] / "configs" / "smollm2_135m.py")


@pytest.mark.parametrize("method", RATES)
def test_a_variant_is_a_method_at_its_rate(method):
    config = load(f"{FILE}:{method}", {})
    check_config(config)
    assert (config.method, config.optimizer.learning_rate) == (method, RATES[method])


def test_the_default_is_a_fixed_random_set_and_another_method_may_evolve():
    assert load(FILE, {}).method == "random"
    config = load(FILE, {"method": ["spiel_ag"]})
    assert config.spiel.rate is None  # that of the method


def test_an_unknown_variant_is_named():
    with pytest.raises(ConfigError, match="unknown variant 'adalora': expected one of random, spiel_ag"):
        load(f"{FILE}:adalora", {})
