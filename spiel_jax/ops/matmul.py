"""Matrix products that keep float32 accumulators, forward and backward.

A bfloat16 product that asks for a float32 result runs at the hardware's full rate on GPUs, TPUs and on
CPUs with bfloat16 units, and does not round partial sums. Plain autodiff would feed the float32 cotangent
of such a product back into mixed-dtype products; the rules here cast it to the operand's dtype first.

A stored weight is dequantised for each product, and the backward pass finds it as it is held: of the
arrays that a model's weights stand for, no more is in memory than is being multiplied.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint

from spiel_jax.ops.stored import Stored, as_array, is_stored


def dot(a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
    """Product of ``a`` and ``b`` over one axis of each, accumulated and returned in float32.

    Args:
        a: Array of any rank.
        b: Array of any rank and of the dtype of ``a``.
        contract: The axis of ``a`` and the axis of ``b`` that are summed over.

    Returns:
        The remaining axes of ``a``, then those of ``b``; float32 (float64 for float64 operands).
    """
    dtype = jnp.promote_types(a.dtype, jnp.float32)
    dims = (((contract[0] % a.ndim,), (contract[1] % b.ndim,)), ((), ()))
    return lax.dot_general(a, b, dims, preferred_element_type=dtype)


def weight_gradient(x: jax.Array, dy: jax.Array) -> jax.Array:
    """Gradient of ``x @ weight.T`` with respect to ``weight``, in float32 and never rounded.

    With the arguments exchanged it gives the transposed gradient.

    Args:
        x: Input of the linear, [..., in].
        dy: Cotangent of its output, [..., out].

    Returns:
        [out, in], float32 (float64 for float64 operands).
    """
    x = x.reshape(-1, x.shape[-1])  # [T, in]
    dy = dy.reshape(-1, dy.shape[-1]).astype(x.dtype)  # [T, out]
    turned = lax.platform_dependent(dy, cpu=_turned, default=jnp.transpose)
    return dot(turned, x, (1, 0))


def _turned(dy: jax.Array) -> jax.Array:
    # A CPU has fast 16-bit products only over the last axis, in memory, of the left operand, and is faster so
    # in float32 too. Without the layout XLA transposes by declaring another one, even behind a barrier, and
    # then converts both operands to float32: 2.2 times slower.
    return with_layout_constraint(dy.T, Layout(major_to_minor=(0, 1)))


def input_gradient(dy: jax.Array, weight: jax.Array) -> jax.Array:
    """Gradient of ``x @ weight.T`` with respect to ``x``: [..., out] and [out, in] give [..., in]."""
    return dot(dy.astype(weight.dtype), weight, (-1, 0)).astype(dy.dtype)


@jax.custom_vjp
def linear(x: jax.Array, weight: jax.Array | Stored) -> jax.Array:
    """``x @ weight.T`` with float32 accumulation, cast to the dtype of ``x``.

    Args:
        x: [..., in].
        weight: [out, in], Hugging Face orientation. A stored one has no gradient.

    Returns:
        [..., out], dtype of ``x``.
    """
    matrix = as_array(weight)
    return dot(x.astype(matrix.dtype), matrix, (-1, 1)).astype(x.dtype)


def _linear_forward(x: jax.Array, weight: jax.Array | Stored) -> tuple[jax.Array, tuple]:
    return linear(x, weight), (x, weight)


def _linear_backward(residuals: tuple, dy: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    x, weight = residuals
    if is_stored(weight):
        return input_gradient(dy, as_array(weight)), None
    gradient = weight_gradient(x.astype(weight.dtype), dy)
    return input_gradient(dy, weight), gradient.astype(weight.dtype)


linear.defvjp(_linear_forward, _linear_backward)
