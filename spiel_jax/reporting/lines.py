"""Files of JSON lines as runs write them, read whole whatever became of them: what is damaged is told."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

MOST = 3
"""Damaged lines of a file that are told one by one."""

_LAST_STEP = 2**53


@dataclass(frozen=True)
class Series:
    """A number over the steps of a run.

    Attributes:
        steps: [n] int64, rising, distinct.
        values: [n] float64; one that was not finite is NaN.
    """

    steps: np.ndarray
    values: np.ndarray

    @property
    def last(self) -> float:
        """The last one that is finite; NaN if none is."""
        finite = self.values[np.isfinite(self.values)]
        return float(finite[-1]) if finite.size else math.nan


EMPTY = Series(np.empty(0, np.int64), np.empty(0))
"""Of a number that was never recorded."""


def read_lines(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    r"""The lines of a file that are objects with a step, and what is to be told of the others.

    A file that is not there has none.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "metrics.jsonl"
        >>> _ = file.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
        >>> read_lines(file)
        ([{'step': 1, 'loss': 2.0}], ['metrics.jsonl: the last line (2) is unfinished and was left out'])
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return [], []
    except OSError as error:
        return [], [f"{path.name} cannot be read: {error.strerror or error}"]
    found, damaged = [], []
    raw = content.split(b"\n")
    for number, line in enumerate(raw, 1):
        if not line.strip():
            continue
        if (read := _object(line)) is not None:
            found.append(read)
        elif number == len(raw):
            damaged.append(f"the last line ({number}) is unfinished and was left out")
        else:
            damaged.append(f"line {number} is damaged and was left out")
    told = [f"{path.name}: {problem}" for problem in damaged[:MOST]]
    if len(damaged) > MOST:
        told.append(f"{path.name}: {len(damaged) - MOST} more lines are damaged and were left out")
    return found, told


def _object(line: bytes) -> dict[str, Any] | None:
    try:
        read = json.loads(line)
    except (ValueError, RecursionError):
        return None
    step = read.get("step") if isinstance(read, dict) else None
    whole = isinstance(step, int) and not isinstance(step, bool) and 0 <= step < _LAST_STEP
    return read if whole else None


def series(lines: Iterable[Mapping[str, Any]]) -> dict[str, Series]:
    """The numbers of lines by name. Of a step that is there twice the last line counts.

    Example:
        >>> found = series([{"step": 2, "loss": "nan"}, {"step": 1, "loss": 3, "note": "not a number"}])
        >>> list(found), found["loss"].steps.tolist(), found["loss"].values.tolist()
        (['loss'], [1, 2], [3.0, nan])
    """
    points: dict[str, dict[int, float]] = {}
    for line in lines:
        for name, value in line.items():
            if name != "step" and (number := _number(value)) is not None:
                points.setdefault(name, {})[line["step"]] = number
    return {name: _series(found) for name, found in points.items()}


def _number(value: Any) -> float | None:
    """A number as lines hold it, where one that is not finite is a string; None for what is none."""
    if isinstance(value, bool) or not (isinstance(value, int | float) or value in ("nan", "inf", "-inf")):
        return None
    try:
        number = float(value)
    except OverflowError:
        return math.nan
    return number if math.isfinite(number) else math.nan


def _series(points: Mapping[int, float]) -> Series:
    steps: Sequence[int] = sorted(points)
    return Series(np.array(steps, np.int64), np.array([points[step] for step in steps]))
