import dataclasses
import json
import logging

import numpy as np
import pytest

from spiel_jax.data import DataConfig, DataError, EmptyDataset, MalformedRow, SourceSpec, load_data
from spiel_jax.errors import SpielError


def pairs(count, letter="a", length=None):
    """Rows of distinct completions, plain text of 4 to 9 tokens."""
    return [
        {"prompt": letter, "completion": f"{i:02d}" + "x" * (i % 5 if length is None else length)}
        for i in range(count)
    ]


@pytest.fixture
def load(make_tokenizer, jsonl):
    """Loads rows (a list, or a list per source) with a tokenizer that writes plain text."""

    def load(*sources, options=({},), **config):
        specs = tuple(
            SourceSpec(jsonl(rows, f"{i}.jsonl"), **(options[i] if i < len(options) else {}))
            for i, rows in enumerate(sources)
        )
        return load_data(DataConfig(specs, **{"sequence_length": 16, **config}), make_tokenizer())

    return load


def texts(data, batches, make_tokenizer):
    """The completions in batches, segment by segment."""
    tokenizer = make_tokenizer()
    found = []
    for batch in batches:
        for row in range(len(batch["tokens"])):
            segments = batch["segment_ids"][row]
            for segment in range(1, segments.max() + 1):
                learnt = (segments == segment) & (batch["weights"][row] > 0)
                found.append(tokenizer.decode(batch["labels"][row][learnt]))
    return found


