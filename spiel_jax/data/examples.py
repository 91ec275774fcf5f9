"""Tokenized examples, and reading a source into them with an account of what was left out."""

import collections
import dataclasses
import logging
from collections.abc import Iterator, Sequence

import numpy as np
import tqdm

from spiel_jax.data.chat import Encoded, Encoder, Rendered, TemplateMismatch
from spiel_jax.data.formats import FORMATS, Example, parse_row
from spiel_jax.data.rows import MalformedRow, read_rows
from spiel_jax.errors import SpielError
from spiel_jax.places import refuse_remote

_log = logging.getLogger(__name__)

_CALL = 256  # examples per call of the tokenizer, which works on them in parallel
_LOGGED = 5  # malformed rows of a source which are logged one by one
# Turns beyond this many characters per token of the longest example are not even tokenized: text
# has 3 to 5, and the longest chats are many times a row.
_CHARACTERS = 8


@dataclasses.dataclass(frozen=True)
class SourceSpec:
    """One source of examples.

    Attributes:
      path: a local ``.json``, ``.jsonl`` (optionally ``.gz``) or ``.parquet`` file,
        ``package:NAME``, or a hub dataset id: see `rows.read_rows`.
      weight: the share of an epoch's examples drawn from this source, relative to the other
        sources' weights. ``None``, for all sources or for none: every example once per epoch.
      format: what the rows look like (see `formats.parse_row`); ``None`` detects it row by row.
      split: the split of a hub dataset.
      name: the configuration name of a hub dataset.
      max_examples: keep the first so many examples of the source (rows that are skipped do not
        count); ``None`` keeps all.

    Raises:
      SpielError: an option is not one of those allowed.
    """

    path: str
    weight: float | None = None
    format: str | None = None
    split: str = "train"
    name: str | None = None
    max_examples: int | None = None

    def __post_init__(self):
        if not isinstance(self.path, str) or not self.path:
            raise SpielError(f"path must be a non-empty string, not {self.path!r}")
        refuse_remote(self.path, "the data source")
        if self.weight is not None and not 0 < self.weight < float("inf"):
            raise SpielError(f"weight of {self.path} must be a positive number, not {self.weight}")
        if self.format is not None and self.format not in FORMATS:
            raise SpielError(
                f"unknown format {self.format!r} for {self.path}: expected one of "
                f"{', '.join(FORMATS)}, or None to detect it"
            )
        limit = self.max_examples
        if limit is not None and (not isinstance(limit, int) or limit < 1):
            raise SpielError(f"max_examples of {self.path} must be an int from 1, not {limit!r}")


@dataclasses.dataclass(frozen=True)
class SourceReport:
    """What became of a source's rows.

    ``read = examples + malformed + unsupervised + too_long + cut_away``.

    Attributes:
      path: the source.
      read: rows read.
      malformed: skipped, since they do not have their format or the chat template refuses them.
      unsupervised: skipped, without a token to learn (nobody speaks as the assistant).
      too_long: skipped, longer than a row (``truncate="skip"``).
      cut_away: skipped, since truncation cut every token to learn.
      examples: kept.
      truncated: kept, but tokens to learn were cut from their end.
      last_turn_only: kept, but only the last assistant turn could be located (see
        `chat.Encoder.render`).
      tokens: tokens kept.
      supervised_tokens: tokens kept which are learnt.
    """

    path: str
    read: int = 0
    malformed: int = 0
    unsupervised: int = 0
    too_long: int = 0
    cut_away: int = 0
    examples: int = 0
    truncated: int = 0
    last_turn_only: int = 0
    tokens: int = 0
    supervised_tokens: int = 0

    def __str__(self) -> str:
        skipped = ("malformed", "unsupervised", "too_long", "cut_away")
        counts = ", ".join(f"{getattr(self, field)} {field}" for field in skipped)
        return f"{self.path}: {self.read} rows read, {counts}, {self.examples} kept"


