"""Charts of where a run's changes are, and how large."""

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from spiel_jax.reporting.changes import MAGNITUDES, Changes, Map, Weight
from spiel_jax.reporting.charts import Bars, Chart, Choice, Grid

_WHAT = {
    "sparse": "norm of the deltas",
    "lora": "norm of scale * B A",
    "ia3": "distance of the factors from 1, norm",
}


def where(changes: Changes, colour: int = 0) -> list[Chart | Choice]:
    """Charts of where a run's changes are.

    Args:
        changes: Of its checkpoint.
        colour: Number of the run's colour.
    """
    if not changes.weights:
        return []
    charts: list[Chart | Choice] = [_by_layer(changes)]
    if changes.kind == "sparse":
        charts.append(_per_line(changes.weights, 0, colour))
        charts.append(Choice("weight", {one.weight.name: _map(one) for one in changes.maps}))
        charts.append(_per_line(changes.weights, 1, colour))
    return charts


def _by_layer(changes: Changes) -> Choice:
    """Kinds of weights by layers; weights outside of layers are a column of their own."""
    measures = {_WHAT[changes.kind]: [one.norm for one in changes.weights]}
    if changes.kind == "sparse":
        measures |= {
            "root mean square of an entry": [one.norm / math.sqrt(one.count) for one in changes.weights],
            "largest delta": [one.largest for one in changes.weights],
            "density, %": [100 * one.count / one.size for one in changes.weights],
        }
    measures = {
        what: found for what, found in measures.items() if what == _WHAT[changes.kind] or not _alike(found)
    }
    return Choice("measure", {what: _layer_grid(changes, what, found) for what, found in measures.items()})


def _alike(measured: Sequence[float]) -> bool:
    return max(measured) <= 1.01 * min(measured)


def _layer_grid(changes: Changes, what: str, measured: Sequence[float]) -> Grid:
    cells = dict(zip((weight.place for weight in changes.weights), measured, strict=True))
    told = {weight.place: _told(weight, changes.kind) for weight in changes.weights}
    layers = sorted({layer for layer, _ in cells})
    kinds = list(dict.fromkeys(kind for _, kind in cells))
    places = [[(layer, kind) for layer in layers] for kind in kinds]
    names = ["none" if layer < 0 else str(layer) for layer in layers]
    every = max(1, math.ceil(len(layers) / 30))
    return Grid(
        title="Changes by layer and kind of weight",
        wide=True,
        x_label="layer",
        y_label="",
        rows=kinds,
        columns=[f"layer {name}" for name in names],
        row_ticks={n + 0.5: _short(kind) for n, kind in enumerate(kinds)},
        column_ticks={n + 0.5: name for n, name in enumerate(names) if n % every == 0},
        values=np.array([[cells.get(place, math.nan) for place in row] for row in places]),
        texts=[told.get(place, "") for row in places for place in row],
        value_label=what,
        low=0.0 if _alike(measured) else min(measured),
    )


def _short(kind: str) -> str:
    return kind.rpartition(".")[2].removesuffix("_proj")


def _told(weight: Weight, kind: str) -> str:
    told = [f"norm {weight.norm:.4g}"]
    if math.isfinite(weight.largest):
        told.append(f"largest {weight.largest:.3g}")
    if kind == "sparse":
        told.append(f"{weight.count:,} entries, {100 * weight.count / weight.size:.3g}%")
    return ", ".join(told)


