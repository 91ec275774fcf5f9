"""Local files of benchmarks: where they are, and what the tasks have in common."""

import functools
import itertools
import json
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from spiel_jax.data.files import DataError

T = TypeVar("T")

SEED = 42
"""Of the paper's subsets."""


def folder(data_dir: Any, name: str) -> Path:
    """The folder of a benchmark.

    Raises:
        DataError: If it is not there.
    """
    if not data_dir:
        raise DataError(f"the local task {name} needs --data_dir, a folder with {name}/ in it")
    found = Path(str(data_dir)).expanduser() / name
    if not found.is_dir():
        raise DataError(f"--data_dir {data_dir}: there is no folder {name} in it")
    return found


def files(place: Path, *patterns: str) -> list[Path]:
    """The files of one of these patterns, sorted.

    Raises:
        DataError: If there are none.
    """
    found = sorted({path for pattern in patterns for path in place.glob(pattern)})
    if not found:
        raise DataError(f"{place}: there is no {' or '.join(patterns)} in it")
    return found


def read_json(path: Path) -> Any:
    """The contents of a JSON file.

    Raises:
        DataError: If it is none.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as JSON: {error}") from error


def read_lines(lines: Iterable[str], place: Path, keys: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of a JSONL file, which must have these keys.

    Raises:
        DataError: If a row is broken.
    """
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            rows.append({key: row[key] for key in keys})
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{place}, line {number}: expected a JSON object with {', '.join(keys)}"
            ) from error
    return rows


def shown(examples: Sequence[T], shots: int, place: Any) -> list[T]:
    """The examples that a prompt begins with.

    Raises:
        DataError: If so many are not there.
    """
    if shots > len(examples):
        raise DataError(f"{place}: {shots} examples are asked for (--num_fewshot), {len(examples)} are there")
    return list(examples[:shots])


def interleaved(groups: Sequence[Sequence[T]]) -> list[T]:
    """One of each group in turn, so that the first so many are of all groups alike.

    >>> interleaved([[1, 2, 3], [4], [5, 6]])
    [1, 4, 5, 2, 6, 3]
    """
    rounds = itertools.zip_longest(*groups, fillvalue=None)
    return [one for turn in rounds for one in turn if one is not None]


def subset(groups: Sequence[Sequence[T]], count: int | None) -> list[list[T]]:
    """``count`` of each group, drawn as the paper draws; all for None."""
    if count is None:
        return [list(group) for group in groups]
    draw = random.Random(SEED)
    return [draw.sample(list(group), min(count, len(group))) for group in groups]


def test_split(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Rows as lm-eval takes them from a task."""
    import datasets

    return {"test": datasets.Dataset.from_list(list(rows))}


@functools.lru_cache
def _tokenizer(name: str) -> Any:
    from spiel_jax.models.io.tokenizer_places import open_tokenizer

    return open_tokenizer(name)


def token_count(text: str, tokenizer: str | None) -> int:
    """Tokens of a text; 0 where no tokenizer is named, so that nothing is too long."""
    return 0 if tokenizer is None else len(_tokenizer(tokenizer).encode(text))


def first_tokens(text: str, count: int, tokenizer: str | None) -> str:
    """A text cut to so many tokens; as it is where no tokenizer is named."""
    if tokenizer is None:
        return text
    tokens = _tokenizer(tokenizer).encode(text, add_special_tokens=False)
    return text if len(tokens) <= count else _tokenizer(tokenizer).decode(tokens[:count])
