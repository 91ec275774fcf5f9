"""Whether a chat template writes what messages hold beside the three usual roles and a text.

A template takes what it knows and passes over the rest without a word; here that is found out, by writing
the conversation again with marks in place of what is in question.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from spiel_jax.data.templates import TemplateRefusal
from spiel_jax.data.turns import REASONING, Message

_USUAL = ("system", "user", "assistant")
_CHECKED = (*REASONING, "tool_calls", "name")

Write = Callable[[Sequence[Message], list[Message] | None], str]
"""A conversation and what the assistant may call, as text."""


def is_usual(messages: Sequence[Message], tools: list[Message] | None) -> bool:
    """Whether there is nothing to find out."""
    return not tools and all(len(m) == 2 and m["role"] in _USUAL for m in messages)


def untraced(
    write: Write,
    messages: Sequence[Message],
    tools: list[Message] | None,
    called: Mapping[str, str],
) -> str | None:
    """What of a conversation the template passes over, in words; ``None`` if it writes all of it.

    Args:
      write: renders with the template.
      messages: the conversation.
      tools: what the assistant may call.
      called: what the row calls keys of the messages, where it calls them otherwise.
    """
    text = write(messages, tools)
    asked = [(i, key) for i, message in enumerate(messages) for key in _in_question(message)]
    marked = list(messages)
    for number, (i, key) in enumerate(asked):
        marked[i] = _marked(marked[i], key, _mark(number))
    marked_tools = [_named(tool, _mark(len(asked) + n)) for n, tool in enumerate(tools or [])]
    try:
        shown = write(marked, marked_tools or None)
    except TemplateRefusal:  # it may look into what it is given
        shown = ""

    def unchanged(other: Sequence[Message], other_tools: list[Message] | None) -> bool:
        """Whether the template writes the same for another conversation; if it refuses, it does not."""
        try:
            return write(other, other_tools) == text
        except TemplateRefusal:
            return False

    missing = []
    for number, (i, key) in enumerate(asked):
        if _mark(number) not in shown:
            other = [*messages[:i], _without(messages[i], key), *messages[i + 1 :]]
            if unchanged(other, tools):
                missing.append((i, key))
    if (
        tools
        and not any(_mark(len(asked) + n) in shown for n in range(len(tools)))
        and unchanged(messages, None)
    ):
        return "'tools'"
    written = {key for _, key in asked} - {key for _, key in missing}
    # Thoughts of earlier turns are taken out by some templates, whose last turn shows that they know them.
    missing = [(i, key) for i, key in missing if key not in REASONING or key not in written]
    if not missing:
        return None
    i, key = missing[0]
    what = f"what {messages[i]['role']!r} says" if key == "content" else repr(called.get(key, key))
    return f"{what} (message {i + 1})"


def _in_question(message: Message) -> list[str]:
    """The keys of a message that a template may not know."""
    keys = [key for key in _CHECKED if key in message]
    if message["role"] in _USUAL:
        return keys
    # Which tool answers is told by the call before.
    keys = [key for key in keys if key != "name" or message["role"] != "tool"]
    return [*keys, "content"] if message["content"].strip() else keys


def _mark(number: int) -> str:
    return f"Qx{number}mark{number}xQ"  # letters and digits alone, which no template escapes


def _marked(message: Message, key: str, mark: str) -> Message:
    value: Any = mark
    if key == "tool_calls":
        value = [_named(call, mark) for call in message[key]]
    return {**message, key: value}


def _named(tool: Message, name: str) -> Message:
    return {**tool, "function": {**tool["function"], "name": name}}


def _without(message: Message, key: str) -> Message:
    if key == "content":
        return {**message, key: _mark(0)}
    return {name: value for name, value in message.items() if name != key}
