"""The state of SpIEL for another block grid."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from spiel_jax.checkpoint import CheckpointError
from spiel_jax.methods.method import TrainState
from spiel_jax.optim.criteria.accumulated_gradients import AccumulatedGradients, CandidateStats
from spiel_jax.optim.criteria.criterion import Growth
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
        return 1 - self.entries / self.new.total


class _Move:
    """Where the slots of a target go that are in use.

    Args:
        indices: [*stack, ..., k] positions in the blocks of ``old``; its block size in unused slots.
        old: The target before.
        new: The target after; its count is not read.
        scores: Shaped like ``indices``: those of largest score come first in each block, which has ``room``
            for so many. By default there is room for all, in the order of their slots.
        room: Slots per block; default: what the fullest block needs.
    """

    def __init__(
        self,
        indices: np.ndarray,
        old: Target,
        new: Target,
        scores: np.ndarray | None = None,
        room: int | None = None,
    ):
        self._new, blocks = new, math.prod(new.grid)
        matrices = indices.reshape(math.prod(old.stack), math.prod(old.grid), -1)
        ranked = [None] * len(matrices) if scores is None else scores.reshape(len(matrices), -1)
        routes = [_route(*matrix, old, new) for matrix in zip(matrices, ranked, strict=True)]
        full = [np.bincount(block, minlength=blocks) for _, block, _ in routes]
        self.slots = room or max(1, *(int(counts.max()) for counts in full))
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
    turned = [replace(t, shape=t.shape[::-1], grid=t.grid[::-1], count=math.prod(t.grid)) for t in (old, new)]
    joined = _joined(bounds, *turned).reshape(-1, *turned[1].grid, new.block[1])
    return joined.swapaxes(1, 2).reshape(*new.lead, new.block[1])


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
            raise CheckpointError(
                f"the optimizer's {jax.tree_util.keystr(path)} of shape {leaf.shape} does not belong to "
                "entries, rows or columns: it cannot be given another grid"
            )
        return moves[name](leaf)  # a fresh entry has 0

    return jax.tree_util.tree_map_with_path(moved, state)


def _statistics(stats: Any, change: Regridded, growth: Growth) -> tuple[Any, int]:
    """A growth criterion's statistics of one target, and the number of candidates that found no room."""
    old, new = change.old, change.new
    if isinstance(stats, CandidateStats):
        assert isinstance(growth, AccumulatedGradients)
        sums = np.asarray(stats.grad_sum)
        # one that is not finite is not grown, and comes last
        scores = np.nan_to_num(np.abs(sums), nan=-1, posinf=-1)
        move = _Move(np.asarray(stats.indices), old, new, scores, growth.count(new))
        # the counts are the same for all matrices
        counts = [np.full(new.lead, np.max(n), n.dtype) for n in (stats.samples, stats.steps)]
        kept: Any = move.indices(), move(sums), move(stats.grad_sq_sum), *counts
        return CandidateStats(*kept), move.forgotten
    if isinstance(stats, tuple) and stats:
        row, column = stats
        return (_joined(row, old, new), _joined_columns(column, old, new)), 0
    if isinstance(stats, jax.Array) and old.grid != new.grid:  # keys: those of the first blocks, split
        data = stats if old.grid == (1, 1) else stats[..., 0, 0, :]
        split = jax.random.split
        for _ in new.stack:
            split = jax.vmap(split, (0, None))
        keys = split(jax.random.wrap_key_data(data), math.prod(new.grid))
        return jax.random.key_data(keys).reshape(*new.lead, -1), 0
    return stats, 0


def convert(
    state: TrainState,
    targets: Mapping[str, Target],
    grids: Mapping[str, tuple[int, int]],
    growth: Growth,
) -> tuple[TrainState, dict[str, Regridded]]:
    """A state of ``spiel`` for other block grids.

    Args:
        state: Its trainable values and optimizer state; weights are not read.
        targets: What is adapted, as the state has it.
        grids: Target name to its new grid.
        growth: The criterion inside ``spiel``.

    Returns:
        The state, with arrays of the host, and what became of each target.

    Raises:
        ValueError: If a grid does not divide its weight.
        CheckpointError: If the inner optimizer holds what belongs neither to entries nor to rows or columns.
    """
    old = state.opt_state
    moves, changed, active, trainable = {}, {}, {}, {}
    for name, target in targets.items():
        blocks = math.prod(grids[name])
        try:
            new = replace(target, grid=grids[name], count=blocks, axes=None)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        move = moves[name] = _Move(np.asarray(old.active[name].indices), target, new)
        new = replace(new, count=move.slots * blocks)
        changed[name] = Regridded(target, new, move.entries)
        active[name] = new.delta(move.indices())  # pyright: ignore[reportArgumentType]
        trainable[name] = move(state.trainable[name])
    stats = {}
    for name, change in changed.items():
        stats[name], forgotten = _statistics(old.growth[name], change, growth)
        changed[name] = replace(change, forgotten=forgotten)
    opt_state = old._replace(active=active, growth=stats, inner=_inner(old.inner, moves, changed))
    return TrainState({}, {}, trainable, opt_state), changed
