"""The comparison of quantised bases: each of its runs can be made, and its table says what they came to."""

import itertools

import pytest

from experiments.quantization.compare import BASES, CONFIG, METHODS, markdown, settings
from spiel_jax.config.checks import ConfigError
from spiel_jax.config.file import load


def given(method, base, **more):
    """The configuration that a run's command line gives."""
    chosen = settings(method, base, seed=1, steps=24) | more
    return load(CONFIG, {key: [str(value)] for key, value in chosen.items()})


@pytest.mark.parametrize(("method", "base"), list(itertools.product(METHODS, BASES)))
def test_every_run_has_a_valid_command(method, base):
    assert given(method, base).method == method


def test_what_means_nothing_to_a_method_is_refused():
    with pytest.raises(ConfigError, match="no effect beside method = 'lora'"):
        given("lora", "nf4", **{"spiel.every": 9})


def test_the_table_compares_seed_by_seed():
    def result(base, seed, loss, seconds, peak):
        heldout = [[0, 4.0], [24, loss]]
        return {
            "method": "lora",
            "base": base,
            "seed": seed,
            "heldout": heldout,
            "seconds_per_step": [seconds] * 4,
            "peak_gib": peak,
        }

    results = [
        result(base, seed, 3.5 + seed / 10 + (1 + seed) * worse, seconds, peak)
        for seed in (0, 1)
        for base, worse, seconds, peak in (("bf16", 0.0, 2.0, 4.0), ("nf4", 0.03, 3.0, 1.0))
    ]
    first, second = markdown(results).splitlines()[2:]
    assert (
        first == "| lora | bf16 | 4.0000 | 3.5500 ± 0.0707 | +0.0000 ± 0.0000 | 1.00 (2.00) | 1.00 (4.00) |"
    )
    assert (
        second == "| lora | nf4 | 4.0000 | 3.5950 ± 0.0919 | +0.0450 ± 0.0212 | 1.50 (3.00) | 0.25 (1.00) |"
    )