def same(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            assert a[key].dtype == b[key].dtype
            np.testing.assert_array_equal(a[key], b[key])


def test_an_epoch_holds_every_example_once(load, make_tokenizer):
    rows = pairs(20)
    data = load(rows)
    batches = list(data.train_iterator(1, epochs=1))
    assert len(batches) == data.rows(0) == data.report.rows
    assert batches[0]["tokens"].shape == (1, 16)
    expected = sorted(row["completion"] + "</s>" for row in rows)
    assert sorted(texts(data, batches, make_tokenizer)) == expected


def test_report(load):
    rows = [*pairs(4, length=1), {"messages": [{"role": "user", "content": "?"}]}]
    data = load(rows, heldout=1)
    [source] = data.report.sources
    # a 0 0 x </s>: five tokens in four slots, four of them learnt
    assert dataclasses.asdict(source) == {
        "path": source.path,
        "read": 5,
        "malformed": 0,
        "unsupervised": 1,
        "too_long": 0,
        "cut_away": 0,
        "examples": 4,
        "truncated": 0,
        "last_turn_only": 0,
        "split": 0,
        "mismatched": 0,
        "endless": 0,
        "tokens": 20,
        "supervised_tokens": 16,
    }
    report = data.report
    assert (report.examples, report.tokens, report.supervised_tokens) == (3, 15, 12)
    assert (report.rows, report.fill) == (1, 12 / 16)
    assert (report.heldout_examples, report.heldout_rows) == (1, 1)
    assert report.heldout_sources == ()


def test_interrupted_and_resumed_is_uninterrupted(load):
    data = load(pairs(40), heldout=4)
    whole = list(data.train_iterator(2, epochs=3))
    assert len(whole) > 12
    for stop in (0, 1, 5, len(whole)):
        iterator = data.train_iterator(2, epochs=3)
        start = [next(iterator) for _ in range(stop)]
        state = json.loads(json.dumps(iterator.get_state()))
        resumed = load(pairs(40), heldout=4).train_iterator(2, epochs=3)
        resumed.set_state(state)
        same(start + list(resumed), whole)


def joined(parts, shares):
    """Whole batches from those that have the rows of each share."""
    order = np.argsort(np.concatenate(shares))
    return [
        {key: np.concatenate([part[key] for part in batch])[order] for key in batch[0]}
        for batch in zip(*parts, strict=True)
    ]


SHARES = [
    [[0, 1, 2, 3, 4, 5]],
    [[0, 1, 2], [3, 4, 5]],
    [[0, 3], [1, 4], [2, 5]],  # of every micro-batch of three rows one each
    [[4], [0, 1, 5], [2, 3]],
]


@pytest.mark.parametrize("shares", SHARES)
def test_processes_together_make_the_batches_of_one(load, shares):
    data = load(pairs(40), heldout=4)
    whole = list(data.train_iterator(6, epochs=4))
    iterators = [data.train_iterator(6, epochs=4, rows=rows) for rows in shares]
    assert {len(data.train_dataset(6, epochs=4, rows=rows)) for rows in shares} == {len(whole)}
    start = [[next(iterator) for _ in range(2)] for iterator in iterators]
    assert {len(batch["tokens"]) for batch in start[0]} == {len(shares[0])}
    same(joined(start, shares), whole[:2])
    # each goes on where one that makes whole batches has stopped
    alone = data.train_iterator(6, epochs=4)
    for _ in range(2):
        next(alone)
    for iterator in iterators:
        assert iterator.get_state() == alone.get_state()
        iterator.set_state(alone.get_state())
    same(joined([list(iterator) for iterator in iterators], shares), whole[2:])
    heldout = [data.heldout_batches(6, rows) for rows in shares]
    same(joined(heldout, shares), data.heldout_batches(6))


def test_rows_that_a_batch_does_not_have_are_refused(load):
    data = load(pairs(9))
    for rows in ([0, 4], [-1], []):
        with pytest.raises(ValueError, match="rows must be some of 0 to 3"):
            data.train_iterator(4, steps=2, rows=rows)
        with pytest.raises(ValueError, match="rows must be some of 0 to 3"):
            data.heldout_batches(4, rows)


@pytest.mark.parametrize("packing", [True, False])
def test_tokens_of_batches_are_counted_without_making_them(load, packing):
    data = load(pairs(40), packing=packing)
    batches = list(data.train_iterator(4, steps=12))
    counted = [np.count_nonzero(batch["segment_ids"]) for batch in batches]
    assert data.batch_tokens(4, steps=12).tolist() == counted
    assert len(data.batch_tokens(4, epochs=2)) == len(data.train_dataset(4, epochs=2))


def test_seed_and_epoch_change_the_order(load, make_tokenizer):
    def order(seed):
        data = load(pairs(30), seed=seed, packing=False)
        return texts(data, data.train_iterator(1, epochs=2), make_tokenizer)

    assert order(0) == order(0)
    assert order(0) != order(1)
    assert order(0)[:30] != order(0)[30:]
    assert sorted(order(0)[:30]) == sorted(order(0)[30:])


def test_batches_cross_epochs_and_the_remainder_is_dropped(load):
    data = load(pairs(5), packing=False)
    assert len(data.train_dataset(2, epochs=1)) == 2
    assert len(data.train_dataset(2, epochs=2)) == 5
    assert len(data.train_dataset(2, epochs=3)) == 7
    same(list(data.train_iterator(2, steps=7)), list(data.train_iterator(2, epochs=3)))
    same(list(data.train_iterator(2, steps=3)), list(data.train_iterator(2, epochs=2))[:3])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "give either epochs or steps"),
        ({"epochs": 1, "steps": 1}, "give either epochs or steps"),
        ({"epochs": 0}, "epochs must be at least 1, not 0"),
        ({"steps": -1}, "steps must be at least 1, not -1"),
        ({"epochs": 1, "batch_size": 0}, "batch_size must be at least 1, not 0"),
        ({"epochs": 1, "batch_size": 9}, "5 rows in 1 epochs do not fill one batch of 9"),
    ],
)
def test_refused_iterations(load, arguments, message):
    data = load(pairs(5), packing=False)
    with pytest.raises(ValueError, match=message):
        data.train_dataset(**{"batch_size": 1, **arguments})


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize(("heldout", "count"), [(7, 7), (0.35, 7), (0.001, 1)])
def test_heldout_is_disjoint_and_complete(load, make_tokenizer, heldout, count, packing):
    rows = pairs(20)
    data = load(rows, heldout=heldout, packing=packing)
    batches = data.heldout_batches(4)
    assert {batch["tokens"].shape for batch in batches} == {(4, 16)}
    kept = texts(data, batches, make_tokenizer)
    train = texts(data, data.train_iterator(1, epochs=1), make_tokenizer)
    assert len(kept) == count == data.report.heldout_examples
    assert sorted(kept + train) == sorted(row["completion"] + "</s>" for row in rows)
    same(batches, load(rows, heldout=heldout, packing=packing).heldout_batches(4))
    padding = batches[-1]["tokens"][data.report.heldout_rows % 4 or 4 :]
    assert not padding.any()
    if not packing:
        assert sum(len(batch["tokens"]) for batch in batches) == -(-count // 4) * 4


def test_heldout_from_its_own_source(load, jsonl, make_tokenizer):
    source = SourceSpec(jsonl(pairs(3, letter="b"), "heldout.jsonl"))
    data = load(pairs(5), heldout=(source,))
    assert data.report.examples == 5
    assert data.report.heldout_sources[0].examples == 3
    assert len(texts(data, data.heldout_batches(1), make_tokenizer)) == 3


def test_nothing_held_out(load):
    data = load(pairs(3))
    assert data.heldout_batches(2) == []
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        data.heldout_batches(0)


def test_malformed_rows(load, caplog):
    rows = ["{broken", *pairs(2), {"prompt": "a"}, *[{"words": "b"}] * 5]
    with pytest.raises(MalformedRow, match=r"0.jsonl:1: not valid JSON"):
        load(rows)
    with caplog.at_level(logging.WARNING):
        [source] = load(rows, on_malformed="skip").report.sources
    assert (source.read, source.malformed, source.examples) == (9, 7, 2)
    messages = [record.getMessage() for record in caplog.records]
    assert "0.jsonl:1: not valid JSON" in messages[0]
    assert "0.jsonl:4: unknown format with keys 'prompt'" in messages[1]
    assert len(messages) == 6  # five rows and the account
    assert messages[-1].endswith("9 rows read, 7 malformed, 0 unsupervised, 0 too_long, 0 cut_away, 2 kept")


def test_rows_the_template_refuses_are_malformed(jsonl, make_tokenizer):
    tokenizer = make_tokenizer("{{ raise_exception('no') }}")
    config = DataConfig((SourceSpec(jsonl(pairs(1))),))
    with pytest.raises(MalformedRow, match=r"rows.jsonl:1: the chat template refuses it: no"):
        load_data(config, tokenizer)


def test_truncation(load, make_tokenizer):
    rows = [
        {"prompt": "ab", "completion": "cd"},  # five tokens with </s>
        {"prompt": "ab", "completion": "cde"},  # six
        {"prompt": "abcdef", "completion": "g"},  # the completion is beyond the cut
    ]
    data = load(rows, sequence_length=4)
    [source] = data.report.sources
    assert (source.examples, source.truncated, source.cut_away, source.too_long) == (2, 1, 1, 0)
    found = texts(data, data.train_iterator(1, epochs=1), make_tokenizer)
    assert sorted(found) == ["cd</s>", "cde"]
    [source] = load(rows, sequence_length=4, truncate="skip").report.sources
    assert (source.examples, source.truncated, source.cut_away, source.too_long) == (1, 0, 0, 2)


def test_long_conversations_are_shortened_before_tokenizing(chatml, jsonl):
    turns = [{"role": role, "content": letter * 200} for letter in "abc" for role in ("user", "assistant")]
    config = DataConfig((SourceSpec(jsonl([{"messages": turns}])),), sequence_length=300)
    batch = next(load_data(config, chatml).train_iterator(1, epochs=1))
    short = dataclasses.replace(config, sources=(SourceSpec(jsonl([{"messages": turns[:2]}])),))
    expected = next(load_data(short, chatml).train_iterator(1, epochs=1))
    # Cut at 300 tokens, in the first answer: what follows makes no difference.
    same([batch], [expected])
    data = load_data(
        dataclasses.replace(config, sources=(SourceSpec(jsonl([{"messages": turns * 9}])),)),
        chatml,
    )
    assert data.report.sources[0].truncated == 1
    same([next(data.train_iterator(1, epochs=1))], [expected])


def test_long_texts_are_cut_before_tokenizing_and_do_not_end(load, make_tokenizer):
    data = load([{"text": "xy" * 10_000}], sequence_length=8)
    assert data.report.sources[0].truncated == 1
    assert texts(data, data.train_iterator(1, epochs=1), make_tokenizer) == ["yxyxyxyx"]


def test_only_what_no_row_can_hold_is_cut_before_tokenizing(chatml, jsonl):
    def load(text, turns, sequence_length):
        row = {"messages": [{"role": r, "content": text} for r in ("user", "assistant")] * turns}
        source = SourceSpec(jsonl([row]))
        return load_data(DataConfig((source,), sequence_length=sequence_length), chatml)

    full = load("x" * 20, 6, 300)  # 240 characters and their headers
    assert next(full.train_iterator(1, epochs=1))["segment_ids"].all()
    # Ten characters to a token, so that the cut at eight leaves less than a row of the six turns.
    sparse = load("<|im_end|>" * 81, 3, 200)
    assert sparse.report.sources[0].truncated == 1
    assert sparse.report.tokens < 200


def test_a_lone_first_token_is_nobodys_target(make_tokenizer, jsonl):
    tokenizer = make_tokenizer("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    rows = [{"messages": [{"role": "assistant", "content": text}]} for text in ("a", "bc")]
    data = load_data(DataConfig((SourceSpec(jsonl(rows)),), sequence_length=4), tokenizer)
    assert data.report.sources[0].unsupervised == 1
    assert data.report.tokens == 2


def test_an_example_ends_with_its_last_learnt_token(chatml, jsonl):
    row = {"prompt": "hi", "completion": "yo"}
    data = load_data(DataConfig((SourceSpec(jsonl([row])),), sequence_length=32), chatml)
    batch = next(data.train_iterator(1, epochs=1))
    last = np.flatnonzero(batch["segment_ids"][0])[-1]
    assert batch["weights"][0, last] == 1
    assert chatml.decode(batch["labels"][0, last]) == "<|im_end|>"
    assert data.report.tokens == 24  # without the line feed after it


@pytest.mark.parametrize("limit", [1, 3, 300])
def test_max_examples(load, limit):
    unsupervised = {"messages": [{"role": "user", "content": "?"}]}
    rows = [row for pair in pairs(310) for row in (unsupervised, pair)]
    [source] = load(rows, options=({"max_examples": limit},)).report.sources
    assert source.examples == limit
    assert source.read == 2 * limit  # nothing beyond what is needed


def test_mixture(load, make_tokenizer):
    few, many = pairs(4, length=1), pairs(12, length=3)
    data = load(few, many, options=({"weight": 1}, {"weight": 1}), packing=False)
    found = texts(data, data.train_iterator(1, epochs=1), make_tokenizer)
    short = [text for text in found if len(text) == len("00x</s>")]
    assert len(found) == 16
    assert sorted(short) == sorted(2 * [row["completion"] + "</s>" for row in few])
    assert len(set(found) - set(short)) == 8
    unweighted = load(few, many, packing=False)
    found = texts(unweighted, unweighted.train_iterator(1, epochs=1), make_tokenizer)
    assert len(set(found)) == 16


def test_empty_datasets_say_why(load):
    unsupervised = {"messages": [{"role": "user", "content": "?"}]}
    with pytest.raises(EmptyDataset, match="2 rows read, 1 malformed, 1 unsupervised, 0 too_long"):
        load(["{", unsupervised], on_malformed="skip")
    with pytest.raises(EmptyDataset, match=r"no examples: .*0.jsonl: 0 rows read"):
        load([])
    with pytest.raises(EmptyDataset, match=r"no examples: .*1.jsonl: 0 rows read"):
        load(pairs(3), [])
    with pytest.raises(EmptyDataset, match="holding out 3 examples leaves none to train on"):
        load(pairs(3), heldout=3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sources": ()}, "sources is empty"),
        ({"sources": ("a.json",)}, "sources must be a tuple of SourceSpec"),
        ({"sources": (SourceSpec("a", weight=1), SourceSpec("b"))}, "without: b"),
        ({"heldout": True}, "heldout must be a number of examples, a share .* not True"),
        ({"heldout": -1}, "heldout must not be negative: -1"),
        ({"heldout": 1.0}, "heldout as a share must be above 0 and below 1, not 1.0"),
        ({"heldout": ()}, "heldout is empty"),
        ({"sequence_length": 0}, "sequence_length must be an int from 1, not 0"),
        ({"truncate": "start"}, "unknown truncate 'start': expected one of end, skip"),
        ({"on_malformed": "warn"}, "unknown on_malformed 'warn': expected one of error, skip"),
        ({"seed": -1}, "seed must be an int from 0"),
    ],
)
def test_refused_configs(options, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(**{"sources": (SourceSpec("a.json"),), **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"path": ""}, "path must be a non-empty string"),
        ({"weight": 0}, "weight of a must be a positive number, not 0"),
        ({"weight": float("nan")}, "weight of a must be a positive number, not nan"),
        ({"format": "xml"}, "unknown format 'xml' for a: expected one of messages, prompt_comp"),
        ({"max_examples": 0}, "max_examples of a must be an int from 1, not 0"),
    ],
)
def test_refused_sources(options, message):
    with pytest.raises(ValueError, match=message):
        SourceSpec(**{"path": "a", **options})


