"""What rows look like, and the one form all of them become: an ``Example``."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from spiel_jax.data.rows import MalformedRow, Row

Message = dict[str, str]

# Names of the speakers in conversations (OpenAI's and ShareGPT's) and the chat templates' own.
ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}

# Stanford Alpaca's templates (github.com/tatsu-lab/stanford_alpaca), for models that know no chat.
_ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\n{instruction}\n\n### Response:\n"
)
_ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)


@dataclasses.dataclass(frozen=True)
class Example:
    """A conversation to learn from, with loss on what the assistant says.

    Attributes:
      messages: the conversation, ``{"role": "system" | "user" | "assistant", "content": text}``.
      plain: the same as a prompt and a completion in plain text, for rows which are that; ``None``
        for a conversation.
    """

    messages: list[Message]
    plain: tuple[str, str] | None = None


def parse_row(row: Row, format: str | None = None) -> Example:
    r"""Reads a row as an example.

    Formats, told apart by their keys:

    * ``messages``: ``messages`` or ``conversations``, a list of ``{"role", "content"}`` or
      ShareGPT's ``{"from", "value"}``. Empty system messages are dropped.
    * ``prompt_completion``: ``prompt``, ``completion``.
    * ``instruction``: ``instruction``, ``output`` and an ``input`` which may be empty or absent.
      As a conversation, the user says the instruction, a blank line and the input; as plain text,
      the Alpaca template holds them.
    * ``question_answer``: ``question``, ``answer``; as plain text ``Question: ...\nAnswer: ...``.
    * ``chitchat``: ``messages`` of PyPI's ``chitchat-dataset``, a list of lists of
      ``{"sender", "text"}``. Who speaks first is the user, the other one the assistant; consecutive
      texts of one speaker are one message, a text per line; empty texts are dropped.

    Args:
      row: what was read.
      format: the format, a key of ``FORMATS``, or ``None`` to detect it.

    Raises:
      MalformedRow: the row does not have the format, an unknown role or an empty text.
    """
    try:
        if row.problem is not None:
            raise ValueError(row.problem)
        if not isinstance(row.value, Mapping):
            raise ValueError(f"expected an object, not {_type(row.value)}")
        return FORMATS[format or _detect(row.value)](row.value)
    except ValueError as error:
        raise MalformedRow(row.location, str(error)) from None


def _detect(row: Mapping[str, Any]) -> str:
    turns = row.get("messages")
    if isinstance(turns, list) and turns and isinstance(turns[0], list):
        return "chitchat"
    # Conversations first: such rows often repeat their first message under "prompt".
    if "messages" in row or "conversations" in row:
        return "messages"
    for format, keys in (
        ("prompt_completion", ("prompt", "completion")),
        ("instruction", ("instruction", "output")),
        ("question_answer", ("question", "answer")),
    ):
        if all(key in row for key in keys):
            return format
    raise ValueError(
        f"unknown format with keys {_keys(row)}: expected messages or conversations, "
        "prompt + completion, instruction + output, or question + answer"
    )


def _messages(row: Mapping[str, Any]) -> Example:
    turns = row["messages"] if "messages" in row else row.get("conversations")
    if not isinstance(turns, list):
        raise ValueError(f"the messages must be a list, not {_type(turns)}")
    messages = []
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, Mapping):
            raise ValueError(f"message {number} must be an object, not {_type(turn)}")
        role_key, text_key = ("from", "value") if "from" in turn else ("role", "content")
        try:
            name = _string(turn, role_key)
            if name not in ROLES:
                raise ValueError(f"unknown role {name!r}: expected one of {', '.join(ROLES)}")
            role = ROLES[name]
            text = _string(turn, text_key)
            if text.strip():
                messages.append({"role": role, "content": text})
            elif role != "system":
                raise ValueError(f"{text_key!r} is empty")
        except ValueError as error:
            raise ValueError(f"message {number}: {error}") from None
    if not messages:
        raise ValueError("the conversation is empty")
    return Example(messages)


def _prompt_completion(row: Mapping[str, Any]) -> Example:
    prompt, completion = _text(row, "prompt"), _text(row, "completion")
    return _pair(prompt, completion, plain=(prompt, completion))


def _instruction(row: Mapping[str, Any]) -> Example:
    instruction, output = _text(row, "instruction"), _text(row, "output")
    context = _string(row, "input") if row.get("input") is not None else ""
    if context.strip():
        prompt = _ALPACA_INPUT.format(instruction=instruction, input=context)
        return _pair(f"{instruction}\n\n{context}", output, plain=(prompt, output))
    return _pair(instruction, output, plain=(_ALPACA.format(instruction=instruction), output))


def _question_answer(row: Mapping[str, Any]) -> Example:
    question, answer = _text(row, "question"), _text(row, "answer")
    return _pair(question, answer, plain=(f"Question: {question}\nAnswer:", f" {answer}"))


def _chitchat(row: Mapping[str, Any]) -> Example:
    groups = row.get("messages")
    if not isinstance(groups, list) or not all(isinstance(group, list) for group in groups):
        raise ValueError("'messages' must be a list of lists")
    roles: dict[str, str] = {}
    messages: list[Message] = []
    for turn in (turn for group in groups for turn in group):
        if not isinstance(turn, Mapping):
            raise ValueError(f"a message must be an object, not {_type(turn)}")
        sender, text = _string(turn, "sender"), _string(turn, "text").strip()
        if not text:
            continue
        role = roles.setdefault(sender, "assistant" if roles else "user")
        if messages and messages[-1]["role"] == role:
            messages[-1]["content"] += "\n" + text
        else:
            messages.append({"role": role, "content": text})
    if not messages:
        raise ValueError("the conversation is empty")
    if len(roles) > 2:
        raise ValueError(f"expected two speakers, found {len(roles)}")
    return Example(messages)


FORMATS: dict[str, Callable[[Mapping[str, Any]], Example]] = {
    "messages": _messages,
    "prompt_completion": _prompt_completion,
    "instruction": _instruction,
    "question_answer": _question_answer,
    "chitchat": _chitchat,
}


def _pair(user: str, assistant: str, plain: tuple[str, str]) -> Example:
    messages = [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
    return Example(messages, plain)


def _text(row: Mapping[str, Any], key: str) -> str:
    text = _string(row, key)
    if not text.strip():
        raise ValueError(f"{key!r} is empty")
    return text


def _string(row: Mapping[str, Any], key: str) -> str:
    if key not in row:
        raise ValueError(f"no key {key!r} among {_keys(row)}")
    value = row[key]
    if not isinstance(value, str):
        raise ValueError(f"{key!r} must be a string, not {_type(value)}")
    return value


def _keys(row: Mapping[str, Any]) -> str:
    return ", ".join(repr(key) for key in row) or "none"


def _type(value: object) -> str:
    return "null" if value is None else type(value).__name__
