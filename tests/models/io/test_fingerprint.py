import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from spiel_jax.models.decoder import EMBEDDING
from spiel_jax.models.io.fingerprint import differing, fingerprint
from spiel_jax.models.storage import Packed

STACK = "model.layers.mlp.up_proj.weight"
NORM = "model.norm.weight"
MASK = 0xFFFFFFFF


def mixed(word):
    """MurmurHash3's finaliser of a 32-bit word."""
    word = (word ^ (word >> 16)) * 0x85EBCA6B & MASK
    word = (word ^ (word >> 13)) * 0xC2B2AE35 & MASK
    return word ^ (word >> 16)


def digest(array):
    """The digest by its definition, entry by entry: [layers, rows, columns], axes of 1 in front."""
    words = array.view({2: np.uint16, 4: np.uint32}[array.itemsize])
    words = words.reshape((1,) * (3 - words.ndim) + words.shape)
    total = 0
    for (layer, row, column), word in np.ndenumerate(words):
        place = layer * 0x9E3779B1 + row * 0x85EBCA77 + column * 0xC2B2AE3D & MASK
        total += mixed(int(word) ^ mixed(place))
    return f"{total & MASK:08x}"


def swapped(x, one, other):
    return x.at[one].set(x[other]).at[other].set(x[one])


@pytest.fixture
def params():
    values = np.arange(2 * 4 * 8, dtype=np.float32).reshape(2, 4, 8)
    return {
        STACK: jnp.array(values, jnp.bfloat16),
        NORM: jnp.ones(4),
        EMBEDDING: jnp.ones((3, 8), jnp.bfloat16),
    }


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float32])
@pytest.mark.parametrize("shape", [(5,), (3, 7), (3, 4, 8)])
def test_value_is_that_of_the_formula(shape, dtype):
    values = np.random.default_rng(0).normal(size=shape).astype(dtype)
    name = f"{np.dtype(dtype)}[{','.join(map(str, shape))}]"
    assert fingerprint({NORM: jnp.array(values)}) == {NORM: f"{name}:{digest(values)}"}


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.at[1, 3, 7].add(1),
        lambda x: swapped(x, (0, 1, 2), (0, 1, 3)),
        lambda x: swapped(x, (0, 1, 2), (0, 2, 2)),
        lambda x: swapped(x, (0, 1, 2), (1, 1, 2)),
        lambda x: swapped(x, (0, 1, 2), (1, 3, 5)),
        lambda x: x[::-1],
        lambda x: x[:, ::-1],
        lambda x: x.astype(jnp.float32),
        lambda x: x.reshape(2, 8, 4),
    ],
    ids=[
        "one entry",
        "entries of a row swapped",
        "entries of a column swapped",
        "entries of layers swapped",
        "entries swapped",
        "layers swapped",
        "rows swapped",
        "dtype",
        "shape",
    ],
)
def test_what_changes_a_parameter_changes_its_digest_only(params, change):
    changed = params | {STACK: change(params[STACK])}
    assert differing(fingerprint(params), fingerprint(changed)) == [STACK]


def test_every_entry_and_every_bit_counts(params):
    stack = np.asarray(params[STACK]).view(np.uint16)
    found = {digest(stack)}
    for index in np.ndindex(stack.shape):
        for bit in range(16):
            changed = stack.copy()
            changed[index] ^= 1 << bit
            (value,) = fingerprint({STACK: changed.view(ml_dtypes.bfloat16)}).values()
            found.add(value.partition(":")[2])
    assert len(found) == 1 + 16 * stack.size


def test_names_on_one_side_only_differ(params):
    whole = fingerprint(params)
    assert differing(whole, whole) == []
    one = {name: whole[name] for name in whole if name != NORM}
    assert differing(whole, one) == [NORM]
    assert differing(one, whole) == [NORM]


def spread(x, kind, spec):
    mesh = jax.make_mesh((2, 4), ("fsdp", "tensor"), axis_types=(kind, kind))
    return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize(
    "spec", [(), (None, "fsdp", "tensor"), (None, "tensor"), (None, None, ("tensor", "fsdp"))]
)
def test_sharding_does_not_matter(params, spec, kind):
    sharded = spread(params[STACK], kind, spec)
    assert len(sharded.sharding.device_set) == 8
    assert fingerprint(params | {STACK: sharded}) == fingerprint(params)


def test_packing_does_not_matter(params):
    packed = Packed.hold(params[STACK])
    assert packed.bits.dtype == jnp.uint16
    assert fingerprint(params | {STACK: packed}) == fingerprint(params)
    sharded = spread(packed, AxisType.Auto, (None, "fsdp", "tensor"))
    assert fingerprint(params | {STACK: sharded}) == fingerprint(params)
