"""The order of examples: shuffled by seed and epoch, and mixed from several sources.

All randomness comes from (seed, purpose, ...) through NumPy's SeedSequence, so any epoch's order is
known without going through those before it.
"""

from collections.abc import Sequence

import numpy as np

from spiel_jax.errors import SpielError

_HELDOUT, _SOURCE, _EPOCH = 1, 2, 3  # purposes of randomness


def heldout_mask(size: int, count: int, seed: int) -> np.ndarray:
    """Chooses ``count`` of ``size`` examples at random, as a mask bool [size]."""
    mask = np.zeros(size, bool)
    mask[np.random.default_rng([seed, _HELDOUT]).permutation(size)[:count]] = True
    return mask


def epoch_counts(sizes: Sequence[int], weights: Sequence[float] | None) -> list[int]:
    """How many examples of each source make an epoch; together as many as there are.

    Without weights, each source's own number. With weights, shares in proportion to them, rounded
    by largest remainders.

    Raises:
      SpielError: a weight is so small that its source gets no example.
    """
    if weights is None:
        return list(sizes)
    shares = np.asarray(weights, np.float64) / sum(weights) * sum(sizes)
    counts = np.floor(shares).astype(np.int64)
    largest = np.argsort(counts - shares, kind="stable")
    counts[largest[: sum(sizes) - counts.sum()]] += 1
    if counts.min() < 1:
        raise SpielError(
            f"weights {list(weights)} leave a source without an example in an epoch of "
            f"{sum(sizes)}: raise the smallest"
        )
    return counts.tolist()


def epoch_order(sizes: Sequence[int], counts: Sequence[int], seed: int, epoch: int) -> np.ndarray:
    """The examples of an epoch, int64 [sum(counts)], numbered through all sources.

    A source is a stream of passes, each its examples in a new random order, and every epoch takes
    its count from where the epoch before ended: no example of a source comes again before all of
    them came, within an epoch and across epochs. Then the epoch is shuffled.
    """
    first = np.cumsum([0, *sizes])
    parts = []
    for source, (size, count) in enumerate(zip(sizes, counts, strict=True)):
        begin, end = epoch * count, (epoch + 1) * count
        passes = range(begin // size, -(-end // size))
        stream = np.concatenate(
            [np.random.default_rng([seed, _SOURCE, source, p]).permutation(size) for p in passes]
        )
        skipped = begin - passes.start * size
        parts.append(first[source] + stream[skipped : skipped + count])
    return np.random.default_rng([seed, _EPOCH, epoch]).permutation(np.concatenate(parts))
