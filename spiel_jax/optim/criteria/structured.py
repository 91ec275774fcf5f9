"""Static masks of whole rows, columns or rectangles: S2FT, and SMT by weights."""

import zlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from spiel_jax.errors import SpielError
from spiel_jax.ops.selection import top_magnitudes
from spiel_jax.ops.sharded import on_blocks
from spiel_jax.ops.stored import as_array
from spiel_jax.ops.tree import named_leaves, parameter_name
from spiel_jax.optim.criteria.criterion import Complaint, register
from spiel_jax.optim.criteria.static import NoGrowth
from spiel_jax.sparse.delta import SparseDelta, gather
from spiel_jax.sparse.targets import Target, adapted_matrices


@register("structured")
class Structured(NoGrowth):
    """Whole rows, columns or rectangles, a static mask: at random (S2FT) or those of largest mean weight.

    ``spiel.tile`` says what is taken whole: ``rows=1`` a row, ``columns=1`` a column, both a rectangle.
    Entries of the budget that make up no whole one are unused slots.

    References:
        Yang et al., `S2FT <https://arxiv.org/abs/2412.06289>`_: channels at random, in the projections after
        them rows, in those before columns; He et al., `Sparse Matrix Tuning
        <https://arxiv.org/abs/2405.15525>`_: blocks of 256 x 256, which it chooses by gradients.
    """

    can_keep_zeros = True
    own = ("spiel.tile.rows", "spiel.tile.columns", "spiel.tile.by")
    unused = ("spiel.every", "spiel.accumulation", "spiel.schedule", "spiel.rate", "spiel.first")

    @classmethod
    def complaints(cls, config: Any) -> Iterator[Complaint]:
        """See ``Criterion``."""
        yield from super().complaints(config)
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
        block = target.block
        tile = (rows or block[0], columns or block[1])
        grid, size = (block[0] // tile[0], block[1] // tile[1]), tile[0] * tile[1]
        number = target.block_count // size
        if block[0] % tile[0] or block[1] % tile[1]:
            raise SpielError(f"parts of {tile} (spiel.tile) do not divide a block of {block} of {name}")
        if number < 1:
            raise SpielError(
                f"{name}: {target.block_count} entries are not one part of {tile} (spiel.tile), which has "
                f"{size}: raise the budget, or take smaller parts"
            )
        if seed is None:
            means = on_blocks(
                partial(_means, block, tile), target.axes, 1, adapted_matrices(params, name, target)
            )
        else:
            key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))
            means = jax.random.uniform(key, (*target.lead, grid[0] * grid[1]))
        chosen = jax.vmap(partial(top_magnitudes, k=number))(means.reshape(-1, grid[0] * grid[1]))
        first = chosen // grid[1] * tile[0] * block[1] + chosen % grid[1] * tile[1]  # of each rectangle
        inside = jnp.arange(tile[0])[:, None] * block[1] + jnp.arange(tile[1])
        found = (first[..., None] + inside.reshape(-1)).reshape(len(first), -1).astype(jnp.int32)
        unused = ((0, 0), (0, target.block_count - number * size))
        found = jnp.pad(found, unused, constant_values=target.block_size)
        delta = target.delta(found.reshape(*target.lead, target.block_count))
        if keep_zeros:
            entries = gather(named_leaves(params)[parameter_name(name)], delta)
            delta = target.delta(jnp.where(entries == 0, target.block_size, delta.indices))
        positions[name] = delta
    return positions


def _means(block: tuple[int, int], tile: tuple[int, int], matrices: Any) -> jax.Array:
    """[M, grid_rows, grid_columns, rectangles] mean magnitude of each."""

    def means(weight: Any) -> jax.Array:
        matrix = jnp.abs(as_array(weight).astype(jnp.float32))
        grid = matrix.shape[0] // block[0], matrix.shape[1] // block[1]
        inside = block[0] // tile[0], block[1] // tile[1]
        parts = matrix.reshape(grid[0], inside[0], tile[0], grid[1], inside[1], tile[1])
        return parts.mean((2, 5)).swapaxes(1, 2).reshape(*grid, -1)

    return lax.map(means, matrices)
