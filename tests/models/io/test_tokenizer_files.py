"""Folders whose tokenizer cannot be read: the message names the file, and what would help."""

import importlib.util
import json

import pytest

from spiel_jax.data.stops import stop_tokens
from spiel_jax.errors import MissingExtra, SpielError
from spiel_jax.models.io.tokenizer_files import read_tokenizer

PROGRAM = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "has no file of one"),
        ({"tokenizer.json": "{"}, r"tokenizer\.json is not valid JSON"),
        ({"tokenizer.json": "[]"}, r"tokenizer\.json must hold a JSON object, not list"),
        ({"tokenizer.json": '{"model": 5}'}, r"no tokenizer can be read from tokenizer\.json in"),
        ({"tokenizer.json": "{}", "tokenizer_config.json": "7"}, r"tokenizer_config\.json must hold"),
        (
            {"tokenizer.json": "{}", "special_tokens_map.json": "\udcff"},
            r"special_tokens_map\.json is not valid",
        ),
        (
            {"tokenizer.json": "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"},
            r"tokenizer\.json: it is a pointer of Git LFS, not the file; get that by git lfs pull",
        ),
        ({"tokenizer_config.json": json.dumps(PROGRAM), "own.py": "1 / 0"}, "a program that lies there"),
    ],
)
def test_what_is_wrong_is_said(tmp_path, files, message):
    for name, text in ({"config.json": '{"model_type": "llama"}'} | files).items():
        (tmp_path / name).write_text(text, errors="surrogateescape")
    with pytest.raises(SpielError, match=message):
        read_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "package", "command"),
    [
        (
            "tokenizer.model",
            b"\n\x0e\n\x05<unk>",
            "sentencepiece",
            'pip install "spiel_jax\\[sentencepiece\\]"',
        ),
        ("tokenizer.model", b"IQ== 0\n", "tiktoken", "pip install tiktoken"),
        ("tekken.json", b"{}", "mistral_common", "pip install mistral-common"),
    ],
)
def test_a_package_that_is_missing_is_named(tmp_path, monkeypatch, name, content, package, command):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: None if n == package else found(n, *a))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / name).write_bytes(content)
    with pytest.raises(
        MissingExtra, match=f"{name} is a tokenizer that takes the package {package}.*{command}"
    ):
        read_tokenizer(tmp_path)


class TestStops:
    """The eos_token_id of generation_config.json, or without that file of config.json, joins the stops."""

    @pytest.fixture
    def folder(self, tmp_path, chatml):
        chatml.save_pretrained(tmp_path)
        return tmp_path

    @pytest.mark.parametrize(
        ("said", "more"),
        [(5, {5}), ([5, 7], {5, 7}), ([], set()), (None, set()), ([5, -1, 10**12], {5})],
    )
    @pytest.mark.parametrize("name", ["generation_config.json", "config.json"])
    def test_a_number_or_a_list(self, folder, chatml, name, said, more):
        (folder / name).write_text(json.dumps({"eos_token_id": said, "model_type": "llama"}))
        assert stop_tokens(read_tokenizer(folder)) == stop_tokens(chatml) | more

    def test_generation_config_comes_first(self, folder, chatml):
        (folder / "config.json").write_text('{"eos_token_id": 7, "model_type": "llama"}')
        (folder / "generation_config.json").write_text('{"eos_token_id": 5}')
        assert stop_tokens(read_tokenizer(folder)) == stop_tokens(chatml) | {5}
        (folder / "generation_config.json").write_text("{}")
        assert stop_tokens(read_tokenizer(folder)) == stop_tokens(chatml)

    @pytest.mark.parametrize("said", ["</s>", [1.5], True, {"a": 1}])
    def test_what_is_no_token_is_refused(self, folder, said):
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": said}))
        with pytest.raises(
            SpielError, match=r"generation_config\.json: eos_token_id must be the number of a"
        ):
            read_tokenizer(folder)

    def test_no_part_of_what_is_saved(self, folder, tmp_path):
        (folder / "generation_config.json").write_text('{"eos_token_id": 5}')
        read_tokenizer(folder).save_pretrained(tmp_path / "again")
        assert 5 not in stop_tokens(read_tokenizer(tmp_path / "again"))
