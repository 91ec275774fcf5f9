"""Tensors of a checkpoint put in their places in parameters on devices, one at a time."""

import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Sharding

from spiel_jax.errors import SpielError
from spiel_jax.models.io.holding import held_as_it_is, on_devices
from spiel_jax.models.io.names import Placement
from spiel_jax.models.storage.weight import Weight, kind_name

Index = tuple[slice, ...]
"""A part of an array, as a slice of each axis."""
Bounds = tuple[tuple[int, int], ...]
"""A part of an array, as start and stop on each axis: slices cannot be keys of a dict."""


def distinct_parts(indices: Iterable[Index | None], shape: Sequence[int]) -> list[Bounds]:
    """The parts of an array that these indices select, each once.

    >>> distinct_parts([(slice(0, 2), slice(None)), (slice(2, 4), slice(None)), (slice(2, 4),)], (4, 8))
    [((0, 2), (0, 8)), ((2, 4), (0, 8))]
    """
    return list(dict.fromkeys(_bounds(index, shape) for index in indices))


def _bounds(index: Index | None, shape: Sequence[int]) -> Bounds:
    slices = itertools.chain(index or (), itertools.repeat(slice(None)))
    return tuple(part.indices(size)[:2] for part, size in zip(slices, shape, strict=False))


def placed(sharding: Callable[[str, tuple[int, ...]], Sharding] | None, name: str, spec: Any) -> Any:
    """The sharding of each array of a parameter, described by ``spec``; None: the default device."""
    here = jnp.zeros(()).sharding
    return jax.tree.map(lambda leaf: here if sharding is None else sharding(name, leaf.shape), spec)


def zeros(spec: Any, place: Any) -> Any:
    """A parameter of zeros, whose arrays lie at ``place``."""
    leaves, structure = jax.tree.flatten(spec)
    return _zeros(structure, tuple(leaves), tuple(jax.tree.leaves(place)))()


@functools.cache
def _zeros(structure: Any, leaves: tuple[Any, ...], places: tuple[Sharding, ...]) -> Callable[[], Any]:
    """Makes a parameter of zeros: one program for all of a shape, and for every model that is loaded."""
    return jax.jit(
        lambda: jax.tree.unflatten(structure, [jnp.zeros(leaf.shape, leaf.dtype) for leaf in leaves]),
        out_shardings=jax.tree.unflatten(structure, places),
    )


def _tensor(
    read: Callable[[Sequence[Index]], list[np.ndarray]], slot: Placement, place: Sharding
) -> jax.Array:
    """A tensor as it is in the checkpoint, in the rank of its parameter, so that its sharding fits."""
    lead = () if slot.layer is None else (1,)
    shape = (*lead, *slot.shape)
    held = distinct_parts(place.addressable_devices_indices_map(shape).values(), shape)
    wanted = [tuple(slice(*bounds) for bounds in part[len(lead) :]) for part in held]
    # devices that hold the same part share what is read
    parts = {
        part: found.reshape(place.shard_shape(shape)) for part, found in zip(held, read(wanted), strict=True)
    }
    return jax.make_array_from_callback(shape, place, lambda index: parts[_bounds(index, shape)])


def _shardings(param: Any) -> tuple[Any, ...]:
    """The structure of a parameter, and where its arrays lie."""
    leaves, structure = jax.tree.flatten(param)
    return structure, *(leaf.sharding for leaf in leaves)


def with_tensor(
    checkpoint: Any, name: str, slot: Placement, param: Any, dtype: jnp.dtype, place: Sharding
) -> Any:
    """A parameter with one tensor in its place; its buffers are reused.

    Args:
        checkpoint: A ``Checkpoint``, from which the tensor is read.
        name: Of the tensor.
        slot: Its place.
        param: The parameter.
        dtype: Of the parameter.
        place: Where an array of its shape would lie.

    Raises:
        SpielError: If it is to be quantised and has an entry that is not finite.
    """
    layer = np.int32(slot.layer or 0)
    held = held_as_it_is(checkpoint, name, param)
    if held is not None:
        param = _putter(*_shardings(param))(param, on_devices(held, param), layer)
        return jax.block_until_ready(param)
    tensor = _tensor(functools.partial(checkpoint.read, name), slot, place)
    # waiting bounds the tensors in flight to one
    param, finite = jax.block_until_ready(_writer(dtype, *_shardings(param))(param, tensor, layer))
    if kind_name(type(param)) is not None and not finite:
        raise SpielError(
            f"{checkpoint.path}: {name} has entries that are not finite (NaN or infinity): it cannot be held "
            f"as {kind_name(type(param))}"
        )
    return param


def _put(param: Any, new: Any, start: jax.Array) -> Any:
    put = functools.partial(lax.dynamic_update_slice_in_dim, start_index=start, axis=0)
    return jax.tree.map(put, param, new)


@functools.cache
def _putter(structure: Any, *places: Sharding) -> Callable[[Any, Any, np.int32], Any]:
    """Puts a layer's arrays in their place in a parameter, whose buffers are reused."""
    return jax.jit(_put, donate_argnums=0, out_shardings=jax.tree.unflatten(structure, places))


@functools.cache
def _writer(
    dtype: jnp.dtype, structure: Any, *places: Sharding
) -> Callable[[Any, jax.Array, np.int32], tuple[Any, jax.Array]]:
    """Puts a tensor in its place in a parameter, whose buffers are reused; tells if all of it is finite."""

    def write(param: Any, part: jax.Array, start: jax.Array) -> tuple[Any, jax.Array]:
        if not isinstance(param, Weight):
            return _put(param, part.astype(dtype), start), jnp.array(True)
        finite = jnp.all(jnp.isfinite(part)) if kind_name(type(param)) else jnp.array(True)
        return _put(param, param.hold_alike(part), start), finite

    shardings = jax.tree.unflatten(structure, places), None
    return jax.jit(write, donate_argnums=0, out_shardings=shardings)
