"""Charts of what runs recorded step by step."""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

import numpy as np

from spiel_jax.reporting.charts import Areas, Chart, Line, Lines
from spiel_jax.reporting.lines import EMPTY, Series
from spiel_jax.reporting.runs import Run

POINTS = 400
"""Of a curve, at most."""

_OWN = ("loss", "heldout_loss", "learning_rate", "grad_norm", "replaced", "supervised_tokens")
_STEP = "optimizer step"


def training_charts(runs: Sequence[Run]) -> list[Chart]:
    """Losses, learning rate, gradient norm, and whatever else runs recorded of themselves."""
    charts: list[Chart | None] = [*_losses(runs), _learning_rate(runs)]
    norm = _curves(runs, lambda run: run.metric("grad_norm"), smooth=True)
    charts.append(_lines("Gradient norm", norm, "norm, before clipping", note=_averaged(runs, "grad_norm")))
    others = dict.fromkeys(n for run in runs for n in run.metrics if n not in _OWN and n[:6] != "since/")
    for name in others:
        charts.append(_lines(name, _curves(runs, lambda run, name=name: run.metric(name), dots=True), name))
    return [chart for chart in charts if chart is not None]


def _losses(runs: Sequence[Run]) -> list[Chart | None]:
    label = "loss per token, nats"
    note = _averaged(runs, "loss")
    if len(runs) > 1:
        heldout = _curves(runs, lambda run: run.metric("heldout_loss"), dots=True)
        training = _curves(runs, lambda run: run.metric("loss"), smooth=True)
        return [
            _lines("Held-out loss", heldout, label),
            _lines("Training loss", training, label, note=note),
        ]
    loss, heldout = runs[0].metric("loss"), runs[0].metric("heldout_loss")
    width = _window(loss)
    lines = []
    if width > 1:
        lines.append(Line("each step", *_thinned(loss), 0, "faint"))
    if loss.steps.size:
        name = "training" if width == 1 else f"training, mean of {width} steps"
        lines.append(Line(name, *_thinned(_smoothed(loss, width)), 0))
    if heldout.steps.size:
        lines.append(Line("held-out", heldout.steps, heldout.values, 1, "dots"))
    return [_lines("Loss", lines, label, wide=True)]


def _learning_rate(runs: Sequence[Run]) -> Chart | None:
    curves = _curves(runs, lambda run: run.metric("learning_rate"))
    return _lines("Learning rate", curves, "learning rate", zero=True)


def speed_charts(runs: Sequence[Run]) -> list[Chart]:
    """Speed, and memory where it was recorded."""
    speed = _curves(runs, lambda run: run.timing.get("tokens_per_second", EMPTY), smooth=True)
    note = "The first steps compile. " + _averaged(runs, "tokens_per_second", timing=True)
    charts = [_lines("Speed", speed, "tokens per second", zero=True, note=note.strip())]
    for name, what in (("peak_device_gib", "of the first device"), ("peak_host_gib", "of the process")):
        memory = _curves(runs, lambda run, name=name: run.timing.get(name, EMPTY))
        charts.append(_lines(f"Peak memory {what}", memory, "GiB", zero=True, unit=" GiB"))
    return [chart for chart in charts if chart is not None]


def entry_charts(runs: Sequence[Run]) -> list[Chart]:
    """Shares replaced of all runs, and survival where one alone is shown."""
    charts = [_replaced(runs)]
    if len(runs) == 1:
        charts += survival_charts(runs[0])
    else:
        curves = [
            Line(run.name, *mean, number)
            for number, run in enumerate(runs)
            if (mean := _mean_survival(survivals(run))) is not None
        ]
        charts.append(_survival(curves, "All cohorts of a run together."))
    return [chart for chart in charts if chart is not None]


def _replaced(runs: Sequence[Run]) -> Chart | None:
    def found(run: Run) -> Series:
        replaced = run.metric("replaced")
        there = replaced.values > 0
        return Series(replaced.steps[there], 100 * replaced.values[there])

    return _lines(
        "Entries replaced", _curves(runs, found, dots=True), "share of all entries, %", unit="%", zero=True
    )


def survival_charts(run: Run) -> list[Chart | None]:
    """Which entries there are after each reselection, by when they came, and how long they stay."""
    steps, firsts, shares = cohort_table(run)
    if not steps.size:
        return []
    names = ["there at the start" if first == 0 else f"grown at step {first}" for first in firsts]
    there = Areas(
        title="Entries by when they were grown",
        note="Each band is a cohort: the entries that one reselection grew. It thins as they are dropped.",
        x_label=_STEP,
        y_label="share of all entries, %",
        x=steps,
        end=float(max(run.steps, steps[-1] + 1)),
        names=names,
        bands=100 * shares.T,
    )
    found = survivals(run)
    lines = [
        Line(f"grown at step {first}", ages, left, number / max(len(found) - 1, 1), "faint", listed=False)
        for number, (first, (ages, left, _)) in enumerate(found.items())
    ]
    mean = _mean_survival(found)
    if mean is not None:
        lines.append(Line("all cohorts", *mean, 0))
    note = "Thin: one cohort each, the younger the stronger. Thick: all of them together."
    return [there, _survival(lines, note)]


def _survival(lines: Sequence[Line], note: str) -> Chart | None:
    return _lines(
        "Survival of entries by age",
        lines,
        "share of the cohort still there, %",
        x_label="age, optimizer steps",
        unit="%",
        zero=True,
        note=note,
    )


