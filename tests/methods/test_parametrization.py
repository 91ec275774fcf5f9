"""Steps, merges and checkpoints of both kinds of adapters."""

import functools
import math
import re
import shutil
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file, save_file
from support.adapter_cases import jitted, logits, make_batch, perturbed, twins
from support.programs import AS_USERS

from spiel_jax.adapters.load import load_run
from spiel_jax.checkpoint import CheckpointError, Checkpoints, restore_deltas, restore_state
from spiel_jax.config import LINEAR_LAYERS, default_config, flatten, unflatten
from spiel_jax.losses.next_token import Objective
from spiel_jax.methods.ia3 import IA3
from spiel_jax.methods.lora import Lora
from spiel_jax.methods.parametrization import ParametrizationMethod, adapted
from spiel_jax.methods.registry import build
from spiel_jax.models import ModelConfig, abstract_params, open_model
from spiel_jax.models.io.fingerprint import fingerprint

# one or two of the seven linears where the others would only take time to compile
ONE, TWO = (r".*\.down_proj\.weight",), (r".*\.(k|down)_proj\.weight",)

# what is of any parametrization
lora_and_slow = pytest.mark.parametrize("name", ["lora", pytest.param("ia3", marks=pytest.mark.slow)])


@functools.lru_cache
def tiny():
    return twins()[1:]


def make_kind(name, rules=TWO, dropout=0.0):
    config = tiny()[0]
    return IA3.matching(config, rules) if name == "ia3" else Lora(adapted(config, rules), 3, 6.0, dropout)


@functools.lru_cache
def standard(name, remat="full"):
    """One training for many tests, so that its programs are compiled once."""
    objective = Objective(tiny()[0], remat=remat, loss_chunk=16)
    kind = make_kind("lora", ONE, dropout=0.3) if name == "dropout" else make_kind(name)
    training = ParametrizationMethod(objective, optax.adamw(1e-2), kind)
    return training, jitted(training)


def started(training, params):
    state = training.init(params)
    return replace(state, trainable=perturbed(state.trainable))


def flattened(data):
    return {name: array.reshape(-1, array.shape[-1]) for name, array in data.items()}


