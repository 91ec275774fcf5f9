"""Folders that a run can use, and those that it cannot: refused in one line before anything is loaded."""

import os

import pytest
from support.run_cases import run, tiny_config

from spiel_jax.config import ConfigError
from spiel_jax.errors import SpielError
from spiel_jax.training import run as training
from spiel_jax.training.lock import LOCK, locked
from spiel_jax.training.workdir import check_usable, held

NAMES = [
    *("a?b", "a*b", "a[b]", "a\\b"),
    *("a b", "a#b", "a%20b", "a|b", "a'b", 'a"b', "a{b}", "a:b", "a\nb", "日本", "-x", "~x", "dots..", "1"),
    *("a" * 255, "x.orbax-checkpoint-tmp", "checkpoints"),
]


@pytest.mark.parametrize("name", NAMES[4:])
def test_names_that_can_be_used(tmp_path, name):
    check_usable(tmp_path / name)
    with held(tmp_path / name):
        pass
    assert list((tmp_path / name).iterdir()) == []


@pytest.mark.parametrize("name", NAMES[:4])
def test_names_that_storage_takes_for_patterns(tmp_path, name):
    for workdir in (tmp_path / name, tmp_path / name / "run"):
        with pytest.raises(ConfigError, match=r"for a part of a pattern.*choose a path without any of"):
            check_usable(workdir)


def a_file(folder):
    (folder / "w").write_text("x")
    return folder / "w"


def a_link(folder):
    (folder / "w").symlink_to("nowhere")
    return folder / "w"


UNUSABLE = {
    "is a file": a_file,
    "file is a file": lambda folder: a_file(folder).rename(folder / "file") / "run",
    "link to nowhere": a_link,
    "link to nowhere, where nothing": lambda folder: a_link(folder) / "run",
    "File name too long": lambda folder: folder / ("x" * 256),
    "too long": lambda folder: folder / "/".join(["x" * 200] * 20),
    "path in UTF-8": lambda folder: folder / "\udcff",
    "No such file or directory": lambda folder: folder / "proc",
}


@pytest.mark.parametrize("problem", UNUSABLE)
def test_unusable_folders(tmp_path, problem, monkeypatch):
    workdir = UNUSABLE[problem](tmp_path)
    if workdir.name == "proc":
        workdir = type(workdir)("/proc/nothing-can-be-made-here")
    refused_before_anything_is_loaded(workdir, problem, monkeypatch)


def refused_before_anything_is_loaded(workdir, problem, monkeypatch):
    def never(*_, **__):
        raise AssertionError("something was loaded")

    monkeypatch.setattr(training, "open_model", never)
    monkeypatch.setattr("spiel_jax.training.inputs.load_data", never)
    with pytest.raises(ConfigError, match=f"--workdir .*{problem}") as error:
        run(tiny_config("model", "data.jsonl"), workdir)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl", "timing.jsonl", "lock.json"])
def test_a_folder_where_a_file_belongs(tmp_path, name, monkeypatch):
    (tmp_path / name).mkdir()
    refused_before_anything_is_loaded(tmp_path, f"{name} is no file", monkeypatch)
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("name", ["checkpoints", "tensorboard", "profile"])
def test_a_file_where_a_folder_belongs(tmp_path, name, monkeypatch):
    (tmp_path / name).touch()
    refused_before_anything_is_loaded(tmp_path, f"{name} is no folder", monkeypatch)
    (tmp_path / name).unlink()
    (tmp_path / name).symlink_to("nowhere")
    refused_before_anything_is_loaded(tmp_path, f"{name} is a link to nothing", monkeypatch)


def test_a_file_system_that_does_not_rename_folders(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(os, "rename", refuse)
    monkeypatch.setattr(type(tmp_path), "rename", refuse)
    refused_before_anything_is_loaded(tmp_path / "w", "Function not implemented", monkeypatch)
    assert list((tmp_path / "w").iterdir()) == []


@pytest.mark.parametrize("code", [13, 30, 28, 122])  # permission, read-only, disk full, quota
def test_what_the_system_says_is_said(tmp_path, monkeypatch, code):
    def refuse(*_, **__):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(type(tmp_path), "mkdir", refuse)
    refused_before_anything_is_loaded(tmp_path / "w", os.strerror(code), monkeypatch)


def test_what_a_killed_probe_left_is_no_hindrance(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    for folder in (tmp_path, tmp_path / "checkpoints"):
        (folder / "probe.orbax-checkpoint-tmp" / "123456789").mkdir(parents=True)
    with held(tmp_path):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoints"]


def test_a_folder_in_use_is_refused_and_is_free_after_an_error(tmp_path, monkeypatch):
    config = tiny_config("model", "data.jsonl")
    with locked(tmp_path), pytest.raises(SpielError, match=r"in use: process \d+ on this host"):
        run(config, tmp_path)
    with pytest.raises(SpielError, match="no model at 'model'"):
        run(config, tmp_path)
    assert not (tmp_path / LOCK).exists()
