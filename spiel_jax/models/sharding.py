"""Where the arrays of a run lie on a mesh of devices: one table from names to logical axes to mesh axes.

The mesh has three axes. ``data``: each device has its own examples and all of the weights. ``fsdp``: its
own examples too, and a part of the weights, which are collected for their use layer by layer. ``tensor``:
the same examples, and a part of every layer's heads and hidden units.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from spiel_jax.blocks import Axes
from spiel_jax.models.config import ModelConfig
from spiel_jax.models.decoder import ADAPTED, LAYERS, abstract_params
from spiel_jax.sparse import parameter_name
from spiel_jax.targets import Target

MESH_AXES = ("data", "fsdp", "tensor")

_MESH_AXIS = {"layers": None, "embed": "fsdp", "heads": "tensor", "mlp": "tensor", "vocab": "tensor"}
_OUTWARD = {"q_proj": "heads", "k_proj": "heads", "v_proj": "heads", "gate_proj": "mlp", "up_proj": "mlp"}
_INWARD = {"o_proj": "heads", "down_proj": "mlp"}


def _logical_axes(parameter: str) -> tuple[str | None, ...] | None:
    """Logical axes of a matrix or bias of the model; None for what every device holds whole."""
    if parameter in ("model.embed_tokens.weight", "lm_head.weight"):
        return ("vocab", "embed")
    layer, _, kind = parameter.removeprefix(LAYERS).partition(".")[2].rpartition(".")
    if layer in _OUTWARD:
        return ("layers", _OUTWARD[layer], "embed") if kind == "weight" else ("layers", _OUTWARD[layer])
    if layer in _INWARD and kind == "weight":
        return ("layers", "embed", _INWARD[layer])
    return None


def weight_axes(parameter: str) -> Axes:
    """Mesh axes of the rows and the columns of an adapted weight.

    >>> weight_axes("model.layers.mlp.down_proj.weight")
    ('fsdp', 'tensor')
    """
    rows, columns = (_logical_axes(parameter) or (None, None))[-2:]
    return _MESH_AXIS.get(rows or ""), _MESH_AXIS.get(columns or "")


def weight_grid(parameter: str, blocks: Mapping[str, int]) -> tuple[int, int]:
    """(rows, columns) of a weight's block grid, from the number of blocks along each mesh axis.

    >>> weight_grid("model.layers.mlp.down_proj.weight", {"fsdp": 4, "tensor": 2})
    (4, 2)
    """
    rows, columns = weight_axes(parameter)
    return blocks.get(rows or "", 1), blocks.get(columns or "", 1)


def mesh_sizes(sizes: Mapping[str, int], devices: int) -> dict[str, int]:
    """The sizes of all mesh axes, with that of an axis of -1 filled in.

    Raises:
        ValueError: If a size is neither positive nor -1, several are -1, or there are not enough devices.

    Example:
        >>> mesh_sizes({"data": -1, "fsdp": 2, "tensor": 1}, 8)
        {'data': 4, 'fsdp': 2, 'tensor': 1}
    """
    sizes = {name: sizes[name] for name in MESH_AXES}
    shown = ", ".join(f"{name}={size}" for name, size in sizes.items())
    if any(size < 1 and size != -1 for size in sizes.values()):
        raise ValueError(f"mesh of {shown}: expected positive sizes, or -1 for the rest of the devices")
    open_axes = [name for name, size in sizes.items() if size == -1]
    if len(open_axes) > 1:
        raise ValueError(f"mesh of {shown}: only one axis can take the rest of the devices")
    known = math.prod(size for size in sizes.values() if size != -1)
    if open_axes and devices % known == 0:
        sizes[open_axes[0]] = devices // known
    elif open_axes:
        raise ValueError(f"mesh of {shown}: {known} does not divide the {devices} devices")
    elif known > devices:
        raise ValueError(f"mesh of {shown}: that is more than the {devices} devices there are")
    return sizes


def make_mesh(sizes: Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of these sizes; -1 stands for the rest of the devices.

    Args:
        sizes: Of the axes ``data``, ``fsdp`` and ``tensor``.
        devices: Default: all devices of all processes. The first of them are used where the sizes make up
            fewer.

    Raises:
        ValueError: See ``mesh_sizes``.
    """
    devices = jax.devices() if devices is None else devices
    complete = mesh_sizes(sizes, len(devices))
    kinds = (AxisType.Auto,) * len(MESH_AXES)
    used = devices[: math.prod(complete.values())]
    return jax.make_mesh(tuple(complete.values()), MESH_AXES, axis_types=kinds, devices=used)


