"""Inner scalings against Optax, against formulas in NumPy, and by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from spiel_jax.optim.inner_optimizers import (
    ScaleByAgedAdamState,
    absorbed,
    descend,
    scale_by_aged_adam,
    scale_by_sparse_sm3,
    sm3_observe,
)
from spiel_jax.sparse.delta import SparseDelta
from spiel_jax.sparse.targets import Target, zeros

B1, B2, EPS = 0.9, 0.999, 1e-3  # a large eps, so that its place shows


def gradients(steps: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(steps, *shape)).astype(np.float32)


def aged_direction(mu, nu, age):
    """The original implementation's update, in float64."""
    mu, nu = np.asarray(mu, np.float64), np.asarray(nu, np.float64)
    return mu / (1 - B1**age) * np.sqrt(1 - B2**age) / (np.sqrt(nu) + EPS)


# ------------------------------------------------------------------------------------------------ aged Adam


def test_aged_adam_equals_optax_where_all_ages_are_equal():
    # eps is bias-corrected here, as the root is: Optax's is not, so it is given the corrected one
    ours = scale_by_aged_adam(B1, B2, EPS)
    values = {"a": jnp.zeros((2, 3)), "b": jnp.zeros(4)}
    state, theirs = ours.init(values), optax.scale_by_adam(B1, B2).init(values)
    advance = jax.jit(ours.update)
    for step, (a, b) in enumerate(zip(gradients(30, 2, 3), gradients(30, 4), strict=True), 1):
        grads = {"a": jnp.array(a), "b": jnp.array(b)}
        updates, state = advance(grads, state)
        corrected = optax.scale_by_adam(B1, B2, EPS / np.sqrt(1 - B2**step))
        expected, theirs = corrected.update(grads, theirs)
        for name in grads:
            np.testing.assert_allclose(updates[name], expected[name], rtol=1e-4, atol=1e-6)
            np.testing.assert_array_equal(state.age[name], step)
            np.testing.assert_allclose(state.mu[name], theirs.mu[name], rtol=1e-5, atol=1e-7)
            np.testing.assert_allclose(state.nu[name], theirs.nu[name], rtol=1e-5)


def test_aged_adam_corrects_each_entry_by_its_own_age():
    age = np.array([0, 1, 9, 5000], np.int32)  # before the step
    mu, nu = np.array([0, 0.1, -0.2, 0.3], np.float32), np.array([0, 1e-4, 0.01, 0.2], np.float32)
    g = np.array([0.5, -1.0, 2.0, 0.1], np.float32)
    state = ScaleByAgedAdamState(*({"w": jnp.array(leaf)} for leaf in (age, mu, nu)))
    updates, state = scale_by_aged_adam(B1, B2, EPS).update({"w": jnp.array(g)}, state)
    new_mu, new_nu = B1 * mu + (1 - B1) * g, B2 * nu + (1 - B2) * g**2
    np.testing.assert_allclose(state.mu["w"], new_mu, rtol=1e-6)
    np.testing.assert_allclose(state.nu["w"], new_nu, rtol=1e-5)
    np.testing.assert_array_equal(state.age["w"], age + 1)
    np.testing.assert_allclose(updates["w"], aged_direction(new_mu, new_nu, age + 1), rtol=1e-4)


def test_first_step_is_the_sign_of_the_gradient():
    tx = scale_by_aged_adam(eps=0.0)
    grads = {"w": jnp.array([3.0, -1e-4, 1e4])}
    updates, _ = tx.update(grads, tx.init(grads))
    np.testing.assert_allclose(updates["w"], [1, -1, 1], rtol=1e-4)


def test_absorbed_does_not_cancel_at_small_ages():
    ages = np.array([0, 1, 2, 1000])
    found = absorbed(0.9999999, jnp.array(ages), jnp.float32)
    decay = np.float64(np.float32(0.9999999))
    np.testing.assert_allclose(found, -np.expm1(ages * np.log(decay)), rtol=1e-5)
    np.testing.assert_allclose(absorbed(0.9, jnp.array(ages), jnp.float32), 1 - 0.9**ages, rtol=1e-6)
    np.testing.assert_array_equal(absorbed(0.0, jnp.array([1, 5]), jnp.float32), [1, 1])


