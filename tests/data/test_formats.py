import pytest

from spiel_jax.data.formats import parse_row
from spiel_jax.data.rows import MalformedRow, Row


def parse(value, format=None, columns=None):
    return parse_row(Row("data.jsonl:7", value), format, columns)


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


SYSTEM = {"role": "system", "content": "be brief"}


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"question": "q", "context": "c", "answer": "a"}, said("q\n\nc", "a")),
        ({"instruction": "q", "context": "c", "response": "a", "category": "qa"}, said("q\n\nc", "a")),
        (
            {"id": "1", "system_prompt": "be brief", "question": "q", "response": "a"},
            [SYSTEM, *said("q", "a")],
        ),
        ({"instruction": "q", "input": "", "output": "a", "system": "be brief"}, [SYSTEM, *said("q", "a")]),
        ({"instruction": "q", "output": "a", "history": [["p", "b"]]}, said("p", "b", "q", "a")),
        ({"instruction": "q", "output": "a", "history": [], "system": ""}, said("q", "a")),
        ({"query": "q", "response": "a"}, said("q", "a")),
        ({"prompt": "q", "response": "a"}, said("q", "a")),
        ({"input": "q", "output": "a"}, said("q", "a")),
        ({"conversations": said("q", "a"), "system": "be brief"}, [SYSTEM, *said("q", "a")]),
        ({"messages": [SYSTEM, *said("q", "a")], "system": "be brief"}, [SYSTEM, *said("q", "a")]),
        ({"messages": None, "conversations": said("q", "a"), "prompt": None}, said("q", "a")),
        ({"messages": None, "prompt": "q", "completion": "a", "text": float("nan")}, said("q", "a")),
        ({"messages": '[{"role": "user", "content": "q"}]'}, said("q")),
        ({"Instruction": "q", "Output": "a", "Context": "", "ID": 7}, said("q", "a")),
        ({"PROMPT": "q", " completion ": "a", "System Prompt": "be brief"}, [SYSTEM, *said("q", "a")]),
        ({"Question": "q", "question": None, "Answer": "a"}, said("q", "a")),
        (
            {"Messages": [{"Role": "User", "Content": "q"}, {"From": "GPT", "Value": "a", "Name": None}]},
            said("q", "a"),
        ),
        ({"messages": said("q", "a"), "history": [["p", "b"]]}, said("p", "b", "q", "a")),
        (
            {"messages": [SYSTEM, *said("q", "a")], "history": said("p", "b")},
            [SYSTEM, *said("p", "b", "q", "a")],
        ),
        ({"messages": said("p", "b", "q", "a"), "history": [["p", "b"]]}, said("p", "b", "q", "a")),
        ({"messages": said("q", "a"), "history": ""}, said("q", "a")),
        ({"prompt": said("q"), "completion": "a", "history": [["p", "b"]]}, said("p", "b", "q", "a")),
    ],
)
def test_columns_that_mean_something(row, messages):
    example = parse(row)
    assert example.messages == messages
    assert not example.ignored


def test_conversational_prompt_and_completion():
    row = {"prompt": said("q", "earlier", "r"), "completion": [{"role": "assistant", "content": "a"}]}
    example = parse(row)
    assert example.messages == said("q", "earlier", "r", "a")
    assert example.learnt == (False, False, False, True)
    assert parse({**row, "prompt": "q"}).learnt == (False, True)


def test_a_row_written_out_says_nothing_new():
    row = {"instruction": "do", "input": "this", "output": "a"}
    written = "".join(parse(row).plain or ())
    assert not parse({**row, "text": written}).ignored
    assert parse({**row, "text": "another"}).ignored == {"text"}
    assert parse({**row, "text": ["another"]}).ignored == {"text"}


def test_a_row_is_not_longer_than_its_limit_by_what_is_beside_the_texts():
    thoughts = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a", "thinking": "x" * 10**7},
    ]
    for row in ({"messages": thoughts}, {"messages": said("q", "a"), "tools": [{"name": "x" * 10**7}]}):
        with pytest.raises(MalformedRow, match=r"has 10,000,\d\d\d characters, and a row at most 5,000,000"):
            parse(row)


def test_text():
    assert parse({"text": "once"}).plain == ("", "once")
    assert parse({"text": "once"}).messages == []


@pytest.mark.parametrize(
    ("row", "ignored"),
    [
        (
            {"prompt": "q", "completion": "a", "Input": "x", "INPUT": "y"},
            {"Input", "INPUT"},
        ),  # which of them?
        ({"prompt": "q", "completion": "a", "Prompt": "other"}, {"Prompt"}),
        ({"prompt": "q", "completion": "a", "Weight": "70 kg"}, {"Weight"}),
        ({"prompt": "q", "completion": "a", "Text": "other"}, {"Text"}),  # no key of this format
        ({"prompt": said("q"), "completion": "a", "context": "x", "thinking": "y"}, {"context", "thinking"}),
        ({"messages": said("q", "a"), "conversations": said("other")}, {"conversations"}),
        ({"messages": said("q", "a"), "conversations": said("q", "a")}, set()),
        ({"text": "once", "tools": [{"name": "f"}]}, {"tools"}),
    ],
)
def test_what_could_be_meant_is_not_guessed(row, ignored):
    assert parse(row).ignored == ignored