def check_mesh(model: ModelConfig, mesh: Mesh, blocks: Mapping[str, int]) -> None:
    """Makes sure that a mesh divides a model and the block grid of a run.

    Args:
        model: Shape of the model.
        mesh: From ``make_mesh``.
        blocks: Blocks of each weight along the mesh axes "fsdp" and "tensor".

    Raises:
        ValueError: If it does not; the sizes that would do are named.
    """
    for axis in blocks:
        if blocks[axis] % mesh.shape[axis]:
            fits = [size for size in range(1, blocks[axis] + 1) if blocks[axis] % size == 0]
            fitting = math.lcm(blocks[axis], mesh.shape[axis])
            raise ValueError(
                f"mesh {axis}={mesh.shape[axis]} does not divide the run's grid of {blocks[axis]} blocks "
                f"along {axis}: use a mesh of {axis}={' or '.join(map(str, fits))}, or regrid the run to "
                f"{fitting} blocks (python -m spiel_jax.regrid)"
            )
    for name, shape in abstract_params(model).items():
        if name not in ADAPTED:
            continue
        for size, axis in zip(shape.shape[-2:], weight_axes(name), strict=True):
            if axis is not None and size % max(mesh.shape[axis], blocks[axis]):
                raise ValueError(
                    f"{axis}={max(mesh.shape[axis], blocks[axis])} does not divide {name} of "
                    f"{shape.shape[-2:]}: expected a divisor of {size}"
                )


def param_sharding(name: str, shape: Sequence[int], mesh: Mesh) -> NamedSharding:
    """Where a parameter lies; whole on every device along the axes that do not divide it."""
    axes = [_MESH_AXIS.get(axis or "") for axis in _logical_axes(name) or ()]
    kept = [
        axis if axis is not None and size % mesh.shape[axis] == 0 else None
        for axis, size in zip(axes, shape, strict=False)
    ]
    return NamedSharding(mesh, PartitionSpec(*kept))


def batch_sharding(mesh: Mesh, leading: int = 0) -> NamedSharding:
    """Of a batch's arrays [*leading, examples, tokens]."""
    return NamedSharding(mesh, PartitionSpec(*[None] * leading, ("data", "fsdp")))


def spread_batch(batch: Any, mesh: Mesh) -> Any:
    """A batch's arrays [..., examples, tokens] from the host to the devices of a mesh."""
    return jax.tree.map(lambda x: jax.device_put(x, batch_sharding(mesh, x.ndim - 2)), batch)


def state_shardings(state: Any, targets: Mapping[str, Target], mesh: Mesh) -> Any:
    """Where the arrays of a training state lie: parameters by the table, what belongs to a weight like it.

    Args:
        state: A ``TrainState``, or a part of one, of arrays or ``jax.ShapeDtypeStruct``.
        targets: What has sparse deltas.
        mesh: From ``make_mesh``.

    Returns:
        A tree like ``state`` of ``NamedSharding``.
    """
    whole = NamedSharding(mesh, PartitionSpec())

    def place(path: tuple, leaf: Any) -> NamedSharding:
        names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
        section = path[0].name if isinstance(path[0], jax.tree_util.GetAttrKey) else None
        for name in names:
            parameter = parameter_name(name) if isinstance(name, str) else ""
            if name in targets and section != "params":
                target = targets[name]
                if target.axes is None or leaf.ndim < len(target.lead):
                    return whole
                return NamedSharding(mesh, PartitionSpec(*[None] * len(target.stack), *target.axes))
            if _logical_axes(parameter) is None:
                continue
            rows, columns = weight_axes(parameter)
            if names[-1] == "lora_A":  # [layers, r, in]
                return NamedSharding(mesh, PartitionSpec(None, None, columns))
            if names[-1] == "lora_B":  # [layers, out, r]
                return NamedSharding(mesh, PartitionSpec(None, rows))
            if len(leaf.shape) == len(_logical_axes(parameter) or ()):
                return param_sharding(parameter, leaf.shape, mesh)
        return whole

    return jax.tree_util.tree_map_with_path(place, state)
