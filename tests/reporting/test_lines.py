import json
import math

import pytest

from spiel_jax.reporting.lines import MOST, read_lines, series


@pytest.mark.parametrize(
    "line",
    [
        b"{",
        b"[1]",
        b"null",
        b"\xff\xfe",
        b'{"loss": 1.0}',
        b'{"step": "2", "loss": 1.0}',
        b'{"step": true}',
        b'{"step": 1.5}',
        b'{"step": -1}',
        b'{"step": 1' + b"0" * 30 + b"}",
        b"[" * 100_000,
        b"\x00\x00",
    ],
)
def test_a_damaged_line_is_told_and_the_others_are_read(tmp_path, line):
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b'{"step": 1, "loss": 3.0}\n' + line + b'\n\n{"step": 3, "loss": 2.0}\n')
    lines, told = read_lines(file)
    assert [one["step"] for one in lines] == [1, 3]
    assert told == ["metrics.jsonl: line 2 is damaged and was left out"]


def test_many_damaged_lines_are_counted(tmp_path):
    file = tmp_path / "timing.jsonl"
    file.write_bytes(b"x\n" * 10 + b'{"step": 3}\n{"st')
    lines, told = read_lines(file)
    assert lines == [{"step": 3}]
    assert len(told) == MOST + 1
    assert told[-1] == "timing.jsonl: 8 more lines are damaged and were left out"


def test_what_cannot_be_read_is_told(tmp_path):
    assert read_lines(tmp_path / "metrics.jsonl") == ([], [])
    (tmp_path / "metrics.jsonl").mkdir()
    assert read_lines(tmp_path / "metrics.jsonl") == ([], ["metrics.jsonl cannot be read: Is a directory"])


def test_numbers_are_told_from_others():
    line = '{"step": 4, "a": 1e999, "b": "inf", "c": NaN, "d": true, "e": [1], "f": "text", "g": 1%s}'
    found = series([json.loads(line % ("0" * 400)), {"step": 2, "a": 1, "b": 0.5}])
    assert list(found) == ["a", "b", "c", "g"]
    assert found["a"].steps.tolist() == [2, 4]
    assert found["a"].values[0] == 1
    assert math.isnan(found["a"].values[1])
    assert (found["b"].last, found["a"].last) == (0.5, 1.0)
    assert math.isnan(found["c"].last)


def test_of_a_step_that_is_there_twice_the_later_line_counts():
    found = series([{"step": 1, "a": 1}, {"step": 2, "a": 2}, {"step": 1, "a": 3}])["a"]
    assert (found.steps.tolist(), found.values.tolist()) == ([1, 2], [3, 2])