@dataclasses.dataclass(frozen=True)
class Examples:
    """Tokenized examples of any lengths, one after the other.

    Attributes:
      tokens: int32 [T].
      supervised: bool [T], the tokens to learn.
      offsets: int64 [N + 1], example i is [offsets[i], offsets[i + 1]).
    """

    tokens: np.ndarray
    supervised: np.ndarray
    offsets: np.ndarray

    @classmethod
    def of(cls, examples: Sequence[Encoded]) -> "Examples":
        """Puts examples together."""
        return cls(
            np.concatenate([np.zeros(0, np.int32), *(e.tokens for e in examples)]),
            np.concatenate([np.zeros(0, bool), *(e.supervised for e in examples)]),
            np.cumsum([0, *(len(e.tokens) for e in examples)], dtype=np.int64),
        )

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> Encoded:
        if not 0 <= index < len(self):  # also what ends iteration
            raise IndexError(f"example {index} of {len(self)}")
        part = slice(self.offsets[index], self.offsets[index + 1])
        return Encoded(self.tokens[part], self.supervised[part])

    def __iter__(self) -> Iterator[Encoded]:
        return map(self.__getitem__, range(len(self)))

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each example, int64 [N]."""
        return np.diff(self.offsets)

    def select(self, indices: np.ndarray) -> "Examples":
        """A copy of some of the examples."""
        return Examples.of([self[int(index)] for index in indices])


def read_examples(
    source: SourceSpec,
    encoder: Encoder,
    *,
    max_tokens: int,
    truncate: str,
    on_malformed: str,
    progress: bool = True,
) -> tuple[Examples, SourceReport]:
    """Reads, tokenizes and cuts the examples of a source.

    An example ends with its last token to learn, since no loss depends on what follows.

    Args:
      source: what to read.
      encoder: writes and tokenizes the examples.
      max_tokens: the longest example.
      truncate: what happens to longer ones: ``end`` keeps the beginning (turns beyond 8 characters
        per token are cut before they are tokenized), ``skip`` leaves them out.
      on_malformed: ``skip`` counts malformed rows and logs the first ones, ``error`` raises.
      progress: on a terminal, show a progress bar if reading takes long.

    Raises:
      MalformedRow: a row is malformed and ``on_malformed`` is ``error``.
      DataError: the source cannot be read.
    """
    counts: collections.Counter[str] = collections.Counter()
    kept: list[Encoded] = []
    pending: list[tuple[Rendered, bool]] = []  # whether the example was shortened

    def encode_pending():
        encodings = encoder.encode([rendered for rendered, _ in pending])
        for (rendered, shortened), encoded in zip(pending, encodings, strict=True):
            outcome, example = _cut(encoded, max_tokens, truncate)
            counts["truncated" if shortened and outcome == "whole" else outcome] += 1
            if example is not None:
                kept.append(example)
                counts["last_turn_only"] += rendered.last_turn_only
        pending.clear()

    rows = read_rows(source.path, split=source.split, name=source.name)
    bar = tqdm.tqdm(
        rows, f"tokenizing {source.path}", unit=" rows", delay=1, disable=None if progress else True
    )
    for row in bar:
        counts["read"] += 1
        try:
            example = parse_row(row, source.format)
            shown = _shorten(example, _CHARACTERS * max_tokens) if truncate == "end" else example
            rendered = _render(shown, row.location, encoder)
        except MalformedRow as error:
            if on_malformed == "error":
                raise
            counts["malformed"] += 1
            if counts["malformed"] <= _LOGGED:
                _log.warning("skipped a malformed row: %s", error)
            continue
        if rendered is None:
            counts["unsupervised"] += 1
            continue
        pending.append((rendered, shown is not example))
        wanted = _CALL if source.max_examples is None else source.max_examples - len(kept)
        if len(pending) >= min(wanted, _CALL):
            encode_pending()
            if len(kept) == source.max_examples:
                break
    encode_pending()

    examples = Examples.of(kept)
    report = SourceReport(
        path=source.path,
        read=counts["read"],
        malformed=counts["malformed"],
        unsupervised=counts["unsupervised"],
        too_long=counts["too_long"],
        cut_away=counts["cut_away"],
        examples=len(examples),
        truncated=counts["truncated"],
        last_turn_only=counts["last_turn_only"],
        tokens=len(examples.tokens),
        supervised_tokens=int(examples.supervised.sum()),
    )
    if report.malformed or report.last_turn_only:
        _log.warning("%s", report)
    return examples, report


def _shorten(example: Example, characters: int) -> Example:
    """Ends a conversation with the assistant's turn that brings it to so many characters."""
    total = 0
    for number, message in enumerate(example.messages[:-1], start=1):
        total += len(message["content"])
        if total >= characters and message["role"] == "assistant":
            return dataclasses.replace(example, messages=example.messages[:number])
    return example


def _render(example: Example, location: str, encoder: Encoder) -> Rendered | None:
    try:
        return encoder.render(example)
    except TemplateMismatch as error:
        raise MalformedRow(location, str(error)) from error


def _cut(encoded: Encoded, max_tokens: int, truncate: str) -> tuple[str, Encoded | None]:
    """Names what becomes of an example, and gives what is left of it."""
    learnt = np.flatnonzero(encoded.supervised)
    if not (learnt > 0).any():  # the first token is nobody's target
        return "unsupervised", None
    length = int(learnt[-1]) + 1
    outcome = "whole"
    if length > max_tokens:
        if truncate == "skip":
            return "too_long", None
        learnt = learnt[learnt < max_tokens]
        if not (learnt > 0).any():
            return "cut_away", None
        length = int(learnt[-1]) + 1
        outcome = "truncated"
    return outcome, Encoded(encoded.tokens[:length], encoded.supervised[:length])
