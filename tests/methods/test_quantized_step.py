"""Steps on a quantised base are those on the dense base that it stands for, and take its memory."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support.adapter_cases import make_batch
from support.mesh_cases import mesh_of
from support.programs import AS_USERS, run_as_users

import spiel_jax as sj
from spiel_jax.distributed.mesh import batch_sharding, check_mesh
from spiel_jax.errors import SpielError
from spiel_jax.losses.next_token import Objective
from spiel_jax.methods.method import compiled_step
from spiel_jax.methods.sparse import SparseMethod
from spiel_jax.models import ModelConfig, abstract_params, init_params, layer_names
from spiel_jax.models.axes import param_sharding, weight_axes, weight_grid
from spiel_jax.models.decoder import ADAPTED
from spiel_jax.models.storage import NF4, Int8
from spiel_jax.ops.stored import as_array, is_stored
from spiel_jax.optim.criteria.lift import LowRankMagnitude
from spiel_jax.optim.inner_optimizers import aged_adamw, sparse_sm3
from spiel_jax.sparse.delta import merged_entries

CONFIG = ModelConfig(
    vocab_size=64,
    hidden_size=128,
    intermediate_size=128,
    num_layers=2,
    num_heads=4,
    num_kv_heads=4,
    head_dim=32,
    max_positions=64,
    tie_embeddings=True,
    initializer_range=0.1,
)
KINDS = {"nf4": NF4, "int8": Int8}
STEPS = 6
PLAN = sj.Reselection(STEPS, every=2, accumulation=2)  # three reselections


def method(growth, mesh, config=CONFIG, remat="full", num_tunable=800, **options):
    """Trains two linears, that a mesh cuts along other axes."""
    blocks = {"fsdp": mesh.shape["fsdp"], "tensor": mesh.shape["tensor"]} if mesh else {}
    targets = sj.find_targets(
        abstract_params(config),
        num_tunable=num_tunable,
        rules=(r".*\.(up|down)_proj\.weight",),
        grid=lambda name: weight_grid(name, blocks),
        layer_names=lambda name, stack: layer_names(name, stack[0]),
    )
    if mesh:
        targets = {name: dataclasses.replace(t, axes=weight_axes(name)) for name, t in targets.items()}
    inner = aged_adamw(1e-2) if growth.uses_candidates else sparse_sm3(1e-2, targets)
    tx = sj.spiel(inner, targets, growth=growth, schedule=PLAN)
    return SparseMethod(Objective(config, remat, loss_chunk=16), tx, targets, growth, **options)


GROWTHS = {
    "ag": sj.AccumulatedGradients(),
    "ma": sj.MomentApproximation(),
    "lift": LowRankMagnitude(rank=8),
}


def run(trained, params, mesh):
    """Losses, positions and values of a run, two micro-batches a step."""
    with jax.set_mesh(mesh or mesh_of(1, 1, 1)):
        if mesh:
            params = {
                name: jax.tree.map(
                    lambda x, n=name: jax.device_put(x, param_sharding(n, x.shape, mesh)), param
                )
                for name, param in params.items()
            }
        shardings = trained.shardings(jax.eval_shape(trained.init, params), mesh or mesh_of(1, 1, 1))
        state = jax.jit(lambda p: trained.init(p), out_shardings=shardings)(params)
        step, found = compiled_step(trained, shardings), []
        for number in range(1, STEPS + 1):
            batch = make_batch(number, 2, 4, 8, CONFIG.vocab_size)
            if mesh:
                batch = jax.device_put(batch, batch_sharding(mesh, 1))
            phase = PLAN.phase(number) if trained.growth.uses_candidates else sj.Phase.PLAIN
            state, metrics = step(state, batch, phase=phase, reselect=bool(PLAN.reselects(number)))
            assert float(metrics["replaced"]) > 0 or not PLAN.reselects(number)
            found.append(metrics["loss"])
        active = optax.tree.get(state.opt_state, "active")
        return jax.device_get((found, {n: d.indices for n, d in active.items()}, state.trainable)), state


def bases(kind):
    """The parameters, and the dense ones that they stand for."""
    held = jax.jit(lambda key: init_params(CONFIG, key, storage=kind))(jax.random.key(0))
    return held, {name: jax.jit(as_array)(param) for name, param in held.items()}


@pytest.mark.slow  # by default a run of the trainer is compared: tests/training/test_quantized_base.py
@pytest.mark.parametrize("meshed", [False, True], ids=["one", "mesh"])
@pytest.mark.parametrize("growth", GROWTHS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_is_the_run_on_what_the_base_stands_for(kind, growth, meshed):
    mesh = mesh_of(1, 2, 2) if meshed else None
    held, dense = bases(KINDS[kind])
    trained = method(GROWTHS[growth], mesh)
    found, state = run(trained, held, mesh)
    expected, plain = run(trained, dense, mesh)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert np.unique(found[0]).size == STEPS
    assert all(is_stored(state.params[name]) for name in ADAPTED)
    assert not state.base
    assert plain.base.keys() == trained.targets.keys()


@pytest.mark.slow
def test_with_fused_instructions_too():
    run_as_users(__file__, "the_run_on_what and one")


def gradient_memory(layers, remat, kind):
    """What the gradients of a step need beside the state, in dense layers."""
    config = dataclasses.replace(CONFIG, num_layers=layers, hidden_size=256, intermediate_size=512)
    trained = method(GROWTHS["ma"], None, config, remat)
    params = abstract_params(config, storage=kind)
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), make_batch(0, 1, 1, 4, 64))
    state = jax.eval_shape(trained.init, params)
    gradients = jax.jit(lambda state, batch: trained.gradients(state, batch, phase=sj.Phase.PLAIN)[:2])
    compiled = gradients.lower(state, batch).compile(AS_USERS)
    dense = sum(4 * params[name].size for name in ADAPTED) // layers
    return compiled.memory_analysis().temp_size_in_bytes / dense


def test_of_one_layer_at_a_time_there_is_a_dense_copy():
    assert gradient_memory(16, "full", NF4) < 1.5


@pytest.mark.slow
def test_a_reselection_holds_few_bytes_an_entry_beside_the_state():
    """The float32 gradients of all entries, 4 bytes; but what else it forms of one target at a time."""
    config = dataclasses.replace(
        CONFIG, num_layers=32, hidden_size=1024, intermediate_size=1024, head_dim=256
    )
    growth = sj.MomentApproximation(shared=True)
    trained = method(growth, None, config, num_tunable=26_000_000, delta_dtype=jnp.bfloat16)
    state = jax.eval_shape(trained.init, abstract_params(config, jnp.bfloat16, storage=NF4))
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), make_batch(0, 1, 1, 2, 16))
    shardings: Any = jax.tree.map(lambda _: jnp.zeros(()).sharding, state)
    step: Any = compiled_step(trained, shardings)
    compiled = step.lower(state, batch, phase=sj.Phase.PLAIN, reselect=True).compile(AS_USERS)
    entries = sum(target.total for target in trained.targets.values())
    assert compiled.memory_analysis().temp_size_in_bytes / entries < 14.5


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_beside_a_step_on_arrays_there_is_less_than_a_layer_however_many_there_are(remat, kind):
    few, many = (
        gradient_memory(layers, remat, KINDS[kind]) - gradient_memory(layers, remat, None)
        for layers in (4, 16)
    )
    assert few < 0.5
    assert abs(many - few) < 0.01


def test_grids_that_cut_blocks_are_refused_and_others_named():
    config = dataclasses.replace(ModelConfig.llama2_7b(), num_layers=1)
    blocks = {"fsdp": 1, "tensor": 8}
    check_mesh(config, mesh_of(1, 1, 8), blocks, Int8)
    check_mesh(config, mesh_of(1, 1, 4), {"fsdp": 1, "tensor": 4}, NF4)
    message = (
        r"tensor=8 does not divide \S+down_proj\.weight of \(4096, 11008\), where 64 entries "
        "along that axis are quantised together: tensor=1 or 2 or 4 divides all weights"
    )
    for mesh in (mesh_of(1, 1, 8), mesh_of(1, 1, 1)):
        with pytest.raises(SpielError, match=message):
            check_mesh(config, mesh, blocks, NF4)
    uneven = dataclasses.replace(config, intermediate_size=96)
    with pytest.raises(SpielError, match=r"tensor=2 .*down_proj.* of \(4096, 96\).*: tensor=1 divides all"):
        check_mesh(uneven, mesh_of(1, 1, 2), {"fsdp": 1, "tensor": 2}, NF4)


def test_deltas_in_bfloat16_have_gradients_and_moments_in_float32():
    trained = method(GROWTHS["ag"], None, delta_dtype=jnp.bfloat16)
    batch = make_batch(0, 2, 4, 8, CONFIG.vocab_size)
    state = jax.eval_shape(trained.init, abstract_params(CONFIG, storage=NF4))
    phase = sj.Phase.ESTIMATE
    _, *gradients = jax.eval_shape(lambda s: trained.gradients(s, batch, phase=phase), state)
    floats = [leaf for leaf in jax.tree.leaves(gradients) if leaf.dtype != jnp.int32]
    assert {leaf.dtype for leaf in floats} == {jnp.dtype(jnp.float32)}
    after, _ = jax.eval_shape(lambda s: trained.step(s, batch, phase=phase, reselect=True), state)
    assert jax.tree.map(lambda leaf: leaf.dtype, after) == jax.tree.map(lambda leaf: leaf.dtype, state)
    assert {values.dtype for values in after.trainable.values()} == {jnp.dtype(jnp.bfloat16)}
    moments = [jax.tree.leaves(optax.tree.get(after.opt_state, name)) for name in ("mu", "nu")]
    assert {leaf.dtype for leaves in moments for leaf in leaves} == {jnp.dtype(jnp.float32)}


@pytest.mark.slow
@pytest.mark.parametrize("growth", GROWTHS)
def test_a_run_with_deltas_in_bfloat16_is_the_one_on_what_the_base_stands_for(growth):
    held, dense = bases(Int8)
    trained = method(GROWTHS[growth], None, delta_dtype=jnp.bfloat16)
    found, _ = run(trained, held, None)
    assert all(values.dtype == jnp.bfloat16 and np.any(values) for values in found[2].values())
    jax.tree.map(np.testing.assert_array_equal, found, run(trained, dense, None)[0])


def test_deltas_in_bfloat16_do_not_round_the_base():
    base, values = jnp.array([0.1, 1 / 3]), jnp.array([0.5, 2.0], jnp.bfloat16)
    expected = np.array([0.1, 1 / 3], np.float32) + np.array([0.5, 2.0], np.float32)
    np.testing.assert_array_equal(merged_entries(base, values, jnp.float32), expected)
