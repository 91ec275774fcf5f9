"""GGUF files: weights dequantised one by one, config and tokenizer from the metadata."""

from pathlib import Path

import gguf
import numpy as np
from transformers import PreTrainedTokenizerBase

from spiel_jax.models.config import ModelConfig
from spiel_jax.models.gguf_tokenizer import build_tokenizer
from spiel_jax.models.names import Stored, gguf_names

_ROPE_FACTORS = "rope_freqs.weight"


class GGUFFile:
    """A GGUF file whose metadata has been read.

    Attributes:
        path: The file.
        fields: Its metadata as plain Python values.
        config: From the metadata.
        stored: Every tensor by its GGUF name.

    Raises:
        ValueError: If the file is damaged, or describes a model that is not supported.
    """

    naming = staticmethod(gguf_names)

    def __init__(self, path: Path):
        self.path = path
        try:
            reader = gguf.GGUFReader(path)
        except (ValueError, IndexError, KeyError) as error:
            raise ValueError(f"{path} is not a GGUF file, or is truncated: {error}") from error
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
            rope_factors=self._dequantise(_ROPE_FACTORS) if _ROPE_FACTORS in self.stored else None,
        )

    def read(self, name: str) -> np.ndarray:
        """One tensor in float32, rows in the Hugging Face order."""
        tensor = self._dequantise(name)
        if self.fields["general.architecture"] == "llama":
            if ".attn_q." in name:
                return _unpermute(tensor, self.config.num_heads)
            if ".attn_k." in name:
                return _unpermute(tensor, self.config.num_kv_heads)
        return tensor

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer that the metadata describes."""
        return build_tokenizer(self.fields)

    def _dequantise(self, name: str) -> np.ndarray:
        # read, not mapped: pages of a memory map would count as resident, a second copy of the file
        offset, dtype, shape, kind = self._tensors[name]
        count = int(np.prod(shape))
        raw = np.fromfile(self.path, dtype=dtype, count=count, offset=offset).reshape(shape)
        return gguf.quants.dequantize(raw, kind)


def _can_dequantise(kind: gguf.GGMLQuantizationType) -> bool:
    block_bytes = gguf.GGML_QUANT_SIZES[kind][1]
    try:
        gguf.quants.dequantize(np.zeros((1, block_bytes), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


def _unpermute(tensor: np.ndarray, heads: int) -> np.ndarray:
    """Undo the row order of q and k that llama.cpp's converter gives the architecture "llama".

    llama.cpp rotates neighbouring pairs of a head, Hugging Face its halves: row 2i + h of a head
    there is row h * head_dim / 2 + i here. Weights [H * head_dim, D] or biases [H * head_dim].
    """
    pairs = tensor.reshape(heads, -1, 2, *tensor.shape[1:])  # [H, head_dim / 2, 2, ...]
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(tensor.shape)
