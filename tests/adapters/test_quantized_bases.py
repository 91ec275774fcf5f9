"""Adapters on quantised bases: in PEFT, read again, one after the other, and as a start of a run."""

import dataclasses
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from absl import flags
from peft import PeftModel
from support.exports import assert_same, lora_adapter, sparse_adapter
from support.run_cases import chat_file, run, tiny_config
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from spiel_jax import generate
from spiel_jax.adapters import (
    AdapterError,
    HotSwap,
    Origin,
    SparseAdapter,
    adapter_of_run,
    open_base,
    read_adapter,
    write_adapter,
)
from spiel_jax.adapters.adapted import load_adapters
from spiel_jax.models import bind, fingerprint, open_model
from spiel_jax.models.storage import kind_named

KINDS = ["nf4", pytest.param("int8", marks=pytest.mark.slow)]
FORMATS = ["native", "peft_shira", "peft_supertuning"]
TOKENS = np.arange(24).reshape(2, 12) * 7 % 250


@pytest.fixture(scope="module", params=KINDS)
def held(request, llama_folder):
    """How the base is held, its parameters, and the origin of an adapter that was trained on it."""
    source, kind = open_model(str(llama_folder)), request.param
    params = source.load("float32", storage=kind_named(kind), progress=False)
    config = {"model.dtype": "float32", "model.quantization": kind, "method": "test"}
    return kind, params, Origin(str(llama_folder), fingerprint(params), config, 7)


def bits(params):
    return {name: jax.tree.map(lambda a: np.asarray(a).tobytes(), one) for name, one in params.items()}


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")
def test_peft_computes_the_same_on_the_dequantised_base(held, llama_folder, tmp_path):
    _, params, origin = held
    model = open_model(str(llama_folder)).config
    adapter, base = sparse_adapter(model, origin), open_base(str(llama_folder), origin)
    write_adapter(SparseAdapter({}, origin), tmp_path / "base", "merged", base=base)
    out = write_adapter(adapter, tmp_path / "out", "peft")
    assert f"held as {origin.quantization}" in (out / "README.md").read_text()

    expected = np.asarray(bind(model, adapter.merge(params, model))(jnp.asarray(TOKENS)))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    theirs = PeftModel.from_pretrained(plain, out).eval()
    for one in (theirs, theirs.merge_and_unload()):
        with torch.no_grad():
            logits = one(torch.tensor(TOKENS)).logits.numpy()
        np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_peft_on_a_base_that_bitsandbytes_holds(kind, tmp_path):
    """Its arithmetic is not in float32 (per cents of the logits): less than a tenth of what SHIRA does."""
    sizes = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2}  # narrower ones bitsandbytes cannot pack
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**sizes, initializer_range=0.2)).save_pretrained(tmp_path / "model")
    source = open_model(str(tmp_path / "model"))
    params = source.load("float32", storage=kind_named(kind), progress=False)
    origin = Origin(config={"model.dtype": "float32", "model.quantization": kind})
    adapter = sparse_adapter(source.config, origin)
    out = write_adapter(adapter, tmp_path / "out", "peft")
    before, expected = (
        np.asarray(bind(source.config, one)(jnp.asarray(TOKENS)))
        for one in (params, adapter.merge(params, source.config))
    )
    options = {"load_in_4bit": True, "bnb_4bit_use_double_quant": True, "bnb_4bit_quant_type": "nf4"}
    config = BitsAndBytesConfig(**(options if kind == "nf4" else {"load_in_8bit": True}))
    base = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", quantization_config=config, device_map="cpu", dtype=torch.float32
    )
    with torch.no_grad():
        logits = PeftModel.from_pretrained(base, out).eval()(torch.tensor(TOKENS)).logits.numpy()
    assert np.linalg.norm(logits - expected) < 0.1 * np.linalg.norm(expected - before)


@pytest.mark.slow
def test_what_is_read_again_is_used_one_after_the_other(held, llama_folder, tmp_path):
    """Codes cannot be set one by one: each adapter is merged when it is asked for."""
    _, params, origin = held
    model = open_model(str(llama_folder)).config
    made = {name: sparse_adapter(model, origin, seed=seed) for seed, name in enumerate(FORMATS)}
    expected: dict = {None: bits(params)}
    for name, adapter in made.items():
        out = write_adapter(adapter, tmp_path / name, name)
        assert_same(read_adapter(out, model), adapter)
        expected[str(out)] = bits(jax.jit(partial(adapter.merge, model=model))(params))
    paths = [str(tmp_path / name) for name in made]
    weights = load_adapters(paths, str(llama_folder), keep_base=True).weights
    assert not isinstance(weights, HotSwap)
    for path in [*paths, None, paths[0]]:
        assert bits(weights.use(path)) == expected[path], path
    alone = load_adapters(paths[:1], str(llama_folder)).weights
    assert bits(alone.use(paths[0])) == expected[paths[0]]


