"""What every format of adapters does: there and back bit for bit, whole or not at all, damage told."""

import dataclasses
import json
import os
import shutil

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.exports import adapter_of_kind, assert_same, origin_of, sparse_adapter

from spiel_jax.adapters import FORMATS, AdapterError, open_base, read_adapter, write_adapter
from spiel_jax.adapters.hybrid import HybridAdapter
from spiel_jax.errors import SpielError
from spiel_jax.models import open_model

ALL = [(name, kind) for name, one in FORMATS.items() for kind in one.kinds if kind != "full"]
BACK = [
    ("native", "sparse"),
    ("peft_supertuning", "sparse"),
    ("peft_shira", "sparse"),
    ("peft_supra", "hybrid"),
    ("reference", "sparse"),
    ("peft_lora", "lora"),
    ("peft_ia3", "ia3"),
]


@pytest.fixture(scope="module")
def case(llama_folder):
    """Shape of the base model, the origin of adapters on it, and the base."""
    origin = origin_of(llama_folder)
    return open_model(str(llama_folder)).config, origin, open_base(str(llama_folder), origin)


@pytest.fixture(scope="module")
def written(case, tmp_path_factory):
    """Format and kind to an adapter and the folder that holds it; each is written once."""
    model, origin, base = case
    made = {}

    def make(name, kind):
        if (name, kind) not in made:
            adapter = adapter_of_kind(kind, model, origin)
            folder = tmp_path_factory.mktemp(name) / "out"
            made[name, kind] = adapter, write_adapter(adapter, folder, name, base=base)
        return made[name, kind]

    return make


def of_one_weight(adapter):
    if adapter.kind == "hybrid":
        return HybridAdapter(of_one_weight(adapter.sparse), of_one_weight(adapter.low_rank))
    part = {"sparse": "entries", "lora": "matrices", "ia3": "factors"}[adapter.kind]
    name = "model.layers.1.self_attn.v_proj.weight"
    return dataclasses.replace(adapter, **{part: {name: getattr(adapter, part)[name]}})


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_every_format_that_reads_is_here():
    assert {name for name, _ in BACK} == {name for name, one in FORMATS.items() if one.reads}


@pytest.mark.parametrize(("name", "kind"), BACK)
class TestThereAndBack:
    def test_bit_for_bit(self, name, kind, written, case, tmp_path):
        adapter, folder = written(name, kind)
        for model in (None, case[0]):
            assert_same(read_adapter(folder, model), adapter)
        again = write_adapter(read_adapter(folder), tmp_path / "again", name)
        assert contents(again) == contents(folder)

    def test_of_one_weight_alone(self, name, kind, case, tmp_path):
        model, origin, _ = case
        adapter = of_one_weight(adapter_of_kind(kind, model, origin))
        assert_same(read_adapter(write_adapter(adapter, tmp_path / "out", name)), adapter)

    def test_without_our_header_the_model_says_the_shapes(self, name, kind, written, case, tmp_path):
        from safetensors.numpy import load_file, save_file

        adapter, folder = written(name, kind)
        foreign = shutil.copytree(folder, tmp_path / "foreign")
        (file,) = foreign.glob("*.safetensors")
        save_file(load_file(file), file, {"format": "pt"})
        if name == "native":
            with pytest.raises(AdapterError, match="format is None"):
                read_adapter(foreign, case[0])
            return
        assert_same(read_adapter(foreign, case[0]), adapter, origin=False)
        if kind != "lora":
            with pytest.raises(AdapterError, match=r"does not say the shape of .*: name the base model"):
                read_adapter(foreign)

    def test_another_model_is_refused(self, name, kind, written, case):
        wide = dataclasses.replace(case[0], intermediate_size=64)
        with pytest.raises(AdapterError, match=r"mlp.*48.*64|mlp.*64.*48"):
            read_adapter(written(name, kind)[1], wide)
        short = dataclasses.replace(case[0], num_layers=1)
        with pytest.raises(AdapterError, match=r"model\.layers\.1\..*base model"):
            read_adapter(written(name, kind)[1], short)


