"""A budget for each matrix: a reselection drops and grows as many entries of it as it is told.

The other way is ``one_budget``.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from spiel_jax.ops.selection import drop, replace_dropped
from spiel_jax.optim.criteria.criterion import Criterion
from spiel_jax.sparse.delta import SparseDelta
from spiel_jax.sparse.matrices import map_matrices
from spiel_jax.sparse.targets import Target

Reselected = dict[str, tuple[jax.Array, jax.Array, dict[str, jax.Array]]]
"""Target name to new indices [..., k], which slots are replaced [..., k], and seeds of what grows."""


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
    """Drop and grow in every matrix (SpIEL, section 3.1).

    Args:
        active: Target name to the active positions.
        values: And to their values [..., k].
        updates: And to what the inner optimizer adds to them.
        stats: And to what ``growth`` knows, surveyed.
        scales: And to what the values are relative to where entries are dropped; empty for 1.
        counts: [targets] int32: how many of a matrix (or block) of each; less where fewer can grow.
        targets: What is adapted.
        growth: The criterion.
    """
    found = {}
    for position, (name, target) in enumerate(targets.items()):
        one = partial(reselect_matrix, n=counts[position], target=target, growth=growth)
        found[name] = map_matrices(
            one,
            active[name],
            active[name].indices,
            values[name],
            updates[name],
            stats[name],
            scales.get(name),
        )
    return found


def reselect_matrix(
    indices: jax.Array,
    values: jax.Array,
    updates: jax.Array,
    stats: Any,
    scale: jax.Array | None = None,
    *,
    n: jax.Array,
    target: Target,
    growth: Criterion,
) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
    """Drop and grow in one matrix: new indices [k], replaced [k], seeds."""
    moved: Any = optax.apply_updates(values, updates)  # here: not for all matrices at once
    n = jnp.minimum(n, growth.available(stats, indices, target))
    dropped = drop(moved if scale is None else moved / scale, indices, n, target.block_size)
    incoming = growth.incoming(stats, indices, dropped, n, target)
    new = replace_dropped(indices, dropped, incoming, target.block_size)
    if not isinstance(growth, Criterion):  # a class of one's own need not have what came later
        return new.indices, new.replaced, growth.seed(stats, new.source)
    return new.indices, new.replaced, growth.seed_at(stats, new.source, new.indices, target)
