"""Where in a conversation's text the assistant's turns are, and how two texts differ."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

Span = tuple[int, int]
"""[start, end) in characters."""

_SHOWN = 40  # characters of a text that a message shows before and after a place


def woven_spans(
    text: str,
    between: Sequence[str],
    said: Sequence[str],
    opening: int | None,
    first_token: Callable[[str], str | None],
) -> list[Span] | None:
    """The spans of turns, each with what ends it.

    The text must be what is between the turns, woven with what the assistant says (as it is, or stripped).
    Turns end alike, but that the last one may have more after its end-of-turn token: some templates end
    the whole text with an end-of-sequence token.

    Args:
      text: the conversation.
      between: the parts of its rendering with marks for what is said, one more than there are turns.
      said: what the assistant says.
      opening: where the last turn begins at the latest: the end of the generation prompt before it. It may
        begin before what is said, with an empty block of thoughts.
      first_token: gives a text up to the end of its first special token.

    Returns:
      A span for each turn; ``None`` if the text is not so.
    """
    for shown in (said, [content.strip() for content in said]):
        if len(between) == len(said) + 1 and text == _weave(between, shown):
            break
    else:
        return None
    last = end = between[-1].rstrip()
    if not all(part.startswith(end) for part in between[1:]):
        token = first_token(last)
        if token is None or not all(part.startswith(token) for part in between[1:]):
            return None
        end = token
    spans, position = [], 0
    for part, content in zip(between, shown, strict=False):
        start = position + len(part)
        position = start + len(content)
        spans.append((start, position + len(end)))
    start = spans[-1][0] if opening is None else min(opening, spans[-1][0])
    spans[-1] = (start, position + len(last))
    return spans


def _weave(between: Sequence[str], shown: Sequence[str]) -> str:
    """``between[0] shown[0] between[1] shown[1] ... between[-1]``, with one ``between`` more."""
    parts = [part for pair in zip(between, shown, strict=False) for part in pair]
    return "".join([*parts, between[-1]])


def left_out(text: str, messages: Sequence[Mapping[str, Any]]) -> str | None:
    """Which message is not in a text, in words; ``None`` if all are that are not the assistant's."""
    for number, message in enumerate(messages, start=1):
        if message["role"] in ("system", "user") and message["content"].strip() not in text:
            return f"the chat template leaves out what {message['role']!r} says (message {number})"
    return None


def difference(prompt: str, text: str) -> str:
    """How a prompt is not the beginning of a text, in words."""
    pairs = enumerate(zip(prompt, text, strict=False))
    at = next((i for i, (one, other) in pairs if one != other), min(len(prompt), len(text)))
    return f"a prompt is {around(prompt, at)} where the training text is {around(text, at)}"


def around(text: str, at: int) -> str:
    """A piece of a text, quoted.

    >>> around("a long text " * 20, 120)
    "...'ext a long text a long text a long text a long text a long text a long text a lo'..."
    """
    start, end = max(0, at - _SHOWN), at + _SHOWN
    return f"{'...' if start else ''}{text[start:end]!r}{'...' if end < len(text) else ''}"
