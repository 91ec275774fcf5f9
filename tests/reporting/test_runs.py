import json
import shutil

import pytest
from support.run_folders import config, curves, write_lines, write_run

from spiel_jax.errors import NotFoundError, SpielError
from spiel_jax.reporting.runs import Reply, read_runs


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "one")


@pytest.fixture
def folder(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "copy")


def test_a_finished_run(finished):
    (run,) = read_runs([finished])
    assert (run.name, run.method, run.steps, run.seconds, list(run.notes)) == (
        "one",
        "spiel_ag",
        60,
        30.0,
        [],
    )
    assert run.replies == [Reply(0, "Hi", "Hello."), Reply(60, "Hi", "Hello from spiel_ag.")]
    assert run.changes.step == 60
    assert list(run.cohorts) == [5, 15, 25, 35, 45, 55]


def test_names_tell_runs_apart(finished, tmp_path):
    same = shutil.copytree(finished, tmp_path / "one")
    names = [run.name for run in read_runs([finished, same, same])]
    assert names == [f"{finished.parent.name}/one", f"{tmp_path.name}/one (1)", f"{tmp_path.name}/one (2)"]


def test_a_run_without_a_checkpoint(folder):
    shutil.rmtree(folder / "checkpoints")
    (run,) = read_runs([folder])
    assert run.changes is None
    assert run.notes == ["no checkpoint yet: where the deltas are cannot be shown"]


def test_a_damaged_checkpoint_is_told(folder):
    for file in (folder / "checkpoints" / "60" / "deltas").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    (run,) = read_runs([folder])
    (note,) = run.notes
    assert run.changes is None
    assert "checkpoint 60 in" in note
    assert "is damaged" in note
    assert run.steps == 60


@pytest.mark.parametrize("content", ["", "{", "[]", "[" * 100_000])
def test_a_damaged_config_is_told(folder, content):
    (folder / "config.json").write_text(content)
    (run,) = read_runs([folder])
    assert run.config == {}
    assert len(run.notes) == 1
    assert run.notes[0].startswith("config.json ")
    assert run.changes is not None


def test_a_run_that_has_only_begun(tmp_path):
    config(tmp_path)
    (run,) = read_runs([tmp_path])
    assert run.steps == 0
    assert [note.partition(" ")[0] for note in run.notes] == ["metrics.jsonl", "no"]


def test_an_unfinished_line_and_texts_that_are_no_replies(folder):
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 61, "lo')
    write_lines(folder / "samples.jsonl", [{"step": 1, "a": "b", "c": 3}, {"a": "b"}])
    (run,) = read_runs([folder])
    assert len(run.notes) == 2
    assert "unfinished" in run.notes[0]
    assert "samples.jsonl: line 2 is damaged" in run.notes[1]
    assert run.replies == [Reply(1, "a", "b")]


def test_what_is_no_run_is_refused(tmp_path, finished):
    with pytest.raises(NotFoundError, match="there is no such folder: expected the --workdir"):
        read_runs([tmp_path / "nowhere"])
    with pytest.raises(NotFoundError, match=r"is no folder of a run: it has no config\.json"):
        read_runs([finished, tmp_path])
    with pytest.raises(NotFoundError, match="no such folder"):
        read_runs([finished / "config.json"])
    with pytest.raises(SpielError, match="RUN gs://bucket/run is no place on this machine"):
        read_runs(["gs://bucket/run"])


def test_a_weight_that_no_run_has_is_refused(finished, tmp_path):
    (run,) = read_runs([finished], ["lm_head.weight"])
    assert [one.weight.name for one in run.changes.maps] == ["lm_head.weight"]
    with pytest.raises(
        SpielError, match=r"--weight=7\.mlp\.up_proj.* there are model\.layers\.0\.mlp\.up_proj"
    ):
        read_runs([finished], ["7.mlp.up_proj.weight"])
    curves(tmp_path)
    with pytest.raises(SpielError, match="no run has sparse deltas"):
        read_runs([tmp_path], ["w"])


def test_nothing_in_the_folder_changes(folder):
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    read_runs([folder])
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    assert json.loads((folder / "config.json").read_text())["method"] == "spiel_ag"
