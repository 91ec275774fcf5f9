"""A growth criterion of one's own, with candidates: the steadiest gradients grow.

SpIEL-AG grows the candidates of largest ``|sum of gradients|``. This one divides by the root of the sum of
squares: a small gradient that always has the same sign comes before a large one that changes it.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

import spiel_jax as sj

STEPS = 200


class Seen(NamedTuple):
    """Statistics of one target; c candidates per matrix."""

    indices: jax.Array  # int32 [*stack, c]; the number of entries marks none
    total: jax.Array  # [*stack, c] sum of gradients
    squares: jax.Array  # [*stack, c]


@dataclass(frozen=True)
class Steady(sj.Criterion):
    """Grows the candidates of largest ``|sum g| / sqrt(sum g^2)``."""

    ratio: int = 2  # candidates per active entry

    @property
    def uses_candidates(self):
        """It looks at gradients of entries that are not active."""
        return True

    def count(self, target):
        """Candidates of one matrix."""
        return min(self.ratio * target.block_count, target.block_size)

    def known(self, stats):
        """Where gradients are wanted again."""
        return stats.indices

    def init(self, targets, values):
        """No candidates."""
        del values
        return {name: self._none(target) for name, target in targets.items()}

    def _none(self, target):
        shape = (*target.lead, self.count(target))
        return Seen(jnp.full(shape, target.block_size), jnp.zeros(shape), jnp.zeros(shape))

    def observe(self, stats, seen):
        """Starts afresh on a proposing step, adds on an estimating one."""
        if seen.candidates is None:
            return stats
        return {name: self._added(old, seen.candidates[name], seen) for name, old in stats.items()}

    def _added(self, old, candidates, seen):
        g = candidates.values
        fresh = Seen(candidates.indices, g, g**2)
        more = Seen(old.indices, old.total + g, old.squares + g**2)
        later = jax.tree.map(lambda new, old: jnp.where(seen.estimates, new, old), more, old)
        return jax.tree.map(lambda new, old: jnp.where(seen.proposes, new, old), fresh, later)

    def available(self, stats, indices, target):
        """All candidates: none of them is active."""
        del indices
        return jnp.sum(stats.indices < target.block_size)

    def incoming(self, stats, indices, dropped, n, target):
        """The n steadiest, in the first n of the slots."""
        del dropped
        score = jnp.abs(stats.total) / jnp.sqrt(stats.squares + 1e-30)
        order = jnp.argsort(-jnp.where(stats.indices < target.block_size, score, -1))[: indices.size]
        return jnp.where(jnp.arange(indices.size) < n, stats.indices[order], target.block_size)

    def clear(self, stats, targets):
        """Forgets the candidates."""
        return {name: self._none(target) for name, target in targets.items()}


# Noisy examples of a function, and a random network: the hidden weight and the output are tuned sparsely.
x = jax.random.normal(jax.random.key(0), (512, 8))
y = jnp.sin(x[:, :1]) + 0.1 * jax.random.normal(jax.random.key(1), (512, 1))
params = {"hidden": jax.random.normal(jax.random.key(2), (64, 8)) / 3, "out": jnp.ones((1, 64)) / 8}


def loss(params, rows):
    """Mean squared error on some of the examples."""
    return jnp.mean((jnp.tanh(x[rows] @ params["hidden"].T) @ params["out"].T - y[rows]) ** 2)


targets = sj.find_targets(params, density=0.1)
growth, schedule = Steady(), sj.Reselection(STEPS)
inner = sj.aged_adamw(optax.cosine_decay_schedule(0.05, STEPS))  # any optimizer whose state is per entry
tx = sj.spiel(inner, targets, growth=growth, schedule=schedule, clip_norm=1.0)


@jax.jit
def step(values, opt_state, rows):
    """One step; phase and reselection follow from the count in the state."""
    active = sj.deltas(values, opt_state)
    dense = jax.grad(loss)(sj.merge(params, active), rows)
    grads = {name: sj.gather(dense[name], delta) for name, delta in active.items()}
    starts = schedule.proposes(optax.tree.get(opt_state, "spiel_count") + 1)
    stats = optax.tree.get(opt_state, "growth")
    proposed = sj.propose(dense, active, {name: growth.count(target) for name, target in targets.items()})
    candidates = {}
    for name, target in targets.items():
        at = target.delta(jnp.where(starts, proposed[name].indices, growth.known(stats[name])))
        candidates[name] = at.with_values(sj.gather(dense[name], at))
    updates, opt_state = tx.update(grads, opt_state, values, candidates=candidates)
    return optax.apply_updates(values, updates), opt_state


everything = jnp.arange(512)
values = sj.zeros(targets)
opt_state = tx.init(values)
for key in jax.random.split(jax.random.key(3), STEPS):
    values, opt_state = step(values, opt_state, jax.random.choice(key, everything, (128,)))
print(loss(params, everything), "->", loss(sj.merge(params, sj.deltas(values, opt_state)), everything))
