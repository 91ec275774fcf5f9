"""The two aliases, and their parity option."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import spiel_jax as sj
from spiel_jax.optim.criteria.accumulated_gradients import AccumulatedGradients
from spiel_jax.optim.criteria.moment_approximation import MomentApproximation
from spiel_jax.optim.inner_optimizers import descend, scale_by_aged_adam, scale_by_sparse_sm3

TARGETS = {"w": sj.Target(shape=(6, 8), count=9)}
PLAN = sj.Reselection(8, every=4, accumulation=2)


def trajectory(tx, plan=PLAN, per_micro_batch=False):
    rng = np.random.default_rng(0)
    values = sj.zeros(TARGETS)
    state = tx.init(values)
    for step in range(1, 9):
        dense = {"w": jnp.array(rng.standard_normal((6, 8)), jnp.float32)}
        active = sj.deltas(values, state)
        grads = {"w": sj.gather(dense["w"], active["w"])}
        seen = sj.propose(dense, active, {"w": 9})["w"]
        if plan.estimates(step) and hasattr(optax.tree.get(state, "growth")["w"], "grad_sum"):
            seen = TARGETS["w"].delta(optax.tree.get(state, "growth")["w"].indices)
            seen = seen.with_values(sj.gather(dense["w"], seen))
        if per_micro_batch:
            seen = seen.with_values(seen.values[None])
        updates, state = tx.update(
            grads,
            state,
            values,
            candidates={"w": seen},
            phase=plan.phase(step),
            reselect=bool(plan.reselects(step)),
        )
        values = optax.apply_updates(values, updates)
    return values, state


def test_aliases_are_what_they_say():
    inner = optax.chain(scale_by_aged_adam(0.8, 0.9, 1e-5), descend(0.1, 0.01))
    long = sj.spiel(inner, TARGETS, growth=AccumulatedGradients(0.8, 0.9, 0.5), schedule=PLAN, seed=3)
    short = sj.spiel_ag(
        0.1, TARGETS, schedule=PLAN, b1=0.8, b2=0.9, eps=1e-5, weight_decay=0.01, candidate_ratio=0.5, seed=3
    )
    assert jax.tree.structure(long.init(sj.zeros(TARGETS))) == jax.tree.structure(
        short.init(sj.zeros(TARGETS))
    )
    inner = optax.chain(scale_by_sparse_sm3(TARGETS, 1e-5), descend(0.1, 0.01))
    growth = MomentApproximation(shared=True)
    long = sj.spiel(inner, TARGETS, growth=growth, schedule=PLAN, seed=3)
    short = sj.spiel_ma(0.1, TARGETS, schedule=PLAN, eps=1e-5, weight_decay=0.01, seed=3)
    jax.tree.map(np.testing.assert_array_equal, trajectory(long), trajectory(short))


def test_shared_accumulators_are_the_ones_it_would_keep():
    inner = optax.chain(scale_by_sparse_sm3(TARGETS), descend(0.1))
    one, other = (
        trajectory(sj.spiel(inner, TARGETS, growth=MomentApproximation(shared=shared), schedule=PLAN))
        for shared in (False, True)
    )
    jax.tree.map(np.testing.assert_array_equal, one, other)
    tx = sj.spiel(optax.sgd(0.1), TARGETS, growth=MomentApproximation(shared=True), schedule=PLAN)
    with pytest.raises(ValueError, match="the inner optimizer keeps none"):
        trajectory(tx)


def test_reference_differs_and_unknown_parity_is_refused():
    long = sj.Reselection(8, every=4, accumulation=2, long_phases=True)
    corrected, _ = trajectory(sj.spiel_ag(0.1, TARGETS, schedule=PLAN))
    reference, _ = trajectory(
        sj.spiel_ag(0.1, TARGETS, schedule=PLAN, parity="reference"), long, per_micro_batch=True
    )
    assert not np.array_equal(corrected["w"], reference["w"])
    with pytest.raises(ValueError, match="parity = 'exact': expected one of corrected, reference"):
        sj.spiel_ma(0.1, TARGETS, schedule=PLAN, parity="exact")
