"""From sources to batches: ``load_data`` is the entry.

Batches are dicts of arrays [B, S], described at `packing.fill_row`.
"""

import dataclasses
import datetime
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import grain
import numpy as np

from spiel_jax.data import mixture
from spiel_jax.data.chat import Encoder
from spiel_jax.data.examples import Examples, SourceReport, read_examples
from spiel_jax.data.fingerprint import data_fingerprint, examples_fingerprint
from spiel_jax.data.packing import Plan, empty_row, fill_row, plan_rows
from spiel_jax.data.rows import EmptyDataset
from spiel_jax.data.sources import SourceSpec
from spiel_jax.errors import SpielError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Batch = dict[str, np.ndarray]
"""Arrays [B, S]: tokens, labels, positions, segment_ids (int32), weights (float32)."""


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What to train and evaluate on.

    An epoch has as many examples as the sources hold together. Without weights it is each of them
    once; with weights, sources with more weight repeat, reshuffled, and the others are seen in
    part, to be continued in the next epoch.

    Attributes:
      sources: where training examples come from.
      heldout: what is kept for evaluation: a number of examples (int) or a share of them (float)
        out of ``sources``, chosen by ``seed``; or sources of their own.
      sequence_length: slots of a row.
      packing: put several examples into a row, else one example per row.
      truncate: examples too long for a row are cut at their ``end`` (an example of which nothing to
        learn is left is dropped), or dropped (``skip``).
      on_malformed: ``error`` refuses a malformed row, ``skip`` leaves it out; counted and logged.
      on_mismatch: an example that teaches other than what `generate` will ask, or does not teach to stop,
        is counted and the first of a source is shown (``warn``), or refused (``error``).
      style: how rows with a prompt and a completion are written: ``chat``, ``plain`` or ``auto``
        (see `chat.Encoder`).
      seed: determines the held-out examples and every epoch's order.

    Raises:
      SpielError: an option is not one of those allowed.
    """

    sources: tuple[SourceSpec, ...]
    heldout: int | float | tuple[SourceSpec, ...] = 0
    sequence_length: int = 2048
    packing: bool = True
    truncate: str = "end"
    on_malformed: str = "error"
    on_mismatch: str = "warn"
    style: str = "auto"
    seed: int = 0

    def __post_init__(self):
        _check_sources("sources", self.sources)
        weighted = [source.weight is not None for source in self.sources]
        if any(weighted) and not all(weighted):
            raise SpielError(
                "weights are relative to each other: give one to every source or to none; without: "
                + ", ".join(source.path for source in self.sources if source.weight is None)
            )
        if isinstance(self.heldout, bool) or not isinstance(self.heldout, int | float | tuple):
            raise SpielError(
                f"heldout must be a number of examples, a share of them or a tuple of sources, "
                f"not {self.heldout!r}"
            )
        if isinstance(self.heldout, tuple):
            _check_sources("heldout", self.heldout)
        elif isinstance(self.heldout, float) and not 0 < self.heldout < 1:
            raise SpielError(f"heldout as a share must be above 0 and below 1, not {self.heldout}")
        elif self.heldout < 0:
            raise SpielError(f"heldout must not be negative: {self.heldout}")
        for field, allowed in (
            ("truncate", ("end", "skip")),
            ("on_malformed", ("error", "skip")),
            ("on_mismatch", ("warn", "error")),
        ):
            if getattr(self, field) not in allowed:
                raise SpielError(
                    f"unknown {field} {getattr(self, field)!r}: expected one of {', '.join(allowed)}"
                )
        if not isinstance(self.sequence_length, int) or self.sequence_length < 1:
            raise SpielError(f"sequence_length must be an int from 1, not {self.sequence_length!r}")
        if not isinstance(self.seed, int) or not 0 <= self.seed < 2**63:
            raise SpielError(f"seed must be an int from 0 to 2**63 - 1, not {self.seed!r}")


def _check_rows(rows: Sequence[int], batch_size: int):
    if not rows or min(rows) < 0 or max(rows) >= batch_size:
        raise ValueError(f"rows must be some of 0 to {batch_size - 1}, not {list(rows)}")


def _check_sources(field: str, sources: object):
    if not isinstance(sources, tuple) or not all(isinstance(s, SourceSpec) for s in sources):
        raise SpielError(f"{field} must be a tuple of SourceSpec, not {sources!r}")
    if not sources:
        raise SpielError(f"{field} is empty: give at least one SourceSpec")


@dataclasses.dataclass(frozen=True)
class Report:
    """What was loaded.

    Attributes:
      sources: the account of each training source, before any are held out.
      heldout_sources: the account of each source of held-out examples, where they have their own.
      examples: examples of an epoch of training (distinct ones, if the sources have no weights).
      tokens: tokens of an epoch.
      supervised_tokens: those of them that are learnt.
      rows: rows of the first epoch.
      fill: the share of these rows' slots that hold a token.
      heldout_examples: examples held out.
      heldout_rows: rows of the held-out examples, before any are added to complete a batch.
    """

    sources: tuple[SourceReport, ...]
    heldout_sources: tuple[SourceReport, ...]
    examples: int
    tokens: int
    supervised_tokens: int
    rows: int
    fill: float
    heldout_examples: int
    heldout_rows: int


class _Rows:
    """The rows of several epochs as one random-access source for Grain."""

    def __init__(self, examples: Examples, plans: Sequence[Plan]):
        self._examples = examples
        self._plans = plans
        self._starts = np.cumsum([0, *map(len, plans)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> Batch:
        epoch = int(np.searchsorted(self._starts, index, side="right")) - 1
        return fill_row(self._examples, self._plans[epoch], index - int(self._starts[epoch]))


class _Part:
    """Some rows of every whole batch, as a source for Grain."""

    def __init__(self, rows: _Rows, batch_size: int, chosen: Sequence[int]):
        self._rows = rows
        self._batch_size = batch_size
        self._chosen = chosen

    def __len__(self) -> int:
        return len(self._rows) // self._batch_size * len(self._chosen)

    def __getitem__(self, index: int) -> Batch:
        batch, number = divmod(index, len(self._chosen))
        return self._rows[batch * self._batch_size + self._chosen[number]]


class Data:
    """Tokenized examples, and the batches made from them. Made by `load_data`.

    Attributes:
      config: what was asked for.
      report: what was found.
      fingerprint: digests of it: see `fingerprint.data_fingerprint`.
    """

    def __init__(
        self,
        config: DataConfig,
        train: Examples,
        sizes: Sequence[int],
        heldout: Examples,
        reports: tuple[tuple[SourceReport, ...], tuple[SourceReport, ...]],
        prints: Sequence[Mapping[str, Any]],
    ):
        self.config = config
        self._train = train
        self._sizes = sizes
        weights = [source.weight for source in config.sources if source.weight is not None]
        self._counts = mixture.epoch_counts(sizes, weights or None)
        self._plans: list[Plan] = []
        self._heldout = heldout
        self._heldout_plan = self._plan(np.arange(len(heldout)), heldout)
        first = self._epoch_plan(0)
        paths = [source.path for source in config.sources]
        self.fingerprint = data_fingerprint(list(zip(paths, prints, strict=True)), heldout, first)
        learnt = np.add.reduceat(train.supervised, train.offsets[:-1], dtype=np.int64)
        self.report = Report(
            sources=reports[0],
            heldout_sources=reports[1],
            examples=len(first.examples),
            tokens=int(train.lengths[first.examples].sum()),
            supervised_tokens=int(learnt[first.examples].sum()),
            rows=len(first),
            fill=first.fill,
            heldout_examples=len(heldout),
            heldout_rows=len(self._heldout_plan),
        )

    def _plan(self, order: np.ndarray, examples: Examples) -> Plan:
        config = self.config
        return plan_rows(order, examples.lengths, config.sequence_length, packing=config.packing)

    def _epoch_plan(self, epoch: int) -> Plan:
        for e in range(len(self._plans), epoch + 1):
            order = mixture.epoch_order(self._sizes, self._counts, self.config.seed, e)
            self._plans.append(self._plan(order, self._train))
        return self._plans[epoch]

    def rows(self, epoch: int) -> int:
        """The number of rows of an epoch (epochs pack a little differently)."""
        return len(self._epoch_plan(epoch))

    def _train_plans(self, batch_size: int, epochs: int | None, steps: int | None) -> tuple[list[Plan], int]:
        """The plans of the epochs of training, and the number of its batches."""
        if (epochs is None) == (steps is None):
            raise ValueError(f"give either epochs or steps, not epochs={epochs}, steps={steps}")
        for name, value in (("batch_size", batch_size), ("epochs", epochs), ("steps", steps)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        if epochs is None:
            assert steps is not None
            epochs, rows = 1, self.rows(0)
            while rows < steps * batch_size:
                rows += self.rows(epochs)
                epochs += 1
        plans = [self._epoch_plan(epoch) for epoch in range(epochs)]
        rows = sum(map(len, plans))
        if rows < batch_size:
            raise SpielError(
                f"{rows} rows in {epochs} epochs do not fill one batch of {batch_size}: lower "
                "batch_size or sequence_length, or train for more epochs"
            )
        return plans, rows // batch_size if steps is None else steps

    def train_dataset(
        self,
        batch_size: int,
        *,
        epochs: int | None = None,
        steps: int | None = None,
        rows: Sequence[int] | None = None,
    ) -> grain.MapDataset[Batch]:
        """The batches of training as a random-access dataset; ``len`` of it is their number.

        The rows of all epochs follow each other without a gap, so a batch may hold the last rows
        of an epoch and the first of the next. Only at the very end are up to ``batch_size - 1``
        rows dropped, which do not fill a batch.

        Args:
          batch_size: rows of a batch.
          epochs: how many epochs, or
          steps: how many batches, over as many epochs as they need.
          rows: make only these rows of every batch, for a process that needs no others.

        Raises:
          SpielError: there are not enough rows for one batch.
          ValueError: not exactly one of epochs and steps, one below 1, or ``rows`` that a batch does
            not have.
        """
        plans, count = self._train_plans(batch_size, epochs, steps)
        source = _Rows(self._train, plans)
        if rows is not None:
            _check_rows(rows, batch_size)
            source, batch_size = _Part(source, batch_size, rows), len(rows)
        return grain.MapDataset.source(source).batch(batch_size, drop_remainder=True)[:count]

    def train_iterator(
        self,
        batch_size: int,
        *,
        epochs: int | None = None,
        steps: int | None = None,
        rows: Sequence[int] | None = None,
    ) -> grain.DatasetIterator[Batch]:
        """Iterates over `train_dataset`, one thread ahead.

        ``get_state()`` gives the position as a small dict, ``set_state`` continues from one: the
        batches that follow are those of the uninterrupted run, bit for bit. The position does not
        depend on ``rows``.
        """
        # Rows are made by copying: one thread is plenty, and a deep buffer would only cost memory.
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
        dataset = self.train_dataset(batch_size, epochs=epochs, steps=steps, rows=rows)
        return iter(dataset.to_iter_dataset(options))

    def batch_tokens(
        self, batch_size: int, *, epochs: int | None = None, steps: int | None = None
    ) -> np.ndarray:
        """How many tokens each batch of `train_dataset` holds, in all its rows: int64 [batches]."""
        plans, count = self._train_plans(batch_size, epochs, steps)
        slots = self._train.lengths - 1
        tokens = np.concatenate([np.add.reduceat(slots[p.examples], p.starts[:-1]) for p in plans])
        return tokens[: count * batch_size].reshape(count, batch_size).sum(axis=1)

    def heldout_batches(self, batch_size: int, rows: Sequence[int] | None = None) -> list[Batch]:
        """The held-out examples in whole batches; rows of padding complete the last one.

        Packed like the training rows and always in the same order. Empty if nothing is held out.

        Args:
          batch_size: rows of a batch.
          rows: make only these rows of every batch.

        Raises:
          ValueError: batch_size is below 1, or ``rows`` that a batch does not have.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {batch_size}")
        rows = range(batch_size) if rows is None else rows
        _check_rows(rows, batch_size)
        plan = self._heldout_plan

        def make(row: int) -> Batch:
            within = row < len(plan)
            return fill_row(self._heldout, plan, row) if within else empty_row(plan.sequence_length)

        batches = []
        for start in range(0, len(plan), batch_size):
            made = [make(start + row) for row in rows]
            batches.append({key: np.stack([row[key] for row in made]) for key in made[0]})
        return batches


