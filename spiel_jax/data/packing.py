"""Examples in rows of fixed length: which go together, and the arrays of a row.

A row holds segments, one per example. An example of n tokens fills n - 1 slots, each with a token
and the next one as its target, so no target crosses from one example to another.
"""

import bisect
import dataclasses

import numpy as np

from spiel_jax.data.examples import Examples

# Rows open at a time. More fill better, fewer keep the rows' order closer to the shuffled one. On
# examples of uniformly random length 64 leave 2% of the slots empty, 256 0.7%, 1024 0.3%.
_OPEN_ROWS = 256


@dataclasses.dataclass(frozen=True)
class Plan:
    """Which examples make up each row.

    Attributes:
      examples: int64 [N], numbers of examples, row after row.
      starts: int64 [R + 1], row r holds ``examples[starts[r] : starts[r + 1]]``.
      sequence_length: slots of a row.
      fill: the share of slots that hold a token.
    """

    examples: np.ndarray
    starts: np.ndarray
    sequence_length: int
    fill: float

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, row: int) -> np.ndarray:
        return self.examples[self.starts[row] : self.starts[row + 1]]


def plan_rows(order: np.ndarray, lengths: np.ndarray, sequence_length: int, *, packing: bool = True) -> Plan:
    """Distributes examples over rows.

    Best fit: an example goes to the open row with the least space that is enough for it (the first
    of equal ones), else to a new row; with 256 rows open the fullest is closed for it. Rows are in
    the order they were opened in. Deterministic, O(N).

    Args:
      order: int [N], the examples in the order they come; one may come several times.
      lengths: int [M], tokens of each example, 2 to sequence_length + 1.
      sequence_length: slots of a row.
      packing: several examples in a row, or one example per row.

    Raises:
      ValueError: an example does not fit into a row or has no slot.
    """
    slots = np.asarray(lengths, np.int64)[order] - 1
    if len(slots) and (slots.min() < 1 or slots.max() > sequence_length):
        wrong = int(np.flatnonzero((slots < 1) | (slots > sequence_length))[0])
        raise ValueError(
            f"example {order[wrong]} has {slots[wrong] + 1} tokens: a row of {sequence_length} "
            f"takes 2 to {sequence_length + 1}"
        )
    if not packing:
        rows = [[example] for example in order]
    else:
        rows: list[list[int]] = []
        space: list[tuple[int, int]] = []  # (free slots, row) of the open rows, sorted
        for example, needed in zip(order.tolist(), slots.tolist(), strict=True):
            best = bisect.bisect_left(space, (needed, -1))
            if best < len(space):
                free, row = space.pop(best)
            else:
                if len(space) == _OPEN_ROWS:
                    space.pop(0)
                free, row = sequence_length, len(rows)
                rows.append([])
            rows[row].append(example)
            if free > needed:
                bisect.insort(space, (free - needed, row))
    return Plan(
        examples=np.array([example for row in rows for example in row], np.int64),
        starts=np.cumsum([0, *map(len, rows)], dtype=np.int64),
        sequence_length=sequence_length,
        fill=float(slots.sum()) / (len(rows) * sequence_length) if rows else 0.0,
    )


def empty_row(sequence_length: int) -> dict[str, np.ndarray]:
    """A row of padding: zeros, token 0 with weight 0 in segment 0."""
    return {
        "tokens": np.zeros(sequence_length, np.int32),
        "labels": np.zeros(sequence_length, np.int32),
        "weights": np.zeros(sequence_length, np.float32),
        "positions": np.zeros(sequence_length, np.int32),
        "segment_ids": np.zeros(sequence_length, np.int32),
    }


def fill_row(examples: Examples, plan: Plan, row: int) -> dict[str, np.ndarray]:
    """The arrays of a planned row, each [S].

    Returns:
      ``tokens`` (int32); ``labels`` (int32), the next token of the same example; ``weights``
      (float32), 1.0 where the label is to learn, else 0.0; ``positions`` (int32), from 0 in each
      segment; ``segment_ids`` (int32), 1, 2, ... and 0 for padding, which comes last.
    """
    arrays = empty_row(plan.sequence_length)
    start = 0
    for segment, index in enumerate(plan[row], start=1):
        example = examples[int(index)]
        part = slice(start, start + len(example.tokens) - 1)
        arrays["tokens"][part] = example.tokens[:-1]
        arrays["labels"][part] = example.tokens[1:]
        arrays["weights"][part] = example.supervised[1:]
        arrays["positions"][part] = np.arange(part.stop - start)
        arrays["segment_ids"][part] = segment
        start = part.stop
    return arrays
