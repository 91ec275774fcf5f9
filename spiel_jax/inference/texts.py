"""Stops that are texts, where a model makes tokens."""

from collections.abc import Callable, Sequence
from typing import Any

_PER_TOKEN = 1  # characters that a token stands for, at least


def stops_at(
    tokenizer: Any, stops: Sequence[str], longest_check: int = 64
) -> Callable[[Sequence[int]], bool] | None:
    """What tells, for ``Request.ended``, whether one of these texts has been written; None for no texts.

    Args:
        tokenizer: Decodes.
        stops: The texts; empty ones never stop.
        longest_check: Tokens at the end of what is new that are looked at, beside those of the longest text.

    Example:
        >>> class Letters:
        ...     def decode(self, tokens, **_):
        ...         return "".join(map(chr, tokens))
        >>> ended = stops_at(Letters(), ["stop"])
        >>> ended([ord(letter) for letter in "sto"]), ended([ord(letter) for letter in "stopped"])
        (False, True)
    """
    texts = [text for text in stops if text]
    if not texts:
        return None
    window = longest_check + max(map(len, texts)) // _PER_TOKEN

    def ended(new: Sequence[int]) -> bool:
        end = tokenizer.decode(new[-window:], skip_special_tokens=False)
        return any(text in end for text in texts)

    return ended


def before_stops(text: str, stops: Sequence[str]) -> str:
    """A text up to the first of these.

    >>> before_stops("one two three", ["three", "two"])
    'one '
    """
    for stop in stops:
        if stop:
            text = text.split(stop)[0]
    return text
