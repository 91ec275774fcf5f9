"""A weight that cannot be written with its deltas beside it: a tuned model as small as its quantised base."""

from dataclasses import dataclass
from typing import Any, Self

import jax

from spiel_jax.models.storage import Weight
from spiel_jax.sparse.delta import SparseDelta, merge


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Unmerged(Weight):
    """A weight, quantised as a rule, and a sparse delta on it, merged on each use: a layer at a time.

    It stands for what ``merge`` makes of the two, bit for bit.

    Attributes:
        base: The weight, [*stack, out, in].
        delta: On every matrix of it.
    """

    base: jax.Array | Weight
    delta: SparseDelta

    @property
    def shape(self) -> tuple[int, ...]:
        """See ``Weight``."""
        return self.base.shape

    @property
    def dtype(self) -> Any:
        """See ``Weight``."""
        return self.base.dtype

    @classmethod
    def hold(cls, array: jax.Array) -> Self:
        """Of an array alone there is none.

        Raises:
            TypeError: Always.
        """
        raise TypeError(f"an array {array.shape} cannot be held as a weight and a delta: expected both")

    def dequantize(self) -> jax.Array:
        """See ``Weight``."""
        return merge({"weight": self.base}, {"weight": self.delta})["weight"]