@pytest.mark.parametrize(("name", "kind"), ALL)
class TestWhole:
    def test_an_error_leaves_nothing(self, name, kind, case, tmp_path, monkeypatch):
        model, origin, base = case

        def broken(self, export, folder):
            (folder / "half").write_text("x")
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(type(FORMATS[name]), "write", broken)
        with pytest.raises(AdapterError, match=r"cannot be written: .*No space left"):
            write_adapter(adapter_of_kind(kind, model, origin), tmp_path / "out", name, base=base)
        assert list(tmp_path.iterdir()) == []


def test_what_is_there_is_replaced_only_if_it_was_written_here(case, tmp_path):
    model, origin, _ = case
    adapter, out = sparse_adapter(model, origin), tmp_path / "out"
    write_adapter(adapter, out)
    write_adapter(adapter, out, "reference")  # ours
    assert not (out / "adapter.safetensors").exists()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(AdapterError, match=r"did not write \(notes.txt\)"):
        write_adapter(adapter, out)
    write_adapter(adapter, out, overwrite=True)
    assert sorted(os.listdir(out)) == ["adapter.safetensors", "spiel_jax.json"]
    assert os.listdir(tmp_path) == ["out"]
    (tmp_path / "file").write_text("")
    with pytest.raises(AdapterError, match="no folder"):
        write_adapter(adapter, tmp_path / "file", overwrite=True)
    with pytest.raises(AdapterError, match="which is needed"):
        write_adapter(adapter, tmp_path, overwrite=True, keep=[out])


def test_the_base_model_is_never_overwritten(case, llama_folder, tmp_path):
    model, origin, _ = case
    copy = shutil.copytree(llama_folder, tmp_path / "base")
    base = open_base(str(copy), origin)
    with pytest.raises(AdapterError, match="which is needed"):
        write_adapter(sparse_adapter(model, origin), copy, "merged", base=base, overwrite=True)


def test_kinds_that_a_format_does_not_hold(case, tmp_path):
    model, origin, _ = case
    with pytest.raises(
        AdapterError, match=r"'native' holds sparse, this is lora: expected one of .*peft_lora"
    ):
        write_adapter(adapter_of_kind("lora", model, origin), tmp_path / "out")
    with pytest.raises(AdapterError, match="format 'gguf': expected one of"):
        write_adapter(sparse_adapter(model), tmp_path / "out", "gguf")
    with pytest.raises(AdapterError, match="needs the base model"):
        write_adapter(sparse_adapter(model), tmp_path / "out", "merged")


def mutated(data, draw):
    """Bytes with something wrong: bits, a part cut out, doubled, cut short or overwritten."""
    data, how = bytearray(data), draw(st.sampled_from(["bit", "byte", "cut", "short", "double", "text"]))
    at = draw(st.integers(0, len(data) - 1))
    # half of the time in the header, where most can go wrong
    at = draw(st.sampled_from([at, at % 400, at % 4000 % len(data)]))
    if how == "bit":
        data[at] ^= 1 << draw(st.integers(0, 7))
    elif how == "byte":
        data[at] = draw(st.integers(0, 255))
    elif how == "cut":
        del data[at : at + draw(st.integers(1, 40))]
    elif how == "short":
        del data[at:]
    elif how == "double":
        data[at:at] = data[at : at + draw(st.integers(1, 40))]
    else:
        words = [b"9", b"-1", b"1e999", b"null", b"[]", b'"x"', b"18446744073709551615", b"F64", b"NaN"]
        word = draw(st.sampled_from(words))
        data[at : at + len(word)] = word
    return bytes(data)


