"""Since when the active entries are there, told from the ages that the inner optimizer keeps of them.

Nothing is kept for it. An entry that is replaced gets a fresh age, so that the count of steps less the age is
the step at which it came, and that is in every checkpoint.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from spiel_jax.optim.positions import active_positions
from spiel_jax.optim.schedules import Reselection
from spiel_jax.sparse.targets import Target, by_target

MOST = 32
"""Cohorts that are told apart at most; in a run of more reselections several in a row are one."""


def cohorts(
    opt_state: Any, targets: Mapping[str, Target], schedule: Reselection, first_age: int
) -> dict[int, jax.Array]:
    """The share of all entries that each cohort has: those that came with the same reselections.

    A skipped step ages no entry. An entry that lived through fewer than R of them is still told right, with R
    the steps between reselections; one that was there at the start, through fewer than there are steps up to
    the first. Where grown entries begin with the age of the phase, those of the start count as grown by the
    first reselection.

    Args:
        opt_state: State of ``spiel``, after a step that ends with a reselection.
        targets: What is adapted.
        schedule: When entries are reselected.
        first_age: The age that a grown entry begins with.

    Returns:
        The step of the first reselection that a cohort came with, 0 for the start, to a float32 scalar, 0
        for those to come. Empty where the inner optimizer keeps no ages.

    Example:
        >>> import spiel_jax as sj
        >>> targets, schedule = {"w": Target((4, 4), 2)}, Reselection(9, every=2, accumulation=1)
        >>> tx = sj.spiel(sj.aged_adamw(0.1), targets, growth=sj.RandomGrowth(), schedule=schedule)
        >>> values = sj.zeros(targets)
        >>> _, state = tx.update({"w": jnp.ones(2)}, tx.init(values), values)
        >>> {step: float(share) for step, share in cohorts(state, targets, schedule, 0).items()}
        {0: 0.0, 1: 1.0, 3: 0.0, 5: 0.0, 7: 0.0}
    """
    ages = optax.tree.get(opt_state, "age")
    if ages is None or not schedule.steps or not _counted(opt_state):
        return {}
    count, active = optax.tree.get(opt_state, "spiel_count"), active_positions(opt_state)
    width = -(-len(schedule.steps) // (MOST - 1))
    numbers = []
    for name, age in by_target(ages, targets).items():
        number = (count - age - schedule.accumulation + first_age) // schedule.every // width
        used = active[name].indices < targets[name].block_size
        numbers.append(jnp.where(used, jnp.maximum(number, -1), -2))
    total = sum(target.total for target in targets.values())

    def share(cohort: jax.Array) -> jax.Array:
        there = [jnp.sum(number == cohort, dtype=jnp.int32).astype(jnp.float32) for number in numbers]
        return jnp.sum(jnp.stack(there)) / total

    starts = [0, *schedule.steps[::width]]
    # one after the other: together they would be an array of entries times cohorts
    shares = lax.map(share, jnp.arange(-1, len(starts) - 1, dtype=jnp.int32))
    return {start: shares[position] for position, start in enumerate(starts)}


def _counted(opt_state: Any) -> bool:
    """Whether ages are counted, which the original implementation does in float32 only."""
    return all(leaf.dtype.itemsize >= 4 for leaf in jax.tree.leaves(optax.tree.get(opt_state, "mu")))
