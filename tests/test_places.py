import os

import pytest

from spiel_jax.adapters.load import load_run
from spiel_jax.checkpoint import newest_metadata
from spiel_jax.config import ConfigError, data_config, default_config
from spiel_jax.errors import SpielError
from spiel_jax.models.io.loading import model_shape, open_model
from spiel_jax.places import local_path, remembered
from spiel_jax.training.regridding import regrid

REMOTE = ["gs://bucket/run", "s3://b/r", "hdfs://host:9000/r", "https://example.org/r", "gs:/bucket/run"]


@pytest.mark.parametrize("place", REMOTE)
def test_what_is_elsewhere_is_refused_by_name_wherever_a_place_is_taken(tmp_path, monkeypatch, place):
    monkeypatch.chdir(tmp_path)

    def sources(place):
        config = default_config()
        config.data.sources = (place,)
        return data_config(config)

    takers = (load_run, newest_metadata, open_model, model_shape, sources)
    for takes in (*takers, lambda place: regrid(place, {}, "out"), lambda place: regrid("run", {}, place)):
        with pytest.raises(SpielError, match=f"{place} is no place on this machine.*mount it"):
            takes(place)
    assert not list(tmp_path.iterdir())


def test_a_file_url_says_what_to_give():
    with pytest.raises(SpielError, match=r"file:///a/b is a URL: give the path alone"):
        local_path("file:///a/b", "--workdir")


@pytest.mark.parametrize(("place", "problem"), [("a\0b", "null character"), ("~nobody-here/x", "home")])
def test_what_can_be_no_path(place, problem):
    with pytest.raises(SpielError, match=problem):
        local_path(place, "--workdir")


@pytest.mark.parametrize("place", ["a b", "c:", "runs/lr=1e-4", "-x", "C:/x", "a:b/c"])
def test_other_names_are_paths(place):
    assert str(local_path(place, "--workdir")) == place


def test_places_here_are_remembered_by_their_absolute_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there" / "sub").mkdir(parents=True)
    (tmp_path / "there" / "a.jsonl").touch()
    for place in ("there", "./there/../there", str(tmp_path / "there")):
        assert remembered(place) == str(tmp_path / "there")
    assert remembered("there/*.jsonl") == str(tmp_path / "there/*.jsonl")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert remembered("~/there") == str(tmp_path / "there")
    for name in ("org/model", "package:there", "random", "nowhere/*.jsonl", "", "a\0b"):
        assert remembered(name) == name
    assert os.getcwd() == str(tmp_path)


def test_the_message_of_a_source_names_the_key():
    config = default_config()
    config.data.sources = ("gs://b/train.jsonl",)
    with pytest.raises(ConfigError, match=r"config\.data\.sources: the data source gs://b/train\.jsonl"):
        data_config(config)