def check_mutants(examples, case, written, tmp_path_factory):
    model = case[0]
    place = tmp_path_factory.mktemp("mutants")
    originals = {pair: (adapter, contents(folder)) for pair in BACK for adapter, folder in [written(*pair)]}

    @settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def check(data):
        pair = data.draw(st.sampled_from(BACK))
        adapter, files = originals[pair]
        names = sorted(name for name in files if name not in ("README.md", "spiel_jax.json"))
        name = data.draw(st.sampled_from(names))
        folder = place / "_".join(pair)
        folder.mkdir(exist_ok=True)
        for other in names:
            (folder / other).write_bytes(files[other])
        (folder / name).write_bytes(mutated(files[name], data.draw))
        try:
            found = read_adapter(folder, data.draw(st.sampled_from([None, model])))
        except SpielError as error:
            assert 0 < len(str(error)) < 2000  # noqa: PT017
        else:  # only what means nothing was hit, or what the adapter is called
            assert_same(found, adapter, origin=False)
            assert found.origin.fingerprint == adapter.origin.fingerprint

    check()


def test_damaged_files(case, written, tmp_path_factory):
    check_mutants(100, case, written, tmp_path_factory)


@pytest.mark.slow
def test_many_damaged_files(case, written, tmp_path_factory):
    check_mutants(3000, case, written, tmp_path_factory)


def test_tensors_that_no_hash_protects(case, written, tmp_path):
    """What is checked of entries when another program wrote them."""
    from safetensors.numpy import load_file, save_file

    folder = shutil.copytree(written("reference", "sparse")[1], tmp_path / "out")
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    name = "base_model.model.model.layers.0.mlp.up_proj.sft_delta."
    indices, values = tensors[name + "indices"], tensors[name + "values"]

    def refused(message, **changes):
        save_file(tensors | {name + part: array for part, array in changes.items()}, file)
        with pytest.raises(AdapterError, match=message):
            read_adapter(folder, case[0])

    refused("is outside a matrix", indices=indices + 48 * 32)
    refused("is outside a matrix", indices=indices - 2000)
    refused("has two values", indices=np.full_like(indices, 3))
    refused("not finite", values=np.full_like(values, np.inf))
    refused("expected integers", indices=indices.astype(np.float32))
    refused("expected integers", values=indices)
    refused("expected two lists", values=values[1:])
    refused("num_deltas", indices=indices[1:], values=values[1:])
    refused("is I8, expected", values=values.astype(np.int8))
    save_file({key: tensor for key, tensor in tensors.items() if key != name + "values"}, file)
    with pytest.raises(AdapterError, match=r"has no sft_delta.values"):
        read_adapter(folder, case[0])
    save_file(tensors | {"base_model.model.lm_head.weight": values}, file)
    with pytest.raises(AdapterError, match="is not supported"):
        read_adapter(folder, case[0])


REFUSED = (
    r"is not supported|was changed after|contradicts|has no supertuning_lora_A|r = 2, .*expected numbers"
)


@pytest.mark.parametrize(
    ("name", "kind", "change"),
    [
        ("peft_lora", "lora", {"use_dora": True}),
        ("peft_lora", "lora", {"bias": "all"}),
        ("peft_lora", "lora", {"modules_to_save": ["lm_head"]}),
        ("peft_lora", "lora", {"init_lora_weights": "pissa"}),
        ("peft_lora", "lora", {"lora_alpha": 99}),
        ("peft_lora", "lora", {"use_rslora": True}),
        ("peft_lora", "lora", {"r": 3}),
        ("peft_lora", "lora", {"alpha_pattern": {"(a+)+$": 1}}),
        ("peft_supertuning", "sparse", {"r": 8}),
        ("peft_supra", "hybrid", {"r": None}),
        ("peft_supra", "hybrid", {"r": 3}),
        ("peft_supra", "hybrid", {"r": "2"}),
        ("peft_supra", "hybrid", {"lora_alpha": 99}),
        ("peft_ia3", "ia3", {"fan_in_fan_out": True}),
    ],
)
def test_configurations_that_mean_something_else(name, kind, change, written, case, tmp_path):
    folder = shutil.copytree(written(name, kind)[1], tmp_path / "out")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | change))
    with pytest.raises(AdapterError, match=REFUSED):
        read_adapter(folder, case[0])


def test_nothing_there(tmp_path):
    with pytest.raises(SpielError, match="there is no"):
        read_adapter(tmp_path / "none")
    with pytest.raises(AdapterError, match=r"no adapter in a format that is read: native, "):
        read_adapter(tmp_path)
