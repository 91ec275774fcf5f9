"""Work on the blocks of weights where they lie on a mesh of devices: each device on its own, no exchange.

A weight whose block grid is spread over a mesh has its blocks, and the entries that belong to them, on the
same devices. What is done per entry or per block then needs nothing from another device. The mesh is the
one in force (``jax.set_mesh``); without one, or where an axis has size 1, nothing here changes a program.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import PartitionSpec

from spiel_jax.ops.stored import is_stored

Axes = tuple[str | None, str | None]
"""Names of the mesh axes over which the rows and the columns of a block grid are spread."""

BATCH_AXES = ("data", "fsdp")
"""Names of the mesh axes over which the examples of a batch are spread."""


def axis_size(name: str | None) -> int:
    """Size of an axis of the current mesh; 1 where there is none, or where work is per device already."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or name not in mesh.shape or name in mesh.manual_axes:
        return 1
    return mesh.shape[name]


def current_axes(axes: Sequence[str | None]) -> tuple[str | None, ...]:
    """``axes`` with None in the place of those of size 1."""
    return tuple(name if axis_size(name) > 1 else None for name in axes)


def on_blocks(function: Callable[..., Any], axes: Axes | None, stack: int, *trees: Any) -> Any:
    """``function(*trees)`` on each device for its own blocks.

    Args:
        function: Treats the matrices and blocks of its arguments alike and independently, however many there
            are of them; what it closes over is the same on all devices.
        axes: See ``Axes``; None where the grid is not spread.
        stack: Number of axes before the two that are spread.
        trees: Pytrees of arrays [*stack, rows, columns] or [*stack, grid_rows, grid_columns, ...]. An axis
            that the mesh does not divide (of the one scale of each row of a stored weight) is not spread.

    Returns:
        What ``function`` returns, arrays like those of ``trees`` that the mesh divides.
    """
    used = current_axes(axes or ())
    if not any(used):
        return function(*trees)

    trees = tuple(
        jax.tree.map(lambda leaf: leaf.divisible() if is_stored(leaf) else leaf, tree, is_leaf=is_stored)
        for tree in trees
    )

    def spec(leaf: jax.Array) -> PartitionSpec:
        sizes = leaf.shape[stack : stack + 2]
        cut = [name if size % axis_size(name) == 0 else None for name, size in zip(used, sizes, strict=True)]
        return PartitionSpec(*[None] * stack, *cut)

    # the loops of the selection carry what differs between devices from a start that does not
    return jax.shard_map(
        function,
        in_specs=jax.tree.map(spec, trees),
        out_specs=PartitionSpec(*[None] * stack, *used),
        check_vma=False,
    )(*trees)


def constrain(x: jax.Array, *axes: str | tuple[str, ...] | None) -> jax.Array:
    """``x`` with its axes spread over these mesh axes, as far as the current mesh has and divides them.

    Args:
        x: Any array.
        axes: For each axis of ``x`` a mesh axis, several, or None.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or mesh.manual_axes:
        return x

    def kept(size: int, names: str | tuple[str, ...] | None) -> tuple[str, ...] | None:
        taken = []
        for name in (names,) if isinstance(names, str) else names or ():
            if axis_size(name) > 1 and size % axis_size(name) == 0:
                taken.append(name)
                size //= axis_size(name)
        return tuple(taken) or None

    spec = PartitionSpec(*(kept(size, names) for size, names in zip(x.shape, axes, strict=True)))
    return jax.lax.with_sharding_constraint(x, spec)