def magnitudes(changes: Changes, colour: int = 0) -> Chart | None:
    """How large the deltas are; None where there are none, or all are 0."""
    if changes.magnitudes is None or not changes.magnitudes.any():
        return None
    found, there = changes.magnitudes.copy(), np.flatnonzero(changes.magnitudes)
    # a few that all but vanish do not take half of the axis
    low = int(np.searchsorted(np.cumsum(found), 1e-3 * found.sum()))
    high = int(there[-1]) + 1
    found[low] = found[: low + 1].sum()
    bounds = MAGNITUDES[low : high + 1]
    bins = [f"{10**a:.2g} to {10**b:.2g}" for a, b in pairwise(bounds)]
    if there[0] < low:
        bins[0] = f"up to {10 ** bounds[1]:.2g}"
    note = f"{changes.zeros:,} entries are 0: just grown, or not yet moved." if changes.zeros else ""
    return Bars(
        title="Magnitudes of the deltas",
        note=note,
        x_label="magnitude of a delta",
        y_label="entries",
        bins=bins,
        ticks={float(n): _power(b) for n, b in enumerate(bounds) if b == round(b)},
        counts=found[low:high],
        colour=colour,
    )


def _power(exponent: float) -> str:
    return f"1e{round(exponent)}"


def _per_line(weights: Sequence[Weight], axis: int, colour: int) -> Chart:
    """How many entries a row (axis 0) or a column has, and how many it would have by chance."""
    what = ("row", "column")[axis]
    found = [(w, counts) for w in weights if (counts := (w.rows, w.columns)[axis]) is not None]
    counts = np.concatenate([one for _, one in found])
    means = np.repeat([w.count / w.shape[axis] for w, _ in found], [w.shape[axis] for w, _ in found])
    top = int(np.quantile(counts, 0.99))
    width = max(1, math.ceil((top + 1) / 40))
    number = top // width + 1
    bounds = np.arange(number + 1) * width
    seen = np.histogram(np.minimum(counts, bounds[-1] - 1), bounds)[0]
    bins = [f"{a}" if width == 1 else f"{a} to {a + width - 1}" for a in bounds[:-1]]
    bins[-1] = f"{bounds[-2]} or more"
    every = max(1, math.ceil(number / 8))
    return Bars(
        title=f"Entries per {what}",
        note=f"All {what}s of all weights. Line: if entries lay at random.",
        x_label=f"entries in a {what}",
        y_label=f"{what}s",
        bins=bins,
        ticks={n + 0.5: f"{bounds[n]:,}" for n in range(0, number, every)},
        counts=seen,
        colour=colour,
        expected=_by_chance(means, bounds),
    )


def _by_chance(means: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """How many lines have how many entries, if each entry fell on any of its weight's: Poisson's counts."""
    found, seen = np.unique(means, return_counts=True)
    most = np.arange(bounds[-1])
    log_factorials = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, bounds[-1])))])
    total = np.zeros(bounds.size - 1)
    for mean, lines in zip(found, seen, strict=True):
        chance = np.exp(most * np.log(mean) - mean - log_factorials)
        parts = np.add.reduceat(chance, bounds[:-1])
        parts[-1] += 1 - chance.sum()  # and more
        total += lines * parts
    return total


def _map(one: Map) -> Grid:
    weight, (rows, columns) = one.weight, one.weight.shape
    share = 100 * weight.count / weight.size
    return Grid(
        title=f"Rows and columns of {weight.name}",
        note=f"{weight.count:,} entries, {share:.3g}% of {rows:,} x {columns:,}. Sums at the sides.",
        x_label="column (input)",
        y_label="row (output)",
        rows=_spans("rows", one.row_bounds),
        columns=_spans("columns", one.column_bounds),
        row_ticks=_bound_ticks(one.row_bounds),
        column_ticks=_bound_ticks(one.column_bounds),
        values=one.counts.astype(float),
        value_label="entries in a cell",
        sums=True,
        tall=True,
    )


def _spans(what: str, bounds: np.ndarray) -> list[str]:
    return [f"{what} {a}" + (f" to {b - 1}" if b - a > 1 else "") for a, b in pairwise(bounds)]


def _bound_ticks(bounds: np.ndarray) -> dict[float, str]:
    every = max(1, (bounds.size - 1) // 4)
    return {float(n): f"{bounds[n]:,}" for n in range(0, bounds.size, every)}
