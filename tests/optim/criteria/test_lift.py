"""LIFT: what it chooses against NumPy's SVD, and what it keeps."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import spiel_jax as sj
from spiel_jax.optim.criteria.lift import LowRankMagnitude, low_rank_positions

TARGETS = {
    "one": sj.Target((5, 7), 11),
    "stack": sj.Target((4, 6), 9, stack=(3,)),
    "blocks": sj.Target((4, 6), 8, grid=(2, 2)),
    "some@0,2": sj.Target((4, 6), 5, stack=(2,), layers=(0, 2)),
}


def test_positions_are_those_of_the_singular_vectors():
    rng = np.random.default_rng(0)
    shapes = {"one": (5, 7), "stack": (3, 4, 6), "blocks": (4, 6), "some": (3, 4, 6)}
    params = {name: jnp.array(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}
    found = jax.jit(lambda p: low_rank_positions(p, TARGETS, rank=2))(params)
    for name, target in TARGETS.items():
        weight = np.asarray(params[name.partition("@")[0]], np.float64)
        weight = weight if target.layers is None else weight[list(target.layers)]
        u, s, v = np.linalg.svd(weight, full_matrices=False)
        nearest = np.abs((u[..., :2] * s[..., None, :2]) @ v[..., :2, :])  # of the matrix, not of its blocks
        rows, columns = target.block
        blocks = nearest.reshape(*target.stack, target.grid[0], rows, target.grid[1], columns)
        blocks = blocks.swapaxes(-2, -3).reshape(-1, target.block_size)
        expected = np.sort(np.argsort(-blocks, axis=-1)[:, : target.block_count], axis=-1)
        np.testing.assert_array_equal(found[name].indices.reshape(expected.shape), expected)


def test_a_refresh_by_hand():
    """The second direction becomes the first: its entries come, those of the other go but for one."""
    target = {"w": sj.Target((3, 3), 3)}
    before = {"w": jnp.diag(jnp.array([3.0, 2.0, 1.0])) + 0.1}
    after = {"w": jnp.array([[2.0, 2.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 1.0]])}
    growth = LowRankMagnitude(rank=1)
    plan = sj.Reselection(4, 2, 2, sj.constant(1.0), first=None)
    tx = sj.spiel(sj.aged_adamw(0.1), target, growth=growth, schedule=plan)
    values = sj.zeros(target)
    state = sj.place(tx.init(values), low_rank_positions(before, target, rank=1))
    assert state.active["w"].indices.tolist() == [0, 1, 3]  # [0, 0], and its row's and column's largest
    update = jax.jit(tx.update)
    for _ in range(2):
        updates, state = update({"w": jnp.array([1.0, -2.0, 3.0])}, state, values, weights=after)
        values = optax.apply_updates(values, updates)
    # of the rank-one matrix [[2, 2, 0], ...] two entries are not zero, and the lowest position is the third
    assert state.active["w"].indices.tolist() == [0, 1, 2]
    adam = optax.tree.get(state.inner, "mu")["w"]
    np.testing.assert_allclose(adam, [0.19, -0.38, 0.0], rtol=1e-6)  # 0.1 * (1 + 0.9) of each gradient
    np.testing.assert_allclose(values["w"], [-0.2, 0.2, 0.0], rtol=1e-4)  # a kept value, a new one
    assert float(state.replaced) == pytest.approx(1 / 3)
