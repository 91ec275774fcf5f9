"""One budget for all matrices: what drops and grows where, by hand and beside NumPy, and in a run."""

import math
import re
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import mesh_cases
from support.mesh_cases import CONFIG, adapted, mesh_of
from support.run_cases import chat_file, run, tiny_config

import spiel_jax as sj
from spiel_jax.adapters.from_run import adapter_of_run
from spiel_jax.checkpoint import restore_trained, stored_targets
from spiel_jax.checkpoint.metadata import target_json
from spiel_jax.config import ConfigError, check_config, default_config
from spiel_jax.errors import SpielError
from spiel_jax.methods.registry import build
from spiel_jax.models import init_params
from spiel_jax.optim.block_grid import convert
from spiel_jax.optim.one_budget import shares

SLOW = pytest.mark.slow
SHAPES = {"matrices": (2, 3), "one": (4,)}  # [M, scores] and [scores]


def shares_of(scores, n, rooms):
    """One after the other, the largest first; equal ones by target, then matrix."""
    names = [(name, matrix) for name in scores for matrix in range(len(scores[name]))]
    taken = dict.fromkeys(names, 0)
    flat = [
        (-score, order, one)
        for order, one in enumerate(names)
        for score in scores[one[0]][one[1]]
        if not math.isnan(score)
    ]
    for _, _, one in sorted(flat):
        if sum(taken.values()) < n and taken[one] < rooms[one[0]][one[1]]:
            taken[one] += 1
    return {name: [taken[name, matrix] for matrix in range(len(scores[name]))] for name in scores}


COMPILED = jax.jit(shares)
SCORE = st.sampled_from([0.0, 0.5, 1.0, 2.0, math.inf, math.nan])


@settings(max_examples=200, deadline=None)
@given(
    st.lists(SCORE, min_size=10, max_size=10),
    st.integers(0, 11),
    st.lists(st.integers(0, 4), min_size=3, max_size=3),
)
def test_shares_are_those_of_taking_one_after_the_other(scores, n, room):
    named = {"matrices": np.reshape(scores[:6], (2, 3)), "one": np.reshape(scores[6:], (1, 4))}
    rooms = {"matrices": room[:2], "one": room[2:]}
    found = COMPILED(
        {name: jnp.array(named[name], jnp.float32).reshape(SHAPES[name]) for name in SHAPES},
        jnp.int32(n),
        {"matrices": jnp.array(room[:2]), "one": jnp.array(room[2])},
    )
    expected = shares_of(named, n, rooms)
    assert found["matrices"].tolist() == expected["matrices"]
    assert [found["one"].tolist()] == expected["one"]


TARGETS = {"a": sj.Target((2, 4), 4, spare=2), "b": sj.Target((2, 2), 3, stack=(2,), spare=1)}
START = {"a": [0, 1, 8, 8], "b": [[0, 1, 4], [2, 3, 4]]}
VALUES = {"a": [0.1, 0.5, 0.0, 0.0], "b": [[0.9, 0.2, 0.0], [0.05, 0.7, 0.0]]}


def reselected(growth, rate, values=None, **given):
    """State of ``spiel`` after a step that changes no value and ends with a reselection."""
    plan = sj.Reselection(2, 1, 1, sj.constant(rate), first=None)
    tx = sj.spiel(optax.sgd(0.0), TARGETS, growth=growth, schedule=plan)
    values = {name: jnp.array(value) for name, value in (values or VALUES).items()}
    start = {name: TARGETS[name].delta(jnp.array(indices)) for name, indices in START.items()}
    state = sj.place(tx.init(values), start)
    updates, state = jax.jit(tx.update)(jax.tree.map(jnp.zeros_like, values), state, values, **given)
    return optax.apply_updates(values, updates), state


def test_what_moved_least_of_all_goes_and_what_pulls_most_of_all_comes():
    growth = sj.AccumulatedGradients()
    candidates = {
        "a": TARGETS["a"].delta(jnp.array([2, 3, 4, 5]), jnp.array([9.0, 8.0, 7.0, 1.0])),
        "b": TARGETS["b"].delta(
            jnp.array([[2, 3, 4], [0, 1, 4]]), jnp.array([[6.0, 5.0, 0.0], [4.0, -8.5, 0.0]])
        ),
    }
    values, state = reselected(growth, 0.5, candidates=candidates)
    # of six entries three go: 0.1 of a, 0.2 and 0.05 of b; 9, 8.5 and 8 come
    assert state.active["a"].indices.tolist() == [2, 1, 3, 8]
    assert state.active["b"].indices.tolist() == [[0, 4, 4], [1, 3, 4]]
    assert values["a"].tolist() == pytest.approx([0, 0.5, 0, 0])
    assert np.array(values["b"]) == pytest.approx(np.array([[0.9, 0, 0], [0, 0.7, 0]]))
    assert float(state.replaced) == 0.5


