"""Where the arrays of a run lie on a mesh of devices: one table from names to logical axes to mesh axes.

The mesh has three axes. ``data``: each device has its own examples and all of the weights. ``fsdp``: its
own examples too, and a part of the weights, which are collected for their use layer by layer. ``tensor``:
the same examples, and a part of every layer's heads and hidden units.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from spiel_jax.errors import SpielError
from spiel_jax.models.axes import weight_axes
from spiel_jax.models.config import ModelConfig
from spiel_jax.models.decoder import ADAPTED, abstract_params
from spiel_jax.models.storage.weight import Weight

MESH_AXES = ("data", "fsdp", "tensor")


def mesh_sizes(sizes: Mapping[str, int], devices: int) -> dict[str, int]:
    """The sizes of all mesh axes, with that of an axis of -1 filled in.

    Raises:
        SpielError: If a size is neither positive nor -1, several are -1, or there are not enough devices.

    Example:
        >>> mesh_sizes({"data": -1, "fsdp": 2, "tensor": 1}, 8)
        {'data': 4, 'fsdp': 2, 'tensor': 1}
    """
    sizes = {name: sizes[name] for name in MESH_AXES}
    shown = ", ".join(f"{name}={size}" for name, size in sizes.items())
    if any(size < 1 and size != -1 for size in sizes.values()):
        raise SpielError(f"mesh of {shown}: expected positive sizes, or -1 for the rest of the devices")
    open_axes = [name for name, size in sizes.items() if size == -1]
    if len(open_axes) > 1:
        raise SpielError(f"mesh of {shown}: only one axis can take the rest of the devices")
    known = math.prod(size for size in sizes.values() if size != -1)
    if open_axes and devices % known == 0:
        sizes[open_axes[0]] = devices // known
    elif open_axes:
        raise SpielError(f"mesh of {shown}: {known} does not divide the {devices} devices")
    elif known > devices:
        raise SpielError(f"mesh of {shown}: that is more than the {devices} devices there are")
    return sizes


def make_mesh(sizes: Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of these sizes; -1 stands for the rest of the devices.

    Args:
        sizes: Of the axes ``data``, ``fsdp`` and ``tensor``.
        devices: Default: all devices of all processes. The first of them are used where the sizes make up
            fewer.

    Raises:
        SpielError: See ``mesh_sizes``; and if fewer devices than a TPU slice has cannot be arranged.
    """
    devices = jax.devices() if devices is None else devices
    complete = mesh_sizes(sizes, len(devices))
    kinds = (AxisType.Auto,) * len(MESH_AXES)
    used = devices[: math.prod(complete.values())]
    shape = tuple(complete.values())
    try:
        return jax.make_mesh(shape, MESH_AXES, axis_types=kinds, devices=used)
    except NotImplementedError:
        # an axis has to be a part of one of a TPU slice's axes: not the fastest arrangement, but right
        arranged = mesh_utils.create_device_mesh(shape, used, allow_split_physical_axes=True)
        return Mesh(arranged, MESH_AXES, axis_types=kinds)
    except AssertionError as error:  # of the devices' coordinates
        raise SpielError(
            f"a mesh of {len(used)} of the {len(devices)} devices: the first of them are no part of a TPU "
            "slice by themselves; use all"
        ) from error


def check_mesh(
    model: ModelConfig, mesh: Mesh, blocks: Mapping[str, int], storage: type[Weight] | None = None
) -> None:
    """Makes sure that a mesh divides a model and the block grid of a run.

    Args:
        model: Shape of the model.
        mesh: From ``make_mesh``.
        blocks: Blocks of each weight along the mesh axes "fsdp" and "tensor".
        storage: How the weights are held; parts of quantised ones are made of whole blocks of entries.

    Raises:
        SpielError: If it does not; the sizes that would do are named.
    """
    for axis in blocks:
        if blocks[axis] % mesh.shape[axis]:
            fits = [size for size in range(1, blocks[axis] + 1) if blocks[axis] % size == 0]
            fitting = math.lcm(blocks[axis], mesh.shape[axis])
            raise SpielError(
                f"mesh {axis}={mesh.shape[axis]} does not divide the run's grid of {blocks[axis]} blocks "
                f"along {axis}: use a mesh of {axis}={' or '.join(map(str, fits))}, or regrid the run to "
                f"{fitting} blocks (python -m spiel_jax.regrid)"
            )
    params = abstract_params(model)
    cuts = []  # weight, its shape, entries along an axis, those of them that stay together, the mesh axis
    for name in ADAPTED:
        shape = params[name].shape[-2:]
        grain = (1, 1) if storage is None else storage.grain(shape)
        cuts += [(name, shape, *cut) for cut in zip(shape, grain, weight_axes(name), strict=True) if cut[2]]
    for name, shape, size, one, axis in cuts:
        parts = max(mesh.shape[axis], blocks[axis])
        if size // one % parts == 0:
            continue
        if one == 1:
            raise SpielError(
                f"{axis}={parts} does not divide {name} of {shape}: expected a divisor of {size}"
            )
        common = math.gcd(*(size // one for *_, size, one, other in cuts if other == axis))
        fits = " or ".join(str(number) for number in range(1, common + 1) if common % number == 0)
        raise SpielError(
            f"{axis}={parts} does not divide {name} of {shape}, where {one} entries along that axis are "
            f"quantised together: {axis}={fits} divides all weights, as a mesh and as a grid"
        )


def batch_sharding(mesh: Mesh, leading: int = 0) -> NamedSharding:
    """Of a batch's arrays [*leading, examples, tokens]."""
    return NamedSharding(mesh, PartitionSpec(*[None] * leading, ("data", "fsdp")))


def local_rows(rows: int, mesh: Mesh) -> list[int]:
    """Which examples of a batch of so many the devices of this process hold, in order."""
    parts = batch_sharding(mesh).addressable_devices_indices_map((rows, 1))
    return sorted({row for part in parts.values() if part is not None for row in range(rows)[part[0]]})


def shard_batch(batch: Any, mesh: Mesh, rows: int) -> Any:
    """A batch's arrays [..., examples, tokens] from the hosts to the devices of a mesh.

    Args:
        batch: Holds this process's examples: those of ``local_rows``.
        mesh: From ``make_mesh``.
        rows: Number of examples in all processes together.
    """

    def spread(x: Any) -> jax.Array:
        shape = (*x.shape[:-2], rows, x.shape[-1])
        return jax.make_array_from_process_local_data(batch_sharding(mesh, x.ndim - 2), x, shape)

    return jax.tree.map(spread, batch)
