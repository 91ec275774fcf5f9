"""Rows of one file of data, whatever it is and whatever is wrong with it.

Every row carries its location (``file:line`` where the file has lines, ``file: row N`` otherwise, counted
from one), so that whatever is wrong with it can be reported where it is.
"""

import codecs
import csv
import dataclasses
import functools
import gzip
import io
import json
import os
import pathlib
import stat
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from spiel_jax.errors import SpielError

_MAX_LINE = 2**25  # bytes of a line: the longest row has fewer, also when each character is an escape


class DataError(SpielError):
    """A data source cannot be used; the message says which and why."""


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


def file_type(name: str) -> str | None:
    """The type of a file by its name, ``.jsonl`` for ``train.jsonl.gz``; ``None`` if it has none of ours."""
    name = name.lower()
    inner = name.removesuffix(".gz").removesuffix(".zst")
    found = next((suffix for suffix in _READERS if inner.endswith(suffix)), None)
    return None if found == ".parquet" and inner != name else found


def file_rows(file: pathlib.Path) -> Iterator[Row]:
    """Reads the rows of a file in their order.

    A row that cannot be read has a ``problem``, and reading goes on.

    Raises:
      DataError: there is no such file, it has an unknown type or cannot be read.
    """
    check_file(file)
    found = file_type(file.name)
    if found is None:
        raise DataError(f"{file}: unknown file type, expected one of {known_types()}")
    return _READERS[found](file)


def check_file(file: pathlib.Path) -> None:
    """Makes sure that there is a regular file, which alone is safe to open.

    Raises:
      DataError: there is none.
    """
    try:
        mode = os.stat(file).st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(f"{file}: no such file") from None
    except (OSError, ValueError) as error:  # no permission, a loop of links, a name too long, a NUL in it
        raise DataError(f"{file}: cannot be read: {_reason(error)}") from error
    if not stat.S_ISREG(mode):
        raise DataError(f"{file} is not a file: give one of {known_types()}")


def known_types() -> str:
    """What a file may be, for a message."""
    return ", ".join(_READERS) + " (all but parquet also with .gz or .zst)"


def parse_json(text: str) -> Any:
    """What a JSON text holds.

    Raises:
      ValueError: it is not JSON, or not text that can be written in UTF-8.
    """
    try:
        value, doubled = _loads(text)
    except ValueError as error:
        raise ValueError(f"not valid JSON: {error}") from None
    if doubled:
        raise ValueError(_twice(doubled.values()))
    if _may_hold_halves(text) and not _is_text(value):
        raise ValueError(_HALF)
    return value


_HALF = "holds half of a surrogate pair (\\ud800 to \\udfff), which is no character"


_Doubled = dict[int, tuple[dict[str, Any], str]]
"""Objects in which a key stands twice, and the key, by ``id``: held here, so that no other object has it."""


def _loads(text: str) -> tuple[Any, _Doubled]:
    """What a JSON text holds; json keeps the last of two equal keys without a word."""
    doubled: _Doubled = {}

    def held(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) != len(pairs):
            keys = [key for key, _ in pairs]
            doubled[id(value)] = value, next(key for key in keys if keys.count(key) > 1)
        return value

    try:
        # raises ValueError for a number of thousands of digits, too
        return json.loads(text, object_pairs_hook=held), doubled
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _twice(doubled: Iterable[tuple[dict[str, Any], str]]) -> str:
    return f"names the key {next(key for _, key in doubled)!r} twice"


def _doubled_in(value: Any, doubled: _Doubled) -> Iterator[tuple[dict[str, Any], str]]:
    """Those that are a value, or in it."""
    if isinstance(value, dict):
        if id(value) in doubled:
            yield doubled[id(value)]
        value = list(value.values())
    for part in value if isinstance(value, list) else ():
        yield from _doubled_in(part, doubled)


def _may_hold_halves(text: str) -> bool:
    """Whether half of a character beyond 16 bits may be in a JSON text, written as an escape."""
    return "\\ud" in text or "\\uD" in text


