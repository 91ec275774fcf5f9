"""Deltas and matrices of low rank together: gradients, warm-up, checkpoints' parts and merges."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support.mesh_cases import CONFIG, ROWS, batch, mesh_of, placed, pretrained

import spiel_jax as sj
from spiel_jax.config import ConfigError, check_config, default_config
from spiel_jax.distributed.mesh import batch_sharding
from spiel_jax.losses.next_token import Objective
from spiel_jax.methods.method import compiled_step
from spiel_jax.methods.registry import build

OBJECTIVE = Objective(CONFIG, loss_chunk=16)
UP = "model.layers.mlp.up_proj.weight"


def configured(entries="gradient", warmup=1):
    config = default_config()
    config.method = "rosa"
    config.rosa.entries, config.rosa.warmup = entries, warmup
    config.model.source, config.data.sources = "random", ("chat.jsonl",)
    config.targets.num_tunable = 600
    config.targets.rules = (r".*\.up_proj\.weight",)  # others only take time to compile
    config.targets.grid.update({"fsdp": 1, "tensor": 1})
    config.lora.update({"rank": 2, "alpha": 4.0, "dropout": 0.0})
    config.spiel.update({"every": 2, "accumulation": 2})
    config.optimizer.update({"learning_rate": 1e-2, "warmup": 0.0, "schedule": "constant"})
    config.model.loss_chunk = 16
    config.batch_size, config.steps = ROWS, 6
    return config


@pytest.fixture(scope="module")
def trained():
    """A run of three steps: warm-up, proposing, choosing; its state after each."""
    config = configured()
    check_config(config)
    method = build(config, CONFIG, 6)
    params = pretrained()
    step = jax.jit(
        lambda s, b, phase, reselect: method.step(s, b, phase=phase, reselect=reselect),
        static_argnames=("phase", "reselect"),
    )
    states, metrics = [jax.jit(method.init)(params)], []
    for number in (1, 2, 3):
        phase, reselect = method.step_kind(number)
        state, found = step(states[-1], batch(number, 2), phase=phase, reselect=reselect)
        states.append(state)
        metrics.append(found)
    return method, params, states, metrics


def test_the_warm_up_trains_the_matrices_alone_and_then_entries_are_chosen(trained):
    method, _, states, metrics = trained
    kinds = [method.step_kind(number) for number in (1, 2, 3, 4)]
    plain, propose, estimate = sj.Phase.PLAIN, sj.Phase.PROPOSE, sj.Phase.ESTIMATE
    assert kinds == [(plain, False), (propose, False), (estimate, True), (plain, False)]
    sparse = [state.trainable["sparse"] for state in states]
    assert not any(np.any(value) for value in sparse[1].values())
    assert all(np.any(value) for value in sparse[2].values())
    matrices = [state.trainable["low_rank"][UP]["lora_B"] for state in states]
    assert not np.any(matrices[0])
    assert all(np.any(one != other) for one, other in itertools.pairwise(matrices))
    assert [float(found["replaced"]) > 0.8 for found in metrics] == [False, False, True]
    assert [int(state.opt_state.step) for state in states] == [0, 1, 2, 3]
    assert int(optax.tree.get(states[-1].opt_state.sparse, "spiel_count")) == 2


def test_gradients_are_those_of_the_sum_of_both(trained):
    """By plain autodiff of a model whose weights are pretrained + deltas + scale * B A."""
    method, params, states, _ = trained
    state = states[2]
    active = sj.deltas(state.trainable["sparse"], state.opt_state.sparse)
    data = batch(7)
    flat = {name: array.reshape(-1, array.shape[-1]) for name, array in data.items()}

    def expected(values, low_rank):
        deltas = {name: delta.with_values(values[name]) for name, delta in active.items()}
        weights = dict(sj.merge(params, deltas))
        for name in active:
            weights[name] = weights[name] + 2.0 * low_rank[name]["lora_B"] @ low_rank[name]["lora_A"]
        return OBJECTIVE(weights, flat) / flat["weights"].sum()

    low_rank = state.trainable["low_rank"]
    loss, wanted = jax.jit(jax.value_and_grad(expected, (0, 1)))(state.trainable["sparse"], low_rank)
    found = jax.jit(
        lambda s, b: method.sparse.passes.of(
            method._sparse(s),
            b,
            s.trainable["low_rank"],
            lambda adapters, more, micro: method._beside(s.params, adapters, more, None),
            phase=sj.Phase.PLAIN,
        )
    )(state, data)
    assert float(found[0]) == pytest.approx(float(loss), rel=1e-5)
    for one, other in zip(jax.tree.leaves(found[1]), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5 * float(jnp.abs(other).max()) + 1e-8)


def test_the_tuned_model_is_the_one_that_is_evaluated_and_restored(trained):
    method, params, states, _ = trained
    state = states[-1]
    data = jax.tree.map(lambda x: x[0], batch(8))
    loss, _ = jax.jit(method.evaluate)(state, data)
    assert float(jax.jit(OBJECTIVE)(method.tuned(state), data)) == pytest.approx(float(loss), rel=1e-5)
    items = method.items(state)
    merged = method.merge(params, items["trainable"])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), merged, dict(method.tuned(state)))
    jax.tree.map(np.testing.assert_array_equal, method.pretrained(state), params)
    again = method.restored(items, states[0])
    assert jax.tree.structure(again.trainable) == jax.tree.structure(state.trainable)
    jax.tree.map(np.testing.assert_array_equal, again.opt_state, state.opt_state)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("rosa.warmup", 6, "rosa.warmup = 6: expected at most 5: the deltas train after it, in 6 steps"),
        ("rosa.warmup", 5, "spiel.accumulation = 2: expected at most 1, the steps there are: gradient"),
        ("rosa.entries", "lora", "rosa.entries = 'lora': expected one of"),
        ("targets.num_tunable", None, "density or num_tunable, one of them"),
        ("spiel.parity", "reference", "rosa.entries = 'gradient': expected a method of SpIEL"),
    ],
)
def test_what_it_cannot_use_is_refused(key, value, message):
    config = configured()
    with config.ignore_type():
        config.update_from_flattened_dict({key: value})
    with pytest.raises(ConfigError, match=message):
        check_config(config)


@pytest.mark.slow
def test_on_a_mesh_it_has_the_same_numbers():
    config = configured("spiel_ag", warmup=1)
    config.targets.grid.update({"fsdp": 2, "tensor": 2})
    found = []
    for sizes in ((1, 1, 1), (2, 2, 2)):
        mesh = mesh_of(*sizes)
        with jax.set_mesh(mesh):
            method = build(config, CONFIG, 6)
            state, shardings = placed(method, mesh)
            step, losses = compiled_step(method, shardings), []
            for number in range(1, 6):
                phase, reselect = method.step_kind(number)
                data = jax.device_put(batch(number), batch_sharding(mesh, 1))
                state, metrics = step(state, data, phase=phase, reselect=reselect)
                losses.append(float(metrics["loss"]))
            found.append((losses, jax.device_get(state.trainable)))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), *(one for _, one in found))
