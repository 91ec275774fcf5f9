"""The table of where arrays lie, and the checks on meshes."""

import dataclasses

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import PartitionSpec as P

import spiel_jax as sj
from spiel_jax.distributed.mesh import batch_sharding, check_mesh, make_mesh, mesh_sizes
from spiel_jax.losses.next_token import Objective
from spiel_jax.methods.full import FullMethod
from spiel_jax.methods.lora import Lora
from spiel_jax.methods.method import TrainState
from spiel_jax.methods.parametrization import ParametrizationMethod
from spiel_jax.methods.sparse import SparseMethod
from spiel_jax.models import ModelConfig, abstract_params
from spiel_jax.models.axes import logical_axes, param_sharding, weight_axes, weight_grid
from spiel_jax.models.decoder import ADAPTED
from spiel_jax.ops.sharded import axis_size, constrain, current_axes, on_blocks
from spiel_jax.sparse.targets import Target

UP, DOWN = "model.layers.mlp.up_proj.weight", "model.layers.mlp.down_proj.weight"


def mesh_of(data, fsdp, tensor):
    return make_mesh({"data": data, "fsdp": fsdp, "tensor": tensor})


@pytest.mark.parametrize(
    "config", [ModelConfig.llama2_7b(), ModelConfig.qwen2_5_0_5b()], ids=["llama", "qwen"]
)
def test_every_matrix_of_a_model_has_its_axes(config):
    for name, shape in abstract_params(config).items():
        axes = logical_axes(name)
        if name.endswith("norm.weight") or name == "model.norm.weight":
            assert axes is None
        else:
            assert axes is not None, name
            assert len(axes) == len(shape.shape), name
    for name in ADAPTED:
        assert sorted(map(str, weight_axes(name))) == ["fsdp", "tensor"]
    assert weight_axes(UP) == ("tensor", "fsdp")
    assert weight_axes(DOWN) == ("fsdp", "tensor")
    assert weight_grid(UP, {"fsdp": 4, "tensor": 2}) == (2, 4)
    assert weight_grid("w", {"fsdp": 4, "tensor": 2}) == (1, 1)  # of no model of ours


def test_the_open_axis_takes_the_rest():
    assert mesh_sizes({"data": -1, "fsdp": 2, "tensor": 1}, 8) == {"data": 4, "fsdp": 2, "tensor": 1}
    assert mesh_sizes({"data": 1, "fsdp": 2, "tensor": 1}, 8) == {"data": 1, "fsdp": 2, "tensor": 1}
    assert make_mesh({"data": 1, "fsdp": 2, "tensor": 1}).devices.size == 2


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((-1, -1, 1), "only one axis"),
        ((0, 1, 1), "data=0.*positive"),
        ((-1, 3, 1), "3 does not divide the 8 devices"),
        ((4, 4, 1), "more than the 8 devices"),
    ],
)
def test_sizes_that_cannot_be(sizes, message):
    with pytest.raises(ValueError, match=message):
        mesh_sizes(dict(zip(("data", "fsdp", "tensor"), sizes, strict=True)), 8)


def test_devices_that_are_no_part_of_a_slice_are_refused(monkeypatch):
    def refuse(*_, **__):  # as JAX does for TPUs whose coordinates leave holes
        raise AssertionError

    monkeypatch.setattr(jax, "make_mesh", refuse)
    with pytest.raises(ValueError, match=r"a mesh of 1 of the 8 devices: .* use all"):
        make_mesh({"data": 1, "fsdp": 1, "tensor": 1})


def test_a_mesh_must_divide_the_grid_and_the_model():
    model = ModelConfig.smollm2_135m()  # hidden 576, kv width 192
    check_mesh(model, mesh_of(1, 4, 2), {"fsdp": 4, "tensor": 2})
    check_mesh(model, mesh_of(1, 2, 2), {"fsdp": 4, "tensor": 2})
    with pytest.raises(
        ValueError, match=r"fsdp=4 does not divide the run's grid of 6.*fsdp=1 or 2 or 3 or 6.*12"
    ):
        check_mesh(model, mesh_of(1, 4, 2), {"fsdp": 6, "tensor": 2})
    with pytest.raises(ValueError, match=r"tensor=5 does not divide .*a divisor of"):
        check_mesh(model, mesh_of(1, 1, 1), {"fsdp": 1, "tensor": 5})


