"""What a format of adapters is, and the formats by name."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from spiel_jax.adapters.adapter import Adapter, AdapterError
from spiel_jax.adapters.base import Base
from spiel_jax.models.config import ModelConfig


@dataclass(frozen=True)
class Export:
    """What is written; of what goes beyond the adapter each format reads what it needs.

    Attributes:
        adapter: The adapter.
        base: Its base model; None where the format does not need it.
        dtype: Of the weights, or of the values of a delta; None for the format's own.
        since: The adapter of an earlier step, for an update from there; None: from the base.
        check: Whether the base must have the fingerprint that the adapter names.
        shard_bytes: Of the weights in one file, at most, unless a tensor alone has more.
    """

    adapter: Adapter
    base: Base | None = None
    dtype: Any = None
    since: Adapter | None = None
    check: bool = True
    shard_bytes: int = 5 * 10**9

    @property
    def expected(self) -> Mapping[str, str]:
        """The fingerprint that the base must have; empty if it need not."""
        return self.adapter.origin.fingerprint if self.check else {}


class Format:
    """A format of adapters: writes them, and where it can also reads them.

    Attributes:
        name: What ``--format`` calls it.
        kinds: The kinds of adapters that it can hold.
        needs_base: Whether it needs the base model's weights.
        reads: Whether it also reads adapters.
    """

    name: ClassVar[str]
    kinds: ClassVar[tuple[str, ...]]
    needs_base: ClassVar[bool] = False
    reads: ClassVar[bool] = False

    def write(self, export: Export, folder: Path) -> None:
        """Writes an adapter of one of ``kinds`` into an empty folder.

        Raises:
            AdapterError: If the format cannot hold it.
        """
        raise NotImplementedError

    def recognises(self, path: Path) -> bool:
        """Whether a folder, or a file, is in this format; reads no more than it must."""
        del path
        return False

    def read(self, path: Path, model: ModelConfig | None) -> Adapter:
        """What ``write`` wrote, or another program.

        Args:
            path: A folder or file that it ``recognises``.
            model: Shape of the base model, where it is known.

        Raises:
            AdapterError: If it is damaged, has what is not supported, or does not fit the model.
        """
        raise NotImplementedError


F = TypeVar("F", bound=Format)

FORMATS: dict[str, Format] = {}
"""Name to format."""


def register(format: type[F]) -> type[F]:
    """Makes a format known under its name; a decorator of its class.

    Raises:
        ValueError: If another one has the name.
    """
    if format.name in FORMATS:
        raise ValueError(f"a format is registered as {format.name!r} already")
    FORMATS[format.name] = format()
    return format


def format_named(name: str) -> Format:
    """The format with this name.

    Raises:
        AdapterError: If there is none.
    """
    if name not in FORMATS:
        raise AdapterError(f"format {name!r}: expected one of {', '.join(FORMATS)}")
    return FORMATS[name]


Shape = Callable[[str], tuple[int, int]]
"""Hugging Face name of a weight to its (out, in)."""
