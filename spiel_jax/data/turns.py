"""Turns of a conversation as data sets write them, and as chat templates read them."""

from collections.abc import Mapping, Sequence
from typing import Any

from spiel_jax.data import fields
from spiel_jax.data.files import parse_json

Message = dict[str, Any]
"""What the chat template is given: ``role``, ``content``, and what else the turn says."""

# Names of the speakers (OpenAI's, ShareGPT's, LLaMA-Factory's, ms-swift's) and the chat templates' own.
ROLES = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "chatbot": "assistant",
    "ai": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "tool_response": "tool",
}
INSTRUCTING = ("system", "developer")
_CALLERS = ("function_call", "tool_call")  # whose text is the calls, in JSON
_PLAIN = {role: ROLES[role] for role in ("system", "user", "human", "assistant", "gpt")}
REASONING = ("reasoning_content", "reasoning", "thinking")
"""Names that thoughts before an answer go by; a `Message` has the first."""

_TURN = frozenset(
    ("role", "content", "from", "value", "tool_calls", "function_call", "tool_call_id", "name", *REASONING)
)


def read_turns(turns: Any) -> tuple[list[Message], tuple[bool, ...] | None, set[str]]:
    """Reads a list of turns, ``{"role", "content"}`` or ShareGPT's ``{"from", "value"}``.

    Empty system messages are dropped. A turn with ``weight`` 0, or ``train``, ``trainable`` or ``loss``
    false, is not learnt; thoughts, calls of tools and names stay beside the text.

    Returns:
      The messages; which of them are learnt (``None`` for all that the assistant says); and keys of
      turns which nobody reads.

    Raises:
      ValueError: a turn is not one; the message says which and why.
    """
    if isinstance(turns, str) and turns.lstrip().startswith("["):  # as tables write lists
        turns = from_json(turns, "the messages")
    if not isinstance(turns, list):
        raise ValueError(f"the messages must be a list, not {fields.kind(turns)}")
    messages: list[Message] = []
    unlearnt: set[int] = set()
    ignored: set[str] = set()
    for number, turn in enumerate(turns, start=1):
        message = _plain_message(turn)
        if message is None:
            if not isinstance(turn, Mapping):
                raise ValueError(f"message {number} must be an object, not {fields.kind(turn)}")
            turn = _known_names(fields.present(turn))
            try:
                message, learn = _message(turn, ignored), fields.flag(turn)
            except ValueError as error:
                raise ValueError(f"message {number}: {error}") from None
            if message["role"] in INSTRUCTING and not message["content"].strip():
                continue
            if not learn and message["role"] == "assistant":
                unlearnt.add(len(messages))
        messages.append(message)
    if not messages:
        raise ValueError("the conversation is empty")
    learnt = None
    if unlearnt:
        learnt = tuple(m["role"] == "assistant" and i not in unlearnt for i, m in enumerate(messages))
    return messages, learnt, ignored


def _known_names(turn: dict[str, Any]) -> dict[str, Any]:
    """A turn with its keys as they are known, where it writes them with capitals."""
    spelt = {key: name for name, key in fields.spelt(turn, _TURN | fields.FLAGS).items()}
    return {spelt.get(key, key): value for key, value in turn.items()} if spelt else turn


def name_of_thoughts(holder: Any) -> str:
    """What a row, or the first of some turns that has any, calls its thoughts."""
    for one in holder if isinstance(holder, list) else [holder]:
        if isinstance(one, Mapping):
            held = fields.present(one)
            spelt = fields.spelt(held, _TURN)
            for name in REASONING:
                if held.get(key := spelt.get(name, name)):
                    return key
    return REASONING[0]


def _plain_message(turn: Any) -> Message | None:
    """The message of a turn that is no more than a speaker and a text, as most are."""
    if type(turn) is not dict or len(turn) != 2:
        return None
    name, text = turn.get("role"), turn.get("content")
    if name is None:
        name, text = turn.get("from"), turn.get("value")
    if type(name) is str and name in _PLAIN and type(text) is str and text and not text.isspace():
        return {"role": _PLAIN[name], "content": text}
    return None


def _message(turn: Mapping[str, Any], ignored: set[str]) -> Message:
    shared = "from" in turn and ("value" in turn or "role" not in turn)
    role_key, text_key = ("from", "value") if shared else ("role", "content")
    name = fields.string(turn, role_key)
    if name not in ROLES:
        if name.strip().lower() not in ROLES:
            raise ValueError(f"unknown role {name!r}: expected one of {', '.join(ROLES)}")
        name = name.strip().lower()
    role = ROLES[name]
    message: Message = {"role": role, "content": ""}
    if calls := _calls(turn, name, text_key):
        message["tool_calls"] = calls
    silent = calls or role == "tool"  # a call says nothing beside it; a tool may have nothing to say
    if name not in _CALLERS and (text_key in turn or not silent):
        message["content"] = _content(turn, text_key)
        if not message["content"].strip() and not calls and role not in (*INSTRUCTING, "tool"):
            raise ValueError(f"{text_key!r} is empty")
    if thoughts := reasoning(turn):
        message[REASONING[0]] = thoughts
    message.update((key, fields.string(turn, key)) for key in ("name", "tool_call_id") if key in turn)

    if role != "assistant":
        ignored.update(f"{key} of {role} turns" for key in fields.FLAGS & turn.keys() if turn[key])
    other = {"from", "value", "role", "content"} - {role_key, text_key}
    known = (_TURN | fields.FLAGS) - other
    said = [message["content"], name, role]
    ignored.update(f"{key} of turns" for key in fields.unread(turn, known, said))
    return message


