"""What of a source is told and refused: rows that generation will not ask for, tokens beyond the model."""

import logging

import pytest

from spiel_jax.data import DataConfig, DataError, MalformedRow, SourceSpec, load_data
from spiel_jax.data.chat import Encoder
from spiel_jax.data.examples import read_examples

OPENS = (  # thoughts, which no text has
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>' }}{% endif %}"
)
NO_END = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
END_NOT_LEARNT = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}"
    "{{ '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MOVES = (  # the first message into the last question
    "{% for m in messages %}{% if m['role'] == 'user' %}"
    "{{ '[' + (messages[0]['content'] if loop.last or loop.nextitem == messages[-1] else '') }}"
    "{{ m['content'] + ']' }}"
    "{% elif m['role'] == 'assistant' %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}"
)


def talk(*texts):
    return {
        "messages": [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    }


def read(tokenizer, file, **options):
    defaults = {"max_tokens": 99, "truncate": "end", "on_malformed": "error", "progress": False}
    return read_examples(SourceSpec(file), Encoder(tokenizer), **(defaults | options))


@pytest.mark.parametrize(
    ("template", "count", "message"),
    [
        (OPENS, "mismatched", "not what `generate` will ask for. The first, {file}:2: a prompt is ..."),
        (NO_END, "endless", "2 of 2 examples do not teach to stop. The first, {file}:1: what is learnt ends"),
        (END_NOT_LEARNT, "endless", "`generate` stops at '</s>' or '<|im_end|>'. Give a chat template that"),
    ],
)
def test_what_generation_will_not_ask_for(make_tokenizer, jsonl, caplog, template, count, message):
    tokenizer = make_tokenizer(template)
    file = jsonl([talk("a", "<think>c</think>b" if template == OPENS else "b"), talk("c", "d")])
    examples, report = read(tokenizer, file)
    assert len(examples) == 2
    assert getattr(report, count) == (1 if template == OPENS else 2)
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert message.format(file=file) in caplog.text
    with pytest.raises(DataError, match=r"rows.jsonl:\d .*data.on_mismatch=warn trains all the same"):
        read(tokenizer, file, on_mismatch="error")


def test_what_is_fine_is_not_spoken_of(chatml, jsonl, caplog):
    file = jsonl([talk("a", "b"), talk("a", "b", "c", "d" * 200)])  # the second loses its end
    examples, report = read(chatml, file, on_mismatch="error")
    assert (len(examples), report.truncated, report.split, report.endless) == (2, 1, 0, 0)
    assert all("cut at their end" in record.getMessage() for record in caplog.records)


def test_plain_text_is_not_what_generation_asks_for(make_tokenizer, jsonl, caplog):
    tokenizer, file = make_tokenizer(), jsonl([{"prompt": "2+2=", "completion": "4"}, talk("a", "b")])
    with caplog.at_level(logging.INFO, "spiel_jax"):
        read(tokenizer, file)
        assert "1 of 2 examples are learnt as plain text" in caplog.text
        caplog.clear()
        read(tokenizer, jsonl([{"text": "a story"}]))
        assert not caplog.records


def test_turns_split_off_are_counted(make_tokenizer, jsonl):
    tokenizer = make_tokenizer(MOVES)
    file = jsonl([talk("a", "1", "b", "2"), talk("c", "3"), talk("d", "4", "e", "5", "f", "6")])
    examples, report = read(tokenizer, file)
    assert (report.read, report.split, report.examples, report.mismatched) == (3, 3, 6, 0)
    assert "3 rows read and 3 split off" in str(report)
    shown = [tokenizer.decode(example.tokens) for example in examples]
    assert shown[:3] == ["[aa]1</s>", "[a]1</s>[ab]2</s>", "[cc]3</s>"]
    fewer = load_data(DataConfig((SourceSpec(file, max_examples=4),)), tokenizer, progress=False)
    [report] = fewer.report.sources
    assert (report.read, report.split, report.examples) == (3, 1, 4)


def test_tokens_beyond_the_embedding_matter_where_they_occur(make_tokenizer, chatml, jsonl):
    chatml.add_special_tokens({"pad_token": "<pad>"})
    known = len(chatml) - 1
    fine, bad = talk("a", "b"), talk("a <pad>", "b")
    config = DataConfig((SourceSpec(jsonl([fine])),), sequence_length=32)
    assert load_data(config, chatml, vocab_size=known, progress=False).report.examples == 1
    file = jsonl([fine, bad])
    config = DataConfig((SourceSpec(file),), sequence_length=32)
    problem = f"rows.jsonl:2: the token '<pad>' has the number {known}, and the model has {known} tokens"
    with pytest.raises(MalformedRow, match=problem):
        load_data(config, chatml, vocab_size=known, progress=False)
    assert load_data(config, chatml, vocab_size=known + 1, progress=False).report.examples == 2
    examples, report = read(chatml, file, vocab_size=known, on_malformed="skip")
    assert (len(examples), report.malformed) == (1, 1)
