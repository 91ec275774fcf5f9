"""What a fine-tune costs elsewhere: its loss on other texts beside the base's, and how far it went."""

import json
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from tqdm import tqdm

from spiel_jax.data.files import DataError
from spiel_jax.errors import SpielError
from spiel_jax.evaluation.score_table import Score
from spiel_jax.inference.served import Served, batch_devices
from spiel_jax.models import ModelConfig, bind

WINDOW = 256
"""Tokens of a text that are read together."""

_ROWS = 4
_WIDTH = 64  # windows are read at a multiple of it: so many programs at most as there are in a whole one
_AT_ONCE = 64  # positions whose logits are formed at once


class Forgetting(NamedTuple):
    """Of a fine-tuned model beside its base, on some texts; means over their tokens.

    Attributes:
        base: Loss of the base model, nats a token.
        tuned: Of the tuned one.
        divergence: Of the tuned model's predictions from the base's, KL(base ‖ tuned), nats a token.
        agreement: Share of the tokens for which both find the same one likeliest.
        tokens: How many there are.
    """

    base: float
    tuned: float
    divergence: float
    agreement: float
    tokens: int

    def columns(self, name: str) -> tuple[dict, dict]:
        """As rows of ``score_table.table``: of the base and of the tuned model."""
        rows = (
            ("loss", self.base, self.tuned),
            ("KL from the base", 0.0, self.divergence),
            ("same first choice", 1.0, self.agreement),
        )
        before = {(name, what): Score(one, None, self.tokens) for what, one, _ in rows}
        return before, {(name, what): Score(other, None, self.tokens) for what, _, other in rows}


def forgetting(
    base: Served, tuned: Served, texts: Sequence[Sequence[int]], *, progress: bool = False
) -> Forgetting:
    """Compares a tuned model with its base on texts that it was not tuned on.

    Args:
        base: The base model.
        tuned: The tuned one.
        texts: Token ids of each; every token but the first of a window of ``WINDOW`` counts.
        progress: Whether to show a progress bar.

    Raises:
        SpielError: If there is nothing to compare on.
    """
    totals = np.zeros(5)
    rows = _ROWS * batch_devices()
    windows = [
        list(text[start : start + WINDOW]) for text in texts for start in range(0, len(text) - 1, WINDOW)
    ]
    windows = sorted((window for window in windows if len(window) > 1), key=len, reverse=True)
    if not windows:
        raise SpielError("there are no texts of two tokens or more to compare the models on")
    starts = range(0, len(windows), rows)
    for start in tqdm(starts, desc="other texts", disable=not progress):
        width = -(-len(windows[start]) // _WIDTH) * _WIDTH  # the longest of these comes first
        tokens, segments = np.zeros((2, rows, width), np.int32)
        for row, window in enumerate(windows[start : start + rows]):
            tokens[row, : len(window)] = window
            segments[row, : len(window)] = 1
        hidden = [_hidden(served.config, dict(served.params), tokens, segments) for served in (base, tuned)]
        found = _compared(base.config, dict(base.params), dict(tuned.params), *hidden, tokens, segments)
        totals += np.asarray(found, np.float64)
    before, after, divergence, agreement = (totals[:4] / totals[4]).tolist()
    return Forgetting(before, after, divergence, agreement, int(totals[4]))


@partial(jax.jit, static_argnames="config")
def _hidden(config: ModelConfig, params: Any, tokens: Any, segments: Any) -> jax.Array:
    model = bind(config, params)
    hidden, _ = model.hidden(tokens, segment_ids=segments, remat="none", frozen=True)
    return hidden


@partial(jax.jit, static_argnames="config")
def _compared(
    config: ModelConfig, base: Any, tuned: Any, before: Any, after: Any, tokens: Any, segments: Any
) -> jax.Array:
    """[5]: summed losses of both, divergence, agreement, and the number of tokens."""
    models = bind(config, base), bind(config, tuned)
    counted = (segments[:, 1:] > 0).reshape(-1)
    targets = tokens[:, 1:].reshape(-1)
    states = [x[:, :-1].reshape(-1, x.shape[-1]) for x in (before, after)]
    missing = -targets.size % _AT_ONCE

    def pieces(x: jax.Array) -> jax.Array:
        return jnp.pad(x, [(0, missing), *[(0, 0)] * (x.ndim - 1)]).reshape(-1, _AT_ONCE, *x.shape[1:])

    def one(total: jax.Array, piece: tuple) -> tuple[jax.Array, None]:
        before, after, targets, counted = piece
        old, new = (
            jax.nn.log_softmax(model.logits(x)) for model, x in zip(models, (before, after), strict=True)
        )
        losses = [-jnp.take_along_axis(x, targets[:, None], axis=-1)[:, 0] for x in (old, new)]
        divergence = jnp.sum(jnp.exp(old) * (old - new), axis=-1)
        same = jnp.argmax(old, axis=-1) == jnp.argmax(new, axis=-1)
        each = jnp.stack([*losses, divergence, same.astype(jnp.float32), jnp.ones_like(divergence)])
        return total + jnp.sum(jnp.where(counted, each, 0), axis=-1), None

    parts = tuple(map(pieces, (*states, targets, counted)))
    return lax.scan(one, jnp.zeros(5), parts)[0]


def texts_for(texts: str | None, data_dir: str | None) -> list[str]:
    """The texts of a file; where none is named, of the benchmarks in a folder.

    Raises:
        DataError: If nothing is named, or there are none.
    """
    if texts is not None:
        return texts_of(texts)
    if data_dir is None:
        raise DataError("--forgetting needs texts: name --texts=FILE, or --data_dir with benchmarks in it")
    return default_texts(data_dir)


def texts_of(place: str | Path, most: int = 200) -> list[str]:
    """Texts of a file: rows of JSONL with ``text``, or the paragraphs of another file.

    Raises:
        DataError: If it has none.
    """
    path = Path(place).expanduser()
    try:
        content = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise DataError(f"no texts can be read from {path}: {error}") from error
    found = list(
        _rows(path, content) if path.suffix == ".jsonl" else filter(str.strip, content.split("\n\n"))
    )
    if not found:
        raise DataError(f"{path} has no texts")
    return found[:most]


def _rows(path: Path, content: str) -> Iterator[str]:
    for number, line in enumerate(content.splitlines(), 1):
        if not line.strip():
            continue
        try:
            yield str(json.loads(line)["text"])
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}, line {number}: expected a JSON object with text") from error


def default_texts(data_dir: str | Path, most: int = 200) -> list[str]:
    """Texts of the benchmarks in a folder: problems of HumanEval with their solutions, questions of GSM8K.

    Raises:
        DataError: If neither is there.
    """
    import gzip

    found: list[str] = []
    place = Path(data_dir).expanduser()
    for name, keys in (
        ("humaneval/HumanEval.jsonl.gz", ("prompt", "canonical_solution")),
        ("gsm8k/test.jsonl", ("question", "answer")),
    ):
        path = place / name
        if not path.is_file():
            continue
        opened = gzip.open if path.suffix == ".gz" else open
        with opened(path, "rt", encoding="utf-8") as file:
            rows = [json.loads(line) for line in file if line.strip()]
        found += ["\n".join(str(row.get(key, "")) for key in keys) for row in rows[: most // 2]]
    if not found:
        raise DataError(f"{place} has no humaneval/HumanEval.jsonl.gz and no gsm8k/test.jsonl: give --texts")
    return found
