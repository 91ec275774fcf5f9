"""Sums, differences and parts of sparse adapters: exact on positions, and in time of their entries.

Weights are matched by name. A position that an adapter has no entry at counts as zero there. Numbers are
formed in float64 and rounded once, to float32.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import reduce

import numpy as np

from spiel_jax.adapters.adapter import Adapter, AdapterError, Origin
from spiel_jax.adapters.base import differing_bases
from spiel_jax.adapters.entries import Entries
from spiel_jax.adapters.sparse_adapter import SparseAdapter


def weighted_sum(
    adapters: Sequence[Adapter], weights: Sequence[float] | None = None, *, any_base: bool = False
) -> SparseAdapter:
    """The sum of adapters, each times its weight, with entries wherever one of them has any.

    Args:
        adapters: One or more, sparse, of one base model.
        weights: One for each; default: 1.
        any_base: Take them even if they are of different base models.

    Raises:
        AdapterError: If one is not sparse, their base models differ, or a number leaves float32.

    Example:
        >>> one, two = (
        ...     SparseAdapter({"w.weight": Entries((2, 3), np.array(at), np.ones(2, "float32"))})
        ...     for at in ([0, 4], [4, 5])
        ... )
        >>> found = weighted_sum([one, two], [1, -3]).entries["w.weight"]
        >>> found.positions.tolist(), found.values.tolist()
        ([0, 4, 5], [1.0, -2.0, -3.0])
    """
    sparse = _compatible(adapters, any_base)
    factors = _factors(sparse, weights)

    def summed(positions: np.ndarray, values: np.ndarray, has: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        del has
        return positions, (factors[:, None] * values).sum(axis=0)

    return _each_weight(sparse, summed)


def add(*adapters: Adapter, any_base: bool = False) -> SparseAdapter:
    """The sum of adapters; see ``weighted_sum``."""
    return weighted_sum(adapters, any_base=any_base)


def subtract(first: Adapter, second: Adapter, *, any_base: bool = False) -> SparseAdapter:
    """The first adapter less the second; where they agree, entries of zero stay. See ``weighted_sum``."""
    return weighted_sum([first, second], [1, -1], any_base=any_base)


def scale(adapter: Adapter, factor: float) -> SparseAdapter:
    """An adapter times a number; see ``weighted_sum``."""
    return weighted_sum([adapter], [factor])


def ties(
    adapters: Sequence[Adapter],
    weights: Sequence[float] | None = None,
    *,
    density: float | None = None,
    any_base: bool = False,
) -> SparseAdapter:
    """Merges adapters by the sign that they elect at each position (TIES, Yadav et al. 2023, section 4).

    Each is pruned, then every position takes the sign of the sum, and the mean of those entries, times their
    weights, that have it. Zeros have no vote and are in no mean; positions with nothing else have no entry.

    Args:
        adapters: Two or more, sparse, of one base model.
        weights: One for each; default: 1.
        density: Share of each weight that is left of each adapter first (see ``prune``); default: all.
        any_base: Take them even if they are of different base models.

    Raises:
        AdapterError: See ``weighted_sum``; if no entry is left.
    """
    sparse = _compatible(adapters, any_base)
    factors = _factors(sparse, weights)
    if density is not None:
        sparse = [prune(one, density, each=True) for one in sparse]

    def elected(positions: np.ndarray, values: np.ndarray, has: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        del has
        sign = np.where(values.sum(axis=0) >= 0, 1.0, -1.0)
        agree = np.sign(values) == sign
        votes = agree.sum(axis=0)
        total = (agree * values * factors[:, None]).sum(axis=0)
        return positions[votes > 0], total[votes > 0] / votes[votes > 0]

    return _each_weight(sparse, elected)


def intersect(first: Adapter, *others: Adapter, any_base: bool = False) -> SparseAdapter:
    """The entries of the first adapter at positions that all the others have too.

    Raises:
        AdapterError: If one is not sparse, their base models differ, or no position is shared.
    """

    def shared(positions: np.ndarray, values: np.ndarray, has: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        everywhere = has.all(axis=0)
        return positions[everywhere], values[0, everywhere]

    return _each_weight(_compatible([first, *others], any_base), shared)


def union(first: Adapter, *others: Adapter, any_base: bool = False) -> SparseAdapter:
    """The entries of all adapters; where several have a position, that of the earliest one.

    Raises:
        AdapterError: If one is not sparse, or their base models differ.
    """

    def joined(positions: np.ndarray, values: np.ndarray, has: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return positions, values[has.argmax(axis=0), np.arange(positions.size)]

    return _each_weight(_compatible([first, *others], any_base), joined)


def prune(adapter: Adapter, density: float, *, each: bool = False) -> SparseAdapter:
    """The entries of largest magnitude; of equal ones the earlier in their matrix, of the earlier matrix.

    Args:
        adapter: Sparse.
        density: Entries as a share of those of the weights that it changes, above 0 and at most 1.
        each: Whether each weight has this density; otherwise all together, as ``SparseAdapter.density``.

    Returns:
        An adapter of at most this density. It is the same one where it had no more.

    Raises:
        AdapterError: If the adapter is not sparse, or no entry is left.
    """
    (sparse,) = _compatible([adapter], True)
    if not 0 < density <= 1:
        raise AdapterError(f"density = {density}: expected a number above 0, at most 1")
    names = list(sparse.entries)
    groups = [[name] for name in names] if each else [names]
    kept: dict[str, Entries] = {}
    for group in groups:
        parts = [sparse.entries[name] for name in group]
        size = sum(rows * columns for rows, columns in (part.shape for part in parts))
        chosen = _largest(np.concatenate([np.abs(part.values) for part in parts]), _number(size, density))
        ends = np.cumsum([part.count for part in parts])
        for name, part, mask in zip(group, parts, np.split(chosen, ends[:-1]), strict=True):
            if mask.any():
                kept[name] = Entries(part.shape, part.positions[mask], part.values[mask])
    return _made(kept, sparse.origin)


def _number(size: int, density: float) -> int:
    """The most entries of so many that make no higher density; a product can come out one too few."""
    count = int(size * density)
    return count + 1 if (count + 1) / size <= density else count


def _largest(magnitudes: np.ndarray, count: int) -> np.ndarray:
    """Which are the ``count`` largest; of equal ones the first."""
    if count >= magnitudes.size:
        return np.ones(magnitudes.size, bool)
    if count == 0:
        return np.zeros(magnitudes.size, bool)
    least = np.partition(magnitudes, magnitudes.size - count)[magnitudes.size - count]
    chosen = magnitudes > least
    equal = np.flatnonzero(magnitudes == least)
    chosen[equal[: count - np.count_nonzero(chosen)]] = True
    return chosen


def overlap(adapters: Sequence[Adapter], *, any_base: bool = False) -> dict[str, np.ndarray]:
    """How much of adapters is common, for every two of them.

    Args:
        adapters: N of them, sparse, of one base model.
        any_base: Take them even if they are of different base models.

    Returns:
        "shared" [N, N] positions that both have, int64, on the diagonal those of each; "cosine" [N, N] of
        the angle between them as vectors of all entries of the model, 0 where one is zero.

    Raises:
        AdapterError: If one is not sparse, or their base models differ.
    """
    sparse = _compatible(adapters, any_base)
    shared = np.zeros((len(sparse), len(sparse)), np.int64)
    products = np.zeros(shared.shape)
    for _, positions, values, has in _aligned(sparse):
        del positions
        counts = has.astype(np.float64)
        shared += (counts @ counts.T).astype(np.int64)
        products += values @ values.T
    norms = np.sqrt(np.diag(products))
    scales = np.outer(norms, norms)
    cosine = np.divide(products, scales, out=np.zeros_like(products), where=scales > 0)
    return {"shared": shared, "cosine": np.clip(cosine, -1, 1)}


Choice = Callable[[np.ndarray, np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]
"""Positions [p], the values there of n adapters [n, p] float64 and whether they have entries [n, p], to
positions and values of the result."""


def _each_weight(adapters: Sequence[SparseAdapter], choice: Choice) -> SparseAdapter:
    entries = {}
    for shape, (name, *aligned) in _shaped(adapters):
        positions, values = choice(*aligned)
        with np.errstate(over="ignore"):
            rounded = values.astype(np.float32)
        if positions.size:
            try:
                entries[name] = Entries(shape, positions, rounded)
            except AdapterError as error:
                raise AdapterError(f"{name}: {error}") from error
    return _made(entries, reduce(_common, [one.origin for one in adapters]))


def _made(entries: Mapping[str, Entries], origin: Origin) -> SparseAdapter:
    if not entries:
        raise AdapterError("no entry is left")
    return SparseAdapter(dict(entries), origin)


def _shaped(adapters: Sequence[SparseAdapter]) -> Iterator[tuple[tuple[int, int], tuple]]:
    shapes = {name: shape for one in adapters for name, shape in one.shapes.items()}
    for name, *aligned in _aligned(adapters):
        yield shapes[name], (name, *aligned)


def _aligned(
    adapters: Sequence[SparseAdapter],
) -> Iterator[tuple[str, np.ndarray, np.ndarray, np.ndarray]]:
    """Of each weight its name, all positions [p] ascending, the adapters' values [n, p] and who has any."""
    names = dict.fromkeys(name for one in adapters for name in one.entries)
    for name in names:
        parts = {number: one.entries[name] for number, one in enumerate(adapters) if name in one.entries}
        positions = reduce(np.union1d, [part.positions for part in parts.values()])
        values = np.zeros((len(adapters), positions.size))
        has = np.zeros(values.shape, bool)
        for number, part in parts.items():
            place = np.searchsorted(positions, part.positions)
            values[number, place], has[number, place] = part.values, True
        yield name, positions, values, has


