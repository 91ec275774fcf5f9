"""Selection on the device against sorting in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np

from spiel_jax.ops.selection import drop, isin, replace_dropped, top_magnitudes, top_products

SHAPE = (96, 200)  # large enough that a sample gives a bound
COUNT = 300


def hard_matrices():
    """Matrices of the kinds that make selection hard."""
    rng = np.random.default_rng(0)
    normal = rng.normal(size=SHAPE).astype(np.float32)
    yield normal
    yield rng.integers(-2, 3, SHAPE).astype(np.float32)  # ties
    yield np.zeros(SHAPE, np.float32)
    yield np.where(rng.random(SHAPE) < 0.01, normal, 0).astype(np.float32)
    yield (normal * 10.0 ** rng.integers(-15, 15, SHAPE)).astype(np.float32)
    yield np.where(rng.random(SHAPE) < 0.3, np.nan, normal).astype(np.float32)


def best(scores, n):
    """Positions of the n largest scores that are not NaN, equal ones by position; ascending."""
    able = np.flatnonzero(~np.isnan(scores))
    return np.sort(able[np.lexsort((able, -scores[able]))][:n])


def positions(count, seed=1):
    return np.random.default_rng(seed).permutation(np.prod(SHAPE))[:count].astype(np.int32)


def test_largest_magnitudes_that_are_not_active():
    find = jax.jit(top_magnitudes, static_argnums=1)
    active = positions(COUNT)
    for matrix in hard_matrices():
        for dtype in (jnp.float32, jnp.bfloat16):
            dense = jnp.asarray(matrix).astype(dtype)
            scores = np.abs(np.asarray(dense.astype(jnp.float32))).reshape(-1)
            np.testing.assert_array_equal(find(dense, COUNT), best(scores, COUNT))
            scores[active] = np.nan
            np.testing.assert_array_equal(find(dense, COUNT, jnp.asarray(active)), best(scores, COUNT))


def test_largest_products_that_are_not_active():
    rng = np.random.default_rng(2)
    find = jax.jit(top_products, static_argnums=3)
    active = positions(COUNT)
    for draw in (rng.random, lambda n: rng.integers(0, 4, n)):
        row, column = (draw(n).astype(np.float32) for n in SHAPE)
        scores = np.outer(row, column).reshape(-1)
        scores[active] = np.nan
        found = np.asarray(find(row, column, COUNT // 2, COUNT, active))
        np.testing.assert_array_equal(np.sort(found)[: COUNT // 2], best(scores, COUNT // 2))
        assert (np.sort(found)[COUNT // 2 :] == scores.size).all()


def test_dropped_entries_are_replaced_in_their_slots():
    size, count = int(np.prod(SHAPE)), COUNT // 3
    active, values = positions(COUNT), np.random.default_rng(3).integers(-3, 4, COUNT).astype(np.float32)
    incoming = np.setdiff1d(positions(size // 2, seed=4), active)[:count].astype(np.int32)
    padded = np.full(COUNT, size, np.int32)
    padded[:count] = incoming

    def swap(values, active, incoming):
        return replace_dropped(active, drop(values, active, count, size), incoming, size).indices

    found = np.asarray(jax.jit(swap)(values, active, padded))
    order = np.lexsort((active, np.abs(values)))
    kept = np.ones(COUNT, bool)
    kept[order[:count]] = False
    np.testing.assert_array_equal(found[kept], active[kept])
    np.testing.assert_array_equal(np.sort(found[~kept]), np.sort(incoming))


def test_membership():
    size = int(np.prod(SHAPE))
    members, asked = positions(COUNT), positions(size, seed=5)
    found = jax.jit(isin, static_argnums=2)(asked, members, size)
    np.testing.assert_array_equal(found, np.isin(asked, members))
