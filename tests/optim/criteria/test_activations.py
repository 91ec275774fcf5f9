"""Criteria of activations: by hand, and in the step of a model against what NumPy sees of a layer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import mesh_cases
from support.mesh_cases import CONFIG, adapted, batch

import spiel_jax as sj
from spiel_jax.losses.next_token import Objective
from spiel_jax.methods.sparse import SparseMethod
from spiel_jax.optim.criteria.activations import LargestOutputs, WeightTimesInput

PLAN = sj.Reselection(2, 2, 2, sj.constant(0.0), first=1.0)
Q = "model.layers.self_attn.q_proj.weight"


def test_by_hand():
    target = sj.Target((2, 3), 3)
    weights = {"w": jnp.array([[3.0, -1.0, 0.5], [2.0, 2.0, -4.0]])}
    x = jnp.array([[1.0, 3.0, 0.0], [0.0, 4.0, 1.0]])
    growth = WeightTimesInput()
    sums = growth.watch(x, weights["w"])
    assert sums.tolist() == [1.0, 25.0, 1.0]  # scores [3, 5, 0.5], [2, 10, 4]
    assert growth.survey({"w": sums}, weights, {"w": target})["w"].tolist() == [1, 4, 5]
    growth = LargestOutputs()
    sums = growth.watch(x, weights["w"])
    assert sums.tolist() == [0.0 + 3.5, 8.0 + 4.0]
    assert growth.survey({"w": sums}, weights, {"w": target})["w"].tolist() == [3, 4, 5]
    assert growth.survey({"w": sums}, weights, {"w": sj.Target((2, 3), 4)})["w"].tolist() == [0, 3, 4, 5]


def inputs_of_the_first_layer(params, data):
    """[tokens, hidden]: what q_proj of layer 0 is given."""
    x = np.asarray(params["model.embed_tokens.weight"], np.float64)[np.asarray(data["tokens"]).ravel()]
    scale = np.asarray(params["model.layers.input_layernorm.weight"][0], np.float64)
    return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + CONFIG.rms_norm_eps) * scale


@pytest.mark.parametrize("growth", [WeightTimesInput(), LargestOutputs()])
def test_in_a_step_they_see_the_layers(growth):
    """Two micro-batches a step, of which the sums are over both, and over both steps of the phase."""
    targets = adapted({}, (r".*\.q_proj\.weight",), num_tunable=3 * 64)
    tx = sj.spiel(sj.aged_adamw(0.0), targets, growth=growth, schedule=PLAN)
    training = SparseMethod(Objective(CONFIG, loss_chunk=16), tx, targets, growth, schedule=PLAN)
    params = mesh_cases.pretrained()
    state = mesh_cases.after_phase(training, params)
    x = np.concatenate([inputs_of_the_first_layer(params, batch(number, 2)) for number in (1, 2)])
    weight = np.asarray(params[Q][0], np.float64)
    if isinstance(growth, WeightTimesInput):
        scores = np.abs(weight) * np.linalg.norm(x, axis=0)
    else:
        scores = np.broadcast_to(np.abs(x @ weight.T).sum(0)[:, None], weight.shape)
    delta = sj.deltas(state.trainable, state.opt_state, sort=True)[Q]
    expected = np.sort(np.argsort(-scores.ravel(), kind="stable")[: delta.indices.shape[-1]])
    np.testing.assert_array_equal(delta.indices[0], expected)


@pytest.mark.slow
@pytest.mark.parametrize("growth", [WeightTimesInput(), LargestOutputs()])
def test_on_a_mesh_they_choose_the_same(growth):
    found = []
    for sizes in ((1, 1, 1), (2, 2, 2)):
        targets = adapted()
        tx = sj.spiel(sj.aged_adamw(1e-2), targets, growth=growth, schedule=mesh_cases.PLAN)
        objective = Objective(CONFIG, loss_chunk=16)
        training = SparseMethod(objective, tx, targets, growth, schedule=mesh_cases.PLAN)
        mesh = mesh_cases.mesh_of(*sizes)
        with jax.set_mesh(mesh):
            state, shardings = mesh_cases.placed(training, mesh)
            step = mesh_cases.compiled_step(training, shardings)
            for number in (1, 2):
                data = jax.device_put(batch(number), mesh_cases.batch_sharding(mesh, 1))
                phase, reselect = training.step_kind(number)
                state, _ = step(state, data, phase=phase, reselect=reselect)
            found.append(mesh_cases.positions(state))
    same = [np.mean(found[0][name] == found[1][name]) for name in found[0]]
    assert min(same) > 0.98
