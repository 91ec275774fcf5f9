"""Four bits a weight: NF4 and FP4, with the codes and the scales of bitsandbytes.

A matrix [out, in] is cut into blocks of 64 entries, row by row. A block has a scale, its largest magnitude
(``absmax``), and each entry a code: the nearest level of a table, of entry over scale. Scales are quantised
once more (QLoRA's double quantisation): their mean is taken off, and in blocks of 256 they are codes of a
map of 256 levels. That makes 4.127 bits a weight.

Where 64 does not divide a row, blocks run on into the next one, as in bitsandbytes, and the last may be
short; such a matrix cannot be cut into parts.
"""

import math
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from spiel_jax.errors import SpielError
from spiel_jax.models.storage import codebooks
from spiel_jax.models.storage.rounding import reciprocal, rounded, sealed, total
from spiel_jax.models.storage.weight import Weight, as_it_lies, register

BLOCK = 64
"""Entries that have a scale together."""

NESTED = 256
"""Scales that have a scale together."""


@dataclass(frozen=True)
class FourBit(Weight):
    """Codes of 4 bits and the scales of blocks of them.

    Attributes:
        codes: uint8 [*stack, out, in / 2]; the first of two codes is in the high bits. (A uint4 array takes a
            byte an entry on some backends.)
        absmax: Of the blocks: float32, or uint8 codes of what ``nested_absmax`` and ``offset`` make of them.
            [*stack, out, in / block]; where the block does not divide a row [*stack, blocks].
        nested_absmax: float32 [*stack, blocks / 256], or None.
        offset: float32 [*stack, 1], the mean of the scales, or None.
        dtype: Static. Of the weight.
        through: Static. Of the array that it was quantised from: what it stands for is rounded to that first.
        block: Static. Entries of a block.
        name: Static. Of the kind: to JAX's caches two dataclasses with equal static fields are one.
    """

    table: ClassVar[np.ndarray]
    """The level that each of the 16 codes stands for, as a share of the scale."""

    codes: jax.Array
    absmax: jax.Array
    nested_absmax: jax.Array | None
    offset: jax.Array | None
    dtype: Any = field(metadata={"static": True})
    through: Any = field(metadata={"static": True})
    block: int = field(default=BLOCK, metadata={"static": True})
    name: str = field(default="", metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """See ``Weight``."""
        return *self.codes.shape[:-1], 2 * self.codes.shape[-1]

    @classmethod
    def hold(cls, array: jax.Array) -> Self:
        """See ``Weight``.

        Raises:
            SpielError: If rows have an odd number of entries.
        """
        if array.shape[-1] % 2:
            raise SpielError(
                f"a weight of {list(array.shape[-2:])} cannot be held in 4 bits: expected rows of an even "
                "number of entries"
            )
        quantize = cls._quantized
        for _ in array.shape[:-2]:
            quantize = jax.vmap(quantize)
        codes, absmax = quantize(array)
        compress = _compressed
        for _ in array.shape[:-2]:
            compress = jax.vmap(compress)
        return cls(codes, *compress(absmax), array.dtype, array.dtype)

    def hold_alike(self, array: jax.Array) -> Self:
        """See ``Weight``; scales are quantised."""
        return replace(self.hold(array.astype(self.through)), dtype=self.dtype)

    @classmethod
    def described(
        cls, shape: tuple[int, ...], dtype: Any, through: Any, block: int = BLOCK, nested: bool = True
    ) -> Self:
        """A weight of ``jax.ShapeDtypeStruct``.

        Args:
            shape: [*stack, out, in].
            dtype: Of the weight.
            through: See above.
            block: Entries that have a scale together.
            nested: Whether scales are quantised.
        """
        *stack, rows, columns = shape
        blocks = -(-rows * columns // block)
        absmax = (*stack, blocks) if columns % block else (*stack, rows, columns // block)

        def array(shape: Any, dtype: Any) -> Any:
            return jax.ShapeDtypeStruct(tuple(shape), dtype)

        groups = array((*stack, -(-blocks // NESTED)), jnp.float32) if nested else None
        offset = array((*stack, 1), jnp.float32) if nested else None
        codes = array((*stack, rows, columns // 2), jnp.uint8)
        scales = array(absmax, jnp.uint8 if nested else jnp.float32)
        return cls(codes, scales, groups, offset, jnp.dtype(dtype), jnp.dtype(through), block)

    @classmethod
    def _quantized(cls, matrix: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Codes and scales, float32, of one matrix."""
        rows, columns = matrix.shape
        if columns % BLOCK:
            blocks = jnp.pad(matrix.reshape(-1), (0, -matrix.size % BLOCK)).reshape(-1, BLOCK)
        else:
            blocks = matrix.reshape(rows, -1, BLOCK)
        absmax = jnp.max(jnp.abs(blocks.astype(jnp.float32)), axis=-1)
        # or a float32 copy of the whole matrix serves this and what follows
        blocks, absmax = lax.optimization_barrier((blocks, absmax))
        inverse = reciprocal(absmax)[..., None]

        def codes(entries: jax.Array) -> jax.Array:
            entries = entries.astype(jnp.float32)
            share = entries * inverse
            if matrix.size % BLOCK:  # bitsandbytes divides in the last block, if it is short
                share = share.at[-1].set(entries[-1] / jnp.where(absmax[-1] > 0, absmax[-1], 1))
            return codebooks.nearest(jnp.clip(share, -1, 1), cls.table)

        pairs = (codes(blocks[..., 0::2]) << 4) | codes(blocks[..., 1::2])
        if columns % BLOCK:
            pairs = pairs.reshape(-1)[: matrix.size // 2]
        return pairs.reshape(rows, -1), absmax

    def dequantize(self) -> jax.Array:
        """See ``Weight``: level times scale in float32, rounded to ``through``."""
        codes = as_it_lies(self.codes)
        pairs = jnp.stack([codes >> 4, codes & 15], axis=-1)
        levels = codebooks.looked_up(pairs, self.table)
        scales = self._scales()
        if self._blocks_run_on:
            levels = levels.reshape(*levels.shape[:-3], -1)
            scales = jnp.repeat(scales, self.block, axis=-1)[..., : levels.shape[-1]]
            product = levels * scales
        else:
            product = levels.reshape(*scales.shape, self.block) * scales[..., None]
        array = rounded(sealed(product.reshape(self.shape)), self.through)
        return rounded(array, self.dtype).astype(self.dtype)

    @property
    def _blocks_run_on(self) -> bool:
        return self.absmax.ndim < self.codes.ndim

    def _scales(self) -> jax.Array:
        """Shaped like ``absmax``, float32."""
        if self.nested_absmax is None or self.offset is None:
            return self.absmax
        levels = jnp.asarray(codebooks.DYNAMIC).at[self.absmax].get(mode="promise_in_bounds")
        stack = self.offset.ndim - 1
        count = math.prod(levels.shape[stack:])
        nested = jnp.repeat(self.nested_absmax, NESTED, axis=-1)[..., :count].reshape(levels.shape)
        offset = lax.expand_dims(self.offset[..., 0], range(stack, levels.ndim))
        return sealed(levels * nested) + offset  # rounded twice

    def divisible(self) -> Self:
        """See ``Weight``: with scales in float32."""
        return replace(self, absmax=self._scales(), nested_absmax=None, offset=None)

    @classmethod
    def grain(cls, shape: tuple[int, int]) -> tuple[int, int]:
        """See ``Weight``: blocks stay whole."""
        return shape if shape[1] % BLOCK else (1, BLOCK)


def _compressed(absmax: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """uint8 codes of the scales of one matrix, the scales of these codes, and the mean [1]."""
    flat = absmax.reshape(-1)
    offset = sealed(total(flat) / flat.size)
    groups = jnp.pad(flat - offset, (0, -flat.size % NESTED)).reshape(-1, NESTED)
    nested = jnp.max(jnp.abs(groups), axis=-1)
    codes = codebooks.nearest_dynamic(sealed(groups * reciprocal(nested)[:, None]))
    codes = jnp.where(nested[:, None] > 0, codes, 0)  # as bitsandbytes has it
    return codes.reshape(-1)[: flat.size].reshape(absmax.shape), nested, offset[None]


@register("nf4")
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class NF4(FourBit):
    """Quantiles of the normal distribution."""

    table = codebooks.NF4
    name: str = field(default="nf4", metadata={"static": True})


@register("fp4")
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class FP4(FourBit):
    """Floats of 4 bits."""

    table = codebooks.FP4
    name: str = field(default="fp4", metadata={"static": True})
