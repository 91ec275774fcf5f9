"""Kinds of stored weights for the tests that all of them pass, and one that is there for tests only."""

from dataclasses import dataclass, field
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from spiel_jax.models.storage import NF4, Int8, Packed, Weight, register


@register("toy")
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RowScaled(Weight):
    """float8 with one float32 scale per row: all that a new kind has to be."""

    codes: jax.Array  # float8 [*stack, rows, columns]
    scales: jax.Array  # float32 [*stack, rows, 1]
    dtype: Any = field(metadata={"static": True})

    @property
    def shape(self):
        return self.codes.shape

    @classmethod
    def hold(cls, array):
        wide = array.astype(jnp.float32)
        largest = jnp.max(jnp.abs(wide), axis=-1, keepdims=True)
        scales = jnp.where(largest > 0, largest / 448, 1.0)
        return cls((wide / scales).astype(jnp.float8_e4m3fn), scales, array.dtype)

    def dequantize(self):
        return (self.codes.astype(jnp.float32) * self.scales).astype(self.dtype)


@cache
def holder(kind):
    return jax.jit(kind.hold)


@dataclass(frozen=True)
class Case:
    """A kind (None: arrays), the dtype of the weights, and its error relative to the largest of a row.

    Blocks of entries: the error is relative to the largest of a matrix. A mesh cuts matrices of 6 columns, or
    of so many.
    """

    kind: type[Weight] | None
    dtype: Any
    error: float = 0.0
    blocks: bool = False
    columns: int = 6

    def hold(self, array):
        array = jnp.asarray(np.asarray(array).astype(self.dtype))
        return array if self.kind is None else holder(self.kind)(array)


KINDS = {
    "dense": Case(None, jnp.float32),
    "packed": Case(Packed, jnp.bfloat16),
    "toy": Case(RowScaled, jnp.float32, 2**-4),
    "toy of bfloat16": Case(RowScaled, jnp.bfloat16, 2**-4 + 2**-8),
    "nf4": Case(NF4, jnp.float32, 0.16, True, 256),
    "nf4 of bfloat16": Case(NF4, jnp.bfloat16, 0.16, True, 256),
    "int8": Case(Int8, jnp.float32, 2**-7),
}
"""The kinds that exist. A new one joins here and passes all that is asked of a weight."""

QUICK = ("dense", "packed", "toy", "nf4")
"""Those that it is asked of by default."""


def numbers(*shape, seed=0):
    """Random float32, one row of zeros among them."""
    array = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    array[..., 1, :] = 0
    return array


def bits(array):
    """What is equal where two arrays are, bit for bit."""
    array = np.asarray(array)
    return array.dtype, array.shape, array.tobytes()


def with_bit_changed(weight, leaf_number):
    """The weight with the last bit of one entry of one of its arrays changed."""
    leaves, structure = jax.tree.flatten(weight)
    leaf = leaves[leaf_number]
    integers = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[leaf.dtype.itemsize]
    words = lax.bitcast_convert_type(leaf, integers)
    place = tuple(size // 2 for size in leaf.shape)
    leaves[leaf_number] = lax.bitcast_convert_type(words.at[place].set(words[place] ^ 1), leaf.dtype)
    return jax.tree.unflatten(structure, leaves)
