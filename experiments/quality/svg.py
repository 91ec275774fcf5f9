"""What the pictures of the studies share: what methods are called there, colours and text, as SVG.

The colours are of middle brightness: they can be read on white and on black.
"""

from collections.abc import Sequence

METHODS = {  # as the study calls it, to what it is called here
    "full": "all weights",
    "rslora": "rank-stabilised LoRA",
    "random + lora": "half random entries, half LoRA",
    "supra": "half largest weights, half LoRA",
    "rosa": "half largest gradients, half LoRA",
    "random, evolving by age": "random entries, evolving by age",
    "random, evolving": "random entries, evolving",
    "random, fixed": "random entries, fixed",
    "lift, fixed": "largest of low rank (LIFT), fixed",
    "magnitude, fixed": "largest weights, fixed",
    "spiel_ag, evolving often by age": "SpIEL-AG, often, by age",
    "spiel_ag, second moment seeded": "SpIEL-AG",
    "gradient, balanced by rows": "largest gradients, by rows, fixed",
    "gradient, fixed": "largest gradients, fixed",
    "spiel_ag": "SpIEL-AG as in the paper",
    "spiel_ma": "SpIEL-MA",
    "ia3": "(IA)³",
}
GREY, BLUE, ORANGE = "#858b94", "#4a86d8", "#e07b2e"
SPARSE = ("random, ", "lift", "magnitude", "spiel", "gradient")


def whole(width: float, height: float, label: str, parts: Sequence[str]) -> str:
    """A picture of its parts; the label is what it shows, for who does not see it."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" role="img" '
        f'font-family="system-ui, sans-serif">\n<title>{label}</title>\n' + "\n".join(parts) + "\n</svg>\n"
    )


def text(
    x: float, y: float, words: str, *, size: int = 13, colour: str = GREY, anchor: str = "middle"
) -> str:
    """Words, at half their height."""
    place = f'x="{x:.4g}" y="{y:g}" dominant-baseline="middle"'
    return f'<text {place} font-size="{size}" fill="{colour}" text-anchor="{anchor}">{words}</text>'


def colour(method: str) -> str:
    """Of a method's marks: sparse sets are blue, those with LoRA beside them orange, all others grey."""
    mixed = "+ lora" in method or method in ("supra", "rosa")
    return ORANGE if mixed else BLUE if method.startswith(SPARSE) else GREY


def signed(number: float, form: str) -> str:
    """A number with its sign, a minus as print has it."""
    return f"{number:+{form}}".replace("-", "\u2212")
