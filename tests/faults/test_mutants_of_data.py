"""Damaged and hostile rows and templates are read, skipped with a reason or refused."""

import gzip
import io
import json
import os
import random
import time

import pyarrow
import pyarrow.parquet
import pytest
from conftest import CHATML
from support.mutants import bytes_mutated, json_mutated

from spiel_jax.data import DataConfig, SourceSpec, load_data
from spiel_jax.data.templates import use_template
from spiel_jax.errors import SpielError

SEVERAL, MANY = 10, int(os.environ.get("SPIEL_JAX_MUTANTS", "200"))
SECONDS = 30  # of one mutant
ROWS = [
    {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": f"What is {i}?"},
            {"role": "assistant", "content": f"It is {i} é 🙂.", "weight": 1},
        ],
        "id": i,
    }
    for i in range(6)
]
PAIRS = [{"prompt": f"Say {i}", "completion": f"{i}, {i}"} for i in range(6)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
TABLE = "prompt,completion\n" + "".join(f'"{row["prompt"]}","{row["completion"]}"\n' for row in PAIRS)


def of_a_row(draw, data):
    """One line of JSON lines changed."""
    lines = data.splitlines()
    number = draw.randrange(len(lines))
    lines[number] = json_mutated(draw, lines[number])
    return b"\n".join(lines) + b"\n"


def of_bytes(draw, data):
    return bytes_mutated(draw, data, len(data))


def table(rows):
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    return file.getvalue()


KINDS = {
    "rows.jsonl": (LINES, of_a_row),
    "rows.json": (json.dumps(ROWS).encode(), json_mutated),
    "rows.csv": (TABLE.encode(), of_bytes),
    "rows.tsv": (TABLE.replace('","', '"\t"').replace("prompt,", "prompt\t").encode(), of_bytes),
    "rows.jsonl.gz": (gzip.compress(LINES, mtime=0), of_bytes),
    "rows.jsonl.zst": (pyarrow.Codec("zstd").compress(LINES, asbytes=True), of_bytes),
    "rows.parquet": (table(PAIRS), of_bytes),
    "chat.jinja": (CHATML.encode(), of_bytes),
}


def use(folder, file, tokenizer):
    """Everything that a run takes from its data."""
    rows = folder / (file if file.startswith("rows") else "rows.jsonl")
    if file == "chat.jinja":
        use_template(tokenizer, (folder / file).read_bytes().decode(errors="replace"))
    sources = (SourceSpec(str(rows)),)
    found = load_data(DataConfig(sources, heldout=1, sequence_length=128, on_malformed="skip"), tokenizer)
    batch = next(iter(found.train_iterator(1, steps=1)))
    assert batch["tokens"].shape == (1, 128)
    return found.report


@pytest.mark.parametrize("count", [SEVERAL, pytest.param(MANY, marks=pytest.mark.slow)])
@pytest.mark.parametrize("file", KINDS)
def test_mutants_are_read_skipped_or_refused(tmp_path, file, count, make_tokenizer):
    whole, mutate = KINDS[file]
    (tmp_path / "rows.jsonl").write_bytes(LINES)
    (tmp_path / file).write_bytes(whole)
    expected = use(tmp_path, file, make_tokenizer(CHATML))
    other = 0
    for seed in range(count):
        (tmp_path / file).write_bytes(mutate(random.Random(f"{file} {seed}"), whole))
        start = time.monotonic()
        try:
            other += use(tmp_path, file, make_tokenizer(CHATML)) != expected
        except SpielError as error:
            other += len(str(error).encode()) < 20_000  # no lone surrogates, which cannot be printed
        except BaseException as error:
            raise AssertionError(f"mutant {seed} of {file} raises {type(error).__name__}") from error
        assert time.monotonic() - start < SECONDS, seed
    assert other > count / 10  # or the mutators change nothing that matters
