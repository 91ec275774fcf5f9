"""Charts as SVG inside a page: its style sheet colours them, its script shows values under the pointer."""

import json
import math
from collections.abc import Iterable, Sequence
from functools import singledispatch
from typing import Any

import numpy as np

from spiel_jax.reporting.axes import Axis, extent, labels, ticks
from spiel_jax.reporting.charts import COLOURS, RAMP, Areas, Bars, Chart, Grid, Line, Lines
from spiel_jax.reporting.escaping import attribute, shown

HEIGHT = 260
NARROW, WIDE = 600, 1224
LEFT, RIGHT, TOP, BOTTOM = 62, 16, 12, 44
"""Around the plot: room for ticks and labels."""


def tag(name: str, *content: str, **attributes: Any) -> str:
    """An element. Attributes are escaped; ``class_`` is "class", ``_`` is "-".

    >>> tag("text", "a", class_="x", text_anchor='"')
    '<text class="x" text-anchor="&quot;">a</text>'
    """
    told = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{attribute(_written(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return f"<{name}{told}>{''.join(content)}</{name}>"


def _written(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


@singledispatch
def draw(chart: Chart) -> str:
    """A chart as an SVG element."""
    raise TypeError(f"no drawing of {type(chart).__name__}")


@draw.register
def _(chart: Lines) -> str:
    x, y = _plot(chart.wide)
    # a spike of a single step is cut off rather than made the measure of all
    seen = [line.y for line in chart.lines if line.style != "faint"] or [line.y for line in chart.lines]
    faint = [line.y for line in chart.lines if line.style == "faint"]
    low, high = extent(seen, zero=chart.zero)
    tails = 0.01 if sum(map(len, faint)) > 100 else 0.0
    more = extent([*faint, *seen], zero=chart.zero, tails=tails)
    low, high = _roomy(min(low, more[0]), max(high, more[1]), chart.zero)
    first, last = extent([line.x for line in chart.lines])
    x = _spanned(x, (0.0 if first < 0.25 * last else first, last))
    y = _spanned(y, (low, high))
    curves = [_curve(line, x, y) for line in chart.lines]
    listed = [line for line in chart.lines if line.listed]
    data = {
        "kind": "lines",
        "x": [x.low, x.high],
        "label": chart.x_label,
        "unit": chart.unit,
        "lines": [{"name": one.name, "x": _numbers(one.x), "y": _numbers(one.y)} for one in listed],
    }
    return _svg(chart, data, _axes(chart, x, y), tag("g", *curves, clip_path=_clip(chart.wide)))


def _roomy(low: float, high: float, zero: bool) -> tuple[float, float]:
    space = (high - low) * 0.05
    return (low if zero and low == 0 else low - space), high + space


def _curve(line: Line, x: Axis, y: Axis) -> str:
    points = [(x(a), y(b)) if math.isfinite(b) else None for a, b in zip(line.x, line.y, strict=True)]
    path, down = [], False
    for point in points:
        if point is not None:
            path.append(f"{'L' if down else 'M'}{point[0]:.1f} {point[1]:.1f}")
        down = point is not None
    colour = {"class_": f"line c{line.colour % len(COLOURS)}"}
    if isinstance(line.colour, float):
        colour = {"class_": f"line r{_level(0.25 + 0.7 * line.colour, 0, 1)}"}
    colour["class_"] += f" {line.style}"
    drawn = tag("path", d=" ".join(path), **colour)
    alone = line.style == "dots" or sum(point is not None for point in points) == 1
    if alone:
        dots = (tag("circle", cx=p[0], cy=p[1], r=3) for p in points if p is not None)
        drawn += tag("g", *dots, class_=f"dot c{int(line.colour) % len(COLOURS)}")
    return drawn


@draw.register
def _(chart: Areas) -> str:
    x, y = _plot(chart.wide)
    x, y = _spanned(x, (float(chart.x[0]), chart.end)), _spanned(y, (0.0, 100.0))
    edges = [x(float(value)) for value in (*chart.x, chart.end)]
    bottom, bands = np.zeros(chart.x.size), []
    for number, band in enumerate(chart.bands):
        top = bottom + band
        there = [f"{a:.1f} {y(b):.1f} H{c:.1f}" for a, b, c in zip(edges, top, edges[1:], strict=False)]
        back = [f"{c:.1f} {y(b):.1f} H{a:.1f}" for a, b, c in zip(edges, bottom, edges[1:], strict=False)]
        level = _level(0.78 - 0.7 * number / max(len(chart.bands) - 1, 1), 0, 1)
        bands.append(tag("path", d="M" + " L".join([*there, *back[::-1]]) + "Z", class_=f"area f{level}"))
        bottom = top
    data = {
        "kind": "steps",
        "x": [x.low, x.high],
        "label": chart.x_label,
        "unit": "%",
        "lines": [
            {"name": name, "x": _numbers(chart.x), "y": _numbers(band)}
            for name, band in zip(chart.names, chart.bands, strict=True)
        ],
    }
    return _svg(chart, data, tag("g", *bands), _axes(chart, x, y))


@draw.register
def _(chart: Bars) -> str:
    x, y = _plot(chart.wide)
    high = float(max(chart.counts.max(), 0.0 if chart.expected is None else chart.expected.max()))
    x, y = _spanned(x, (0.0, float(chart.counts.size))), _spanned(y, (0.0, 1.05 * (high or 1.0)))
    bars = [
        tag("rect", x=x(n) + 0.5, y=y(count), width=max(x(n + 1) - x(n) - 1, 0.5), height=y(0) - y(count))
        for n, count in enumerate(chart.counts.tolist())
    ]
    drawn = [tag("g", *bars, class_=f"bar c{chart.colour % len(COLOURS)}")]
    told = [f"{count:,} {chart.y_label}" for count in chart.counts.tolist()]
    if chart.expected is not None:
        points = (f"{x(n + 0.5):.1f} {y(v):.1f}" for n, v in enumerate(chart.expected.tolist()))
        drawn.append(tag("path", d="M" + " L".join(points), class_="line expected"))
        told = [f"{text}, {v:,.0f} by chance" for text, v in zip(told, chart.expected, strict=True)]
    names = [f"{chart.x_label}: {one}" for one in chart.bins]
    data = {"kind": "bars", "names": names, "texts": told}
    return _svg(chart, data, _axes(chart, x, y, x_ticks=chart.ticks), *drawn)


@draw.register
def _(chart: Grid) -> str:
    side = 70 if chart.sums else 0
    rows, columns = chart.values.shape
    height = 24 * rows if not chart.sums else 340
    right = (WIDE if chart.wide else NARROW) - RIGHT - side
    top = TOP + side
    x, y = Axis(0, columns, LEFT + 10, right), Axis(0, rows, top, top + height)
    high = float(np.nanmax(chart.values, initial=0.0)) or 1.0
    drawn = [_cells(chart.values, (chart.low, high), x, y, gap=0.0 if chart.sums else 1.0)]
    if chart.sums:
        drawn += _sums(chart.values, x, y, side - 8)
    texts = chart.texts or [f"{value:,.0f}" for value in chart.values.reshape(-1)]
    unit = "" if chart.texts else f" {chart.value_label}"
    data = {"kind": "grid", "rows": chart.rows, "columns": chart.columns, "texts": texts, "unit": unit}
    drawn.append(_grid_ticks(chart, x, y))
    drawn.append(_key(chart, high, x.start, y.end + 42))
    box = x.start, y.start, x.end - x.start, y.end - y.start
    return _svg(chart, data, *drawn, height=int(top + height + 68), box=box)


def _cells(values: np.ndarray, bounds: tuple[float, float], x: Axis, y: Axis, gap: float) -> str:
    """One path for all cells of a level, in units of cells: so a grid of thousands is small."""
    levels: dict[int, list[str]] = {}
    width, height = x(1) - x(0), y(1) - y(0)
    cell = f"h{1 - gap / width:.4g}v{1 - gap / height:.4g}h-{1 - gap / width:.4g}z"
    for (row, column), value in np.ndenumerate(values):
        if math.isfinite(value):
            levels.setdefault(_level(value, *bounds), []).append(f"M{column} {row}{cell}")
    paths = [tag("path", d="".join(cells), class_=f"f{level}") for level, cells in sorted(levels.items())]
    where = f"translate({x(0):.6g} {y(0):.6g}) scale({width:.6g} {height:.6g})"
    return tag("g", *paths, transform=where, class_="crisp" if gap == 0 else None)


def _sums(values: np.ndarray, x: Axis, y: Axis, room: float) -> list[str]:
    above, beside = values.sum(axis=0), values.sum(axis=1)
    up, out = (
        Axis(0, above.max() or 1, y.start - 6, y.start - room),
        Axis(0, beside.max() or 1, x.end + 6, x.end + room),
    )
    bars = [
        tag("rect", x=x(n), y=up(v), width=x(n + 1) - x(n), height=up(0) - up(v)) for n, v in enumerate(above)
    ]
    bars += [
        tag("rect", x=out(0), y=y(n), width=out(v) - out(0), height=y(n + 1) - y(n))
        for n, v in enumerate(beside)
    ]
    return [tag("g", *bars, class_="sums")]


def _grid_ticks(chart: Grid, x: Axis, y: Axis) -> str:
    texts = [_text(label, x(at), y.end + 14, "middle") for at, label in chart.column_ticks.items()] + [
        _text(label, x.start - 6, y(at) + 4, "end") for at, label in chart.row_ticks.items()
    ]
    texts.append(_text(chart.x_label, (x.start + x.end) / 2, y.end + 30, "middle", "label"))
    if chart.y_label:
        texts.append(_turned(chart.y_label, (y.start + y.end) / 2))
    return tag("g", *texts)


def _key(chart: Grid, high: float, left: float, top: float) -> str:
    """What the colours stand for."""
    low = f"{chart.low:.3g}"
    left += 7 * len(low)
    steps = [
        tag("rect", x=left + 14 * n, y=top, width=14, height=9, class_=f"f{n}") for n in range(len(RAMP))
    ]
    end = left + 14 * len(RAMP)
    said = f"{high:.3g}  {chart.value_label}"
    return tag("g", *steps, _text(low, left - 5, top + 9, "end"), _text(said, end + 5, top + 9, "start"))


def _level(value: float, low: float, high: float) -> int:
    """Number of the colour of a value."""
    share = (value - low) / (high - low) if high > low else 0.5
    return min(max(int(share * len(RAMP)), 0), len(RAMP) - 1)


def _plot(wide: bool) -> tuple[Axis, Axis]:
    width = WIDE if wide else NARROW
    return Axis(0, 1, LEFT, width - RIGHT), Axis(0, 1, HEIGHT - BOTTOM, TOP)


def _spanned(axis: Axis, bounds: tuple[float, float]) -> Axis:
    low, high = bounds
    return Axis(low, high if high > low else low + 1, axis.start, axis.end)


def _axes(chart: Lines | Areas | Bars, x: Axis, y: Axis, x_ticks: dict[float, str] | None = None) -> str:
    """Lines across at round values, ticks and labels."""
    heights = ticks(y.low, y.high, 5)
    drawn = [tag("path", d=f"M{x.start} {y(v):.1f}H{x.end}", class_="across") for v in heights]
    drawn += [
        _text(label, x.start - 6, y(v) + 4, "end") for v, label in zip(heights, labels(heights), strict=True)
    ]
    if x_ticks is None:
        found = [tick for tick in ticks(x.low, x.high, 10 if chart.wide else 6) if tick == int(tick)]
        x_ticks = dict(zip(found, labels(found), strict=True))
    drawn += [_text(label, x(at), y.start + 16, "middle") for at, label in x_ticks.items()]
    drawn.append(tag("path", d=f"M{x.start} {y.start}H{x.end}", class_="axis"))
    drawn.append(_text(chart.x_label, (x.start + x.end) / 2, y.start + 36, "middle", "label"))
    drawn.append(_turned(chart.y_label, (y.start + y.end) / 2))
    return tag("g", *drawn)


def _text(content: str, x: float, y: float, anchor: str, class_: str | None = None) -> str:
    return tag("text", shown(content), x=float(x), y=float(y), text_anchor=anchor, class_=class_)


def _turned(content: str, at: float) -> str:
    where = f"translate(13 {at:.0f}) rotate(-90)"
    return tag("text", shown(content), transform=where, text_anchor="middle", class_="label")


def _clip(wide: bool) -> str:
    return f"url(#clip-{'wide' if wide else 'narrow'})"


def clips() -> str:
    """What curves are cut off at; once in a page."""
    boxes = (("wide", WIDE), ("narrow", NARROW))
    rects = (
        tag(
            "clipPath",
            tag("rect", x=LEFT, y=TOP - 4, width=width - LEFT - RIGHT + 4, height=HEIGHT - TOP - BOTTOM + 8),
            id=f"clip-{name}",
        )
        for name, width in boxes
    )
    return tag("svg", tag("defs", *rects), width=0, height=0, aria_hidden="true", class_="clips")


def _svg(
    chart: Chart,
    data: dict[str, Any],
    *content: str,
    height: int = HEIGHT,
    box: Sequence[float] | None = None,
) -> str:
    width = WIDE if chart.wide else NARROW
    box = box or (LEFT, TOP, width - LEFT - RIGHT, HEIGHT - TOP - BOTTOM)
    data["box"] = [round(float(side), 1) for side in box]
    told = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    guide = tag("path", class_="guide", d="")
    drawn = tag(
        "svg",
        *content,
        guide,
        viewBox=f"0 0 {width} {height}",
        role="img",
        aria_label=chart.title,
        class_="chart",
    )
    return drawn + tag("script", told, type="application/json")


def _numbers(values: Iterable[float]) -> list[float | None]:
    """As JSON has them, with as many digits as anybody reads."""
    return [float(f"{value:.6g}") if math.isfinite(value) else None for value in map(float, values)]