def test_aged_adam_keeps_float32_statistics_of_bfloat16_values():
    tx = scale_by_aged_adam(B1, B2, EPS)
    values = {"w": jnp.zeros(3, jnp.bfloat16)}
    state = tx.init(values)
    grads = {"w": jnp.array([0.5, -0.25, 1e-3], jnp.bfloat16)}
    reference = np.asarray(grads["w"].astype(jnp.float32), np.float64)
    advance, steps = jax.jit(tx.update), 300
    for _ in range(steps):  # past the 256 at which a bfloat16 age would stop
        updates, state = advance(grads, state)
    assert [leaf.dtype for leaf in jax.tree.leaves(state)] == [jnp.int32, jnp.float32, jnp.float32]
    assert updates["w"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(state.age["w"], steps)
    np.testing.assert_allclose(state.nu["w"], reference**2 * (1 - B2**steps), rtol=1e-2)
    wanted = aged_direction(state.mu["w"], state.nu["w"], steps)
    np.testing.assert_allclose(updates["w"].astype(jnp.float32), wanted, rtol=1e-2)


# ----------------------------------------------------------------------------------------------- sparse SM3


def test_sm3_by_hand():
    # active entries of a 2 x 3 matrix: (0, 2), (1, 0), (0, 0)
    target = Target((2, 3), 3)
    active = {"w": SparseDelta(jnp.array([2, 3, 0]), None, (2, 3))}
    tx = scale_by_sparse_sm3({"w": target}, eps=0.0)
    state = tx.init(zeros({"w": target}))

    updates, state = tx.update({"w": jnp.array([3.0, -1.0, 2.0])}, state, active=active)
    # accumulators start at 0: u = g^2 = 9, 1, 4
    np.testing.assert_allclose(state.row_moments["w"], [9, 1])
    np.testing.assert_allclose(state.column_moments["w"], [4, 0, 9])
    np.testing.assert_allclose(updates["w"], [1, -1, 1], rtol=1e-6)

    updates, state = tx.update({"w": jnp.array([4.0, 0.0, -2.0])}, state, active=active)
    # min(row, column) = min(9, 9), min(1, 4), min(9, 4); u = 9 + 16, 1 + 0, 4 + 4
    np.testing.assert_allclose(state.row_moments["w"], [25, 1])
    np.testing.assert_allclose(state.column_moments["w"], [8, 0, 25])
    np.testing.assert_allclose(updates["w"], [4 / 5, 0, -2 / np.sqrt(8)], rtol=1e-6)


def test_sm3_eps_is_inside_the_root():
    target = Target((2, 3), 1)
    tx = scale_by_sparse_sm3({"w": target}, eps=16.0)
    active = {"w": SparseDelta(jnp.array([4]), None, (2, 3))}
    updates, _ = tx.update({"w": jnp.array([3.0])}, tx.init(zeros({"w": target})), active=active)
    np.testing.assert_allclose(updates["w"], [3 / 5], rtol=1e-6)


@pytest.mark.parametrize("lead", [(), (2,), (2, 2, 1)])
def test_sm3_equals_a_loop_over_entries(lead):
    rows, columns, k, rng = 4, 5, 7, np.random.default_rng(0)
    indices = np.array([rng.permutation(rows * columns)[:k] for _ in range(int(np.prod(lead)))], np.int32)
    grid = lead[1:] or (1, 1)
    delta = SparseDelta(jnp.array(indices.reshape(*lead, k)), None, (rows * grid[0], columns * grid[1]), grid)
    row, column = jnp.zeros((*lead, rows)), jnp.zeros((*lead, columns))
    expected = np.zeros((len(indices), rows)), np.zeros((len(indices), columns))
    for g in gradients(3, *lead, k):
        row, column, moments = jax.jit(sm3_observe)(row, column, delta, g)
        before = [e.copy() for e in expected]
        for matrix, (places, grads) in enumerate(zip(indices, g.reshape(-1, k), strict=True)):
            for slot, (place, one) in enumerate(zip(places, grads, strict=True)):
                i, j = divmod(int(place), columns)
                u = min(before[0][matrix, i], before[1][matrix, j]) + float(one) ** 2
                expected[0][matrix, i] = max(expected[0][matrix, i], u)
                expected[1][matrix, j] = max(expected[1][matrix, j], u)
                np.testing.assert_allclose(moments.reshape(-1, k)[matrix, slot], u, rtol=1e-5)
        np.testing.assert_allclose(row.reshape(-1, rows), expected[0], rtol=1e-5)
        np.testing.assert_allclose(column.reshape(-1, columns), expected[1], rtol=1e-5)


def test_sm3_passes_over_unused_slots():
    """Whatever their gradient: no accumulator moves, and the moments of the others are theirs alone."""
    rows, columns, rng = 4, 5, np.random.default_rng(0)
    indices, g = rng.permutation(rows * columns)[:9].astype(np.int32), gradients(1, 9)[0]
    row, column = rng.random(rows).astype(np.float32), rng.random(columns).astype(np.float32)
    used = np.array([1, 0, 1, 1, 0, 0, 1, 0, 1], bool)
    some = np.where(used, indices, rows * columns)
    for grid in ((1, 1), (2, 2)):
        lead = () if grid == (1, 1) else grid
        arrays = [np.broadcast_to(x, (*lead, x.size)) for x in (row, column, some, g)]
        delta = SparseDelta(jnp.array(arrays[2]), None, (rows * grid[0], columns * grid[1]), grid)
        found = jax.jit(sm3_observe)(arrays[0], arrays[1], delta, arrays[3])
        alone = SparseDelta(jnp.array(indices[used]), None, (rows, columns))
        expected = sm3_observe(jnp.array(row), jnp.array(column), alone, g[used])
        for ours, theirs, places in zip(found, expected, (slice(None), slice(None), used), strict=True):
            assert np.all(np.isfinite(ours))
            np.testing.assert_array_equal(ours[..., places], np.broadcast_to(theirs, (*lead, theirs.size)))
        np.testing.assert_array_equal(found[2][..., ~used], np.square(arrays[3])[..., ~used])


def test_sm3_keeps_float32_accumulators_of_bfloat16_values():
    target = Target((2, 3), 2)
    tx = scale_by_sparse_sm3({"w": target})
    state = tx.init(zeros({"w": target}, jnp.bfloat16))
    active = {"w": SparseDelta(jnp.array([1, 5]), None, (2, 3))}
    grads = {"w": jnp.array([1.0, 0.05], jnp.bfloat16)}
    for _ in range(300):  # in bfloat16 the sum would stop at 256
        updates, state = jax.jit(tx.update)(grads, state, active=active)
    assert updates["w"].dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(state)} == {jnp.dtype(jnp.float32)}
    assert float(state.row_moments["w"][0]) == 300


