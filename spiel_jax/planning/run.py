"""A run as it would be on hardware that is not here, and settings of it that need less memory."""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from spiel_jax.adapters.start import read_start
from spiel_jax.config import Config, ConfigError, micro_batch_size, with_defaults
from spiel_jax.distributed.mesh import batch_sharding
from spiel_jax.methods.configured import check_layout
from spiel_jax.methods.method import Method, TrainState, compiled_step
from spiel_jax.methods.registry import build, method_class
from spiel_jax.models import ModelConfig, abstract_params
from spiel_jax.models.storage import storage_for
from spiel_jax.optim.schedules import Phase
from spiel_jax.planning.hlo import Program, compile_program
from spiel_jax.planning.topology import Hardware

_STEPS = 1000
"""Steps of a run that is measured in epochs of data that is not read; a small table depends on it."""

_NAMES = {Phase.PLAIN: "ordinary", Phase.PROPOSE: "proposing", Phase.ESTIMATE: "estimating"}


@dataclass(frozen=True)
class PlannedRun:
    """A run as it would be on a mesh of devices that need not be here.

    Attributes:
        given: The configuration as it was given.
        config: Complete: with the block grid and a micro-batch that can be spread over the mesh.
        mesh: Of the hardware's devices.
        method: The method.
        state: Of ``jax.ShapeDtypeStruct`` with shardings, as ``batch``.
        batch: Of one step.
        kinds: Name of each kind of step that the run has to its phase and whether it reselects.
    """

    given: Config
    config: Config
    mesh: Mesh
    method: Method
    state: TrainState
    batch: dict[str, jax.ShapeDtypeStruct]
    kinds: dict[str, tuple[Phase, bool]]

    def compiled(self, kind: str, hardware: Hardware) -> Program:
        """A kind of step, compiled for the devices of the mesh."""
        phase, reselect = self.kinds[kind]
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.state)
        with jax.set_mesh(self.mesh):
            step: Any = compiled_step(self.method, shardings)
            traced = step.trace(self.state, self.batch, phase=phase, reselect=reselect)
            return compile_program(traced, hardware.options)

    def held(self) -> dict[str, int]:
        """Bytes on each device between steps, by what they are for; without padding of layouts."""
        parts = {**self.method.memory(self.state), "batch": self.batch}
        return {name: _device_bytes(tree) for name, tree in parts.items()}


def _device_bytes(tree: Any) -> int:
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def prepare(config: Config, model: ModelConfig, mesh: Mesh) -> PlannedRun:
    """A run that could start on this mesh.

    Args:
        config: Checked. Its micro-batch is raised to a number that can be spread over the mesh; its block
            grid, where it is not set, is the mesh's.
        model: Shape of the model.
        mesh: From ``make_mesh``.

    Raises:
        ConfigError: If no micro-batch can be spread over the mesh.
        SpielError: If the mesh does not divide the model or the grid.
    """
    given, config = config, with_defaults(config, mesh.shape, {})
    config.micro_batch_size = _spread_micro_batch(config, mesh)
    check_layout(config, model, mesh, has_deltas=method_class(config.method).has_deltas)
    steps = config.steps or _STEPS
    with jax.set_mesh(mesh):
        start = read_start(config, model)
        method = build(config, model, steps, None if start is None else start.targets)
        dtype = jnp.dtype(config.model.dtype)
        storage = storage_for(config.model.quantization, dtype) if method.keeps_base else None
        params = abstract_params(model, dtype, storage=storage)
        state = jax.eval_shape(method.init, params)
    state = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        state,
        method.shardings(state, mesh),
    )
    return PlannedRun(
        given, config, mesh, method, state, _abstract_batch(config, mesh), _step_kinds(method, steps)
    )


def _spread_micro_batch(config: Config, mesh: Mesh) -> int:
    """The micro-batch of a config, or the next one that can be spread over the mesh."""
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    possible = micro_batches(config.batch_size, shards)
    if not possible:
        raise ConfigError(
            f"config.batch_size = {config.batch_size}: expected a multiple of {shards}, the size of data x "
            "fsdp in config.mesh"
        )
    wanted = micro_batch_size(config)
    return next((rows for rows in possible if rows >= wanted), possible[-1])


def _abstract_batch(config: Config, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    rows = config.micro_batch_size
    shape = (config.batch_size // rows, rows, config.data.sequence_length)
    dtypes = dict.fromkeys(("tokens", "labels", "positions", "segment_ids"), jnp.int32)
    return {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=batch_sharding(mesh, 1))
        for name, dtype in {**dtypes, "weights": jnp.float32}.items()
    }


def _step_kinds(method: Method, steps: int) -> dict[str, tuple[Phase, bool]]:
    """Name of each kind of step to its phase and whether it reselects; those that do more come last."""
    kinds: dict[str, tuple[Phase, bool]] = {}
    for step in range(1, steps + 1):
        phase, reselects = method.step_kind(step)
        name = _NAMES[phase]
        if reselects:
            name = "reselecting" if phase is Phase.PLAIN else f"{name}+reselecting"
        kinds[name] = phase, reselects
    order = list(Phase)
    return dict(sorted(kinds.items(), key=lambda kind: (order.index(kind[1][0]), kind[1][1])))


def micro_batches(batch_size: int, shards: int) -> list[int]:
    """Possible sizes, ascending: multiples of the shards that divide the batch."""
    return [rows for rows in range(shards, batch_size + 1, shards) if batch_size % rows == 0]
