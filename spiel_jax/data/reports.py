"""What became of the rows of a source, and what must be said of it."""

import dataclasses
import logging
from collections.abc import Mapping, Sequence

_log = logging.getLogger(__name__)

_LOUD = 0.05  # the share of a source that may be lost before it is worth a warning
_NAMED = 12  # keys of a source's rows which are named in a message
_REMEDIES = {
    "unsupervised": "without anything to learn: no assistant speaks, or all it says is marked as not to be",
    "too_long": "longer than data.sequence_length: raise it, or cut them with data.truncate=end",
    "cut_away": "with all that is to be learnt beyond data.sequence_length: raise it",
}


@dataclasses.dataclass(frozen=True)
class SourceReport:
    """What became of a source's rows.

    ``read + split = examples + malformed + unsupervised + too_long + cut_away``.

    Attributes:
      path: the source.
      read: rows read.
      malformed: skipped, since they do not have their format or the chat template refuses them.
      unsupervised: skipped, without a token to learn (nobody speaks as the assistant).
      too_long: skipped, longer than a row (``truncate="skip"``).
      cut_away: skipped, since truncation cut every token to learn.
      examples: kept.
      truncated: kept, but tokens to learn were cut from their end.
      last_turn_only: kept, but earlier assistant turns could not be written and are not learnt.
      split: examples beyond one of a row, where the chat template does not write all turns of a conversation
        as it asks for them (see `chat.Encoder.render_all`).
      mismatched: kept, but `generate` will ask otherwise than they teach.
      endless: kept, but no token at which `generate` stops is learnt.
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
    split: int = 0
    mismatched: int = 0
    endless: int = 0
    tokens: int = 0
    supervised_tokens: int = 0

    @property
    def dropped(self) -> int:
        """What was read and is not kept."""
        return sum(getattr(self, field) for field in ("malformed", *_REMEDIES))

    def __str__(self) -> str:
        counts = ", ".join(f"{getattr(self, field)} {field}" for field in ("malformed", *_REMEDIES))
        split = f" and {self.split} split off" if self.split else ""
        cut = f" ({self.truncated} truncated)" if self.truncated else ""
        return f"{self.path}: {self.read} rows read{split}, {counts}, {self.examples} kept{cut}"


def warn_of_losses(report: SourceReport) -> None:
    """Says what filtering and truncation took of a source, if it is more than a few."""
    taken, rows = report.dropped - report.malformed, report.read + report.split
    if taken > _LOUD * rows:
        whys = [f"{n} {why}" for field, why in _REMEDIES.items() if (n := getattr(report, field))]
        _log.warning("%s: %d of %d rows are left out: %s", report.path, taken, rows, "; ".join(whys))
    if report.truncated > _LOUD * report.examples:
        _log.warning(
            "%s: %d of %d examples are cut at their end, being longer than data.sequence_length: raise it, "
            "or leave them out with data.truncate=skip",
            *(report.path, report.truncated, report.examples),
        )


def warn_of_unread(path: str, rows: Mapping[str, int]) -> None:
    """Says which keys of a source's rows nobody reads.

    Args:
      path: the source.
      rows: how many rows have each key.
    """
    if not rows:
        return
    often = sorted(rows, key=lambda key: (-rows[key], key))
    shown = ", ".join(f"{key!r} ({rows[key]} rows)" for key in often[:_NAMED])
    more = f" and {len(often) - _NAMED} more" if len(often) > _NAMED else ""
    _log.warning(
        "%s: these keys of rows are not read: %s%s. To learn from one, name what it is by columns= in the "
        "source; else remove it",
        *(path, shown, more),
    )


def taken(sources: Sequence[SourceReport]) -> str:
    """What filtering and truncation took of sources, for a table.

    >>> taken([SourceReport("a", read=1000, examples=998, malformed=2, truncated=5)])
    '2 / 5 of 1,000'
    """
    read = sum(source.read + source.split for source in sources)
    dropped, cut = (sum(getattr(source, name) for source in sources) for name in ("dropped", "truncated"))
    return f"{dropped:,} / {cut:,} of {read:,}"
