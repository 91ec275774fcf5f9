"""Weights of a checkpoint in the kind that a run holds them in: which may be, and which are so already."""

from collections.abc import Iterable, Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np

from spiel_jax.errors import SpielError
from spiel_jax.models.decoder import ADAPTED
from spiel_jax.models.io.names import Placement, Stored, quantized_as
from spiel_jax.models.storage.weight import Weight, kind_name


@runtime_checkable
class Prequantized(Protocol):
    """What a checkpoint offers beside, if it can give weights as they are quantised in it."""

    def described(self, spec: Any, names: Iterable[str]) -> Any:
        """How a parameter is held whose tensors have these names; ``spec``: if none were quantised."""
        ...

    def held(self, name: str, like: Any) -> Any | None:
        """One tensor with its arrays, on the host, as a layer of ``like``; None: it is not held so."""
        ...


def quantized_specs(
    path: Any,
    stored: Mapping[str, Stored],
    checkpoint: Any,
    places: Mapping[str, Placement],
    specs: Mapping[str, Any],
    requantize: bool,
) -> dict[str, Any]:
    """How the parameters of a quantised model are held, with what a checkpoint has.

    Args:
        path: Of the checkpoint, for messages.
        stored: Its tensors.
        checkpoint: Is asked if it is ``Prequantized``.
        places: Of its tensors.
        specs: How the parameters would be held if no tensor were quantised.
        requantize: Whether what is quantised otherwise may be quantised again.

    Raises:
        SpielError: If it would be, and may not.
    """
    layers: dict[str, list[str]] = {}
    for name, place in places.items():
        if place.parameter not in ADAPTED:
            continue
        layers.setdefault(place.parameter, []).append(name)
        there, here = quantized_as(stored[name]), kind_name(type(specs[place.parameter]))
        if there not in (None, here) and not requantize:
            raise SpielError(
                f"{path} holds {name} as {there}: quantising it again, as {here}, adds an error to the one "
                "it has. Say config.model.requantize = True if that is meant, or config.model.quantization = "
                "'none' to hold the array that it stands for"
            )
    if not isinstance(checkpoint, Prequantized):
        return dict(specs)
    return dict(specs) | {name: checkpoint.described(specs[name], names) for name, names in layers.items()}


def held_as_it_is(checkpoint: Any, name: str, like: Any) -> Any | None:
    """A tensor with the arrays it has in a checkpoint, if it is held there as ``like`` is; None if not."""
    if not (isinstance(checkpoint, Prequantized) and isinstance(like, Weight)):
        return None
    return checkpoint.held(name, like)


def check_cut(name: str, weight: Weight, sharding: Any) -> None:
    """Makes sure that the arrays of a weight are cut as the weight is.

    Args:
        name: Of the parameter.
        weight: On its devices.
        sharding: Of an array of its shape.

    Raises:
        SpielError: If one is not.
    """
    parts = _parts(sharding, weight.shape)
    if parts == [1, 1]:
        return
    whole = any(leaf.ndim < weight.ndim for leaf in jax.tree.leaves(jax.eval_shape(_divisible, weight)))
    arrays = [leaf for leaf in jax.tree.leaves(weight) if leaf.ndim == weight.ndim]
    for leaf in arrays:
        found = _parts(leaf.sharding, leaf.shape)
        wanted = [1 if size == 1 else part for size, part in zip(leaf.shape[-2:], parts, strict=True)]
        if whole or found != wanted:
            raise SpielError(
                f"{name} of {list(weight.shape[-2:])} is cut into {parts[0]} x {parts[1]} parts on this "
                f"mesh, and the {list(leaf.shape[-2:])} that it is held in cannot be: use smaller mesh axes"
            )


def _divisible(weight: Any) -> Any:
    return weight.divisible()


def _parts(sharding: Any, shape: tuple[int, ...]) -> list[int]:
    """Into how many parts the last two axes are cut."""
    whole, part = shape[-2:], sharding.shard_shape(shape)[-2:]
    return [size // piece for size, piece in zip(whole, part, strict=True)]


def on_devices(weight: Any, like: Any) -> Any:
    """A layer's arrays on the host [...] as arrays [1, ...] on the devices that hold those of ``like``."""

    def spread(array: np.ndarray, like: jax.Array) -> jax.Array:
        stacked = np.ascontiguousarray(array)[None]
        return jax.make_array_from_callback(stacked.shape, like.sharding, lambda index: stacked[index])

    return jax.tree.map(spread, weight, like)
