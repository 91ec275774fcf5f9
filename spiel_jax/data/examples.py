"""Tokenized examples, and reading a source into them with an account of what was left out."""

import collections
import dataclasses
import logging
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import tqdm

from spiel_jax.data import fields
from spiel_jax.data.chat import Encoded, Encoder
from spiel_jax.data.files import DataError, MalformedRow, Row
from spiel_jax.data.formats import Example, parse_row
from spiel_jax.data.reports import SourceReport, warn_of_losses, warn_of_unread
from spiel_jax.data.rows import read_rows
from spiel_jax.data.sources import SourceSpec
from spiel_jax.data.writing import Rendered, TemplateMismatch

_log = logging.getLogger(__name__)

_CALL = 256  # examples per call of the tokenizer, which works on them in parallel
_RENDERED = 1_000_000  # characters, or so, that are rendered at a time
_LOGGED = 5  # malformed rows of a source which are logged one by one
# Turns beyond this many characters per token of the longest example are not even tokenized: text
# has 3 to 5, and the longest chats are many times a row.
_CHARACTERS = 8
_PROBLEMS = {  # of several examples, of one
    "mismatched": ("are not what `generate` will ask for", "is not what `generate` will ask for"),
    "endless": ("do not teach to stop", "does not teach to stop"),
}
_REMEDY = "Give a chat template that fits (data.chat_template=FILE); data.on_mismatch"


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
    on_mismatch: str = "warn",
    vocab_size: int | None = None,
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
      on_mismatch: what happens when `generate` will ask otherwise than an example teaches, or the example
        does not teach to stop: ``warn`` counts them and shows the first, ``error`` raises.
      vocab_size: tokens that the model has an embedding for; a row with another is malformed. ``None``:
        any number.
      progress: on a terminal, show a progress bar if reading takes long.

    Raises:
      MalformedRow: a row is malformed and ``on_malformed`` is ``error``.
      DataError: the source cannot be read, or an example is refused by ``on_mismatch``.
      TemplateError: the chat template cannot be used.
    """
    rows = read_rows(source.path, split=source.split, name=source.name)
    with ThreadPoolExecutor(max_workers=1) as beside:
        reader = _Reader(source, encoder, max_tokens, truncate, on_malformed, on_mismatch, vocab_size, beside)
        for row in tqdm.tqdm(
            rows, f"tokenizing {source.path}", unit=" rows", delay=1, disable=None if progress else True
        ):
            reader.take(row)
            if reader.full:
                break
        reader.finish()
    return reader.result()


class _Read(NamedTuple):
    """A row that has been read."""

    location: str
    example: Example
    shortened: bool


class _Text(NamedTuple):
    """A text to be tokenized."""

    location: str
    rendered: Rendered
    shortened: bool


class _Reader:
    """Makes examples of rows, many at a time, in their order."""

    def __init__(
        self,
        source: SourceSpec,
        encoder: Encoder,
        max_tokens: int,
        truncate: str,
        on_malformed: str,
        on_mismatch: str,
        vocab_size: int | None,
        beside: Executor,
    ):
        self._source = source
        self._beside = beside
        self._encoder = encoder
        self._max_tokens = max_tokens
        self._truncate = truncate
        self._on_malformed = on_malformed
        self._on_mismatch = on_mismatch
        self._vocab_size = vocab_size
        self._counts: collections.Counter[str] = collections.Counter()
        self._unread: collections.Counter[str] = collections.Counter()
        self._unseen = set((source.columns or {}).values())
        self._first: dict[str, str] = {}  # location and problem of the first example of a kind
        self._read: list[_Read | MalformedRow] = []
        self._writing: tuple[list[_Read | MalformedRow], Future[Any]] | None = None
        self._characters = 0  # in what has been read
        self._texts: list[_Text] = []
        self._kept: list[Encoded] = []

    @property
    def full(self) -> bool:
        """Whether the source has given as many examples as are wanted."""
        return self._wanted < 1

    @property
    def _wanted(self) -> float:
        limit = self._source.max_examples
        return float("inf") if limit is None else limit - len(self._kept)

    def take(self, row: Row) -> None:
        try:
            if self._unseen and isinstance(row.value, Mapping):
                value = row.value
                self._unseen -= {p for p in self._unseen if p in value or fields.at(value, p) is not None}
            example = parse_row(row, self._source.format, self._source.columns)
            self._unread.update(example.ignored)
            shown = example
            if self._truncate == "end":
                shown = _shorten(example, _CHARACTERS * self._max_tokens)
            self._read.append(_Read(row.location, shown, shown is not example))
            self._characters += sum(len(message["content"]) for message in shown.messages)
            self._characters += sum(map(len, shown.plain or ()))
        except MalformedRow as error:
            self._read.append(error)
        if len(self._read) >= min(self._wanted, _CALL) or self._characters > _RENDERED:
            self._write()

    def finish(self) -> None:
        if self._unseen and not self.full:  # else the rest of the rows may have it
            raise DataError(
                f"{self._source.path}: no row has the key {min(self._unseen)!r} that columns names: "
                "correct it, or remove it from columns"
            )
        if not self.full:
            self._write()
            self._take_texts()
            self._encode()

    def _write(self) -> None:
        """Has texts made of the rows that have been read, while those of earlier ones are tokenized."""
        read, self._read, self._characters = self._read, [], 0
        examples = [one.example for one in read if isinstance(one, _Read)]
        writing = read, self._beside.submit(self._encoder.render_all, examples)
        self._take_texts()
        self._writing = writing
        if self._source.max_examples is not None:  # no row is read that may not be wanted
            self._take_texts()

    def _take_texts(self) -> None:
        """Takes the texts that have been made."""
        if self._writing is None:
            return
        (read, texts_of), self._writing = self._writing, None
        written = iter(texts_of.result())
        for one in read:
            self._counts["read"] += 1
            if isinstance(one, MalformedRow):
                self._skip(one)
                continue
            texts = next(written)
            if isinstance(texts, TemplateMismatch):
                self._skip(MalformedRow(one.location, str(texts)), texts)
                continue
            self._counts["cut_away" if one.shortened else "unsupervised"] += not texts
            self._counts["split"] += max(0, len(texts) - 1)
            self._texts += [_Text(one.location, text, one.shortened) for text in texts]
            if len(self._texts) >= min(self._wanted, _CALL):
                self._encode()
            if self.full:
                break

    def _skip(self, problem: MalformedRow, cause: Exception | None = None) -> None:
        if self._on_malformed == "error":
            raise problem from cause
        self._counts["malformed"] += 1
        if self._counts["malformed"] <= _LOGGED:
            _log.warning("skipped a malformed row: %s", problem)

    def _encode(self) -> None:
        """Makes examples of the texts that have been written."""
        texts, self._texts = self._texts, []
        encodings = self._encoder.encode([text.rendered for text in texts])
        for (location, rendered, shortened), encoded in zip(texts, encodings, strict=True):
            if self.full:
                self._counts["split"] -= 1  # the rest of a conversation
                continue
            outcome, example = _cut(encoded, self._max_tokens, self._truncate)
            if example is not None and (unknown := self._unknown(example)):
                self._skip(MalformedRow(location, unknown))
                continue
            self._counts["truncated" if shortened and outcome == "whole" else outcome] += 1
            if example is not None:
                self._check(location, rendered, encoded)
                self._kept.append(example)
                self._counts["last_turn_only"] += rendered.last_turn_only

    def _unknown(self, example: Encoded) -> str | None:
        """Which token of an example the model has no embedding for, in words."""
        if self._vocab_size is None or (largest := int(example.tokens.max())) < self._vocab_size:
            return None
        return (
            f"the token {self._encoder.name(largest)!r} has the number {largest}, and the model has "
            f"{self._vocab_size} tokens: take it out, or give the model's own tokenizer (model.tokenizer) or "
            "chat template (data.chat_template)"
        )

    def _check(self, location: str, rendered: Rendered, encoded: Encoded) -> None:
        """Notes what generation will not find as it was taught."""
        self._counts["plain"] += rendered.framed and rendered.spans[0][0] > 0  # it has a prompt
        if rendered.mismatch is not None:
            self._note("mismatched", location, rendered.mismatch)
        stops, learnt = self._encoder.stops, encoded.tokens[encoded.supervised]
        if stops.keys().isdisjoint(learnt.tolist()):
            self._note(
                "endless",
                location,
                f"what is learnt ends in {self._encoder.name(int(learnt[-1]))!r}, and `generate` stops at "
                + (" or ".join(map(repr, stops.values())) or "no token"),
            )

    def _note(self, kind: str, location: str, problem: str) -> None:
        if self._on_mismatch == "error":
            raise DataError(f"{location} {_PROBLEMS[kind][1]}: {problem}. {_REMEDY}=warn trains all the same")
        self._counts[kind] += 1
        self._first.setdefault(kind, f"{location}: {problem}")

    def result(self) -> tuple[Examples, SourceReport]:
        examples, counts = Examples.of(self._kept), self._counts
        fields = {field.name for field in dataclasses.fields(SourceReport)}
        report = SourceReport(
            path=self._source.path,
            examples=len(examples),
            tokens=len(examples.tokens),
            supervised_tokens=int(examples.supervised.sum()),
            **{name: count for name, count in counts.items() if name in fields},
        )
        if report.malformed or report.last_turn_only:
            _log.warning("%s", report)
        warn_of_losses(report)
        warn_of_unread(report.path, self._unread)
        if counts["plain"]:  # as good a way to learn as any
            _log.info(
                "%s: %d of %d examples are learnt as plain text, and `generate` asks in a conversation: "
                "data.style=chat teaches what it asks",
                *(report.path, counts["plain"], report.examples),
            )
        for kind, first in self._first.items():
            _log.warning(
                "%s: %d of %d examples %s. The first, %s. %s=error refuses",
                *(report.path, counts[kind], report.examples, _PROBLEMS[kind][0], first, _REMEDY),
            )
        return examples, report


def _shorten(example: Example, characters: int) -> Example:
    """Ends a conversation with the assistant's turn that brings it to so many characters."""
    if example.plain is not None and not example.messages:
        # A text ends anywhere: what is left must be longer than a row for certain, so that it is cut again.
        text = example.plain[1][: 8 * characters]
        return example if text == example.plain[1] else Example([], ("", text))
    total = 0
    for number, message in enumerate(example.messages[:-1], start=1):
        total += len(message["content"])
        if total >= characters and message["role"] == "assistant":
            return dataclasses.replace(example, messages=example.messages[:number])
    return example


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
