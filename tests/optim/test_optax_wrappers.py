"""spiel() inside Optax's wrappers: right, or refused."""

import functools
from collections import OrderedDict

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support.optax_cases import (
    METHODS,
    PLAN,
    STEPS,
    TARGETS,
    Method,
    around,
    assert_equal,
    gradients,
    step,
    weights,
)

import spiel_jax as sj

METHOD = {"spiel_ag": sj.spiel_ag, "spiel_ma": sj.spiel_ma}
both = pytest.mark.parametrize("name", METHOD)
# What wraps it knows nothing of the method: the one with candidates by default.
quick_and_slow = pytest.mark.parametrize(
    "name", ["spiel_ag", pytest.param("spiel_ma", marks=pytest.mark.slow)]
)


def start(tx):
    values = sj.zeros(TARGETS)
    return values, jax.jit(tx.init)(values)


def stepper(tx, needs=None):
    return jax.jit(
        lambda values, state, goal, **static: step(Method(tx, needs), values, state, goal, **static),
        static_argnames=("phase", "reselect"),
    )


def assert_close(a, b):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), a, b)


def assert_sound(values, state):
    """Positions are distinct and in range, and values finite."""
    for name, delta in sj.deltas(values, state).items():
        target = TARGETS[name]
        for row in np.asarray(delta.indices).reshape(-1, target.block_count):
            assert len(set(row)) == target.block_count
            assert 0 <= row.min() <= row.max() < target.block_size
        assert np.isfinite(delta.values).all()


# optax.inject_hyperparams


def injected(name, *static, **numbers):
    """The alias with its numbers in the state; ``candidate_ratio`` has a default that is a number."""
    static += ("candidate_ratio",) if name == "spiel_ag" else ()
    return optax.inject_hyperparams(METHOD[name], static_args=static)(
        targets=TARGETS, schedule=PLAN, **numbers
    )


@quick_and_slow
def test_injected_learning_rate_schedule(name):
    rate = optax.linear_schedule(0.2, 0.0, STEPS)
    exact = {"b1": 0.5, "b2": 0.75} if name == "spiel_ag" else {}  # 1 - 0.999 is another number in float32
    ours = injected(name, learning_rate=rate, **exact)
    plain = METHOD[name](rate, TARGETS, schedule=PLAN, **exact)
    runs = [(stepper(tx), start(tx)) for tx in (ours, plain)]
    carries = []
    for run, carry in runs:
        for _ in range(STEPS):
            carry = run(*carry, weights())
        assert run._cache_size() == 1
        carries.append(carry)
    (values, state), (expected, plain_state) = carries
    assert float(state.hyperparams["learning_rate"]) == pytest.approx(0.2 / STEPS)
    assert_close(values, expected)
    assert_close(state.inner_state, plain_state)


