"""Growth by moments that rows and columns approximate: SpIEL-MA."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import optax

from spiel_jax.errors import SpielError
from spiel_jax.ops.selection import largest, top_products
from spiel_jax.optim.criteria.criterion import (
    ORIGINAL,
    Complaint,
    Observation,
    Regridding,
    register,
)
from spiel_jax.optim.criteria.non_zeros import NonZeros
from spiel_jax.optim.inner_optimizers import sm3_init, sm3_observe, sparse_sm3
from spiel_jax.optim.parity import Parity, is_reference
from spiel_jax.optim.zeros import best_off_zeros, inactive
from spiel_jax.sparse.delta import divided
from spiel_jax.sparse.targets import Target

Score = Literal["product", "minimum"]
"""How a row's and a column's accumulator rank an entry."""


SCORES = {"product": jnp.multiply, "minimum": jnp.minimum}


@register("spiel_ma")
@dataclass(frozen=True)
class MomentApproximation(NonZeros):
    """SpIEL-MA: the second moment of every entry, approximated by its row's and its column's.

    The accumulators are those of sparse SM3: m + n numbers per matrix and O(k) work per step; growth needs
    no extra gradient. An entry ranks by the product of the two, whose matrix is never formed: with ``r`` the
    accumulators of rows and ``q`` those of columns,

        rank(x, y) = r[x] * q[y]

    Attributes:
        score: "product" (the paper's choice) or "minimum" (the bound that SM3 itself puts on a moment).
        shared: Take the accumulators from the inner optimizer's state (fields ``row_moments`` and
            ``column_moments``, as ``scale_by_sparse_sm3`` has them) instead of keeping its own.
        keep_zeros: See ``Criterion``. A reselection then forms the scores of all entries, matrix by matrix.

    Example:
        >>> growth, target = MomentApproximation(), Target((2, 3), 2)
        >>> stats = jnp.array([1.0, 2.0]), jnp.array([5.0, 1.0, 3.0])
        >>> growth.incoming(stats, jnp.array([0, 3]), jnp.array([True, False]), 1, target).tolist()
        [5, 6]

    References:
        SpIEL, section 3.3 and algorithm 2; Anil et al., `Memory-Efficient Adaptive Optimization
        <https://arxiv.org/abs/1901.11150>`_.
    """

    in_original = True
    own = ("spiel.score", "spiel.drop_by")
    unused = ("optimizer.b1", "optimizer.b2")

    score: Score = "product"
    shared: bool = False
    keep_zeros: bool = False

    @classmethod
    def of(cls, score: Score, parity: Parity = "corrected") -> "MomentApproximation":
        """The criterion of ``spiel_ma``, on the accumulators of sparse SM3.

        Raises:
            SpielError: If the score is unknown, or the original does not have it and ``parity`` asks for it.
        """
        if score not in get_args(Score):
            raise SpielError(f"score = {score!r}: expected one of {', '.join(get_args(Score))}")
        if is_reference(parity) and score != "product":
            raise SpielError(
                f'score = {score!r}: the original ranks by the product, so parity="reference" does'
            )
        return cls(score, shared=True)

    @classmethod
    def from_config(cls, config: Any) -> "MomentApproximation":
        """See ``Criterion``."""
        return cls.of(config.spiel.score, config.spiel.parity)

    @classmethod
    def complaints(cls, config: Any) -> Iterator[Complaint]:
        """See ``Criterion``."""
        yield from super().complaints(config)
        if config.spiel.drop_by == "age":
            yield "spiel.drop_by", "age", "value or weight: SM3 keeps no age"
        for key, size in config.targets.balance.items():
            if size is not None:
                expected = "None: SM3 keeps a number for each row and each column of every part"
                yield f"targets.balance.{key}", size, expected
        if config.spiel.parity == "reference" and config.spiel.score != "product":
            yield "spiel.score", config.spiel.score, f"product: {ORIGINAL}"

    @classmethod
    def optimizer(
        cls, config: Any, rate: optax.Schedule, targets: Mapping[str, Target]
    ) -> optax.GradientTransformation:
        """Sparse SM3, whose accumulators the criterion shares."""
        settings = config.optimizer
        eps = {} if settings.eps is None else {"eps": settings.eps}
        return sparse_sm3(rate, targets, weight_decay=settings.weight_decay, **eps)

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

    def survey(self, stats: dict[str, Any], weights: Any, targets: Mapping[str, Target]) -> dict[str, Any]:
        """The accumulators, and the 2k best entries that are not zero: k of them or more are not active."""
        if not self.keep_zeros:
            return stats
        combine, found = SCORES[self.score], {}
        for name, target in targets.items():

            def scores(item: tuple[jax.Array, jax.Array], target: Target = target) -> jax.Array:
                row, column = (part.reshape(*target.grid, -1) for part in item)
                parts = combine(row[..., :, None], column[..., None, :])  # of each block
                return parts.swapaxes(1, 2).reshape(target.shape)

            matrices = math.prod(target.stack)
            flat = tuple(part.reshape(matrices, *part.shape[len(target.stack) :]) for part in stats[name])
            best = best_off_zeros(weights, name, target, 2 * target.block_count, scores, flat)
            found[name] = *stats[name], best
        return found

    def incoming(
        self,
        stats: tuple[jax.Array, ...],
        indices: jax.Array,
        dropped: jax.Array,
        n: jax.Array,
        target: Target,
    ) -> jax.Array:
        """The n entries of largest score that are not active; dropped ones count as active."""
        row, column, *surveyed = stats
        if not surveyed:
            return top_products(row, column, n, indices.size, indices, SCORES[self.score])
        positions, scores = self._scored(stats, indices, target)
        return jnp.where(largest(scores, positions, n), positions, target.block_size)

    def proposals(
        self, stats: tuple[jax.Array, ...], indices: jax.Array, dropped: jax.Array, target: Target
    ) -> tuple[jax.Array, jax.Array]:
        """The k entries of largest score that are not active; dropped ones count as active."""
        del dropped
        row, column, *surveyed = stats
        if not surveyed:
            n = jnp.minimum(indices.size, self.available(stats, indices, target))
            stats = row, column, top_products(row, column, n, indices.size, indices, SCORES[self.score])
        return self._scored(stats, indices, target)

    def _scored(
        self, stats: tuple[jax.Array, ...], indices: jax.Array, target: Target
    ) -> tuple[jax.Array, jax.Array]:
        """The positions that are the last of the statistics, and their scores, NaN where active."""
        row, column, positions = stats
        rows, columns = divided(positions, target.block[1])
        scores = SCORES[self.score](row[rows], column[columns])
        return positions, jnp.where(inactive(positions, indices, target.block_size), scores, jnp.nan)

    def regrid(self, stats: tuple[Any, Any], move: Regridding) -> Any:
        """Joins or cuts the accumulators: they stay upper bounds."""
        return move.rows(stats[0]), move.columns(stats[1])
