"""HumanEval (arXiv 2107.03374): functions to write, judged by running tests. Programs run in a sandbox."""

import gzip
import json
from typing import Any

from spiel_jax.evaluation.sandbox import passes
from spiel_jax.evaluation.tasks import reading

_KEYS = ("task_id", "prompt", "test", "entry_point")


def documents(data_dir: str | None = None, shots: int = 0, **_: Any) -> dict[str, Any]:
    """The problems of ``humaneval/HumanEval.jsonl.gz`` (or ``.jsonl``) of ``data_dir``."""
    path = reading.files(reading.folder(data_dir, "humaneval"), "HumanEval.jsonl*")[0]
    reading.shown([], shots, path)
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8") as file:
        return reading.test_split(reading.read_lines(file, path, _KEYS))


def all_of_them(replies: list[list[str]], docs: list[dict[str, Any]]) -> list[list[str]]:
    """Every continuation of each prompt goes on to be judged."""
    del docs
    return [[json.dumps(several)] for several in replies]


def score(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """The share of the continuations that pass, which is pass@1."""
    several = json.loads(results[0]) if isinstance(results[0], str) else results[0]
    check = f"\n{doc['test']}\ncheck({doc['entry_point']})\n"
    passed = [passes(doc["prompt"] + one + check) for one in several]
    return {"pass_at_1": sum(passed) / len(passed)}
