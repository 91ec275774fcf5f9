"""Products against float64 NumPy, gradients against those of a plain matrix product."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.programs import AS_USERS

from spiel_jax.ops.matmul import dot, input_gradient, linear, weight_gradient


def normal(*shape, dtype=jnp.float32, seed=0):
    return jnp.array(np.random.default_rng(seed).normal(size=shape), dtype)


def exact(array) -> np.ndarray:
    return np.asarray(array.astype(jnp.float32) if array.dtype == jnp.bfloat16 else array, np.float64)


def test_linear_by_hand():
    x = jnp.array([[1.0, 2.0]])
    weight = jnp.array([[3.0, 4.0], [5.0, 6.0], [0.0, -1.0]])  # (out, in)
    np.testing.assert_array_equal(linear(x, weight), [[11.0, 17.0, -2.0]])


def test_dot_contracts_the_axes_it_is_told():
    a, b = normal(2, 3, 4), normal(5, 3, seed=1)
    np.testing.assert_allclose(dot(a, b, (1, -1)), np.einsum("xiy,oi->xyo", a, b), rtol=1e-6)
    assert dot(a.astype(jnp.bfloat16), b.astype(jnp.bfloat16), (1, 1)).dtype == jnp.float32


@pytest.mark.parametrize("lead", [(), (3,), (2, 3)])
def test_gradients_equal_those_of_a_plain_product(lead):
    x, weight, dy = normal(*lead, 6), normal(4, 6, seed=1), normal(*lead, 4, seed=2)
    y, pull = jax.vjp(linear, x, weight)
    expected, plain_pull = jax.vjp(lambda x, weight: x @ weight.T, x, weight)
    np.testing.assert_allclose(y, expected, rtol=1e-6, atol=1e-6)
    for found, wanted in zip(pull(dy), plain_pull(dy), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-6)


def test_bfloat16_products_are_rounded_once():
    x, weight, dy = (
        normal(64, 512, dtype=jnp.bfloat16),
        normal(32, 512, dtype=jnp.bfloat16, seed=1),
        normal(64, 32, dtype=jnp.bfloat16, seed=2),
    )
    y, pull = jax.vjp(linear, x, weight)
    dx, dw = pull(dy)
    for found, wanted in [
        (y, exact(x) @ exact(weight).T),
        (dx, exact(dy) @ exact(weight)),
        (dw, exact(dy).T @ exact(x)),
    ]:
        assert found.dtype == jnp.bfloat16
        # half a unit in the last of 8 places, and what float32 sums lose near 0
        np.testing.assert_allclose(exact(found), wanted, rtol=2**-8, atol=1e-4)


def test_partial_sums_are_kept_in_float32():
    # in bfloat16 256 + 1 is 256: a sum of ones would stop there
    x, weight = jnp.ones((1, 1024), jnp.bfloat16), jnp.ones((1, 1024), jnp.bfloat16)
    assert float(linear(x, weight)[0, 0]) == 1024
    tokens, dy = jnp.ones((1000, 1), jnp.bfloat16), jnp.ones((1000, 1), jnp.bfloat16)
    assert float(weight_gradient(tokens, dy)[0, 0]) == 1000


def test_weight_gradient_is_float32_and_not_rounded():
    x, dy = normal(2, 50, 16, dtype=jnp.bfloat16), normal(2, 50, 8, dtype=jnp.bfloat16, seed=1)
    gradient = weight_gradient(x, dy)
    assert gradient.dtype == jnp.float32
    wanted = exact(dy).reshape(-1, 8).T @ exact(x).reshape(-1, 16)
    np.testing.assert_allclose(gradient, wanted, rtol=1e-5, atol=1e-5)
    assert np.mean(exact(gradient) != exact(gradient.astype(jnp.bfloat16))) > 0.9


def test_float32_activations_on_bfloat16_weights():
    x, weight, dy = normal(3, 6), normal(4, 6, dtype=jnp.bfloat16, seed=1), normal(3, 4, seed=2)
    y, pull = jax.vjp(linear, x, weight)
    dx, dw = pull(dy)
    assert (y.dtype, dx.dtype, dw.dtype) == (jnp.float32, jnp.float32, jnp.bfloat16)
    low, dy_low = exact(x.astype(jnp.bfloat16)), exact(dy.astype(jnp.bfloat16))
    np.testing.assert_allclose(y, low @ exact(weight).T, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(dx, dy_low @ exact(weight), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(input_gradient(dy, weight), dx)


def test_float64_stays_float64():
    with jax.enable_x64(True):
        x, weight = normal(3, 6, dtype=jnp.float64), normal(4, 6, dtype=jnp.float64, seed=1)
        y, pull = jax.vjp(linear, x, weight)
        assert {a.dtype for a in (y, *pull(y))} == {jnp.dtype(jnp.float64)}
        np.testing.assert_allclose(y, exact(x) @ exact(weight).T, rtol=1e-14)


def test_no_float32_copy_of_bfloat16_operands_in_the_backward_pass():
    # autodiff of a product with a float32 result would multiply a float32 cotangent with the weight
    x, weight = normal(3, 6, dtype=jnp.bfloat16), normal(4, 6, dtype=jnp.bfloat16)
    backward = jax.make_jaxpr(lambda x, w, dy: jax.vjp(linear, x, w)[1](dy))(
        x, weight, jnp.ones((3, 4), x.dtype)
    )
    operands = {v.aval.dtype for e in backward.eqns if e.primitive.name == "dot_general" for v in e.invars}
    assert operands == {jnp.dtype(jnp.bfloat16)}


def test_16_bit_weight_gradients_take_16_bit_operands():
    # what XLA cannot do in 16 bits it does on float32 copies of the operands
    shapes = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((256, 64), (256, 48)))
    text = jax.jit(weight_gradient).lower(*shapes).compile(AS_USERS).as_text()
    assert "f32[48,64]" in text
    assert "f32[48,256]" not in text
    assert "f32[256,64]" not in text
