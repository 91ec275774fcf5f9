"""The cohorts of entries are those that following every slot from step to step gives."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import spiel_jax as sj
from spiel_jax.optim import cohorts as module
from spiel_jax.optim.cohorts import cohorts

TARGETS = {"w": sj.Target((4, 6), 8, stack=(2,))}


def followed(growth, schedule, skip=()):
    """Shares of the cohorts after each reselection: as the ages tell them, and as each slot was followed."""
    target, rng = TARGETS["w"], np.random.default_rng(0)
    tx = sj.spiel(sj.aged_adamw(0.1), TARGETS, growth=growth, schedule=schedule)
    state, shape = tx.init(sj.zeros(TARGETS)), (2, target.count)
    born = np.zeros(shape, int)
    first_age = growth.first_age(schedule.accumulation)
    update, tell = jax.jit(tx.update), jax.jit(lambda state: cohorts(state, TARGETS, schedule, first_age))
    told, seen = [], []
    for step in range(1, schedule.total_steps + 1):
        if step in skip:  # as a step that is not finite is
            state = optax.tree.set(state, spiel_count=jnp.int32(step))
            continue
        before, extra = state.active["w"].indices, {}
        if growth.uses_candidates:
            known = state.growth["w"].indices
            if schedule.proposes(step):
                order = rng.random((2, target.block_size))
                np.put_along_axis(order, np.asarray(before), 2.0, axis=1)  # active ones are no candidates
                known = jnp.argsort(order)[:, : known.shape[1]]
            at = target.delta(known.astype(jnp.int32), jnp.array(rng.random(known.shape), jnp.float32))
            extra["candidates"] = {"w": at}
        # so that small ones, which are dropped, are among the old and the young
        values, grads = ({"w": jnp.array(rng.random(shape), jnp.float32)} for _ in "vg")
        _, state = update(grads, state, values, **extra)
        born[np.asarray(state.active["w"].indices != before)] = step
        if schedule.reselects(step):
            told.append({first: float(share) for first, share in tell(state).items() if share})
            seen.append({first: np.mean(born == first) for first in np.unique(born).tolist()})
    assert len(told) == len(schedule.steps) > 4
    assert max(map(len, seen)) > 3
    return told, seen


@pytest.mark.parametrize(
    ("growth", "schedule", "skip"),
    [
        (sj.AccumulatedGradients(), {"every": 4, "accumulation": 3}, ()),
        (sj.AccumulatedGradients(), {"every": 3, "accumulation": 3}, (8,)),
        (sj.RandomGrowth(), {"every": 4, "accumulation": 3, "first": None}, (6, 13)),
    ],
)
def test_ages_tell_the_cohorts(growth, schedule, skip):
    told, seen = followed(growth, sj.Reselection(20, rate=sj.constant(0.4), **schedule), skip)
    for ours, theirs in zip(told, seen, strict=True):
        assert ours == pytest.approx(theirs)


def test_several_reselections_are_one_cohort_where_there_are_many(monkeypatch):
    monkeypatch.setattr(module, "MOST", 4)
    schedule = sj.Reselection(20, every=3, accumulation=3, rate=sj.constant(0.4))
    told, seen = followed(sj.AccumulatedGradients(), schedule)
    starts = [0, 3, 9, 15]
    for ours, theirs in zip(told, seen, strict=True):
        joined = collections.Counter()
        for born, share in theirs.items():
            joined[max(start for start in starts if start <= born)] += share
        assert ours == pytest.approx(joined)


def test_unused_slots_are_in_no_cohort():
    targets = {"w": sj.Target((4, 6), 8)}
    schedule = sj.Reselection(4, every=2, accumulation=1, first=None)
    tx = sj.spiel(sj.aged_adamw(0.1), targets, growth=sj.RandomGrowth(), schedule=schedule)
    state = tx.init(sj.zeros(targets))
    active = state.active["w"]
    emptied = active.indices.at[:3].set(targets["w"].block_size)
    state = state._replace(active={"w": targets["w"].delta(emptied)})
    assert sum(map(float, cohorts(state, targets, schedule, 0).values())) == 5 / 8


@pytest.mark.parametrize(
    "inner",
    [
        sj.sparse_sm3(0.1, TARGETS),  # keeps none
        sj.aged_adamw(0.1, low_precision=True),  # does not count them in bfloat16
    ],
)
def test_without_ages_there_are_no_cohorts(inner):
    schedule = sj.Reselection(4, every=2, accumulation=1)
    tx = sj.spiel(inner, TARGETS, growth=sj.RandomGrowth(), schedule=schedule)
    state = tx.init(sj.zeros(TARGETS, "bfloat16"))
    assert cohorts(state, TARGETS, schedule, 0) == {}
