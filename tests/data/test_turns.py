import json
from typing import Any

import pytest

from spiel_jax.data.turns import read_tools, read_turns

CALL = {"name": "weather", "arguments": {"city": "Oslo"}}
CALLED = {"type": "function", "function": CALL}


def turn(role, content: Any = "x", **more):
    return {"role": role, "content": content, **more}


@pytest.mark.parametrize("flag", [{"weight": 0}, {"train": False}, {"trainable": False}, {"loss": 0.0}])
def test_turns_that_are_not_learnt(flag):
    turns = [turn("user"), turn("assistant", **flag), turn("user"), turn("assistant", weight=1)]
    messages, learnt, ignored = read_turns(turns)
    assert learnt == (False, False, False, True)
    assert messages[1] == turn("assistant")
    assert not ignored


def test_an_empty_instruction_is_dropped_and_counts_for_nothing():
    turns = [turn("system", " ", weight=0), turn("developer", ""), turn("user"), turn("assistant", weight=1)]
    assert read_turns(turns) == ([turn("user"), turn("assistant")], None, set())


def test_turns_with_keys_of_two_kinds():
    both = {"from": "human", "value": "x", "role": "user", "content": "x"}
    name = {"from": "Ann", "role": "user", "content": "x"}  # as some call the one who speaks
    assert read_turns([both]) == ([turn("user")], None, set())
    assert read_turns([name]) == ([turn("user")], None, {"from of turns"})


def test_turns_are_learnt_where_nothing_is_said():
    assert read_turns([turn("user"), turn("assistant", weight=None)])[1] is None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (turn("human"), turn("user")),
        ({"from": "observation", "value": "x"}, turn("tool")),
        ({"from": "function", "value": "x"}, turn("tool")),
        (turn("developer"), turn("developer")),
        (turn("tool", name="weather", tool_call_id="1"), turn("tool", name="weather", tool_call_id="1")),
        ({"from": "function_call", "value": json.dumps(CALL)}, turn("assistant", "", tool_calls=[CALLED])),
        (turn("assistant", None, tool_calls=[CALLED]), turn("assistant", "", tool_calls=[CALLED])),
        (turn("assistant", "", tool_calls=json.dumps([CALL])), turn("assistant", "", tool_calls=[CALLED])),
        (turn("assistant", None, function_call=CALL), turn("assistant", "", tool_calls=[CALLED])),
        (turn("assistant", thinking="hm"), turn("assistant", reasoning_content="hm")),
        (turn("assistant", reasoning="hm"), turn("assistant", reasoning_content="hm")),
        (turn("user", [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]), turn("user", "ab")),
        (turn("user", id=3, timestamp=None, image=None, audio=[]), turn("user")),
    ],
)
def test_what_turns_may_be(given, message):
    assert read_turns([turn("user"), given])[0][1] == message


def test_arguments_in_json_become_objects():
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    [_, message] = read_turns([turn("user"), turn("assistant", "", tool_calls=[call])])[0]
    assert message["tool_calls"][0]["function"]["arguments"] == {"a": 1}


def test_nulls_of_a_table_are_no_arguments():
    call = {"function": {"name": "f", "arguments": {"a": 1, "b": None}}, "id": None}
    [_, message] = read_turns([turn("user"), turn("assistant", "", tool_calls=[call])])[0]
    assert message["tool_calls"] == [{"function": {"name": "f", "arguments": {"a": 1}}}]


def test_a_tool_may_say_nothing():
    call = {"function": {"name": "f", "arguments": {}}}
    turns = [turn("user"), turn("assistant", None, tool_calls=[call]), turn("tool", None), turn("Chatgpt")]
    assert [m["role"] for m in read_turns(turns)[0]] == ["user", "assistant", "tool", "assistant"]


def test_keys_that_nobody_reads():
    turns = [turn("user", mood="glad", weight=1), turn("assistant", plan="?", same="x")]
    assert read_turns(turns)[2] == {"mood of turns", "weight of user turns", "plan of turns"}


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (turn("assistant", weight=0.5), "message 1: 'weight' must be 0 or 1"),
        (
            turn("user", [{"type": "image_url", "image_url": "u"}]),
            "message 1: part 1 of 'content' is of type",
        ),
        (turn("user", images=["a.png"]), "message 1: 'images' is more than text"),
        (turn("assistant", loss_mask=[0, 1]), "message 1: 'loss_mask' says what to learn in a way"),
        (turn("assistant", tool_calls="["), "message 1: 'tool_calls' must be JSON"),
        (turn("assistant", tool_calls=[{"f": 1}]), "message 1: tool call 1 must have a function with a name"),
        (turn("function_call", "no"), "message 1: what 'function_call' says must be JSON"),
        (turn("assistant", thinking="a", reasoning="b"), "message 1: .* differ: keep one"),
        (turn("assistant", ""), "message 1: 'content' is empty"),
    ],
)
def test_turns_that_are_refused(given, reason):
    with pytest.raises(ValueError, match=reason):
        read_turns([given])


def test_tools():
    tool = {"name": "f", "parameters": {}}
    whole = [{"type": "function", "function": tool}]
    for given in ([tool], whole, json.dumps([tool]), [json.dumps(tool)]):
        assert read_tools(given) == whole
    assert read_tools("") == []
    for given, reason in (("{", "must be JSON"), ({}, "must be a list"), ([{}], "tool 1 must be a function")):
        with pytest.raises(ValueError, match=reason):
            read_tools(given)
