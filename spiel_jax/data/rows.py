"""Where training rows come from: local files, PyPI packages and the Hugging Face hub.

Every row carries its location (``file:line`` for JSON lines, ``file: row N`` otherwise, counted
from one), so that whatever is wrong with it can be reported where it is.
"""

import dataclasses
import gzip
import importlib.util
import itertools
import json
import pathlib
import re
from collections.abc import Iterator
from typing import Any

from spiel_jax.errors import SpielError

_PACKAGE = "package:"
_SUFFIXES = (".json", ".json.gz", ".jsonl", ".jsonl.gz", ".parquet")
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


class DataError(SpielError):
    """A data source cannot be used; the message says which and why."""


class EmptyDataset(DataError):
    """A data source left no example to train or evaluate on."""


class MalformedRow(DataError):
    """A row is not what its format asks for.

    Attributes:
      location: where the row is, such as ``train.jsonl:17``.
      reason: what is wrong with it.
    """

    def __init__(self, location: str, reason: str):
        super().__init__(f"{location}: {reason}")
        self.location = location
        self.reason = reason


@dataclasses.dataclass(frozen=True)
class Row:
    """A row as it was read.

    Attributes:
      location: where it is.
      value: the row: a dict, unless the source is malformed.
      problem: why it could not be read at all, or ``None``.
    """

    location: str
    value: Any
    problem: str | None = None


def read_rows(path: str, *, split: str = "train", name: str | None = None) -> Iterator[Row]:
    """Reads the rows of a source in their order.

    A line of a JSON lines file that is not JSON gives a row with a ``problem`` and reading goes on;
    a file that cannot be read as a whole raises.

    Args:
      path: a local ``.json`` (a list of rows, ``{"data": [...]}``, or an object of rows by key),
        ``.jsonl`` (each optionally with ``.gz``) or ``.parquet`` file; ``package:NAME`` for the
        data file inside an installed Python package, which is located and never imported
        (``package:chitchat_dataset``); or the id of a dataset on the Hugging Face hub.
      split: the split of a hub dataset.
      name: the configuration name of a hub dataset.

    Raises:
      DataError: the source does not exist, has an unknown type or cannot be read.
    """
    if path.startswith(_PACKAGE):
        file = _package_file(path)
    else:
        file = pathlib.Path(path).expanduser()
        if not file.exists() and _is_hub_id(path):
            return _hub_rows(path, split, name)
    if split != "train" or name is not None:
        raise DataError(
            f"split={split!r} and name={name!r} select parts of hub datasets; {path} is a file: "
            "leave them at their defaults"
        )
    return _file_rows(file)


def _is_hub_id(path: str) -> bool:
    return _HUB_ID.fullmatch(path) is not None and not path.endswith(_SUFFIXES)


def _package_file(path: str) -> pathlib.Path:
    """The one data file in an installed package's folder."""
    name = path.removeprefix(_PACKAGE)
    # find_spec imports the parents of a dotted name; a plain name runs nothing of the package.
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise DataError(
            f"{path}: no package {name!r} is installed; try: pip install --no-deps {name.replace('_', '-')}"
        )
    folder = pathlib.Path(spec.submodule_search_locations[0])
    files = sorted(file for file in folder.iterdir() if file.name.endswith(_SUFFIXES))
    if len(files) != 1:
        found = ", ".join(file.name for file in files) or "none"
        raise DataError(f"{path}: expected one data file in {folder}, found {found}")
    return files[0]


def _file_rows(file: pathlib.Path) -> Iterator[Row]:
    if not file.exists():
        raise DataError(f"{file}: no such file")
    if not file.is_file():
        raise DataError(f"{file} is not a file: give one of {', '.join(_SUFFIXES)}")
    if file.name.endswith((".jsonl", ".jsonl.gz")):
        return _jsonl_rows(file)
    if file.name.endswith((".json", ".json.gz")):
        return _json_rows(file)
    if file.name.endswith(".parquet"):
        return _parquet_rows(file)
    raise DataError(f"{file}: unknown file type, expected one of {', '.join(_SUFFIXES)}")


def _open(file: pathlib.Path):
    return gzip.open(file, "rb") if file.suffix == ".gz" else open(file, "rb")


def _jsonl_rows(file: pathlib.Path) -> Iterator[Row]:
    with _open(file) as lines:
        # Bytes, so that a line with a broken encoding is one malformed row and not the end.
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                yield Row(f"{file}:{number}", json.loads(line))
            except ValueError as error:
                yield Row(f"{file}:{number}", None, f"not valid JSON: {error}")


def _json_rows(file: pathlib.Path) -> Iterator[Row]:
    with _open(file) as stream:
        try:
            content = json.load(stream)
        except json.JSONDecodeError as error:
            hint = "; one object per line belongs in .jsonl" if error.msg == "Extra data" else ""
            raise DataError(f"{file}:{error.lineno}: not valid JSON: {error.msg}{hint}") from error
        except ValueError as error:
            raise DataError(f"{file}: not valid JSON: {error}") from error
    if isinstance(content, dict):
        if "data" in content:
            content = content["data"]
        elif content and all(isinstance(value, dict) for value in content.values()):
            content = list(content.values())
    if not isinstance(content, list):
        raise DataError(f'{file}: expected a list of rows, {{"data": [...]}} or an object of rows by key')
    for number, value in enumerate(content, start=1):
        yield Row(f"{file}: row {number}", value)


def _parquet_rows(file: pathlib.Path) -> Iterator[Row]:
    import datasets  # takes a second to import, which JSON sources need not wait for

    try:
        # Streaming reads the file in place, where loading would first copy it to a cache.
        table = datasets.load_dataset("parquet", data_files=str(file), split="train", streaming=True)
        rows = iter(table)
        first = list(itertools.islice(rows, 1))
    except Exception as error:  # pyarrow and datasets raise many types for a broken file
        raise DataError(f"{file}: not a readable parquet file: {error}") from error
    for number, value in enumerate(itertools.chain(first, rows), start=1):
        yield Row(f"{file}: row {number}", value)


def _hub_rows(path: str, split: str, name: str | None) -> Iterator[Row]:
    import datasets  # as above

    try:
        table = datasets.load_dataset(path, name, split=split)
    except Exception as error:  # no network, no such dataset, split or configuration, gated, ...
        raise DataError(
            f"{path}: no such file, and the dataset of that name could not be loaded from the "
            f"Hugging Face hub ({type(error).__name__}: {error}); without a network, give a local "
            f"file ({', '.join(_SUFFIXES)}) or package:chitchat_dataset"
        ) from error
    for number, value in enumerate(table, start=1):
        yield Row(f"{path} ({split}): row {number}", value)
