"""Rows are written as a whole, or not at all."""

import pytest

from experiments.rows import write_rows


def test_an_interrupted_write_leaves_the_previous_file(tmp_path):
    out = tmp_path / "new" / "rows.jsonl"
    assert write_rows([{"text": "hyvää"}, {"text": "b"}], out) == 2
    assert out.read_text(encoding="utf-8") == '{"text": "hyvää"}\n{"text": "b"}\n'

    def broken():
        yield {"text": "c"}
        raise KeyError("d")

    with pytest.raises(KeyError):
        write_rows(broken(), out)
    assert out.read_text(encoding="utf-8") == '{"text": "hyvää"}\n{"text": "b"}\n'
