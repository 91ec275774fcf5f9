import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from spiel_jax.models.fingerprint import differing, fingerprint

STACK = "model.layers.mlp.up_proj.weight"


@pytest.fixture
def params():
    values = np.arange(2 * 4 * 8, dtype=np.float32).reshape(2, 4, 8)
    return {STACK: jnp.array(values, jnp.bfloat16), "model.norm.weight": jnp.ones(4)}


def test_value_is_stable(params):
    assert fingerprint(params) == {
        STACK: "bfloat16[2,4,8]:39942fa6",
        "model.norm.weight": "float32[4]:e8681456",
    }


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.at[1, 3, 7].add(1),
        lambda x: x[::-1],
        lambda x: x.astype(jnp.float32),
        lambda x: x.reshape(2, 8, 4),
    ],
    ids=["one entry", "layers swapped", "dtype", "shape"],
)
def test_what_changes_a_parameter_changes_its_digest_only(params, change):
    changed = params | {STACK: change(params[STACK])}
    assert differing(fingerprint(params), fingerprint(changed)) == [STACK]


def test_names_on_one_side_only_differ(params):
    whole = fingerprint(params)
    assert differing(whole, whole) == []
    assert differing(whole, {STACK: whole[STACK]}) == ["model.norm.weight"]
    assert differing({STACK: whole[STACK]}, whole) == ["model.norm.weight"]


def test_sharding_does_not_matter(params):
    mesh = jax.make_mesh((2, 4), ("fsdp", "tensor"))
    sharding = NamedSharding(mesh, PartitionSpec(None, "fsdp", "tensor"))
    sharded = params | {STACK: jax.device_put(params[STACK], sharding)}
    assert fingerprint(sharded) == fingerprint(params)
