"""spiel(): drop and grow, worked by hand and in other people's code."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support.programs import AS_USERS

import spiel_jax as sj
from spiel_jax.optim.criteria.accumulated_gradients import AccumulatedGradients
from spiel_jax.optim.criteria.activations import LargestOutputs, WeightTimesInput
from spiel_jax.optim.criteria.lift import LowRankMagnitude
from spiel_jax.optim.criteria.moment_approximation import MomentApproximation
from spiel_jax.optim.criteria.salience import GradientOverWeight
from spiel_jax.optim.inner_optimizers import descend, scale_by_aged_adam
from spiel_jax.optim.positions import initial_positions, random_indices

EIGHT = {"w": sj.Target(shape=(2, 4), count=3)}


def start(tx, indices):
    """State with given positions instead of random ones."""
    values = sj.zeros(EIGHT)
    state = tx.init(values)
    delta = EIGHT["w"].delta(jnp.array(indices, jnp.int32))
    return values, optax.tree.set(state, active={"w": delta})


def schedule(**options):
    options = {
        "total_steps": 2,
        "every": 2,
        "accumulation": 2,
        "rate": sj.constant(0.5),
        "first": None,
    } | options
    return sj.Reselection(**options)


def candidates(indices, values):
    return {"w": EIGHT["w"].delta(jnp.array(indices, jnp.int32), jnp.array(values, jnp.float32))}


def test_accumulated_gradients_by_hand():
    """Eight entries, three active; one of them is replaced after two steps."""
    inner = optax.sgd(1.0)
    tx = sj.spiel(inner, EIGHT, growth=AccumulatedGradients(), schedule=schedule())
    values, state = start(tx, [0, 3, 6])

    grads = {"w": jnp.array([0.5, -0.1, 0.3])}
    seen = candidates([1, 4, 5], [0.2, -0.9, 0.4])
    updates, state = tx.update(grads, state, values, candidates=seen, phase=sj.Phase.PROPOSE, reselect=False)
    values = optax.apply_updates(values, updates)
    np.testing.assert_allclose(values["w"], [-0.5, 0.1, -0.3])

    # |sums| are 0.3 at 1, 0.1 at 4, 0.7 at 5; values are -0.6, 0.05, -0.4: 3 leaves, 5 comes
    grads = {"w": jnp.array([0.1, 0.05, 0.1])}
    seen = candidates([1, 4, 5], [0.1, 0.8, 0.3])
    updates, state = tx.update(grads, state, values, candidates=seen, phase=sj.Phase.ESTIMATE, reselect=True)
    values = optax.apply_updates(values, updates)
    delta = sj.deltas(values, state)["w"]
    assert delta.indices.tolist() == [0, 5, 6]
    np.testing.assert_allclose(delta.values, [-0.6, 0.0, -0.4], rtol=1e-6)
    assert float(optax.tree.get(state, "replaced")) == pytest.approx(1 / 3)
    assert optax.tree.get(state, "growth")["w"].indices.tolist() == [8, 8, 8]  # forgotten


@pytest.mark.parametrize(
    ("seeds", "moments", "begun"),
    [
        ("second", [0.0, 0.125 * 0.0199], 2),
        ("both", [0.35 * 0.19, 0.125 * 0.0199], 2),
        ("neither", [0.0, 0.0], 0),
    ],
)
def test_accumulated_gradients_seed_the_moments(seeds, moments, begun):
    inner = optax.chain(scale_by_aged_adam(0.9, 0.99), descend(0.0))
    growth = AccumulatedGradients(0.9, 0.99, seeds=seeds)
    tx = sj.spiel(inner, EIGHT, growth=growth, schedule=schedule())
    values, state = start(tx, [0, 3, 6])
    values = {"w": jnp.array([-0.6, 0.05, -0.4])}
    grads = {"w": jnp.array([1.0, 1.0, 1.0])}
    for phase, seen in ((sj.Phase.PROPOSE, 0.4), (sj.Phase.ESTIMATE, 0.3)):
        _, state = tx.update(
            grads,
            state,
            values,
            candidates=candidates([5], [seen]),
            phase=phase,
            reselect=phase is sj.Phase.ESTIMATE,
        )
    # mean gradient 0.35, mean square 0.125, both as if seen for 2 steps
    mu, nu, age = (optax.tree.get(state, name)["w"] for name in ("mu", "nu", "age"))
    np.testing.assert_allclose(mu, [0.19, moments[0], 0.19], rtol=1e-5)
    np.testing.assert_allclose(nu, [0.0199, moments[1], 0.0199], rtol=1e-4)
    assert age.tolist() == [2, begun, 2]


def test_moment_approximation_by_hand():
    """Rows [.25, .09], columns [.25, 0, .09, .01]: 2 and 4 tie at .0225, the lower grows."""
    tx = sj.spiel(
        optax.sgd(1.0), EIGHT, growth=MomentApproximation(), schedule=schedule(every=1, accumulation=1)
    )
    values, state = start(tx, [0, 3, 6])
    updates, state = tx.update({"w": jnp.array([0.5, -0.1, 0.3])}, state, values)
    values = optax.apply_updates(values, updates)
    delta = sj.deltas(values, state)["w"]
    assert delta.indices.tolist() == [0, 2, 6]
    np.testing.assert_allclose(delta.values, [-0.5, 0.0, -0.3])
    row, column = optax.tree.get(state, "growth")["w"]
    np.testing.assert_allclose(row, [0.25, 0.09], rtol=1e-6)
    np.testing.assert_allclose(column, [0.25, 0, 0.09, 0.01], rtol=1e-6)


def test_fewer_candidates_than_slots_replaces_fewer():
    tx = sj.spiel(
        optax.sgd(1.0),
        EIGHT,
        growth=AccumulatedGradients(),
        schedule=schedule(total_steps=1, every=1, accumulation=1, rate=sj.constant(1.0)),
    )
    values, state = start(tx, [0, 3, 6])
    seen = candidates([1, 8, 8], [0.2, 0.0, 0.0])  # one candidate, two unused slots
    updates, state = tx.update({"w": jnp.array([0.5, -0.1, 0.3])}, state, values, candidates=seen)
    values = optax.apply_updates(values, updates)
    assert sj.deltas(values, state, sort=True)["w"].indices.tolist() == [0, 1, 6]


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_a_candidate_whose_gradient_is_not_finite_does_not_grow(bad):
    tx = sj.spiel(
        optax.sgd(1.0),
        EIGHT,
        growth=AccumulatedGradients(),
        schedule=schedule(total_steps=1, every=1, accumulation=1, rate=sj.constant(1.0)),
    )
    values, state = start(tx, [0, 3, 6])
    seen = candidates([1, 4, 5], [0.2, bad, 0.3])
    updates, state = tx.update({"w": jnp.array([0.5, -0.1, 0.3])}, state, values, candidates=seen)
    values = optax.apply_updates(values, updates)
    assert sj.deltas(values, state, sort=True)["w"].indices.tolist() == [0, 1, 5]
    assert np.isfinite(values["w"]).all()


def test_sorted_deltas_leave_the_run_sorted():
    tx = sj.spiel_ma(0.1, EIGHT, total_steps=3)
    values, state = start(tx, [6, 0, 3])
    values = {"w": jnp.array([1.0, 2.0, 3.0])}
    delta = sj.deltas(values, state, sort=True)["w"]
    assert delta.indices.tolist() == [0, 3, 6]
    assert delta.values.tolist() == [2.0, 3.0, 1.0]
    assert sj.deltas(values, state)["w"].indices.tolist() == [6, 0, 3]


@pytest.mark.parametrize(
    "growth", [AccumulatedGradients(), pytest.param(MomentApproximation(), marks=pytest.mark.slow)]
)
def test_long_runs_keep_positions_distinct_and_their_number(growth):
    """Reselection at every step, everything replaced at the first, integer gradients full of ties."""
    targets = {
        "one": sj.Target(shape=(5, 7), count=11),
        "stack": sj.Target(shape=(4, 6), count=9, stack=(3,)),
        "blocks": sj.Target(shape=(4, 6), count=8, grid=(2, 2)),
        "full": sj.Target(shape=(2, 3), count=6),
    }
    plan = sj.Reselection(30, every=1, accumulation=1, rate=sj.constant(0.4))
    inner = optax.chain(scale_by_aged_adam(), descend(0.1))
    tx = sj.spiel(inner, targets, growth=growth, schedule=plan, seed=1)
    values = sj.zeros(targets)
    state = tx.init(values)
    rng = np.random.default_rng(0)

    @jax.jit
    def step(values, state, dense):
        active = sj.deltas(values, state)
        grads = {name: sj.gather(dense[name], delta) for name, delta in active.items()}
        seen = None
        if growth.uses_candidates:
            counts = {name: growth.count(target) for name, target in targets.items()}
            seen = sj.propose(dense, active, counts)
        updates, state = tx.update(grads, state, values, candidates=seen)
        return optax.apply_updates(values, updates), state

    replaced = 0.0
    for _ in range(30):
        dense = {n: rng.integers(-2, 3, (*t.stack, *t.shape)).astype(np.float32) for n, t in targets.items()}
        before = {n: np.asarray(d.indices) for n, d in sj.deltas(values, state).items()}
        values, state = step(values, state, dense)
        for name, target in targets.items():
            delta = sj.deltas(values, state)[name]
            rows = np.asarray(delta.indices).reshape(-1, target.block_count)
            assert all(len(set(row)) == target.block_count for row in rows)
            assert rows.min() >= 0
            assert rows.max() < target.block_size
            changed = before[name] != np.asarray(delta.indices)
            assert not np.asarray(delta.values)[changed].any()  # grown entries start at zero
        replaced += float(optax.tree.get(state, "replaced"))
    assert replaced > 1.0


@pytest.mark.slow
@pytest.mark.parametrize("growth", [AccumulatedGradients(), MomentApproximation()])
def test_matrices_reselected_together_come_out_as_one_by_one(growth, monkeypatch):
    targets = {"w": sj.Target(shape=(4, 6), count=9, stack=(6,))}
    plan = sj.Reselection(8, every=1, accumulation=1, rate=sj.constant(0.4))
    inner = optax.chain(scale_by_aged_adam(), descend(0.1))

    def run(slots_at_a_time):
        monkeypatch.setattr("spiel_jax.sparse.matrices._SLOTS_AT_A_TIME", slots_at_a_time)
        tx = sj.spiel(inner, targets, growth=growth, schedule=plan, seed=1)
        values = sj.zeros(targets)
        state = tx.init(values)
        rng = np.random.default_rng(0)
        loops = str(jax.make_jaxpr(tx.update)(values, state, values, candidates=sj.deltas(values, state)))
        for _ in range(8):
            dense = {"w": rng.integers(-2, 3, (6, 4, 6)).astype(np.float32)}
            active = sj.deltas(values, state)
            seen = sj.propose(dense, active, {"w": 9}) if growth.uses_candidates else None
            grads = {"w": sj.gather(dense["w"], active["w"])}
            updates, state = tx.update(grads, state, values, candidates=seen)
            values = optax.apply_updates(values, updates)
        return (values, state), {n for n in (1, 2, 3, 6) if f"length={n}" in loops}

    alone, loops = run(1)
    assert 6 in loops
    for slots, length in ((9 * 3, 2), (9 * 4, 2), (10**6, 1)):  # divisors of the number of matrices only
        together, loops = run(slots)
        assert length in loops
        assert 6 not in loops
        jax.tree.map(np.testing.assert_array_equal, together, alone)


@pytest.mark.slow
@pytest.mark.parametrize("method", [sj.spiel_ag, sj.spiel_ma])
def test_phases_follow_from_the_count_where_the_host_does_not_give_them(method):
    targets = {"w": sj.Target(shape=(6, 8), count=10, stack=(2,))}
    plan = sj.Reselection(12, every=4, accumulation=2)
    tx = method(0.01, targets, schedule=plan)
    update = jax.jit(tx.update, static_argnames=("phase", "reselect"))
    rng = np.random.default_rng(0)
    told = derived = (sj.zeros(targets), tx.init(sj.zeros(targets)))
    for step in range(1, 13):
        dense = {"w": jnp.array(rng.standard_normal((2, 6, 8)), jnp.float32)}

        def advance(values, state, dense=dense, step=step, **static):
            active = sj.deltas(values, state)
            grads = {"w": sj.gather(dense["w"], active["w"])}
            seen = sj.propose(dense, active, {"w": 10})
            if plan.estimates(step) and method is sj.spiel_ag:  # gradients at the known candidates
                known = targets["w"].delta(optax.tree.get(state, "growth")["w"].indices)
                seen = {"w": known.with_values(sj.gather(dense["w"], known))}
            updates, state = update(grads, state, values, candidates=seen, **static)
            return optax.apply_updates(values, updates), state

        told = advance(*told, phase=plan.phase(step), reselect=bool(plan.reselects(step)))
        derived = advance(*derived)
        for a, b in zip(jax.tree.leaves(told), jax.tree.leaves(derived), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6)
        np.testing.assert_array_equal(sj.deltas(*told)["w"].indices, sj.deltas(*derived)["w"].indices)


def test_candidates_are_asked_for():
    tx = sj.spiel_ag(0.1, EIGHT, total_steps=100)
    values, state = start(tx, [0, 3, 6])
    grads = {"w": jnp.ones(3)}
    with pytest.raises(ValueError, match="needs candidates="):
        tx.update(grads, state, values)
    tx.update(grads, state, values, phase=sj.Phase.PLAIN, reselect=False)
    with pytest.raises(ValueError, match="needs the values"):
        tx.update(grads, state)


@pytest.mark.parametrize(
    "inner", [optax.adafactor(1e-3, min_dim_size_to_factor=2), optax.lbfgs()], ids=["adafactor", "lbfgs"]
)
def test_inner_state_that_is_not_per_entry_is_refused(inner):
    targets = {"w": sj.Target(shape=(4, 8), count=8, stack=(4,))}
    tx = sj.spiel(inner, targets, growth=MomentApproximation(), schedule=schedule())
    with pytest.raises(TypeError, match="per entry"):
        tx.init(sj.zeros(targets))


def test_values_must_match_the_targets():
    tx = sj.spiel_ma(0.1, EIGHT, total_steps=3)
    with pytest.raises(ValueError, match="no values for"):
        tx.init({"v": jnp.zeros(3)})
    with pytest.raises(ValueError, match=r"expected \(3,\)"):
        tx.init({"w": jnp.zeros(4)})
    with pytest.raises(ValueError, match="no state of spiel"):
        sj.deltas({"w": jnp.zeros(3)}, optax.sgd(0.1).init({"w": jnp.zeros(3)}))
    with pytest.raises(ValueError, match="schedule or total_steps"):
        sj.spiel_ma(0.1, EIGHT)


def test_clip_norm_scales_candidates_alike():
    tx = sj.spiel(optax.sgd(1.0), EIGHT, growth=AccumulatedGradients(), schedule=schedule(), clip_norm=1.0)
    values, state = start(tx, [0, 3, 6])
    updates, state = tx.update(
        {"w": jnp.array([3.0, 0.0, 4.0])},
        state,
        values,
        candidates=candidates([1], [10.0]),
        phase=sj.Phase.PROPOSE,
        reselect=False,
    )
    np.testing.assert_allclose(updates["w"], [-0.6, 0.0, -0.8], rtol=1e-6)
    np.testing.assert_allclose(optax.tree.get(state, "growth")["w"].grad_sum, [2.0], rtol=1e-6)


def test_clip_norm_of_narrow_gradients_is_exact():
    tx = sj.spiel(optax.sgd(1.0), EIGHT, growth=AccumulatedGradients(), schedule=schedule(), clip_norm=1.0)
    values, state = start(tx, [0, 3, 6])
    grads = {"w": jnp.ones(3, jnp.bfloat16)}  # in bfloat16 their norm would be 1.734
    seen = candidates([1], [10.0])
    _, state = tx.update(grads, state, values, candidates=seen, phase=sj.Phase.PROPOSE, reselect=False)
    np.testing.assert_allclose(optax.tree.get(state, "growth")["w"].grad_sum, [10 / np.sqrt(3)], rtol=1e-6)


def test_random_indices_are_distinct_sorted_and_spread():
    draw = jax.jit(random_indices, static_argnums=(1, 2))
    counts = np.zeros(10)
    for seed in range(300):
        indices = np.asarray(draw(jax.random.key(seed), 10, 4))
        assert len(set(indices)) == 4
        assert (np.diff(indices) > 0).all()
        counts[indices] += 1
    assert counts.min() > 60  # 120 each on average
    assert draw(jax.random.key(0), 7, 7).tolist() == list(range(7))
    large = np.asarray(random_indices(jax.random.key(0), 2**31 - 1, 1000))
    assert (np.diff(large) > 0).all()
    assert large[-1] > 2**31 - 2**23


def test_initial_positions_take_no_memory_of_the_size_of_the_weight():
    target = {"w": sj.Target(shape=(8192, 28672), count=10_000)}
    compiled = jax.jit(lambda seed: initial_positions(target, seed)).lower(0).compile(AS_USERS)
    assert compiled.memory_analysis().temp_size_in_bytes < 1_000_000


def test_initial_positions_depend_on_seed_and_name_only():
    pair = {"a": sj.Target((8, 8), 6), "b": sj.Target((8, 8), 6)}
    both = initial_positions(pair, 0)
    assert both["a"].indices.tolist() != both["b"].indices.tolist()
    assert initial_positions({"b": pair["b"]}, 0)["b"].indices.tolist() == both["b"].indices.tolist()
    assert initial_positions(pair, 1)["a"].indices.tolist() != both["a"].indices.tolist()
    assert initial_positions(pair, jax.random.key(0))["a"].indices.tolist() == both["a"].indices.tolist()


@pytest.mark.slow  # by default as the README has it: tests/docs/test_code_blocks.py
def test_composes_in_other_code():
    """The user's code of the README: Optax around a model that is not ours."""
    rng = np.random.default_rng(0)
    params = {"hidden": jnp.array(rng.standard_normal((16, 4)), jnp.float32) / 2, "out": jnp.ones((1, 16))}
    x = jnp.array(rng.standard_normal((64, 4)), jnp.float32)
    y = jnp.sin(x[:, :1])

    targets = sj.find_targets(params, density=0.3)
    tx = optax.chain(optax.clip_by_global_norm(1.0), sj.spiel_ma(3e-2, targets, total_steps=200))
    values = sj.zeros(targets)
    opt_state = tx.init(values)

    def loss(params):
        return jnp.mean((jnp.tanh(x @ params["hidden"].T) @ params["out"].T - y) ** 2)

    @jax.jit
    def step(values, opt_state):
        loss_fn = lambda values: loss(sj.merge(params, sj.deltas(values, opt_state)))  # noqa: E731
        updates, opt_state = tx.update(jax.grad(loss_fn)(values), opt_state, values)
        return optax.apply_updates(values, updates), opt_state

    for _ in range(200):
        values, opt_state = step(values, opt_state)
    assert step._cache_size() == 1
    assert loss(sj.merge(params, sj.deltas(values, opt_state))) < loss(params) / 3


