"""Formulas as MathML, which browsers draw themselves: no script, no font and no network is needed."""

import html
import re

from latex2mathml.converter import convert

_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def on_page_content(content: str, **_) -> str:
    """MkDocs calls it with the HTML of each page: puts MathML where ``$...$`` and ``$$...$$`` were."""
    return _FORMULA.sub(_drawn, content)


def _drawn(formula: re.Match) -> str:
    display = "block" if formula[1] == "div" else "inline"
    return convert(html.unescape(formula[2]).strip(), display=display)
