"""Runs of the trainer on a base that is held in NF4, and in a kind that only the tests know."""

import json
import shutil

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as save_torch
from support.run_cases import chat_file, losses, run, tiny_config
from support.weight_cases import RowScaled

from spiel_jax.adapters import adapter_of_run, base_of_run, write_adapter
from spiel_jax.adapters.load import load_run
from spiel_jax.config import ConfigError, check_config, default_config, flatten
from spiel_jax.distributed.mesh import make_mesh
from spiel_jax.errors import SpielError
from spiel_jax.models import layer_names, open_model
from spiel_jax.models.decoder import ADAPTED
from spiel_jax.models.storage import kind_named
from spiel_jax.ops.stored import as_array, is_stored
from spiel_jax.planning.run import prepare
from spiel_jax.training.continuing import check_config_of

UP = "model.layers.mlp.up_proj.weight"
DOWN = "model.layers.mlp.down_proj.weight"  # what (IA)^3 has of the three
RULES = (r".*\.up_proj\.weight",)  # one linear: others only take time to compile


def configured(model, data, method="spiel_ag", quantization="toy"):
    config = tiny_config(model, data, method)
    config.targets.rules = (r".*\.down_proj\.weight",) if method == "ia3" else RULES
    config.targets.num_tunable = None if method in ("lora", "ia3") else 300
    config.model.quantization = quantization
    config.steps, config.data.heldout, config.eval_batches = 4, 4, 1
    return config


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return chat_file(tmp_path_factory.mktemp("data"))


def dequantized(model, quantization, folder):
    """A copy of the tiny model with the weights that its quantised ones stand for."""
    shutil.copytree(model, folder)
    tensors = load_file(folder / "model.safetensors")
    source = open_model(str(model))
    for name, param in source.load("float32", storage=kind_named(quantization), progress=False).items():
        assert is_stored(param) == (name in ADAPTED)
        if name in ADAPTED:
            for one, layer in zip(layer_names(name, source.config.num_layers), as_array(param), strict=True):
                assert np.any(tensors[one] != np.asarray(layer))
                tensors[one] = np.asarray(layer)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


OTHERS = [
    ("spiel_ag", "toy"),
    ("spiel_ma", "int8"),
    ("lora", "nf4"),
    ("ia3", "nf4"),
    ("magnitude", "fp4"),
    ("gradient", "nf4"),
]


@pytest.mark.parametrize(
    ("method", "quantization"),
    [("lora", "toy"), *(pytest.param(*o, marks=pytest.mark.slow) for o in [("spiel_ag", "nf4"), *OTHERS])],
)
def test_a_run_is_the_run_on_what_the_base_dequantizes_to(method, quantization, llama_folder, data, tmp_path):
    quantized, plain = tmp_path / "quantized", tmp_path / "plain"
    config = configured(llama_folder, data, method, quantization)
    if method == "spiel_ag":  # interrupted on the way
        run(config, quantized, until=3)
    summary = run(config, quantized)
    model = dequantized(llama_folder, quantization, tmp_path / "model")
    expected = run(configured(model, data, method, "none"), plain)
    assert losses(quantized) == losses(plain)
    assert [step for step, _ in expected.heldout] == [0, 4]
    assert summary.heldout[-1] == expected.heldout[-1]
    assert losses(quantized)[4] < losses(quantized)[1]

    adapted = DOWN if method == "ia3" else UP
    ours, theirs = load_run(quantized, keep_base=True), load_run(plain)
    assert ours.base is not None
    for name in theirs.tuned:
        assert is_stored(ours.base[name]) == (name in ADAPTED)
        assert is_stored(ours.tuned[name]) == (name in ADAPTED and name != adapted)
        np.testing.assert_array_equal(as_array(ours.tuned[name]), theirs.tuned[name], err_msg=name)
    assert np.any(ours.tuned[adapted] != as_array(ours.base[adapted]))
    beside = load_run(quantized, unmerged=True).tuned
    assert is_stored(beside[adapted]) == (method not in ("lora", "ia3"))
    np.testing.assert_array_equal(as_array(beside[adapted]), ours.tuned[adapted])
    if (method, quantization) == ("lora", "nf4"):
        back = load_run(quantized, merge_back=True)
        assert jax.tree.structure(back.tuned) == jax.tree.structure(ours.base)
        assert back.lost is not None
        assert back.lost.error > 0
        assert back.lost.changed > 0
        with pytest.raises(SpielError, match="the base is not quantised"):
            load_run(plain, merge_back=True)


