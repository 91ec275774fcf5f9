"""Digests of arrays, formed where they are."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from spiel_jax.ops.tree import named_leaves


def digests(tree: Any) -> dict[str, str]:
    """The digest of every array of a pytree, as eight hexadecimal digits by the array's name.

    >>> digests({"a": jnp.zeros(3), "b": {"c": jnp.array(1)}}).keys()
    dict_keys(['a', 'b.c'])
    """
    found = jax.device_get({name: digest(leaf) for name, leaf in named_leaves(tree).items()})
    return {name: f"{int(value):08x}" for name, value in found.items()}


@jax.jit  # compiled once for all arrays of a shape
def digest(array: jax.Array, first: jax.Array | int = 0) -> jax.Array:
    """A 32-bit digest of an array's bits, each with its place: the sum of their hashes.

    Formed where the array is, and the same however it is spread over devices. Any change of one word changes
    it; it is no cryptographic hash.

    Args:
        array: Of numbers of any dtype and rank.
        first: Number of its first matrix (of its first row, if it has no more than two axes): the digest of a
            stack is the sum of those of its parts, modulo 2^32.

    Returns:
        [] uint32.

    >>> int(digest(jnp.zeros(3))) == int(digest(jnp.zeros(3).at[1].set(-0.0)))
    False
    """
    if array.dtype == jnp.bool:
        array = array.astype(jnp.uint8)
    array = jnp.atleast_1d(array)
    stacked, first = array.ndim > 2, jnp.asarray(first, jnp.uint32)
    matrices = array.reshape(-1, *array.shape[-2:]) if stacked else array.reshape(1, -1, array.shape[-1])
    first_matrix, first_row = (first, 0) if stacked else (0, first)

    def one(item: tuple[jax.Array, jax.Array]) -> jax.Array:
        number, matrix = item
        words = _words(matrix)
        place = number * jnp.uint32(0x9E3779B1)
        for axis, factor in enumerate((0x85EBCA77, 0xC2B2AE3D, 0x27D4EB2F)[: words.ndim]):
            index = lax.broadcasted_iota(jnp.uint32, words.shape, axis)
            place = place + (index + first_row if axis == 0 else index) * jnp.uint32(factor)
        # over the rows first: XLA adds whole vectors then on a CPU, in a tenth of the time
        columns = jnp.sum(mixed(words ^ mixed(place)), axis=0, dtype=jnp.uint32)
        return jnp.sum(lax.optimization_barrier(columns), dtype=jnp.uint32)

    # matrix by matrix: the hashes of a whole stack would be larger than the model
    numbers = first_matrix + jnp.arange(matrices.shape[0], dtype=jnp.uint32)
    return jnp.sum(lax.map(one, (numbers, matrices)), dtype=jnp.uint32)


def _words(x: jax.Array) -> jax.Array:
    """The bits of floats or integers as uint32; 64-bit ones get an axis of two words."""
    if x.dtype.itemsize < 4:
        bits = {1: jnp.uint8, 2: jnp.uint16}[x.dtype.itemsize]
        return lax.bitcast_convert_type(x, bits).astype(jnp.uint32)
    return lax.bitcast_convert_type(x, jnp.uint32)


def mixed(x: jax.Array) -> jax.Array:
    """A permutation of the 32-bit words in which every bit depends on every one (MurmurHash3's finaliser)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
