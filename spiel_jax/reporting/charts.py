"""What a chart shows, whoever draws it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

COLOURS = (
    ("#0068b5", "#5eb0ff"),
    ("#d1500a", "#ff9455"),
    ("#00835f", "#35cfa0"),
    ("#b3489a", "#f29ad8"),
    ("#8a6d00", "#e8c53a"),
    ("#2a94b8", "#8fdcf5"),
    ("#6a4fc4", "#b9a6ff"),
    ("#5c6470", "#c3cad4"),
)
"""Of runs, on a light and on a dark page: after Okabe and Ito, for eyes that see red and green alike too."""

RAMP = (
    ("#e7f1f8", "#182530"),
    ("#cfe3f0", "#1a3344"),
    ("#aed1e6", "#1b445c"),
    ("#86bad9", "#1b5777"),
    ("#5da0ca", "#1f6c93"),
    ("#3b85b8", "#3084af"),
    ("#246aa1", "#4f9ec9"),
    ("#155085", "#7bb9dd"),
    ("#0c3865", "#addaf0"),
    ("#072344", "#e2f5ff"),
)
"""From little to much, on a light and on a dark page: lightness alone tells the order."""


@dataclass(frozen=True, kw_only=True)
class Chart:
    """What all have.

    Attributes:
        title: What it shows.
        note: How to read it; may be empty.
        wide: Whether it takes the whole width of the page.
        tall: Whether it takes the height of two.
    """

    title: str
    note: str = ""
    wide: bool = False
    tall: bool = False


@dataclass(frozen=True)
class Line:
    """A curve.

    Attributes:
        name: What it is.
        x: [n].
        y: [n]; NaN is a gap.
        colour: Number of one of ``COLOURS``, or a share of ``RAMP`` where it is a float.
        style: "faint" lies behind the others, "dots" has a dot at each point.
        listed: Whether the legend has it.
    """

    name: str
    x: np.ndarray
    y: np.ndarray
    colour: int | float = 0
    style: Literal["line", "faint", "dots"] = "line"
    listed: bool = True


@dataclass(frozen=True, kw_only=True)
class Lines(Chart):
    """Curves over one axis.

    Attributes:
        x_label: Of the axis, with its unit.
        y_label: Likewise.
        lines: In the order in which they are drawn.
        unit: Appended to a value.
        zero: Whether the y axis begins at 0.
    """

    x_label: str
    y_label: str
    lines: Sequence[Line]
    unit: str = ""
    zero: bool = False


@dataclass(frozen=True, kw_only=True)
class Areas(Chart):
    """Shares of a whole over one axis, stacked; each holds from its x to the next.

    Attributes:
        x_label: Of the axis, with its unit.
        y_label: Likewise.
        x: [n].
        end: Where the last one ends.
        names: Of the bands, the lowest first.
        bands: [bands, n] percent.
    """

    x_label: str
    y_label: str
    x: np.ndarray
    end: float
    names: Sequence[str]
    bands: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Bars(Chart):
    """How many are in each bin.

    Attributes:
        x_label: Of the axis, with its unit.
        y_label: Likewise.
        bins: What each bin is, for whoever asks.
        ticks: Position on the axis, in bins, to its label.
        counts: [n].
        colour: Number of one of ``COLOURS``.
        expected: [n] what chance would give, drawn as a line; or None.
    """

    x_label: str
    y_label: str
    bins: Sequence[str]
    ticks: dict[float, str]
    counts: np.ndarray
    colour: int = 0
    expected: np.ndarray | None = None


@dataclass(frozen=True, kw_only=True)
class Grid(Chart):
    """A number for each cell of a table, as a colour.

    Attributes:
        x_label: Of the columns.
        y_label: Of the rows.
        rows: What each is.
        columns: Likewise.
        row_ticks: Position, in cells, to its label.
        column_ticks: Likewise.
        values: [rows, columns]; NaN where there is nothing.
        texts: What each cell says to whoever asks, by rows; empty: its value.
        value_label: What the colours stand for, with its unit.
        low: What the first colour stands for; the last is for the largest value.
        sums: Whether sums of rows and columns are drawn at the sides.
    """

    x_label: str
    y_label: str
    rows: Sequence[str]
    columns: Sequence[str]
    row_ticks: dict[float, str]
    column_ticks: dict[float, str]
    values: np.ndarray
    value_label: str
    texts: Sequence[str] = ()
    low: float = 0.0
    sums: bool = False


@dataclass(frozen=True)
class Choice:
    """Charts of which one is shown at a time.

    Attributes:
        label: What is chosen.
        charts: Name of each to it.
    """

    label: str
    charts: dict[str, Grid]
