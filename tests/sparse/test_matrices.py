import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spiel_jax.sparse.delta import SparseDelta
from spiel_jax.sparse.matrices import map_matrices


@pytest.mark.parametrize(("lead", "slots"), [((), 3), ((6,), 3), ((2, 3, 2), 3), ((3,), 2**17 + 1)])
def test_matrices_are_treated_alike_in_place(lead, slots):
    """One alone, several at a time, blocks of a grid, and one after the other."""
    numbers = jnp.arange(np.prod(lead, dtype=int) * slots, dtype=jnp.int32).reshape(*lead, slots)
    rows = jnp.ones((*lead, 2)) * (1 + jnp.sum(numbers[..., :1], -1, keepdims=True))
    delta = SparseDelta(numbers, None, (slots, slots), grid=lead[1:] or (1, 1))

    def one(numbers, rows):
        return jnp.sum(rows) * numbers, (jnp.max(numbers), rows + 1)

    found = jax.jit(lambda *trees: map_matrices(one, delta, *trees, in_place=True))(numbers / 7, rows)
    expected = jax.jit(lambda *trees: map_matrices(one, delta, *trees))(numbers / 7, rows)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert found[0].shape == numbers.shape
    assert found[1][0].shape == lead
