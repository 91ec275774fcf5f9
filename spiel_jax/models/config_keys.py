"""Typed access to the keys of a model's configuration: what a file says is checked before it is used."""

import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from spiel_jax.errors import SpielError

LARGEST = 2**31 - 1
"""The largest size: arrays are indexed with 32 bits."""

_REQUIRED: Any = object()
_LARGEST_NUMBER = 3.4e38  # of float32
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80


@dataclass(frozen=True)
class Keys:
    """A configuration that is read key by key; null is as good as absent.

    Every method takes a key, and what it stands for when it is absent; without that it must be there. Each
    raises a SpielError that names the key if the value is missing or not what it has to be.

    Attributes:
        values: The configuration.

    Example:
        >>> Keys({"hidden_size": 64}).integer("hidden_size")
        64
        >>> Keys({"hidden_size": "64"}).integer("hidden_size")
        Traceback (most recent call last):
            ...
        spiel_jax.errors.SpielError: hidden_size must be an integer from 1 to 2147483647, got '64'
    """

    values: Mapping[str, Any]

    def has(self, key: str) -> bool:
        """Whether there is a value."""
        return self.values.get(key) is not None

    def integer(self, key: str, default: Any = _REQUIRED, *, least: int = 1, most: int = LARGEST) -> Any:
        """An integer between bounds."""
        return self._read(
            key,
            default,
            lambda value: type(value) is int and least <= value <= most,
            f"an integer from {least} to {most}",
        )

    def number(self, key: str, default: Any = _REQUIRED, *, least: float = 0.0) -> Any:
        """A finite number not below a bound, as a float."""
        value = self._read(
            key,
            default,
            lambda value: type(value) in (int, float) and least <= value <= _LARGEST_NUMBER,
            f"a finite number of at least {least:g}",
        )
        return float(value) if type(value) is int else value

    def flag(self, key: str, default: Any = _REQUIRED) -> Any:
        """True or false."""
        return self._read(key, default, lambda value: type(value) is bool, "true or false")

    def choice(self, key: str, allowed: Sequence[str], default: Any = _REQUIRED) -> Any:
        """One of several strings."""
        if not self.has(key) and default is not _REQUIRED:
            return default
        one_of(key, self.values.get(key), allowed)
        return self.values[key]

    def items(self, key: str, default: Any = _REQUIRED) -> Any:
        """A list."""
        return self._read(key, default, lambda value: isinstance(value, list | tuple), "a list")

    def mapping(self, key: str) -> "Keys":
        """The keys below this one; none if it is absent."""
        return Keys(self._read(key, {}, lambda value: isinstance(value, Mapping), "an object"))

    def _read(self, key: str, default: Any, fits: Any, expected: str) -> Any:
        if not self.has(key):
            if default is _REQUIRED:
                raise SpielError(f"the model's configuration lacks {key!r}")
            return default
        if not fits(self.values[key]):
            raise SpielError(f"{key} must be {expected}, got {shown(self.values[key])}")
        return self.values[key]


def one_of(what: str, value: Any, allowed: Sequence[str]) -> None:
    """Raises a SpielError unless a value is one of these strings."""
    if not isinstance(value, str) or value not in allowed:
        raise SpielError(f"unknown {what} {shown(value)}: expected one of {', '.join(allowed)}")


def shown(value: Any) -> str:
    """A value in a message: what a file holds can be of any length.

    >>> len(shown("x" * 1000))
    80
    """
    text = _SHORT.repr(value)
    return text if len(text) <= 200 else f"{text[:200]} ..."
