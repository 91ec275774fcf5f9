"""Stacks of 16-bit arrays that XLA's CPU backend does not turn into float32.

A CPU has no 16-bit float arithmetic but in products, so XLA's CPU backend rewrites every other operation on
bfloat16 to float32. For slices of a stack inside a loop that means a float32 copy of the whole stack, made
outside the loop: twice the memory, and time. Integers are left alone; so there, and only there, such stacks
go through loops as the integers of the same bits.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name


def _as_bits(dtype: Any) -> bool:
    return jax.default_backend() == "cpu" and dtype in (jnp.bfloat16, jnp.float16)


def pack(x: jax.Array) -> jax.Array:
    """The bits of a 16-bit array, as integers, where that helps. Not differentiable there."""
    return lax.bitcast_convert_type(x, jnp.uint16) if _as_bits(x.dtype) else x


def unpack(x: jax.Array, dtype: Any) -> jax.Array:
    """The inverse of ``pack``."""
    return x if x.dtype == dtype else lax.bitcast_convert_type(x, dtype)


def loop_dtype(dtype: Any) -> Any:
    """In what a differentiated loop carries values: float32 where their stack would become that anyway."""
    return jnp.float32 if _as_bits(dtype) else dtype


def named(x: jax.Array, name: str) -> jax.Array:
    """``x`` under a name for ``jax.checkpoint`` policies; what they store are its bits where that helps."""
    if not _as_bits(x.dtype):
        return checkpoint_name(x, name)

    def primal(x: jax.Array) -> jax.Array:
        return unpack(checkpoint_name(pack(x), name), x.dtype)

    store = jax.custom_vjp(primal)
    store.defvjp(lambda x: (primal(x), None), lambda _, dy: (dy,))
    return store(x)
