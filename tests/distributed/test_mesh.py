"""Training on meshes of eight virtual devices: the same numbers on any mesh, and what is communicated."""

import functools
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import mesh_cases
from support.mesh_cases import (
    BLOCKS,
    CONFIG,
    adapted,
    batch,
    collectives,
    frozen_passes,
    mesh_of,
    method,
    placed,
    positions,
)

import spiel_jax as sj
from spiel_jax.config import LINEAR_LAYERS
from spiel_jax.distributed.mesh import batch_sharding
from spiel_jax.methods.method import compiled_step
from spiel_jax.models.decoder import ADAPTED
from spiel_jax.models.storage import Packed
from spiel_jax.optim.criteria.accumulated_gradients import AccumulatedGradients
from spiel_jax.optim.criteria.moment_approximation import MomentApproximation

SLOW = [(1, 8, 1), (1, 4, 2), (1, 2, 4), (1, 1, 8), (8, 1, 1)]
# One linear split each way; all seven only take longer to compile.
TWO = (r".*\.(q|down)_proj\.weight",)
slow = pytest.mark.slow


@functools.cache
def on_one_device(growth, rules):
    return mesh_cases.run(method(adapted(rules=rules), growth), mesh_of(1, 1, 1))


AG, MA = AccumulatedGradients(), MomentApproximation()  # AG on a mesh by default: test_mesh_restore.py


@pytest.mark.parametrize(
    ("sizes", "rules", "growth"),
    [
        pytest.param((2, 2, 2), TWO, MA, id="ma"),
        pytest.param((2, 2, 2), TWO, AG, id="ag", marks=slow),
        *(
            pytest.param(sizes, LINEAR_LAYERS, growth, marks=slow)
            for sizes in [(2, 2, 2), *SLOW]
            for growth in (AG, MA)
        ),
    ],
)
def test_any_mesh_gives_the_same_numbers(growth, sizes, rules):
    expected, expected_losses = on_one_device(growth, rules)
    state, losses = mesh_cases.run(method(adapted(rules=rules), growth), mesh_of(*sizes))
    np.testing.assert_allclose(losses, expected_losses, rtol=2e-6)
    assert losses[-1] < losses[0]
    jax.tree.map(np.testing.assert_array_equal, positions(state), positions(expected))
    for name, values in state.trainable.items():
        np.testing.assert_allclose(values, expected.trainable[name], atol=2e-6)
    for name, param in state.params.items():
        np.testing.assert_allclose(param, expected.params[name], atol=2e-6)


@slow
@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 8, 1)])
def test_micro_batches_and_scatter_per_use_on_a_mesh(sizes):
    growth = AccumulatedGradients()
    expected, expected_losses = mesh_cases.run(method(adapted(), growth), mesh_of(1, 1, 1), micro_batches=2)
    training = method(adapted(), growth, in_place=False)
    state, losses = mesh_cases.run(training, mesh_of(*sizes), micro_batches=2)
    np.testing.assert_allclose(losses, expected_losses, rtol=2e-6)
    jax.tree.map(np.testing.assert_array_equal, positions(state), positions(expected))


@slow
def test_some_layers_alone_on_a_mesh():
    rules = (r"model\.layers\.[02]\.(self_attn|mlp)\.(o|up)_proj\.weight",)
    targets = adapted(rules=rules, num_tunable=1200)
    assert all("@0,2" in name for name in targets)
    growth = AccumulatedGradients()
    expected, expected_losses = mesh_cases.run(method(targets, growth), mesh_of(1, 1, 1))
    state, losses = mesh_cases.run(method(targets, growth), mesh_of(2, 2, 2))
    np.testing.assert_allclose(losses, expected_losses, rtol=2e-6)
    jax.tree.map(np.testing.assert_array_equal, positions(state), positions(expected))


def programs(sizes, growth, kinds):
    """The compiled steps of these kinds, and the frozen model's passes, on one mesh."""
    mesh = mesh_of(*sizes)
    training = method(adapted(), growth)
    with jax.set_mesh(mesh):
        state, shardings = placed(training, mesh)
        data = jax.device_put(batch(0), batch_sharding(mesh, 1))
        step = compiled_step(training, shardings)
        steps = [step.lower(state, data, phase=p, reselect=r).compile() for p, r in kinds]
        passes = jax.jit(functools.partial(frozen_passes, training.objective))
        return training.targets, steps, passes.lower(state.params, data).compile()