def test_keys_that_nobody_reads_are_told_once(load, caplog):
    with caplog.at_level(logging.WARNING):
        load([{**row, "hint": "?", "id": 1} for row in pairs(3)] + [{**pairs(1)[0], "hint": "?", "mood": 1}])
    [told] = [record.getMessage() for record in caplog.records]
    assert "these keys of rows are not read: 'hint' (4 rows), 'mood' (1 rows)" in told


def test_named_columns(load, make_tokenizer):
    rows = [{"frage": "a", "antwort": "bc"}]
    data = load(rows, options=[{"columns": {"prompt": "frage", "completion": "antwort"}}])
    assert texts(data, data.train_iterator(1, epochs=1), make_tokenizer) == ["bc</s>"]
    with pytest.raises(DataError, match="no row has the key 'rat' that columns names"):
        load(rows, options=[{"columns": {"prompt": "frage", "completion": "antwort", "system": "rat"}}])
    with pytest.raises(SpielError, match="no format has a key 'promt'"):
        SourceSpec("a.jsonl", columns={"promt": "frage"})
    with pytest.raises(SpielError, match="no format 'text' has a key 'prompt'"):
        SourceSpec("a.jsonl", format="text", columns={"prompt": "frage"})
    with pytest.raises(SpielError, match="must say what rows call keys"):
        SourceSpec("a.jsonl", columns={"prompt": 3})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="two keys have the same name in the rows"):
        SourceSpec("a.jsonl", columns={"prompt": "frage", "completion": "frage"})
    # of rows that are not read none is said to lack a key
    columns = {"prompt": "frage", "completion": "antwort", "system": "rat"}
    late = [rows[0], {**rows[0], "rat": "kurz"}]
    assert load(late, options=[{"columns": columns, "max_examples": 1}]).report.examples == 1


def test_what_truncation_took_is_told(load, caplog):
    rows = pairs(30, length=1)
    with caplog.at_level(logging.WARNING):
        load([*rows, {"prompt": "a", "completion": "x" * 99}])  # one of 31 is no more than a few
        assert not caplog.records
        load([*rows, *[{"prompt": "a", "completion": "x" * 99}] * 2, {"prompt": "a" * 99, "completion": "x"}])
        [cut] = [record.getMessage() for record in caplog.records]
        assert "2 of 32 examples are cut at their end" in cut
        caplog.clear()
        load([*rows, *[{"prompt": "a", "completion": "x" * 99}] * 2], truncate="skip")
    [left_out] = [record.getMessage() for record in caplog.records]
    assert "2 of 32 rows are left out: 2 longer than data.sequence_length" in left_out
