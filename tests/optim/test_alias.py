"""The two aliases, and their parity option."""

from functools import partial

import jax
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
    state = jax.jit(tx.init)(values)
    growing = hasattr(optax.tree.get(state, "growth")["w"], "grad_sum")

    @partial(jax.jit, static_argnames=("phase", "reselect"))
    def step(values, state, dense, phase, reselect):
        active = sj.deltas(values, state)
        grads, seen = {"w": sj.gather(dense["w"], active["w"])}, None
        if growing:
            seen = sj.propose(dense, active, {"w": 9})["w"]
            if phase is sj.Phase.ESTIMATE:
                seen = TARGETS["w"].delta(optax.tree.get(state, "growth")["w"].indices)
                seen = seen.with_values(sj.gather(dense["w"], seen))
            seen = {"w": seen.with_values(seen.values[None]) if per_micro_batch else seen}
        updates, state = tx.update(grads, state, values, candidates=seen, phase=phase, reselect=reselect)
        return optax.apply_updates(values, updates), state

    for number in range(1, 9):
        dense = {"w": rng.standard_normal((6, 8)).astype(np.float32)}
        phase = plan.phase(number) if growing else sj.Phase.PLAIN
        values, state = step(values, state, dense, phase=phase, reselect=bool(plan.reselects(number)))
    return values, state


def test_aliases_are_what_they_say():
    inner = optax.chain(scale_by_aged_adam(0.8, 0.9, 1e-5), descend(0.1, 0.01))
    long = sj.spiel(inner, TARGETS, growth=AccumulatedGradients(0.8, 0.9, 0.5), schedule=PLAN, seed=3)
    short = sj.spiel_ag(
        0.1, TARGETS, schedule=PLAN, b1=0.8, b2=0.9, eps=1e-5, weight_decay=0.01, candidate_ratio=0.5, seed=3
    )
    assert jax.tree.structure(jax.eval_shape(long.init, sj.zeros(TARGETS))) == jax.tree.structure(
        jax.eval_shape(short.init, sj.zeros(TARGETS))
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


@pytest.mark.slow  # tests/optim/test_parity.py tells it too
def test_reference_differs_and_unknown_parity_is_refused():
    long = sj.Reselection(8, every=4, accumulation=2, long_phases=True)
    corrected, _ = trajectory(sj.spiel_ag(0.1, TARGETS, schedule=PLAN))
    reference, _ = trajectory(
        sj.spiel_ag(0.1, TARGETS, schedule=PLAN, parity="reference"), long, per_micro_batch=True
    )
    assert not np.array_equal(corrected["w"], reference["w"])
    with pytest.raises(ValueError, match="parity = 'exact': expected one of corrected, reference"):
        sj.spiel_ma(0.1, TARGETS, schedule=PLAN, parity="exact")
