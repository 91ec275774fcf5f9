"""Stacks of 16-bit arrays that XLA's CPU backend does not turn into float32.

A CPU has no 16-bit float arithmetic but in products, so XLA's CPU backend rewrites every other operation on
bfloat16 to float32. For slices of a stack inside a loop that means a float32 copy of the whole stack, made
outside the loop, and for a scatter a float32 copy of its operand: twice the memory, and time. Integers are
left alone; so there, and only there, such stacks are held and go through loops as the integers of the same
bits.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name

_BITS = jnp.uint16


def runs_on_cpu() -> bool:
    """Whether the devices of the mesh in force, which may not be here, or else the default ones are CPUs."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return (jax.default_backend() if device is None else device.platform) == "cpu"


def _as_bits(dtype: Any) -> bool:
    return dtype in (jnp.bfloat16, jnp.float16) and runs_on_cpu()


def pack(x: jax.Array) -> jax.Array:
    """The bits of a 16-bit array, as integers, where that helps. Not differentiable there."""
    return lax.bitcast_convert_type(x, _BITS) if _as_bits(x.dtype) else x


def unpack(x: jax.Array, dtype: Any) -> jax.Array:
    """The inverse of ``pack``."""
    return x if x.dtype == dtype else lax.bitcast_convert_type(x, dtype)


def packed_dtype(dtype: Any) -> Any:
    """The dtype of what ``pack`` makes of an array of ``dtype``."""
    return jnp.dtype(_BITS) if _as_bits(dtype) else jnp.dtype(dtype)


def stored_like(x: jax.Array, weight: jax.Array) -> jax.Array:
    """``x`` as an array of its dtype is held in ``weight``: packed if that is."""
    return lax.bitcast_convert_type(x, _BITS) if weight.dtype == _BITS else x


@jax.custom_vjp
def take_rows(table: jax.Array, rows: jax.Array) -> jax.Array:
    """Rows of a table [V, D], [..., D] of integers [...]; NaN for a row that is not there.

    Args:
        table: Not packed; read by its bits where XLA would make all of it float32.
        rows: Integers.
    """
    if not _as_bits(table.dtype):
        return jnp.take(table, rows, axis=0, mode="fill")
    missing = np.full(1, np.nan, table.dtype).view(_BITS)[0]
    return unpack(jnp.take(pack(table), rows, axis=0, mode="fill", fill_value=missing), table.dtype)


def _take_rows_forward(table: jax.Array, rows: jax.Array):
    return take_rows(table, rows), (table, rows)


def _take_rows_backward(residuals: tuple[jax.Array, jax.Array], dy: jax.Array):
    table, rows = residuals
    _, pull = jax.vjp(lambda table: jnp.take(table, rows, axis=0, mode="fill"), table)
    return *pull(dy), None


take_rows.defvjp(_take_rows_forward, _take_rows_backward)


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
