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

    def load_dataset(path, name, *, split, data_dir, revision):
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


def test_several_files_by_wildcards(tmp_path):
    for name in ("b/y.jsonl", "a/x.jsonl", "a/z.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / name, json.dumps({"name": name}) if name.endswith("l") else [])
    assert [row.value["name"] for row in read_rows(f"{tmp_path}/**/*.jsonl")] == ["a/x.jsonl", "b/y.jsonl"]
    assert [row.location for row in read_rows(f"{tmp_path}/a/*")] == [f"{tmp_path}/a/x.jsonl:1"]
    with pytest.raises(DataError, match="no file has such a name"):
        read_rows(f"{tmp_path}/*.csv")
    write(tmp_path / "a" / "readme.txt", "")
    with pytest.raises(DataError, match=r"readme.txt is of an unknown type"):
        read_rows(f"{tmp_path}/a/*")


def test_a_file_whose_name_has_wildcards_is_itself(tmp_path):
    path = write(tmp_path / "a[1].jsonl", '{"n": 1}')
    write(tmp_path / "a1.jsonl", '{"n": 2}')
    assert [row.value for row in read_rows(path)] == [{"n": 1}]


def test_folders(tmp_path):
    folder = tmp_path / "set"
    data = folder / "data"
    data.mkdir(parents=True)
    write(folder / "README.md", "---")
    write(folder / "dataset_infos.json", {})
    for name in ("train-00001-of-00002", "train-00000-of-00002", "test-00000-of-00001"):
        write(data / f"{name}.jsonl", json.dumps({"name": name}))
    names = [row.value["name"] for row in read_rows(str(folder))]
    assert names == ["train-00000-of-00002", "train-00001-of-00002"]
    [row] = read_rows(str(folder), split="test")
    assert row.location == f"{data}/test-00000-of-00001.jsonl:1"
    with pytest.raises(DataError, match="no file is of split 'dev2'; there are files of test, train"):
        read_rows(str(folder), split="dev2")
    write(data / "more.jsonl", "")
    with pytest.raises(DataError, match=r"others do not \(more.jsonl\)"):
        read_rows(str(folder))


def test_folders_of_save_to_disk(tmp_path):
    saved = datasets.Dataset.from_list(ROWS)
    saved.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": saved, "test": saved.select([1])}).save_to_disk(str(tmp_path / "two"))
    assert [row.value for row in read_rows(str(tmp_path / "one"))] == ROWS
    [row] = read_rows(str(tmp_path / "two"), split="test")
    assert row.value == ROWS[1]
    assert row.location == f"{tmp_path}/two (test): row 1"
    with pytest.raises(DataError, match="no split 'dev'; there are train, test"):
        read_rows(str(tmp_path / "two"), split="dev")
    (tmp_path / "one" / "state.json").write_text("{")
    with pytest.raises(DataError, match="not a readable dataset of save_to_disk"):
        read_rows(str(tmp_path / "one"))


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("org/name", ("org/name", None, None)),
        ("org/name@v1.0", ("org/name", None, "v1.0")),
        ("org/name@refs/convert/parquet", ("org/name", None, "refs/convert/parquet")),
        ("org/name/some/part@main", ("org/name", "some/part", "main")),
    ],
)
def test_parts_and_revisions_of_hub_ids(monkeypatch, path, expected):
    def load(name, config, *, split, data_dir, revision):
        assert (name, data_dir, revision) == expected
        return ROWS

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert [row.location for row in read_rows(path)] == [f"{path} (train): row 1", f"{path} (train): row 2"]


def test_places_that_are_none():
    with pytest.raises(DataError, match="cannot be read: File name too long"):
        read_rows("n" * 5000)
    with pytest.raises(DataError, match="is an address, and sources are local files"):
        read_rows("https://example.com/a.jsonl")
    with pytest.raises(DataError, match="no such home directory"):
        read_rows("~nobody-of-this-name/a.jsonl")