@pytest.mark.parametrize(
    ("name", "numbers"),
    [
        (
            "spiel_ag",
            {"learning_rate": 0.3, "b1": 0.5, "b2": 0.75, "eps": 1e-2, "weight_decay": 0.5, "clip_norm": 0.5},
        ),
        pytest.param(
            "spiel_ma",
            {"learning_rate": 0.05, "eps": 1e-1, "weight_decay": 0.5, "clip_norm": 0.5},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_injected_numbers_change_while_it_runs(name, numbers):
    """Up to and including a reselection; for one with other numbers from the start it is the same program."""
    usual = {"learning_rate": 0.1, "clip_norm": 9.0}
    tx = injected(name, **usual)
    run = stepper(tx)
    values, state = start(tx)
    for number, there in numbers.items():
        state.hyperparams[number] = jnp.float32(there)
    other = METHOD[name](targets=TARGETS, schedule=PLAN, **usual | numbers)
    other_run = stepper(other)
    carry, expected, unchanged = (values, state), start(other), start(tx)
    for _ in range(PLAN.accumulation):
        carry, expected = run(*carry, weights()), other_run(*expected, weights())
        unchanged = run(*unchanged, weights())
    assert run._cache_size() == 1
    assert_close(carry[0], expected[0])
    assert_close(carry[1].inner_state, expected[1])
    assert not np.allclose(carry[0]["one"], unchanged[0]["one"])


@both
def test_injected_seeds_may_be_numbers_or_keys(name):
    values = sj.zeros(TARGETS)
    plain = METHOD[name](0.1, TARGETS, schedule=PLAN, seed=5).init(values)
    for seed in (5, jax.random.key(5)):
        state = jax.jit(injected(name, learning_rate=0.1, seed=seed).init)(values)
        assert_equal(state.inner_state, plain)


@pytest.mark.parametrize("jit", [jax.jit, lambda function: function])
def test_what_must_be_static_says_so(jit):
    values = sj.zeros(TARGETS)
    for name in METHOD:
        tx = optax.inject_hyperparams(METHOD[name], static_args=("candidate_ratio",) * (name == "spiel_ag"))
        with pytest.raises(TypeError, match=r"total_steps must be static.*static_args"):
            jit(tx(0.1, TARGETS, total_steps=9).init)(values)
    tx = optax.inject_hyperparams(sj.spiel_ag, static_args="total_steps")(0.1, TARGETS, total_steps=9)
    with pytest.raises(TypeError, match=r"candidate_ratio must be static.*static_args"):
        jit(tx.init)(values)
    tx = optax.inject_hyperparams(sj.spiel_ag, static_args=("total_steps", "candidate_ratio"))
    assert len(jit(tx(0.1, TARGETS, total_steps=9).init)(values).hyperparams) == 6


# optax.chain


def one_reselection(tx):
    """Values before and after a step with a reselection, and which slots it replaced."""
    values, state = start(tx)
    values = jax.tree.map(lambda v: jax.random.normal(jax.random.key(1), v.shape), values)
    update = jax.jit(tx.update, static_argnames="reselect")
    updates, new = update(gradients(values, state, weights())[0], state, values, reselect=True)
    before, after = sj.deltas(values, state), sj.deltas(optax.apply_updates(values, updates), new)
    return [(before[n].values, after[n].values, before[n].indices != after[n].indices) for n in TARGETS]


def test_a_scaling_after_it_leaves_a_part_of_dropped_values_to_grown_entries():
    scaled = optax.chain(around(optax.sgd(0.1)), optax.scale(0.25))
    for before, after, replaced in one_reselection(scaled):
        np.testing.assert_allclose(after[replaced], 0.75 * before[replaced], rtol=1e-6)
        assert replaced.sum() == replaced.size / 2
    inside = around(optax.chain(optax.sgd(0.1), optax.scale(0.25)))
    for _, after, replaced in one_reselection(inside):
        assert not after[replaced].any()
        assert replaced.sum() == replaced.size / 2


def test_narrow_gradients_leave_nothing_of_dropped_values():
    tx = around(optax.sgd(0.1))
    values, state = start(tx)
    values = jax.tree.map(lambda v: v + 1 / 3, values)  # not a bfloat16 number
    grads = jax.tree.map(lambda v: jnp.full(v.shape, 0.1, jnp.bfloat16), values)
    for reselect in (True, None):  # None: behind a lax.cond
        state = optax.tree.set(state, spiel_count=jnp.int32(PLAN.steps[0] - 1))
        updates, new = jax.jit(tx.update, static_argnames="reselect")(grads, state, values, reselect=reselect)
        for name, value in optax.apply_updates(values, updates).items():
            replaced = state.active[name].indices != new.active[name].indices
            assert replaced.sum() == replaced.size / 2
            np.testing.assert_array_equal(value == 0, replaced)


# optax.partition, optax.masked


@quick_and_slow
def test_sparse_and_dense_parts_train_in_one_tree(name):
    """The dense part has a parameter of a target's name."""
    method, dense_tx = METHODS[name](), optax.adam(0.1)
    tx = optax.partition({"sparse": method.tx, "dense": dense_tx}, {"sparse": "sparse", "dense": "dense"})
    values, state = start(method.tx)
    dense = {"bias": jnp.ones(3), "one": jnp.ones((2, 2))}
    params = {"dense": dense, "sparse": values}
    together = jax.jit(tx.init)(params)
    dense_state = dense_tx.init(dense)

    @jax.jit
    def both_ways(params, together, values, state, dense, dense_state):
        grads, seen = gradients(params["sparse"], together, weights())
        grads = {"sparse": grads, "dense": jax.tree.map(lambda p: p**2, params["dense"])}
        updates, together = tx.update(grads, together, params, candidates=seen)
        values, state = step(method, values, state, weights())
        alone, dense_state = dense_tx.update(jax.tree.map(lambda p: p**2, dense), dense_state, dense)
        dense = optax.apply_updates(dense, alone)
        return optax.apply_updates(params, updates), together, values, state, dense, dense_state

    carry = params, together, values, state, dense, dense_state
    for _ in range(STEPS):
        carry = both_ways(*carry)
    params, together, values, state, dense, _ = carry
    assert_close(params, {"sparse": values, "dense": dense})
    ours, alone = sj.deltas(params["sparse"], together), sj.deltas(values, state)
    for target in TARGETS:
        np.testing.assert_array_equal(ours[target].indices, alone[target].indices)


def test_masked_leaves_are_left_alone():
    tx = optax.masked(around(optax.adam(0.1)), {"sparse": True, "other": False, "none": False})
    values, other = sj.zeros(TARGETS), jnp.ones(3)
    params = {"sparse": values, "other": other, "none": None}
    state = tx.init(params)
    grads, _ = gradients(values, state, weights())
    updates, state = jax.jit(tx.update)({"sparse": grads, "other": other, "none": None}, state, params)
    np.testing.assert_array_equal(updates["other"], other)
    assert all(np.all(leaf) for leaf in updates["sparse"].values())


def test_two_of_them_in_one_tree():
    one, stack = ({name: TARGETS[name]} for name in TARGETS)
    approximate = sj.spiel_ma(0.1, one, schedule=PLAN)
    random = sj.spiel(optax.adam(0.1), stack, growth=sj.RandomGrowth(), schedule=PLAN)
    tx = optax.partition({"ma": approximate, "random": random}, {"one": "ma", "stack": "random"})
    values, state = start(tx)
    begin = sj.deltas(values, state)
    grads = jax.tree.map(jnp.ones_like, values)
    update = jax.jit(tx.update)
    for _ in range(PLAN.accumulation):
        updates, state = update(grads, state, values)
        values = optax.apply_updates(values, updates)
    assert_sound(values, state)
    for name, delta in sj.deltas(values, state).items():
        assert np.mean(delta.indices != begin[name].indices) == 0.5

    same = optax.partition({"a": approximate, "b": approximate}, {"x": "a", "y": "b"})
    values = {"x": sj.zeros(one), "y": sj.zeros(one)}
    state = same.init(values)
    with pytest.raises(ValueError, match=r"several states of spiel\(\) have the targets \['one'\]"):
        sj.deltas(values["x"], state)
    assert sj.deltas(values["x"], state.inner_states["a"])["one"].values.shape == (12,)


def test_seeds_reach_the_moments_of_every_part_of_a_partitioned_inner_optimizer():
    """Targets and states of the same names: neither is taken for the other."""
    targets = {"mu": sj.Target((5, 7), 6), "active": sj.Target((4, 6), 6)}
    parts = {"a": sj.scale_by_aged_adam(), "b": optax.scale_by_adam(), "c": optax.sgd(0.1, 0.9)}
    plan = sj.Reselection(9, every=1, accumulation=1, rate=sj.constant(0.5), first=None)
    for labels in ({"mu": "a", "active": "b"}, {"mu": "c", "active": "b"}):
        growth = sj.AccumulatedGradients(0.9, 0.99, seeds="both")
        tx = sj.spiel(optax.partition(parts, labels), targets, growth=growth, schedule=plan)
        values = sj.zeros(targets)
        state = tx.init(values)
        active = sj.deltas(values, state)
        dense = {n: jnp.arange(1.0, 1 + t.block_size).reshape(t.shape) for n, t in targets.items()}
        grads = {n: sj.gather(dense[n], d) for n, d in active.items()}
        seen = sj.propose(dense, active, dict.fromkeys(targets, 6))
        updates, new = jax.jit(tx.update)(grads, state, values, candidates=seen)
        after = sj.deltas(optax.apply_updates(values, updates), new)
        for name in targets:
            gradient = np.where(
                after[name].indices != active[name].indices,
                np.asarray(dense[name]).reshape(-1)[after[name].indices],
                grads[name],
            )
            inner = new.inner.inner_states[labels[name]].inner_state
            if labels[name] == "c":
                fresh = after[name].indices != active[name].indices
                np.testing.assert_allclose(inner[0].trace[name], np.where(fresh, 0, gradient), rtol=1e-6)
            else:
                np.testing.assert_allclose(inner.mu[name], 0.1 * gradient, rtol=1e-5)
                kept = after[name].indices == active[name].indices
                weight = np.where(kept, 0.001, 0.01)  # the growth's decay is not the optimizer's
                np.testing.assert_allclose(inner.nu[name], weight * gradient**2, rtol=1e-4)
        nested = state._replace(growth={name: {"active": stats} for name, stats in state.growth.items()})
        assert_equal(sj.deltas(values, nested), active)


@pytest.mark.parametrize("kind", [lambda d: OrderedDict(reversed(d.items())), flax.core.freeze])
def test_other_dictionaries_and_orders(kind):
    tx = sj.spiel_ma(0.1, TARGETS, schedule=PLAN)
    grads = jax.tree.map(jnp.ones_like, sj.zeros(TARGETS))
    values, state = kind(sj.zeros(TARGETS)), tx.init(kind(sj.zeros(TARGETS)))
    plain, plain_state = start(tx)
    update = jax.jit(tx.update)
    for _ in range(PLAN.accumulation):
        updates, state = update(kind(grads), state, values)
        values = optax.apply_updates(values, updates)
        plain_updates, plain_state = update(grads, plain_state, plain)
        plain = optax.apply_updates(plain, plain_updates)
    assert type(values) is type(kind({}))
    assert_equal(dict(values), plain)
    assert_equal(sj.deltas(values, state), sj.deltas(plain, plain_state))


# optax.MultiSteps


@pytest.mark.slow
def test_multi_steps_are_the_run_with_mean_gradients():
    goals, micro = [weights(seed) for seed in range(3)], 3
    mean = jax.tree.map(lambda *g: sum(g) / micro, *goals)
    for inner in (METHODS["spiel_ma"]().tx, optax.chain(optax.clip(1.0), METHODS["schedule-free"]().tx)):
        multi = optax.MultiSteps(inner, micro)
        run, whole = stepper(multi), stepper(inner)
        ours, expected = start(multi), start(inner)
        for _ in range(STEPS):
            for goal in goals:
                ours = run(*ours, goal)
            expected = whole(*expected, mean)
            assert_close(ours[0], expected[0])
            assert_close(ours[1].inner_opt_state, expected[1])
            for a, b in zip(*(sj.deltas(*side).values() for side in (ours, expected)), strict=True):
                np.testing.assert_array_equal(a.indices, b.indices)
        assert int(optax.tree.get(ours[1], "spiel_count")) == STEPS
        assert run._cache_size() == 1


@pytest.mark.parametrize(
    "wrap",
    [
        lambda tx: tx,
        lambda tx: optax.chain(optax.clip_by_global_norm(1.0), tx),
        lambda tx: optax.apply_if_finite(optax.masked(tx, True), 3),
    ],
)
@pytest.mark.parametrize("jit", [jax.jit, lambda function: function])
def test_candidates_are_refused_inside_multi_steps(wrap, jit):
    values = sj.zeros(TARGETS)
    tx = wrap(sj.spiel_ag(0.1, TARGETS, schedule=PLAN))
    multi = optax.MultiSteps(tx, 2)
    for init in (multi.init, multi.gradient_transformation().init, optax.chain(multi).init):
        with pytest.raises(TypeError, match=r"SpIEL-AG inside optax.MultiSteps would see .* last micro-step"):
            jit(init)(values)
    state = jit(tx.init)(values)  # outside it is not refused
    ready = optax.MultiSteps(optax.identity(), 2).init(values)._replace(inner_opt_state=state)
    with pytest.raises(TypeError, match=r"SpIEL-AG inside optax.MultiSteps"):
        jit(multi.update)(values, ready, values)


def test_candidates_are_not_refused_around_multi_steps():
    tx = around(optax.MultiSteps(optax.adam(0.1), 2), sj.AccumulatedGradients())
    assert jax.eval_shape(tx.init, sj.zeros(TARGETS)).inner.acc_grads["one"].shape == (12,)


# optax.apply_if_finite


@quick_and_slow
def test_a_step_that_is_not_finite_changes_nothing(name):
    """Not even one that proposes, estimates or reselects: the phases of the state wait."""
    method = METHODS[name]()
    safe = optax.apply_if_finite(method.tx, 5)
    run, plain = stepper(safe), stepper(method.tx)
    ours, expected = start(safe), start(method.tx)
    bad = jax.tree.map(lambda g: g * jnp.nan, weights())
    for number in range(1, STEPS + 1):
        if number in (1, 2, 3, 4, 7):  # phases and reselections are at 1 to 3 and 5 to 7
            values, state = run(*ours, bad)
            assert_equal(values, ours[0])
            assert_equal(state.inner_state, ours[1].inner_state)
            ours = values, state
        ours, expected = run(*ours, weights()), plain(*expected, weights())
        np.testing.assert_allclose(ours[1].inner_state.replaced, expected[1].replaced)
    assert int(ours[1].total_notfinite) == 5
    assert_close(ours[0], expected[0])
    assert_close(ours[1].inner_state, expected[1])


RUNS_AHEAD = sj.Reselection(11, every=4, accumulation=3, rate=sj.constant(0.25))


@functools.cache
def runs_ahead(name):
    """Few programs for many places where a step may be skipped."""
    tx = optax.apply_if_finite(METHOD[name](0.1, TARGETS, schedule=RUNS_AHEAD), 5)
    return tx, stepper(tx)


@both
@pytest.mark.parametrize("skipped", [1, 3, 4, 5, 7])
def test_a_host_whose_count_runs_ahead_corrupts_nothing(name, skipped):
    """It does not replace everything again either, as the first reselection does."""
    plan, (tx, run) = RUNS_AHEAD, runs_ahead(name)
    carry, replaced = start(tx), {}
    for number in range(1, 12):
        goal = jax.tree.map(lambda g: g * jnp.nan, weights()) if number == skipped else weights()
        before = sj.deltas(*carry)
        ends = bool(plan.reselects(number))
        carry = run(*carry, goal, phase=plan.phase(number), reselect=ends)
        assert_sound(*carry)
        changed = [float(np.mean(d.indices != before[n].indices)) for n, d in sj.deltas(*carry).items()]
        if ends:
            replaced[number] = changed
    planned = {3: [1.0] * 2, 7: [0.25] * 2, 11: [0.25] * 2}
    planned[skipped] = [0.0] * 2
    if name == "spiel_ag" and skipped in (1, 5):  # nothing was proposed
        planned[skipped + 2] = [0.0] * 2
    assert replaced == {number: planned[number] for number in plan.steps}
