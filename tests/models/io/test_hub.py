"""A cache of the hub that was written by hand: nothing is asked of a network."""

import shutil

import huggingface_hub
import pytest
from huggingface_hub.errors import HFValidationError, RevisionResolutionError

from spiel_jax.errors import NotFoundError, SpielError
from spiel_jax.models.io import hub
from spiel_jax.models.io.hub import HubId, hub_id
from spiel_jax.models.io.loading import model_shape, open_model

MAIN, OLD = "a" * 40, "b" * 40


@pytest.fixture
def cache(tmp_path, monkeypatch, llama_folder):
    """org/name: the model at the root of main, in ``sub`` of the tag v1, nothing of it elsewhere."""
    folder = tmp_path / "hub"
    repository = folder / "models--org--name"
    shutil.copytree(llama_folder, repository / "snapshots" / MAIN)
    shutil.copytree(llama_folder, repository / "snapshots" / OLD / "sub" / "model")
    for ref, commit in {"main": MAIN, "v1": OLD, "refs/pr/1": OLD}.items():
        (repository / "refs" / ref).parent.mkdir(parents=True, exist_ok=True)
        (repository / "refs" / ref).write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return folder


@pytest.mark.parametrize(
    "source",
    [
        "org/name",
        f"org/name@{MAIN}",
        "org/name/sub/model@v1",
        f"org/name/sub/model@{OLD}",
        "org/name/sub/model@refs/pr/1",
    ],
)
def test_parts_and_revisions(cache, source, llama_folder):
    expected = open_model(str(llama_folder))
    found = open_model(source, cache_dir=cache)
    assert found.config == expected.config
    assert found.checkpoint.stored == expected.checkpoint.stored
    assert found.tokenizer().get_vocab() == expected.tokenizer().get_vocab()


@pytest.mark.parametrize(
    ("source", "match"),
    [
        ("org/name/sub", "org/name has no sub "),
        ("org/name/sub/other@v1", "org/name has no sub/other"),
        ("org/name@v2", "'org/name@v2' is neither a local path nor to be had"),
        ("org/other", "'org/other' is neither a local path nor to be had"),
        ("org/name/tiny.gguf", "org/name has no tiny.gguf"),
        ("org/name@v1", "has no config.json"),
        ("a--b/c", "'a--b/c' is neither .* repo_id"),
    ],
)
def test_what_is_not_there(cache, source, match):
    with pytest.raises(NotFoundError, match=match) as error:
        open_model(source, cache_dir=cache)
    assert "\n" not in str(error.value)


def test_shapes_of_parts_and_revisions(cache, monkeypatch, llama_folder):
    ask = hub.huggingface_hub.hf_hub_download
    monkeypatch.setattr(
        hub.huggingface_hub,
        "hf_hub_download",
        lambda *args, **options: ask(*args, cache_dir=cache, **options),
    )
    expected = open_model(str(llama_folder)).config
    assert model_shape("org/name") == model_shape("org/name/sub/model@v1") == expected
    with pytest.raises(NotFoundError, match=r"no config.json of 'org/name@v1' here"):
        model_shape("org/name@v1")


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("org/name", HubId("org/name")),
        ("org/name@refs/pr/7", HubId("org/name", revision="refs/pr/7")),
        ("org/name/a/b.gguf@v1", HubId("org/name", "a/b.gguf", "v1")),
        *[
            (name, None)
            for name in ("name", "/a/b", "./a/b", "../a/b", "a/b/", "a/b@", "a/b@c@d", "a/b.gguf")
        ],
        *[(name, None) for name in ("a/b/../c", "a/b/./c", "a/b@../c", "~/a/b", "a b/c", "a//b", "a/b\n")],
        *[(name, None) for name in ("\ud800/b", "x" * 5000)],
    ],
)
def test_what_an_id_is(source, found):
    assert hub_id(source) == found
    if found is None:
        with pytest.raises(NotFoundError, match="no model at"):
            open_model(source)
    else:
        assert str(found) == source


def test_a_null_character_is_in_no_path():
    assert hub_id("a/b\0") is None
    with pytest.raises(SpielError, match=r"the model 'a/b.x00' can be no path"):
        open_model("a/b\0")


def test_a_path_below_a_folder_that_is_here_is_no_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "base").mkdir(parents=True)
    with pytest.raises(NotFoundError, match="no model at 'runs/base/model'"):
        open_model("runs/base/model")


@pytest.mark.parametrize(
    "problem",
    [HFValidationError("a\nb"), RevisionResolutionError("a b"), RuntimeError("a b"), OSError("a b")],
)
def test_whatever_the_hub_raises_is_told(monkeypatch, problem):
    def download(*args, **options):
        raise problem

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(NotFoundError, match=r"'org/name@v1' is neither a local path .*hub: a b"):
        open_model("org/name@v1")


def test_all_parts_of_a_split_file_are_asked_for(monkeypatch, tmp_path):
    asked = {}

    def download(repository, **options):
        asked.update(options)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    (tmp_path / "q8").mkdir()
    (tmp_path / "q8" / "m-00001-of-00003.gguf").touch()
    path = hub_id("org/name/q8/m-00001-of-00003.gguf@v1").download()
    assert path == tmp_path / "q8" / "m-00001-of-00003.gguf"
    assert asked["revision"] == "v1"
    assert asked["allow_patterns"] == ["q8/m-*-of-00003.gguf"]