def test_init_is_pure():
    tx = sj.spiel_ag(0.1, EIGHT, total_steps=3, seed=4)
    values = sj.zeros(EIGHT)
    eager, jitted = tx.init(values), jax.jit(tx.init)(values)
    jax.tree.map(np.testing.assert_array_equal, eager, jitted)
    shapes = jax.eval_shape(tx.init, values)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), shapes) == jax.tree.map(
        lambda a: (a.shape, a.dtype), eager
    )


@pytest.mark.parametrize(
    "growth",
    [
        LowRankMagnitude(),
        GradientOverWeight(),
        WeightTimesInput(),
        LargestOutputs(),
        sj.MomentApproximation(keep_zeros=True),
        sj.RandomGrowth(keep_zeros=True),
    ],
    ids=lambda growth: type(growth).__name__,
)
def test_a_criterion_that_looks_at_weights_says_that_there_are_none(growth):
    plan = sj.Reselection(1, 1, 1, sj.constant(1.0), first=None)
    target = {"w": sj.Target((3, 3), 3)}
    tx = sj.spiel(sj.aged_adamw(0.1), target, growth=growth, schedule=plan)
    values, candidates = sj.zeros(target), {"w": target["w"].delta(jnp.arange(3), jnp.ones(3))}
    with pytest.raises(ValueError, match=rf"{type(growth).__name__} looks .*give update\(weights=\)"):
        tx.update({"w": jnp.zeros(3)}, tx.init(values), values, candidates=candidates)
