"""One budget for all matrices: a reselection drops and grows wherever it does the most.

What an entry is dropped by, and what it grows by, is compared across matrices. Each matrix then drops its
smallest and grows its largest, as it does alone, but as many as its share of all comes to, as far as it has
slots for them. The other way is ``own_budgets``.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from spiel_jax.ops.selection import drop, largest, largest_threshold, replace_dropped
from spiel_jax.optim.criteria.criterion import Criterion
from spiel_jax.optim.own_budgets import Reselected
from spiel_jax.sparse.delta import SparseDelta
from spiel_jax.sparse.matrices import map_matrices
from spiel_jax.sparse.targets import Target

Numbers = dict[str, jax.Array]
"""Target name to a number for each of its matrices (or blocks), int32 [...]."""


def shares(scores: Mapping[str, jax.Array], n: jax.Array | int, rooms: Numbers | None = None) -> Numbers:
    """How many each matrix has of the n largest scores of all.

    Where a matrix has no room for more, the next largest of others take the place. Equal scores: the first
    targets first, and of each the first matrices.

    Args:
        scores: Target name to non-negative floats [..., C]; NaN marks what cannot be chosen.
        n: How many; may be traced. Fewer where fewer can be chosen.
        rooms: The most of each matrix, or None.

    Example:
        >>> scores = {"a": jnp.array([[5.0, 4.0], [1.0, 0.5]]), "b": jnp.array([3.0, 2.0])}
        >>> {name: found.tolist() for name, found in shares(scores, 3).items()}
        {'a': [2, 0], 'b': 1}
        >>> rooms = {"a": jnp.array([1, 1]), "b": jnp.array(1)}
        >>> {name: found.tolist() for name, found in shares(scores, 3, rooms).items()}
        {'a': [1, 1], 'b': 1}
    """
    dtype = jnp.result_type(*scores.values())

    def reached(threshold: jax.Array, *, tied: bool) -> Numbers:
        """Of each matrix, those above the threshold, or equal to it too, as far as there is room."""
        found = {
            name: jnp.sum(one >= threshold if tied else one > threshold, axis=-1, dtype=jnp.int32)
            for name, one in scores.items()
        }
        return found if rooms is None else {name: jnp.minimum(found[name], rooms[name]) for name in found}

    threshold = largest_threshold(lambda t: total(reached(t, tied=True)) >= jnp.maximum(n, 1), dtype)
    above, most = reached(threshold, tied=False), reached(threshold, tied=True)
    missing = jnp.maximum(n - total(above), 0)
    chosen = {}
    for name, number in above.items():
        ties = most[name] - number
        before = jnp.cumsum(ties.reshape(-1), dtype=jnp.int32).reshape(ties.shape) - ties
        chosen[name] = number + jnp.clip(missing - before, 0, ties)
        missing = jnp.maximum(missing - jnp.sum(ties, dtype=jnp.int32), 0)
    return {name: jnp.where(n > 0, number, 0) for name, number in chosen.items()}


def total(numbers: Numbers) -> jax.Array:
    """The sum over all matrices of all targets, int32."""
    return sum((jnp.sum(one, dtype=jnp.int32) for one in numbers.values()), jnp.zeros((), jnp.int32))


def reselect(
    active: Mapping[str, SparseDelta],
    values: Mapping[str, jax.Array],
    updates: Mapping[str, jax.Array],
    stats: Mapping[str, Any],
    scales: Mapping[str, jax.Array],
    *,
    counts: jax.Array,
    targets: Mapping[str, Target],
    growth: Criterion,
) -> Reselected:
    """Drop and grow with one budget.

    As many grow as are dropped, and what an earlier reselection could not place. A slot whose entry went to
    another matrix is replaced by an unused one.

    Args:
        active: See ``own_budgets.reselect``, as for what is not told here.
        values: See there.
        updates: See there.
        stats: See there.
        scales: See there.
        counts: [1] int32: how many of all; less where fewer can grow.
        targets: See there.
        growth: One that ``can_share_budget``.
    """
    moved, there, free = {}, {}, {}
    for name, target in targets.items():
        indices = active[name].indices
        moved[name] = _moved(values[name], updates[name], scales.get(name), indices < target.block_size)
        there[name] = jnp.sum(indices < target.block_size, axis=-1, dtype=jnp.int32)
        available = partial(_available, target=target, growth=growth)
        free[name] = map_matrices(available, active[name], stats[name], indices)

    entries = total(there)
    n = jnp.minimum(counts[0], jnp.minimum(entries, total(free)))
    kept = shares(moved, entries - n)
    leave = {name: there[name] - kept[name] for name in targets}
    dropped, proposed, scores = {}, {}, {}
    for name, target in targets.items():
        one = partial(_proposals, target=target, growth=growth)
        dropped[name], proposed[name], scores[name] = map_matrices(
            one, active[name], active[name].indices, moved[name], stats[name], leave[name]
        )

    budget = sum(target.total for target in targets.values())
    rooms = {name: target.block_count - kept[name] for name, target in targets.items()}
    come = shares(scores, budget - (entries - n), rooms)
    found = {}
    for name, target in targets.items():
        one = partial(_replaced, target=target, growth=growth)
        found[name] = map_matrices(
            one,
            active[name],
            active[name].indices,
            dropped[name],
            proposed[name],
            scores[name],
            stats[name],
            jnp.maximum(come[name] - leave[name], 0),
            come[name],
        )
    return found


def _moved(values: jax.Array, updates: jax.Array, scale: jax.Array | None, used: jax.Array) -> jax.Array:
    """By what entries are dropped: how far they moved; NaN in slots that are not used, and only there."""
    new: Any = optax.apply_updates(values, updates)
    far = jnp.abs(new if scale is None else new / scale)
    return jnp.where(used, jnp.where(jnp.isnan(far), jnp.inf, far), jnp.nan)


def _available(stats: Any, indices: jax.Array, *, target: Target, growth: Criterion) -> jax.Array:
    # of all entries of all matrices the sum would not fit
    return jnp.minimum(growth.available(stats, indices, target), indices.size).astype(jnp.int32)


def _proposals(
    indices: jax.Array, moved: jax.Array, stats: Any, n: jax.Array, *, target: Target, growth: Criterion
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """In one matrix: the n entries to drop [k], and what could grow, positions and scores [C]."""
    size = target.block_size
    used = indices < size
    slots = n + jnp.sum(~used, dtype=jnp.int32)  # unused ones go first
    dropped = drop(moved, indices, slots, size) & used
    return dropped, *growth.proposals(stats, indices, dropped, target)


def _replaced(
    indices: jax.Array,
    dropped: jax.Array,
    proposed: jax.Array,
    scores: jax.Array,
    stats: Any,
    more: jax.Array,
    n: jax.Array,
    *,
    target: Target,
    growth: Criterion,
) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
    """In one matrix: new indices, replaced, seeds; n grow, ``more`` of them in slots that were unused."""
    size = target.block_size
    unused = indices >= size
    filled = unused & (jnp.cumsum(unused, dtype=jnp.int32) <= more)
    incoming = jnp.where(largest(scores, proposed, n), proposed, size)
    new = replace_dropped(indices, dropped | filled, incoming, size)
    return new.indices, new.replaced, growth.seed_at(stats, new.source, new.indices, target)