def test_capitals_are_told_where_something_is_wrong():
    with pytest.raises(
        MalformedRow, match=r"'output' is empty; 'instruction' is what 'Instruction' was read"
    ):
        parse({"Instruction": "q", "output": ""})
    assert parse({"prompt": "q", "completion": "a", "Train": False}).learnt == (False, False)


def test_the_name_of_thoughts_is_kept():
    turns = [*said("q"), {"role": "assistant", "content": "a", "thinking": "hm"}]
    assert parse({"messages": turns}).thoughts == "thinking"
    assert parse({"prompt": "q", "completion": turns[1:]}).thoughts == "thinking"
    assert parse({"prompt": "q", "completion": "a", "Reasoning": "hm"}).thoughts == "Reasoning"
    row = {"prompt": "q", "completion": "a", "cot": "hm"}
    assert parse(row, columns={"thinking": "cot"}).thoughts == "cot"


def test_thoughts_and_tools_of_a_row():
    example = parse({"question": "q", "answer": "a", "reasoning": "hm", "tools": '[{"name": "f"}]'})
    assert example.messages[1] == {"role": "assistant", "content": "a", "reasoning_content": "hm"}
    assert example.tools == [{"type": "function", "function": {"name": "f"}}]
    assert example.plain is None


def test_a_row_that_is_not_to_be_learnt():
    example = parse({"prompt": "q", "completion": "a", "train": False})
    assert example.learnt == (False, False)
    assert example.plain is None


def test_named_columns():
    row = {"frage": "q", "antwort": "a", "instruction": "other", "quelle_id": 3}
    example = parse(row, columns={"instruction": "frage", "output": "antwort"})
    assert example.messages == said("q", "a")
    assert example.ignored == {"instruction"}
    with pytest.raises(MalformedRow, match=r"no key 'output' among .*; columns = {'instruction': 'frage'}"):
        parse(row, "instruction", {"instruction": "frage"})
    chosen = {"prompt": "q", "chosen": "a", "rejected": "b"}
    assert parse(chosen, columns={"completion": "chosen"}).ignored == {"rejected"}


def test_named_columns_inside_of_others():
    row = {"data": {"question": "q", "mood": "glad", "id": 3}, "answers": {"text": ["a", "b"], "start": [0]}}
    example = parse(row, columns={"prompt": "data.question", "completion": "answers.text.0"})
    assert example.messages == said("q", "a")
    assert example.ignored == {"data.mood", "answers.start"}
    literal = {"data.question": "q", "data": {"question": "other"}, "completion": "a"}
    assert parse(literal, columns={"prompt": "data.question"}).messages == said("q", "a")
    for path in ("data.other", "data.question.more", "answers.text.7", "no.where"):
        with pytest.raises(MalformedRow, match=r"no key 'completion' among .*; columns = {'prompt'"):
            parse(row, "prompt_completion", {"prompt": "data.question", "completion": path})


@pytest.mark.parametrize(
    "row",
    [
        {"hint": "?", "source": "web", "id": 3, "num_turns": 2, "quality_score": 0.5, "lang": "en"},
        {
            "hint": "?",
            "text": "### q ### a",
            "labels": ["x"],
            "created_at": "now",
            "empty": [],
            "label": True,
        },
    ],
)
def test_keys_that_nobody_reads(row):
    assert parse({"messages": said("q", "a"), **row}).ignored == {"hint"}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"chosen": said("q", "a"), "rejected": said("q", "b")}, r"a preference row .*columns="),
        ({"messages": said("q", "a"), "label": False}, "'label' is false: the row says what not to answer"),
        ({"messages": said("q", "a"), "images": ["a.png"]}, "'images' is more than text"),
        ({"messages": said("q", "a"), "chat_template": "x"}, "'chat_template' says how the template"),
        ({"messages": said("q", "a"), "weight": 0.3}, "'weight' must be 0 or 1"),
        (
            {"messages": [SYSTEM, *said("q", "a")], "system": "other"},
            "the row has a system message of its own",
        ),
        ({"prompt": "q", "completion": "a", "history": [["x"]]}, "'history' must be pairs of two texts"),
        ({"messages": said("q", "a"), "history": ["x"]}, "'history' must be pairs of two texts"),
        (
            {"messages": said("q", "a"), "history": [{"role": "x", "content": "y"}]},
            "'history': message 1: unk",
        ),
        (
            {"messages": said("q", "a"), "history": [{**said("q")[0], "mood": 1}]},
            "'history' has mood of turns",
        ),
        ({"input_ids": [1], "labels": [1]}, "holds tokens"),
        ({"messages": said("q", "a" * 5_000_001)}, "has 5,000,002 characters, and a row at most 5,000,000"),
    ],
)
def test_rows_that_cannot_be_honoured(row, reason):
    with pytest.raises(MalformedRow, match=f"^data.jsonl:7: {reason}"):
        parse(row)
