"""A digest of the base weights, so that deltas are never put on top of another model's."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from spiel_jax.models.storage.packed import packed
from spiel_jax.ops.stored import is_stored


def fingerprint(params: Mapping[str, Any]) -> dict[str, str]:
    """Dtype, shape and a 32-bit digest of the contents of every parameter.

    The digest is a sum of hashes of the entries' bits and positions, formed where the parameters are: it
    does not depend on how they are spread over devices and processes. Of a stored weight it is the digest of
    the arrays that hold it, which are the same on any hardware; held by their bits, 16-bit floats have the
    digest that they have as an array. Not a cryptographic hash: it tells models apart, it does not prove
    who made them.

    Args:
        params: The model's parameters, arrays and stored weights.

    Returns:
        Parameter name to, for example, ``"bfloat16[30,576,576]:1c291ca3"``; sorted by name.
    """
    found = {}
    for name in sorted(params):
        digest = _digest(params[name])
        shape = ",".join(map(str, params[name].shape))
        found[name] = f"{params[name].dtype}[{shape}]:{int(np.asarray(digest)):08x}"
    return found


def differing(one: Mapping[str, str], other: Mapping[str, str]) -> list[str]:
    """The names whose digests differ or that only one of two fingerprints has, sorted."""
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))


@jax.jit
def _digest(weight: Any) -> jax.Array:
    """[] uint32, of an array or a stored weight."""
    leaves = jax.tree.leaves(weight if is_stored(weight) else packed(weight))
    first, *others = (_of_array(leaf) for leaf in leaves)
    return sum((_mixed(other + jnp.uint32(i)) for i, other in enumerate(others)), start=first)


def _of_array(array: jax.Array) -> jax.Array:
    """[] uint32."""
    matrices = (
        array.reshape(-1, *array.shape[-2:]) if array.ndim > 2 else array.reshape(1, -1, array.shape[-1])
    )

    def one(item: tuple[jax.Array, jax.Array]) -> jax.Array:
        number, matrix = item
        words = _words(matrix)
        place = number * jnp.uint32(0x9E3779B1)
        for axis, factor in enumerate((0x85EBCA77, 0xC2B2AE3D, 0x27D4EB2F)[: words.ndim]):
            place = place + lax.broadcasted_iota(jnp.uint32, words.shape, axis) * jnp.uint32(factor)
        rows = jnp.sum(_mixed(words ^ _mixed(place)), axis=-1, dtype=jnp.uint32)
        return jnp.sum(lax.optimization_barrier(rows), dtype=jnp.uint32)

    # matrix by matrix: the hashes of a whole stack would be larger than the model
    return jnp.sum(
        lax.map(one, (jnp.arange(matrices.shape[0], dtype=jnp.uint32), matrices)), dtype=jnp.uint32
    )


def _words(x: jax.Array) -> jax.Array:
    """The bits of floats or integers as uint32; 64-bit ones get an axis of two words."""
    if x.dtype.itemsize < 4:
        bits = {1: jnp.uint8, 2: jnp.uint16}[x.dtype.itemsize]
        return lax.bitcast_convert_type(x, bits).astype(jnp.uint32)
    return lax.bitcast_convert_type(x, jnp.uint32)


def _mixed(x: jax.Array) -> jax.Array:
    """A permutation of the 32-bit words in which every bit depends on every one (MurmurHash3's finaliser)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
