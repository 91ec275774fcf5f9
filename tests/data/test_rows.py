import gzip
import json

import datasets
import pytest

from spiel_jax.data.rows import DataError, read_rows

ROWS = [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}]


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


@pytest.mark.parametrize("content", [ROWS, {"data": ROWS}, {"x": ROWS[0], "y": ROWS[1]}])
def test_json(tmp_path, content):
    path = write(tmp_path / "a.json", content)
    rows = list(read_rows(path))
    assert [row.value for row in rows] == ROWS
    assert [row.location for row in rows] == [f"{path}: row 1", f"{path}: row 2"]


def test_jsonl_reports_lines_and_goes_on(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"prompt": "a"}\n\n{broken\n"\xff\xfe"\n[1]\n')
    rows = list(read_rows(str(path)))
    assert [row.location for row in rows] == [f"{path}:{n}" for n in (1, 3, 4, 5)]
    assert rows[0].value == {"prompt": "a"}
    assert rows[0].problem is None
    assert rows[1].problem is not None
    assert rows[1].problem.startswith("not valid JSON")
    assert rows[2].problem is not None
    assert rows[3].value == [1]


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.json.gz"])
def test_gzip(tmp_path, name):
    lines = "\n".join(json.dumps(row) for row in ROWS) if "jsonl" in name else json.dumps(ROWS)
    (tmp_path / name).write_bytes(gzip.compress(lines.encode()))
    assert [row.value for row in read_rows(str(tmp_path / name))] == ROWS


def test_parquet(tmp_path):
    path = str(tmp_path / "a.parquet")
    datasets.Dataset.from_list(ROWS).to_parquet(path)
    rows = list(read_rows(path))
    assert [row.value for row in rows] == ROWS
    assert rows[1].location == f"{path}: row 2"


def test_package_is_found_and_not_imported(tmp_path, monkeypatch):
    package = tmp_path / "some_talks"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "talks.json").write_text(json.dumps(ROWS))
    monkeypatch.syspath_prepend(tmp_path)
    assert [row.value for row in read_rows("package:some_talks")] == ROWS
    (package / "more.json").write_text("[]")
    with pytest.raises(DataError, match=r"expected one data file .*more.json, talks.json"):
        read_rows("package:some_talks")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "{", r"a.json:1: not valid JSON"),
        ("a.json", '{"a": 1}\n{"a": 2}', r"a.json:2: .*belongs in .jsonl"),
        ("a.json", {"a": 1}, r"expected a list of rows"),
        ("a.json", {"data": 3}, r"expected a list of rows"),
        ("a.xml", "<a/>", r"unknown file type, expected one of .json"),
        ("a.parquet", "nonsense", r"not a readable parquet file"),
    ],
)
def test_unreadable_files(tmp_path, name, content, message):
    with pytest.raises(DataError, match=message):
        list(read_rows(write(tmp_path / name, content)))


def test_missing_sources(tmp_path, monkeypatch):
    with pytest.raises(DataError, match="no such file"):
        read_rows(str(tmp_path / "none.jsonl"))
    with pytest.raises(DataError, match=r"no data file in this folder"):
        read_rows(str(tmp_path))
    with pytest.raises(DataError, match=r"no package 'no_such_talks' .* pip install"):
        read_rows("package:no_such_talks")
    with pytest.raises(DataError, match=r"no package 'a.b' is installed"):
        read_rows("package:a.b")

    def refuse(*args, **kwargs):
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(DataError, match=r"could not be loaded .*no route.*without a network"):
        list(read_rows("someone/talks"))


def test_hub(monkeypatch):
    asked = []

    def load_dataset(path, name, *, split):
        asked.append((path, name, split))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows = list(read_rows("someone/talks", split="test", name="large"))
    assert asked == [("someone/talks", "large", "test")]
    assert [row.value for row in rows] == ROWS
    assert rows[0].location == "someone/talks (test): row 1"


def test_split_of_a_file_is_refused(tmp_path):
    path = write(tmp_path / "a.json", ROWS)
    with pytest.raises(DataError, match="split='test'"):
        read_rows(path, split="test")
    with pytest.raises(DataError, match="name='x'"):
        read_rows(path, name="x")
