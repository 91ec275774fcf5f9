"""Scores of models, side by side."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Score:
    """A number of the table.

    Attributes:
        value: It.
        error: Its standard error, if there is one.
        count: Of documents.
    """

    value: float
    error: float | None
    count: int | None


def numbers(results: Mapping[str, Any]) -> dict[tuple[str, str], Score]:
    """The scores in what ``harness.scores`` gives, by task and metric.

    Where a task has several filters, the metric's name has the filter.
    """
    found = {}
    counts = results.get("n-samples", {})
    for task, entries in results["results"].items():
        filters = {key.partition(",")[2] for key in entries if "," in key}
        for key, value in entries.items():
            metric, comma, filtered = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = entries.get(f"{metric}_stderr,{filtered}")
            error = float(error) if isinstance(error, int | float) else None
            name = metric if len(filters) == 1 else f"{metric} ({filtered})"
            count = counts.get(task, {}).get("effective")
            found[task.removeprefix("local_"), name] = Score(float(value), error, count)
    return found


def table(columns: Mapping[str, Mapping[tuple[str, str], Score]]) -> str:
    """Scores of models side by side, in Markdown; with two models, what the second has more.

    Args:
        columns: For each model, what ``numbers`` gives.
    """
    labels = list(columns)
    heads = ["task", "metric", "n", *labels, *(["difference"] if len(labels) == 2 else [])]
    rows = []
    for key in dict.fromkeys(key for column in columns.values() for key in column):
        shown = [columns[label].get(key) for label in labels]
        there = [score for score in shown if score is not None]
        cells = [*key, str(there[0].count or ""), *map(_shown, shown)]
        if len(labels) == 2:
            cells.append(f"{there[1].value - there[0].value:+.4f}" if len(there) == 2 else "")
        rows.append(cells)
    widths = [max(len(row[i]) for row in [heads, *rows]) for i in range(len(heads))]
    lines = [heads, ["-" * width for width in widths], *rows]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |"
        for line in lines
    )


def _shown(score: Score | None) -> str:
    if score is None:
        return ""
    return f"{score.value:.4f}" + ("" if score.error is None else f" ± {score.error:.4f}")