def _factors(adapters: Sequence[Adapter], weights: Sequence[float] | None) -> np.ndarray:
    factors = np.ones(len(adapters)) if weights is None else np.asarray(weights, np.float64)
    if factors.shape != (len(adapters),) or not np.isfinite(factors).all():
        raise AdapterError(
            f"weights = {factors.tolist()}: expected {len(adapters)} finite numbers, one for each adapter"
        )
    return factors


def _compatible(adapters: Sequence[Adapter], any_base: bool) -> list[SparseAdapter]:
    """The adapters, which must be sparse, on one base model, and for weights of one shape."""
    sparse: list[SparseAdapter] = []
    shapes: dict[str, tuple[int, int]] = {}
    for one in adapters:
        if not isinstance(one, SparseAdapter):
            raise AdapterError(f"an adapter is {one.kind}: expected sparse ones, which have entries")
        if sparse and not any_base and (problem := differing_bases(sparse[0].origin, one.origin)):
            raise AdapterError(f"adapters of different base models: {problem}")
        for name, shape in one.shapes.items():
            if shapes.setdefault(name, shape) != shape:
                raise AdapterError(
                    f"{name} is {list(shapes[name])} for one adapter, {list(shape)} for another"
                )
        sparse.append(one)
    if not sparse:
        raise AdapterError("there are no adapters: expected one or more")
    return sparse


def _common(one: Origin, other: Origin) -> Origin:
    """Where something made of two adapters comes from: what holds for both."""
    config = {key: value for key, value in one.config.items() if other.config.get(key, ...) == value}
    step = one.step if one == other else None
    return Origin(one.base or other.base, one.fingerprint or other.fingerprint, config, step)
