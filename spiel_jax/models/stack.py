"""Stacks of layers: one array with an axis of layers in front, or the array of each layer by itself.

A loop over an array is compiled once for all layers, and slices it. XLA's CPU backend copies what is sliced,
which takes as long as multiplying a few tokens by it. Where tokens are few, layers are held by themselves
there, and the loop over them is unrolled.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from spiel_jax.models.storage.packed import runs_on_cpu


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Layers:
    """A stack of arrays, or of stored weights, as its layers.

    Attributes:
        parts: One of each layer.
    """

    parts: tuple[Any, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the stack."""
        return len(self.parts), *self.parts[0].shape

    @property
    def dtype(self) -> Any:
        """Of the stack."""
        return self.parts[0].dtype

    def __getitem__(self, layer: int) -> Any:
        """That of one layer."""
        return self.parts[layer]


Stack = jax.Array | Layers


def by_layer(stack: Any) -> Any:
    """A stack as its layers, in the same memory; on other devices than CPUs, which copy no slices, as it is.

    Args:
        stack: An array or a stored weight, not traced. Donated to a program while its layers are there, its
            memory stays theirs, and the program takes other memory.
    """
    if not runs_on_cpu():
        return stack
    leaves, structure = jax.tree.flatten(stack)
    parts = zip(*map(_slices, leaves), strict=True)
    return Layers(tuple(jax.tree.unflatten(structure, part) for part in parts))


def _slices(stack: jax.Array) -> list[jax.Array]:
    """The slices of an array on CPUs; views of it, where they lie as XLA wants arrays to lie."""
    pieces = [(np.asarray(shard.data), shard.device) for shard in stack.addressable_shards]
    if len(stack.sharding.device_set) == 1:
        ((whole, device),) = pieces
        return [jax.device_put(layer, device if stack.committed else None) for layer in whole]
    assert isinstance(stack.sharding, NamedSharding)
    mesh, (_, *axes) = stack.sharding.mesh, (*stack.sharding.spec, None)
    sharding = NamedSharding(mesh, PartitionSpec(*axes))

    def one(layer: int) -> jax.Array:
        own = [jax.device_put(piece[layer], device) for piece, device in pieces]
        return jax.make_array_from_single_device_arrays(stack.shape[1:], sharding, own)

    return [one(layer) for layer in range(stack.shape[0])]


def each_layer(function: Callable[..., jax.Array], stack: Stack, *more: Stack) -> Stack:
    """A stack with ``function`` of every layer."""
    if isinstance(stack, Layers):
        return Layers(tuple(function(layer, *(x[i] for x in more)) for i, layer in enumerate(stack.parts)))
    return jax.vmap(function)(stack, *more)


def scan(body: Callable, carry: Any, inputs: Any) -> tuple[Any, Any]:
    """``jax.lax.scan`` over stacks; unrolled where they are held as layers, and the results then too."""
    leaves = jax.tree.leaves(inputs, is_leaf=_is_layers)
    if not any(map(_is_layers, leaves)):
        return jax.lax.scan(body, carry, inputs)

    def slices(layer: int) -> Any:
        return jax.tree.map(lambda x: x[layer], inputs, is_leaf=_is_layers)

    outputs = []
    for layer in range(leaves[0].shape[0]):
        carry, output = body(carry, slices(layer))
        outputs.append(output)
    return carry, jax.tree.map(lambda *parts: Layers(parts), *outputs)


def _is_layers(node: Any) -> bool:
    return isinstance(node, Layers)
