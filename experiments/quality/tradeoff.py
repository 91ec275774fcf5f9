"""Draws what each method learnt against how far it moved the model elsewhere, as SVG.

    python -m experiments.quality.tradeoff --out=docs/pictures/learnt_and_moved.svg

Reads `results/chitchat.json`: runs of the seed of which most are known elsewhere. A method's runs at other
rates are joined to that at its best.
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from absl import flags

from experiments.quality.picture import RESULTS, define_flags
from experiments.quality.svg import BLUE, GREY, METHODS, colour, signed, text, whole
from experiments.quality.tables import Result, at_best, grouped
from spiel_jax import cli

PLACE = "data"  # problems of HumanEval and questions of GSM8K
NAMES = {
    **METHODS,
    "lora": "LoRA, rank 8",
    "random, evolving + lora": "half random entries, evolving, half LoRA",
}
LEFT, TOP, WIDTH, HEIGHT = 74, 18, 660, 420
MOVED, LEARNT = (0.0, 0.2), (-0.01, 0.09)  # nats a token: of divergence, of loss beside LoRA's
NAME_AFTER = (0.075, 0.15)  # moved: names stand after marks between these, and before all others, for room
ON_THE_LINE = 0.003  # of what is so near to LoRA, names stand above


def main(options: flags.FlagValues) -> None:
    """Writes the picture."""
    runs = json.loads((RESULTS / "chitchat.json").read_text())["runs"]
    Path(options.out).write_text(picture(runs), encoding="utf-8")


def picture(runs: Sequence[Result]) -> str:
    """The whole, of runs without budgets, ``lora`` among them; lower and further left is better."""
    groups = {method: those for (method, _), those in grouped(runs).items()}
    best = {method: at_best(those)[0]["rate"] for method, those in groups.items()}
    moved = [run for run in runs if PLACE in run.get("elsewhere", ())]
    ((seed, _),) = Counter(run["seed"] for run in moved).most_common(1)
    shown = [run for run in moved if run["seed"] == seed]
    (lora,) = (run["test"] for run in shown if (run["method"], run["rate"]) == ("lora", best["lora"]))
    parts = list(_axes())
    for method, those in ((name, [run for run in shown if run["method"] == name]) for name in NAMES):
        parts += _marks(method, sorted(those, key=lambda run: run["rate"]), best.get(method), lora)
    label = "Loss of each method on the test beside LoRA's, and divergence from its base elsewhere"
    return whole(LEFT + WIDTH + 20, TOP + HEIGHT + 58, label, parts)


def _marks(method: str, runs: Sequence[Result], best: float | None, lora: float) -> Iterator[str]:
    """Of a method: a mark for each rate, hollow if it is not its best one, and a line through them."""
    stroke = colour(method)
    places = [_place(run["elsewhere"][PLACE]["divergence"], run["test"] - lora) for run in runs]
    if len(places) > 1:
        line = "L".join(f"{x:.4g} {y:.4g}" for x, y in places)
        yield f'<path d="M{line}" fill="none" stroke="{stroke}" stroke-dasharray="3 3"/>'
    for run, (x, y) in zip(runs, places, strict=True):
        fill = stroke if run["rate"] == best else "none"
        yield f'<circle cx="{x:.4g}" cy="{y:.4g}" r="4" fill="{fill}" stroke="{stroke}" stroke-width="1.6"/>'
        yield _name(method, run, x, y, lora) if run["rate"] == best else _rate(run, x, y, stroke)


def _name(method: str, run: Result, x: float, y: float, lora: float) -> str:
    """What a method is called, beside its mark; above LoRA's line if it would lie on it."""
    after = NAME_AFTER[0] < run["elsewhere"][PLACE]["divergence"] < NAME_AFTER[1]
    above = 9 if abs(run["test"] - lora) < ON_THE_LINE else 0
    side, anchor = (x + 8, "start") if after else (x - 8, "end")
    return text(side, y - above, NAMES[method], colour=colour(method), anchor=anchor, size=12)


def _rate(run: Result, x: float, y: float, stroke: str) -> str:
    """A rate that is not a method's best, above its mark."""
    return text(x, y - 13, f"at {run['rate']:g}", colour=stroke, size=11)


def _axes() -> Iterator[str]:
    """Both scales, and LoRA's line."""
    for moved in (0.0, 0.05, 0.1, 0.15, 0.2):
        x, _ = _place(moved, 0.0)
        yield f'<path d="M{x:.4g} {TOP}V{TOP + HEIGHT}" stroke="{GREY}" stroke-opacity=".3"/>'
        yield text(x, TOP + HEIGHT + 16, f"{moved:g}", size=11)
    for learnt in (0.0, 0.02, 0.04, 0.06, 0.08):
        _, y = _place(0.0, learnt)
        style = 'stroke-width="1.6"' if learnt == 0 else 'stroke-opacity=".3"'
        yield f'<path d="M{LEFT} {y:.4g}H{LEFT + WIDTH}" stroke="{GREY}" {style}/>'
        yield text(LEFT - 8, y, signed(learnt, "g") if learnt else "LoRA", size=11, anchor="end")
    below = "moved: divergence of the model from its base on other texts, nats a token"
    yield text(LEFT + WIDTH / 2, TOP + HEIGHT + 42, below)
    yield f'<g transform="rotate(-90 16 {TOP + HEIGHT / 2:g})">'
    yield text(16, TOP + HEIGHT / 2, "learnt: test loss beside LoRA\u2019s")
    yield "</g>"
    yield text(LEFT + 10, TOP + HEIGHT - 14, "lower and further left is better", colour=BLUE, anchor="start")


def _place(moved: float, learnt: float) -> tuple[float, float]:
    """Where a run stands: x, y."""
    return (
        LEFT + WIDTH * (moved - MOVED[0]) / (MOVED[1] - MOVED[0]),
        TOP + HEIGHT * (1 - (learnt - LEARNT[0]) / (LEARNT[1] - LEARNT[0])),
    )


if __name__ == "__main__":
    cli.run(main, define_flags)
