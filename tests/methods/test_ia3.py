import jax
import jax.numpy as jnp
import numpy as np
import pytest
from peft import IA3Config, get_peft_model
from support.adapter_cases import Place, check_against_peft, twins

from spiel_jax.config import LINEAR_LAYERS
from spiel_jax.methods.ia3 import IA3, ScaledLinear, scaled
from spiel_jax.models import layer_names


@pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"
)  # PEFT's own use
def test_equals_peft():
    """With biases of keys and values, which are scaled too."""
    model, config, params = twins()
    kind = IA3.matching(config, LINEAR_LAYERS)
    assert {name.split(".")[-2] for name in kind.targets} == {"k_proj", "v_proj", "down_proj"}
    settings = IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"])
    model = get_peft_model(model, settings)
    tensors = dict(model.named_parameters())

    def place(name):
        names = [one.removesuffix(".weight") for one in layer_names(name, config.num_layers)]
        return Place([tensors[f"base_model.model.{one}.ia3_l.default"] for one in names])

    check_against_peft(model, config, params, kind, {name: place(name) for name in kind.targets})


def test_initial_factors_are_ones():
    config = twins()[1]
    trainable = IA3.matching(config, LINEAR_LAYERS).init(jax.random.key(0))
    assert {name.split(".")[-2]: array.shape for name, array in trainable.items()} == {
        "k_proj": (3, 8),
        "v_proj": (3, 8),
        "down_proj": (3, 24),
    }
    assert all(array.dtype == jnp.float32 and (array == 1).all() for array in trainable.values())


def test_other_weights_are_not_for_it():
    config = twins()[1]
    with pytest.raises(ValueError, match=r"matches no weight; near names: .*\.k_proj"):
        IA3.matching(config, (r".*\.q_proj\.weight",))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_gradients_of_scaling(dtype):
    keys = jax.random.split(jax.random.key(0), 3)
    x, dy = (jax.random.normal(key, (4, 64, 24)).astype(dtype) for key in keys[:2])
    factors = 1 + 0.1 * jax.random.normal(keys[2], (24,))
    y, gradient = jax.vjp(scaled, x, factors)
    dx, dfactors = gradient(dy)
    assert y.dtype == dx.dtype == dtype
    assert dfactors.dtype == jnp.float32
    wide_x, wide_dy = x.astype(jnp.float32), dy.astype(jnp.float32)
    np.testing.assert_array_equal(y, (wide_x * factors[None, None]).astype(dtype))
    np.testing.assert_array_equal(dx, (wide_dy * factors[None, None]).astype(dtype))
    np.testing.assert_allclose(dfactors, (wide_x * wide_dy).sum((0, 1)), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("inputs", [False, True])
def test_the_weight_is_frozen(inputs):
    keys = jax.random.split(jax.random.key(0), 3)
    x, weight = jax.random.normal(keys[0], (2, 5, 7)), jax.random.normal(keys[1], (9, 7))
    factors = jax.random.normal(keys[2], (7 if inputs else 9,))

    def loss(adapter, weight):
        return jnp.sum(jnp.square(adapter(x, weight)))

    def explicit(factors, weight):
        matrix = weight * (factors[None, :] if inputs else factors[:, None])
        return jnp.sum(jnp.square(x @ matrix.T))

    ours, frozen = jax.grad(loss, (0, 1))(ScaledLinear(factors, inputs), weight)
    np.testing.assert_allclose(ours.factors, jax.grad(explicit)(factors, weight), rtol=2e-5)
    assert not frozen.any()