def _is_text(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def located(values: Iterable[Any], where: str, why: str) -> Iterator[Row]:
    """Rows of a library's table, of which an error says after which row it came.

    Raises:
      DataError: the library cannot go on.
    """
    iterator, number = iter(values), 0
    while True:
        try:
            value = next(iterator)
        except StopIteration:
            return
        except Exception as error:  # pyarrow and datasets raise many types for broken files
            place = f"{where}: after row {number}" if number else where
            raise DataError(f"{place}: {why}: {_reason(error)}") from error
        number += 1
        yield Row(f"{where}: row {number}", value)


def _reason(error: BaseException) -> str:
    told = getattr(error, "strerror", None) or str(error)
    return " ".join(told.split()) or type(error).__name__


@contextmanager
def _reading(file: pathlib.Path, after: Callable[[], int]) -> Iterator[Any]:
    """Opens a file that may be compressed; whatever is wrong with reading it names the file.

    Args:
      file: which.
      after: how many lines were read before an error; 0 for a file that is read at once.
    """
    try:
        with _open(file) as stream:
            if stream.peek(3)[:3] == codecs.BOM_UTF8:
                stream.read(3)
            yield stream
    except DataError:
        raise
    except (OSError, EOFError, zlib.error, ValueError) as error:
        place = f"{file}: after line {after()}" if after() else f"{file}"
        raise DataError(f"{place}: cannot be read: {_reason(error)}{_hint(file, error)}") from error


def _check_utf8(stream: Any) -> None:
    """Refuses text of two or four bytes a character, which has no lines that could be told apart."""
    head = stream.peek(4)[:4]
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or 0 in head:
        raise ValueError("it is UTF-16 or binary, not UTF-8: convert it, as by iconv -f UTF-16 -t UTF-8")


def _hint(file: pathlib.Path, error: Exception) -> str:
    compressed = file.suffix.lower() in (".gz", ".zst") and not isinstance(error, PermissionError)
    return f"; it is not whole, or not the {file.suffix[1:]} file that it says" if compressed else ""


def _open(file: pathlib.Path) -> Any:
    if file.suffix.lower() == ".gz":
        return gzip.open(file, "rb")
    if file.suffix.lower() == ".zst":
        import pyarrow  # takes a third of a second to import

        return io.BufferedReader(pyarrow.input_stream(str(file), compression="zstd"))
    return open(file, "rb")


def _jsonl_rows(file: pathlib.Path) -> Iterator[Row]:
    number = 0
    with _reading(file, lambda: number) as stream:
        _check_utf8(stream)
        # Bytes, so that a line with a broken encoding is one malformed row and not the end.
        while line := stream.readline(_MAX_LINE):
            number += 1
            where = f"{file}:{number}"
            if len(line) == _MAX_LINE and not line.endswith(b"\n"):
                while (rest := stream.readline(_MAX_LINE)) and not rest.endswith(b"\n"):
                    pass
                yield Row(where, None, f"is longer than {_MAX_LINE:,} bytes: divide it")
            elif not line.isspace():
                try:
                    yield Row(where, parse_json(line.decode()))
                except ValueError as error:
                    is_text = not isinstance(error, UnicodeDecodeError)
                    reason = str(error) if is_text else f"not valid UTF-8: {error.reason}"
                    hint = "; a list of rows belongs in .json" if line.strip() == b"[" else ""
                    yield Row(where, None, reason + hint)


def _json_rows(file: pathlib.Path) -> Iterator[Row]:
    with _reading(file, lambda: 0) as stream:
        content = stream.read()
    try:
        text = content.decode(json.detect_encoding(content))
        content, doubled = _loads(text)
    except json.JSONDecodeError as error:
        hint = "; one object per line belongs in .jsonl" if error.msg == "Extra data" else ""
        raise DataError(f"{file}:{error.lineno}: not valid JSON: {error.msg}{hint}") from error
    except ValueError as error:
        raise DataError(f"{file}: not valid JSON: {error}") from error
    if isinstance(content, dict):
        if id(content) in doubled:
            raise DataError(f"{file}: the object of all rows {_twice([doubled[id(content)]])}")
        if "data" in content:
            content = content["data"]
        elif content and all(isinstance(value, dict) for value in content.values()):
            content = list(content.values())
    if not isinstance(content, list):
        raise DataError(f'{file}: expected a list of rows, {{"data": [...]}} or an object of rows by key')
    doubtful = _may_hold_halves(text)
    for number, value in enumerate(content, start=1):
        problem = _HALF if doubtful and not _is_text(value) else None
        if doubled and (within := list(_doubled_in(value, doubled))):
            problem = _twice(within)
        yield Row(f"{file}: row {number}", value if problem is None else None, problem)


def _table_rows(file: pathlib.Path, delimiter: str) -> Iterator[Row]:
    """Rows of a table whose first line names the columns; an empty cell is an absent key."""
    line = 0
    with _reading(file, lambda: line) as stream:
        _check_utf8(stream)
        # What is not UTF-8 becomes halves of surrogate pairs, so that only its row is malformed.
        text = io.TextIOWrapper(stream, encoding="utf-8", errors="surrogateescape", newline="")
        csv.field_size_limit(max(_MAX_LINE, csv.field_size_limit()))  # the module's default is 128 KiB
        reader = csv.reader(text, delimiter=delimiter, strict=True)
        try:
            header = next(reader, [])
        except csv.Error as error:
            raise DataError(f"{file}:1: the first line must name the columns: {error}") from error
        named = [name for name in header if name]
        if not named or len(set(named)) < len(named) or not _is_text(header):
            raise DataError(f"{file}:1: the first line must name the columns, each once, not {header}")
        while True:
            line = reader.line_num
            where = f"{file}:{line + 1}"
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield Row(where, None, f"not a row of a table: {error}")
                continue
            if len(cells) == len(header) and _is_text(cells):
                yield Row(where, {name: cell for name, cell in zip(header, cells, strict=True) if cell})
            elif len(cells) == len(header):
                yield Row(where, None, "not valid UTF-8")
            elif cells:
                yield Row(where, None, f"has {len(cells)} fields, and the first line {len(header)}")


def _parquet_rows(file: pathlib.Path) -> Iterator[Row]:
    import datasets  # takes a second to import, which JSON sources need not wait for

    def rows() -> Iterator[Any]:
        # Streaming reads the file in place, where loading would first copy it to a cache.
        yield from datasets.load_dataset("parquet", data_files=str(file), split="train", streaming=True)

    return located(rows(), str(file), "not a readable parquet file")


_READERS: dict[str, Callable[[pathlib.Path], Iterator[Row]]] = {
    ".json": _json_rows,
    ".jsonl": _jsonl_rows,
    ".ndjson": _jsonl_rows,
    ".csv": functools.partial(_table_rows, delimiter=","),
    ".tsv": functools.partial(_table_rows, delimiter="\t"),
    ".parquet": _parquet_rows,
}
