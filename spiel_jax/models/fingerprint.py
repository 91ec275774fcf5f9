"""A digest of the base weights, so that deltas are never put on top of another model's."""

import zlib
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from spiel_jax.models.decoder import LAYERS


def fingerprint(params: Mapping[str, jax.Array]) -> dict[str, str]:
    """Dtype, shape and CRC-32 of the contents of every parameter.

    Stacked parameters are copied to the host one layer at a time. A checksum, not a cryptographic
    hash: it tells models apart, it does not prove who made them.

    Args:
        params: The model's parameters, all of them addressable by this process.

    Returns:
        Parameter name to, for example, ``"bfloat16[30,576,576]:1c291ca3"``; sorted by name and
        equal however the arrays are sharded.
    """
    return {name: _digest(name, params[name]) for name in sorted(params)}


def differing(one: Mapping[str, str], other: Mapping[str, str]) -> list[str]:
    """The names whose digests differ or that only one of two fingerprints has, sorted."""
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))


def _digest(name: str, array: jax.Array) -> str:
    stacked = name.startswith(LAYERS)
    crc = 0
    for layer in range(array.shape[0] if stacked else 1):
        # a copy: reading an array itself would leave its host copy attached to it
        part = array[layer] if stacked else jnp.copy(array)
        crc = zlib.crc32(np.ascontiguousarray(part).reshape(-1).view(np.uint8).data, crc)
    return f"{array.dtype}[{','.join(map(str, array.shape))}]:{crc:08x}"
