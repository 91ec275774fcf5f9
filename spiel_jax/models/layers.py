"""The layers a decoder is made of. Constructors only declare shapes; ``bind`` gives them values.

Every weight may carry leading axes (``stack``), so that one module describes a whole stack of
layers; its ``__call__`` is meant for one layer's slice.
"""

from typing import Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from spiel_jax.models.storage.packed import named, take_rows
from spiel_jax.ops.matmul import linear
from spiel_jax.ops.sharded import constrain
from spiel_jax.ops.stored import Stored

PROJECTION = "projection"
"""Name under which ``jax.checkpoint`` policies find the outputs of the linears."""


class AdaptedLinear(Protocol):
    """What takes the place of a plain product in an adapted linear; a pytree."""

    def __call__(self, x: jax.Array, weight: jax.Array | Stored) -> jax.Array:
        """The adapted product: [..., in] and [out, in] give [..., out], without the bias.

        The weight comes as it is held: ``ops.stored.as_array`` gives the array, ``ops.matmul.linear`` a
        product.
        """
        ...


Adapter = AdaptedLinear
"""Earlier name of ``AdaptedLinear``."""


def _declare(shape: tuple[int, ...], dtype: DTypeLike) -> nnx.Param:
    return nnx.Param(jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)))


def _over_rows(vector: jax.Array, like: jax.Array) -> jax.Array:
    """A vector [D] in the rank of ``like`` [..., D]: rank promotion may be an error."""
    return jax.lax.expand_dims(vector, range(like.ndim - 1))


class Linear(nnx.Module):
    """``x @ weight.T + bias`` with the weight in Hugging Face orientation, [*stack, out, in]."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = False,
        stack: tuple[int, ...] = (),
        dtype: DTypeLike = jnp.float32,
    ):
        self.weight = _declare((*stack, out_features, in_features), dtype)
        self.bias = _declare((*stack, out_features), dtype) if bias else None

    def __call__(self, x: jax.Array, adapter: AdaptedLinear | None = None) -> jax.Array:
        """Apply to [..., in]; an adapter replaces the product, the bias is added afterwards."""
        weight = self.weight.get_value()
        y = linear(x, weight) if adapter is None else adapter(x, weight)
        if self.bias is not None:
            y = y + _over_rows(self.bias[...].astype(y.dtype), y)
        return named(y, PROJECTION)


class Embedding(nnx.Module):
    """Rows of a table [V, D] by token id."""

    def __init__(self, size: int, features: int, *, dtype: DTypeLike = jnp.float32):
        self.weight = _declare((size, features), dtype)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """[...] integers give [..., D]; an id beyond the vocabulary gives NaN, not another row."""
        table = constrain(self.weight[...], "tensor", None)
        return take_rows(table, tokens)


class RMSNorm(nnx.Module):
    """Root-mean-square normalisation over the last axis, computed in float32 (arXiv 1910.07467)."""

    def __init__(
        self,
        features: int,
        *,
        eps: float,
        stack: tuple[int, ...] = (),
        dtype: DTypeLike = jnp.float32,
    ):
        self.weight = _declare((*stack, features), dtype)
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalise [..., D]; cast before the weight is applied, as Hugging Face does."""
        wide = x.astype(jnp.float32)
        mean_square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
        normal = (wide * jax.lax.rsqrt(mean_square + self.eps)).astype(x.dtype)
        return _over_rows(self.weight[...].astype(x.dtype), x) * normal
