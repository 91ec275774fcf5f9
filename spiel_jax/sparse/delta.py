"""Sparse deltas of weights: the central type, merging, and a linear that collects its sparse gradient.

A weight is a matrix, or a stack of matrices on leading axes (stacked layers); an array, or a stored weight
(``ops.stored``), which is never differentiated. Each matrix has its own active entries. Positions are flat
and row-major inside a matrix, or inside one block of it where a block grid cuts the matrix up (the grid is
what makes a large mesh and matrices of more than 2^31 entries work).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from spiel_jax.ops.sharded import on_blocks
from spiel_jax.ops.stored import Stored, as_array, entries_at, is_stored, is_writable, one_stack, with_entries
from spiel_jax.ops.tree import edit

_static = partial(field, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SparseDelta:
    """Some entries of a weight: where they are, and a number for each.

    The numbers are the deltas relative to the pretrained weight, or gradients at these positions, or
    absent (None) where only the positions matter. Slots are in no particular order: inside a run a kept
    entry stays in its slot. Use ``sort`` for what leaves the run.

    Attributes:
        indices: int32 [*stack, k], flat positions, distinct within a matrix; [*stack, grid_rows,
            grid_columns, k], positions within the block, where the grid is not (1, 1). A position equal
            to the number of entries of the block marks an unused slot.
        values: [*stack, ..., k] float, the same shape as ``indices``; or None.
        shape: (rows, columns) of one matrix.
        grid: (rows, columns) of the block grid.
        layers: Which matrices of the stack are adapted, ascending; None for all of them.
        axes: Mesh axes over which the rows and the columns of the grid, and the weight with them, are
            spread under ``jax.set_mesh``; None where they are not. With axes, ``indices`` has those of
            the grid even where that is (1, 1).

    Example:
        >>> delta = SparseDelta(jnp.array([5, 1, 6]), jnp.array([0.5, 2.0, 0.0]), shape=(2, 3))
        >>> [axis.tolist() for axis in delta.coordinates()]  # 6 = 2 * 3 marks an unused slot
        [[1, 0, 2], [2, 1, 0]]
        >>> delta.sort().indices.tolist()
        [1, 5, 6]
    """

    indices: jax.Array
    values: Any
    shape: tuple[int, int] = _static()
    grid: tuple[int, int] = _static(default=(1, 1))
    layers: tuple[int, ...] | None = _static(default=None)
    axes: tuple[str | None, str | None] | None = _static(default=None)

    @property
    def block(self) -> tuple[int, int]:
        """(rows, columns) of one block."""
        return self.shape[0] // self.grid[0], self.shape[1] // self.grid[1]

    @property
    def block_axes(self) -> int:
        """Number of axes of ``indices`` that belong to one matrix: 1, or 3 with a block grid."""
        return 1 if self.grid == (1, 1) and self.axes is None else 3

    @property
    def stack_axes(self) -> int:
        """Number of axes of ``indices`` that are a stack of matrices."""
        return self.indices.ndim - self.block_axes

    def with_values(self, values: Any) -> "SparseDelta":
        """The same positions with other values."""
        return replace(self, values=values)

    def part(self, indices: jax.Array) -> "SparseDelta":
        """Some of the blocks, as a delta of the part of the weight that they make up; without values.

        Args:
            indices: Positions [*stack, ..., k] of a rectangle of blocks.
        """
        if self.block_axes == 1:
            return replace(self, indices=indices, values=None)
        (rows, columns), grid = self.block, indices.shape[-3:-1]
        return replace(
            self,
            indices=indices,
            values=None,
            shape=(rows * grid[0], columns * grid[1]),
            grid=grid,
            axes=(None, None),
        )

    def sort(self) -> "SparseDelta":
        """The same entries with ascending positions."""
        order = jnp.argsort(self.indices, axis=-1)
        take = partial(jnp.take_along_axis, indices=order, axis=-1)
        return replace(
            self,
            indices=take(self.indices),
            values=None if self.values is None else take(self.values),
        )

    def coordinates(self) -> tuple[jax.Array, jax.Array]:
        """Row and column in the matrix of each entry, int32, shaped like ``indices``.

        Unused slots get a row past the last one, so that a scatter can drop and a gather can fill them.
        """
        block_rows, block_columns = self.block
        rows, columns = divided(self.indices, block_columns)
        if self.block_axes == 3:
            unused = self.indices >= block_rows * block_columns
            grid_rows = jnp.arange(self.grid[0], dtype=jnp.int32)[:, None, None]
            grid_columns = jnp.arange(self.grid[1], dtype=jnp.int32)[:, None]
            rows = jnp.where(unused, self.shape[0], rows + grid_rows * block_rows)
            columns = columns + grid_columns * block_columns
        return rows, columns


def divided(positions: jax.Array, width: int) -> tuple[jax.Array, jax.Array]:
    """Row and column of flat positions. Positions are not negative, so no rounding has to be mended."""
    divisor = jnp.array(width, positions.dtype)
    return lax.div(positions, divisor), lax.rem(positions, divisor)


def stack_layers(parts: Sequence[SparseDelta], layers: int) -> SparseDelta:
    """Joins deltas on different layers of one stack into one delta on all of them.

    Differentiable in the values. Layers of no part have unused slots only, and so have layers whose part has
    fewer entries than another.

    Args:
        parts: Deltas of one stacked weight with disjoint ``layers``; values may be absent in all.
        layers: Matrices in the stack, L.

    Returns:
        A delta with indices [L, ..., k] for the largest k.
    """
    first = parts[0]
    slots = max(part.indices.shape[-1] for part in parts)
    shape = (layers, *first.indices.shape[1:-1], slots)
    indices = jnp.full(shape, first.block[0] * first.block[1], jnp.int32)
    values = None if first.values is None else jnp.zeros(shape, first.values.dtype)
    for part in parts:
        at = (jnp.array(part.layers), ..., slice(part.indices.shape[-1]))
        indices = indices.at[at].set(part.indices)
        values = None if values is None else values.at[at].set(part.values)
    return replace(first, indices=indices, values=values, layers=None)


def _per_matrix(
    function: Callable[..., jax.Array], delta: SparseDelta, *arrays: jax.Array
) -> Callable[[jax.Array], jax.Array]:
    """Maps ``function(matrix, rows, columns, *arrays)`` over the stack axes of a weight."""
    coordinates = delta.coordinates()

    def apply(weight: jax.Array) -> jax.Array:
        mapped = function
        for _ in range(delta.stack_axes):
            mapped = jax.vmap(mapped)
        return mapped(weight, *coordinates, *arrays)

    return apply


def gather(weight: jax.Array | Stored, delta: SparseDelta, *, transposed: bool = False) -> jax.Array:
    """Entries of ``weight`` at the positions of ``delta``; 0 in unused slots.

    Args:
        weight: [*stack, rows, columns].
        delta: Its positions; values are not read.
        transposed: Whether ``weight`` is given as [*stack, columns, rows]; not where it is spread over
            devices, nor for a stored one.

    Returns:
        Shaped like ``delta.indices``, dtype of ``weight``.

    Example:
        >>> gather(jnp.arange(6.0).reshape(2, 3), SparseDelta(jnp.array([5, 1]), None, shape=(2, 3))).tolist()
        [5.0, 1.0]
    """

    def entries(matrix: jax.Array, rows: jax.Array, columns: jax.Array) -> jax.Array:
        return entries_at(matrix, (columns, rows) if transposed else (rows, columns))

    def taken(weight: jax.Array | Stored, indices: jax.Array) -> jax.Array:
        part = delta.part(indices)
        if is_stored(weight):
            return _gather_matrix_by_matrix(weight, part)
        if delta.layers is not None:
            weight = weight[jnp.array(delta.layers)]
        return _per_matrix(entries, part)(weight)

    return on_blocks(taken, delta.axes, delta.stack_axes, weight, delta.indices)


def _matrices(weight: Any, delta: SparseDelta) -> tuple[Any, jax.Array, jax.Array]:
    """The weight as [M, rows, columns], which of these are adapted [A], and their positions [A, ...]."""
    matrices = one_stack(weight)
    numbers = jnp.arange(matrices.shape[0]) if delta.layers is None else jnp.array(delta.layers)
    return matrices, numbers, delta.indices.reshape(-1, *delta.indices.shape[delta.stack_axes :])


def _gather_matrix_by_matrix(weight: Stored, delta: SparseDelta) -> jax.Array:
    """For what is not differentiated: coordinates of all entries of a stack can be as large as the stack."""
    matrices, numbers, indices = _matrices(weight, delta)

    def one(item: tuple[jax.Array, jax.Array]) -> jax.Array:
        number, positions = item
        place = replace(delta, indices=positions, layers=None).coordinates()
        return entries_at(matrices, (number, *place))

    return lax.map(one, (numbers, indices)).reshape(delta.indices.shape)


def set_entries(weight: Any, delta: SparseDelta, entries: jax.Array) -> Any:
    """``weight`` with the entries at the positions of ``delta`` replaced, in place where donated.

    Args:
        weight: [*stack, rows, columns], an array or a writable stored weight.
        delta: Positions; unused slots are skipped.
        entries: Shaped like ``delta.indices``; cast to the dtype of ``weight``.

    Returns:
        The new weight, same shape, dtype and kind.

    Raises:
        TypeError: If the weight is stored in a way in which entries cannot be set.
    """

    def changed(weight: Any, indices: jax.Array, entries: jax.Array) -> Any:
        part = delta.part(indices)
        if part.stack_axes or part.layers is not None:
            return _set_matrix_by_matrix(weight, part, entries)
        return with_entries(weight, part.coordinates(), entries)

    entries = entries.astype(weight.dtype)
    return on_blocks(changed, delta.axes, delta.stack_axes, weight, delta.indices, entries)


def _set_matrix_by_matrix(weight: Any, delta: SparseDelta, entries: jax.Array) -> Any:
    """One matrix at a time: coordinates of all entries of a stack can be as large as the stack."""
    matrices, numbers, indices = _matrices(weight, delta)
    entries = entries.reshape(indices.shape)
    array = not is_stored(weight)
    narrow = array and jnp.issubdtype(weight.dtype, jnp.floating) and weight.dtype.itemsize < 4

    def one(slot: jax.Array, matrices: Any) -> Any:
        number, place = numbers[slot], replace(delta, indices=indices[slot], layers=None).coordinates()
        if not narrow:
            return with_entries(matrices, (number, *place), entries[slot])
        # XLA's CPU backend upcasts the whole operand of a 16-bit scatter
        matrix = lax.dynamic_index_in_dim(matrices, number, keepdims=False)
        matrix = with_entries(matrix, place, entries[slot])
        return lax.dynamic_update_index_in_dim(matrices, matrix, number, 0)

    changed = lax.fori_loop(0, indices.shape[0], one, matrices)
    return jax.tree.map(lambda new, old: new.reshape(old.shape), changed, weight)


def merged_entries(base: jax.Array, values: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """``base + values`` in float32 or better, rounded once, to the dtype of the weight."""
    wide = jnp.promote_types(jnp.promote_types(base.dtype, values.dtype), jnp.float32)
    return (base.astype(wide) + values.astype(wide)).astype(dtype)


def merge(params: Any, deltas: Mapping[str, SparseDelta]) -> Any:
    r"""Adds sparse deltas to the weights they belong to (SpIEL, equation 1).

    $$
    W'_{i_j} = W_{i_j} + \delta_j, \qquad W' = W \text{ elsewhere}
    $$

    Differentiable in the deltas' values (a gather of the weight's cotangent) and in ``params``. The sum is
    formed in float32 or better and rounded once to the dtype of the weight.

    Args:
        params: Any pytree of arrays and stored weights, which are not differentiated; weights are
            [*stack, rows, columns].
        deltas: Target name to ``SparseDelta``; the name is the dotted path of the leaf.

    Returns:
        The pytree with merged weights. In the place of a stored weight that cannot be written exactly is the
        array that it dequantises to, merged.

    Raises:
        KeyError: If a name is no leaf of ``params``.

    Example:
        >>> delta = SparseDelta(jnp.array([1, 2]), jnp.array([0.5, -1.0]), shape=(2, 2))
        >>> merge({"w": jnp.zeros((2, 2))}, {"w": delta})["w"]
        Array([[ 0. ,  0.5],
               [-1. ,  0. ]], dtype=float32)
    """

    def add(weight: jax.Array | Stored, delta: SparseDelta) -> jax.Array | Stored:
        weight = weight if is_writable(weight) else as_array(weight)
        entries = merged_entries(gather(weight, delta), delta.values, weight.dtype)
        return set_entries(weight, delta, entries)

    return edit(params, {name: partial(add, delta=delta) for name, delta in deltas.items()})


def base_entries(params: Any, deltas: Mapping[str, SparseDelta]) -> dict[str, jax.Array]:
    """The weights' entries at the positions of ``deltas``: what ``unmerge`` needs, taken before a merge.

    Returns:
        Target name to array shaped like the delta's indices, in the dtype of the weight.

    Raises:
        KeyError: If a name is no leaf of ``params``.

    Example:
        >>> delta = SparseDelta(jnp.array([3, 0]), None, shape=(2, 2))
        >>> base_entries({"w": jnp.array([[1.0, 2.0], [3.0, 4.0]])}, {"w": delta})["w"].tolist()
        [4.0, 1.0]
    """
    taken = {}

    def take(weight: jax.Array | Stored, name: str, delta: SparseDelta) -> jax.Array | Stored:
        taken[name] = gather(weight, delta)
        return weight

    edit(params, {name: partial(take, name=name, delta=delta) for name, delta in deltas.items()})
    return taken


def unmerge(params: Any, deltas: Mapping[str, SparseDelta], base: Mapping[str, jax.Array]) -> Any:
    """Puts the pretrained entries back, bit for bit.

    Args:
        params: Merged parameters. (Of a stored weight that cannot be written they hold an array.)
        deltas: The positions that were merged; values are not read.
        base: The pretrained entries there, from ``base_entries``.

    Returns:
        The pytree with pretrained weights.

    Raises:
        KeyError: If a name is no leaf of ``params``.

    Example:
        >>> params = {"w": jnp.array([[0.1, 0.2], [0.3, 0.4]], jnp.bfloat16)}
        >>> deltas = {"w": SparseDelta(jnp.array([1, 2]), jnp.array([0.5, -1.0]), shape=(2, 2))}
        >>> base = base_entries(params, deltas)
        >>> bool((unmerge(merge(params, deltas), deltas, base)["w"] == params["w"]).all())
        True
    """
    return edit(
        params,
        {name: partial(set_entries, delta=delta, entries=base[name]) for name, delta in deltas.items()},
    )
