"""The header of a GGUF file: its metadata, and where each tensor lies. None of it is trusted.

Every count and length is held against the bytes that are left before anything is made of it: what a file
takes in time and memory is bounded by its size, whatever it says.
"""

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from spiel_jax.errors import SpielError
from spiel_jax.models.config_keys import shown
from spiel_jax.models.io.messages import pointer_hint

_MAGIC, _VERSIONS = b"GGUF", (2, 3)
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MOST_AXES = 4  # as in ggml
# The fewest bytes that each takes: a key without letters and a value of one byte; a tensor without a name
_LEAST = {"keys": 13, "tensors": 32}


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies in its file, and how.

    Attributes:
        kind: How its entries are stored.
        shape: In Hugging Face orientation: GGUF lists the fastest axis first.
        start: Its first byte.
    """

    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    start: int

    @property
    def byte_shape(self) -> tuple[int, ...]:
        """Of its bytes: the last axis is a row as it is in the file."""
        entries, size = GGML_QUANT_SIZES[self.kind]
        return (*self.shape[:-1], self.shape[-1] // entries * size)


@dataclass(frozen=True)
class Header:
    """What precedes the weights in a GGUF file.

    Attributes:
        fields: The metadata as plain Python values, by key.
        tensors: By name.
    """

    fields: dict[str, Any]
    tensors: dict[str, TensorInfo]


def is_gguf(path: Path) -> bool:
    """Whether a file begins as GGUF files do."""
    try:
        with path.open("rb") as file:
            return file.read(len(_MAGIC)) == _MAGIC
    except OSError:
        return False


def read_header(path: Path) -> Header:
    """Reads and checks the header of one file; no weight is read.

    Raises:
        SpielError: If it is no GGUF file, is cut short, or contradicts itself.
    """
    try:
        with path.open("rb") as file:
            begin = file.read(len(_MAGIC))
            if begin != _MAGIC:
                hint = (
                    pointer_hint(path)
                    or f" is not a GGUF file: it begins with {begin!r}, not with {_MAGIC!r}"
                )
                raise SpielError(f"{path}{hint}")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _Cursor(path, data).header()
    except OSError as error:
        raise SpielError(f"{path} cannot be read: {error}") from error


class _Cursor:
    """Takes what comes next in a file."""

    def __init__(self, path: Path, data: mmap.mmap):
        self.path, self.data, self.position = path, data, len(_MAGIC)

    def header(self) -> Header:
        version = self.number("I", "the version")
        if version & 0xFFFF == 0:
            raise SpielError(f"{self.path} is big-endian: only little-endian GGUF files are supported")
        if version not in _VERSIONS:
            raise SpielError(f"{self.path} has GGUF version {version}: expected one of 2, 3")
        num_tensors, num_keys = self.count("tensors"), self.count("keys")
        fields: dict[str, Any] = {}
        for _ in range(num_keys):
            key = self.text("the name of a key")
            if key in fields:
                raise self.damaged(f"the key {shown(key)} is there twice")
            fields[key] = self.value(self.number("I", f"the type of {shown(key)}"), f"the key {shown(key)}")
        return Header(fields, self.tensors(num_tensors, self.alignment(fields)))

    def tensors(self, count: int, alignment: int) -> dict[str, TensorInfo]:
        """By name; checks that they follow each other in the file as they do in the list."""
        found, expected = {}, 0
        for _ in range(count):
            name = self.text("the name of a tensor")
            if name in found:
                raise self.damaged(f"the tensor {shown(name)} is there twice")
            what = f"the tensor {shown(name)}"
            axes = self.number("I", what)
            if not 1 <= axes <= _MOST_AXES:
                raise self.damaged(f"{what} has {axes} axes: expected 1 to {_MOST_AXES}")
            shape = tuple(self.number("Q", what) for _ in range(axes))[::-1]
            kind, offset = self.kind(self.number("I", what), what), self.number("Q", what)
            entries, size = GGML_QUANT_SIZES[kind]
            if 0 in shape or shape[-1] % entries:
                raise self.damaged(f"{what} has shape {list(shape)}, which cannot be stored as {kind.name}")
            if offset != expected:
                raise self.damaged(f"{what} begins at {offset} of the weights: expected {expected}")
            num_bytes = size
            for extent in (*shape[:-1], shape[-1] // entries):
                num_bytes *= extent
            found[name] = TensorInfo(kind, shape, offset)
            if offset + num_bytes > len(self.data):  # the header's own size is not known yet
                raise self.short(f"{what} of {num_bytes} bytes")
            expected = offset + -(-num_bytes // alignment) * alignment
            end = offset + num_bytes
        start = -(-self.position // alignment) * alignment
        if found and start + end > len(self.data):
            raise self.short(f"{what}, which ends at byte {start + end}")
        return {name: TensorInfo(info.kind, info.shape, start + info.start) for name, info in found.items()}

    def kind(self, number: int, what: str) -> GGMLQuantizationType:
        try:
            return GGMLQuantizationType(number)
        except ValueError as error:
            raise self.damaged(f"{what} is stored as type {number}, which is unknown") from error

    def alignment(self, fields: dict[str, Any]) -> int:
        alignment = fields.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            raise self.damaged(f"general.alignment must be a power of two, got {shown(alignment)}")
        return alignment

    def value(self, kind: int, what: str) -> Any:
        if kind == _STRING:
            return self.text(what)
        if kind in _SCALARS:
            return self.number(_SCALARS[kind], what)
        if kind == _ARRAY:
            return self.array(what)
        raise self.damaged(f"{what} has type {kind}, which is unknown")

    def array(self, what: str) -> list[Any]:
        kind, length = self.number("I", what), self.number("Q", what)
        what = f"{what} (an array of {length})"
        if kind == _STRING:
            self.demand(8 * length, what)
            return [self.text(what) for _ in range(length)]
        if kind not in _SCALARS:
            raise self.damaged(f"{what} has entries of type {kind}, which is not supported")
        size = struct.calcsize(f"<{_SCALARS[kind]}") * length
        return list(struct.unpack(f"<{length}{_SCALARS[kind]}", self.take(size, what)))

    def text(self, what: str) -> str:
        start = self.position
        text = self.take(self.number("Q", what), what)
        try:
            return text.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.damaged(f"{what} at byte {start} is not UTF-8") from error

    def number(self, code: str, what: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}"), what))[0]

    def count(self, what: str) -> int:
        """How many come, if there can be as many."""
        count = self.number("Q", f"the number of {what}")
        self.demand(count * _LEAST[what], f"its {count} {what}")
        return count

    def take(self, size: int, what: str) -> bytes:
        self.demand(size, what)
        start = self.position
        self.position += size
        return self.data[start : self.position]

    def demand(self, size: int, what: str) -> None:
        if size > len(self.data) - self.position:
            raise self.short(what)

    def damaged(self, what: str) -> SpielError:
        return SpielError(f"{self.path} is a damaged GGUF file: {what}")

    def short(self, what: str) -> SpielError:
        return SpielError(
            f"{self.path} is truncated or damaged: {what} does not fit into its {len(self.data)} bytes "
            "(pieces of a file that was cut by size have to be joined first)"
        )
