"""Exact selection over active and dense entries, without sorting anything dense.

Every function works on one matrix (or one block of it): positions are flat and row-major, int32, and
``size`` (the number of entries, one past the last position) marks an unused slot. Ties are broken towards
the lowest position, so a result never depends on the order of the slots. The number ``n`` of entries to
choose may be traced; the number of slots that hold the answer is static.

The k-th largest magnitude is found by bisection on the bit pattern of the floats: the bits of non-negative
IEEE floats, read as integers, are ordered as the floats are, so 31 counts (15 in bfloat16, 63 in float64)
decide exactly.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from spiel_jax.errors import SpielError

_SHIFT = 5  # positions are not negative: shifts and masks in the place of slower floor divisions
_BLOCK = 1 << _SHIFT  # entries per block of the two-level compaction
_SAMPLE = 61  # one entry in so many is sampled for the first bound; prime, so that it visits all columns
_ENTRIES_AT_A_TIME = 2**18  # of small blocks
_MARGIN = 3.0  # standard deviations of a sampled count by which the first bound is kept low


def _bits_dtype(dtype: jnp.dtype) -> jnp.dtype:
    return jnp.dtype(f"int{8 * jnp.dtype(dtype).itemsize}")


def _bisect(enough: Callable[[jax.Array], jax.Array], low: jax.Array, high: jax.Array) -> jax.Array:
    """Largest integer t in [low, high] with ``enough(t)``, a predicate that is true up to some t."""

    def narrow(bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds
        middle = low + (high - low) // 2 + (high - low) % 2
        good = enough(middle)
        return jnp.where(good, middle, low), jnp.where(good, high, middle - 1)

    return lax.while_loop(lambda bounds: bounds[0] < bounds[1], narrow, (low, high))[0]


def largest_threshold(enough: Callable[[jax.Array], jax.Array], dtype: Any) -> jax.Array:
    """Largest t of a dtype, 0 to infinity, with ``enough(t)``, a predicate that is true up to some t.

    >>> float(largest_threshold(lambda t: t * t <= 9, jnp.float32))
    3.0
    """
    bits = _bits_dtype(dtype)
    infinity = lax.bitcast_convert_type(jnp.array(jnp.inf, dtype), bits)
    found = _bisect(lambda t: enough(lax.bitcast_convert_type(t, dtype)), jnp.zeros((), bits), infinity)
    return lax.bitcast_convert_type(found, dtype)


def _bisect_ties(enough: Callable[[jax.Array], jax.Array], high: jax.Array) -> jax.Array:
    """``_bisect`` from 0 where the answer mostly is ``high``, as of ties that are all chosen: asked first."""
    return _bisect(enough, jnp.where(enough(high), high, 0), high)


def _count(condition: jax.Array) -> jax.Array:
    # XLA's CPU backend fuses short rows into their sums, but writes the operand of one long sum to memory as
    # integers; the barrier keeps it from joining the two sums.
    flat = condition.reshape(-1)
    whole = flat.size // _BLOCK * _BLOCK
    rows = jnp.sum(flat[:whole].reshape(-1, _BLOCK), axis=1, dtype=jnp.int32)
    rest = jnp.sum(flat[whole:], dtype=jnp.int32)
    return jnp.sum(lax.optimization_barrier(rows), dtype=jnp.int32) + rest


def kth_largest(entries: jax.Array, n: jax.Array | int, without: jax.Array | None = None) -> jax.Array:
    """The n-th largest magnitude of floats; NaN entries are left out.

    Args:
        entries: Floats of any shape; NaN marks an entry that cannot be chosen.
        n: How many entries are wanted, at least 1; may be traced.
        without: Those of the ``entries`` that cannot be chosen either, or None.

    Returns:
        Scalar of the dtype of ``entries``: the largest t with ``count(|entries| >= t) >= n``, and 0 where
        fewer than n entries can be chosen.
    """

    def enough(threshold: jax.Array) -> jax.Array:
        # two comparisons: |entries| would be taken out of the loop, and be a second dense array
        reach = lambda x: _count((x >= threshold) | (x <= -threshold))  # noqa: E731
        return reach(entries) - (0 if without is None else reach(without)) >= n

    return largest_threshold(enough, entries.dtype)


def largest(scores: jax.Array, positions: jax.Array, n: jax.Array | int) -> jax.Array:
    """Marks the n entries of largest score; equal scores: lowest position first.

    Args:
        scores: [K] non-negative floats; NaN marks a slot that cannot be chosen.
        positions: [K] int32, distinct where the score is not NaN, non-negative.
        n: How many to mark; may be traced. Fewer are marked where fewer are not NaN.

    Returns:
        [K] bool.

    Example:
        >>> largest(jnp.array([3.0, 1.0, 3.0, 2.0]), jnp.array([9, 4, 2, 7]), 1)
        Array([False, False,  True, False], dtype=bool)
    """
    threshold = kth_largest(scores, jnp.maximum(n, 1))
    above = scores > threshold
    tied = scores == threshold
    # Among the ties, the lowest positions: again a bisection, on the positions themselves.
    missing = jnp.maximum(n - _count(above), 0)
    reach = jnp.max(jnp.where(tied, positions, -1), initial=-1)
    last = _bisect_ties(lambda t: _count(tied & (positions < t)) <= missing, reach + 1)
    return above | (tied & (positions < last))


def drop(values: jax.Array, indices: jax.Array, n: jax.Array | int, size: int) -> jax.Array:
    """Marks the n active entries that moved least: those of smallest ``|value|`` (paper, section 3.1).

    Args:
        values: [K] deltas.
        indices: [K] int32 positions; ``size`` in unused slots, which go first, in their order.
        n: How many to drop, at most K; may be traced.
        size: Number of entries of the matrix.

    Returns:
        [K] bool, true for a dropped slot.

    Example:
        >>> drop(jnp.array([0.3, -0.1, 0.2]), jnp.array([0, 5, 7]), 1, 8)
        Array([False,  True, False], dtype=bool)
    """
    # The n smallest are what the K - n largest leave. Ties must fall to the lowest position among the
    # dropped, so the order of positions is mirrored for the kept.
    unused = indices >= size
    moved = jnp.where(jnp.isnan(values), jnp.inf, jnp.abs(values))  # exactly n, whatever the values
    moved = jnp.where(unused, jnp.nan, moved)
    keeps = values.size - jnp.maximum(n, _count(unused))
    first = jnp.cumsum(unused, dtype=jnp.int32) <= n
    return jnp.where(unused, first, ~largest(moved, size - indices, keeps))


def _bitset(members: jax.Array, size: int) -> jax.Array:
    """Words of 32 bits, [size / 32 + 1] uint32, that have a bit for each of ``members`` below ``size``."""
    words = jnp.zeros((size // _BLOCK + 1,), jnp.uint32)
    bit = jnp.left_shift(jnp.uint32(1), (members & (_BLOCK - 1)).astype(jnp.uint32))
    word = jnp.where(members < size, members >> _SHIFT, words.size)
    return words.at[word].add(bit, mode="drop")  # members are distinct: adding their bits is "or"


def _in_bitset(words: jax.Array, positions: jax.Array) -> jax.Array:
    found = words.at[positions >> _SHIFT].get(mode="fill", fill_value=0)
    return (jnp.right_shift(found, (positions & (_BLOCK - 1)).astype(jnp.uint32)) & 1) == 1


def isin(positions: jax.Array, members: jax.Array, size: int) -> jax.Array:
    """Whether each of ``positions`` [K] is one of ``members`` [M], through a set of size / 8 bytes.

    Args:
        positions: [K] int32; one that is not below ``size`` is no member.
        members: [M] int32, distinct; those not below ``size`` are ignored.
        size: Number of entries of the matrix.

    Returns:
        [K] bool.
    """
    return _in_bitset(_bitset(members, size), positions) & (positions < size)


def compact(mask: jax.Array, payload: jax.Array, slots: int, fill: int) -> jax.Array:
    """The entries of ``payload`` [K] where ``mask`` [K], in order, in the first of ``slots`` slots."""
    rank = jnp.cumsum(mask, dtype=jnp.int32) - 1
    empty = jnp.full((slots,), fill, payload.dtype)
    return empty.at[jnp.where(mask, rank, slots)].set(payload, mode="drop")


class Replacement(NamedTuple):
    """What a reselection did to the slots of one matrix.

    Attributes:
        indices: [K] int32, the positions after it; a kept entry stays in its slot.
        replaced: [K] bool, the slots that hold a new position.
        source: [K] int32, for a replaced slot the slot of ``incoming`` that it took.
    """

    indices: jax.Array
    replaced: jax.Array
    source: jax.Array


def replace_dropped(indices: jax.Array, dropped: jax.Array, incoming: jax.Array, size: int) -> Replacement:
    """Puts grown positions into the slots of dropped ones.

    An entry that is both dropped and grown is left entirely alone. The others are paired in the order of
    their slots.

    Args:
        indices: [K] int32, active positions.
        dropped: [K] bool.
        incoming: [C] int32, grown positions, as many as are dropped; ``size`` in unused slots.
        size: Number of entries of the matrix.

    Returns:
        A ``Replacement``.
    """
    leaving = dropped & ~isin(indices, incoming, size)
    entering = (incoming < size) & ~isin(incoming, jnp.where(dropped, indices, size), size)
    count = indices.size
    order = compact(entering, jnp.arange(incoming.size, dtype=jnp.int32), count, incoming.size)
    rank = jnp.cumsum(leaving, dtype=jnp.int32) - 1
    source = jnp.where(leaving, order[jnp.maximum(rank, 0)], incoming.size)
    new = incoming.at[source].get(mode="fill", fill_value=size)
    return Replacement(jnp.where(leaving, new, indices), leaving, source)


def _marks(chosen: jax.Array) -> jax.Array:
    """[N] bool as words of 32 bits, [N / 32] uint32; N is a multiple of 32."""
    bits = jnp.left_shift(jnp.uint32(1), jnp.arange(_BLOCK, dtype=jnp.uint32))
    # distinct bits: their sum is "or"
    return jnp.sum(jnp.where(chosen.reshape(-1, _BLOCK), bits[None], 0), axis=1, dtype=jnp.uint32)


def _positions(marks: jax.Array, slots: int) -> jax.Array:
    """Ascending positions of the bits of ``marks`` [W] in ``slots`` slots, 32 W as filler."""
    counts = lax.population_count(marks).astype(jnp.int32)
    ends = jnp.cumsum(counts)
    starts = ends - counts
    # word of each slot: mark the first slot of every word with bits, then spread by a running maximum
    firsts = jnp.zeros((slots,), jnp.int32)
    firsts = firsts.at[jnp.where(counts > 0, starts, slots)].set(
        jnp.arange(marks.size, dtype=jnp.int32), mode="drop"
    )
    word = lax.cummax(firsts)
    slot = jnp.arange(slots, dtype=jnp.int32)
    offset = _nth_bit(marks[word], slot - starts[word])
    return jnp.where(slot < ends[-1], word * _BLOCK + offset, marks.size * _BLOCK)


def _nth_bit(words: jax.Array, rank: jax.Array) -> jax.Array:
    """Place, int32, of the bit of each word that ``rank`` bits precede."""
    place = jnp.zeros_like(rank)
    for width in (16, 8, 4, 2, 1):
        low = words & jnp.uint32((1 << width) - 1)
        below = lax.population_count(low).astype(jnp.int32)
        higher = rank >= below
        rank = jnp.where(higher, rank - below, rank)
        words = jnp.where(higher, words >> width, low)
        place = jnp.where(higher, place + width, place)
    return place


def _top_exact(flat: jax.Array, k: int, exclude: jax.Array | None, excluded: jax.Array) -> jax.Array:
    """Positions of the k largest magnitudes by bisection over all entries: always right, 31 passes.

    ``excluded`` [N / 32] has a bit for each of ``exclude``.
    """
    without = None if exclude is None else flat.at[exclude].get(mode="fill", fill_value=jnp.nan)
    threshold = kth_largest(flat, k, without)
    above = _marks((flat > threshold) | (flat < -threshold)) & ~excluded
    tied = _marks((flat == threshold) | (flat == -threshold)) & ~excluded
    slot = jnp.arange(k, dtype=jnp.int32)
    count = jnp.sum(lax.population_count(above), dtype=jnp.int32)
    ties = _positions(tied, k)
    return jnp.sort(jnp.where(slot < count, _positions(above, k), ties[jnp.maximum(slot - count, 0)]))


def _sampling(k: int) -> tuple[int, int]:
    """Rank in the sample of a bound that about all of the k largest pass, and room for all that pass it.

    Of the k largest entries about k / 61 are in the sample, give or take the root of that.
    """
    rank = k / _SAMPLE
    rank += _MARGIN * rank**0.5 + 1
    return int(rank), int((rank + _MARGIN * rank**0.5 + 1) * _SAMPLE) + _BLOCK


def top_magnitudes(dense: jax.Array, k: int, exclude: jax.Array | None = None) -> jax.Array:
    """Positions of the k entries of largest magnitude, exactly; ties: lowest position first.

    A bound from a sample of the entries cuts the matrix down to little more than k of them, in one pass that
    leaves a bit per entry, and the exact bisection runs on those; where the bound turns out too high or too
    low (a count tells), the bisection runs on all entries. No dense temporary, nothing dense is sorted.

    Args:
        dense: Floats of any shape. NaN entries are never chosen.
        k: How many, static.
        exclude: [A] distinct positions that must not be chosen, or None; ``dense.size`` in unused slots.

    Returns:
        [k] int32, ascending; ``dense.size`` in the last slots where fewer than k entries can be chosen.

    Raises:
        SpielError: If ``dense`` has too many entries for int32 positions.

    Example:
        >>> top_magnitudes(jnp.array([[1.0, -4.0], [3.0, 2.0]]), 2, exclude=jnp.array([1]))
        Array([2, 3], dtype=int32)
    """
    size = dense.size
    if size > jnp.iinfo(jnp.int32).max - _BLOCK:  # positions in the padding must fit too
        raise SpielError(f"{size} entries do not fit int32 positions: use a finer block grid")
    flat = dense.reshape(-1)
    if size % _BLOCK:
        flat = jnp.pad(flat, (0, -size % _BLOCK), constant_values=jnp.nan)
    if k == 0:
        return jnp.zeros((0,), jnp.int32)

    excluded = jnp.zeros((flat.size // _BLOCK,), jnp.uint32)
    if exclude is not None:
        excluded = _bitset(exclude, size)[: excluded.size]
    all_entries = partial(_top_exact, flat, k, exclude, excluded)

    rank, room = _sampling(k)
    if room >= size // 2:  # too small a matrix for a sample to save anything
        return jnp.minimum(all_entries(), size)

    places = jnp.arange(0, flat.size, _SAMPLE, dtype=jnp.int32)
    bound = kth_largest(jnp.where(_in_bitset(excluded, places), jnp.nan, flat[::_SAMPLE]), rank)
    marks = _marks((flat >= bound) | (flat <= -bound)) & ~excluded
    count = jnp.sum(lax.population_count(marks), dtype=jnp.int32)

    def few() -> jax.Array:
        positions = _positions(marks, room)
        entries = jnp.abs(flat.at[positions].get(mode="fill", fill_value=jnp.nan))
        chosen = largest(entries, positions, k)
        return compact(chosen, positions, k, size)

    fits = (count >= k) & (count <= room)
    return jnp.minimum(lax.cond(fits, few, all_entries), size)


def top_in_blocks(
    matrix: jax.Array, block: tuple[int, int], k: int, exclude: jax.Array | None = None
) -> jax.Array:
    """``top_magnitudes`` of each block of a matrix; small blocks several at a time.

    Args:
        matrix: [R, C] floats.
        block: (rows, columns) of a block; they divide those of the matrix.
        k: How many of each, static.
        exclude: [blocks, A] positions in each block, or None.

    Returns:
        [R / rows, C / columns, k] int32, positions in the block.

    Example:
        >>> top_in_blocks(jnp.array([[1.0, -4.0, 2.0, 0.0]]), (1, 2), 1).tolist()
        [[[1], [0]]]
    """
    grid = matrix.shape[0] // block[0], matrix.shape[1] // block[1]
    size = block[0] * block[1]

    def one(item: tuple[jax.Array, jax.Array | None]) -> jax.Array:
        return top_magnitudes(item[0], k, item[1])

    if grid == (1, 1):  # a loop would copy the block
        return one((matrix, None if exclude is None else exclude[0])).reshape(1, 1, k)
    blocks = matrix.reshape(grid[0], block[0], grid[1], block[1]).swapaxes(1, 2).reshape(-1, size)
    together = at_a_time(blocks.shape[0], size, _ENTRIES_AT_A_TIME)
    return lax.map(one, (blocks, exclude), batch_size=together).reshape(*grid, k)


def at_a_time(number: int, size: int, most: int) -> int | None:
    """How many of so many things of a size to treat together, as ``lax.map`` takes it: a divisor.

    >>> at_a_time(6, 10, 45), at_a_time(6, 10, 15)
    (3, None)
    """
    limit = max(1, min(number, most // max(size, 1)))
    together = max(n for n in range(1, limit + 1) if number % n == 0)
    return together if together > 1 else None


def top_products(
    row: jax.Array,
    column: jax.Array,
    n: jax.Array | int,
    slots: int,
    exclude: jax.Array,
    combine: Callable[[jax.Array, jax.Array], jax.Array] = jnp.multiply,
) -> jax.Array:
    """Positions of the n largest ``row[i] * column[j]`` outside ``exclude``; ties: lowest position first.

    The [R, C] matrix of products is never formed. With the columns sorted, the products of a row that
    reach a threshold are a prefix, because rounding is monotone; so one count takes R binary searches.
    The threshold is bisected on such counts (less the excluded ones), then the prefixes are enumerated.
    Of the products equal to the threshold only the rows up to the one in which n is reached are listed,
    so that the list has at most ``slots + A + C`` entries, however many ties there are.

    Args:
        row: [R] non-negative finite floats.
        column: [C] non-negative finite floats, same dtype.
        n: How many, at most ``slots`` and at most what is not excluded; may be traced.
        slots: Static size of the answer.
        exclude: [A] distinct positions that must not be chosen; R * C in unused slots.
        combine: The score of (i, j) from ``row[i]`` and ``column[j]``: monotone in both, such as
            ``jnp.multiply`` (the paper's choice) or ``jnp.minimum`` (SM3's own bound).

    Returns:
        [slots] int32: n positions in no particular order, then R * C in the unused slots.

    Example:
        >>> top_products(jnp.array([1.0, 2.0]), jnp.array([3.0, 1.0]), 1, 1, jnp.array([2]))
        Array([0], dtype=int32)
    """
    rows, columns = row.size, column.size
    size = rows * columns
    order = jnp.argsort(-column, stable=True).astype(jnp.int32)
    ordered = column[order]
    steps = columns.bit_length()

    def prefix(reaches: Callable[[jax.Array], jax.Array]) -> jax.Array:
        """[R] number of leading columns, in descending order, whose score ``reaches`` the threshold."""
        length = jnp.zeros((rows,), jnp.int32)
        for step in reversed(range(steps)):
            longer = length + (1 << step)
            score = combine(row, ordered[jnp.minimum(longer, columns) - 1])
            length = jnp.where((longer <= columns) & reaches(score), longer, length)
        return length

    width = jnp.array(columns, exclude.dtype)
    exclude_row = jnp.minimum(lax.div(exclude, width), rows - 1)
    excluded = combine(row[exclude_row], column[lax.rem(exclude, width)])  # [A]
    excluded = jnp.where(exclude < size, excluded, -1)  # an unused slot reaches no threshold

    def enough(threshold: jax.Array) -> jax.Array:
        reached = jnp.sum(prefix(lambda score: score >= threshold), dtype=jnp.int32)
        return reached - _count(excluded >= threshold) >= n

    threshold = largest_threshold(enough, row.dtype)

    above = prefix(lambda score: score > threshold)  # [R]
    reached = prefix(lambda score: score >= threshold)
    chosen_above = jnp.sum(above, dtype=jnp.int32) - _count(excluded > threshold)
    excluded_ties = jnp.zeros((rows,), jnp.int32).at[exclude_row].add(excluded == threshold)
    ties = jnp.cumsum(reached - above - excluded_ties, dtype=jnp.int32)  # [R], up to and with the row
    missing = n - chosen_above  # ties to take, lowest positions first
    last_row = _count(ties < missing)  # the row in which they are complete
    numbers = jnp.arange(rows, dtype=jnp.int32)
    lengths = jnp.where((numbers <= last_row) & (missing > 0), reached, above)

    listed = slots + exclude.size + columns
    ends = jnp.cumsum(lengths)
    starts = ends - lengths
    marks = jnp.zeros((listed,), jnp.int32)
    marks = marks.at[jnp.where(lengths > 0, starts, listed)].set(numbers, mode="drop")
    listed_row = lax.cummax(marks)
    slot = jnp.arange(listed, dtype=jnp.int32)
    live = slot < ends[-1]
    listed_column = order[jnp.clip(slot - starts[listed_row], 0, columns - 1)]
    position = jnp.where(live, listed_row * columns + listed_column, size)

    chosen = live & ~isin(position, exclude, size)
    tied = chosen & (combine(row[listed_row], column[listed_column]) == threshold)
    # The last row may hold more ties than are missing: cut it off by position.
    cut = _bisect_ties(lambda t: _count(tied & (position < t)) <= missing, jnp.array(size, jnp.int32))
    return compact(chosen & (~tied | (position < cut)), position, slots, size)
