"""Records of a run's numbers: whole after any kill, and no failure of theirs stops the run."""

import json
import logging
import os
import struct

import pytest
from support.run_cases import chat_file, run, tiny_config

from spiel_jax.checkpoint import read_metadata
from spiel_jax.training.metrics import Recorder, read_metrics
from spiel_jax.training.records import JsonLines, TensorBoard, Watched


def steps(path):
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def events(folder):
    """(step, {name: value}) of every event, and the steps at which a session starts."""
    from tensorboardX.proto import event_pb2

    scalars, sessions = [], []
    for file in sorted(folder.iterdir()):
        data = file.read_bytes()
        while data:
            (length,) = struct.unpack("Q", data[:8])
            event = event_pb2.Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]
            if event.HasField("session_log"):
                sessions.append(event.step)
            if event.summary.value:
                scalars.append((event.step, {value.tag: value.simple_value for value in event.summary.value}))
    return scalars, sessions


class TestJsonLines:
    def test_lines_after_a_step_and_cut_ones_go(self, tmp_path):
        path = tmp_path / "lines.jsonl"
        path.write_text('{"step": 1}\n[]\nnull\n{"step": 2}\n{"step": 3}\n{"step": 2, "lo')
        record = JsonLines(path, 2)
        assert steps(path) == [1, 2]
        record.write(3, {"loss": float("inf")})
        record.close()
        assert path.read_text().splitlines()[-1] == '{"step": 3, "loss": "inf"}'

    def test_a_line_that_only_lacks_its_end_is_cut_too(self, tmp_path):
        path = tmp_path / "lines.jsonl"
        path.write_text('{"step": 1}\n{"step": 2}')  # the next one would be written behind it
        JsonLines(path, 2).close()
        assert steps(path) == [1]

    def test_a_kill_while_it_is_rewritten_leaves_it(self, tmp_path, monkeypatch):
        path = tmp_path / "lines.jsonl"
        path.write_text('{"step": 1}\n{"step": 2}\n')
        monkeypatch.setattr(os, "fsync", lambda number: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            JsonLines(path, 1)
        assert steps(path) == [1, 2]

    def test_lines_that_do_not_change_are_not_rewritten(self, tmp_path):
        path = tmp_path / "lines.jsonl"
        path.write_text('{"step": 1}\n')
        before = path.stat().st_ino
        JsonLines(path, 1).close()
        assert path.stat().st_ino == before

    def test_what_could_not_be_written_comes_when_there_is_room(self, tmp_path):
        path = tmp_path / "lines.jsonl"
        record = JsonLines(path, 0)
        file, room = record._file, [5]

        class Full:
            def write(self, data):
                if not room[0]:
                    raise OSError(28, "No space left on device")
                count = file.write(data[: room[0]])
                room[0] -= count
                return count

            def __getattr__(self, name):
                return getattr(file, name)

        record._file = Full()
        for step in (1, 2):
            with pytest.raises(OSError, match="No space"):
                record.write(step, {})
        record._file = file
        record.write(3, {})
        record.close()
        assert steps(path) == [1, 2, 3]


def test_event_files_hold_the_numbers_and_where_a_run_was_continued(tmp_path):
    record = TensorBoard(tmp_path / "board", 0)
    record.write(1, {"loss": 0.5, "rate": float("nan")})
    record.close()
    record = TensorBoard(tmp_path / "board", 4)
    record.write(5, {"loss": 0.25})
    record.close()
    scalars, sessions = events(tmp_path / "board")
    assert sorted(scalars, key=lambda one: one[0]) == [(1, {"loss": 0.5}), (5, {"loss": 0.25})]
    assert sessions == [5]


class Broken:
    """A record that fails from a certain write on."""

    def __init__(self, good=0, error=OSError(28, "No space left on device")):  # noqa: B008
        self.good, self.error, self.calls = good, error, 0

    def write(self, step, numbers):
        self.calls += 1
        if self.calls > self.good:
            raise self.error

    def close(self):
        raise self.error


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), ValueError("of a library")])
def test_a_failure_is_told_once_and_the_run_goes_on(caplog, error):
    record = Watched("metrics.jsonl", lambda: Broken(2, error))
    with caplog.at_level(logging.ERROR, "spiel_jax"):
        for step in range(5):
            record.write(step, {})
            assert record.failed == (step >= 2)
        record.close()
    (message,) = [line.getMessage() for line in caplog.records]
    assert message == f"metrics.jsonl cannot be written: {type(error).__name__}: {error}. The run goes on"


@pytest.mark.parametrize("name", ["metrics.jsonl", "timing.jsonl", "tensorboard"])
def test_one_of_a_runs_files_that_fails_takes_no_other_with_it(tmp_path, name, caplog):
    (tmp_path / name).mkdir() if name != "tensorboard" else (tmp_path / name).write_text("a file")
    with Recorder(tmp_path, 0, 200, progress=False) as recorder:
        assert recorder.failed
        for step in range(1, 101):  # more than any queue holds
            recorder.step(step, {"loss": 1.0, "learning_rate": 0.1}, 1, 100)
    assert caplog.text.count("cannot be written") == 1
    if name != "metrics.jsonl":
        assert len(read_metrics(tmp_path)) == 100
    if name != "tensorboard":
        assert len(events(tmp_path / "tensorboard")[0]) > 100


def test_a_run_stops_with_a_checkpoint_if_asked_to(tmp_path, llama_folder, monkeypatch):
    config = tiny_config(llama_folder, chat_file(tmp_path), "lora")
    config.on_record_failure = "stop"

    def refuse(self, step, numbers):
        if step >= 2:
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("spiel_jax.training.records.TensorBoard.write", refuse)
        summary = run(config, tmp_path / "run")
    assert not summary.finished
    assert 2 <= summary.step < config.steps
    assert read_metadata(tmp_path / "run")["step"] == summary.step
    config.on_record_failure = "continue"
    assert run(config, tmp_path / "run").finished


def test_nobody_looks_any_more(tmp_path, monkeypatch):
    def gone(*args, **kwargs):
        raise BrokenPipeError

    with Recorder(tmp_path, 0, 5, progress=False) as recorder:
        monkeypatch.setattr(recorder._bar, "update", gone)
        monkeypatch.setattr(recorder._bar, "set_postfix", lambda *args, refresh=True: refresh and gone())
        monkeypatch.setattr("tqdm.tqdm.write", gone)
        recorder.step(1, {"loss": 1.0, "learning_rate": 0.1}, 1, 100)
        recorder.evaluation(1, 2.0)
        recorder.say("hello")
    assert len(read_metrics(tmp_path)) == 2
