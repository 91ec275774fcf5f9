import pytest

from spiel_jax.data.formats import parse_row
from spiel_jax.data.rows import MalformedRow, Row


def parse(value, format=None):
    return parse_row(Row("data.jsonl:7", value), format)


def said(*texts):
    """A conversation of user and assistant in turn."""
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": said("hi", "hello"), "prompt": "hi", "completion": "x"},
        {"conversations": said("hi", "hello")},
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]},
    ],
)
def test_conversations(row):
    example = parse(row)
    assert example.messages == said("hi", "hello")
    assert example.plain is None


def test_empty_system_message_is_dropped():
    system = {"role": "system", "content": "be brief"}
    empty = {"from": "system", "value": " "}
    assert parse({"messages": [system, *said("a", "b")]}).messages == [system, *said("a", "b")]
    assert parse({"messages": [empty, *said("a", "b")]}).messages == said("a", "b")


def test_prompt_completion():
    example = parse({"prompt": "2+2=", "completion": "4"})
    assert example.messages == said("2+2=", "4")
    assert example.plain == ("2+2=", "4")


@pytest.mark.parametrize("context", [{}, {"input": ""}, {"input": None}])
def test_instruction_without_input(context):
    example = parse({"instruction": "Say hi.", "output": "hi", **context})
    assert example.messages == said("Say hi.", "hi")
    assert example.plain is not None
    assert example.plain[0] == (
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n### Instruction:\nSay hi.\n\n### Response:\n"
    )
    assert example.plain[1] == "hi"


def test_instruction_with_input():
    example = parse({"instruction": "Translate.", "input": "{chat}", "output": "cat"})
    assert example.messages == said("Translate.\n\n{chat}", "cat")
    assert example.plain is not None
    assert "paired with an input" in example.plain[0]
    assert example.plain[0].endswith("\n\n### Input:\n{chat}\n\n### Response:\n")


def test_question_answer():
    example = parse({"question": "1+1?", "answer": "2"})
    assert example.messages == said("1+1?", "2")
    assert example.plain == ("Question: 1+1?\nAnswer:", " 2")


def test_chitchat():
    def turn(sender, *texts):
        return [{"sender": sender, "text": text, "timestamp": "t"} for text in texts]

    row = {
        "messages": [
            turn("ann", " "),
            turn("bob", "hello ", "you there?"),
            turn("ann", "yes"),
            turn("bob", ""),
            turn("ann", "am here"),
            turn("bob", "good"),
        ],
        "start": "t",
    }
    assert parse(row).messages == said("hello\nyou there?", "yes\nam here", "good")
    three = {"messages": [turn("a", "x"), turn("b", "y"), turn("c", "z")]}
    with pytest.raises(MalformedRow, match="expected two speakers, found 3"):
        parse(three)
    with pytest.raises(MalformedRow, match="the conversation is empty"):
        parse({"messages": [turn("a", "")]})


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ([1], "expected an object, not list"),
        (None, "expected an object, not null"),
        ({"words": "a"}, r"unknown format with keys 'words': expected messages or"),
        ({}, "unknown format with keys none"),
        ({"messages": "hi"}, "the messages must be a list, not str"),
        ({"messages": []}, "the conversation is empty"),
        ({"messages": ["hi"]}, "message 1 must be an object, not str"),
        ({"messages": [{"role": "pirate", "content": "a"}]}, "message 1: unknown role 'pirate': exp"),
        ({"messages": [{"role": "user"}]}, "message 1: no key 'content' among 'role'"),
        ({"messages": [*said("a"), {"role": "assistant", "content": None}]}, "message 2: no key 'content'"),
        ({"messages": said("a", " ")}, "message 2: 'content' is empty"),
        ({"prompt": "a", "completion": 3}, "'completion' must be a string, not int"),
        ({"prompt": "a", "completion": "\n"}, "'completion' is empty"),
        ({"instruction": "a", "output": "b", "input": 1}, "'input' must be a string, not int"),
    ],
)
def test_malformed_rows_are_located(row, reason):
    with pytest.raises(MalformedRow, match=reason) as error:
        parse(row)
    assert error.value.location == "data.jsonl:7"
    assert str(error.value).startswith("data.jsonl:7: ")


def test_explicit_format():
    both = {"prompt": "a", "completion": "b", "question": "c", "answer": "d"}
    assert parse(both).messages == said("a", "b")
    assert parse(both, "question_answer").messages == said("c", "d")
    with pytest.raises(MalformedRow, match="no key 'instruction' among 'prompt', 'completion'"):
        parse(both, "instruction")


def test_unreadable_row():
    with pytest.raises(MalformedRow, match=r"data.jsonl:7: not valid JSON"):
        parse_row(Row("data.jsonl:7", None, "not valid JSON: ..."))
