"""A model that eight devices divide in every way, and runs of it on meshes."""

import collections
import dataclasses
import re
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

import spiel_jax as sj
from spiel_jax.config import LINEAR_LAYERS
from spiel_jax.distributed.mesh import batch_sharding, make_mesh
from spiel_jax.losses.next_token import Objective
from spiel_jax.methods.method import compiled_step
from spiel_jax.methods.sparse import SparseMethod
from spiel_jax.models import ModelConfig, abstract_params, init_params, layer_names
from spiel_jax.models.axes import param_sharding, weight_axes, weight_grid
from spiel_jax.models.decoder import ADAPTED
from spiel_jax.models.storage import storage_for
from spiel_jax.ops.matmul import linear
from spiel_jax.ops.tree import parameter_name
from spiel_jax.optim.inner_optimizers import aged_adamw, sparse_sm3
from support.adapter_cases import make_batch

CONFIG = ModelConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=64,
    num_layers=3,
    num_heads=8,
    num_kv_heads=8,
    head_dim=4,
    max_positions=64,
    tie_embeddings=False,
    initializer_range=0.3,
)
BLOCKS = {"fsdp": 8, "tensor": 8}
ROWS, LENGTH = 8, 12
PLAN = sj.Reselection(8, every=4, accumulation=2)


def adapted(blocks=BLOCKS, rules=LINEAR_LAYERS, config=CONFIG, num_tunable=3 * 1600):
    targets = sj.find_targets(
        abstract_params(config),
        num_tunable=num_tunable,
        rules=rules,
        grid=lambda name: weight_grid(name, blocks),
        layer_names=lambda name, stack: layer_names(name, stack[0]),
    )
    return {
        name: dataclasses.replace(
            target, axes=None if target.grid == (1, 1) else weight_axes(parameter_name(name))
        )
        for name, target in targets.items()
    }


def method(targets, growth, *, in_place=True, remat="full", config=CONFIG):
    inner = aged_adamw(1e-2) if growth.uses_candidates else sparse_sm3(1e-2, targets)
    tx = sj.spiel(inner, targets, growth=growth, schedule=PLAN)
    return SparseMethod(Objective(config, remat, loss_chunk=16), tx, targets, growth, in_place)


@cache
def pretrained():
    """float32 parameters of the model, on one device."""
    return jax.jit(partial(init_params, CONFIG, dtype=jnp.float32))(jax.random.key(0))


def batch(seed, micro_batches=1):
    return make_batch(seed, micro_batches, ROWS, LENGTH, CONFIG.vocab_size)


def after_phase(training, params):
    """The state after two steps of two micro-batches each, a phase that the only reselection ends."""
    state = jax.jit(training.init)(params)
    step = jax.jit(
        lambda s, b, phase, reselect: training.step(s, b, phase=phase, reselect=reselect),
        static_argnames=("phase", "reselect"),
    )
    for number in (1, 2):
        phase, reselect = training.step_kind(number)
        assert phase is not sj.Phase.PLAIN
        state, _ = step(state, batch(number, 2), phase=phase, reselect=reselect)
    assert training.step_kind(3) == (sj.Phase.PLAIN, False)
    return state


def mesh_of(data, fsdp, tensor):
    devices = jax.devices()[: data * fsdp * tensor]
    return make_mesh({"data": data, "fsdp": fsdp, "tensor": tensor}, devices)


def placed(training, mesh, dtype=jnp.float32, config=CONFIG):
    """The first state on a mesh, and where its arrays lie."""
    draw = partial(init_params, config, dtype=dtype, storage=storage_for("none", dtype))
    params = jax.jit(draw)(jax.random.key(0))
    params = {
        name: jax.tree.map(lambda x, name=name: jax.device_put(x, param_sharding(name, x.shape, mesh)), param)
        for name, param in params.items()
    }
    shardings = training.shardings(jax.eval_shape(training.init, params), mesh)
    return jax.jit(lambda p: training.init(p), out_shardings=shardings)(params), shardings


def run(training, mesh, steps=8, micro_batches=1):
    """Final state on the host, and the losses."""
    with jax.set_mesh(mesh):
        state, shardings = placed(training, mesh)
        step = compiled_step(training, shardings)
        losses = []
        for number in range(1, steps + 1):
            data = jax.device_put(batch(number, micro_batches), batch_sharding(mesh, 1))
            phase = PLAN.phase(number) if training.growth.uses_candidates else sj.Phase.PLAIN
            state, metrics = step(state, data, phase=phase, reselect=bool(PLAN.reselects(number)))
            losses.append(float(metrics["loss"]))
        assert state.params["model.layers.mlp.up_proj.weight"].sharding.mesh == mesh
        return jax.device_get(state), losses


def positions(state):
    return {name: np.asarray(d.indices) for name, d in optax.tree.get(state.opt_state, "active").items()}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Frozen:
    """A frozen linear whose only gradient is that of a scalar: what is left is the passes themselves."""

    scale: jax.Array

    def __call__(self, x, weight):
        return linear(x, jax.lax.stop_gradient(weight)) * self.scale


def frozen_passes(objective, params, batch):
    """Loss, and the input gradients through every layer, of the model without anything trained."""
    scales = {name: jnp.ones((objective.config.num_layers,)) for name in ADAPTED}
    micro = jax.tree.map(lambda x: x[0], batch)

    def loss(scales):
        return objective(params, micro, {name: Frozen(scale) for name, scale in scales.items()}, frozen=True)

    return jax.value_and_grad(loss)(scales)


def collectives(compiled):
    """Every array that a program's collectives give, once per instruction: Counter of (kind, dtype, shape).

    Scalars are left out.
    """
    kinds = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
    found = collections.Counter()
    for line in compiled.as_text().splitlines():
        match = re.match(rf"\s*(?:ROOT )?%\S+ = (.*?) ({kinds})(?:-start)?\(", line)
        if match is None:
            continue
        for dtype, shape in re.findall(r"\b(\w+)\[([\d,]*)\]", match[1]):
            if shape:
                found[match[2], dtype, tuple(map(int, shape.split(",")))] += 1
    return found
