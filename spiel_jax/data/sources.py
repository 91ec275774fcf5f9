"""Where examples come from, as a configuration says it."""

import dataclasses
from collections.abc import Mapping

from spiel_jax.data.formats import FORMATS
from spiel_jax.errors import SpielError
from spiel_jax.places import refuse_remote


@dataclasses.dataclass(frozen=True)
class SourceSpec:
    """One source of examples.

    Attributes:
      path: a local file or folder, several by wildcards, ``package:NAME``, or a hub dataset id: see
        `rows.read_rows`.
      weight: the share of an epoch's examples drawn from this source, relative to the other
        sources' weights. ``None``, for all sources or for none: every example once per epoch.
      format: what the rows look like (see `formats.parse_row`); ``None`` detects it row by row.
      split: the split of a hub dataset, or of a folder whose files have splits.
      name: the configuration name of a hub dataset.
      columns: what the rows call keys of their format, ``{"instruction": "question", "output": "reply"}``;
        what lies in an object or a list by its path, ``answers.text.0``.
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
    columns: Mapping[str, str] | None = None

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
        if self.columns is not None:
            _check_columns(self.path, self.format, self.columns)


def _check_columns(path: str, format: str | None, columns: object):
    if not isinstance(columns, Mapping) or not all(
        isinstance(word, str) and word for pair in columns.items() for word in pair
    ):
        raise SpielError(
            f'columns of {path} must say what rows call keys, as {{"instruction": "question"}}, '
            f"not {columns!r}"
        )
    known = set[str]().union(*(FORMATS[name].reads for name in ([format] if format else FORMATS)))
    if unknown := sorted(columns.keys() - known):
        raise SpielError(
            f"columns of {path}: no format{f' {format!r}' if format else ''} has a key {unknown[0]!r}: give "
            f"{{key: its name in the rows}}, with keys from {', '.join(sorted(known))}"
        )
    if len(set(columns.values())) < len(columns):
        raise SpielError(f"columns of {path}: two keys have the same name in the rows: {dict(columns)}")
