"""What Optax's own tests ask of every transformation, asked of ours."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support.optax_cases import (
    FIXED,
    METHODS,
    PLAN,
    SPIEL,
    STEPS,
    TARGETS,
    abstract,
    assert_equal,
    gradients,
    step,
    weights,
)

import spiel_jax as sj

every_method = pytest.mark.parametrize("name", METHODS)


def distinct(delta, target):
    rows = np.asarray(delta.indices).reshape(-1, target.block_count)
    return (
        all(len(set(row)) == len(row) for row in rows) and rows.min() >= 0 and rows.max() < target.block_size
    )


@every_method
def test_one_program_takes_strange_arguments_and_all_steps_of_a_run(name):
    method = METHODS[name]()
    run = jax.jit(lambda values, state, goal: step(method, values, state, goal, some_other_argument=1))
    values = sj.zeros(TARGETS)
    state = jax.jit(method.tx.init)(values)
    goal, replaced = weights(), []
    for _ in range(STEPS):
        values, state = run(values, state, goal)
        replaced.append(float(optax.tree.get(state, "replaced", 0.0)))
    assert run._cache_size() == 1
    if name in SPIEL:
        assert [s for s in range(1, STEPS + 1) if replaced[s - 1]] == PLAN.steps
        assert int(optax.tree.get(state, "spiel_count")) == STEPS
        assert all(distinct(d, TARGETS[n]) for n, d in sj.deltas(values, state).items())
    assert all(np.isfinite(leaf).all() and np.any(leaf) for leaf in jax.tree.leaves(values))


@pytest.mark.parametrize(
    ("name", "programs"), [("spiel_ag", 4), pytest.param("spiel_ma", 2, marks=pytest.mark.slow)]
)
def test_static_phases_take_few_programs_and_the_same_steps(name, programs):
    method = METHODS[name]()
    told = jax.jit(
        lambda values, state, goal, **static: step(method, values, state, goal, **static),
        static_argnames=("phase", "reselect"),
    )
    derived = jax.jit(lambda values, state, goal: step(method, values, state, goal))
    values = sj.zeros(TARGETS)
    ours = theirs = (values, method.tx.init(values))
    for number in range(1, STEPS + 1):
        phase = PLAN.phase(number) if method.needs == "candidates" else None
        ours = told(*ours, weights(), phase=phase, reselect=bool(PLAN.reselects(number)))
        theirs = derived(*theirs, weights())
    assert told._cache_size() == programs
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), ours, theirs)
    for a, b in zip(*(sj.deltas(*side).values() for side in (ours, theirs)), strict=True):
        np.testing.assert_array_equal(a.indices, b.indices)


@every_method
@pytest.mark.parametrize(
    "dtype",
    # of float32 the one program of all steps above tells it too
    [pytest.param("float32", marks=pytest.mark.slow), "bfloat16", "float64"],
)
def test_shapes_and_dtypes_are_stable(name, dtype):
    with jax.enable_x64(dtype == "float64"):
        method = METHODS[name]()
        goal = weights(dtype=dtype)
        values = sj.zeros(TARGETS, dtype)
        before = jax.eval_shape(method.tx.init, values)
        assert abstract(before) == abstract(method.tx.init(values))
        new, after = jax.eval_shape(lambda *args: step(method, *args), values, before, goal)
        assert abstract(after) == abstract(before)
        assert abstract(new) == abstract(values)
        # neither branch of a lax.cond may differ from the state it takes
        jax.eval_shape(
            lambda state: jax.lax.cond(
                state[0][next(iter(TARGETS))].sum() > 0, lambda: step(method, *state, goal), lambda: state
            ),
            (values, before),
        )


# Optax's own moments take the dtype of the gradients, and change theirs if it is not that of the values
ANY_GRADIENTS = [name for name in METHODS if name not in ("adamw, AG", "schedule-free")]


@pytest.mark.parametrize(
    ("name", "grads", "values"),
    [(name, "bfloat16", "float32") for name in METHODS]
    + [(name, "float32", "bfloat16") for name in ANY_GRADIENTS],
)
def test_updates_are_as_wide_as_gradients_and_values(name, grads, values):
    method = METHODS[name]()
    values = sj.zeros(TARGETS, values)
    state = jax.eval_shape(method.tx.init, values)
    given = jax.tree.map(lambda v: jax.ShapeDtypeStruct(v.shape, grads), values)

    def update(given, state, values):
        extra = {"active": FIXED} if method.needs == "active" else {}
        if method.needs == "candidates":
            extra = {"candidates": gradients(values, state, weights(dtype=grads))[1]}
        return method.tx.update(given, state, values, **extra)

    updates, after = jax.eval_shape(update, given, state, values)
    width = "float32" if name in SPIEL else grads
    assert {u.dtype for u in jax.tree.leaves(updates)} == {jnp.dtype(width)}
    assert abstract(after) == abstract(state)


@pytest.mark.parametrize(
    ("name", "trees"),
    [
        ("spiel_ag", 3),
        ("spiel_ma", 0),
        ("adamw, AG", 2),
        ("schedule-free", 2),
        ("scale_by_aged_adam", 3),
        ("scale_by_sparse_sm3", 0),
    ],
)
def test_states_are_trees_of_arrays_and_know_their_parameters(name, trees):
    method = METHODS[name]()
    values = sj.zeros(TARGETS)
    state = method.tx.init(values)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(state))
    assert_equal(jax.jit(method.tx.init)(values), state)
    assert_equal(optax.tree.map_params(method.tx, lambda leaf: leaf, state), state)
    owners = optax.tree.map_params(
        method.tx,
        lambda leaf, name: name,
        state,
        {name: name for name in TARGETS},
        transform_non_params=lambda _: None,
    )
    assert sorted(jax.tree.leaves(owners)) == sorted([*TARGETS] * trees)


@pytest.mark.parametrize("name", ["spiel_ag", pytest.param("spiel_ma", marks=pytest.mark.slow)])
def test_many_seeds_at_once_and_many_steps_in_one_program(name):
    method = METHODS[name]()
    values, goal = sj.zeros(TARGETS), weights()

    def start(seed):
        return METHODS[name](seed=seed).tx.init(values)

    def advance(carry, _):
        return step(method, *carry, goal), None

    def train(seed):
        return jax.lax.scan(advance, (values, start(seed)), length=STEPS)[0]

    seeds = jnp.array([0, 7])
    together = jax.jit(jax.vmap(train))(seeds)
    one_step = jax.jit(lambda carry: advance(carry, None)[0])
    for i, seed in enumerate(seeds):
        carry = (values, jax.jit(start)(seed))
        for _ in range(STEPS):
            carry = one_step(carry)
        one = jax.tree.map(lambda leaf, i=i: leaf[i], together)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), one, carry)
    first, second = np.asarray(together[1].active["one"].indices)
    assert set(first) != set(second)
