import json
import re
import shutil
from pathlib import Path

import gguf
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from spiel_jax.errors import NotFoundError, SpielError
from spiel_jax.models.config import ModelConfig
from spiel_jax.models.decoder import layer_names
from spiel_jax.models.io.gguf_header import read_header
from spiel_jax.models.io.loading import open_model
from spiel_jax.models.io.names import expected_tensors, gguf_names
from spiel_jax.models.io.parts import first_parts, parts_of

SIZES = {
    "model_type": "llama",
    "vocab_size": 24,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
}


def write_split(folder, *, per_part=8):
    """A model in several GGUF files, its head in the last; the arrays that it should load as."""
    config = ModelConfig.from_hf(SIZES)
    writer = gguf.GGUFWriter(folder / "m.gguf", "llama", split_max_tensors=per_part)
    writer.add_block_count(2)
    writer.add_context_length(32)
    writer.add_embedding_length(16)
    writer.add_feed_forward_length(24)
    writer.add_head_count(4)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(24)
    draw = np.random.default_rng(0)
    slots = expected_tensors(config, gguf_names)
    arrays = {name: draw.normal(size=slot.shape).astype(np.float32) for name, slot in slots.items()}
    head = arrays.pop("output.weight")
    for name, array in {**arrays, "output.weight": head}.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return head


def changed(path, key, value):
    """A number in the metadata set to another."""
    data = bytearray(path.read_bytes())
    field = gguf.GGUFReader(path).fields[key]
    start = field.offset + sum(part.nbytes for part in field.parts[:-1])
    width = field.parts[-1].nbytes
    data[start : start + width] = value.to_bytes(width, "little")
    path.write_bytes(data)


class TestSplitGGUF:
    @pytest.mark.parametrize("given", ["m-00001-of-00003.gguf", "m-00003-of-00003.gguf", "."])
    def test_any_part_opens_the_whole(self, tmp_path, given):
        head = write_split(tmp_path)
        source = open_model(str(tmp_path / given))
        assert not source.config.tie_embeddings
        params = source.load(jnp.float32, progress=False)
        np.testing.assert_array_equal(np.asarray(params["lm_head.weight"]), head)

    @pytest.mark.parametrize("missing", [1, 2, 3])
    @pytest.mark.parametrize("whole_folder", [False, True])
    def test_a_missing_part_is_named(self, tmp_path, missing, whole_folder):
        write_split(tmp_path)
        name = f"m-0000{missing}-of-00003.gguf"
        (tmp_path / name).unlink()
        given = tmp_path if whole_folder else min(tmp_path.glob("*.gguf"))
        with pytest.raises(NotFoundError, match=rf"is one of 3 parts, and {name} is not beside it"):
            open_model(str(given))

    def test_a_part_under_another_name(self, tmp_path):
        write_split(tmp_path)
        (tmp_path / "m-00001-of-00003.gguf").rename(tmp_path / "m.gguf")
        with pytest.raises(SpielError, match=r"m.gguf is one of 3 parts, and its name does not say which"):
            open_model(str(tmp_path / "m.gguf"))

    def test_a_whole_file_under_a_parts_name(self, tmp_path):
        write_split(tmp_path, per_part=100)
        (tmp_path / "m.gguf").rename(tmp_path / "m-00001-of-00002.gguf")
        with pytest.raises(NotFoundError, match=r"is one of 2 parts"):
            open_model(str(tmp_path / "m-00001-of-00002.gguf"))

    def test_parts_of_two_models(self, tmp_path):
        write_split(tmp_path)
        (other := tmp_path / "other").mkdir()
        write_split(other, per_part=10)  # three parts as well
        shutil.copy(other / "m-00002-of-00003.gguf", tmp_path)
        with pytest.raises(SpielError, match=r"both hold|hold \d+ tensors: expected"):
            open_model(str(tmp_path))

    @pytest.mark.parametrize(("key", "value"), [("split.no", 2), ("split.count", 4)])
    def test_a_part_that_says_it_is_another(self, tmp_path, key, value):
        write_split(tmp_path)
        changed(tmp_path / "m-00002-of-00003.gguf", key, value)
        with pytest.raises(SpielError, match=r"m-00002-of-00003.gguf is not what its name says, part 2 of 3"):
            open_model(str(tmp_path))

    def test_joined_again(self, tmp_path):
        write_split(tmp_path)
        path = tmp_path / "m-00001-of-00003.gguf"
        changed(path, "split.count", 0)
        assert read_header(path).fields["split.count"] == 0
        with pytest.raises(SpielError, match="does not hold the model"):  # it is alone now
            open_model(str(path))

    def test_a_truncated_part(self, tmp_path):
        write_split(tmp_path)
        path = tmp_path / "m-00003-of-00003.gguf"
        path.write_bytes(path.read_bytes()[:-40])
        with pytest.raises(SpielError, match=rf"{re.escape(str(path))} is truncated or damaged"):
            open_model(str(tmp_path))

    def test_a_blob_without_a_suffix(self, tmp_path):
        write_split(tmp_path, per_part=100)
        (tmp_path / "m.gguf").rename(tmp_path / "sha256-1234")
        assert open_model(str(tmp_path / "sha256-1234")).config.num_layers == 2

    def test_a_config_beside_it(self, tmp_path):
        write_split(tmp_path)
        (tmp_path / "config.json").write_text('{"model_type": "llama"}')
        assert open_model(str(tmp_path)).config.hidden_size == 16


