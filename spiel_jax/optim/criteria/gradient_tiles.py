"""Static masks of the rectangles of largest gradient: SMT."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from spiel_jax.errors import SpielError
from spiel_jax.ops.tree import named_leaves, parameter_name
from spiel_jax.optim.criteria.criterion import Complaint, Regridding, register
from spiel_jax.optim.criteria.static import BySums
from spiel_jax.optim.criteria.structured import Structured, Tiling
from spiel_jax.sparse.delta import gather
from spiel_jax.sparse.targets import Target


@register("smt")
@dataclass(frozen=True)
class LargestGradientTiles(BySums):
    r"""The rectangles of largest mean gradient, a static mask (SMT): chosen once, at the end of a phase.

    $$
    \text{rank}(T) = \sum_t \frac{1}{|T|} \sum_{(x, y) \in T} |g_t[x, y]|
    $$

    over all micro-batches t of the first ``spiel.accumulation`` steps, in which random entries train. Of a
    weight one number per rectangle is kept. What the budget leaves beside whole rectangles are unused slots.
    The paper has squares of 256 after 100 steps of warm-up, and lets the layers compete for them; here each
    weight has its own share.

    Attributes:
        rows: Of a rectangle; None for all.
        columns: Of a rectangle; None for all.
        keep_zeros: See ``Criterion``: slots of entries where the weight is zero are unused.

    Example:
        >>> growth = LargestGradientTiles(rows=1, columns=2)
        >>> growth.measure(jnp.array([[1.0, -3.0, 0.0, 2.0]]), (1, 4)).tolist()
        [[[2.0, 1.0]]]
        >>> target = Target((1, 4), 2)
        >>> growth.incoming(jnp.array([2.0, 1.0]), jnp.array([1, 3]), jnp.ones(2, bool), 2, target).tolist()
        [0, 1]

    References:
        He et al., `Sparse Matrix in Large Language Model Fine-tuning <https://arxiv.org/abs/2405.15525>`_.
    """

    own = ("spiel.tile.rows", "spiel.tile.columns")
    measures = True

    rows: int | None = 256
    columns: int | None = 256
    keep_zeros: bool = False

    @classmethod
    def complaints(cls, config: Any) -> Iterator[Complaint]:
        """See ``Criterion``."""
        yield from super().complaints(config)
        yield from Structured.untold(config)

    @classmethod
    def from_config(cls, config: Any) -> "LargestGradientTiles":
        """See ``Criterion``."""
        return cls(config.spiel.tile.rows, config.spiel.tile.columns)

    @property
    def uses_weights(self) -> bool:
        """See ``Criterion``: for their zeros."""
        return self.keep_zeros

    def _tiling(self, target: Target, name: str = "a weight") -> Tiling:
        return Tiling.of(name, target, self.rows, self.columns)

    def measure(self, gradient: jax.Array, block: tuple[int, int]) -> jax.Array:
        """See ``Criterion``: the mean magnitude of each rectangle."""
        return Tiling(block, (self.rows or block[0], self.columns or block[1]), 0).means(gradient)

    def init(self, targets: Mapping[str, Target], values: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """Sums of 0: target name to [..., rectangles].

        Raises:
            SpielError: If the rectangles do not divide a block, or the entries of a block are not one.
        """
        del values
        return {name: jnp.zeros((*t.lead, self._tiling(t, name).parts)) for name, t in targets.items()}

    def survey(
        self, stats: dict[str, jax.Array], weights: Any, targets: Mapping[str, Target]
    ) -> dict[str, jax.Array]:
        """The entries of the rectangles [..., k], those where the weight is zero unused."""
        if not self.keep_zeros:
            return stats
        leaves, found = named_leaves(weights), {}
        for name, target in targets.items():
            flat = stats[name].reshape(-1, stats[name].shape[-1])
            best = jax.vmap(self._tiling(target).best)(flat).reshape(*target.lead, target.block_count)
            zero = gather(leaves[parameter_name(name)], target.delta(best)) == 0
            found[name] = jnp.where(zero, target.block_size, best)
        return found

    def _found(self, stats: jax.Array, target: Target) -> jax.Array:
        return stats if self.keep_zeros else self._tiling(target).best(stats)

    def incoming(
        self, stats: jax.Array, indices: jax.Array, dropped: jax.Array, n: jax.Array, target: Target
    ) -> jax.Array:
        """All of them: everything is replaced."""
        return self._found(stats, target)

    def regrid(self, stats: Any, move: Regridding) -> Any:
        """The same rectangles, in other blocks.

        Raises:
            SpielError: If they do not divide the new blocks, or would be others.
        """
        old, new = self._tiling(move.old), self._tiling(move.new)
        if old.tile != new.tile:
            raise SpielError(
                f"parts of {old.tile} (spiel.tile) would be of {new.tile} in blocks of {new.block}"
            )
        stack, grids = move.old.stack, (move.old.grid, move.new.grid)
        whole = np.asarray(stats).reshape(*stack, *grids[0], *old.grid).swapaxes(-3, -2)
        parts = whole.reshape(*stack, grids[1][0], new.grid[0], grids[1][1], new.grid[1]).swapaxes(-3, -2)
        return parts.reshape(*move.new.lead, new.parts)
