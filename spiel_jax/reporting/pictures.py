"""Charts as pictures, for papers and slides: Matplotlib draws what the page shows, on white."""

import re
from collections.abc import Iterator, Sequence
from functools import singledispatch
from pathlib import Path
from typing import Any

import numpy as np

from spiel_jax.errors import SpielError, extra
from spiel_jax.places import local_path
from spiel_jax.reporting.charts import COLOURS, RAMP, Areas, Bars, Chart, Choice, Grid, Line, Lines
from spiel_jax.reporting.page import sections
from spiel_jax.reporting.runs import Run

_DPI = 160
_INK, _SOFT = "#16202c", "#5a6675"


def write_pictures(runs: Sequence[Run], folder: str | Path) -> list[Path]:
    """Writes every chart of a report to a PNG of its own, named by its title.

    Args:
        runs: What the report is on.
        folder: Where to; made if it is not there. A picture of that name is replaced.

    Raises:
        MissingExtra: If Matplotlib is not installed.
        SpielError: If a picture cannot be written.
    """
    extra("matplotlib", "report").use("Agg")
    place, written = local_path(folder, "--png"), []
    try:
        place.mkdir(parents=True, exist_ok=True)
        for name, chart in _named(runs):
            figure = picture(chart)
            figure.savefig(place / f"{name}.png", dpi=_DPI)
            written.append(place / f"{name}.png")
    except OSError as error:
        raise SpielError(f"--png={folder} cannot be written: {error.strerror or error}") from error
    return written


def _named(runs: Sequence[Run]) -> Iterator[tuple[str, Chart]]:
    """Each chart with a name that no other has."""
    taken: set[str] = set()
    for title, charts in sections(runs).items():
        run = title.partition(": ")[2]
        for chart in charts:
            ones = chart.charts if isinstance(chart, Choice) else {"": chart}
            for choice, one in ones.items():
                words = " ".join((run, one.title, "" if choice in one.title else choice))
                name = re.sub(r"[^a-z0-9.]+", "_", words.lower()).strip("_.")[:120]
                while name in taken:
                    name += "_"
                taken.add(name)
                yield name, one


def picture(chart: Chart) -> Any:
    """A chart as a figure of Matplotlib."""
    from matplotlib.figure import Figure

    tall = 0.32 * chart.values.shape[0] + 1.4 if isinstance(chart, Grid) and not chart.sums else 3.1
    figure = Figure(figsize=(11 if chart.wide else 5.6, 4.6 if chart.tall else tall), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(
        chart.title, loc="left", fontsize=11 if len(chart.title) < 45 else 9, fontweight="bold", color=_INK
    )
    axes.tick_params(colors=_SOFT, labelsize=8.5, length=3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_SOFT)
    _draw(chart, axes)
    axes.set_xlabel(getattr(chart, "x_label", ""), fontsize=9.5, color=_INK)
    axes.set_ylabel(getattr(chart, "y_label", ""), fontsize=9.5, color=_INK)
    return figure


@singledispatch
def _draw(chart: Chart, axes: Any) -> None:
    raise TypeError(f"no picture of {type(chart).__name__}")


@_draw.register
def _(chart: Lines, axes: Any) -> None:
    for line in chart.lines:
        marker = {"marker": "o", "markersize": 4} if line.style == "dots" or line.x.size == 1 else {}
        faint = line.style == "faint"
        axes.plot(
            line.x,
            line.y,
            color=_colour(line),
            linewidth=0.8 if faint else 1.8,
            alpha=0.45 if faint else 1,
            label=_plain(line.name) if line.listed else None,
            **marker,
        )
    if chart.zero:
        axes.set_ylim(bottom=0)
    axes.grid(axis="y", color="#e1e5ea")
    if sum(line.listed for line in chart.lines) > 1:
        axes.legend(frameon=False, fontsize=8.5, labelcolor=_INK)


def _colour(line: Line) -> str:
    if isinstance(line.colour, float):
        return RAMP[min(int((0.25 + 0.75 * line.colour) * len(RAMP)), len(RAMP) - 1)][0]
    return COLOURS[line.colour % len(COLOURS)][0]


@_draw.register
def _(chart: Areas, axes: Any) -> None:
    shades = np.linspace(0.75 * len(RAMP), 0, len(chart.bands)).astype(int)
    axes.stackplot(
        np.append(chart.x, chart.end),
        np.hstack([chart.bands, chart.bands[:, -1:]]),
        step="post",
        colors=[RAMP[shade][0] for shade in shades],
        edgecolor="white",
        linewidth=0.5,
    )
    axes.set(xlim=(chart.x[0], chart.end), ylim=(0, 100))


@_draw.register
def _(chart: Bars, axes: Any) -> None:
    at = np.arange(chart.counts.size) + 0.5
    axes.bar(at, chart.counts, width=0.92, color=COLOURS[chart.colour % len(COLOURS)][0])
    if chart.expected is not None:
        axes.plot(at, chart.expected, color=_INK, linestyle="--", linewidth=1.3, label="by chance")
        axes.legend(frameon=False, fontsize=8.5, labelcolor=_INK)
    axes.set_xticks(list(chart.ticks), list(chart.ticks.values()))
    axes.grid(axis="y", color="#e1e5ea")
    axes.set_axisbelow(True)


@_draw.register
def _(chart: Grid, axes: Any) -> None:
    from matplotlib.colors import LinearSegmentedColormap

    ramp = LinearSegmentedColormap.from_list("ramp", [light for light, _ in RAMP])
    rows, columns = chart.values.shape
    shown = axes.imshow(
        chart.values,
        cmap=ramp,
        vmin=chart.low,
        aspect="auto",
        extent=(0, columns, rows, 0),
        interpolation="nearest",
    )
    axes.set_xticks(list(chart.column_ticks), list(chart.column_ticks.values()))
    axes.set_yticks(list(chart.row_ticks), list(chart.row_ticks.values()))
    axes.figure.colorbar(shown, ax=axes, pad=0.02).set_label(chart.value_label, fontsize=9)


def _plain(text: str) -> str:
    """Without what Matplotlib reads as a formula, or leaves out of a legend."""
    return text.replace("$", r"\$").lstrip("_") or "run"
