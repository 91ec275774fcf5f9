import gzip
import json
import os

import pyarrow
import pytest

from spiel_jax.data.files import DataError, file_rows

ROW = '{"prompt": "a", "completion": "b"}'
VALUE = json.loads(ROW)
DEEP = "[" * 100_000 + "]" * 100_000


def problems(path, content):
    """What is wrong with each row of a file."""
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    rows = list(file_rows(path))
    assert [row.location for row in rows] == [f"{path}:{n}" for n in range(1, len(rows) + 1)]
    return [row.problem for row in rows]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"prompt": "\\ud83d"}', "holds half of a surrogate pair"),
        ('{"\\uDFFF": 1}', "holds half of a surrogate pair"),
        (DEEP, "nested too deeply"),
        ('{"n": ' + "9" * 10_000 + "}", "not valid JSON: Exceeds the limit"),
        ("\0\0", "not valid JSON"),
        (b'{"a": "caf\xe9"}', "not valid UTF-8"),
        ("{", "not valid JSON"),
        ("[", "; a list of rows belongs in .json"),
        ('{"a": {"b": 1, "b": 1}, "a": 2}', "names the key 'b' twice"),
    ],
    ids=range(9),
)
def test_a_broken_line_is_one_malformed_row(tmp_path, line, problem):
    line = line if isinstance(line, bytes) else line.encode()
    found = problems(tmp_path / "a.jsonl", b"\n".join([ROW.encode(), line, ROW.encode()]))
    assert found[0] is None
    assert problem in found[1]
    assert found[2] is None


def test_a_row_of_a_list_that_names_a_key_twice_is_malformed(tmp_path):
    rows = '[{"a": 1}, {"a": [{"b": 1, "b": 2}]}, {"b": {}}, {"a": 1, "c": {"a": 1}, "a": 1}]'
    twice = ["names the key 'b' twice", "names the key 'a' twice"]
    (tmp_path / "a.json").write_text(rows)
    assert [row.problem for row in file_rows(tmp_path / "a.json")] == [None, twice[0], None, twice[1]]
    (tmp_path / "b.json").write_text('{"data": [], "data": []}')
    with pytest.raises(DataError, match="the object of all rows names the key 'data' twice"):
        list(file_rows(tmp_path / "b.json"))


def test_a_whole_pair_is_a_character(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": "\\ud83d\\ude00"}')
    assert [row.value for row in file_rows(path)] == [{"a": "\U0001f600"}]


def test_a_line_without_end_is_not_read_whole(tmp_path, monkeypatch):
    monkeypatch.setattr("spiel_jax.data.files._MAX_LINE", 50)
    found = problems(tmp_path / "a.jsonl", f"{ROW}\n{'x' * 999}\n{ROW}\n")
    assert found == [None, "is longer than 50 bytes: divide it", None]


def gz(content):
    return gzip.compress(content, mtime=0)  # the same in each process that collects tests


def zstd(content):
    return pyarrow.compress(content, codec="zstd", asbytes=True)


LINES = (ROW + "\n").encode() * 3


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.ndjson", LINES),
        ("a.jsonl", b"\xef\xbb\xbf" + LINES),
        ("a.jsonl", LINES.replace(b"\n", b"\r\n")),
        ("A.JSONL.GZ", gz(LINES)),
        ("a.jsonl.zst", zstd(LINES)),
        ("a.json.zst", zstd(json.dumps([VALUE] * 3).encode())),
        ("a.json", json.dumps([VALUE] * 3).encode("utf-16")),
        ("a.csv", b"prompt,completion\r\na,b\r\na,b\r\na,b\r\n"),
        ("a.csv.gz", gz(b"\xef\xbb\xbfprompt,completion,note\na,b,\n\na,b,\na,b,\n")),
        ("a.tsv", b"prompt\tcompletion\n" + b"a\tb\n" * 3),
    ],
    ids=range(10),
)
def test_kinds_of_files(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    assert [row.value for row in file_rows(path)] == [VALUE] * 3


def test_rows_of_a_table_are_located(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b'prompt,completion\n"a\nb",c\nonly one\ncaf\xe9,d\ne,f\n"g,h\n')
    rows = list(file_rows(path))
    assert [row.location for row in rows] == [f"{path}:{n}" for n in (2, 4, 5, 6, 7)]
    assert rows[0].value == {"prompt": "a\nb", "completion": "c"}
    assert rows[1].problem == "has 1 fields, and the first line 2"
    assert rows[2].problem == "not valid UTF-8"
    assert rows[3].value == {"prompt": "e", "completion": "f"}
    assert rows[4].problem is not None
    assert "unexpected end of data" in rows[4].problem


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.jsonl.gz",
            gz(LINES * 9)[:-9],
            r"a.jsonl.gz: after line 2\d: cannot be read: .*not whole",
        ),
        ("a.jsonl.gz", LINES, r"a.jsonl.gz: cannot be read: Not a gzipped file .* not the gz file"),
        ("a.json.gz", gz(b"[1]")[:-2], r"a.json.gz: cannot be read: .*not whole"),
        ("a.jsonl.zst", LINES, r"a.jsonl.zst: cannot be read: .* not the zst file"),
        ("a.jsonl.zst", zstd(LINES)[:-3], r"a.jsonl.zst: cannot be read: .*not whole"),
        ("a.jsonl", ROW.encode("utf-16"), r"a.jsonl: cannot be read: it is UTF-16 .*iconv"),
        ("a.csv", "a,b\n".encode("utf-16"), r"a.csv: cannot be read: it is UTF-16"),
        ("a.csv", b"a,a\n", r"a.csv:1: the first line must name the columns, each once, not \['a', 'a'\]"),
        ("a.csv", b"", r"a.csv:1: the first line must name the columns"),
        ("a.json", DEEP.encode(), r"a.json: not valid JSON: nested too deeply"),
        ("a.json", b'["caf\xe9"]', r"a.json: not valid JSON: 'utf-8' codec"),
        ("a.parquet", b"PAR1 nonsense PAR1", r"a.parquet: not a readable parquet file"),
        ("a.parquet.gz", b"", r"unknown file type"),
    ],
    ids=range(13),
)
def test_files_that_cannot_be_read(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        list(file_rows(tmp_path / name))


def test_what_is_no_file_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")  # opening it would wait for a writer
    (tmp_path / "loop.jsonl").symlink_to("loop.jsonl")
    for name, message in (
        ("pipe.jsonl", "is not a file"),
        ("loop.jsonl", "cannot be read: Too many levels"),
        ("none.jsonl", "no such file"),
        ("n" * 400 + ".jsonl", "cannot be read: File name too long"),
        ("a\0b.jsonl", "cannot be read"),
    ):
        with pytest.raises(DataError, match=message):
            file_rows(tmp_path / name)


def test_a_broken_first_line_of_a_table_is_told_with_the_file(tmp_path):
    with pytest.raises(DataError, match=r"a\.csv:1: the first line must name the columns: ',' expected"):
        problems(tmp_path / "a.csv", '"prompt"x,"completion"\na,b\n')
