"""Folders that are no model of ours: what is told of them, before anything is loaded."""

import os
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support.hf_folders import UP, change, change_json, load, save

from spiel_jax.errors import SpielError
from spiel_jax.models.io.loading import open_model


class TestTensorsThatDoNotFit:
    def refused(self, folder, match):
        with pytest.raises(ValueError, match=match):
            open_model(str(folder))

    def test_missing(self, single_copy):
        change(single_copy, lambda tensors: tensors.pop(UP))
        self.refused(single_copy, rf"missing: {UP}")

    def test_unknown(self, single_copy):
        change(single_copy, lambda tensors: tensors.update(more=np.zeros(3, np.float32)))
        self.refused(single_copy, r"unknown: more \[3\]")

    def test_a_layer_too_many(self, single_copy):
        change_json(single_copy / "config.json", lambda config: config.update(num_hidden_layers=2))
        self.refused(single_copy, r"unknown: model.layers.2.self_attn.q_proj.weight \[32, 32\]")

    def test_mis_shaped(self, single_copy):
        change(single_copy, lambda tensors: tensors.update({UP: tensors[UP].T.copy()}))
        self.refused(single_copy, rf"mis-shaped: {UP} \[32, 48\], expected \[48, 32\]")

    def test_quantised(self, single_copy):
        change(single_copy, lambda tensors: tensors.update({UP: tensors[UP].astype(np.int8)}))
        self.refused(single_copy, rf"not floating point: {UP} is I8")

    def test_inverse_frequencies_are_ignored(self, single_copy, single):
        name = "model.layers.0.self_attn.rotary_emb.inv_freq"
        change(single_copy, lambda tensors: tensors.update({name: np.ones(4, np.float32)}))
        assert load(single_copy).keys() == load(single).keys()

    @pytest.mark.parametrize("offset", [0.0, 1.0])
    def test_a_tied_model_may_ship_its_head_only_if_equal(self, tmp_path, offset):
        save(tmp_path, tie_word_embeddings=True)
        change(
            tmp_path,
            lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + np.float32(offset)}),
        )
        if offset:
            with pytest.raises(ValueError, match=r"lm_head.weight differs from model.embed_tokens"):
                load(tmp_path)
        else:
            assert "lm_head.weight" not in load(tmp_path)


