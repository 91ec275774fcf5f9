"""LIFT in the step: the weights it looks at are the tuned ones, however they are held, on any mesh."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import mesh_cases
from support.mesh_cases import CONFIG, adapted, mesh_of
from support.programs import AS_USERS

import spiel_jax as sj
from spiel_jax.losses.next_token import Objective
from spiel_jax.methods.sparse import SparseMethod
from spiel_jax.models import abstract_params
from spiel_jax.models.storage import NF4
from spiel_jax.optim.criteria.lift import LowRankMagnitude, low_rank_positions

RULES = (r".*\.(o|up)_proj\.weight",)
LIFT = LowRankMagnitude(rank=4)
PLAN = sj.Reselection(4, 2, 2, sj.constant(1.0), first=None)


def method(targets, **options):
    tx = sj.spiel(sj.aged_adamw(0.1), targets, growth=LIFT, schedule=PLAN)
    return SparseMethod(Objective(CONFIG, loss_chunk=16), tx, targets, LIFT, schedule=PLAN, **options)


def test_it_looks_at_the_tuned_weights_merged_or_not():
    """Large deltas make entries principal that were not: both kinds of merges see them."""
    targets = adapted({}, RULES, num_tunable=600)
    params = mesh_cases.pretrained()
    found = []
    for in_place in (True, False):
        training = method(targets, in_place=in_place)
        state = jax.jit(training.init)(params)
        large = {name: jnp.where(value == 0, 3.0, 0.0) for name, value in state.trainable.items()}
        state = training.attach(params, large, state.opt_state)
        step = jax.jit(lambda s, b, t=training: t.step(s, b, phase=sj.Phase.PLAIN, reselect=True))
        new, metrics = step(state, mesh_cases.batch(0))
        found.append(sj.deltas(new.trainable, new.opt_state, sort=True))
        tuned = jax.jit(lambda p, d: low_rank_positions(sj.merge(p, d), targets, rank=4))(
            params, sj.deltas(large, state.opt_state)
        )
        for name, delta in found[-1].items():
            np.testing.assert_array_equal(delta.indices, tuned[name].indices)
        assert 0.1 < float(metrics["replaced"]) < 0.9  # some of what was there is principal now
    jax.tree.map(np.testing.assert_array_equal, *found)


@pytest.mark.slow
def test_on_a_mesh_it_chooses_the_same():
    growth = LIFT
    runs = [
        mesh_cases.run(mesh_cases.method(adapted(), growth), mesh_of(*mesh), steps=2)
        for mesh in ((1, 1, 1), (2, 2, 2))
    ]
    assert runs[0][1] == pytest.approx(runs[1][1], rel=1e-5)
    jax.tree.map(np.testing.assert_array_equal, *(mesh_cases.positions(state) for state, _ in runs))


@pytest.mark.parametrize("kind", [None, NF4])
def test_of_one_matrix_at_a_time_there_are_dense_copies(kind):
    def memory(layers):
        config = dataclasses.replace(CONFIG, num_layers=layers, hidden_size=128, intermediate_size=256)
        targets = adapted({}, (r".*\.up_proj\.weight",), config, 100 * layers)
        params = abstract_params(config, storage=kind)
        look = jax.jit(lambda p: low_rank_positions(p, targets, rank=4))
        held = look.lower(params).compile(AS_USERS).memory_analysis().temp_size_in_bytes
        return held / (4 * 128 * 256)

    few, many = memory(4), memory(12)
    assert few < 6  # its eigenvectors are half as large as the matrix
    assert abs(many - few) < 0.1