def assert_equal(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.mark.parametrize("name", ["lora", "ia3"])
def test_starts_as_the_pretrained_model_and_learns(name):
    params, (training, step) = tiny()[1], standard(name)
    state, data = training.init(params), make_batch(0)
    flat, objective = flattened(data), jax.jit(training.objective)
    losses = []
    for _ in range(15):
        state, metrics = step(state, data)
        assert metrics["finite"]
        assert metrics["supervised_tokens"] == flat["weights"].sum()
        losses.append(float(metrics["loss"]))
    np.testing.assert_allclose(losses[0], objective(params, flat) / flat["weights"].sum(), rtol=1e-6)
    assert losses[-1] < losses[0] - 0.03
    assert_equal(state.params, params)
    total, tokens = jax.jit(training.evaluate)(state, flat)  # sees the tuned model
    np.testing.assert_allclose(total, objective(training.tuned(state), flat), rtol=1e-5)
    assert total / tokens < losses[-1]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", ["lora", "ia3"])
def test_merged_parameters_are_the_adapted_model(name, dtype):
    config, params = tiny()
    params = {name: param.astype(dtype) for name, param in params.items()}
    training, _ = standard(name)
    state = started(training, params)
    tuned = jax.jit(training.tuned)(state)
    assert all(tuned[name].dtype == dtype for name in params)
    changed = {name for name in params if not np.array_equal(tuned[name], params[name])}
    assert changed == training.kind.changed & params.keys()
    tokens = make_batch(0)["tokens"][0]
    ours = logits(config, params, tokens, training.kind, state.trainable)
    error = np.abs(ours - logits(config, tuned, tokens))
    moved = np.abs(ours - logits(config, params, tokens))
    # (IA)^3's cast of what it scales is one rounding more
    assert error.mean() < (1e-5 if dtype == jnp.float32 else 0.2) * moved.mean()


@pytest.mark.parametrize("name", ["lora", "ia3"])
def test_only_what_the_rules_name_is_adapted(name):
    config, params = tiny()
    kind = make_kind(name, (r".*\.[02]\.self_attn\.k_proj\.weight", r".*\.down_proj\.weight"))
    key, down = "model.layers.self_attn.k_proj.weight", "model.layers.mlp.down_proj.weight"
    assert set(kind.targets) == {f"{key}@0,2", down}
    trainable = perturbed(kind.init(jax.random.key(0)))
    merged = kind.merge(params, trainable)
    for parameter, before in params.items():
        differ = [not np.array_equal(one, two) for one, two in zip(merged[parameter], before, strict=True)]
        if parameter == key or (name == "ia3" and parameter == key.replace("weight", "bias")):
            assert differ == [True, False, True]
        else:
            assert all(differ) if parameter == down else not any(differ)
    # the adapted model and its gradient are those of the merged one
    tokens = make_batch(0)["tokens"][0]
    of_adapters = lambda t: jnp.mean(jnp.square(logits(config, params, tokens, kind, t)))  # noqa: E731
    of_merged = lambda t: jnp.mean(jnp.square(logits(config, kind.merge(params, t), tokens)))  # noqa: E731
    value, gradient = jax.jit(jax.value_and_grad(of_adapters))(trainable)
    expected, exact = jax.jit(jax.value_and_grad(of_merged))(trainable)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for one, two in zip(jax.tree.leaves(gradient), jax.tree.leaves(exact), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-4, atol=2e-5 * np.abs(two).max())


@pytest.mark.parametrize("rule", [r".*\.embed_tokens\.weight", r".*\.q\.weight"])
def test_rules_for_no_linear_of_the_blocks_are_refused(rule):
    with pytest.raises(ValueError, match=r"matches no weight; near names: model\.layers\.\d\."):
        adapted(tiny()[0], (rule,))


@lora_and_slow
def test_micro_batches_do_not_change_the_step(name):
    params, (training, step) = tiny()[1], standard(name)
    one = other = started(training, params)
    for number in range(3):
        data = make_batch(number, micro_batches=4, rows=1)
        one, first = step(one, data)
        other, second = step(other, {k: v.reshape(1, -1, v.shape[-1]) for k, v in data.items()})
        np.testing.assert_allclose(first["loss"], second["loss"], rtol=1e-5)
        np.testing.assert_allclose(first["grad_norm"], second["grad_norm"], rtol=1e-4)
    for a, b in zip(jax.tree.leaves(one.trainable), jax.tree.leaves(other.trainable), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


@pytest.mark.parametrize("name", ["dropout", pytest.param("ia3", marks=pytest.mark.slow)])
def test_what_is_stored_for_the_backward_pass_does_not_change_it(name):
    """The dropout drawn again is the same dropout."""
    params, data = tiny()[1], make_batch(0)
    results = []
    for remat in ("full", "none", "dots"):
        training, step = standard(name, remat)
        results.append(step(started(training, params), data))
    for state, metrics in results[1:]:
        np.testing.assert_allclose(metrics["grad_norm"], results[0][1]["grad_norm"], rtol=1e-5)
        for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(results[0][0]), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-4)


@lora_and_slow
def test_a_bfloat16_base_keeps_float32_adapters(name):
    params, data = tiny()[1], make_batch(0)
    training, step = standard(name)
    _, expected = step(started(training, params), data)
    narrow = {name: param.astype(jnp.bfloat16) for name, param in params.items()}
    state, metrics = step(started(training, narrow), data)
    np.testing.assert_allclose(metrics["loss"], expected["loss"], rtol=0.03)
    np.testing.assert_allclose(metrics["grad_norm"], expected["grad_norm"], rtol=0.2)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(state.trainable))


