"""Approximations of low rank against NumPy's singular values and vectors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spiel_jax.ops.low_rank import low_rank


def best(matrix, rank):
    u, s, v = np.linalg.svd(np.asarray(matrix, np.float64), full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ v[:rank]


@pytest.mark.parametrize("shape", [(5, 7), (9, 4), (6, 6)])
@pytest.mark.parametrize("rank", [1, 3, 40])
def test_of_a_small_matrix_it_is_the_best(shape, rank):
    matrix = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    left, right = low_rank(jnp.array(matrix), rank)
    assert (left.shape, right.shape) == ((shape[0], min(rank, *shape)), (min(rank, *shape), shape[1]))
    np.testing.assert_allclose(left @ right, best(matrix, rank), atol=2e-6 * np.linalg.norm(matrix))


@pytest.mark.parametrize("turned", [False, True])
def test_of_a_large_matrix_it_is_nearly_the_best(turned):
    rng = np.random.default_rng(0)
    matrix = rng.normal(size=(280, 300)) / 2 + rng.normal(size=(280, 4)) @ rng.normal(size=(4, 300))
    matrix = matrix.T if turned else matrix
    left, right = jax.jit(low_rank, static_argnums=1)(jnp.array(matrix, jnp.bfloat16), 4)
    expected = best(jnp.array(matrix, jnp.bfloat16).astype(jnp.float32), 4)
    assert left.dtype == jnp.float32
    assert np.linalg.norm(left @ right - expected) < 1e-4 * np.linalg.norm(expected)


def test_a_matrix_of_zeros_has_an_approximation_of_zeros():
    left, right = low_rank(jnp.zeros((300, 300)), 2)
    assert not np.any(left @ right)
