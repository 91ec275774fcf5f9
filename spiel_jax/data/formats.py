"""What rows look like, and the one form all of them become: an ``Example``."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from spiel_jax.data import fields
from spiel_jax.data.files import MalformedRow, Row
from spiel_jax.data.turns import (
    INSTRUCTING,
    REASONING,
    Message,
    from_json,
    name_of_thoughts,
    read_tools,
    read_turns,
    reasoning,
    with_system,
)

MAX_CHARACTERS = 5_000_000
"""Characters of the longest row; a novel has a million."""

# Stanford Alpaca's templates (github.com/tatsu-lab/stanford_alpaca), for models that know no chat.
_ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\n{prompt}\n\n### Response:\n"
)
_ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{prompt}\n\n### Input:\n{context}\n\n### Response:\n"
)


@dataclasses.dataclass(frozen=True)
class Example:
    """A conversation to learn from, with loss on what the assistant says.

    Attributes:
      messages: the conversation, each as the chat template is given it: ``{"role": "system" | "user" |
        "assistant" | ..., "content": text}``, and in some ``reasoning_content``, ``tool_calls``, ``name``.
      plain: the same as a prompt and a completion in plain text, for rows which are that; ``None``
        for a conversation. A text without a conversation has no messages and an empty prompt.
      learnt: which messages are learnt, all of them the assistant's; ``None``: all that it says.
      tools: what the assistant may call, which the chat template is given too.
      thoughts: what the row calls the thoughts of its messages.
      ignored: keys of the row that hold something and are not read.
    """

    messages: list[Message]
    plain: tuple[str, str] | None = None
    learnt: tuple[bool, ...] | None = None
    tools: list[Message] | None = None
    thoughts: str = REASONING[0]
    ignored: frozenset[str] = frozenset()


@dataclasses.dataclass(frozen=True)
class Format:
    """A shape of rows.

    Attributes:
      read: makes an example of a row, whose fields are all present ones.
      needs: the keys by which it is known.
      reads: all keys that it reads.
    """

    read: Callable[[Mapping[str, Any]], Example]
    needs: tuple[str, ...]
    reads: frozenset[str]


def parse_row(row: Row, format: str | None = None, columns: Mapping[str, str] | None = None) -> Example:
    r"""Reads a row as an example.

    Formats, told apart by their keys:

    * ``messages``: ``messages`` or ``conversations``, see `turns.read_turns`.
    * ``prompt_completion``: ``prompt``, ``completion``; each a text or (TRL) a list of messages, of which
      those of the completion are learnt.
    * ``instruction``: ``instruction``, ``output``; as plain text, the Alpaca template holds them. Dolly has
      ``response`` in place of the output: ``dolly``.
    * ``question_answer``: ``question``, ``answer``; as plain text ``Question: ...\nAnswer: ...``.
      OpenOrca has ``response`` in place of the answer: ``question_response``.
    * ``prompt_response``, ``query_response``, ``input_output``: what their names say; as plain text one
      after the other.
    * ``text``: ``text`` alone, plain text that is learnt as a whole.
    * ``chitchat``: ``messages`` of PyPI's ``chitchat-dataset``, a list of lists of
      ``{"sender", "text"}``. Who speaks first is the user, the other one the assistant; consecutive
      texts of one speaker are one message, a text per line; empty texts are dropped.

    Keys may be written with capitals (``Instruction``), where it is clear which is meant.

    Of two texts, ``input`` or ``context`` may stand beside the first: as a conversation, the user says the
    first, a blank line and the context. ``system`` (or ``system_prompt``), ``history`` (turns, or pairs of
    what the user and the assistant said before; beside ``messages`` too) and thoughts
    (``reasoning_content``, ``reasoning``, ``thinking``) may be columns too. Any row may have ``tools`` and a
    ``weight`` (or ``train``, ``trainable``), which is 0 where nothing of it is learnt.

    A null is an absent key.

    Args:
      row: what was read.
      format: the format, a key of ``FORMATS``, or ``None`` to detect it.
      columns: what the row calls keys of the format: ``{"instruction": "question"}``; of objects in it
        ``{"instruction": "data.question", "output": "answers.text.0"}``.

    Raises:
      MalformedRow: the row does not have the format, an unknown role or an empty text, is longer than
        ``MAX_CHARACTERS``, or holds what changes what is to be learnt in a way that is not known.
    """
    try:
        if row.problem is not None:
            raise ValueError(row.problem)
        if not isinstance(row.value, Mapping):
            hint = ": lists of rows belong in .json" if isinstance(row.value, list) else ""
            raise ValueError(f"expected an object, not {fields.kind(row.value)}{hint}")
        return _example(fields.present(row.value), format, columns or {})
    except ValueError as error:
        named = f"; columns = {dict(columns)}" if columns and row.problem is None else ""
        raise MalformedRow(row.location, f"{error}{named}") from None
    except RecursionError:
        raise MalformedRow(row.location, "is nested too deeply") from None


def _example(row: dict[str, Any], format: str | None, columns: Mapping[str, str]) -> Example:
    shadowed = frozenset[str]()
    if columns:
        sources = set(columns.values())
        shadowed = frozenset(key for key in columns if key in row and key not in sources)
        named = fields.present({key: fields.at(row, source) for key, source in columns.items()})
        rest = fields.beside(row, sources)
        row = {key: value for key, value in rest.items() if key not in columns} | named
    if spelt := fields.spelt(row, _KEYS):
        chosen = FORMATS[format or _detect(_renamed(row, spelt))]
        spelt = {name: key for name, key in spelt.items() if name in chosen.reads}
        row = _renamed(row, spelt)
    else:
        chosen = FORMATS[format or _detect(row)]
    try:
        example = chosen.read(row)
        if not _ANY_ROW.isdisjoint(row):
            example = _marked(example, row)
    except ValueError as error:
        raise ValueError(f"{error}{_also_called(spelt)}") from None
    if example.thoughts in (called := {**columns, **spelt}):
        example = dataclasses.replace(example, thoughts=called[example.thoughts])
    left = {key: row[key] for key in row if key not in chosen.reads and not fields.is_note(key)}
    if left or shadowed:
        unread = _unread(left, example)
        example = dataclasses.replace(example, ignored=example.ignored | unread | shadowed)
    size = _size(example)
    if size > MAX_CHARACTERS:
        raise ValueError(f"has {size:,} characters, and a row at most {MAX_CHARACTERS:,}: divide it")
    return example


def _renamed(row: Mapping[str, Any], spelt: Mapping[str, str]) -> dict[str, Any]:
    """A row with its keys as they are known."""
    names = {key: name for name, key in spelt.items()}
    return {names.get(key, key): value for key, value in row.items()}


def _also_called(spelt: Mapping[str, str]) -> str:
    return "".join(f"; {name!r} is what {key!r} was read as" for name, key in spelt.items())


def _unread(left: Mapping[str, Any], example: Example) -> frozenset[str]:
    """The keys of the fields that are left over which say something new."""
    said = [message["content"] for message in example.messages]
    plain = list(example.plain or ())
    unread = frozenset(fields.unread(left, (), said + plain))
    whole = left.get("text")
    if isinstance(whole, str) and any(t and all(one.strip() in whole for one in t) for t in (said, plain)):
        unread -= {"text"}  # the same again, written out
    return unread


def _size(example: Example) -> int:
    size = sum([len(message["content"]) for message in example.messages])
    more = [message for message in example.messages if len(message) > 2] + (example.tools or [])
    size += sum(len(str(one)) for one in more)
    return size if example.plain is None else max(size, sum(map(len, example.plain)))


_ROW_FLAGS = ("weight", "train", "trainable")
_ANY_ROW = frozenset((*_ROW_FLAGS, "tools", "functions"))


def _marked(example: Example, row: Mapping[str, Any]) -> Example:
    """Adds what any row may say of itself."""
    if not fields.flag({key: row[key] for key in _ROW_FLAGS if key in row}):
        example = dataclasses.replace(example, plain=None, learnt=(False,) * len(example.messages))
    tools = [key for key in ("tools", "functions") if row.get(key)]
    if len(tools) > 1:
        raise ValueError("'tools' and 'functions' are both there: keep one")
    if not tools:
        return example
    if not example.messages:  # a text has no place for them
        return dataclasses.replace(example, ignored=example.ignored | {tools[0]})
    found = read_tools(row[tools[0]]) or None
    return dataclasses.replace(example, tools=found, plain=None if found else example.plain)


def _detect(row: Mapping[str, Any]) -> str:
    turns = row.get("messages")
    if isinstance(turns, list) and turns and isinstance(turns[0], list):
        return "chitchat"
    # Conversations first: such rows often repeat their first message under "prompt".
    if turns is not None or "conversations" in row:
        return "messages"
    for name in _DETECTED:
        if all(key in row for key in FORMATS[name].needs):
            return name
    if "chosen" in row:
        raise ValueError(
            "a preference row (chosen, rejected), which is not learnt as such; to learn what was chosen: "
            'columns={"messages": "chosen"} in the source, or {"completion": "chosen"} beside a prompt'
        )
    if "input_ids" in row:
        raise ValueError("holds tokens (input_ids), but only text can be learnt: give the text they are of")
    ways = ", ".join(" + ".join(FORMATS[name].needs) for name in _DETECTED)
    raise ValueError(
        f"unknown format with keys {fields.names(row)}: expected messages or conversations, {ways}; other "
        'names take columns={"prompt": "their name", ...} in the source'
    )


def _messages(row: Mapping[str, Any]) -> Example:
    turns = row.get("messages", row.get("conversations"))
    messages, learnt, ignored = read_turns(turns)
    if "messages" in row and row.get("conversations", turns) != turns:
        ignored.add("conversations")
    example = Example(messages, learnt=learnt, ignored=frozenset(ignored))
    if any(REASONING[0] in message for message in messages):
        example = dataclasses.replace(example, thoughts=name_of_thoughts(turns))
    if "history" in row:
        example = _after(_history(row["history"]), example)
    return _with_system(example, row) if len(row) > 1 else example


def _after(earlier: list[Message], example: Example) -> Example:
    """A conversation after what was said before; as it is, if that is among its messages already."""
    messages = example.messages
    begin = next((i for i, m in enumerate(messages) if m["role"] not in INSTRUCTING), len(messages))
    if messages[begin:][: len(earlier)] == earlier:
        return example
    learnt = example.learnt
    if learnt is not None:
        learnt = (*learnt[:begin], *(m["role"] == "assistant" for m in earlier), *learnt[begin:])
    messages = [*messages[:begin], *earlier, *messages[begin:]]
    return dataclasses.replace(example, messages=messages, learnt=learnt)


def _with_system(example: Example, row: Mapping[str, Any]) -> Example:
    """The same after the system message that is a column."""
    found = {fields.string(row, key) for key in _SYSTEM if key in row}
    if len(found) > 1:
        raise ValueError(f"{' and '.join(repr(key) for key in _SYSTEM if key in row)} differ: keep one")
    if not found:
        return example
    messages = with_system(example.messages, *found)
    added = len(messages) - len(example.messages)
    learnt = example.learnt and (False,) * added + example.learnt
    plain = example.plain
    if plain is not None and added:
        plain = (f"{messages[0]['content']}\n\n{plain[0]}", plain[1])
    return dataclasses.replace(example, messages=messages, learnt=learnt, plain=plain)


def _pair_reader(prompt: str, answer: str, plain: str, with_context: str, before: str = "") -> Format:
    """The format of rows with two texts.

    Args:
      prompt: the key of the first text.
      answer: the key of the second.
      plain: the first text in plain text.
      with_context: the same with a context.
      before: what comes between the two.
    """
    contexts = tuple(key for key in ("input", "context") if key != prompt)

    def read(row: Mapping[str, Any]) -> Example:
        if isinstance(row.get(prompt), list) or isinstance(row.get(answer), list):
            example = _two_conversations(row, prompt, answer)
            unread = {key for key in (*contexts, *REASONING) if row.get(key)}
            example = dataclasses.replace(example, ignored=example.ignored | unread)
            if "history" in row:
                example = _after(_history(row["history"]), example)
            return _with_system(example, row)
        first, said = fields.text(row, prompt), fields.text(row, answer)
        context = "\n\n".join(
            text for key in contexts if key in row and (text := fields.string(row, key)).strip()
        )
        messages = [
            {"role": "user", "content": f"{first}\n\n{context}" if context else first},
            {"role": "assistant", "content": said},
        ]
        written = (with_context if context else plain).format(prompt=first, context=context)
        example = Example(messages, (written, before + said))
        if len(row) == 2:
            return example
        if thoughts := reasoning(row):
            messages[1][REASONING[0]] = thoughts
            example = dataclasses.replace(example, plain=None, thoughts=name_of_thoughts(row))
        if "history" in row and (earlier := _history(row["history"])):
            example = dataclasses.replace(example, messages=earlier + messages, plain=None)
        return _with_system(example, row)

    reads = frozenset((prompt, answer, *contexts, *_SYSTEM, "history", *REASONING)) | _ANY_ROW
    return Format(read, (prompt, answer), reads)


def _two_conversations(row: Mapping[str, Any], prompt: str, answer: str) -> Example:
    """A prompt and a completion of which one at least is a list of messages."""
    parts = []
    for key, role in ((prompt, "user"), (answer, "assistant")):
        turns = (
            row[key] if isinstance(row.get(key), list) else [{"role": role, "content": fields.text(row, key)}]
        )
        try:
            parts.append(read_turns(turns))
        except ValueError as error:
            raise ValueError(f"{key!r}: {error}") from None
    (before, _, ignored), (after, learnt, more) = parts
    if learnt is None:
        learnt = tuple(message["role"] == "assistant" for message in after)
    learnt = (False,) * len(before) + learnt
    thoughts = name_of_thoughts(row[answer])
    return Example(before + after, learnt=learnt, thoughts=thoughts, ignored=frozenset(ignored | more))


def _history(pairs: Any) -> list[Message]:
    """What was said before: a list of turns, or of what the user said and what the assistant said."""
    if isinstance(pairs, str):
        pairs = from_json(pairs, "'history'") if pairs.strip() else []
    if not isinstance(pairs, list):
        raise ValueError(f"'history' must be a list, not {fields.kind(pairs)}")
    if pairs and all(isinstance(pair, Mapping) for pair in pairs):
        return _earlier_turns(pairs)
    messages = []
    for number, pair in enumerate(pairs, start=1):
        if (
            not isinstance(pair, list)
            or len(pair) != 2
            or not all(isinstance(s, str) and s.strip() for s in pair)
        ):
            raise ValueError(f"'history' must be pairs of two texts, which number {number} is not")
        messages.append({"role": "user", "content": pair[0]})
        messages.append({"role": "assistant", "content": pair[1]})
    return messages


def _earlier_turns(turns: list[Any]) -> list[Message]:
    try:
        messages, learnt, ignored = read_turns(turns)
    except ValueError as error:
        raise ValueError(f"'history': {error}") from None
    if learnt is not None or ignored:
        what = sorted(ignored) or ["weights of turns"]
        raise ValueError(f"'history' has {what[0]}, which are not read there: put its turns into 'messages'")
    return messages


def _text(row: Mapping[str, Any]) -> Example:
    return Example([], ("", fields.text(row, "text")))


def _chitchat(row: Mapping[str, Any]) -> Example:
    groups = row.get("messages")
    if not isinstance(groups, list) or not all(isinstance(group, list) for group in groups):
        raise ValueError("'messages' must be a list of lists")
    roles: dict[str, str] = {}
    messages: list[Message] = []
    for turn in (turn for group in groups for turn in group):
        if not isinstance(turn, Mapping):
            raise ValueError(f"a message must be an object, not {fields.kind(turn)}")
        sender, text = fields.string(turn, "sender"), fields.string(turn, "text").strip()
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


_SYSTEM = ("system", "system_prompt")
_CONVERSATION = frozenset(("messages", "conversations", "history", *_SYSTEM)) | _ANY_ROW
_CHITCHAT = frozenset(("messages", "prompt", "start", "end", "ratings")) | _ANY_ROW  # the prompt is a topic
_AFTER, _BEFORE = "{prompt}\n\n{context}", "{context}\n\n{prompt}"
_QUESTION = ("Question: {prompt}\nAnswer:", "Context: {context}\nQuestion: {prompt}\nAnswer:", " ")

FORMATS: dict[str, Format] = {
    "messages": Format(_messages, ("messages",), _CONVERSATION),
    "prompt_completion": _pair_reader("prompt", "completion", "{prompt}", _BEFORE),
    "instruction": _pair_reader("instruction", "output", _ALPACA, _ALPACA_INPUT),
    "question_answer": _pair_reader("question", "answer", *_QUESTION),
    "dolly": _pair_reader("instruction", "response", _ALPACA, _ALPACA_INPUT),
    "question_response": _pair_reader("question", "response", *_QUESTION),
    "prompt_response": _pair_reader("prompt", "response", "{prompt}\n", _AFTER + "\n"),
    "query_response": _pair_reader("query", "response", "{prompt}\n", _AFTER + "\n"),
    "input_output": _pair_reader("input", "output", "{prompt}\n", _AFTER + "\n"),
    "text": Format(_text, ("text",), frozenset(("text",)) | _ANY_ROW),
    "chitchat": Format(_chitchat, ("messages",), _CHITCHAT),
}
_KEYS = frozenset[str]().union(*(one.reads for one in FORMATS.values()))
_DETECTED = tuple(name for name in FORMATS if name not in ("messages", "chitchat"))  # by their two keys
