import json

from spiel_jax.training.metrics import Recorder, read_metrics, table


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