def test_no_matrix_gets_more_than_it_has_slots_for():
    candidates = {
        "a": TARGETS["a"].delta(jnp.array([2, 3, 4, 5]), jnp.array([0.4, 0.3, 0.2, 0.1])),
        "b": TARGETS["b"].delta(jnp.array([[2, 3, 4], [0, 1, 4]]), jnp.array([[9.0, 8, 0], [7, 6, 0]])),
    }
    _, state = reselected(sj.AccumulatedGradients(), 0.5, candidates=candidates)
    # b has two and two slots after its drops: all four would come before those of a, three are to be had
    assert state.active["a"].indices.tolist() == [8, 1, 8, 8]
    assert state.active["b"].indices.tolist() == [[0, 2, 3], [0, 3, 4]]


def test_with_nothing_to_grow_nothing_goes():
    none = {
        "a": TARGETS["a"].delta(jnp.full(4, 8), jnp.zeros(4)),
        "b": TARGETS["b"].delta(jnp.full((2, 3), 4), jnp.zeros((2, 3))),
    }
    values, state = reselected(sj.AccumulatedGradients(), 0.5, candidates=none)
    assert {name: delta.indices.tolist() for name, delta in state.active.items()} == START
    assert values["b"].tolist() == jnp.array(VALUES["b"]).tolist()
    assert float(state.replaced) == 0


@pytest.mark.parametrize("growth", [sj.RandomGrowth(1), sj.MomentApproximation()], ids=["random", "ma"])
def test_without_candidates_as_many_come_as_go(growth):
    values, state = reselected(growth, 0.9)
    for name, target in TARGETS.items():
        rows = state.active[name].indices.reshape(-1, target.block_count)
        used = [row[row < target.block_size].tolist() for row in np.asarray(rows)]
        assert all(len(set(row)) == len(row) for row in used)
    counts = [int(jnp.sum(d.indices < TARGETS[name].block_size)) for name, d in state.active.items()]
    assert sum(counts) == 6
    # 0.9 of b stays; the other five are replaced: what is active and what was dropped may not grow
    kept = [v for value in values.values() for v in value.reshape(-1).tolist() if v]
    assert kept == pytest.approx([0.9])


def test_targets_have_room_as_far_as_they_have_entries():
    shapes = {"w": jax.ShapeDtypeStruct((3, 4, 8), "float32"), "v": jax.ShapeDtypeStruct((2, 2), "float32")}
    rules = ("w.*", sj.Rule("v", 0.75))
    targets = sj.find_targets(shapes, num_tunable=24, spare=1.5, rules=rules)
    assert targets["w"] == sj.Target((4, 8), 20, stack=(3,), spare=12)
    assert targets["v"] == sj.Target((2, 2), 4, spare=1)
    assert (targets["w"].total, targets["w"].block_share, targets["v"].total) == (24, 8, 3)
    grid = sj.find_targets(shapes, num_tunable=24, spare=0.3, rules=("w.*",), grid=(2, 2))["w"]
    assert (grid.count, grid.spare, grid.block_count, grid.block_share) == (12, 4, 3, 2)  # 0.6 of a slot: one
    for spare in (-0.1, math.inf, math.nan):
        with pytest.raises(SpielError, match=f"spare = {spare}: expected 0 or more, and finite"):
            sj.find_targets(shapes, num_tunable=24, spare=spare)
    with pytest.raises(SpielError, match="spare = 4: expected 0 to less than the count, 4"):
        sj.Target((2, 4), 4, spare=4)


def test_metadata_have_what_is_spare_and_those_of_earlier_versions_have_none():
    stored = {name: target_json(target) for name, target in TARGETS.items()}
    assert stored_targets({"targets": stored}) == TARGETS
    del stored["a"]["spare"]
    assert stored_targets({"targets": stored})["a"].spare == 0


@pytest.mark.parametrize("cut", [pytest.param((1, 1), marks=SLOW), pytest.param((2, 1), marks=SLOW), (2, 2)])
def test_another_grid_keeps_the_budget_and_the_slots_wherever_the_entries_are(cut):
    targets = {
        "a": sj.Target((4, 8), 12, spare=4),
        "b": sj.Target((4, 8), 16, spare=8),
        "c": sj.Target((2, 2), 4),
    }
    growth, plan = sj.RandomGrowth(), sj.Reselection(4, 1, 1, sj.constant(0.5), first=None)
    tx = sj.spiel(sj.aged_adamw(0.1), targets, growth=growth, schedule=plan)
    values = sj.zeros(targets)
    state = tx.init(values)
    gone, more = np.full(12, 32), np.arange(16)  # all eight of a went to b
    state = sj.place(state, {**state.active, "a": targets["a"].delta(gone), "b": targets["b"].delta(more)})
    values, state, changed = convert(values, state, targets, dict.fromkeys(targets, cut), growth)
    new = {name: change.new for name, change in changed.items()}
    assert all(new[name].total == target.total for name, target in targets.items())
    assert all(new[name].slots >= target.slots for name, target in targets.items())
    assert changed["a"].unused == 1
    tx = sj.spiel(sj.aged_adamw(0.1), new, growth=growth, schedule=plan)
    _, state = jax.jit(tx.update)(jax.tree.map(jnp.zeros_like, values), state, values)
    assert used(state.active, new) == 20
    tx.init(sj.zeros(new))


