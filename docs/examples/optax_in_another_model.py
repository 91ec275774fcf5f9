"""SpIEL-AG in a training loop of one's own, around a Flax model that knows nothing of it.

A network that has learnt one task is tuned, by 20% of its entries, to another. SpIEL-AG wants the gradients
of a few candidates besides those of the active entries; the host knows on which steps.
"""

from functools import partial

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import spiel_jax as sj

STEPS = 300
x = jax.random.normal(jax.random.key(0), (512, 8))
first_task, second_task = jnp.sin(x[:, :1]), jnp.sin(x[:, :1]) + 0.5 * jnp.cos(2 * x[:, 1:2])

model = nnx.Sequential(nnx.Linear(8, 64, rngs=nnx.Rngs(0)), jnp.tanh, nnx.Linear(64, 1, rngs=nnx.Rngs(1)))
graph, params = nnx.split(model)


def loss(params, task):
    """Mean squared error of the network."""
    return jnp.mean((nnx.merge(graph, params)(x) - task) ** 2)


def pretrained(params):
    """The parameters after plain Adam on the first task."""
    tx = optax.adam(0.01)

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(loss)(params, first_task), state)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(STEPS):
        params, state = step(params, state)
    return params


params = pretrained(params)

targets = sj.find_targets(params, density=0.2)
schedule = sj.Reselection(STEPS, every=20, accumulation=5)
tx = sj.spiel_ag(optax.cosine_decay_schedule(0.05, STEPS), targets, schedule=schedule, clip_norm=1.0)


def probed(values, probes, opt_state, candidates):
    """The loss with the deltas merged, and with zeros at the candidates, whose gradient is wanted."""
    merged = sj.merge(params, sj.deltas(values, opt_state))
    return loss(sj.merge(merged, {n: c.with_values(probes[n]) for n, c in candidates.items()}), second_task)


@partial(jax.jit, static_argnames=("phase", "reselect"))
def step(values, opt_state, phase, reselect):
    """One step: gradients of the active entries and, in a phase, of the candidates."""
    active, candidates = sj.deltas(values, opt_state), {}
    if phase is sj.Phase.PROPOSE:  # the largest dense gradients that are not active
        dense = jax.grad(loss)(sj.merge(params, active), second_task)
        candidates = sj.propose(dense, active, {name: t.block_count for name, t in targets.items()})
    elif phase is sj.Phase.ESTIMATE:  # the same entries again
        known = optax.tree.get(opt_state, "growth")
        candidates = {name: target.delta(known[name].indices) for name, target in targets.items()}
    probes = {name: jnp.zeros(c.indices.shape) for name, c in candidates.items()}
    before, (grads, seen) = jax.value_and_grad(probed, (0, 1))(values, probes, opt_state, candidates)
    candidates = {name: c.with_values(seen[name]) for name, c in candidates.items()}
    updates, opt_state = tx.update(
        grads, opt_state, values, candidates=candidates or None, phase=phase, reselect=reselect
    )
    return optax.apply_updates(values, updates), opt_state, before


values = sj.zeros(targets)
opt_state = tx.init(values)
for number in range(1, STEPS + 1):
    phase, reselect = schedule.phase(number), bool(schedule.reselects(number))
    values, opt_state, _ = step(values, opt_state, phase, reselect)

tuned = sj.merge(params, sj.deltas(values, opt_state))
print(loss(params, second_task), "->", loss(tuned, second_task))
