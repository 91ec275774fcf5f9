"""Float32 arithmetic that comes to the same bits in every program.

XLA and what is behind it may change roundings: a product and the sum after it become one instruction that
rounds once, and a value that is narrowed and then widened again is not narrowed. Which of that happens
depends on what else is in the program. A stored weight has to be one array, whatever it is used in.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

_LOWEST = np.finfo(np.float32).min
_SMALLEST_NORMAL = 2.0**-14
_HALF_STEPS = 2.0**24  # of the subnormal numbers of float16, in 1


def sealed(x: jax.Array) -> jax.Array:
    """Finite float32 as they are, rounded before anything else is done with them.

    No compiler knows that they are finite, so that this is no part of a sum.
    """
    return jnp.maximum(x, _LOWEST)


def rounded(x: jax.Array, dtype: Any) -> jax.Array:
    """Float32 to the nearest number of a dtype, still float32: converting it changes nothing.

    Args:
        x: float32.
        dtype: float32, bfloat16 or float16.
    """
    dtype = jnp.dtype(dtype)
    if dtype == jnp.float32:
        return x
    info = jnp.finfo(dtype)
    normal = lax.reduce_precision(x, exponent_bits=info.nexp, mantissa_bits=info.nmant)
    if dtype != jnp.float16:
        return normal
    small = lax.round(x * _HALF_STEPS, lax.RoundingMethod.TO_NEAREST_EVEN) / _HALF_STEPS
    return jnp.where(jnp.abs(x) < _SMALLEST_NORMAL, small, normal)


def reciprocal(x: jax.Array) -> jax.Array:
    """1 / x; 1 where x is zero, or so small that hardware may take it for zero."""
    return 1 / jnp.where(x >= np.finfo(np.float32).tiny, x, 1)


def total(x: jax.Array) -> jax.Array:
    """Sum of a vector in an order that is written down: XLA chooses another one for each device and mesh."""
    x = jnp.pad(x, (0, 2 ** (x.size - 1).bit_length() - x.size))
    while x.size > 1:
        x = x[: x.size // 2] + x[x.size // 2 :]
    return x[0]