@pytest.mark.parametrize("dtype", [jnp.float32, pytest.param(jnp.bfloat16, marks=pytest.mark.slow)])
def test_scaled_biases_have_their_gradient(dtype):
    """Values that are their bias only: without its gradient there would be none."""
    config, params = tiny()
    values = "model.layers.self_attn.v_proj.weight"
    params = {name: param.astype(dtype) for name, param in params.items()}
    params[values] = jnp.zeros_like(params[values])
    kind = make_kind("ia3", (r".*\.v_proj\.weight",))
    training = ParametrizationMethod(Objective(config, loss_chunk=16), optax.sgd(1.0), kind)
    state, data = training.init(params), make_batch(0)
    new, _ = jitted(training)(state, data)
    flat = flattened(data)
    wide = {name: param.astype(jnp.float32) for name, param in params.items()}

    def merged(trainable):
        return training.objective(kind.merge(wide, trainable), flat) / flat["weights"].sum()

    expected = -np.asarray(jax.jit(jax.grad(merged))(state.trainable)[values])
    found = new.trainable[values] - state.trainable[values]
    atol = (1e-5 if dtype == jnp.float32 else 0.05) * np.abs(expected).max()
    assert np.abs(expected).max() > 1e-3
    np.testing.assert_allclose(found, expected, atol=atol)


def test_dropout_is_a_function_of_seed_step_and_micro_batch():
    params = tiny()[1]
    training, step = standard("dropout")
    data, state = make_batch(0), started(training, params)

    def loss(state, data):
        return float(step(state, data)[1]["loss"])

    assert loss(state, data) == loss(state, data)
    later = replace(state, opt_state=state.opt_state._replace(step=jnp.int32(1)))
    assert loss(later, data) != loss(state, data)
    # rows that do not depend on each other: only the dropout tells micro-batches apart
    swapped = {name: array[::-1] for name, array in data.items()}
    assert loss(state, swapped) != pytest.approx(loss(state, data), rel=1e-5)
    assert not np.array_equal(*(replace(training, seed=seed)._keys()[1] for seed in (0, 1)))
    a, b = (replace(training, seed=seed).init(params).trainable for seed in (0, 1))
    assert not np.array_equal(jax.tree.leaves(a)[0], jax.tree.leaves(b)[0])


def test_dropout_is_for_training_only():
    training, step = standard("dropout")
    flat, state = flattened(make_batch(0)), started(training, tiny()[1])
    loss, tokens = jax.jit(training.evaluate)(state, flat)
    expected = jax.jit(training.objective)(training.tuned(state), flat)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert float(step(state, make_batch(0))[1]["loss"]) != pytest.approx(float(loss / tokens), rel=1e-4)


@pytest.mark.parametrize("bad", ["weights", "params"])
@pytest.mark.parametrize("name", ["lora", "ia3"])
def test_a_step_that_is_not_finite_changes_the_count_only(name, bad):
    params, (training, step) = tiny()[1], standard(name)
    state, data = started(training, params), make_batch(0)
    if bad == "weights":
        data["weights"] = np.full_like(data["weights"], np.inf)
    else:
        poisoned = params["model.norm.weight"].at[0].set(jnp.nan)
        state = replace(state, params=params | {"model.norm.weight": poisoned})
    new, metrics = step(state, data)
    assert not metrics["finite"]
    assert new.opt_state.step == 1
    assert_equal(replace(new, opt_state=new.opt_state._replace(step=jnp.int32(0))), state)


