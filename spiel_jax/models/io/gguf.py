"""GGUF files: weights dequantised one by one, config and tokenizer from the metadata."""

import functools
from collections.abc import Sequence
from pathlib import Path

import gguf
import numpy as np
from transformers import PreTrainedTokenizerBase

from spiel_jax.errors import SpielError
from spiel_jax.models.config import ModelConfig
from spiel_jax.models.config_keys import shown
from spiel_jax.models.io.gguf_header import Header, TensorInfo, read_header
from spiel_jax.models.io.gguf_tokenizer import build_tokenizer
from spiel_jax.models.io.messages import told
from spiel_jax.models.io.names import Stored, gguf_names
from spiel_jax.models.io.parts import parts_of

_ROPE_FACTORS = "rope_freqs.weight"


class GGUFFile:
    """A GGUF file whose metadata has been read, or the parts that it was split into.

    Args:
        path: The file, or any one of the parts; the others are beside it.

    Attributes:
        path: The file, or the first part.
        fields: Its metadata as plain Python values.
        config: From the metadata.
        stored: Every tensor by its GGUF name.

    Raises:
        NotFoundError: If a part is missing.
        SpielError: If a file is damaged, no part of the others, or describes what is not supported.
    """

    naming = staticmethod(gguf_names)

    def __init__(self, path: Path):
        headers = _read_parts(path)
        self.path = next(iter(headers))
        self.fields = headers[self.path].fields
        self._tensors: dict[str, tuple[Path, TensorInfo]] = {}
        for file, header in headers.items():
            for name, info in header.tensors.items():
                if name in self._tensors:
                    raise SpielError(f"{file} and {self._tensors[name][0].name} both hold {told(name)}")
                self._tensors[name] = (file, info)
        self.stored = {
            name: Stored(info.shape, info.kind.name, _can_dequantise(info.kind))
            for name, (_, info) in self._tensors.items()
        }
        try:
            self.config = ModelConfig.from_gguf(
                self.fields,
                tied="output.weight" not in self.stored,
                rope_factors=self._rope_factors(),
            )
        except SpielError as error:
            raise SpielError(f"{self.path}: {error}") from error

    def read(self, name: str, parts: Sequence[tuple[slice, ...]]) -> list[np.ndarray]:
        """Parts of one tensor in float32, rows in the Hugging Face order."""
        path, info = self._tensors[name]
        # mapped anew each time: what a mapped file has shown stays resident until the map is closed
        stored = np.memmap(path, np.uint8, "r", info.start, info.byte_shape)
        order = self._row_order(name)
        return [
            _dequantise(stored, info.kind, rows if order is None else order[rows], *columns)
            for rows, *columns in parts
        ]

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer that the metadata describes.

        Raises:
            SpielError: If there is none, or it contradicts itself.
        """
        try:
            return build_tokenizer(self.fields)
        except SpielError as error:
            raise SpielError(f"{self.path}: {error}") from error

    def _rope_factors(self) -> np.ndarray | None:
        factors = self.stored.get(_ROPE_FACTORS)
        if factors is None:
            return None
        if len(factors.shape) != 1 or not factors.floating:
            raise SpielError(f"{_ROPE_FACTORS} must be a vector of floats, got {factors}")
        return self.read(_ROPE_FACTORS, [(slice(None),)])[0]

    def _row_order(self, name: str) -> np.ndarray | None:
        """Numbers in the file of a tensor's rows, in the Hugging Face order; None: as they are."""
        if self.fields.get("general.architecture") == "llama":
            if ".attn_q." in name:
                return _llama_cpp_rows(self.stored[name].shape[0], self.config.num_heads)
            if ".attn_k." in name:
                return _llama_cpp_rows(self.stored[name].shape[0], self.config.num_kv_heads)
        return None


def _read_parts(path: Path) -> dict[Path, Header]:
    """The header of each part of a model, in their order."""
    header = read_header(path)
    if _split(path, header, "count") == 1:  # written when parts are joined again, too
        return {path: header}
    files = parts_of(path)
    if len(files) == 1:
        count = _split(path, header, "count")
        if count is None:
            return {path: header}
        raise SpielError(
            f"{path} is one of {count} parts, and its name does not say which: name them as they were, "
            f"NAME-00001-of-{count:05d}.gguf and so on, in one folder"
        )
    headers = {file: header if file == path else read_header(file) for file in files}
    for number, (file, header) in enumerate(headers.items()):
        found = _split(file, header, "no"), _split(file, header, "count")
        if found != (number, len(files)):
            raise SpielError(
                f"{file} is not what its name says, part {number + 1} of {len(files)}: it has split.no "
                f"{found[0]} (counted from 0) and split.count {found[1]}"
            )
    total = _split(files[0], headers[files[0]], "tensors.count")
    found = sum(len(header.tensors) for header in headers.values())
    if total not in (None, found):
        raise SpielError(f"{files[0]} and its other parts hold {found} tensors: expected {total}")
    return headers


def _split(path: Path, header: Header, key: str) -> int | None:
    """What the metadata says of the parts of a file; None if nothing."""
    value = header.fields.get(f"split.{key}")
    if value is not None and (type(value) is not int or value < 0):
        raise SpielError(f"{path}: split.{key} must be an integer of at least 0, got {shown(value)}")
    return max(value, 1) if key == "count" and value is not None else value


def _dequantise(
    stored: np.ndarray,
    kind: gguf.GGMLQuantizationType,
    rows: slice | np.ndarray,
    columns: slice | None = None,
) -> np.ndarray:
    """Entries of a tensor in float32.

    Args:
        stored: The bytes, [out, of a row] or [of a vector].
        kind: How they are stored.
        rows: Of the matrix, or entries of the vector.
        columns: Of the matrix; with start and stop.
    """
    if columns is None:  # small
        return gguf.quants.dequantize(np.array(stored), kind)[rows]
    size, width = gguf.GGML_QUANT_SIZES[kind]
    first, end = columns.start // size, -(-columns.stop // size)  # whole blocks
    blocks = np.array(stored[rows, first * width : end * width], order="C")
    return gguf.quants.dequantize(blocks, kind)[:, columns.start - first * size : columns.stop - first * size]


@functools.cache
def _can_dequantise(kind: gguf.GGMLQuantizationType) -> bool:
    block_bytes = gguf.GGML_QUANT_SIZES[kind][1]
    try:
        gguf.quants.dequantize(np.zeros((1, block_bytes), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


def _llama_cpp_rows(rows: int, heads: int) -> np.ndarray:
    """Where llama.cpp's converter puts the rows of q and k for the architecture "llama".

    llama.cpp rotates neighbouring pairs of a head, Hugging Face its halves: row 2i + h of a head
    there is row h * head_dim / 2 + i here.

    >>> _llama_cpp_rows(8, 2)
    array([0, 2, 1, 3, 4, 6, 5, 7])
    """
    return np.arange(rows).reshape(heads, -1, 2).swapaxes(1, 2).reshape(rows)
