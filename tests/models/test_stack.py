import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from spiel_jax.models import stack
from spiel_jax.models.stack import Layers, by_layer, each_layer, scan
from spiel_jax.models.storage import NF4


def an_array(layers=3, dtype=jnp.float32):
    return jnp.arange(layers * 64 * 32, dtype=dtype).reshape(layers, 64, 32)


class TestByLayer:
    @pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
    def test_in_the_same_memory(self, dtype):
        whole = an_array(dtype=dtype)
        layers = by_layer(whole)
        assert layers.shape == whole.shape
        assert layers.dtype == whole.dtype
        for number, part in enumerate(layers.parts):
            np.testing.assert_array_equal(part, whole[number])
            away = part.unsafe_buffer_pointer() - whole.unsafe_buffer_pointer()
            assert away == number * part.nbytes

    def test_stored_weights(self):
        weight = jax.jit(NF4.hold)(jax.random.normal(jax.random.key(0), (3, 64, 64)))
        for number, part in enumerate(by_layer(weight).parts):
            np.testing.assert_array_equal(part.dequantize(), weight.dequantize()[number])

    def test_on_a_mesh(self):
        mesh = jax.make_mesh((2, 4), ("fsdp", "tensor"))
        sharding = NamedSharding(mesh, PartitionSpec(None, "tensor", "fsdp"))
        whole = jax.device_put(an_array(), sharding)
        for number, part in enumerate(by_layer(whole).parts):
            assert part.sharding.is_equivalent_to(NamedSharding(mesh, PartitionSpec("tensor", "fsdp")), 2)
            np.testing.assert_array_equal(part, np.asarray(whole)[number])

    def test_the_array_is_not_given_up_under_its_layers(self):
        whole = an_array()
        expected = np.array(whole)
        layers = by_layer(whole)
        more = jax.jit(lambda x: x + 1, donate_argnums=0)(whole)
        np.testing.assert_array_equal(layers.parts[1], expected[1])
        np.testing.assert_array_equal(more, expected + 1)

    def test_other_devices_slice(self, monkeypatch):
        monkeypatch.setattr(stack, "runs_on_cpu", lambda: False)
        whole = an_array()
        assert by_layer(whole) is whole


class TestLoops:
    def test_equal_those_over_an_array(self):
        def body(carry, inputs):
            x, number = inputs
            return carry + x.sum() * number, x * carry

        numbers = np.arange(3, dtype=np.int32)
        whole = an_array() / 1000
        carry, outputs = scan(body, jnp.float32(0), (whole, numbers))
        own_carry, parts = scan(body, jnp.float32(0), (by_layer(whole), numbers))
        assert isinstance(parts, Layers)
        np.testing.assert_allclose(own_carry, carry, rtol=1e-6)
        np.testing.assert_allclose(np.stack(parts.parts), outputs, rtol=1e-6)

    def test_each_layer(self):
        whole = an_array()
        found = each_layer(lambda x, y: x.T - y[0, 0], by_layer(whole), by_layer(2 * whole))
        expected = each_layer(lambda x, y: x.T - y[0, 0], whole, 2 * whole)
        assert isinstance(found, Layers)
        np.testing.assert_array_equal(np.stack(found.parts), expected)
