"""Token sequences as one tree, laid out depth first in pieces of equal size.

What sequences begin with alike is in the tree once: the examples of a few-shot prompt, the question before
its possible answers. Read in this order, a model needs in its cache no more than the path to where it is: a
token's slot is its depth.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np


@dataclass
class Piece:
    """``size`` tokens of the tree; those after ``used`` are padding.

    Attributes:
        tokens: [size] int32.
        positions: [size] int32, their depths.
        reach: [size] int32, how many of the path to a token are in pieces before.
        until: [size] int32, the end of a token's subtree in this piece.
        keep: [size] bool, whether later pieces go on below a token.
        used: How many tokens there are.
        asked: (number of a token in the piece, what follows it, whose sequence it is).
    """

    tokens: np.ndarray
    positions: np.ndarray
    reach: np.ndarray
    until: np.ndarray
    keep: np.ndarray
    used: int = 0
    asked: list[tuple[int, int, int]] = field(default_factory=list)

    @classmethod
    def empty(cls, size: int) -> "Piece":
        """All padding, each seeing itself."""
        zeros = np.zeros(size, np.int32)
        return cls(
            zeros, zeros.copy(), zeros.copy(), np.arange(1, size + 1, dtype=np.int32), np.zeros(size, bool)
        )

    @property
    def depth(self) -> int:
        """Slots that its tokens read, or are written to."""
        written = self.positions[self.keep].max(initial=-1) + 1
        return int(max(self.reach[: self.used].max(initial=0), written))


def lay_out(sequences: Sequence[Sequence[int]], first: Sequence[int], size: int) -> list[Piece]:
    """The tree of sequences, in pieces.

    Args:
        sequences: Token ids; the last of each is only asked for, not read. Two or more each.
        first: For each sequence the number of the first token that is asked for, at least 1.
        size: Tokens of a piece.

    Example:
        >>> (piece,) = lay_out([[1, 2, 3, 7], [1, 2, 3, 8, 9], [1, 5, 6]], [3, 3, 1], 8)
        >>> piece.tokens.tolist()
        [1, 2, 3, 8, 5, 0, 0, 0]
        >>> piece.until.tolist()
        [5, 4, 4, 4, 5, 6, 7, 8]
        >>> piece.asked
        [(2, 7, 0), (2, 8, 1), (3, 9, 1), (0, 5, 2), (4, 6, 2)]
    """
    arrays = [np.asarray(tokens, np.int32) for tokens in sequences]
    return list(_Layout(size).pieces(arrays, first))


class _Layout:
    """Where the walk through the tree is: the path to the last token, and the piece that is being filled."""

    def __init__(self, size: int):
        self.size = size
        self.piece = Piece.empty(size)
        self.done: list[Piece] = []
        self.path: list[tuple[Piece, int]] = []  # of each token: its piece, and its number there
        self.before = 0  # how many of the path are in finished pieces

    def pieces(self, arrays: list[np.ndarray], first: Sequence[int]) -> Iterator[Piece]:
        order = sorted(range(len(arrays)), key=lambda number: arrays[number][:-1].tolist())
        previous = np.zeros(0, np.int32)
        for number in order:
            read = arrays[number][:-1]
            self._close(_common(previous, read))
            self._extend(read[len(self.path) :])
            for place in range(first[number] - 1, len(read)):
                piece, slot = self.path[place]
                piece.asked.append((slot, int(arrays[number][place + 1]), number))
            previous = read
        self._close(0)
        if self.piece.used:
            self.done.append(self.piece)
        yield from self.done

    def _close(self, depth: int) -> None:
        """Leaves the subtrees below ``depth``."""
        for piece, slot in self.path[max(depth, self.before) :]:
            piece.until[slot] = self.piece.used
        del self.path[depth:]
        self.before = min(self.before, depth)

    def _extend(self, tokens: np.ndarray) -> None:
        """Goes down by these tokens."""
        while len(tokens):
            if self.piece.used == self.size:
                self._finish()
            piece, start = self.piece, self.piece.used
            count = min(len(tokens), self.size - start)
            span, depth = slice(start, start + count), len(self.path)
            piece.tokens[span] = tokens[:count]
            piece.positions[span] = np.arange(depth, depth + count)
            piece.reach[span] = self.before
            piece.used += count
            self.path += [(piece, slot) for slot in range(start, start + count)]
            tokens = tokens[count:]

    def _finish(self) -> None:
        for piece, slot in self.path[self.before :]:
            piece.until[slot] = self.size
            piece.keep[slot] = True
        self.before = len(self.path)
        self.done.append(self.piece)
        self.piece = Piece.empty(self.size)


def _common(one: np.ndarray, other: np.ndarray) -> int:
    """How many tokens two sequences begin with alike."""
    length = min(len(one), len(other))
    differ = one[:length] != other[:length]
    return int(differ.argmax()) if differ.any() else length