def used(active, targets):
    return sum(np.sum(np.asarray(d.indices) < targets[name].block_size) for name, d in active.items())


def test_of_many_entries_as_many_go_as_of_few():
    """The entries of three such matrices cannot be counted in int32."""
    for matrices in (1, 3):
        targets = {"w": sj.Target((32768, 32768), 8, stack=(matrices,), spare=4)}
        plan = sj.Reselection(2, 1, 1, sj.constant(0.5), first=None)
        tx = sj.spiel(optax.sgd(0.0), targets, growth=sj.MomentApproximation(), schedule=plan)
        values = sj.zeros(targets)
        _, state = jax.jit(tx.update)({"w": jnp.ones((matrices, 8))}, tx.init(values), values)
        assert float(state.replaced) == 0.5
        assert used(state.active, targets) == 4 * matrices
    many = {"w": sj.Target((32768, 32768), 65537, stack=(32768,), spare=4)}
    with pytest.raises(SpielError, match="one budget of 2147516416 slots: expected less than"):
        sj.spiel(optax.sgd(0.0), many, growth=sj.MomentApproximation(), schedule=plan)


def test_where_all_is_replaced_and_some_could_not_begin_the_budget_is_filled_and_not_exceeded():
    targets = {"a": sj.Target((4, 8), 24, spare=8), "b": sj.Target((4, 8), 24, spare=8)}
    plan = sj.Reselection(4, 1, 1, sj.constant(0.5), first=1.0)
    tx = sj.spiel(optax.sgd(0.0), targets, growth=sj.RandomGrowth(), schedule=plan)
    values = sj.zeros(targets)
    state = tx.init(values)
    few = np.concatenate([np.arange(4), np.full(20, 32)])
    state = sj.place(state, {**state.active, "a": targets["a"].delta(few)})
    for _ in range(2):
        _, state = jax.jit(tx.update)(jax.tree.map(jnp.zeros_like, values), state, values)
        assert used(state.active, targets) == 32
        assert float(state.replaced) <= 1


def test_who_changes_what_is_grown_cannot_share_by_inherited_proposals():
    class Other(sj.RandomGrowth):
        def incoming(self, stats, indices, dropped, n, target):
            return super().incoming(stats, indices, dropped, n, target)

    class Both(Other):
        def proposals(self, stats, indices, dropped, target):
            return super().proposals(stats, indices, dropped, target)

    shared = [kind.can_share_budget for kind in (sj.RandomGrowth, Other, Both, type("Named", (Both,), {}))]
    assert shared == [True, False, True, True]


