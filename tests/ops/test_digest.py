"""Digests tell arrays apart by every bit, and do not depend on where the arrays are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from spiel_jax.distributed.mesh import make_mesh
from spiel_jax.ops.digest import digest

DTYPES = ("float32", "bfloat16", "float16", "int32", "int8", "uint8", "uint32", "bool")


def of(array):
    return int(jax.jit(digest)(array))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (5,), (3, 4), (2, 3, 4), (2, 3, 2, 2)])
def test_every_flipped_bit_is_seen(dtype, shape):
    rng = np.random.default_rng(0)
    array = np.asarray(jnp.asarray(rng.integers(0, 2, shape), dtype))
    expected = of(array)
    words = np.frombuffer(array.tobytes(), np.uint8)
    for bit in rng.permutation(8 * words.size)[:16] if dtype != "bool" else range(0, 8 * words.size, 8):
        flipped = words.copy()
        flipped[bit // 8] ^= 1 << (bit % 8)
        assert of(np.frombuffer(flipped.tobytes(), array.dtype).reshape(shape)) != expected, bit


def test_two_places_exchanged_are_seen():
    array = jnp.arange(12.0).reshape(3, 4)
    assert of(array) != of(array[::-1])
    assert of(array) != of(array.at[0, 0].set(1).at[0, 1].set(0))


def test_how_it_is_spread_does_not_matter():
    array = jnp.arange(64.0).reshape(2, 4, 8)
    mesh = make_mesh({"data": 1, "fsdp": 4, "tensor": 2})
    spread = jax.device_put(array, NamedSharding(mesh, PartitionSpec(None, "fsdp", "tensor")))
    assert of(spread) == of(array)
