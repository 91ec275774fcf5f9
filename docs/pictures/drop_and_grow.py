"""Draws drop_and_grow.svg: one reselection of a small weight, and what it does to the slots.

python docs/pictures/drop_and_grow.py

Its colours are of middle brightness: they can be read on white and on black.
"""

from pathlib import Path

ROWS, COLUMNS, CELL, GAP, TOP = 6, 9, 26, 46, 66
VALUES = {3: 0.8, 8: -0.1, 12: 0.6, 21: -0.9, 29: 0.2, 34: 0.7, 40: -0.1, 51: 0.5}  # position: delta
CANDIDATES = {1: 0.3, 10: -0.9, 17: 0.2, 23: 0.6, 31: -0.2, 38: 0.8, 45: 0.3, 48: -0.1}  # position: sum
N = 3
GREY, BLUE, ORANGE, GREEN = "#858b94", "#4a86d8", "#e07b2e", "#33a06a"


def text(
    x: float, y: float, words: str, *, size: int = 14, colour: str = GREY, anchor: str = "middle"
) -> str:
    """A line of text."""
    return (
        f'<text x="{x:g}" y="{y:g}" font-size="{size}" fill="{colour}" text-anchor="{anchor}">{words}</text>'
    )


def square(x: float, y: float, side: float, style: str) -> str:
    """A square around the middle (x, y)."""
    corner = side / 2
    return f'<rect x="{x - corner:g}" y="{y - corner:g}" width="{side:g}" height="{side:g}" rx="2" {style}/>'


def middle(left: float, position: int) -> tuple[float, float]:
    """Middle of an entry's cell."""
    row, column = divmod(position, COLUMNS)
    return left + (column + 0.5) * CELL, TOP + (row + 0.5) * CELL


def side(number: float) -> float:
    """Of a square that stands for a number: its area grows with the magnitude."""
    return 3 + 17 * abs(number) ** 0.5


def weight(left: float, title: str, what: str) -> list[str]:
    """An empty weight with its title."""
    lines = [f"M{left:g} {TOP + r * CELL}h{COLUMNS * CELL}" for r in range(ROWS + 1)] + [
        f"M{left + c * CELL:g} {TOP}v{ROWS * CELL}" for c in range(COLUMNS + 1)
    ]
    centre = left + COLUMNS * CELL / 2
    return [
        text(centre, 22, title, size=19),
        text(centre, 47, what, size=15),
        f'<path d="{"".join(lines)}" stroke="{GREY}" stroke-opacity=".35" fill="none"/>',
    ]


def slots(left: float, entries: list[tuple[int, float, str]]) -> list[str]:
    """The arrays of a weight: index and value of each slot."""
    top, drawn = TOP + ROWS * CELL + 22, []
    step = COLUMNS * CELL / len(entries)
    for number, (index, value, colour) in enumerate(entries):
        x = left + (number + 0.5) * step
        box = f'width="{step:g}" height="24" fill="none" stroke="{GREY}" stroke-opacity=".35"'
        drawn += [f'<rect x="{x - step / 2:g}" y="{top + row * 24}" {box}/>' for row in range(2)]
        drawn += [text(x, top + 17, str(index), size=12, colour=colour)]
        shown = f"{value:g}".replace("-", "\u2212").replace("0.", ".")
        drawn += [text(x, top + 41, shown, size=12, colour=colour)]
    return drawn


def picture() -> str:
    """The whole, as SVG."""
    dropped = sorted(VALUES, key=lambda position: abs(VALUES[position]))[:N]
    grown = sorted(CANDIDATES, key=lambda position: -abs(CANDIDATES[position]))[:N]
    lefts = [74 + number * (COLUMNS * CELL + GAP) for number in range(3)]

    parts = weight(lefts[0], "update", "every step trains k deltas")
    for position, value in VALUES.items():
        parts.append(square(*middle(lefts[0], position), side(value), f'fill="{BLUE}"'))
    parts += slots(lefts[0], [(i, v, BLUE) for i, v in VALUES.items()])

    parts += weight(lefts[1], "drop", f"the {N} of smallest |value| go")
    for position, value in VALUES.items():
        gone = f'fill="none" stroke="{ORANGE}" stroke-width="2" stroke-dasharray="4 2"'
        style = gone if position in dropped else f'fill="{BLUE}"'
        parts.append(square(*middle(lefts[1], position), 18 if position in dropped else side(value), style))
    parts += slots(lefts[1], [(i, v, ORANGE if i in dropped else BLUE) for i, v in VALUES.items()])

    parts += weight(lefts[2], "grow", f"the {N} of largest gradient")
    for position, value in VALUES.items():
        if position not in dropped:
            parts.append(square(*middle(lefts[2], position), side(value), f'fill="{BLUE}"'))
    for position, gradient in CANDIDATES.items():
        chosen = position in grown
        style = f'fill="{GREEN}" fill-opacity="{0.35 if chosen else 0}" stroke="{GREEN}" '
        style += f'stroke-width="{2.5 if chosen else 1}"'
        parts.append(square(*middle(lefts[2], position), side(gradient), style))
    coming = iter(grown)
    after = [(next(coming), 0.0, GREEN) if i in dropped else (i, v, BLUE) for i, v in VALUES.items()]
    parts += slots(lefts[2], after)

    for left in lefts[1:]:
        parts.append(text(left - GAP / 2, TOP + ROWS * CELL / 2 + 6, "→", size=26))
    base = TOP + ROWS * CELL + 39
    parts += [text(66, base, "indices", anchor="end"), text(66, base + 24, "values", anchor="end")]
    width, height = lefts[2] + COLUMNS * CELL + 8, base + 44
    label = "One reselection: deltas are trained, the smallest are dropped, new entries grow in their slots"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
        f'font-family="system-ui, sans-serif">\n<title>{label}</title>\n' + "\n".join(parts) + "\n</svg>\n"
    )


if __name__ == "__main__":
    Path(__file__).with_suffix(".svg").write_text(picture(), encoding="utf-8")
