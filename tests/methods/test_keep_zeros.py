"""Sparse fine-tuning of a pruned base: its zeros stay zeros, whatever chooses the entries."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import mesh_cases
from support.mesh_cases import CONFIG
from support.pruning import smallest, two_of_four

import spiel_jax as sj
from spiel_jax.config import ConfigError, check_config, default_config
from spiel_jax.methods.registry import build
from spiel_jax.models import init_params
from spiel_jax.optim.criteria.activations import WeightTimesInput
from spiel_jax.optim.criteria.criterion import CRITERIA
from spiel_jax.optim.criteria.moment_approximation import MomentApproximation
from spiel_jax.optim.criteria.random import RandomGrowth
from spiel_jax.optim.own_budgets import reselect_matrix
from spiel_jax.optim.zeros import random_off_zeros

RULES = (r".*\.(o|up)_proj\.weight",)
NAMES = ("model.layers.self_attn.o_proj.weight", "model.layers.mlp.up_proj.weight")
PRUNED = {"2:4": two_of_four, "0.7": lambda weight: smallest(weight, 0.7)}


def pruned_params(kind):
    params = init_params(CONFIG, jax.random.key(0), jnp.float32)
    pruned = {name: jnp.array(PRUNED[kind](np.asarray(params[name]))) for name in NAMES}
    return params | pruned


def configured(method, **keys):
    config = default_config()
    config.method, config.model.source, config.data.sources = method, "random", ("rows.jsonl",)
    config.model.preset = "llama2_7b"
    config.targets.num_tunable, config.targets.rules = 900, RULES
    config.spiel.keep_zeros = True
    config.spiel.every = config.spiel.accumulation = 2
    config.spiel.rate = 0.2  # of random too
    config.spiel.tile.columns = 1
    config.spiel.filter_rank = 4
    config.optimizer.learning_rate = 1e-2
    config.update_from_flattened_dict(keys)
    return config


def trained(config, params, steps=4):
    """State before and after each step."""
    training = build(config, CONFIG, 8)
    state = training.init(params)
    step = jax.jit(
        lambda s, b, phase, reselect: training.step(s, b, phase=phase, reselect=reselect),
        static_argnames=("phase", "reselect"),
    )
    states = [state]
    for number in range(1, steps + 1):
        phase, reselect = training.step_kind(number)
        state, metrics = step(state, mesh_cases.batch(number), phase=phase, reselect=reselect)
        assert np.isfinite(metrics["loss"])
        states.append(state)
    return training, states


CASES = [
    ("spiel_ag", "2:4", "resident"),
    *(
        pytest.param(
            method, ("0.7", "2:4")[number % 2], ("resident", "per_use")[number % 2], marks=pytest.mark.slow
        )
        for number, method in enumerate(CRITERIA)
    ),
]


@pytest.mark.parametrize(("method", "pattern", "merge"), CASES)
def test_the_zeros_stay(method, pattern, merge):
    params = pruned_params(pattern)
    config = configured(method, **{"spiel.merge": merge})
    if method in ("structured", "smt"):
        config.targets.num_tunable = 3 * 32 * 8
    training, states = trained(config, params)
    for state in states:
        tuned = training.tuned(state)
        for name, delta in sj.deltas(state.trainable, state.opt_state).items():
            zero = np.asarray(params[name]) == 0
            assert np.all(np.asarray(tuned[name])[zero] == 0)
            assert 0.4 < zero.mean() < 0.8
            used = [row[row < delta.shape[0] * delta.shape[1]] for row in np.asarray(delta.indices)]
            assert all(len(set(row)) == len(row) for row in used)
            assert not any(zero[layer].ravel()[row].any() for layer, row in enumerate(used))
            if method not in ("structured", "smt"):
                assert all(len(row) == delta.indices.shape[-1] for row in used)
    moved = any(np.any(tuned[name] != params[name]) for name in NAMES)
    assert moved
    before, after = (mesh_cases.positions(states[i]) for i in (0, -1))
    static = method in ("magnitude", "structured")
    assert static == all(np.array_equal(before[name], after[name]) for name in before) or method == "lift"


def test_where_too_few_are_not_zero_slots_are_unused():
    weight = np.zeros((4, 6), np.float32)
    weight[1, [0, 2, 5]] = 1.0
    target = sj.Target((4, 6), 5)
    for find in (
        lambda w: random_off_zeros(w, {"w": target}, seed=0),
        lambda w: sj.magnitude_positions(w, {"w": target}, keep_zeros=True),
        lambda w: sj.magnitude_positions(w, {"w": target}, largest=False, keep_zeros=True),
    ):
        assert find({"w": jnp.array(weight)})["w"].indices.tolist() == [6, 8, 11, 24, 24]


def test_a_static_mask_by_activations_leaves_the_rest_unused():
    """Where fewer are not zero than there are slots, each of them once."""
    target, size = sj.Target((4, 6), 5), 24
    growth = WeightTimesInput(keep_zeros=True)
    weight = jnp.zeros((4, 6)).at[1, jnp.array([0, 2, 5])].set(1.0)
    found = growth.survey({"w": jnp.ones(6)}, {"w": weight}, {"w": target})["w"]
    active = jnp.array([8, 11, size, 6, size], jnp.int32)
    new, *_ = reselect_matrix(
        active, jnp.ones(5), jnp.zeros(5), found, n=jnp.int32(5), target=target, growth=growth
    )
    assert sorted(new.tolist()) == [6, 8, 11, size, size]


def test_random_entries_are_spread_over_what_is_not_zero():
    target = {"w": sj.Target((4, 6), 4)}
    weight = two_of_four(np.arange(1.0, 25.0).reshape(6, 4)).reshape(4, 6)
    draw = jax.jit(
        jax.vmap(lambda seed: random_off_zeros({"w": jnp.array(weight)}, target, seed=seed)["w"].indices)
    )
    counts = np.bincount(np.asarray(draw(jnp.arange(600))).ravel(), minlength=24)
    assert not counts[weight.ravel() == 0].any()
    assert counts[weight.ravel() != 0].min() > 150  # 200 each on average
    assert counts[weight.ravel() != 0].max() < 250


@pytest.mark.parametrize("growth", [RandomGrowth(3, keep_zeros=True), MomentApproximation(keep_zeros=True)])
@pytest.mark.parametrize("grid", [pytest.param((1, 1), marks=pytest.mark.slow), (2, 2)])
def test_what_grows_without_candidates_is_not_zero_and_the_best_of_the_rest(growth, grid):
    """Of a stack, in blocks, until no entry is left that is not zero."""
    rng = np.random.default_rng(0)
    target = sj.Target((8, 12), 16, stack=(2,), grid=grid)
    block, count = target.block, target.block_count
    weight = np.where(rng.random((2, 8, 12)) < 0.5, rng.normal(size=(2, 8, 12)), 0).astype(np.float32)
    blocks = weight.reshape(2, grid[0], block[0], grid[1], block[1]).swapaxes(2, 3).reshape(-1, *block)
    stats = growth.init({"w": target}, {})
    if isinstance(growth, MomentApproximation):
        row, column = (rng.integers(0, 4, part.shape).astype(np.float32) for part in stats["w"])
        stats = {"w": (jnp.array(row), jnp.array(column))}
        scores = row.reshape(-1, block[0], 1) * column.reshape(-1, 1, block[1])
    look = jax.jit(lambda stats, weights: growth.survey(stats, weights, {"w": target}))
    seen = look(stats, {"w": jnp.array(weight)})["w"]
    choose = jax.jit(lambda seen, active, n: growth.incoming(seen, active, active < 0, n, target))
    axes = len(target.lead)
    for number, matrix in enumerate(blocks):
        free = np.flatnonzero(matrix)
        active = np.sort(rng.permutation(free)[: min(count, free.size - 2)])
        active = np.pad(active, (0, count - active.size), constant_values=matrix.size).astype(np.int32)
        one = jax.tree.map(lambda x, n=number: x.reshape(-1, *x.shape[axes:])[n], seen)
        rest = np.setdiff1d(free, active)
        n = min(3, rest.size)
        grown = np.asarray(choose(one, active, n))
        grown = np.sort(grown[grown < matrix.size])
        assert grown.size == n
        assert np.isin(grown, rest).all()
        if isinstance(growth, MomentApproximation):
            order = rest[np.argsort(-scores[number].ravel()[rest], kind="stable")]
            np.testing.assert_array_equal(grown, np.sort(order[:n]))


@pytest.mark.slow
def test_on_a_mesh_the_same_entries_are_chosen():
    for method in ("random", "spiel_ma", "lift"):
        found = []
        for mesh in (mesh_cases.mesh_of(1, 1, 1), mesh_cases.mesh_of(2, 2, 2)):
            config = configured(method, **{"targets.grid.fsdp": 2, "targets.grid.tensor": 2})
            training = build(config, CONFIG, 8)
            with jax.set_mesh(mesh):
                state = jax.jit(training.init)(pruned_params("2:4"))
                found.append(mesh_cases.positions(state))
        jax.tree.map(np.testing.assert_array_equal, *found)


@pytest.mark.parametrize(
    ("method", "keys", "message"),
    [
        ("rosa", {}, "keep_zeros = True: expected False: matrices of low rank fill the zeros"),
        (
            "spiel_ag",
            {"spiel.parity": "reference"},
            "keep_zeros = True: expected False: what the original has",
        ),
        ("random", {"init_from.adapter": "somewhere"}, "expected unset: the entries of an adapter are where"),
    ],
)
def test_what_cannot_keep_zeros_is_refused(method, keys, message):
    with pytest.raises(ConfigError, match=message):
        check_config(configured(method, **keys))