def test_sm3_updates_a_tree_like_the_gradients():
    targets = {"a": Target((2, 3), 1), "b": Target((2, 2), 2)}
    tx = scale_by_sparse_sm3(targets)
    nested = {"x": {"b": jnp.ones(2)}, "y": {"a": jnp.ones(1)}}
    active = {name: SparseDelta(jnp.arange(t.count), None, t.shape) for name, t in targets.items()}
    updates, _ = tx.update(nested, tx.init(nested), active=active)
    assert jax.tree.structure(updates) == jax.tree.structure(nested)
    with pytest.raises(ValueError, match=r"no values for \['b'\]"):
        tx.init({"a": jnp.ones(1)})


def test_sm3_needs_the_positions():
    target = {"w": Target((2, 3), 2)}
    tx = scale_by_sparse_sm3(target)
    values = zeros(target)
    with pytest.raises(ValueError, match=r"needs the positions of the entries: use it inside spiel\(\)"):
        tx.update(values, tx.init(values))


# -------------------------------------------------------------------------------------------------- descend


def test_descend_decays_after_the_step():
    tx = descend(0.1, weight_decay=2.0)
    values, updates = {"w": jnp.array([1.0, -2.0])}, {"w": jnp.array([0.5, 0.0])}
    moves, state = tx.update(updates, tx.init(values), values)
    # (1 - 0.1 * 0.5) * (1 - 0.1 * 2) and -2 * 0.8
    np.testing.assert_allclose(optax.apply_updates(values, moves)["w"], [0.95 * 0.8, -1.6], rtol=1e-6)
    assert int(state.count) == 1


def test_descend_without_decay_is_plain_descent():
    tx = descend(0.1)
    values = {"w": jnp.array([5.0])}
    moves, _ = tx.update({"w": jnp.array([2.0])}, tx.init(values), values)
    assert float(moves["w"][0]) == np.float32(-0.1) * 2


def test_descend_follows_a_schedule_of_its_own_count():
    tx = descend(lambda count: 0.1 * (count + 1), weight_decay=1.0)
    values = {"w": jnp.array([1.0])}
    state, expected = tx.init(values), 1.0
    for step in range(3):
        moves, state = jax.jit(tx.update)({"w": jnp.array([1.0])}, state, values)
        values = optax.apply_updates(values, moves)
        rate = 0.1 * (step + 1)
        expected = (expected - rate) * (1 - rate)
        np.testing.assert_allclose(values["w"], [expected], rtol=1e-5)


def test_descend_keeps_the_dtype_of_the_updates():
    tx = descend(lambda count: jnp.float32(0.1), weight_decay=0.5)
    values = {"w": jnp.ones(2, jnp.bfloat16)}
    moves, _ = tx.update(values, tx.init(values), values)
    assert moves["w"].dtype == jnp.bfloat16


def test_descend_needs_the_values():
    tx = descend(0.1)
    with pytest.raises(ValueError, match="descend needs the values"):
        tx.update({"w": jnp.ones(1)}, tx.init(None))
