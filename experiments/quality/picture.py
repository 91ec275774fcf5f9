"""Draws the studies' methods beside LoRA, one column of marks for each study, as SVG.

    python -m experiments.quality.picture --out=docs/pictures/which_method.svg

Reads the results in this folder.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean

from absl import flags

from experiments.quality.svg import GREY, METHODS, colour, signed, text, whole
from experiments.quality.tables import Result, at_best, beside, grouped, standard_error
from spiel_jax import cli

STUDIES = {
    "chitchat": ("conversations", "60 steps"),
    "long": ("conversations", "300 steps"),
    "instructions": ("instructions", "60 steps"),
    "gsm8k": ("worked problems", "60 steps"),
    "finnish": ("into Finnish", "60 steps"),
}
RESULTS = Path(__file__).parent / "results"
LOWEST, HIGHEST = -0.09, 0.09  # nats a token beside LoRA; beyond it a number stands at the edge
TICKS, LABELS = (LOWEST, -0.06, -0.03, 0.0, 0.03, 0.06, HIGHEST), (-0.06, 0.0, 0.06)
LEFT, TOP, WIDTH, GAP, LINE = 262, 66, 144, 16, 26


def define_flags(values: flags.FlagValues) -> None:
    """Defines the flags of the command."""
    flags.DEFINE_string("out", None, "The .svg to write.", required=True, flag_values=values)


def main(options: flags.FlagValues) -> None:
    """Writes the picture."""
    studies = {name: json.loads((RESULTS / f"{name}.json").read_text())["runs"] for name in STUDIES}
    Path(options.out).write_text(picture(studies), encoding="utf-8")


def picture(studies: Mapping[str, Sequence[Result]]) -> str:
    """The whole, of a study's name to its runs, all without budgets and with ``lora`` among them."""
    height = TOP + LINE * len(METHODS)
    parts = [
        text(LEFT - 16, _middle(row), words, anchor="end", colour=colour(name))
        for row, (name, words) in enumerate(METHODS.items())
    ]
    for column, (name, runs) in enumerate(studies.items()):
        left = LEFT + column * (WIDTH + GAP)
        parts += _panel(left, height, *STUDIES[name])
        groups = {method: runs for (method, _), runs in grouped(runs).items()}
        lora = at_best(groups["lora"])
        for row, method in enumerate(METHODS):
            if method in groups:
                parts += _mark(left, _middle(row), beside(at_best(groups[method]), lora), colour(method))
    label = "Test loss of each method beside that of LoRA of the same size, each at its best learning rate"
    return whole(LEFT + len(studies) * (WIDTH + GAP), height + 46, label, parts)


def _panel(left: float, bottom: float, title: str, what: str) -> list[str]:
    """Of one study: its name, LoRA's line, and the scale."""
    lines = [text(left + WIDTH / 2, 22, title, size=15), text(left + WIDTH / 2, 42, what)]
    for loss in TICKS:
        x = _x(left, loss)
        style = 'stroke-width="1.6"' if loss == 0 else 'stroke-opacity=".3"'
        lines.append(f'<path d="M{x:g} {TOP - 8}V{bottom}" stroke="{GREY}" {style}/>')
        if loss in LABELS:
            lines.append(text(x, bottom + 18, signed(loss, "g") if loss else "LoRA", size=11))
    return lines


def _mark(left: float, y: float, differences: Sequence[float], stroke: str) -> list[str]:
    """A mean with its standard error over seeds; hollow if there is one seed."""
    if not differences:
        return []
    middle = mean(differences)
    if not LOWEST <= middle <= HIGHEST:
        right = middle > HIGHEST
        number = signed(middle, ".2f")
        words = f"{number} →" if right else f"← {number}"
        x = left + WIDTH if right else left
        return [text(x, y, words, size=12, colour=stroke, anchor="end" if right else "start")]
    parts, filled = [], len(differences) > 1
    if filled:
        error = standard_error(differences)
        ends = (_x(left, min(max(end, LOWEST), HIGHEST)) for end in (middle - error, middle + error))
        parts.append(
            f'<path d="M{next(ends):.4g} {y:g}H{next(ends):.4g}" stroke="{stroke}" stroke-width="2"/>'
        )
    style = f'fill="{stroke if filled else "none"}" stroke="{stroke}" stroke-width="1.6"'
    return [*parts, f'<circle cx="{_x(left, middle):.4g}" cy="{y:g}" r="4" {style}/>']


def _x(left: float, loss: float) -> float:
    return left + WIDTH * (loss - LOWEST) / (HIGHEST - LOWEST)


def _middle(row: int) -> float:
    return TOP + (row + 0.5) * LINE


if __name__ == "__main__":
    cli.run(main, define_flags)