def load_data(
    config: DataConfig,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    date: datetime.datetime | None = None,
    vocab_size: int | None = None,
    progress: bool = True,
) -> Data:
    """Reads, tokenizes and splits the data.

    Args:
      config: what to read, and how.
      tokenizer: a fast tokenizer, with the chat template of the model (Tülu's is used when it has
        none: see `templates.chat_template`).
      date: what a chat template that asks for the date is told; default: now.
      vocab_size: tokens that the model has an embedding for; a row with another is malformed.
      progress: on a terminal, show progress bars for what takes long.

    Raises:
      DataError: a source cannot be read; `MalformedRow`: a row is malformed, and refused;
        `EmptyDataset`: a source, or what holding out leaves of it, has no examples.
      SpielError: the tokenizer cannot be used, or weights leave a source without an example.
    """
    encoder = Encoder(tokenizer, config.style, date)

    def read(sources: tuple[SourceSpec, ...]) -> tuple[list[Examples], tuple[SourceReport, ...]]:
        parts, reports = [], []
        for source in sources:
            examples, report = read_examples(
                source,
                encoder,
                max_tokens=config.sequence_length + 1,  # the last token is only a target
                truncate=config.truncate,
                on_malformed=config.on_malformed,
                on_mismatch=config.on_mismatch,
                vocab_size=vocab_size,
                progress=progress,
            )
            if not len(examples):
                raise EmptyDataset(f"no examples: {report}")
            parts.append(examples)
            reports.append(report)
        return parts, tuple(reports)

    parts, reports = read(config.sources)
    sizes, prints = np.array([len(part) for part in parts]), [examples_fingerprint(part) for part in parts]
    everything = Examples.of([example for part in parts for example in part])
    if isinstance(config.heldout, tuple):
        heldout_parts, heldout_reports = read(config.heldout)
        heldout = Examples.of([example for part in heldout_parts for example in part])
        return Data(config, everything, sizes.tolist(), heldout, (reports, heldout_reports), prints)

    count = config.heldout
    if isinstance(count, float):
        count = max(1, round(count * len(everything)))
    chosen = mixture.heldout_mask(len(everything), count, config.seed)
    left = [int((~part).sum()) for part in np.split(chosen, np.cumsum(sizes)[:-1])]
    for report, size in zip(reports, left, strict=True):
        if not size:
            raise EmptyDataset(f"holding out {count} examples leaves none to train on: {report}")
    train = everything.select(np.flatnonzero(~chosen))
    return Data(config, train, left, everything.select(np.flatnonzero(chosen)), (reports, ()), prints)
