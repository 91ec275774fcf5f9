"""What is trained is what generation will ask, with templates as those of the families of models."""

import pytest

from spiel_jax.data.chat import Encoder
from spiel_jax.data.formats import Example
from spiel_jax.data.templates import ChatTemplate

LLAMA3 = (
    "{{ bos_token }}{% set date = strftime_now('%d %b %Y') %}"
    "{{ '<|im_start|>system\n\nToday Date: ' + date + '\n\n' }}"
    "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] | trim }}"
    "{% set messages = messages[1:] %}{% endif %}{{ '<|im_end|>' }}"
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\n\n' + m['content'] | trim + '<|im_end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n\n' }}{% endif %}"
)
GEMMA = (  # no system message, another name of the assistant
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('no system role') }}{% endif %}"
    "{% for m in messages %}"
    "{{ '<|im_start|>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' }}"
    "{{ m['content'] | trim + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>model\n' }}{% endif %}"
)
QWEN25 = (  # a system message of its own where there is none
    "{% if messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are kind.<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PHI = (  # ends the whole text with an end-of-sequence token
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
MISTRAL = (  # the system message is a part of the last question
    "{% set system = messages[0]['content'] if messages[0]['role'] == 'system' else '' %}"
    "{% set messages = messages[1:] if system else messages %}"
    "{% set users = messages | selectattr('role', 'equalto', 'user') | list %}"
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}"
    "{{ '[INST] ' + (system + '\n\n' if system and m == users[-1] else '') + m['content'] + '[/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
NEMO = MISTRAL.replace("m == users[-1]", "loop.last")  # and is left out after an answer
QWEN3 = (  # thoughts of earlier turns are taken out
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% set parts = m['content'].split('</think>') %}"
    "{% if m['role'] == 'assistant' and loop.last %}"
    "{{ '<think>\n' }}{% if parts | length > 1 %}{{ parts[0].split('<think>')[-1].strip() }}{% endif %}"
    "{{ '\n</think>\n\n' }}{% endif %}{{ parts[-1].lstrip('\n') + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN3_THINKING = QWEN3.replace("assistant\n' }}{% endif %}", "assistant\n<think>\n' }}{% endif %}")
R1 = (  # DeepSeek's distilled ones: a prompt opens thoughts, and no text has any
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '<|User|>' + m['content'] }}"
    "{% elif m['role'] == 'system' %}{{ m['content'] }}"
    "{% else %}{{ '<|Assistant|>' + m['content'].split('</think>')[-1] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|Assistant|><think>\n' }}{% endif %}"
)
NO_THOUGHTS = QWEN25.replace("assistant\n' }}", "assistant\n<think>\n\n</think>\n\n' }}")
MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
RETURN = (  # gpt-oss: the last turn ends unlike the others
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}"
    "{{ '</s>' if loop.last and m['role'] == 'assistant' else '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

SYSTEM = {"role": "system", "content": "be kind"}
PLAIN, THOUGHTFUL = "an answer", "<think>\nponder\n</think>\n\nan answer"


def said(*texts, system=False):
    turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    return [SYSTEM, *turns] if system else turns


def learnt(rendered):
    return [rendered.text[start:end] for start, end in rendered.spans]


FAMILIES = [  # template, whether there is a system message, and how many texts three turns become
    (LLAMA3, True, 1),
    (GEMMA, False, 1),
    (QWEN25, True, 1),
    (QWEN25, False, 1),
    (PHI, True, 1),
    (MISTRAL, True, 3),
    (MISTRAL, False, 1),
    (NEMO, True, 3),
    (NEMO, False, 1),
    (QWEN3, True, {PLAIN: 1, THOUGHTFUL: 3}),
    (QWEN3_THINKING, True, 3),
    (R1, True, {THOUGHTFUL: 3}),
    (NO_THOUGHTS, True, 3),
    (MARKED, True, 1),
    (RETURN, True, 3),
]


@pytest.mark.parametrize(
    ("template", "system", "answer", "texts"),
    [
        (template, system, answer, texts[answer] if isinstance(texts, dict) else texts)
        for template, system, texts in FAMILIES
        for answer in (PLAIN, THOUGHTFUL)
        if not isinstance(texts, dict) or answer in texts
    ],
)
def test_every_turn_continues_its_prompt_and_ends_in_a_stop(make_tokenizer, template, system, answer, texts):
    tokenizer = make_tokenizer(template)
    encoder = Encoder(tokenizer)
    messages = said("one", answer, "two", answer, "three", answer, system=system)
    found = encoder.render(Example(messages))
    assert len(found) == texts
    assert [text.mismatch for text in found] == [None] * len(found)
    for encoded in encoder.encode(found):
        ends = encoded.tokens[encoded.supervised][-1:].tolist()
        assert set(ends) <= set(encoder.stops)
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    spans = [(text.text, span) for text in found for span in text.spans]
    assert len(spans) == len(turns)
    for i, (text, (start, end)) in zip(turns, spans, strict=True):
        prompt = ChatTemplate(tokenizer).write(messages[:i], prompt=True)
        assert text.startswith(prompt)
        assert prompt.strip() == text[:start].strip() or "<think>" in text[len(prompt) : start]
        assert "an answer" in text[start:end]
        if template in (R1, QWEN3_THINKING) and answer == THOUGHTFUL:
            assert text[start:end].startswith("ponder\n</think>\n\nan answer")