def test_a_plan_holds_the_base_as_the_run_does(llama_folder, data):
    model = open_model(str(llama_folder)).config
    mesh = make_mesh({"data": 1, "fsdp": 2, "tensor": 2}, jax.devices()[:4])
    held = {}
    for quantization in ("none", "toy"):
        planned = prepare(configured(llama_folder, data, quantization=quantization), model, mesh)
        held[quantization] = planned.held()["weights"]
        weight = planned.state.params[UP]
        assert is_stored(weight) == (quantization == "toy")
        assert UP in planned.state.base or is_stored(weight)
    assert isinstance(weight, RowScaled)
    assert weight.codes.sharding.spec == PartitionSpec(None, "tensor", "fsdp")
    assert weight.scales.sharding.shard_shape(weight.scales.shape) == (2, 24, 1)
    assert held["toy"] < 0.6 * held["none"]


def test_quantization_that_cannot_be_is_refused():
    config = default_config()
    config.model.source = "random"
    config.data.sources = ("a.jsonl",)
    config.model.quantization = "nf3"
    with pytest.raises(
        ConfigError, match=r"model.quantization = 'nf3': expected one of none, nf4, fp4, int8, toy"
    ):
        check_config(config)
    config.method, config.model.quantization = "full", "toy"
    with pytest.raises(ConfigError, match=r"model.quantization = 'toy': expected none: method = 'full'"):
        check_config(config)


def test_a_run_of_before_there_was_the_key_is_continued(llama_folder, data, tmp_path):
    config = configured(llama_folder, data, quantization="none")
    stored = json.loads(json.dumps(flatten(config)))
    del stored["model.quantization"]

    def check():
        check_config_of(tmp_path, {"config": stored}, config, extend=False, accept_new_data=False)

    check()
    config.model.quantization = "toy"
    with pytest.raises(ConfigError, match=r"model\.quantization: 'none' there, 'toy' now"):
        check()


@pytest.mark.slow
def test_a_run_on_a_folder_of_bitsandbytes_is_exported_with_the_values_of_its_codes(
    llama_folder, data, tmp_path
):
    torch = pytest.importorskip("torch")
    bnb = pytest.importorskip("bitsandbytes").functional
    folder = tmp_path / "model"
    shutil.copytree(llama_folder, folder)
    tensors = {}
    for name, array in load_file(folder / "model.safetensors").items():
        tensors[name] = torch.tensor(array)
        if name.endswith("_proj.weight"):
            codes, state = bnb.quantize_4bit(tensors[name], quant_type="nf4", compress_statistics=True)
            tensors[name] = codes
            tensors |= {f"{name}.{key}": value for key, value in state.as_dict(packed=True).items()}
    save_torch(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    workdir = tmp_path / "run"
    run(configured(folder, data, "spiel_ag", "nf4"), workdir)
    tuned = load_run(workdir).tuned
    adapter, base = adapter_of_run(workdir), base_of_run(workdir)
    merged = load_file(write_adapter(adapter, tmp_path / "merged", "merged", base=base) / "model.safetensors")
    dequantized = open_model(str(folder)).load("float32", progress=False)
    for parameter in ADAPTED:
        for layer, name in enumerate(layer_names(parameter, 2)):
            np.testing.assert_array_equal(merged[name], as_array(tuned[parameter])[layer])
            changed = np.sum(merged[name] != dequantized[parameter][layer])
            assert 0 < changed <= 300 if parameter == UP else changed == 0
