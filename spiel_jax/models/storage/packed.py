"""Stacks of 16-bit arrays that XLA's CPU backend does not turn into float32.

A CPU has no 16-bit float arithmetic but in products, so XLA's CPU backend rewrites every other operation on
bfloat16 to float32. For slices of a stack inside a loop that means a float32 copy of the whole stack, made
outside the loop, and for a scatter a float32 copy of its operand: twice the memory, and time. Integers are
left alone; so there, and only there, such stacks are held and go through loops as the integers of the same
bits.
"""

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from spiel_jax.models.storage.weight import Weight, hold
from spiel_jax.ops.stored import Place

_BITS = jnp.uint16
_DTYPES = (jnp.bfloat16, jnp.float16)


def runs_on_cpu() -> bool:
    """Whether the devices of the current mesh, which may not be here, or else the default ones are CPUs."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return (jax.default_backend() if device is None else device.platform) == "cpu"


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Packed(Weight):
    """The integers of the bits of a 16-bit float array.

    Attributes:
        bits: uint16, shaped like the weight.
        dtype: Static. Of the weight.
    """

    writable: ClassVar[bool] = True

    bits: jax.Array
    dtype: Any = field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """See ``Weight``."""
        return self.bits.shape

    @classmethod
    def hold(cls, array: jax.Array) -> "Packed":
        """See ``Weight``.

        Raises:
            ValueError: If the array is not bfloat16 or float16.
        """
        if array.dtype not in _DTYPES:
            raise ValueError(f"bits are held of bfloat16 and float16 weights, got {array.dtype}")
        return cls(lax.bitcast_convert_type(array, _BITS), array.dtype)

    def dequantize(self) -> jax.Array:
        """See ``Weight``; nothing is computed."""
        return lax.bitcast_convert_type(self.bits, self.dtype)

    def gather(self, place: Place) -> jax.Array:
        """See ``Weight``."""
        return replace(self, bits=self.bits.at[place].get(mode="fill", fill_value=0)).dequantize()

    def set_entries(self, place: Place, entries: jax.Array) -> "Packed":
        """See ``Weight``."""
        new = Packed.hold(entries.astype(self.dtype)).bits
        return replace(self, bits=self.bits.at[place].set(new, mode="drop", unique_indices=True))


def packed_kind(dtype: Any) -> type[Packed] | None:
    """``Packed`` where an array of this dtype is better held so, None where it is not."""
    return Packed if dtype in _DTYPES and runs_on_cpu() else None


def packed(x: jax.Array) -> jax.Array | Packed:
    """An array as it is best held in a loop. Not differentiable where that is by its bits."""
    return hold(x, packed_kind(x.dtype))


@jax.custom_vjp
def take_rows(table: jax.Array, rows: jax.Array) -> jax.Array:
    """Rows of a table [V, D], [..., D] of integers [...]; NaN for a row that is not there.

    Args:
        table: Read by its bits where XLA would make all of it float32.
        rows: Integers.
    """
    if packed_kind(table.dtype) is None:
        return jnp.take(table, rows, axis=0, mode="fill")
    missing = np.full(1, np.nan, table.dtype).view(_BITS)[0]
    bits = jnp.take(Packed.hold(table).bits, rows, axis=0, mode="fill", fill_value=missing)
    return Packed(bits, table.dtype).dequantize()


def _take_rows_forward(table: jax.Array, rows: jax.Array):
    return take_rows(table, rows), (table, rows)


def _take_rows_backward(residuals: tuple[jax.Array, jax.Array], dy: jax.Array):
    table, rows = residuals
    _, pull = jax.vjp(lambda table: jnp.take(table, rows, axis=0, mode="fill"), table)
    return *pull(dy), None


take_rows.defvjp(_take_rows_forward, _take_rows_backward)


def loop_dtype(dtype: Any) -> Any:
    """In what a differentiated loop carries values: float32 where their stack would become that anyway."""
    return dtype if packed_kind(dtype) is None else jnp.float32


def named(x: jax.Array, name: str) -> jax.Array:
    """``x`` under a name for ``jax.checkpoint`` policies; what they store are its bits where that helps."""
    if packed_kind(x.dtype) is None:
        return checkpoint_name(x, name)

    def primal(x: jax.Array) -> jax.Array:
        bits = checkpoint_name(Packed.hold(x).bits, name)
        return Packed(bits, x.dtype).dequantize()

    store = jax.custom_vjp(primal)
    store.defvjp(lambda x: (primal(x), None), lambda _, dy: (dy,))
    return store(x)
