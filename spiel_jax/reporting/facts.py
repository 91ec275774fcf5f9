"""What runs came to, as numbers beside each other, and how their configurations differ."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from spiel_jax.config import default_config, flatten
from spiel_jax.reporting.lines import EMPTY
from spiel_jax.reporting.runs import Run


@dataclass(frozen=True)
class Fact:
    """A number that runs came to.

    Attributes:
        name: What it is, with its unit.
        of: The number of a run; NaN where it has none.
        written: How it is written.
        better: -1 if less is better, 1 if more is, 0 if neither.
        relative: Whether a difference is told as a share.
    """

    name: str
    of: Callable[[Run], float]
    written: Callable[[float], str]
    better: int = 0
    relative: bool = True


def _lowest(run: Run) -> float:
    values = run.metric("heldout_loss").values
    return float(np.nanmin(values)) if np.isfinite(values).any() else math.nan


def _before(run: Run) -> float:
    heldout = run.metric("heldout_loss")
    return float(heldout.values[0]) if heldout.steps.size and heldout.steps[0] == 0 else math.nan


def _trained_loss(run: Run) -> float:
    """Of the last tenth of the steps."""
    values = run.metric("loss").values
    last = values[-max(1, values.size // 10) :]
    return float(np.nanmean(last)) if np.isfinite(last).any() else math.nan


def _speed(run: Run) -> float:
    """The median, which compiling does not move."""
    values = run.timing.get("tokens_per_second", EMPTY).values
    return float(np.nanmedian(values)) if np.isfinite(values).any() else math.nan


def _skipped(run: Run) -> float:
    loss = run.metric("loss")
    return float(np.count_nonzero(np.isnan(loss.values))) if loss.steps.size else math.nan


def _peak(name: str) -> Callable[[Run], float]:
    def of(run: Run) -> float:
        values = run.timing.get(name, EMPTY).values
        return float(np.nanmax(values)) if np.isfinite(values).any() else math.nan

    return of


def _count(value: float) -> str:
    return f"{value:,.0f}"


def _loss(value: float) -> str:
    return f"{value:.4f}"


def _gib(value: float) -> str:
    return f"{value:.2f} GiB"


def duration(seconds: float) -> str:
    """As people say it.

    >>> duration(8), duration(75), duration(1080), duration(3723)
    ('8 s', '1 min 15 s', '18 min', '1 h 02 min')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 3600:
        return f"{whole / 60:.0f} min"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


FACTS = (
    Fact("held-out loss", lambda run: run.metric("heldout_loss").last, _loss, -1, False),
    Fact("held-out loss before training", _before, _loss, 0, False),
    Fact("lowest held-out", _lowest, _loss, -1, False),
    Fact("training loss, end", _trained_loss, _loss, -1, False),
    Fact("steps", lambda run: float(run.steps), _count),
    Fact("trained numbers", lambda run: run.changes.count if run.changes else math.nan, _count),
    Fact("tokens / second", _speed, _count, 1),
    Fact("time of all steps", lambda run: run.seconds, duration, -1),
    Fact("peak memory, process", _peak("peak_host_gib"), _gib, -1),
    Fact("peak memory, device", _peak("peak_device_gib"), _gib, -1),
    Fact("skipped steps", _skipped, _count, -1, False),
)
"""What is told of every run that has it."""


def results(runs: Sequence[Run]) -> list[tuple[Fact, list[float]]]:
    """The facts that any of the runs has."""
    found = [(fact, [fact.of(run) for run in runs]) for fact in FACTS]
    return [(fact, values) for fact, values in found if np.isfinite(values).any()]


def difference(fact: Fact, value: float, first: float) -> str:
    """How much a number is more than the first run's; empty where it is not known.

    >>> difference(FACTS[0], 3.25, 3.5), difference(FACTS[4], 60, 40)
    ('−0.2500', '+50%')
    """
    if not (math.isfinite(value) and math.isfinite(first)):
        return ""
    if value == first:
        return "same"
    if fact.relative and first:
        return _signed(f"{100 * (value / first - 1):+.3g}%")
    return _signed(f"{value - first:+.4f}" if fact.written is _loss else f"{value - first:+,.0f}")


def _signed(text: str) -> str:
    return text.replace("-", "\N{MINUS SIGN}")


def configs(runs: Sequence[Run]) -> dict[str, list[str | None]]:
    """Every key of the configurations to its value in each run; None where a run does not have it."""
    keys = sorted({key for run in runs for key in run.config})
    return {key: [_told(run.config[key]) if key in run.config else None for run in runs] for key in keys}


def differing(found: Mapping[str, Sequence[str | None]]) -> dict[str, Sequence[str | None]]:
    """The keys whose values are not the same in all runs."""
    return {key: values for key, values in found.items() if len(set(values)) > 1}


def usual() -> dict[str, str]:
    """The defaults, as ``configs`` tells values."""
    return {key: _told(value) for key, value in json.loads(json.dumps(flatten(default_config()))).items()}


def _told(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