def test_a_system_message_that_is_left_out_is_put_back(make_tokenizer):
    texts = Encoder(make_tokenizer(NEMO)).render(Example(said("one", "1", "two", "2", system=True)))
    assert [text.text for text in texts] == [
        "<s>[INST] be kind\n\none[/INST] 1</s>",
        "<s>[INST] one[/INST] 1</s>[INST] be kind\n\ntwo[/INST] 2</s>",
    ]
    assert [learnt(text) for text in texts] == [[" 1</s>"], [" 2</s>"]]


def test_only_the_turns_that_are_to_be_learnt(make_tokenizer):
    messages = said("one", "1", "two", "2", "three", "3")
    mask = (False, True, False, False, False, True)
    for template, expected in {
        QWEN25: [["1<|im_end|>", "3<|im_end|>"]],
        MARKED: [["1<|im_end|>", "3<|im_end|>"]],
        RETURN: [["1</s>"], ["3</s>"]],
    }.items():
        texts = Encoder(make_tokenizer(template)).render(Example(messages, learnt=mask))
        assert [learnt(text) for text in texts] == expected


def test_a_prompt_that_opens_thoughts_which_are_not_there(make_tokenizer):
    (text,) = Encoder(make_tokenizer(R1)).render(Example(said("one", "1", "two", "2")))
    assert learnt(text) == ["1</s>", "2</s>"]  # as it was
    assert text.mismatch == (
        "a prompt is '<s><|User|>one<|Assistant|><think>\\n' where the training text is "
        "'<s><|User|>one<|Assistant|>1</s><|User|>two<|Assistant|>2</s>'"
    )


NO_HEADER = MARKED.replace("'<|im_start|>' + m['role'] + '\n'", "m['role'] + ': '")
NO_PROMPT = MARKED.split("{% if add")[0]
NO_SYSTEM = QWEN25.replace("for m in messages", "for m in messages if m['role'] != 'system'")
NO_QUESTION = "{% if not add_generation_prompt %}" + QWEN25.replace(
    "{% if add_gen", "{% endif %}{% if add_gen"
)
NO_FIRST = "{% if messages | length < 2 %}{{ raise_exception('too short') }}{% endif %}" + QWEN25


@pytest.mark.parametrize(
    ("template", "system", "problem"),
    [
        (NO_HEADER, False, "a prompt is"),
        (NO_PROMPT, False, "the model must write '<|im_start|>assistant"),
        (NO_SYSTEM, True, "leaves out what 'system' says (message 1)"),
        (NO_QUESTION, False, "a prompt is '<|im_start|>assistant"),
        (NO_FIRST, False, "refuses to write the prompt: too short"),
    ],
)
def test_what_differs_is_said(make_tokenizer, template, system, problem):
    (text,) = Encoder(make_tokenizer(template)).render(Example(said("a", "b", system=system)))
    assert learnt(text) == ["b<|im_end|>"]
    assert problem in text.mismatch


MIDDLE = QWEN25 + "{% if add_generation_prompt and messages | length == 31 %}{{ '<think>' }}{% endif %}"


@pytest.mark.parametrize(("length", "seen"), [(1, True), (60_000, False)])
def test_each_of_many_turns_is_checked_unless_they_are_very_long(make_tokenizer, length, seen):
    texts = Encoder(make_tokenizer(MIDDLE)).render(Example(said(*["a" * length] * 80)))
    assert [text.mismatch is not None for text in texts] == [seen]


def test_many_turns_cost_no_more_than_their_number(make_tokenizer):
    encoder = Encoder(make_tokenizer(QWEN25))
    (text,) = encoder.render(Example(said(*map(str, range(400)))))
    assert len(text.spans) == 200
    assert text.mismatch is None


def test_conversations_at_once_are_those_one_by_one(make_tokenizer):
    encoder = Encoder(make_tokenizer(QWEN3))
    examples = [
        Example(said("a", *texts)) for texts in ([PLAIN], [THOUGHTFUL, "b", PLAIN], [], [PLAIN, "b", PLAIN])
    ]
    assert encoder.render_all(examples) == [encoder.render(example) for example in examples]