def extra(program, than):
    return collectives(program) - collectives(than)


def exchanged(targets, sizes):
    """What the design allows a step: the entries of each weight reduced, and on fsdp their positions."""
    data, fsdp, tensor = sizes
    allowed = Counter()
    for target in targets.values():
        rows, columns = (
            BLOCKS["fsdp"] // fsdp if axis == "fsdp" else BLOCKS["tensor"] // tensor for axis in target.axes
        )
        entries = (rows, columns, target.block_count)
        if fsdp > 1:
            collected = tuple(
                size * fsdp if axis == "fsdp" else size
                for size, axis in zip(entries, (*target.axes, None), strict=True)
            )
            allowed["all-gather", "s32", collected] += 1
            allowed["reduce-scatter", "f32", entries] += 1
        if data > 1:
            allowed["all-reduce", "f32", entries] += 1
    return allowed


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(2, 2, 2), *(pytest.param(sizes, marks=slow) for sizes in SLOW)])
def test_a_step_exchanges_the_entries_and_on_fsdp_their_positions(sizes):
    kinds = [(sj.Phase.PLAIN, False), (sj.Phase.PLAIN, True)]
    targets, (plain, reselecting), passes = programs(sizes, MomentApproximation(), kinds)
    assert set(targets) == set(ADAPTED)
    assert extra(plain, passes) == exchanged(targets, sizes)
    assert not extra(reselecting, plain), "drop and regrowth are local to the device"
    if sizes[1] > 1:  # each weight is collected once forward and once backward, and never beyond fsdp
        gathered = [key for key in collectives(passes).elements() if key[:2] == ("all-gather", "f32")]
        assert len(gathered) >= 2 * len(ADAPTED)
    if sizes == (1, 1, 8):
        assert not any(kind == "all-gather" for kind, *_ in collectives(plain))


@pytest.mark.parametrize("sizes", [pytest.param((2, 2, 2), marks=slow), pytest.param((1, 8, 1), marks=slow)])
def test_candidates_are_exchanged_like_active_entries_and_proposing_reduces_one_dense_gradient(sizes):
    kinds = [(sj.Phase.ESTIMATE, False), (sj.Phase.ESTIMATE, True), (sj.Phase.PROPOSE, False)]
    targets, steps, passes = programs(sizes, AccumulatedGradients(), kinds)
    estimating, reselecting, proposing = steps
    once = exchanged(targets, sizes)
    assert extra(estimating, passes) == once + once  # as many candidates as active entries
    assert not extra(reselecting, estimating)
    data, fsdp, tensor = sizes
    dense = Counter()
    for target in targets.values():
        part = tuple(
            size // (fsdp if axis == "fsdp" else tensor)
            for size, axis in zip(target.shape, target.axes, strict=True)
        )
        dense["reduce-scatter", "f32", part] += 1
        if data > 1:
            dense["all-reduce", "f32", part] += 1
    assert extra(proposing, passes) == dense


@pytest.mark.parametrize("sizes", [(1, 8, 1)])
def test_what_belongs_to_a_weight_lies_like_it(sizes):
    mesh = mesh_of(*sizes)
    training = method(adapted(rules=TWO), AccumulatedGradients())
    with jax.set_mesh(mesh):
        state, _ = placed(training, mesh, jnp.bfloat16)
    name = "model.layers.mlp.down_proj.weight"
    weight = state.params[name]
    assert isinstance(weight, Packed)  # on a CPU
    weight = weight.bits
    assert {shard.data.shape for shard in weight.addressable_shards} == {(CONFIG.num_layers, 4, 64)}
    count = training.targets[name].block_count
    for tree in (state.trainable, state.base, state.opt_state):
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            if any(getattr(key, "key", None) == name for key in path) and leaf.ndim == 4:
                shapes = {shard.data.shape for shard in leaf.addressable_shards}
                assert shapes == {(CONFIG.num_layers, 1, 8, count)}, path