def test_what_does_not_divide_lies_whole():
    mesh = mesh_of(1, 4, 2)
    assert param_sharding("lm_head.weight", (32000, 64), mesh).spec == P("tensor", "fsdp")
    assert param_sharding("lm_head.weight", (32003, 64), mesh).spec == P(None, "fsdp")
    assert param_sharding("model.norm.weight", (64,), mesh).spec == P()
    assert param_sharding("model.layers.self_attn.q_proj.bias", (2, 64), mesh).spec == P(None, "tensor")
    assert batch_sharding(mesh, 1).spec == P(None, ("data", "fsdp"))


OBJECTIVE = Objective(ModelConfig.llama2_7b())


def sparse(targets):
    return SparseMethod(OBJECTIVE, optax.sgd(1.0), targets, sj.MomentApproximation())


def test_state_lies_like_its_weight():
    mesh = mesh_of(1, 4, 2)
    shape = jax.ShapeDtypeStruct
    target = Target((32, 64), 64, (3,), (4, 2), axes=weight_axes(DOWN))
    moments = {DOWN: shape((3, 4, 2, 8), jnp.float32)}
    rows = {DOWN: shape((3, 4, 2, 8), jnp.float32)}
    state = TrainState(
        params={DOWN: shape((3, 32, 64), jnp.bfloat16)},
        base={DOWN: shape((3, 4, 2, 8), jnp.bfloat16)},
        trainable=moments,
        opt_state=(optax.ScaleByAdamState(shape((), jnp.int32), moments, moments), rows),
    )
    found = sparse({DOWN: target}).shardings(state, mesh)
    assert {s.spec for s in jax.tree.leaves(found)} == {P(None, "fsdp", "tensor"), P()}
    assert found.opt_state[0].count.spec == P()

    factors = {"lora_A": shape((3, 8, 64), jnp.float32), "lora_B": shape((3, 32, 8), jnp.float32)}
    low_rank = dataclasses.replace(state, trainable={DOWN: factors}, opt_state=(), base={})
    lora = ParametrizationMethod(OBJECTIVE, optax.sgd(1.0), Lora({DOWN: target}))
    found = lora.shardings(low_rank, mesh).trainable[DOWN]
    assert (found["lora_A"].spec, found["lora_B"].spec) == (P(None, None, "tensor"), P(None, "fsdp"))

    dense = dataclasses.replace(state, trainable=state.params, opt_state=(), base={})
    full = FullMethod(OBJECTIVE, optax.sgd(1.0), jnp.float32)
    assert full.shardings(dense, mesh).trainable[DOWN].spec == P(None, "fsdp", "tensor")
    whole = dataclasses.replace(target, grid=(1, 1), axes=None)
    lone = dataclasses.replace(state, trainable={DOWN: shape((3, 64), jnp.float32)})
    assert sparse({DOWN: whole}).shardings(lone, mesh).trainable[DOWN].spec == P()


def test_without_a_mesh_nothing_changes():
    x = jnp.ones((4, 8))
    assert axis_size("fsdp") == 1
    assert current_axes(("fsdp", None)) == (None, None)
    assert constrain(x, "fsdp", None) is x
    assert on_blocks(lambda a: a.shape, ("fsdp", None), 0, x) == (4, 8)


def test_on_a_mesh_each_device_has_its_blocks():
    with jax.set_mesh(mesh_of(1, 4, 2)):
        x = jnp.arange(32.0).reshape(4, 8)
        seen = []
        summed = jax.jit(
            lambda x: on_blocks(lambda a: seen.append(a.shape) or a * 2, ("fsdp", "tensor"), 0, x)
        )
        assert (summed(x) == 2 * x).all()
        assert seen == [(1, 4)]
        spread = jax.jit(lambda x: constrain(x, ("data", "fsdp"), "tensor"))(x)
        assert spread.sharding.spec == P("fsdp", "tensor")
        odd = jax.jit(lambda x: constrain(x, "fsdp", "tensor"))(jnp.ones((6, 8)))  # 4 does not divide 6
        assert odd.sharding.spec == P(None, "tensor")
        inside = []
        on_blocks(lambda a: inside.append(axis_size("fsdp")) or a, ("fsdp", None), 0, x)
        assert inside == [1]  # work is per device already
