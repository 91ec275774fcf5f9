"""Growth by moments that rows and columns approximate: SpIEL-MA."""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from spiel_jax.ops.selection import top_products
from spiel_jax.optim.criteria.criterion import Observation
from spiel_jax.optim.inner_optimizers import sm3_init, sm3_observe
from spiel_jax.sparse.targets import Target

Score = Literal["product", "minimum"]
"""How a row's and a column's accumulator rank an entry."""


SCORES = {"product": jnp.multiply, "minimum": jnp.minimum}


class MomentApproximation(NamedTuple):
    """SpIEL-MA: the second moment of every entry, approximated by its row's and its column's.

    The accumulators are those of sparse SM3: m + n numbers per matrix and O(k) work per step; growth needs
    no extra gradient. An entry ranks by the product of the two, whose matrix is never formed.

    Attributes:
        score: "product" (the paper's choice) or "minimum" (the bound that SM3 itself puts on a moment).
        shared: Take the accumulators from the inner optimizer's state (fields ``row_moments`` and
            ``column_moments``, as ``scale_by_sparse_sm3`` has them) instead of keeping its own.

    References:
        SpIEL, section 3.3 and algorithm 2; Anil et al., `Memory-Efficient Adaptive Optimization
        <https://arxiv.org/abs/1901.11150>`_.
    """

    score: Score = "product"
    shared: bool = False

    @property
    def uses_candidates(self) -> bool:
        """The accumulators say it all."""
        return False

    def init(
        self, targets: Mapping[str, Target], values: Mapping[str, jax.Array]
    ) -> dict[str, tuple[jax.Array, jax.Array]]:
        """Zero accumulators: target name to ([..., R], [..., C])."""
        zero = sm3_init(targets, values)
        return {name: (zero.row_moments[name], zero.column_moments[name]) for name in targets}

    def observe(
        self, stats: dict[str, tuple[jax.Array, jax.Array]], seen: Observation
    ) -> dict[str, tuple[jax.Array, jax.Array]]:
        """Raises the accumulators by the gradients of the active entries."""
        if self.shared:
            rows = optax.tree.get(seen.inner, "row_moments")
            columns = optax.tree.get(seen.inner, "column_moments")
            if rows is None or columns is None:
                raise ValueError(
                    "shared accumulators: the inner optimizer keeps none; build it from "
                    "scale_by_sparse_sm3, or use MomentApproximation(shared=False)"
                )
            return {name: (rows[name], columns[name]) for name in stats}
        return {
            name: sm3_observe(row, column, seen.active[name], seen.grads[name])[:2]
            for name, (row, column) in stats.items()
        }

    def available(self, stats: Any, indices: jax.Array, target: Target) -> jax.Array:
        """All entries that are not active."""
        return target.block_size - jnp.sum(indices < target.block_size, dtype=jnp.int32)

    def incoming(
        self,
        stats: tuple[jax.Array, jax.Array],
        indices: jax.Array,
        dropped: jax.Array,
        n: jax.Array,
        target: Target,
    ) -> jax.Array:
        """The n entries of largest score that are not active; dropped ones count as active."""
        row, column = stats
        return top_products(row, column, n, indices.size, indices, SCORES[self.score])

    def seed(self, stats: Any, source: jax.Array) -> dict[str, jax.Array]:
        """Nothing: the accumulators know the grown entries already."""
        return {}

    def clear(self, stats: dict[str, Any], targets: Mapping[str, Target]) -> dict[str, Any]:
        """Keeps the accumulators."""
        return stats
