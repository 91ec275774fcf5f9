"""Weights that are held otherwise than as the array they stand for.

A weight is an array, or a pytree of arrays that stands for one and says what the core asks of it:
``Stored``. The kinds themselves are no business of the core (those of our models are in
``spiel_jax.models.storage``). What is asked of any weight, array or not, is asked by the functions here.
"""

from typing import TYPE_CHECKING, Any, Protocol, Self

import jax

if TYPE_CHECKING:
    from typing_extensions import TypeIs

Place = tuple[jax.Array, ...]
"""Where entries are: rows and columns, of one shape; in a stack after the number of the matrix, a scalar."""


class Stored(Protocol):
    """A weight [*stack, rows, columns] that is not held as an array; never differentiated."""

    writable: bool
    """Whether entries can be set, exactly and in place."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the array that it stands for."""
        ...

    @property
    def dtype(self) -> Any:
        """Of the array that it stands for."""
        ...

    def dequantize(self) -> jax.Array:
        """The array that it stands for."""
        ...

    def divisible(self) -> Self:
        """The same with nothing that belongs to a matrix as a whole: parts of its arrays are parts of it."""
        ...

    def gather(self, place: Place) -> jax.Array:
        """Entries of that array, shaped like the rows of ``place``; 0 for a row that is not there."""
        ...

    def set_entries(self, place: Place, entries: jax.Array) -> Self:
        """The weight with other entries at distinct places; those of a row that is not there are dropped."""
        ...


def is_stored(weight: Any) -> "TypeIs[Stored]":
    """Whether this is a stored weight; otherwise it is an array, or no weight."""
    return hasattr(type(weight), "dequantize")


def is_writable(weight: jax.Array | Stored) -> bool:
    """Whether ``with_entries`` works; always for arrays."""
    return not is_stored(weight) or weight.writable


def as_array(weight: jax.Array | Stored) -> jax.Array:
    """The array that a weight is, or stands for."""
    return weight.dequantize() if is_stored(weight) else weight


def entries_at(weight: jax.Array | Stored, place: Place) -> jax.Array:
    """See ``Stored.gather``."""
    return weight.gather(place) if is_stored(weight) else weight.at[place].get(mode="fill", fill_value=0)


def with_entries(weight: Any, place: Place, entries: jax.Array) -> Any:
    """See ``Stored.set_entries``; in place where the weight is donated."""
    if is_stored(weight):
        return weight.set_entries(place, entries)
    return weight.at[place].set(entries, mode="drop", unique_indices=True)


def one_stack(weight: Any) -> Any:
    """A weight [*stack, rows, columns] as [M, rows, columns]."""
    stack = len(weight.shape) - 2
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[stack:]), weight)
