"""The type of a stored weight, and the kinds of it that a configuration can name."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, Self, TypeVar

import jax
from jax.experimental.layout import Layout, with_layout_constraint

from spiel_jax.errors import SpielError
from spiel_jax.ops.stored import Place


class Weight(ABC):
    """A weight of a linear, [*stack, out, in], that is held otherwise than as an array of its dtype.

    A kind is a frozen dataclass that is registered as a pytree. Each of its arrays has the rank of the
    weight: a loop over layers slices it as it does the weight, and a mesh cuts its axes as those of the
    weight, where they can be cut. What belongs to a matrix as a whole has one axis after those of the stack,
    and is never cut. An array is a weight too, held as it is; what works on both asks with the
    functions of ``ops.stored``.

    Example:
        >>> from dataclasses import dataclass
        >>> @jax.tree_util.register_dataclass
        ... @dataclass(frozen=True)
        ... class Halved(Weight):
        ...     half: jax.Array
        ...
        ...     @property
        ...     def shape(self):
        ...         return self.half.shape
        ...
        ...     @property
        ...     def dtype(self):
        ...         return self.half.dtype
        ...
        ...     @classmethod
        ...     def hold(cls, array):
        ...         return cls(array / 2)
        ...
        ...     def dequantize(self):
        ...         return self.half * 2
    """

    writable: ClassVar[bool] = False
    """Whether entries can be set, exactly and in place; then ``set_entries`` is there."""

    dtype: Any
    """Of the array that it stands for."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Of the array that it stands for; told by the arrays, so that it is right for a slice of them."""

    @classmethod
    @abstractmethod
    def hold(cls, array: jax.Array) -> Self:
        """Holds an array, one matrix or a stack of them; works under ``jax.jit``."""

    def hold_alike(self, array: jax.Array) -> Self:
        """Holds another array as this weight is held."""
        return self.hold(array.astype(self.dtype))

    @abstractmethod
    def dequantize(self) -> jax.Array:
        """The array that it stands for, of ``shape`` and ``dtype``."""

    def divisible(self) -> Self:
        """The same with nothing that belongs to a matrix as a whole: parts of its arrays are parts of it."""
        return self

    @classmethod
    def grain(cls, shape: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns whose multiples a part of a matrix can have.

        Args:
            shape: Of the matrix.
        """
        del shape
        return 1, 1

    def gather(self, place: Place) -> jax.Array:
        """Entries of that array; 0 for a row that is not there.

        Args:
            place: Rows and columns, of one shape; for a stack of matrices the number of one, a scalar, first.
        """
        *numbers, rows, columns = place
        matrix = jax.tree.map(lambda leaf: leaf[tuple(numbers)], self)
        return matrix.dequantize().at[rows, columns].get(mode="fill", fill_value=0)

    def set_entries(self, place: Place, entries: jax.Array) -> Self:
        """The weight with other entries at distinct places; those of a row that is not there are dropped.

        Args:
            place: See ``gather``.
            entries: Shaped like the rows.

        Raises:
            TypeError: If the kind is not writable.
        """
        del place, entries
        raise TypeError(
            f"entries of a weight held as {type(self).__name__} cannot be set: "
            "expected an array or a writable kind; merge into what it dequantises to"
        )

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of entries."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays that hold it."""
        return nbytes(self)


def as_it_lies(codes: jax.Array) -> jax.Array:
    """The same array, which a program does not turn in memory.

    Where a product wants its matrix turned, a GPU's compiler turns the codes of all layers instead, before a
    loop over layers begins, and holds both.
    """
    return with_layout_constraint(codes, Layout(major_to_minor=tuple(range(codes.ndim))))


def nbytes(weight: Any) -> int:
    """Bytes of a weight, also of one that is only described (``jax.ShapeDtypeStruct``)."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(weight))


def hold(array: jax.Array, kind: type[Weight] | None) -> Any:
    """An array, held as a kind of stored weight; as it is for None."""
    return array if kind is None else kind.hold(array)


W = TypeVar("W", bound=Weight)

KINDS: dict[str, type[Weight] | None] = {"none": None}
"""What ``config.model.quantization`` can be; a kind adds itself by ``register``."""


def kind_named(quantization: str) -> type[Weight] | None:
    """The kind with this name.

    Raises:
        SpielError: If there is none.
    """
    if quantization not in KINDS:
        raise SpielError(f"quantization = {quantization!r}: expected one of {', '.join(KINDS)}")
    return KINDS[quantization]


def kind_name(kind: Any) -> str | None:
    """The name of a kind in configurations; None: it has none, and is no quantisation."""
    return next((name for name, known in KINDS.items() if known is kind and known is not None), None)


def register(name: str) -> Callable[[type[W]], type[W]]:
    """Makes a kind known to configurations under a name; a decorator of its class.

    Raises:
        ValueError: If another kind has the name.
    """

    def add(kind: type[W]) -> type[W]:
        if KINDS.setdefault(name, kind) is not kind:
            raise ValueError(f"quantization {name!r} is taken by {KINDS[name]}: expected another name")
        return kind

    return add
