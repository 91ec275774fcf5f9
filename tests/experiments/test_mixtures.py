"""The paper's mixtures: conversations as its code makes them, and the configurations that take them."""

import json
import random
from pathlib import Path
from types import SimpleNamespace

import pytest

from experiments.mixtures import prepare
from spiel_jax.config import ConfigError, check_config
from spiel_jax.config.file import load, read
from spiel_jax.data.formats import parse_row
from spiel_jax.data.rows import read_rows
from spiel_jax.errors import SpielError

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.mark.parametrize(
    ("question", "asked"), [("Is it?", "Is it?\n"), ("It is: ", "It is: "), ("Is it?\n", "Is it?\n")]
)
def test_a_question_of_flan_ends_its_line(question, asked):
    turns = prepare.flan_v2({"inputs": question, "targets": "yes", "task": "t"}, random.Random())
    assert turns == [{"role": "user", "content": asked}, {"role": "assistant", "content": "yes"}]


def test_shares_of_wordings_are_one():
    assert sum(share for share, *_ in prepare.WORDINGS) == pytest.approx(1)


def test_every_wording_has_all_of_the_request():
    drawn = random.Random(0)
    for given in ("", "1, 2"):
        row = {"instruction": " Add them. ", "input": given, "output": "3 "}
        asked = {prepare.gpt4_alpaca(row, drawn)[0]["content"] for _ in range(300)}
        assert len(asked) == len(prepare.WORDINGS)
        assert all("Add them." in text and given in text and "{" not in text for text in asked)
        assert all(("nput" in text or "with this" in text) <= bool(given) for text in asked)
    assert prepare.gpt4_alpaca(row, drawn)[1] == {"role": "assistant", "content": "3"}


def run(mixture, published, out):
    prepare.main(SimpleNamespace(mixture=mixture, published=str(published), out=str(out)))  # pyright: ignore[reportArgumentType]


def test_what_is_written_is_read_and_the_same_again(tmp_path, capsys):
    rows = [{"instruction": f"Count to {n}.", "input": "", "output": "1"} for n in range(50)]
    published = tmp_path / "alpaca_gpt4_data.json"
    published.write_text(json.dumps(rows))
    out = tmp_path / "data" / "gpt4_alpaca.jsonl"
    run("gpt4_alpaca", published, out)
    assert "50 conversations" in capsys.readouterr().out
    written = out.read_text()
    assert [len(parse_row(row).messages) for row in read_rows(str(out))] == [2] * 50
    run("gpt4_alpaca", published, out)
    assert out.read_text() == written


def test_a_row_of_another_mixture_is_named_and_nothing_written(tmp_path):
    published = tmp_path / "rows.jsonl"
    published.write_text('{"inputs": "a", "targets": "b"}\n{"instruction": "a", "output": "b"}\n')
    with pytest.raises(SpielError, match=r"rows\.jsonl.*2.* is no row of flan_v2: KeyError\('inputs'\)"):
        run("flan_v2", published, tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize("size", ["7b", "13b", "70b", "7b_nf4", "13b_nf4", "70b_nf4"])
def test_every_llama_takes_a_mixture(size, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = load(f"{CONFIGS}/llama2_{size}.py:tulu_v2", {})
    check_config(config)
    assert config.data.sources == ("data/tulu_v2.jsonl",)
    assert (config.optimizer.eps, config.data.packing, config.batch_size) == (None, False, 128)
    assert config.spiel.seeds == "both"
    assert config.model.source == f"meta-llama/Llama-2-{size.removesuffix('_nf4')}-hf"


def test_an_unknown_mixture_is_named():
    with pytest.raises(ConfigError, match="unknown mixture 'flan': expected one of flan_v2, gpt4_alpaca"):
        read(f"{CONFIGS}/llama2_7b.py:flan")
