r"""The paper's three instruction mixtures, from their published files, as conversations in JSON lines.

    python -m experiments.mixtures.prepare --mixture=flan_v2 --published=flan_v2_resampled_50k.jsonl \
        --out=data/flan_v2.jsonl
    python -m spiel_jax.train --config=configs/llama2_7b.py:flan_v2 --workdir=runs/flan_v2

    mixture       published file                 where
    flan_v2       flan_v2_resampled_50k.jsonl    dataset hamishivi/tulu_mix_store of the hub
    gpt4_alpaca   alpaca_gpt4_data.json          Instruction-Tuning-with-GPT-4/GPT-4-LLM of GitHub, in data/
    tulu_v2       a folder of Parquet files      dataset allenai/tulu-v2-sft-mixture of the hub

GPT4-Alpaca's requests are worded in several ways, drawn with the seed 42, a tenth of them as Alpaca does, as
in the paper's code (arXiv 2401.16405, ducdauge/sft-llm). The wordings but Alpaca's are ours: its rows are not
the paper's to the letter, those of the two others are.
"""

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from absl import flags
from tqdm import tqdm

from experiments.rows import write_rows
from spiel_jax import cli
from spiel_jax.config.checks import shown
from spiel_jax.data.rows import read_rows
from spiel_jax.errors import SpielError

Row = dict[str, Any]

ALPACA = "Write a response that appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n"
# (share, a request without an input, one with it); what an input is called stands in the wording
WORDINGS = [
    (0.30, "{instruction}\n\n", "{instruction}\n\n{input}\n\n"),
    (0.15, "{instruction}\n", "{instruction}\n{input}\n"),
    (0.15, "{instruction}\nAnswer:", "{instruction}\nInput: {input}\nAnswer:"),
    (0.10, "Instruction: {instruction}\nOutput:", "Instruction: {instruction}\nInput: {input}\nOutput:"),
    (0.10, "Task: {instruction}\n\n", "Task: {instruction}\n\nInput: {input}\n\n"),
    (
        0.10,
        "Please do this:\n\n{instruction}\n",
        "Please do this:\n\n{instruction}\n\nwith this:\n\n{input}\n",
    ),
    (0.10, ALPACA + "### Response:", ALPACA + "### Input:\n{input}\n\n### Response:"),
]


def flan_v2(row: Row, _: random.Random) -> list[Row]:
    """A question that does not end a line, or in a colon, gets the line's end: the answer follows it."""
    question = row["inputs"]
    closed = question.endswith("\n") or question.rstrip().endswith(":")
    return _turn(question if closed else question + "\n", row["targets"])


def gpt4_alpaca(row: Row, draw: random.Random) -> list[Row]:
    """A wording is drawn for every row."""
    fields = {"instruction": row["instruction"].strip(), "input": (row.get("input") or "").strip()}
    (_, without, with_input), *_ = draw.choices(WORDINGS, [share for share, *_ in WORDINGS])
    return _turn((with_input if fields["input"] else without).format(**fields), row["output"].strip())


def tulu_v2(row: Row, _: random.Random) -> list[Row]:
    """They are conversations already."""
    return [{"role": turn["role"], "content": turn["content"]} for turn in row["messages"]]


def _turn(question: str, answer: str) -> list[Row]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


MIXTURES: dict[str, Callable[[Row, random.Random], list[Row]]] = {
    "flan_v2": flan_v2,
    "gpt4_alpaca": gpt4_alpaca,
    "tulu_v2": tulu_v2,
}


def conversations(mixture: str, published: str) -> Iterator[list[Row]]:
    """The rows of the published files as conversations.

    Args:
        mixture: One of ``MIXTURES``.
        published: A file or folder, see ``spiel_jax.data.rows.read_rows``.

    Raises:
        SpielError: If a row is not what the mixture's are; its place is named.
    """
    draw = random.Random(42)
    for row in read_rows(published):
        if row.problem is not None:
            raise SpielError(f"{row.location}: {row.problem}")
        try:
            yield MIXTURES[mixture](row.value, draw)
        except (KeyError, TypeError, AttributeError) as error:
            raise SpielError(
                f"{row.location} is no row of {mixture}: {error!r} in {shown(row.value)}"
            ) from error


def define_flags(values: flags.FlagValues) -> None:
    """Defines the flags of the command."""
    flags.DEFINE_enum("mixture", None, list(MIXTURES), "What it is.", required=True, flag_values=values)
    flags.DEFINE_string("published", None, "The published file or folder.", required=True, flag_values=values)
    flags.DEFINE_string("out", None, "JSON lines file to write.", required=True, flag_values=values)


def main(options: flags.FlagValues) -> None:
    """Writes the file; as a whole, or not at all."""
    turns = tqdm(conversations(options.mixture, options.published), "preparing", unit=" rows")
    count = write_rows(({"messages": those} for those in turns), Path(options.out))
    print(f"{count} conversations in {options.out}")


if __name__ == "__main__":
    cli.run(main, define_flags)
