"""One table from the names of a model's parameters to logical axes, and from these to mesh axes."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from spiel_jax.ops.sharded import BATCH_AXES, Axes, constrain

LAYERS = "model.layers."
"""Prefix of the names of stacked parameters."""

MESH_AXIS = {"layers": None, "embed": "fsdp", "heads": "tensor", "mlp": "tensor", "vocab": "tensor"}
_OUTWARD = {"q_proj": "heads", "k_proj": "heads", "v_proj": "heads", "gate_proj": "mlp", "up_proj": "mlp"}
_INWARD = {"o_proj": "heads", "down_proj": "mlp"}


def logical_axes(parameter: str) -> tuple[str | None, ...] | None:
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
    rows, columns = (logical_axes(parameter) or (None, None))[-2:]
    return MESH_AXIS.get(rows or ""), MESH_AXIS.get(columns or "")


def weight_grid(parameter: str, blocks: Mapping[str, int]) -> tuple[int, int]:
    """(rows, columns) of a weight's block grid, from the number of blocks along each mesh axis.

    >>> weight_grid("model.layers.mlp.down_proj.weight", {"fsdp": 4, "tensor": 2})
    (4, 2)
    """
    rows, columns = weight_axes(parameter)
    return blocks.get(rows or "", 1), blocks.get(columns or "", 1)


def all_gathered(parameter: str, matrix: Any) -> Any:
    """One layer's matrix as a product wants it on a mesh: whole along the axes that spread the examples too.

    Said outright, because XLA may otherwise collect it along the others as well, or move activations. Of a
    stored weight it is what is held that is collected; what belongs to it as a whole is there already.
    """
    axes = [None if name in BATCH_AXES else name for name in weight_axes(parameter)]
    return jax.tree.map(lambda leaf: constrain(leaf, *axes) if leaf.ndim == len(axes) else leaf, matrix)


def param_sharding(name: str, shape: Sequence[int], mesh: Mesh) -> NamedSharding:
    """Where a parameter, or an array that holds it, lies; whole along the mesh axes that do not divide it.

    An array of another rank than the parameter's belongs to all of it, and lies whole on every device.
    """
    axes = [MESH_AXIS.get(axis or "") for axis in logical_axes(name) or ()]
    kept = (
        [
            axis if axis is not None and size % mesh.shape[axis] == 0 else None
            for axis, size in zip(axes, shape, strict=True)
        ]
        if len(axes) == len(shape)
        else []
    )
    return NamedSharding(mesh, PartitionSpec(*kept))
