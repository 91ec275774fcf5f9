"""GGUF files: weights dequantised one by one, config and tokenizer from the metadata."""

from collections.abc import Sequence
from pathlib import Path

import gguf
import numpy as np
from transformers import PreTrainedTokenizerBase

from spiel_jax.errors import SpielError
from spiel_jax.models.config import ModelConfig
from spiel_jax.models.io.gguf_tokenizer import build_tokenizer
from spiel_jax.models.io.names import Stored, gguf_names

_ROPE_FACTORS = "rope_freqs.weight"


class GGUFFile:
    """A GGUF file whose metadata has been read.

    Attributes:
        path: The file.
        fields: Its metadata as plain Python values.
        config: From the metadata.
        stored: Every tensor by its GGUF name.

    Raises:
        SpielError: If the file is damaged, or describes a model that is not supported.
    """

    naming = staticmethod(gguf_names)

    def __init__(self, path: Path):
        self.path = path
        try:
            reader = gguf.GGUFReader(path)
        except (ValueError, IndexError, KeyError) as error:
            raise SpielError(f"{path} is not a GGUF file, or is truncated: {error}") from error
        self.fields = {name: field.contents() for name, field in reader.fields.items()}
        self._tensors = {  # not the reader's own arrays: they keep the whole file mapped
            t.name: (t.data_offset, t.data.dtype, t.data.shape, t.tensor_type) for t in reader.tensors
        }
        self.stored = {
            tensor.name: Stored(
                tuple(int(n) for n in reversed(tensor.shape)),  # GGUF lists the fastest axis first
                tensor.tensor_type.name,
                _can_dequantise(tensor.tensor_type),
            )
            for tensor in reader.tensors
        }
        self.config = ModelConfig.from_gguf(
            self.fields,
            tied="output.weight" not in self.stored,
            rope_factors=self._rope_factors(),
        )

    def read(self, name: str, parts: Sequence[tuple[slice, ...]]) -> list[np.ndarray]:
        """Parts of one tensor in float32, rows in the Hugging Face order."""
        offset, dtype, shape, kind = self._tensors[name]
        # mapped anew each time: what a mapped file has shown stays resident until the map is closed
        stored = np.memmap(self.path, dtype, "r", offset, shape)
        order = self._row_order(name)
        return [
            _dequantise(stored, kind, rows if order is None else order[rows], *columns)
            for rows, *columns in parts
        ]

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer that the metadata describes."""
        return build_tokenizer(self.fields)

    def _rope_factors(self) -> np.ndarray | None:
        return self.read(_ROPE_FACTORS, [(slice(None),)])[0] if _ROPE_FACTORS in self.stored else None

    def _row_order(self, name: str) -> np.ndarray | None:
        """Numbers in the file of a tensor's rows, in the Hugging Face order; None: as they are."""
        if self.fields["general.architecture"] == "llama":
            if ".attn_q." in name:
                return _llama_cpp_rows(self.stored[name].shape[0], self.config.num_heads)
            if ".attn_k." in name:
                return _llama_cpp_rows(self.stored[name].shape[0], self.config.num_kv_heads)
        return None


def _dequantise(
    stored: np.ndarray,
    kind: gguf.GGMLQuantizationType,
    rows: slice | np.ndarray,
    columns: slice | None = None,
) -> np.ndarray:
    """Entries of a tensor in float32.

    Args:
        stored: [out, blocks of a row as they are in the file], or [in the file] of a vector.
        kind: How they are stored.
        rows: Of the matrix, or entries of the vector.
        columns: Of the matrix; with start and stop.
    """
    if columns is None:  # small
        return gguf.quants.dequantize(np.array(stored), kind)[rows]
    size, size_bytes = gguf.GGML_QUANT_SIZES[kind]
    width = size_bytes // stored.itemsize
    first, end = columns.start // size, -(-columns.stop // size)  # whole blocks
    blocks = np.array(stored[rows, first * width : end * width], order="C")
    return gguf.quants.dequantize(blocks, kind)[:, columns.start - first * size : columns.stop - first * size]


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