def _content(turn: Mapping[str, Any], key: str) -> str:
    """A text, which may come in parts."""
    if not isinstance(turn.get(key), list):
        return fields.string(turn, key)
    texts = []
    for number, part in enumerate(turn[key], start=1):
        if isinstance(part, str):
            texts.append(part)
            continue
        if not isinstance(part, Mapping):
            raise ValueError(f"part {number} of {key!r} must be an object, not {fields.kind(part)}")
        part = fields.present(part)
        if part.get("type") not in ("text", "input_text", "output_text"):
            raise ValueError(f"part {number} of {key!r} is of type {part.get('type')!r}: only text is learnt")
        texts.append(fields.string(part, "text"))
        for unread in fields.unread(part, ("type", "text"), ()):
            raise ValueError(f"part {number} of {key!r} has the key {unread!r}, which is not known")
    return "".join(texts)


def reasoning(holder: Mapping[str, Any]) -> str:
    """The thoughts that a turn or row holds under one of their names; empty if none."""
    found = {fields.string(holder, key) for key in REASONING if key in holder}
    found = {thoughts for thoughts in found if thoughts.strip()}
    if len(found) > 1:
        raise ValueError(f"{' and '.join(repr(key) for key in REASONING if key in holder)} differ: keep one")
    return found.pop() if found else ""


def _calls(turn: Mapping[str, Any], name: str, text_key: str) -> list[Message]:
    """The calls of tools in a turn, in the form of OpenAI's ``tool_calls``."""
    calls = turn.get("tool_calls", [])
    if isinstance(calls, str):
        calls = from_json(calls, "'tool_calls'")
    if not isinstance(calls, list):
        raise ValueError(f"'tool_calls' must be a list, not {fields.kind(calls)}")
    if "function_call" in turn:
        calls = [*calls, turn["function_call"]]
    if name in _CALLERS:
        said = from_json(fields.text(turn, text_key), f"what {name!r} says")
        calls = [*calls, *(said if isinstance(said, list) else [said])]
    return [_call(number, call) for number, call in enumerate(calls, start=1)]


def _call(number: int, call: Any) -> Message:
    where = f"tool call {number}"
    if isinstance(call, str):
        call = from_json(call, where)
    if not isinstance(call, Mapping):
        raise ValueError(f"{where} must be an object, not {fields.kind(call)}")
    call = fields.present(call)
    if "function" not in call:
        call = {"type": "function", "function": call}
    function = call["function"]
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise ValueError(f"{where} must have a function with a name, not {function!r}")
    arguments = function.get("arguments")
    # A string is how OpenAI's service writes an object; templates take the object.
    given = from_json(arguments, f"the arguments of {where}") if isinstance(arguments, str) else None
    call = fields.without_nulls(call)
    if given is not None:
        call["function"]["arguments"] = given
    return call


def read_tools(tools: Any) -> list[Message]:
    """Reads what the assistant may call, as a list of OpenAI's ``{"type": "function", "function": ...}``.

    Args:
      tools: such a list, or one of functions alone; or either as JSON.

    Raises:
      ValueError: it is neither.
    """
    if isinstance(tools, str):
        tools = from_json(tools, "'tools'") if tools.strip() else []
    if not isinstance(tools, list):
        raise ValueError(f"'tools' must be a list, not {fields.kind(tools)}")
    read = []
    for number, tool in enumerate(tools, start=1):
        if isinstance(tool, str):
            tool = from_json(tool, f"tool {number}")
        if not isinstance(tool, Mapping):
            raise ValueError(f"tool {number} must be an object, not {fields.kind(tool)}")
        tool = fields.without_nulls(tool)
        tool = tool if "function" in tool else {"type": "function", "function": tool}
        function = tool["function"]
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise ValueError(f"tool {number} must be a function with a name, not {function!r}")
        read.append(tool)
    return read


def from_json(text: str, what: str) -> Any:
    """What a field holds that is JSON in a string."""
    try:
        return parse_json(text)
    except ValueError as error:
        raise ValueError(f"{what} must be JSON, not {text[:80]!r} ({error})") from None


def with_system(messages: Sequence[Message], system: str) -> list[Message]:
    """A conversation that begins with a system message.

    Raises:
      ValueError: it has another one.
    """
    if not system.strip():
        return list(messages)
    if messages and messages[0]["role"] in INSTRUCTING:
        if messages[0]["content"].strip() == system.strip():
            return list(messages)
        raise ValueError(
            "the row has a system message of its own and another one among the messages: keep one"
        )
    return [{"role": "system", "content": system}, *messages]