@pytest.fixture
def folder(tmp_path):
    """A model in two numbered files of safetensors, without an index."""
    (tmp_path / "config.json").write_text(json.dumps(SIZES))
    slots = expected_tensors(ModelConfig.from_hf(SIZES), layer_names)
    items = [(name, np.full(slot.shape, i, np.float32)) for i, (name, slot) in enumerate(slots.items())]
    save_file(dict(items[:9]), tmp_path / "model-00001-of-00002.safetensors")
    save_file(dict(items[9:]), tmp_path / "model-00002-of-00002.safetensors")
    return tmp_path


class TestSafetensorsWithoutAnIndex:
    def test_are_joined(self, folder):
        params = open_model(str(folder)).load(jnp.float32, progress=False)
        first = load_file(folder / "model-00001-of-00002.safetensors")
        second = load_file(folder / "model-00002-of-00002.safetensors")
        for name, array in (first | second).items():
            if "layers" not in name:
                np.testing.assert_array_equal(np.asarray(params[name]), array)

    def test_one_file_of_another_name(self, folder):
        files = sorted(folder.glob("*.safetensors"))
        save_file(load_file(files[0]) | load_file(files[1]), folder / "weights.safetensors")
        for file in files:
            file.unlink()
        assert open_model(str(folder)).config.num_layers == 2

    def test_a_missing_part_is_named(self, folder):
        (folder / "model-00002-of-00002.safetensors").unlink()
        with pytest.raises(
            NotFoundError, match=r"one of 2 parts, and model-00002-of-00002.safetensors is not"
        ):
            open_model(str(folder))

    def test_a_tensor_in_two(self, folder):
        shutil.copy(folder / "model-00001-of-00002.safetensors", folder / "other.safetensors")
        with pytest.raises(
            SpielError, match=r"the files of .* disagree:\n  doubled: .* in model-00001-of-00002"
        ):
            open_model(str(folder))

    @pytest.mark.parametrize(
        "file", ["../model-00001-of-00002.safetensors", "/etc/passwd", "..", "a/../../b", "C:\\b"]
    )
    def test_an_index_that_leaves_the_folder(self, folder, file):
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": file}}))
        with pytest.raises(SpielError, match=r"index.json must name a file of its folder for 'a', got"):
            open_model(str(folder))

    @pytest.mark.parametrize("value", [None, 3, ["x"], {}, True])
    def test_an_index_that_names_no_file(self, folder, value):
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": value}}))
        with pytest.raises(SpielError, match=r"index.json must name a file of its folder for 'a', got"):
            open_model(str(folder))

    @pytest.mark.parametrize("index", [{}, {"weight_map": []}, {"weight_map": {}}, {"weight_map": "x"}])
    def test_an_index_without_a_map(self, folder, index):
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(SpielError, match=r"index.json has no weight_map"):
            open_model(str(folder))


@pytest.mark.parametrize("name", ["m-00004-of-00003.gguf", "m-00000-of-00003.gguf", "m-00001-of-00000.gguf"])
def test_numbers_that_cannot_be(name):
    with pytest.raises(SpielError, match="which cannot be"):
        parts_of(Path(name))


def test_many_missing_parts_are_not_all_named(tmp_path):
    with pytest.raises(NotFoundError, match=r"m-00005-of-00999.gguf and 994 more are not") as error:
        parts_of(tmp_path / "m-00001-of-00999.gguf")
    assert len(str(error.value)) < 1000


def test_first_parts():
    names = ["b.gguf", "m-00002-of-00002.gguf", "m-00001-of-00002.gguf", "m-00001-of-00003.gguf"]
    assert [p.name for p in first_parts(map(Path, names))] == ["b.gguf", names[2], names[3]]