class TestFilesThatDoNotFit:
    def refused(self, folder, match, error: type[Exception] = ValueError):
        with pytest.raises(error, match=match):
            open_model(str(folder))

    def test_no_config(self, single_copy):
        (single_copy / "config.json").unlink()
        self.refused(single_copy, "has no config.json", FileNotFoundError)

    @pytest.mark.parametrize(
        ("text", "match"),
        [
            (b"{", "not valid JSON"),
            (b"", "not valid JSON"),
            (b"[]", "got list"),
            (b"null", "got NoneType"),
            (b"\xff{}", "not valid JSON: .*utf-8"),
            ("{}".encode("utf-16"), "not valid JSON"),
            (b"[" * 100_000, "not valid JSON: "),
            (b'{"a": ' * 100_000, "not valid JSON: "),
            (b'{"vocab_size": ' + b"9" * 5000 + b"}", "not valid JSON: "),
            (b'{"a": 1, "b": {"c": 1, "c": 2}}', "not valid JSON: doubled: c"),
        ],
    )
    def test_bad_config(self, single_copy, text, match):
        (single_copy / "config.json").write_bytes(text)
        self.refused(single_copy, rf"config.json .*{match}", SpielError)

    @pytest.mark.parametrize(
        ("key", "value", "match"),
        [
            (
                "hidden_size",
                10**9,
                r"mis-shaped: model.embed_tokens.weight \[96, 32\], expected \[96, 1000000000\]",
            ),
            ("vocab_size", 2**31 - 1, r"mis-shaped: lm_head.weight \[96, 32\], expected \[2147483647, 32\]"),
            ("num_hidden_layers", 9999, r"has 30 tensors for 9999 layers"),
            ("num_hidden_layers", 20, r"missing: model.layers.9.*\n  and \d+ more"),
            (
                "num_hidden_layers",
                10**6,
                r"config.json: num_hidden_layers must be an integer from 1 to 10000",
            ),
            ("num_attention_heads", 0, r"config.json: num_attention_heads must be"),
            ("hidden_size", 32.0, r"config.json: hidden_size must be an integer .*, got 32.0"),
            ("hidden_size", None, r"config.json: the model's configuration lacks 'hidden_size'"),
        ],
    )
    def test_sizes_that_the_weights_do_not_have(self, single_copy, key, value, match):
        change_json(single_copy / "config.json", lambda config: config.update({key: value}))
        self.refused(single_copy, f"(?s){match}", SpielError)

    def test_a_config_that_is_too_long(self, single_copy):
        with (single_copy / "config.json").open("r+b") as file:
            file.truncate(1 << 33)
        self.refused(single_copy, "config.json has 8589934592 bytes", SpielError)

    def test_an_adapter_is_no_model(self, tmp_path):
        (tmp_path / "adapter_config.json").write_text("{}")
        self.refused(
            tmp_path, "is an adapter and has no config.json: give the model it belongs to", FileNotFoundError
        )

    def test_what_is_neither_a_file_nor_a_folder(self, tmp_path):
        os.mkfifo(tmp_path / "x.gguf")
        self.refused(tmp_path / "x.gguf", "is neither a file nor a folder", SpielError)

    def test_truncated(self, single_copy):
        path = single_copy / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-1])
        self.refused(single_copy, r"model.safetensors is damaged or truncated")
        path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
        self.refused(single_copy, r"model.safetensors: it is a pointer of Git LFS, not the file", SpielError)

    def test_no_weights(self, single_copy):
        (single_copy / "model.safetensors").unlink()
        self.refused(single_copy, "neither model.safetensors nor", FileNotFoundError)
        (single_copy / "pytorch_model.bin").touch()
        self.refused(single_copy, r"pytorch_model.bin cannot be read safely: convert", FileNotFoundError)

    def edit_index(self, folder, edit):
        change_json(folder / "model.safetensors.index.json", lambda index: edit(index["weight_map"]))

    def test_absent_shard(self, sharded_copy):
        shard = min(sharded_copy.glob("*.safetensors"))
        shard.unlink()
        self.refused(sharded_copy, rf"absent shards: .*{shard.name}", FileNotFoundError)

    def test_tensor_that_no_shard_holds(self, sharded_copy):
        self.edit_index(sharded_copy, lambda index: index.update(ghost=index[UP]))
        self.refused(sharded_copy, "absent: ghost, listed in model-")

    def test_tensor_that_is_not_listed(self, sharded_copy):
        self.edit_index(sharded_copy, lambda index: index.pop(UP))
        self.refused(sharded_copy, rf"not listed: {UP}, found in model-")

    def test_tensor_in_another_shard(self, sharded_copy):
        shards = sorted(path.name for path in sharded_copy.glob("*.safetensors"))
        self.edit_index(sharded_copy, lambda index: index.update({UP: shards[index[UP] == shards[0]]}))
        self.refused(sharded_copy, rf"listed in model-\S+: {UP}, found in model-")

    def test_tensor_in_two_shards(self, sharded_copy):
        first, *_, last = sorted(sharded_copy.glob("*.safetensors"))
        tensors = load_file(first)
        save_file(load_file(last) | tensors, last)
        self.refused(sharded_copy, rf"doubled: {next(iter(tensors))} in {first.name} and {last.name}")

    def test_tensor_twice_in_the_index(self, sharded_copy):
        path = sharded_copy / "model.safetensors.index.json"
        text = path.read_text()
        path.write_text(text.replace(f'"{UP}":', f'"{UP}": "x", "{UP}":'))
        self.refused(sharded_copy, rf"index.json is not valid JSON: doubled: {UP}")

    def test_empty_index(self, sharded_copy):
        (sharded_copy / "model.safetensors.index.json").write_text("{}")
        self.refused(sharded_copy, "index.json has no weight_map")

    def test_one_file_beside_shards(self, sharded_copy, single):
        shutil.copy(single / "model.safetensors", sharded_copy)
        self.refused(sharded_copy, "has both model.safetensors and")

    def test_a_file_that_is_no_model(self, single):
        self.refused(single / "model.safetensors", "is not a GGUF file: give the folder")
