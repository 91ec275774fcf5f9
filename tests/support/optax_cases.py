"""A table of transformations, and a regression on dense weights that any of them can train."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import spiel_jax as sj

TARGETS = {"one": sj.Target((5, 7), 12), "stack": sj.Target((4, 6), 8, stack=(2,))}
PLAN = sj.Reselection(11, every=4, accumulation=3, rate=sj.constant(0.5), first=None)
STEPS = PLAN.total_steps + 1
SHAPES = {name: (*target.stack, *target.shape) for name, target in TARGETS.items()}


class Method(NamedTuple):
    """A transformation and what it needs besides gradients."""

    tx: Any
    needs: str | None = None  # "candidates", "active" positions, or nothing


class Lowest(NamedTuple):
    """A growth criterion that compiles fast: the lowest positions that are not active."""

    uses_candidates: bool = False

    def init(self, targets, values):
        return dict.fromkeys(targets, ())

    def observe(self, stats, seen):
        return stats

    def available(self, stats, indices, target):
        return indices.size

    def incoming(self, stats, indices, dropped, n, target):
        inactive = jnp.ones(target.block_size, bool).at[indices].set(False)
        lowest = jnp.nonzero(inactive, size=indices.size, fill_value=target.block_size)[0]
        return jnp.where(jnp.arange(indices.size) < n, lowest, target.block_size).astype(jnp.int32)

    def seed(self, stats, source):
        return {}

    def clear(self, stats, targets):
        return stats


def around(inner, growth=None, targets=TARGETS):
    return sj.spiel(inner, targets, growth=growth or Lowest(), schedule=PLAN)


METHODS = {
    "spiel_ag": lambda **options: Method(
        sj.spiel_ag(0.1, TARGETS, schedule=PLAN, clip_norm=3.0, **options), "candidates"
    ),
    "spiel_ma": lambda **options: Method(sj.spiel_ma(0.3, TARGETS, schedule=PLAN, clip_norm=3.0, **options)),
    "adamw, AG": lambda: Method(around(optax.adamw(0.1), sj.AccumulatedGradients(ratio=0.5)), "candidates"),
    "schedule-free": lambda: Method(around(optax.contrib.schedule_free_adamw(0.1))),
    "scale_by_aged_adam": lambda: Method(optax.with_extra_args_support(sj.scale_by_aged_adam())),
    "scale_by_sparse_sm3": lambda: Method(sj.scale_by_sparse_sm3(TARGETS), "active"),
}
SPIEL = [name for name in METHODS if not name.startswith("scale_by")]


def weights(seed=0, dtype=jnp.float32):
    """Dense weights that the values should come near to: target name to [*stack, rows, columns]."""
    rng = np.random.default_rng(seed)
    return {name: jnp.array(rng.standard_normal(shape), dtype) for name, shape in SHAPES.items()}


def dense_gradient(values, active, goal):
    """Gradient of the squared distance of the merged values to ``goal``, at every entry."""
    zero = jax.tree.map(jnp.zeros_like, goal)
    merged = sj.merge(zero, {name: delta.with_values(values[name]) for name, delta in active.items()})
    return jax.tree.map(lambda w, g: (w - g).astype(g.dtype), merged, goal)


def gradients(values, state, goal, phase=None):
    """Gradients of the active entries and, for SpIEL-AG, candidates of the host's or the state's phase."""
    active = sj.deltas(values, state)
    dense = dense_gradient(values, active, goal)
    grads = {name: sj.gather(dense[name], delta) for name, delta in active.items()}
    stats = optax.tree.get(state, "growth")
    if not hasattr(next(iter(stats.values())), "grad_sum"):
        return grads, None
    counts = {name: known.indices.shape[-1] for name, known in stats.items()}
    proposed = sj.propose(dense, active, counts)
    starts = PLAN.proposes(optax.tree.get(state, "spiel_count") + 1)
    if phase is not None:
        starts = phase is sj.Phase.PROPOSE
    seen = {}
    for name, target in TARGETS.items():
        at = target.delta(jnp.where(starts, proposed[name].indices, stats[name].indices))
        seen[name] = at.with_values(sj.gather(dense[name], at))
    return grads, seen


# positions for the scalings, which do not choose any
FIXED = {
    name: target.delta(jnp.broadcast_to(jnp.arange(target.count), (*target.lead, target.count)))
    for name, target in TARGETS.items()
}


def step(method, values, state, goal, **extra):
    """One step of a user's loop around any of the methods."""
    if method.needs == "active" or optax.tree.get(state, "spiel_count") is None:
        dense = dense_gradient(values, FIXED, goal)
        grads = {name: sj.gather(dense[name], delta) for name, delta in FIXED.items()}
        extra |= {"active": FIXED} if method.needs == "active" else {}
    else:
        grads, seen = gradients(values, state, goal, extra.get("phase"))
        extra |= {} if seen is None else {"candidates": seen}
    updates, state = method.tx.update(grads, state, values, **extra)
    return optax.apply_updates(values, updates), state


def abstract(tree):
    """Shape, dtype and weakness of the type of each leaf."""
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.weak_type), tree)


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)
