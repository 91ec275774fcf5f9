"""The state of ``spiel`` for another block grid. The work is done in the host's memory."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from spiel_jax.errors import SpielError
from spiel_jax.optim.criteria.criterion import Criterion
from spiel_jax.optim.spiel import SpielState
from spiel_jax.sparse.targets import Target


@dataclass(frozen=True)
class Regridded:
    """What became of one target.

    Attributes:
        old: The target before.
        new: The target after.
        entries: Slots in use, in all matrices.
        forgotten: Candidates that found no room in their block.
    """

    old: Target
    new: Target
    entries: int
    forgotten: int = 0

    @property
    def unused(self) -> float:
        """Share of the slots that are not in use."""
        return 1 - self.entries / self.new.slots


class _Move:
    """Where the slots of a target go that are in use.

    Args:
        indices: [*stack, ..., k] positions in the blocks of ``old``; its block size in unused slots.
        old: The target before.
        new: The target after; its count is not read.
        scores: Shaped like ``indices``: those of largest score come first in each block, which has ``room``
            for so many. By default there is room for all, in the order of their slots.
        room: Slots per block; default: what the fullest block needs.
        least: Slots per block where that is less.
    """

    def __init__(
        self,
        indices: np.ndarray,
        old: Target,
        new: Target,
        scores: np.ndarray | None = None,
        room: int | None = None,
        least: int = 1,
    ):
        self._new, blocks = new, math.prod(new.grid)
        matrices = indices.reshape(math.prod(old.stack), math.prod(old.grid), -1)
        ranked = [None] * len(matrices) if scores is None else scores.reshape(len(matrices), -1)
        routes = [_route(*matrix, old, new) for matrix in zip(matrices, ranked, strict=True)]
        full = [np.bincount(block, minlength=blocks) for _, block, _ in routes]
        self.slots = room or max(least, *(int(counts.max()) for counts in full))
        self.forgotten = sum(int(np.maximum(counts - self.slots, 0).sum()) for counts in full)
        self._pairs, self._positions = [], []  # of each matrix: slots before and after, positions
        for (slots, block, positions), counts in zip(routes, full, strict=True):
            rank = np.arange(slots.size) - (np.cumsum(counts) - counts)[block]
            fits = rank < self.slots
            self._pairs.append((slots[fits], (block * self.slots + rank)[fits]))
            self._positions.append(positions[fits].astype(np.int32))
        self.entries = sum(slots.size for slots, _ in self._pairs)

    def indices(self) -> np.ndarray:
        """Positions in the new blocks, int32 [*stack, ..., slots]."""
        return self._filled(self._positions, self._new.block_size, np.dtype(np.int32))

    def __call__(self, array: Any) -> np.ndarray:
        """An array with a number for each of the old slots, in the new ones; 0 in unused slots."""
        array = np.asarray(array)
        flat = array.reshape(len(self._pairs), -1)
        taken = [matrix[before] for matrix, (before, _) in zip(flat, self._pairs, strict=True)]
        return self._filled(taken, 0, array.dtype)

    def _filled(self, entries: Sequence[np.ndarray], fill: int, dtype: np.dtype) -> np.ndarray:
        filled = np.full((len(self._pairs), math.prod(self._new.grid) * self.slots), fill, dtype)
        for matrix, (_, after), found in zip(filled, self._pairs, entries, strict=True):
            matrix[after] = found
        return filled.reshape(*self._new.lead, self.slots)


def _route(
    indices: np.ndarray, scores: np.ndarray | None, old: Target, new: Target
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(slot, new block, position in it) of each entry of one matrix [blocks, k], ordered by new block."""
    slots = np.flatnonzero(indices < old.block_size)
    block, position = slots // indices.shape[1], indices.reshape(-1)[slots].astype(np.int64)
    row = position // old.block[1] + block // old.grid[1] * old.block[0]
    column = position % old.block[1] + block % old.grid[1] * old.block[1]
    blocks = row // new.block[0] * new.grid[1] + column // new.block[1]
    positions = row % new.block[0] * new.block[1] + column % new.block[1]
    order = np.lexsort((blocks,) if scores is None else (-scores[slots], blocks))  # stable
    return slots[order], blocks[order], positions[order]