def cohort_table(run: Run) -> tuple[np.ndarray, list[int], np.ndarray]:
    """After which steps, the first steps of the cohorts, and [steps, cohorts] the shares that these have.

    A run that was extended may tell fewer cohorts apart from then on: its last ones are told throughout.
    """
    cohorts = run.cohorts
    steps = np.unique(np.concatenate([np.empty(0, np.int64), *(one.steps for one in cohorts.values())]))
    if not steps.size:
        return steps, [], np.empty((0, 0))
    table = np.zeros((steps.size, len(cohorts)))
    for column, one in enumerate(cohorts.values()):
        table[np.searchsorted(steps, one.steps), column] = np.nan_to_num(one.values)
    firsts, kept = np.array(list(cohorts)), table[_since_joined(table) :].any(axis=0)
    groups = np.maximum(np.searchsorted(firsts[kept], firsts, side="right") - 1, 0)
    joined = np.stack([table[:, groups == group].sum(axis=1) for group in range(kept.sum())], axis=1)
    return steps, firsts[kept].tolist(), joined


def _since_joined(shares: np.ndarray) -> int:
    """The row since which cohorts are told apart as in the last one.

    None but the youngest can grow: where another does, it was joined with those after it.
    """
    since = 0
    for row in range(1, len(shares)):
        youngest = int(np.flatnonzero(shares[row]).max(initial=0))
        if (shares[row, :youngest] > shares[row - 1, :youngest] + 1e-6).any():
            since = row
    return since


def survivals(run: Run) -> dict[int, tuple[np.ndarray, np.ndarray, float]]:
    """First step of a cohort to its ages, the percent of it that is left then, and its share at first.

    Cohorts that were seen once only, and the random entries of the start, tell nothing.
    """
    steps, firsts, shares = cohort_table(run)
    found = {}
    for column, first in enumerate(firsts):
        at_first = int(np.argmax(steps >= first))
        born = shares[at_first, column]
        if first > 0 and born > 0 and steps.size - at_first > 1:
            left = shares[at_first:, column]
            grown = np.maximum.accumulate(left)  # a cohort of several reselections grows before it shrinks
            found[first] = steps[at_first:] - steps[at_first], 100 * left / grown[-1], float(grown[-1])
    return found


def _mean_survival(
    found: Mapping[int, tuple[np.ndarray, np.ndarray, float]],
) -> tuple[np.ndarray, np.ndarray] | None:
    """Ages, and the percent of entries that grow so old (Kaplan and Meier).

    From each age to the next by the cohorts that were seen at both: that old ones are few moves nothing.
    """
    before, after = Counter(), Counter()
    for ages, left, size in found.values():
        for (_, then), (age, now) in pairwise(zip(ages.tolist(), left.tolist(), strict=True)):
            before[age] += size * then
            after[age] += size * now
    if not before:
        return None
    ages = sorted(before)
    kept = [after[age] / before[age] if before[age] else 0.0 for age in ages]
    return np.array([0, *ages]), 100 * np.cumprod([1.0, *kept])


def _lines(
    title: str,
    lines: Sequence[Line],
    y_label: str,
    *,
    x_label: str = _STEP,
    note: str = "",
    unit: str = "",
    zero: bool = False,
    wide: bool = False,
) -> Chart | None:
    """A chart of the curves that have a point; None if none has."""
    lines = [line for line in lines if np.isfinite(line.y).any()]
    if not lines:
        return None
    return Lines(
        title=title, note=note, wide=wide, x_label=x_label, y_label=y_label, lines=lines, unit=unit, zero=zero
    )


def _curves(
    runs: Sequence[Run], what: Callable[[Run], Series], *, smooth: bool = False, dots: bool = False
) -> list[Line]:
    """One of each run that has it."""
    found = []
    for number, run in enumerate(runs):
        one = what(run)
        one = _smoothed(one, _window(one)) if smooth else one
        found.append(Line(run.name, *_thinned(one), number, "dots" if dots else "line"))
    return found


def _window(one: Series) -> int:
    """Steps that a smooth curve takes the mean of: a thirtieth of the run, or five."""
    return max(1, one.values.size // 30, min(5, one.values.size // 8))


def _averaged(runs: Sequence[Run], name: str, timing: bool = False) -> str:
    found = [(run.timing if timing else run.metrics).get(name, EMPTY) for run in runs]
    widths = sorted({_window(one) for one in found if one.values.size} - {1})
    return f"Mean of {' or '.join(map(str, widths))} steps." if widths else ""


def _smoothed(one: Series, width: int) -> Series:
    """Each the mean of so many values around it, of those that are finite."""
    finite = np.isfinite(one.values)
    totals = np.cumsum(np.concatenate([[0.0], np.where(finite, one.values, 0.0)]))
    counts = np.cumsum(np.concatenate([[0], finite]))
    at = np.arange(one.values.size)
    low, high = np.maximum(at - width // 2, 0), np.minimum(at + (width + 1) // 2, at.size)
    count = counts[high] - counts[low]
    mean = np.where(count > 0, (totals[high] - totals[low]) / np.maximum(count, 1), math.nan)
    return Series(one.steps, np.where(finite | (width > 1), mean, math.nan))


def _thinned(one: Series) -> tuple[np.ndarray, np.ndarray]:
    """As many points as can be seen: the lowest and the highest of each stretch, so that spikes stay."""
    if one.values.size <= POINTS:
        return one.steps, one.values
    stretches = np.array_split(np.arange(one.values.size), POINTS // 2)
    low = np.where(np.isfinite(one.values), one.values, math.inf)
    high = np.where(np.isfinite(one.values), one.values, -math.inf)
    kept = sorted({int(at[f(v[at])]) for at in stretches for f, v in ((np.argmin, low), (np.argmax, high))})
    return one.steps[kept], one.values[kept]
