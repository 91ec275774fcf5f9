"""A place of a tokenizer needs the files of a tokenizer and nothing else."""

import shutil

import gguf
import huggingface_hub
import pytest

from spiel_jax.errors import NotFoundError, SpielError
from spiel_jax.models import open_model, open_tokenizer

TOKENS = ["a", "b", "ab", "<end>"]
FILES = ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]


@pytest.fixture
def files(llama_folder):
    return {name: (llama_folder / name).read_bytes() for name in FILES}


def filled(folder, files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def write_vocabulary(path):
    """A GGUF file without a tensor."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_string("tokenizer.ggml.model", "gpt2")
    writer.add_array("tokenizer.ggml.tokens", TOKENS)
    writer.add_array("tokenizer.ggml.merges", ["a b"])
    writer.add_uint32("tokenizer.ggml.eos_token_id", 3)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


def test_a_folder_with_its_files_alone(files, llama_folder, tmp_path):
    folder = filled(tmp_path / "tokenizer", files)
    with pytest.raises(NotFoundError, match=r"has no config\.json"):
        open_model(str(folder))
    found, expected = open_tokenizer(str(folder)), open_model(str(llama_folder)).tokenizer()
    assert found.get_vocab() == expected.get_vocab()
    assert found.chat_template == expected.chat_template
    assert open_tokenizer(str(llama_folder)).get_vocab() == expected.get_vocab()


def test_a_config_beside_it_that_is_of_no_model_of_ours(files, tmp_path):
    folder = filled(tmp_path, files | {"config.json": b'{"model_type": "whisper"}'})
    assert open_tokenizer(str(folder)).eos_token == "</s>"


@pytest.mark.parametrize("name", ["vocabulary.gguf", "without_ending", "m-00001-of-00003.gguf"])
def test_the_header_of_a_gguf_file(name, tmp_path):
    write_vocabulary(tmp_path / name)
    assert open_tokenizer(str(tmp_path / name)).encode("ab") == [2]


def test_another_part_of_a_split_file(tmp_path):
    (tmp_path / "m-00003-of-00003.gguf").write_bytes(b"GGUF")
    with pytest.raises(
        NotFoundError, match=r"m-00003.* the first one, m-00001-of-00003\.gguf, is not beside"
    ):
        open_tokenizer(str(tmp_path / "m-00003-of-00003.gguf"))
    write_vocabulary(tmp_path / "m-00001-of-00003.gguf")
    assert open_tokenizer(str(tmp_path / "m-00003-of-00003.gguf")).eos_token == "<end>"


def test_a_folder_with_gguf_files(files, tmp_path):
    write_vocabulary(tmp_path / "one.gguf")
    assert open_tokenizer(str(tmp_path)).eos_token == "<end>"
    filled(tmp_path, files)
    assert open_tokenizer(str(tmp_path)).eos_token == "<end>"  # as of a model
    write_vocabulary(tmp_path / "two.gguf")
    assert open_tokenizer(str(tmp_path)).eos_token == "</s>"
    for name in FILES:
        (tmp_path / name).unlink()
    with pytest.raises(NotFoundError, match=r"exactly one GGUF file, found one\.gguf, two\.gguf"):
        open_tokenizer(str(tmp_path))


def test_a_package(files, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    filled(tmp_path / "words_of_ours", files | {"__init__.py": b"1 / 0"})
    assert open_tokenizer("package:words_of_ours").eos_token == "</s>"
    with pytest.raises(NotFoundError, match="'words_of_no_one' is not installed"):
        open_tokenizer("package:words_of_no_one")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("EMPTY", "holds no tokenizer: expected tokenizer.json"),
        (
            "EMPTY/weights.safetensors",
            "is not a GGUF file: give the folder that the tokenizer's files are in",
        ),
        ("EMPTY/no/where", "no tokenizer at "),
        ("random", "a random model has no tokenizer"),
        ("gs://bucket/tokenizer", "the tokenizer gs://bucket/tokenizer is no place on this machine"),
    ],
)
def test_what_is_missing_is_named(tmp_path, source, message):
    (tmp_path / "weights.safetensors").write_bytes(b"")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(SpielError, match=message):
        open_tokenizer(source.replace("EMPTY", str(tmp_path)))


class TestHub:
    @pytest.fixture
    def asked(self, monkeypatch, tmp_path):
        """What is asked of the hub, which has whatever lies in a folder."""
        asked = {}

        def download(repository, **options):
            asked.update(options, repository=repository)
            return str(tmp_path / "snapshot")

        monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
        return asked

    def taken(self, asked, names):
        return list(
            huggingface_hub.utils.filter_repo_objects(
                names, allow_patterns=asked["allow_patterns"], ignore_patterns=asked["ignore_patterns"]
            )
        )

    def test_no_weights_are_downloaded(self, asked, files, tmp_path):
        filled(tmp_path / "snapshot" / "sub", files)
        assert open_tokenizer("org/name/sub@v1", cache_dir=tmp_path).eos_token == "</s>"
        assert (asked["repository"], asked["revision"], asked["cache_dir"]) == ("org/name", "v1", tmp_path)
        wanted = ["tokenizer.json", "tokenizer.model", "spiece.model", "vocab.txt", "merges.txt"]
        wanted += ["chat_template.jinja", "additional_chat_templates/tool_use.jinja", "config.json"]
        weights = ["model.safetensors", "model-00001-of-00002.safetensors", "pytorch_model.bin", "m.gguf"]
        names = [f"sub/{name}" for name in wanted + weights] + wanted
        assert self.taken(asked, names) == [f"sub/{name}" for name in wanted]

    def test_of_a_gguf_file_the_first_part(self, asked, tmp_path):
        (tmp_path / "snapshot").mkdir()
        write_vocabulary(tmp_path / "snapshot" / "m-00001-of-00002.gguf")
        assert open_tokenizer("org/name/m-00002-of-00002.gguf").eos_token == "<end>"
        assert asked["allow_patterns"] == ["m-00001-of-00002.gguf"]

    def test_a_repository_without_one(self, asked, tmp_path):
        (tmp_path / "snapshot").mkdir()
        with pytest.raises(NotFoundError, match="holds no tokenizer"):
            open_tokenizer("org/name")

    def test_named_templates_come_with_a_model(self, asked, llama_folder, tmp_path):
        shutil.copytree(llama_folder, tmp_path / "snapshot")
        open_model("org/name")
        names = ["config.json", "additional_chat_templates/tool_use.jinja", "onnx/config.json"]
        names += ["tokenizer/weights.bin", "original/model.safetensors"]
        assert self.taken(asked, names) == names[:2]
