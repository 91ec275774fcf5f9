"""Criteria and positions of the baselines."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import spiel_jax as sj

TARGETS = {
    "one": sj.Target((5, 7), 11),
    "stack": sj.Target((4, 6), 9, stack=(3,)),
    "blocks": sj.Target((4, 6), 8, grid=(2, 2)),
    "full": sj.Target((2, 3), 6),
    "single": sj.Target((1, 9), 1),
}
EVERY_STEP = sj.Reselection(30, every=1, accumulation=1, rate=sj.constant(0.5), first=None)


def run(growth, steps, targets=TARGETS, plan=EVERY_STEP, seed=0):
    """Positions after every step, of training by a gradient of ones."""
    tx = sj.spiel(sj.aged_adamw(0.1), targets, growth=growth, schedule=plan, seed=seed)
    values = sj.zeros(targets)
    state = tx.init(values)
    update = jax.jit(tx.update)
    seen = [state.active]
    for _ in range(steps):
        updates, state = update(jax.tree.map(jnp.ones_like, values), state, values)
        values = optax.apply_updates(values, updates)
        seen.append(state.active)
    assert update._cache_size() == 1
    return [{name: np.asarray(delta.indices) for name, delta in active.items()} for active in seen]


def test_random_growth_keeps_positions_distinct_and_their_number():
    history = run(sj.RandomGrowth(), 30)
    for before, after in itertools.pairwise(history):
        for name, target in TARGETS.items():
            rows = after[name].reshape(-1, target.block_count)
            assert all(len(set(row)) == target.block_count for row in rows)
            assert rows.min() >= 0
            assert rows.max() < target.block_size
            n = int(target.block_count * 0.5)
            n = min(n, target.block_size - target.block_count)
            changed = (before[name] != after[name]).reshape(rows.shape)
            np.testing.assert_array_equal(changed.sum(-1), n)
            for old, new, moved in zip(before[name].reshape(rows.shape), rows, changed, strict=True):
                assert not set(new[moved]) & set(old)  # neither an active entry nor a dropped one


def test_random_growth_is_spread_over_all_inactive_entries():
    target = {"w": sj.Target((1, 20), 8)}
    growth, plan = sj.RandomGrowth(), sj.Reselection(9, 1, 1, sj.constant(0.5), first=None)
    active = jnp.array([0, 1, 2, 5, 9, 10, 18, 19], jnp.int32)
    dropped = jnp.arange(8) < 4

    def drawn(key):
        stats = sj.RandomGrowth(key).init(target, {})["w"]
        return growth.incoming(stats, active, dropped, jnp.int32(4), target["w"])

    found = np.asarray(jax.jit(jax.vmap(drawn))(jnp.arange(600)))
    assert plan.counts([8]).tolist()[0] == [4]
    assert (found[:, 4:] == 20).all()
    counts = np.bincount(found[:, :4].ravel(), minlength=20)
    inactive = np.setdiff1d(np.arange(20), active)
    assert counts.sum() == counts[inactive].sum()
    assert counts[inactive].min() > 140  # 200 each on average
    assert counts[inactive].max() < 260


def test_random_growth_with_unused_slots():
    """Any number of them: n distinct entries that are not active, and each of these."""
    size, slots = 20, 8
    target, growth, rng = sj.Target((1, size), slots), sj.RandomGrowth(), np.random.default_rng(0)
    keys = jax.random.key_data(jax.random.split(jax.random.key(0), 300))
    incoming = jax.jit(
        jax.vmap(lambda key, active, n: growth.incoming(key, active, None, n, target), (0, None, None))
    )
    for used in range(slots + 1):
        active = np.full(slots, size, np.int32)
        active[rng.permutation(slots)[:used]] = rng.permutation(size)[:used]
        inactive = np.setdiff1d(np.arange(size), active)
        assert int(growth.available(keys[0], jnp.array(active), target)) == inactive.size
        for n in (0, 1, 3, slots):
            found = np.asarray(incoming(keys, active, n))
            assert np.all(found[:, n:] == size)
            assert all(len(set(row)) == n for row in found[:, :n])
            assert np.isin(found[:, :n], inactive).all()
        counts = np.bincount(found.ravel(), minlength=size)[inactive]
        width = inactive.size // slots  # of a stratum, or one more
        assert counts.min() > 0.7 * len(keys) / (width + 1)
        assert counts.max() < 1.3 * len(keys) / width


def test_random_growth_depends_on_its_key_and_matrix():
    targets = {name: TARGETS[name] for name in ("one", "stack")}
    one, same, other = (run(sj.RandomGrowth(key), 2, targets) for key in (1, 1, 2))
    jax.tree.map(np.testing.assert_array_equal, one, same)
    assert one[-1]["one"].tolist() != other[-1]["one"].tolist()
    grown = [set(after) - set(before) for before, after in zip(one[0]["stack"], one[1]["stack"], strict=True)]
    assert grown[0] != grown[1] or grown[1] != grown[2]
    shapes = jax.eval_shape(lambda seed: sj.RandomGrowth(seed).init(TARGETS, {}), 0)
    assert shapes["blocks"].shape == (2, 2, 2)


def test_without_a_rate_a_random_mask_is_static():
    plan = sj.Reselection(30, every=1, accumulation=1, rate=sj.constant(0.0), first=None)
    history = run(sj.RandomGrowth(), 5, plan=plan)
    jax.tree.map(np.testing.assert_array_equal, history[0], history[-1])


def test_no_growth_replaces_nothing_even_when_asked_to():
    history = run(sj.NoGrowth(), 5)
    jax.tree.map(np.testing.assert_array_equal, history[0], history[-1])


def weights(dtype, rng):
    named = {name: rng.integers(-9, 10, (*t.stack, *t.shape)) for name, t in TARGETS.items()}  # many ties
    return {name: jnp.array(w, dtype) for name, w in named.items()}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("largest", [True, False])
def test_magnitude_positions_are_those_of_sorting(dtype, largest):
    params = weights(dtype, np.random.default_rng(0))
    found = jax.jit(lambda p: sj.magnitude_positions(p, TARGETS, largest=largest))(params)
    for name, target in TARGETS.items():
        rows, columns = target.block
        weight = np.abs(np.asarray(params[name], np.float64))
        blocks = weight.reshape(*target.stack, target.grid[0], rows, target.grid[1], columns)
        blocks = blocks.swapaxes(-2, -3).reshape(-1, target.block_size)
        order = np.argsort(-blocks if largest else blocks, axis=-1, kind="stable")
        expected = np.sort(order[:, : target.block_count], axis=-1)
        np.testing.assert_array_equal(found[name].indices.reshape(expected.shape), expected)
        assert found[name].values is None
        assert found[name].indices.dtype == jnp.int32


def test_magnitude_positions_of_some_layers():
    params = {"w": jnp.array(np.random.default_rng(0).standard_normal((3, 4, 5)), jnp.float32)}
    whole = sj.magnitude_positions(params, {"w": sj.Target((4, 5), 3, stack=(3,))})
    part = sj.magnitude_positions(params, {"w@0,2": sj.Target((4, 5), 3, stack=(2,), layers=(0, 2))})
    np.testing.assert_array_equal(part["w@0,2"].indices, whole["w"].indices[jnp.array([0, 2])])
    with pytest.raises(KeyError, match="no parameter 'v'"):
        sj.magnitude_positions(params, {"v": sj.Target((4, 5), 3)})


def test_place_refuses_what_does_not_fit():
    tx = optax.chain(optax.clip(1.0), sj.spiel_ma(0.1, TARGETS, total_steps=5))
    state = tx.init(sj.zeros(TARGETS))
    params = weights(jnp.float32, np.random.default_rng(0))
    positions = jax.jit(lambda params: sj.magnitude_positions(params, TARGETS))(params)
    placed = sj.place(state, positions)
    jax.tree.map(np.testing.assert_array_equal, optax.tree.get(placed, "active"), positions)
    jax.tree.map(np.testing.assert_array_equal, sj.place(placed, optax.tree.get(state, "active")), state)
    with pytest.raises(ValueError, match="do not fit the state"):
        sj.place(state, {name: positions[name] for name in ("one", "stack")})
    with pytest.raises(ValueError, match="no state of spiel"):
        sj.place(optax.sgd(0.1).init({}), positions)
