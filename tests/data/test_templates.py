"""Templates are rendered as transformers renders them, and stopped where they do not end."""

import datetime

import pytest

from spiel_jax.data import rendering, templates
from spiel_jax.data.templates import (
    MARK,
    ChatTemplate,
    Request,
    TemplateError,
    TemplateRefusal,
    Wanted,
    read_template,
    templates_of,
    use_template,
)

TURNS = [
    {"role": "user", "content": "né 🙂"},
    {"role": "assistant", "content": "b", "reasoning_content": "c"},
]
EVERYTHING = (
    "{{ bos_token }}{%- for m in messages %}\n  {% if m.content is string %}\n{{ m.role | upper }}: "
    "{{ m.content | tojson }}{% endif %}\n{% if m.reasoning_content is defined %}{{ m.reasoning_content }}"
    "{% endif %}{% endfor %}{% if tools %}{{ tools | tojson(indent=1) }}{% endif %}{{ eos_token }}"
    "{% if add_generation_prompt %}?{% endif %}"
)
NESTED = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
POWER = "{{ 10 ** 1000000000 }}"  # evaluated when the template is compiled
LONG = "{{ 'a'.ljust(10 ** 10) }}"
WIDE = "{% for i in range(60) %}{{ '%1000000d' % 1 }}{% endfor %}"


@pytest.fixture
def hasty(monkeypatch):
    """What a conversation may take is a second."""
    templates._process.close()
    monkeypatch.setattr(rendering, "SECONDS", 1)
    yield
    templates._process.close()


def test_as_transformers_renders(make_tokenizer):
    tokenizer = make_tokenizer(EVERYTHING)
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    for prompt in (False, True):
        expected = tokenizer.apply_chat_template(
            TURNS, tools=tools, tokenize=False, add_generation_prompt=prompt
        )
        assert ChatTemplate(tokenizer).write(TURNS, tools, prompt=prompt) == expected
    assert "<s>" in expected
    assert expected.endswith("?")


def test_several_ways_at_once(chatml):
    wanted = [Wanted(1, prompt=True), Wanted(2, contents={1: MARK}), Wanted(0)]
    first, second, none = ChatTemplate(chatml).render([Request(TURNS, wanted)])[0]
    assert first.text == "<|im_start|>user\nné 🙂<|im_end|>\n<|im_start|>assistant\n"
    assert second.text.endswith(f"assistant\n{MARK}<|im_end|>\n")
    assert none.text == ""


def test_the_clock_is_the_runs(make_tokenizer):
    tokenizer = make_tokenizer("{{ strftime_now('%d %b %Y %H:%M') }}")
    date = datetime.datetime(2024, 2, 29, 23, 59)
    assert ChatTemplate(tokenizer, date).write(TURNS) == "29 Feb 2024 23:59"
    now = ChatTemplate(tokenizer).write(TURNS)
    assert abs(datetime.datetime.strptime(now, "%d %b %Y %H:%M") - datetime.datetime.now()) < (
        datetime.timedelta(minutes=2)
    )


def test_what_does_not_end_is_stopped(hasty, make_tokenizer, chatml):
    for template, limit in ((NESTED, "1 s"), (POWER, "1 s"), (LONG, "1024 MiB"), (WIDE, "50,000,000 char")):
        with pytest.raises(TemplateError, match=f"was stopped: it takes more than {limit}"):
            ChatTemplate(make_tokenizer(template)).write(TURNS)
    assert ChatTemplate(chatml).write(TURNS[:1]) == "<|im_start|>user\nné 🙂<|im_end|>\n"


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ ''.__class__.__mro__ }}", "SecurityError: access to attribute '__class__'"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{% for %}", "TemplateSyntaxError in line 1"),
        ("{{ 1 // 0 }}", "ZeroDivisionError"),
        ("{{ messages[0]['content'] + 1 }}", "TypeError"),
        ("{{ messages[7].content }}", "UndefinedError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{{ raise_exception('no such role') }}", "^no such role$"),
    ],
)
def test_refusals(make_tokenizer, template, reason):
    with pytest.raises(TemplateRefusal, match=reason):
        ChatTemplate(make_tokenizer(template)).write(TURNS)


def test_the_program_ends_when_it_has_nothing_to_do(monkeypatch, chatml):
    templates._process.close()
    monkeypatch.setattr(rendering, "IDLE", 0)
    text = ChatTemplate(chatml).write(TURNS[:1])
    program = templates._process._program
    assert program.wait(timeout=30) == 0
    assert ChatTemplate(chatml).write(TURNS[:1]) == text
    assert templates._process._program is not program
    templates._process.close()


def test_templates_that_are_none(make_tokenizer, tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = {"tool_use": "a"}
    with pytest.raises(TemplateError, match="the tokenizer's chat template"):
        ChatTemplate(tokenizer)
    with pytest.raises(TemplateError, match=r"no chat template can be read from .*absent\.jinja"):
        read_template(tmp_path / "absent.jinja")
    (tmp_path / "empty.jinja").write_text("\n")
    with pytest.raises(TemplateError, match="is empty"):
        read_template(tmp_path / "empty.jinja")
    with pytest.raises(TemplateError, match=r"1,000,001 characters"):
        ChatTemplate(make_tokenizer("a" * 1_000_001))


def test_a_template_of_a_file(make_tokenizer, tmp_path):
    (tmp_path / "t.jinja").write_text("{{ messages[0].content }}!\n")
    tokenizer = make_tokenizer()
    use_template(tokenizer, read_template(tmp_path / "t.jinja"))
    assert ChatTemplate(tokenizer).write(TURNS) == "né 🙂!"


def test_a_tokenizer_for_plain_text_stays_one(make_tokenizer):
    tokenizer = make_tokenizer()
    use_template(tokenizer, templates.chat_template(tokenizer))
    assert tokenizer.chat_template is None


NAMED = {"default": "d{{ messages[0].content }}", "tool_use": "t{{ messages[0].content }}", "rag": "r"}


def test_templates_by_their_names_are_kept_and_used_again(make_tokenizer):
    tokenizer = make_tokenizer(NAMED)
    kept = templates_of(tokenizer)
    assert kept == {name: NAMED[name] for name in ("default", "tool_use")}
    again = make_tokenizer("other")
    use_template(again, kept)
    turn = [{"role": "user", "content": "a"}]
    assert ChatTemplate(again).write(turn) == "da"
    assert ChatTemplate(again).write(turn, [{"function": {"name": "f"}}]) == "ta"
    assert templates_of(make_tokenizer("one")) == "one"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"tool_use": "t", "rag": "r"}, "templates are called 'tool_use', 'rag', and none 'default'"),
        ({"default": 5}, "chat template 'default' must be a string, not int"),
        ({"default": "d", "tool_use": ["t"]}, "chat template 'tool_use' must be a string, not list"),
    ],
)
def test_names_of_templates_that_are_none(make_tokenizer, given, message):
    with pytest.raises(TemplateError, match=message):
        ChatTemplate(make_tokenizer(given))