@pytest.mark.parametrize("rules", [TWO, pytest.param(LINEAR_LAYERS, marks=pytest.mark.slow)])
def test_a_step_forms_no_dense_gradient(rules):
    """No product of a weight's shape is in the program, and no layer adds one to its temporaries."""
    sizes, data = {}, jax.eval_shape(lambda: jax.tree.map(jnp.asarray, make_batch(0, 1)))
    for layers in (4, 12):
        config = replace(tiny()[0], num_layers=layers, hidden_size=128, intermediate_size=256, head_dim=32)
        params = abstract_params(config)
        matrices = {param.shape[-2:] for name, param in params.items() if param.ndim > 1 + ("layers" in name)}
        lora = Lora(adapted(config, rules), rank=4, dropout=0.0)
        for name, kind in (("lora", lora), ("ia3", IA3.matching(config, rules))):
            training = ParametrizationMethod(Objective(config), optax.adamw(1e-2), kind)
            state = jax.eval_shape(training.init, params)
            program = jax.jit(jitted(training), donate_argnums=0).lower(state, data).compile(AS_USERS)
            found = re.findall(r"= f32\[(\d+),(\d+)\]\S* dot\(", program.as_text())
            products = {(int(rows), int(columns)) for rows, columns in found}
            assert not products & (matrices | {size[::-1] for size in matrices})
            assert name != "lora" or {(4, 128), (4, 256)} <= products  # of A and B: the search can find
            memory = program.memory_analysis()
            sizes[name, layers] = memory.temp_size_in_bytes
            assert memory.alias_size_in_bytes > 0.99 * memory.output_size_in_bytes - 1000  # all donated
    dense = 4 * sum(math.prod(param.shape[-2:]) for name, param in params.items() if "_proj.weight" in name)
    for name in ("lora", "ia3"):
        assert sizes[name, 12] - sizes[name, 4] < 8 * dense / 4


def test_what_the_settings_name():
    model, config = tiny()[0], default_config()
    config.lora.rank, config.lora.alpha, config.lora.dropout, config.lora.rslora = 3, 6.0, 0.25, True
    config.method = "lora"
    assert build(config, model, 1).kind == Lora(adapted(model, LINEAR_LAYERS), 3, 6.0, 0.25, True)
    config.method = "ia3"
    assert build(config, model, 1).kind == IA3.matching(model, LINEAR_LAYERS)


def save_run(folder, source, name):
    """A run's checkpoint of step 3 on a model: the training and its state."""
    source_model = open_model(str(source))
    settings = flatten(default_config()) | {"method": name, "model.source": str(source)}
    settings |= {"lora.rank": 3, "lora.alpha": 6.0, "lora.dropout": 0.1, "lora.rslora": False}
    settings["targets.rules"] = list(TWO)
    base = source_model.load(jnp.bfloat16, progress=False)
    training = build(unflatten(settings), source_model.config, 1)
    state = started(training, base)
    state = replace(state, opt_state=state.opt_state._replace(step=jnp.int32(3)))
    metadata = {"config": settings, "fingerprint": fingerprint(base), "data": {}}
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(3, state, training, metadata)
        checkpoints.wait()
    return training, base, state


@lora_and_slow
def test_a_checkpoint_gives_the_state_and_the_tuned_model_back(name, llama_folder, tmp_path):
    training, base, state = save_run(tmp_path / "run", llama_folder, name)
    restored = restore_state(tmp_path / "run", training.init(base), training)
    assert_equal(training.attach(base, restored.trainable, restored.opt_state), state)
    tuned = training.tuned(state)
    for keep_base in (False, True):
        run = load_run(tmp_path / "run", keep_base=keep_base)
        assert_equal(run.tuned, tuned)
        if keep_base:
            assert_equal(run.base, base)
            untouched = base.keys() - training.kind.changed
            assert all(run.tuned[name] is run.base[name] for name in untouched)
    with pytest.raises(CheckpointError, match="holds no sparse deltas"):
        restore_deltas(tmp_path / "run")


def test_adapters_are_not_put_on_another_base(llama_folder, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(llama_folder, model)
    save_run(tmp_path / "run", model, "lora")
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] += 1
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"(?s)another base model.*model.layers.mlp.up_proj.weight"):
        load_run(tmp_path / "run")


@pytest.mark.parametrize(("rank", "expected"), [(8, 2_442_240), (64, 19_537_920)])
def test_sizes_at_smollm2_135m(rank, expected):
    kind = Lora(adapted(ModelConfig.smollm2_135m(), LINEAR_LAYERS), rank)
    shapes = jax.eval_shape(kind.init, jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == expected
