"""Some entries of one matrix: where they are, and what is added there. All arrays are NumPy's."""

from dataclasses import dataclass

import numpy as np

from spiel_jax.adapters.adapter import AdapterError


def position_dtype(shape: tuple[int, int]) -> type[np.signedinteger]:
    """int32, or int64 for a matrix with more entries than int32 can count."""
    return np.int32 if shape[0] * shape[1] <= 2**31 else np.int64


@dataclass(frozen=True)
class Entries:
    """Some entries of one matrix.

    Attributes:
        shape: (rows, columns) of the matrix.
        positions: [k] flat and row-major in the whole matrix, ascending, distinct; int32 (int64 where the
            matrix has more than 2^31 entries).
        values: [k] float32, what is added to the base.

    Raises:
        AdapterError: If that is not so, or a value is not finite.
    """

    shape: tuple[int, int]
    positions: np.ndarray
    values: np.ndarray

    def __post_init__(self):
        size = self.shape[0] * self.shape[1]
        if self.positions.ndim != 1 or self.positions.shape != self.values.shape:
            raise AdapterError(
                f"positions {list(self.positions.shape)} and values {list(self.values.shape)}: expected two "
                "lists of one length"
            )
        if self.positions.dtype.kind != "i" or self.values.dtype.kind not in "fV":
            raise AdapterError(
                f"positions are {self.positions.dtype} and values {self.values.dtype}: expected integers and "
                "floating-point numbers"
            )
        if self.positions.size == 0:
            raise AdapterError("there are no entries")
        if self.positions.min() < 0 or self.positions.max() >= size:
            bad = self.positions[(self.positions < 0) | (self.positions >= size)][0]
            raise AdapterError(f"position {bad} is outside a matrix of {list(self.shape)}")
        if (np.diff(self.positions) <= 0).any():
            raise AdapterError("positions are not ascending and distinct")
        object.__setattr__(self, "positions", self.positions.astype(position_dtype(self.shape)))
        object.__setattr__(self, "values", self.values.astype(np.float32))
        if not np.isfinite(self.values).all():
            raise AdapterError("a value is not finite")

    @classmethod
    def unordered(cls, shape: tuple[int, int], positions: np.ndarray, values: np.ndarray) -> "Entries":
        """Entries in any order; zeros may repeat a position, as what pads a list does.

        Raises:
            AdapterError: See ``Entries``; if a position has two values.
        """
        if positions.ndim == 1 and positions.shape == values.shape and positions.size:
            order = np.argsort(positions, kind="stable")
            positions, values = positions[order], values[order]
            again = np.concatenate([[False], positions[1:] == positions[:-1]])
            if (values[again] != 0).any():
                raise AdapterError(f"position {positions[again & (values != 0)][0]} has two values")
            positions, values = positions[~again], values[~again]
        return cls(shape, positions, values)

    @property
    def count(self) -> int:
        """How many entries."""
        return self.positions.size

    def coordinates(self) -> tuple[np.ndarray, np.ndarray]:
        """Row and column of each entry."""
        rows, columns = np.divmod(self.positions, self.shape[1])
        return rows, columns
