import json

from spiel_jax.training.metrics import Recorder, peak_memory, read_metrics, record_replies, table


def test_lines_after_the_last_checkpoint_are_cut_off(tmp_path):
    with Recorder(tmp_path, 0, 5, progress=False) as recorder:
        recorder.evaluation(0, 2.0)
        for step in (1, 2, 3):
            recorder.step(step, {"loss": 1.0 / step, "learning_rate": 0.1}, 1, 100)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    with Recorder(tmp_path, 2, 5, progress=False) as recorder:
        recorder.step(3, {"loss": 0.25, "learning_rate": 0.1}, 1, 100)
    lines = read_metrics(tmp_path)
    assert [(line["step"], line.get("loss")) for line in lines] == [(0, None), (1, 1.0), (2, 0.5), (3, 0.25)]
    assert len((tmp_path / "timing.jsonl").read_text().splitlines()) == 3
    with Recorder(tmp_path, 0, 5, progress=False) as recorder:
        recorder.evaluation(0, 2.0)
    assert len(read_metrics(tmp_path)) == 1


def test_numbers_that_are_not_finite_stay_json(tmp_path):
    with Recorder(tmp_path, 0, 5, progress=False) as recorder:
        recorder.step(1, {"loss": float("nan"), "learning_rate": 0.1}, 1, 100)
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line)["loss"] == "nan"


def test_table():
    assert table([("a", "1"), ("long", "22")], "t") == "t\n--------\na     1\nlong  22"


def test_replies_are_added_to_those_of_before_and_not_to_another_run(tmp_path):
    file = tmp_path / "samples.jsonl"
    file.write_text('{"step": 5, "Hi": "a"}\n{"step": 9, "Hi": "b"}\n')  # of step 9 nobody knows any more
    record_replies(tmp_path, 6, {0: {"Hi": "base"}, 6: {"Hi": "<b>", "é": ""}})
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert lines == [
        {"step": 5, "Hi": "a"},
        {"step": 0, "Hi": "base"},
        {"step": 6, "Hi": "<b>", "é": ""},
    ]
    Recorder(tmp_path, 6, 9, progress=False).__exit__(None, None, None)
    assert file.exists()
    Recorder(tmp_path, 0, 9, progress=False).__exit__(None, None, None)
    assert not file.exists()


def test_the_peak_of_memory_is_recorded(tmp_path):
    assert 0.01 < peak_memory()["peak_host_gib"] < 1000
    with Recorder(tmp_path, 0, 5, progress=False) as recorder:
        recorder.step(1, {"loss": 1.0, "learning_rate": 0.1}, 1, 100)
    assert json.loads((tmp_path / "timing.jsonl").read_text())["peak_host_gib"] > 0.01