def _joined(bounds: Any, old: Target, new: Target) -> np.ndarray:
    """SM3's accumulators of the rows of each block, [*stack, ..., R], for another grid.

    They bound the moments of a row's entries from above. A block that is cut leaves its bound to each part,
    and where parts of a row join the largest bound holds for all.
    """
    columns = math.lcm(old.grid[1], new.grid[1])  # parts of the matrix that both grids keep whole
    bounds = np.asarray(bounds).reshape(-1, *old.grid, old.block[0]).swapaxes(2, 3)
    bounds = bounds.reshape(-1, old.shape[0], old.grid[1]).repeat(columns // old.grid[1], axis=2)
    largest = bounds.reshape(-1, new.grid[0], new.block[0], new.grid[1], columns // new.grid[1]).max(axis=4)
    return largest.swapaxes(2, 3).reshape(*new.lead, new.block[0])


def _joined_columns(bounds: Any, old: Target, new: Target) -> np.ndarray:
    """The same of the columns of each block, [*stack, ..., C]."""
    bounds = np.asarray(bounds).reshape(-1, *old.grid, old.block[1]).swapaxes(1, 2)
    turned = [
        replace(t, shape=t.shape[::-1], grid=t.grid[::-1], count=math.prod(t.grid), spare=0)
        for t in (old, new)
    ]
    joined = _joined(bounds, *turned).reshape(-1, *turned[1].grid, new.block[1])
    return joined.swapaxes(1, 2).reshape(*new.lead, new.block[1])


class _Change:
    """One target's change of grid, as a criterion sees it; see ``Regridding``."""

    def __init__(self, old: Target, new: Target):
        self.old, self.new, self.forgotten = old, new, 0

    def positions(self, indices: Any, scores: np.ndarray | None = None, room: int | None = None) -> _Move:
        move = _Move(np.asarray(indices), self.old, self.new, scores, room)
        self.forgotten += move.forgotten
        return move

    def rows(self, bounds: Any) -> np.ndarray:
        return _joined(bounds, self.old, self.new)

    def columns(self, bounds: Any) -> np.ndarray:
        return _joined_columns(bounds, self.old, self.new)


def _inner(state: Any, moves: Mapping[str, _Move], changed: Mapping[str, Regridded]) -> Any:
    """The state of the inner optimizer: what it holds for each entry, or for each row and column."""

    def moved(path: tuple, leaf: Any) -> Any:
        name = next((k.key for k in path if isinstance(k, jax.tree_util.DictKey) and k.key in moves), None)
        fields = {key.name for key in path if isinstance(key, jax.tree_util.GetAttrKey)}
        if name is None:
            return leaf
        old, new = changed[name].old, changed[name].new
        if "row_moments" in fields:
            return _joined(leaf, old, new)
        if "column_moments" in fields:
            return _joined_columns(leaf, old, new)
        if leaf.shape != (*old.lead, old.block_count):
            raise SpielError(
                f"the optimizer's {jax.tree_util.keystr(path)} of shape {leaf.shape} does not belong to "
                "entries, rows or columns: it cannot be given another grid"
            )
        return moves[name](leaf)  # a fresh entry has 0

    return jax.tree_util.tree_map_with_path(moved, state)


def convert(
    values: Mapping[str, Any],
    state: SpielState,
    targets: Mapping[str, Target],
    grids: Mapping[str, tuple[int, int]],
    growth: Criterion,
) -> tuple[dict[str, Any], SpielState, dict[str, Regridded]]:
    """The values and the state of ``spiel`` for other block grids.

    Args:
        values: Target name to values [*stack, ..., k].
        state: The state.
        targets: What is adapted, as the state has it.
        grids: Target name to its new grid.
        growth: The criterion inside ``spiel``.

    Returns:
        Values and state, arrays of the host, and what became of each target.

    Raises:
        SpielError: If a grid does not divide its weight, or the inner optimizer holds what belongs neither to
            entries nor to rows or columns.
    """
    moves, changed, active, stats, moved = {}, {}, {}, {}, {}
    one_budget = any(target.spare for target in targets.values())
    for name, target in targets.items():
        blocks = math.prod(grids[name])
        try:
            new = replace(target, grid=grids[name], count=blocks, axes=None, spare=0)
        except SpielError as error:
            raise SpielError(f"{name}: {error}") from error
        # of one budget a target keeps its slots, wherever the entries are at the moment
        least = -(-target.count // blocks) if one_budget else 1
        move = moves[name] = _Move(np.asarray(state.active[name].indices), target, new, least=least)
        share, slots = target.count - target.spare, move.slots * blocks  # of a matrix
        new = replace(new, count=slots, spare=slots - share if one_budget else 0)
        change = _Change(target, new)
        active[name] = new.delta(move.indices())  # pyright: ignore[reportArgumentType]
        stats[name] = growth.regrid(state.growth[name], change)
        moved[name] = move(values[name])
        changed[name] = Regridded(target, new, move.entries, change.forgotten)
    return (
        moved,
        state._replace(active=active, growth=stats, inner=_inner(state.inner, moves, changed)),
        changed,
    )
