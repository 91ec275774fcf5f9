"""Static masks of whole rows, columns or rectangles: S2FT, and SMT by weights."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from spiel_jax.errors import SpielError
from spiel_jax.ops.selection import top_magnitudes
from spiel_jax.ops.sharded import on_blocks
from spiel_jax.ops.stored import as_array
from spiel_jax.ops.tree import named_key, named_leaves, parameter_name
from spiel_jax.optim.criteria.criterion import Complaint, register
from spiel_jax.optim.criteria.static import NoGrowth
from spiel_jax.sparse.delta import SparseDelta, gather
from spiel_jax.sparse.targets import Target, adapted_matrices


@register("structured")
class Structured(NoGrowth):
    """Whole rows, columns or rectangles, a static mask: at random (S2FT) or those of largest mean weight.

    ``spiel.tile`` says what is taken whole: ``rows=1`` a row, ``columns=1`` a column, both a rectangle.
    Entries of the budget that make up no whole one are unused slots.

    Example:
        >>> from spiel_jax.config import default_config
        >>> config = default_config()
        >>> config.spiel.tile.rows, config.spiel.tile.by = 1, "weights"
        >>> weights = {"w": jnp.array([[1.0, 1.0], [2.0, 2.0], [0.0, 3.0]])}
        >>> Structured.start(config)(weights, {"w": Target((3, 2), 2)})["w"].indices.tolist()
        [2, 3]

    References:
        Yang et al., `S2FT <https://arxiv.org/abs/2412.06289>`_: heads and channels at random, the same in the
        projections before them (here rows, of [out, in]) and after them (columns), where here every weight
        draws its own and ``spiel.tile`` is one of all; He et al., `Sparse Matrix Tuning
        <https://arxiv.org/abs/2405.15525>`_: blocks of 256 x 256, by gradients; see ``LargestGradientTiles``.
    """

    can_keep_zeros = True
    own = ("spiel.tile.rows", "spiel.tile.columns", "spiel.tile.by")
    unused = ("spiel.every", "spiel.accumulation", "spiel.schedule", "spiel.rate", "spiel.first")

    @classmethod
    def complaints(cls, config: Any) -> Iterator[Complaint]:
        """See ``Criterion``."""
        yield from super().complaints(config)
        yield from cls.untold(config)

    @staticmethod
    def untold(config: Any) -> Iterator[Complaint]:
        """That nothing says what is taken whole."""
        tile = config.spiel.tile
        if tile.rows is None and tile.columns is None:
            yield "spiel.tile.rows", None, "a number of rows, or of columns (spiel.tile.columns), or both"

    @classmethod
    def start(cls, config: Any) -> Callable[..., Mapping[str, SparseDelta]]:
        """See ``Criterion``."""
        tile = config.spiel.tile
        seed = config.seed if tile.by == "random" else None
        find = partial(tile_positions, rows=tile.rows, columns=tile.columns, seed=seed)
        return partial(find, keep_zeros=config.spiel.keep_zeros)


@dataclass(frozen=True)
class Tiling:
    """The rectangles of each block of a target.

    Attributes:
        block: (rows, columns) of a block.
        tile: (rows, columns) of a rectangle; they divide it.
        count: Entries of a block, of which some rectangles are made.

    Example:
        >>> tiling = Tiling((2, 4), (1, 2), 5)
        >>> tiling.parts, tiling.number, tiling.best(jnp.array([1.0, 4.0, 3.0, 2.0])).tolist()  # 8: unused
        (4, 2, [2, 3, 4, 5, 8])
    """

    block: tuple[int, int]
    tile: tuple[int, int]
    count: int

    @classmethod
    def of(cls, name: str, target: Target, rows: int | None, columns: int | None) -> "Tiling":
        """The rectangles of so many rows and columns, None for all of a block's.

        Raises:
            SpielError: If the rectangles do not divide a block, or the entries of a block are not one.
        """
        block, count = target.block, target.block_count
        tile = (rows or block[0], columns or block[1])
        size = tile[0] * tile[1]
        if block[0] % tile[0] or block[1] % tile[1]:
            raise SpielError(f"parts of {tile} (spiel.tile) do not divide a block of {block} of {name}")
        if count < size:
            raise SpielError(
                f"{name}: {count} entries are not one part of {tile} (spiel.tile), which has "
                f"{size}: raise the budget, or take smaller parts"
            )
        return cls(block, tile, count)

    @property
    def grid(self) -> tuple[int, int]:
        """Rectangles of a block, down and across."""
        return self.block[0] // self.tile[0], self.block[1] // self.tile[1]

    @property
    def parts(self) -> int:
        """Rectangles of a block."""
        return self.grid[0] * self.grid[1]

    @property
    def number(self) -> int:
        """Rectangles that are chosen."""
        return self.count // (self.tile[0] * self.tile[1])

    def means(self, matrix: jax.Array) -> jax.Array:
        """[grid_rows, grid_columns, parts] float32: the mean magnitude of the rectangles of some blocks."""
        matrix = jnp.abs(matrix.astype(jnp.float32))
        blocks = matrix.shape[0] // self.block[0], matrix.shape[1] // self.block[1]
        parts = matrix.reshape(blocks[0], self.grid[0], self.tile[0], blocks[1], self.grid[1], self.tile[1])
        return parts.mean((2, 5)).swapaxes(1, 2).reshape(*blocks, -1)

    def best(self, scores: jax.Array) -> jax.Array:
        """[count] int32: the entries of the rectangles of largest score [parts]; the last slots unused."""
        chosen = top_magnitudes(scores, self.number)
        first = chosen // self.grid[1] * self.tile[0] * self.block[1] + chosen % self.grid[1] * self.tile[1]
        inside = jnp.arange(self.tile[0])[:, None] * self.block[1] + jnp.arange(self.tile[1])
        found = (first[:, None] + inside.reshape(-1)).reshape(-1).astype(jnp.int32)
        size = self.block[0] * self.block[1]
        return jnp.pad(found, (0, self.count - found.size), constant_values=size)


def tile_positions(
    params: Any,
    targets: Mapping[str, Target],
    *,
    rows: int | None = None,
    columns: int | None = None,
    seed: int | None = None,
    keep_zeros: bool = False,
) -> dict[str, SparseDelta]:
    """The entries of some of the rectangles of each matrix (or block), whole.

    Args:
        params: Pytree of pretrained weights, [*stack, rows, columns]; stored ones too.
        targets: What is adapted.
        rows: Of a rectangle; None for all.
        columns: Of a rectangle; None for all.
        seed: Of the draw; None for those of largest mean magnitude, ties towards the first.
        keep_zeros: Whether slots of entries where the weight is zero are unused.

    Returns:
        Target name to ``SparseDelta`` without values, for ``place``; as many whole rectangles as the entries
        make up, the other slots unused.

    Raises:
        KeyError: If a target is no leaf of ``params``.
        SpielError: If the rectangles do not divide a block, or the entries of a block are not one.

    Example:
        >>> weights = {"w": jnp.array([[1.0, 5.0], [1.0, 5.0], [2.0, 0.0]])}
        >>> tile_positions(weights, {"w": Target((3, 2), 4)}, columns=1)["w"].indices.tolist()  # 6: unused
        [1, 3, 5, 6]
    """
    positions = {}
    for name, target in targets.items():
        tiling = Tiling.of(name, target, rows, columns)
        if seed is None:
            means = on_blocks(partial(_means, tiling), target.axes, 1, adapted_matrices(params, name, target))
        else:
            key = named_key(jax.random.key(seed), name)
            means = jax.random.uniform(key, (*target.lead, tiling.parts))
        best = jax.vmap(tiling.best)(means.reshape(-1, tiling.parts))
        delta = target.delta(best.reshape(*target.lead, target.block_count))
        if keep_zeros:
            entries = gather(named_leaves(params)[parameter_name(name)], delta)
            delta = target.delta(jnp.where(entries == 0, target.block_size, delta.indices))
        positions[name] = delta
    return positions


def _means(tiling: Tiling, matrices: Any) -> jax.Array:
    """[M, grid_rows, grid_columns, rectangles] mean magnitude of each."""
    return lax.map(lambda weight: tiling.means(as_array(weight)), matrices)
