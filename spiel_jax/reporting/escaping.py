"""Texts of a run, which anybody can have written, in a page."""

import html
import unicodedata


def shown(text: str) -> str:
    r"""A text as HTML that shows it, and does nothing else; what no page can hold is told by its number.

    Example:
        >>> shown("<b>\x00\ud800")
        '&lt;b&gt;\\x00\\ud800'
    """
    return html.escape("".join(_shown(character) for character in text), quote=True)


attribute = shown
"""A text as the value of an attribute in double quotes."""


def _shown(character: str) -> str:
    if character in "\n\t" or unicodedata.category(character) not in ("Cc", "Cs"):
        return character
    return character.encode("unicode_escape").decode()