def test_a_quantised_base_cannot_be_swapped_in_place(held, llama_folder):
    kind, params, origin = held
    model = open_model(str(llama_folder)).config
    with pytest.raises(
        AdapterError, match=f"cannot be set: it is held as {kind}. Load the model dequantised"
    ):
        HotSwap(params, model).add("a", sparse_adapter(model, origin))


def test_an_adapter_of_the_dense_base_is_of_another(held, llama_folder, tmp_path):
    _, params, origin = held
    source = open_model(str(llama_folder))
    dense = dataclasses.replace(origin, fingerprint=fingerprint(source.load("float32", progress=False)))
    assert dense.fingerprint != fingerprint(params)
    out = write_adapter(sparse_adapter(source.config, dense), tmp_path / "a")
    with pytest.raises(AdapterError, match="was trained on another base model"):
        load_adapters([out], str(llama_folder))
    load_adapters([out], str(llama_folder), check=False)


@pytest.mark.slow
@pytest.mark.parametrize("init", FORMATS)
def test_a_run_on_a_quantised_base_begins_with_the_entries(init, held, llama_folder, tmp_path):
    kind, _, origin = held
    model = open_model(str(llama_folder)).config
    adapter = sparse_adapter(model, origin, names=lambda one: "o_proj" in one or ".1.mlp.up" in one)
    write_adapter(adapter, tmp_path / "a", init)
    config = tiny_config(llama_folder, chat_file(tmp_path), "random")
    config.model.quantization, config.targets.num_tunable = kind, None
    config.steps, config.spiel.rate, config.optimizer.learning_rate = 1, 0.0, 1e-30
    config.init_from.adapter = str(tmp_path / "a")
    run(config, tmp_path / "run")
    found = adapter_of_run(tmp_path / "run")
    assert found.shapes == adapter.shapes
    for name, entries in adapter.entries.items():
        np.testing.assert_array_equal(found.entries[name].positions, entries.positions)
        np.testing.assert_allclose(found.entries[name].values, entries.values, rtol=0, atol=1e-20)
    assert found.origin.fingerprint == origin.fingerprint


@pytest.mark.slow
@pytest.mark.parametrize("quantised", [False, True])
def test_generate_with_several(quantised, held, llama_folder, tmp_path, capsys):
    _, _, origin = held
    model = open_model(str(llama_folder)).config
    origin = origin if quantised else Origin(config={"model.dtype": "float32"})
    made = {
        "a": sparse_adapter(model, origin, seed=1, scale=0.5),
        "b": sparse_adapter(model, origin, seed=2, scale=0.5),
        "c": lora_adapter(model, origin),
    }
    for name, adapter in made.items():
        write_adapter(adapter, tmp_path / name, "peft")
    asked = [f"--model={llama_folder}", "--prompt=Hi", "--max_new_tokens=6"]

    def replies(*names, base=False):
        options = flags.FlagValues()
        generate.define_flags(options)
        chosen = [f"--adapter={tmp_path / name}" for name in names]
        options(["generate", *asked, *chosen, *["--base"] * base])
        generate.main(options)
        labels = ["base"] * base + [str(tmp_path / name) for name in dict.fromkeys(names)]
        form = "".join(rf"\[{re.escape(label)}\] (.*)\n" for label in labels)
        found = re.fullmatch(rf"\[prompt\] Hi\n{form}\n", capsys.readouterr().out, re.DOTALL)
        assert found is not None
        return dict(zip(labels, found.groups(), strict=True))

    alone = {name: replies(name) for name in made}
    together = replies("a", "b", "a", base=True)
    assert list(together) == ["base", str(tmp_path / "a"), str(tmp_path / "b")]
    assert {**alone["a"], **alone["b"]} == {k: v for k, v in together.items() if k != "base"}
    assert len(set(together.values())) == 3
    assert replies("b", "c") == {**alone["b"], **alone["c"]}
