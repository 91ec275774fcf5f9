"""Steps along the sign of a gradient: which entries move, and which rates are tried."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.quality.line_search import balanced, direction, normalised, search

GRADIENT = jax.random.normal(jax.random.key(0), (8, 6)) * jnp.array([100.0, 1, 1, 1, 1, 1, 1, 1])[:, None]


@pytest.mark.parametrize("kind", ["random", "gradient", "normalised", "rows", "columns"])
def test_a_set_moves_by_the_sign_of_its_gradient(kind):
    moves = direction(kind, GRADIENT, jax.random.key(1), 8)
    assert int((moves != 0).sum()) == 8
    np.testing.assert_array_equal(moves, jnp.where(moves != 0, jnp.sign(GRADIENT), 0))


def test_where_the_entries_are():
    def rows(kind):
        return (direction(kind, GRADIENT, jax.random.key(1), 8) != 0).sum(1).tolist()

    assert rows("gradient")[0] == 6  # all of the large row
    assert rows("normalised")[0] < 6
    assert rows("rows") == [1] * 8
    columns = (balanced(GRADIENT, 0, 1 / 4) != 0).sum(0)
    assert columns.tolist() == [2] * 6


def test_normalised_does_not_know_the_size_of_rows_and_columns():
    scaled = GRADIENT * jnp.logspace(-2, 2, 8)[:, None] * jnp.logspace(1, -1, 6)
    ratio = normalised(scaled) / normalised(jnp.sign(GRADIENT) * jnp.abs(GRADIENT))
    assert bool((ratio > 0).all())
    rows = jnp.mean(normalised(GRADIENT * 7) / normalised(GRADIENT))
    assert float(rows) == pytest.approx(1 / 7, rel=1e-5)


def test_low_rank_moves_have_that_rank():
    assert int(jnp.linalg.matrix_rank(direction("lora", jnp.ones((32, 16)), jax.random.key(0), 0))) <= 8


@pytest.mark.parametrize("best", [0.01, 0.3, 7.0])
def test_the_best_rate_is_between_two_others(best):
    tried = search(lambda rate: float(np.log(rate / best) ** 2) + 5, 0.5, 5.0)
    lowest = min(tried, key=tried.__getitem__)
    assert lowest / best == pytest.approx(1, rel=0.5)
    assert {lowest / 2, lowest * 2} <= tried.keys()
