"""Eight bits a weight, one scale per output channel, with the codes and the scales of LLM.int8()."""

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from spiel_jax.models.storage.rounding import reciprocal, rounded, sealed
from spiel_jax.models.storage.weight import Weight, as_it_lies, register

_STEP = np.float32(1 / 127)


@register("int8")
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Int8(Weight):
    """Integers, and the largest magnitude of each row (arXiv 2208.07339).

    Attributes:
        codes: int8 [*stack, out, in]; 127 stands for the largest magnitude.
        absmax: float32 [*stack, out, 1].
        dtype: Static. Of the weight.
    """

    codes: jax.Array
    absmax: jax.Array
    dtype: Any = field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """See ``Weight``."""
        return self.codes.shape

    @classmethod
    def hold(cls, array: jax.Array) -> "Int8":
        """See ``Weight``."""
        absmax = jnp.max(jnp.abs(array.astype(jnp.float32)), axis=-1, keepdims=True)
        # or a float32 copy of the whole array serves this and what follows
        array, absmax = lax.optimization_barrier((array, absmax))
        scale = sealed(reciprocal(absmax)) * 127  # rounded twice
        return cls(jnp.round(array.astype(jnp.float32) * scale).astype(jnp.int8), absmax, array.dtype)

    def dequantize(self) -> jax.Array:
        """See ``Weight``: two products in float32, rounded to the dtype."""
        product = sealed(as_it_lies(self.codes).astype(jnp.float32) * self.absmax) * _STEP
        return rounded(sealed(product), self.dtype).astype(self.dtype)