def test_what_compares_no_matrices_is_refused():
    with pytest.raises(SpielError, match="NoGrowth does not compare entries of different matrices"):
        sj.spiel(optax.sgd(0.1), TARGETS, growth=sj.NoGrowth(), schedule=sj.Reselection(3, 1, 1))
    with pytest.raises(SpielError, match="the original has none"):
        sj.spiel_ag(0.1, TARGETS, total_steps=9, parity="reference")


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"method": "lift"}, "lift does not compare entries of different weights"),
        ({"method": "random"}, "0 where nothing is replaced: give spiel.rate"),
        ({"spiel.first": -1.0, "method": "random"}, "0 where nothing is replaced: give spiel.rate"),
        ({"spiel.parity": "reference"}, "what the original has"),
        ({"init_from.adapter": "somewhere"}, "the entries of an adapter are where they are"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_a_configuration_that_cannot_share_is_refused(keys, told):
    config = default_config()
    config.model.source, config.data.sources = "random", ("chat.jsonl",)
    config.targets.density, config.targets.spare = 0.1, 1.0
    config.update_from_flattened_dict(keys)
    with pytest.raises(ConfigError, match=rf"targets.spare = 1.0: expected (0: )?{told}"):
        check_config(config)


def configured(method, **keys):
    config = default_config()
    config.method, config.model.source, config.data.sources = method, "random", ("rows.jsonl",)
    config.model.preset = "llama2_7b"
    config.targets.num_tunable, config.targets.spare = 1800, 1.0
    config.targets.rules = (r".*\.(o|up)_proj\.weight",)
    config.spiel.every = config.spiel.accumulation = 2
    config.spiel.rate = 0.4  # of random too
    config.optimizer.learning_rate = 1e-2
    config.update_from_flattened_dict(keys)
    return config


CASES = [
    ("spiel_ag", {}),
    *(
        pytest.param(*case, marks=SLOW)
        for case in (
            ("spiel_ag", {"spiel.merge": "per_use", "spiel.drop_by": "age"}),
            ("spiel_ma", {}),
            ("spiel_ma", {"spiel.keep_zeros": True}),
            ("spiel_ma_adam", {"spiel.drop_by": "weight"}),
            ("random", {}),
            ("random", {"spiel.keep_zeros": True}),
            ("gradient", {}),
            ("gem", {}),
            ("talos", {"spiel.candidate_ratio": 2.0}),
        )
    ),
]


@pytest.mark.parametrize(("method", "keys"), CASES)
def test_a_run_has_its_budget_all_the_time_and_the_tuned_weights_differ_there_alone(method, keys):
    config, params = configured(method, **keys), init_params(CONFIG, jax.random.key(0), jnp.float32)
    training = build(config, CONFIG, 8)
    budget = sum(target.total for target in training.targets.values())
    state = training.init(params)
    begun = numbers(training, state)
    step = jax.jit(training.step, static_argnames=("phase", "reselect"))
    for number in range(1, 7):
        phase, reselect = training.step_kind(number)
        state, metrics = step(state, mesh_cases.batch(number), phase=phase, reselect=reselect)
        assert np.isfinite(metrics["loss"])
        assert sum(np.sum(found) for found in numbers(training, state).values()) == budget
    assert any(np.any(begun[name] != found) for name, found in numbers(training, state).items())
    tuned = training.tuned(state)
    for name, delta in sj.deltas(state.trainable, state.opt_state).items():
        dense = np.zeros((len(tuned[name]), params[name][0].size), bool)
        for layer, row in enumerate(np.asarray(delta.indices)):
            used = row[row < dense.shape[1]]
            assert len(set(used)) == len(used)
            dense[layer, used] = True
            assert not np.any(np.asarray(delta.values)[layer][row >= dense.shape[1]])
        changed = np.asarray(tuned[name] != params[name]).reshape(dense.shape)
        assert changed.any()
        assert not changed[~dense].any()


def numbers(training, state):
    """Active entries of each matrix."""
    return {
        name: np.sum(indices < training.targets[name].block_size, axis=-1)
        for name, indices in mesh_cases.positions(state).items()
    }


@pytest.mark.parametrize(
    "growth",
    [sj.AccumulatedGradients(), sj.MomentApproximation(shared=True)],
    ids=["ag", "ma"],
)
@pytest.mark.slow
def test_eight_devices_come_to_the_entries_of_one(growth):
    targets = {
        name: replace(target, count=2 * target.count, spare=target.count)
        for name, target in adapted({"fsdp": 2, "tensor": 2}).items()
    }
    trained = partial(mesh_cases.run, mesh_cases.method(targets, growth), steps=3)
    (one, losses), (many, others) = trained(mesh_of(1, 1, 1)), trained(mesh_of(2, 2, 2))
    np.testing.assert_allclose(losses, others, rtol=1e-5)
    assert float(one.opt_state.replaced) == float(many.opt_state.replaced)
    jax.tree.map(np.testing.assert_array_equal, mesh_cases.positions(one), mesh_cases.positions(many))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["random", "spiel_ag", "rosa"])
def test_a_run_goes_on_as_if_it_had_not_stopped_and_leaves_its_budget(method, llama_folder, tmp_path, capsys):
    config = tiny_config(llama_folder, chat_file(tmp_path), method)
    config.targets.spare, config.spiel.rate = 1.0, 0.4
    config.rosa.warmup = 1
    config.lora.rank = 2
    run(config, tmp_path / "whole")
    run(config, tmp_path / "half", until=3)
    run(config, tmp_path / "half")
    told = capsys.readouterr().out
    whole, half = (restore_trained(tmp_path / name) for name in ("whole", "half"))
    assert jax.tree.all(jax.tree.map(np.array_equal, whole, half))
    adapter = adapter_of_run(tmp_path / "whole")
    sparse = adapter if method != "rosa" else adapter.sparse
    assert sparse.count == 1000
    low_rank = (
        0
        if method != "rosa"
        else sum(term.a.size + term.b.size for term in adapter.low_rank.matrices.values())
    )
    assert re.search(rf"tunable parameters +{1000 + low_rank:,} ", told)
    sizes = {entries.positions.size for entries in sparse.entries.values()}
    assert len(sizes) > 2  # two kinds of weights: they have not what is theirs by size
