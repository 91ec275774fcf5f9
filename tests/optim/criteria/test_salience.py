"""Largest gradients, GEM, TaLoS: what they choose, in a model's step, against dense gradients in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import mesh_cases
from support.mesh_cases import CONFIG, adapted, batch

import spiel_jax as sj
from spiel_jax.losses.next_token import Objective
from spiel_jax.methods.sparse import SparseMethod
from spiel_jax.optim.criteria.accumulated_gradients import CandidateStats
from spiel_jax.optim.criteria.salience import GradientOverWeight, LowSensitivity
from spiel_jax.optim.criteria.static import FirstGradients

OBJECTIVE = Objective(CONFIG, loss_chunk=16)
ONE = jnp.ones((), jnp.int32)


def chosen(growth, stats, weights, n, target):
    @jax.jit
    def incoming(stats, weights):
        seen = growth.survey({"w": stats}, {"w": weights}, {"w": target})["w"]
        return growth.incoming(seen, jnp.arange(n), jnp.ones(n, bool), n, target)

    return sorted(incoming(stats, weights).tolist())[:n]


def test_by_hand():
    target = sj.Target((2, 3), 2)
    sums = jnp.array([3.0, -2.0, 1.0, 0.5])
    stats = CandidateStats(jnp.array([0, 2, 3, 5]), sums, jnp.array([9.0, 1.0, 4.0, 16.0]), ONE, ONE)
    weights = jnp.array([[6.0, 9.0, 1.0], [4.0, 9.0, 0.1]])  # ratios 0.5, 2, 0.25 and 5
    assert chosen(GradientOverWeight(), stats, weights, 2, target) == [2, 5]
    assert chosen(LowSensitivity(), stats, weights, 2, target) == [2, 3]  # sums of squares 1 and 4


@pytest.mark.parametrize("kind", [FirstGradients, GradientOverWeight, LowSensitivity])
def test_in_a_step_they_choose_by_the_dense_scores(kind):
    """A phase of two steps at a learning rate of 0, so that its gradients are those of one model."""
    growth = kind(ratio=2.0)
    targets = adapted({}, (r".*\.up_proj\.weight",), num_tunable=300)
    plan = sj.Reselection(2, 2, 2, sj.constant(0.0), first=1.0)
    tx = sj.spiel(sj.aged_adamw(0.0), targets, growth=growth, schedule=plan)
    training = SparseMethod(OBJECTIVE, tx, targets, growth, schedule=plan)
    params = mesh_cases.pretrained()
    state, grads = jax.jit(training.init)(params), []
    step = jax.jit(
        lambda s, b, phase, reselect: training.step(s, b, phase=phase, reselect=reselect),
        static_argnames=("phase", "reselect"),
    )

    @jax.jit
    def dense(params, flat):
        return jax.grad(lambda p: OBJECTIVE(p, flat) / flat["weights"].sum())(params)

    for number in (1, 2):
        phase, reselect = training.step_kind(number)
        state, _ = step(state, batch(number), phase=phase, reselect=reselect)
        flat = {name: array.reshape(-1, array.shape[-1]) for name, array in batch(number).items()}
        grads.append(dense(params, flat))
    for name, delta in sj.deltas(state.trainable, state.opt_state, sort=True).items():
        count = delta.indices.shape[-1]
        for layer in range(CONFIG.num_layers):
            first, second = (np.asarray(g[name][layer], np.float64).ravel() for g in grads)
            weight = np.asarray(params[name][layer], np.float64).ravel()
            if kind is GradientOverWeight:
                proposed = np.argsort(-np.abs(first / weight))[: 2 * count]
                score = np.abs((first + second) / weight)
            elif kind is FirstGradients:
                proposed = np.argsort(-np.abs(first))[: 2 * count]
                score = np.abs(first + second)
                assert set(proposed[:count]) != set(proposed[np.argsort(-score[proposed])[:count]])
            else:
                proposed = np.argsort(np.abs(first))[: 2 * count]
                score = -(first**2 + second**2)
            expected = proposed[np.argsort(-score[proposed])[:count]]
            found = np.asarray(delta.indices[layer])
            assert len(set(found) & set(expected)) >= count - 2  # gradients that are equal but for rounding


@pytest.mark.slow
@pytest.mark.parametrize("growth", [GradientOverWeight(), LowSensitivity()])
def test_on_a_mesh_they_choose_the_same(growth):
    runs = [
        mesh_cases.run(mesh_cases.method(adapted(), growth), mesh_cases.mesh_of(*mesh), steps=2)
        for mesh in ((1, 1, 1), (2, 2, 2))
    ]
    one, other = (mesh_cases.positions(state) for state, _ in runs)
    same = [np.mean(np.sort(one[name], -1) == np.sort(other[name], -1)) for name in one]
    assert min(same) > 0.98
