import dataclasses

import numpy as np
import pytest
from tokenizers import normalizers

from spiel_jax.data import DataConfig, SourceSpec, load_data
from spiel_jax.data.fingerprint import digest, examples_fingerprint, tokenizer_fingerprint

ROWS = [{"prompt": f"say {word}", "completion": f"{word} {word}"} for word in "abcdefgh"]


def found(chatml, paths, **options):
    config = DataConfig(sources=tuple(map(SourceSpec, paths)), heldout=2, sequence_length=64, **options)
    return load_data(config, chatml, progress=False).fingerprint


def test_is_of_what_is_read_and_not_of_where_it_lies(chatml, jsonl):
    one, other = (found(chatml, [jsonl(ROWS, name)]) for name in ("one.jsonl", "other.jsonl"))
    assert one["sources"][0].pop("path") != other["sources"][0].pop("path")
    assert one == other


@pytest.mark.parametrize(
    ("rows", "part"),
    [
        (ROWS + ROWS[:1], "examples"),
        (ROWS[:-1], "examples"),
        (ROWS[::-1], "tokens"),
        ([{**ROWS[0], "prompt": "say b"}, *ROWS[1:]], "tokens"),
    ],
)
def test_changes_with_rows_and_their_order(chatml, jsonl, rows, part):
    before, after = found(chatml, [jsonl(ROWS)]), found(chatml, [jsonl(rows)])
    assert before["sources"][0][part] != after["sources"][0][part]


def test_changes_with_split_and_order(chatml, jsonl):
    file = jsonl(ROWS)
    before, seed = found(chatml, [file]), found(chatml, [file], seed=1)
    assert before["order"] != seed["order"]
    assert before["heldout"] != seed["heldout"]
    assert before["order"] != found(chatml, [file], packing=False)["order"]
    assert before["sources"] == found(chatml, [file], packing=False)["sources"] == seed["sources"]


def test_masks_count(chatml, jsonl):
    data = load_data(DataConfig(sources=(SourceSpec(jsonl(ROWS)),)), chatml, progress=False)
    train = data._train
    flipped = dataclasses.replace(train, supervised=~train.supervised)
    one, other = examples_fingerprint(train), examples_fingerprint(flipped)
    assert one["tokens"] == other["tokens"]
    assert one["learnt"] != other["learnt"]


def test_a_digest_tells_types_and_borders_apart():
    arrays = [np.zeros(4, np.int32), np.zeros(2, np.int64), np.zeros((2, 2), np.int32), np.zeros(16, np.int8)]
    values = ["ab", ["ab"], ["a", "b"], 1, "1", "\udcff"]
    assert len({digest(one) for one in (*arrays, *values)}) == len(arrays) + len(values)
    assert digest("a", "bc") != digest("ab", "c")


class TestTokenizer:
    def test_a_stored_one_is_the_same(self, chatml, tmp_path):
        chatml.save_pretrained(tmp_path)
        assert tokenizer_fingerprint(type(chatml).from_pretrained(tmp_path)) == tokenizer_fingerprint(chatml)

    def test_being_used_changes_nothing(self, chatml):
        before = tokenizer_fingerprint(chatml)
        chatml(["a", "much longer"], truncation=True, max_length=4)
        assert tokenizer_fingerprint(chatml) == before

    @pytest.mark.parametrize(
        ("changes", "part"),
        [
            ({"template": "{{ messages[0]['content'] }}"}, "chat template"),
            ({"eos_token": "<|im_end|>", "bos_token": "<s>"}, "special tokens"),
            ({"bos": True}, "splitting"),
        ],
    )
    def test_what_changes(self, make_tokenizer, chatml, changes, part):
        changes = {"template": chatml.chat_template, **changes}
        one, other = tokenizer_fingerprint(chatml), tokenizer_fingerprint(make_tokenizer(**changes))
        assert part in {name for name in one if one[name] != other[name]}

    def test_how_text_is_split(self, make_tokenizer, chatml):
        lower = make_tokenizer(chatml.chat_template)
        lower.backend_tokenizer.normalizer = normalizers.Lowercase()
        one, other = tokenizer_fingerprint(chatml), tokenizer_fingerprint(lower)
        assert {name for name in one if one[name] != other[name]} == {"splitting"}
