"""Folders of safetensors that are quantised already: bitsandbytes' 4 bits and LLM.int8(), and float8.

A quantised tensor is several in the file. Here it is one again, of the name, shape and entries that it has
dense: ``read`` dequantises the parts that are asked for. Where a run holds its weights as the file does, the
codes and scales are taken as they are (``held``).
"""

import functools
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import jax
import ml_dtypes
import numpy as np

from spiel_jax.errors import SpielError
from spiel_jax.models.io.huggingface import SafetensorsFolder
from spiel_jax.models.io.json_files import read_json
from spiel_jax.models.io.names import Stored
from spiel_jax.models.storage import FP4, NF4, Int8, Weight
from spiel_jax.models.storage.codebooks import DYNAMIC
from spiel_jax.models.storage.four_bit import NESTED, FourBit

Part = tuple[slice, ...]

_STATE = ".quant_state.bitsandbytes__"
_FOUR_BIT: dict[str, type[FourBit]] = {"nf4": NF4, "fp4": FP4}
_DTYPES = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
_FLOAT8 = {"F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2}
_OF_ACTIVATIONS = (".input_scale", ".activation_scale", ".input_scale_ub", ".k_scale", ".v_scale")
_AT_A_TIME = 1 << 22  # entries that are dequantised together


class _Quantized(Protocol):
    """A tensor that is quantised in the file."""

    stored: Stored

    def rows(self) -> Callable[[slice], np.ndarray]:
        """Opens it for reading: some of its rows [rows, in], dequantised."""
        ...


class QuantizedFolder:
    """A folder some of whose tensors are quantised: a checkpoint like any other, by their dense names.

    Attributes:
        path: The folder.
        config: From its config.json.
        stored: Every tensor as it is dense; ``dtype`` is "nf4", "fp4", "int8" or "float8" of a quantised one.

    Raises:
        SpielError: If parts of a quantised tensor are missing or do not fit; it is named.
    """

    naming = staticmethod(SafetensorsFolder.naming)

    def __init__(self, folder: SafetensorsFolder):
        self._folder = folder
        self.path, self.config = folder.path, folder.config
        self._tensors: dict[str, Any] = {}
        parts: set[str] = set()
        for find in (_four_bit_tensors, _int8_tensors, _float8_tensors):
            for name, tensor, of_it in find(folder):
                self._tensors[name] = tensor
                parts.update(of_it)
        if self._tensors:
            parts.update(name for name in folder.stored if name.endswith(_OF_ACTIVATIONS))
        dense = {name: tensor for name, tensor in folder.stored.items() if name not in parts}
        self.stored = dense | {name: tensor.stored for name, tensor in self._tensors.items()}

    @property
    def quantized(self) -> bool:
        """Whether any tensor is."""
        return bool(self._tensors)

    def read(self, name: str, parts: Sequence[Part]) -> list[np.ndarray]:
        """Parts of one tensor, dequantised if need be."""
        if name not in self._tensors:
            return self._folder.read(name, parts)
        rows = self._tensors[name].rows()
        return [_in_pieces(rows, *part) for part in parts]

    def tokenizer(self) -> Any:
        """The folder's tokenizer."""
        return self._folder.tokenizer()

    def described(self, spec: Weight, names: Iterable[str]) -> Weight:
        """How a parameter is held whose tensors have these names: as these are, where they are of its kind.

        Args:
            spec: How it would be held if none were quantised in the file.
            names: Of its tensors, one a layer.

        Raises:
            SpielError: If the tensors differ from each other in what one array cannot.
        """
        names = list(names)
        kept = [t for name in names if (t := self._kept(name, type(spec))) is not None]
        if not kept or not isinstance(spec, FourBit):
            return spec
        mixed, nested = len(kept) < len(names), all(tensor.nested for tensor in kept)
        ways = {(tensor.block, tensor.dtype) for tensor in kept}
        if len(ways) > 1 or (mixed and not (nested and kept[0].block == spec.block)):
            raise SpielError(
                f"{self.path}: {names[0]} and those of the other layers are quantised in different ways: "
                "expected one block size and dtype (config.model.quantization = 'none' dequantises them)"
            )
        return spec.described(spec.shape, spec.dtype, kept[0].dtype, kept[0].block, nested)

    def held(self, name: str, like: Weight) -> Any | None:
        """One tensor with its arrays, on the host, as a layer of ``like``; None: it is not held so.

        Raises:
            SpielError: If a scale is not finite.
        """
        tensor = self._kept(name, type(like))
        weight = None if tensor is None else tensor.held(like)
        scales = [leaf for leaf in jax.tree.leaves(weight) if leaf.dtype == np.float32]
        if not all(np.isfinite(scale).all() for scale in scales):
            raise SpielError(f"{self.path}: a scale of {name} is not finite")
        return weight

    def _kept(self, name: str, kind: type) -> Any | None:
        tensor = self._tensors.get(name)
        return tensor if tensor is not None and tensor.kind is kind else None


def as_quantized(folder: SafetensorsFolder) -> SafetensorsFolder | QuantizedFolder:
    """A folder, its quantised tensors put together, if it has any."""
    found = QuantizedFolder(folder)
    return found if found.quantized else folder


def _in_pieces(rows: Callable[[slice], np.ndarray], wanted: slice, columns: slice) -> np.ndarray:
    """[rows, columns], dequantised a few rows at a time."""
    piece = rows(slice(wanted.start, wanted.start + 1))
    found = np.empty((wanted.stop - wanted.start, columns.stop - columns.start), piece.dtype)
    step = max(1, _AT_A_TIME // piece.shape[1])
    for start in range(wanted.start, wanted.stop, step):
        stop = min(start + step, wanted.stop)
        found[start - wanted.start : stop - wanted.start] = rows(slice(start, stop))[:, columns]
    return found


def _whole(folder: SafetensorsFolder, name: str) -> np.ndarray:
    """A small tensor."""
    shape = folder.stored[name].shape
    return folder.read(name, [tuple(slice(0, size) for size in shape)])[0].reshape(shape)


def _needed(folder: SafetensorsFolder, name: str, of: str, shapes: Iterable[tuple[int, ...]]) -> str:
    """The name, if a tensor of one of these shapes is there.

    Raises:
        SpielError: If not.
    """
    expected = " or ".join(str(list(shape)) for shape in shapes)
    found = folder.stored.get(name)
    if found is None:
        raise SpielError(f"{folder.path}: {of} is quantised, but {name} {expected} is missing")
    if found.shape not in shapes:
        raise SpielError(
            f"{folder.path}: {name} is {list(found.shape)}, expected {expected} for {of}, which is quantised"
        )
    return name


@dataclass(frozen=True)
class _FourBitTensor:
    folder: SafetensorsFolder
    name: str
    kind: type[FourBit]
    stored: Stored
    block: int
    dtype: np.dtype  # of what it stands for
    state: Mapping[str, Any]
    nested: bool  # whether its scales are quantised as we hold such

    def _part(self, name: str) -> np.ndarray:
        return _whole(self.folder, f"{self.name}.{name}")

    def scales(self) -> np.ndarray:
        """[blocks] float32."""
        absmax = self._part("absmax").reshape(-1)
        if "nested_blocksize" not in self.state:
            return absmax.astype(np.float32)
        levels = self._part("nested_quant_map").astype(np.float32)[absmax]
        nested = np.repeat(self._part("nested_absmax"), self.state["nested_blocksize"])[: levels.size]
        return levels * nested + np.float32(self.state["nested_offset"])

    def rows(self) -> Callable[[slice], np.ndarray]:
        """See ``_Quantized``."""
        scales, pairs, width = self.scales(), self.folder.mapped(self.name), self.stored.shape[1]

        def some(rows: slice) -> np.ndarray:
            first, stop = rows.start * width, rows.stop * width
            two = np.asarray(pairs[first // 2 : -(-stop // 2)])
            codes = np.stack([two >> 4, two & 15], axis=1).reshape(-1)
            codes = codes[first % 2 :][: stop - first]
            blocks = np.arange(first, stop) // self.block
            return (self.kind.table[codes] * scales[blocks]).astype(self.dtype).reshape(-1, width)

        return some

    def held(self, like: FourBit) -> FourBit:
        """Its arrays, shaped as those of a layer of ``like``."""
        rows, columns = self.stored.shape
        pairs = np.array(self.folder.mapped(self.name)).reshape(rows, columns // 2)
        nested = offset = None
        if like.nested_absmax is None:
            absmax = self.scales()
        else:
            absmax, nested = self._part("absmax"), self._part("nested_absmax").reshape(-1)
            offset = np.array([self.state["nested_offset"]], np.float32)
        absmax = absmax.reshape(rows, -1) if columns % self.block == 0 else absmax.reshape(-1)
        return self.kind(pairs, absmax, nested, offset, like.dtype, like.through, like.block)  # type: ignore


def _four_bit_tensors(folder: SafetensorsFolder) -> Iterable[tuple[str, _FourBitTensor, list[str]]]:
    for key in [key for key in folder.stored if _STATE in key]:
        name, _, quant_type = key.partition(_STATE)
        state = _state(folder, key, quant_type)
        shape, block = tuple(state["shape"]), state["blocksize"]
        size = math.prod(shape)
        blocks = -(-size // block)
        pairs = folder.stored.get(name)
        if pairs is None or folder.mapped(name).size != -(-size // 2):
            raise SpielError(f"{folder.path}: {name} is not there with {-(-size // 2)} bytes, as {key} says")
        parts = [key, _needed(folder, f"{name}.absmax", name, [(blocks,)])]
        if f"{name}.quant_map" in folder.stored:
            parts.append(f"{name}.quant_map")  # told by the kind
        double, usual = "nested_blocksize" in state, False
        if double:
            groups = -(-blocks // state["nested_blocksize"])
            parts.append(_needed(folder, f"{name}.nested_absmax", name, [(groups,)]))
            parts.append(_needed(folder, f"{name}.nested_quant_map", name, [(256,)]))
            usual = state["nested_blocksize"] == NESTED
            usual &= np.array_equal(_whole(folder, parts[-1]), DYNAMIC)
        stored = Stored(shape, quant_type, floating=True)
        kind, dtype = _FOUR_BIT[quant_type], _DTYPES[state["dtype"]]
        yield name, _FourBitTensor(folder, name, kind, stored, block, dtype, state, usual), parts


def _state(folder: SafetensorsFolder, key: str, quant_type: str) -> dict[str, Any]:
    """What bitsandbytes says of a tensor, checked."""
    try:
        state = json.loads(_whole(folder, key).tobytes())
        size = [state["blocksize"], *state["shape"], state.get("nested_blocksize", 1)]
        fits = all(isinstance(n, int) and n > 0 for n in size) and len(state["shape"]) == 2
        float(state.get("nested_offset", 0.0))
        fits &= state["dtype"] in _DTYPES and state["quant_type"] == quant_type in _FOUR_BIT
        fits &= ("nested_blocksize" in state) == ("nested_offset" in state)
    except (ValueError, KeyError, TypeError) as error:
        raise SpielError(f"{folder.path}: {key} cannot be read: {type(error).__name__} {error}") from error
    if not fits:
        raise SpielError(
            f"{folder.path}: {key} says {state}: expected quant_type {' or '.join(_FOUR_BIT)}, a shape of "
            f"two axes, dtype {' or '.join(_DTYPES)}, positive block sizes"
        )
    return state


@dataclass(frozen=True)
class _Int8Tensor:
    folder: SafetensorsFolder
    name: str
    stored: Stored
    kind = Int8

    def _absmax(self) -> np.ndarray:
        return _whole(self.folder, self.name.removesuffix("weight") + "SCB").reshape(-1, 1).astype(np.float32)

    def rows(self) -> Callable[[slice], np.ndarray]:
        """See ``_Quantized``."""
        absmax, width = self._absmax(), self.stored.shape[1]

        def some(rows: slice) -> np.ndarray:
            (codes,) = self.folder.read(self.name, [(rows, slice(0, width))])
            return codes.astype(np.float32) * absmax[rows] * np.float32(1 / 127)

        return some

    def held(self, like: Int8) -> Int8:
        """Its arrays."""
        return Int8(_whole(self.folder, self.name), self._absmax(), like.dtype)  # type: ignore


def _int8_tensors(folder: SafetensorsFolder) -> Iterable[tuple[str, _Int8Tensor, list[str]]]:
    for name, tensor in folder.stored.items():
        module = name.removesuffix("weight")
        scale = f"{module}SCB"
        if tensor.dtype != "I8" or len(tensor.shape) != 2 or scale not in folder.stored:
            continue
        rows = tensor.shape[0]
        parts = [_needed(folder, scale, name, [(rows,), (rows, 1)])]
        if f"{module}weight_format" in folder.stored:
            if order := int(_whole(folder, f"{module}weight_format")):
                raise SpielError(
                    f"{folder.path}: {module}weight_format = {order}: expected 0, rows as they are; save the "
                    "model with a newer bitsandbytes"
                )
            parts.append(f"{module}weight_format")
        yield name, _Int8Tensor(folder, name, replace(tensor, dtype="int8", floating=True)), parts


@dataclass(frozen=True)
class _Float8Tensor:
    folder: SafetensorsFolder
    name: str
    stored: Stored
    dtype: Any
    scale: str  # name of it
    kind = None

    def rows(self) -> Callable[[slice], np.ndarray]:
        """See ``_Quantized``."""
        height, width = self.stored.shape
        scale = _whole(self.folder, self.scale).astype(np.float32)
        tall, wide = _block_size(self.folder)
        if scale.shape != (-(-height // tall), -(-width // wide)):  # one for all, or one for each row
            scale = scale.reshape(-1, 1)
            tall, wide = height // scale.size, width
        entries = self.folder.mapped(self.name).view(self.dtype).reshape(height, width)

        def some(rows: slice) -> np.ndarray:
            by_row = scale[np.arange(rows.start, rows.stop) // tall]
            return entries[rows].astype(np.float32) * np.repeat(by_row, wide, axis=1)[:, :width]

        return some


def _float8_tensors(folder: SafetensorsFolder) -> Iterable[tuple[str, _Float8Tensor, list[str]]]:
    for name, tensor in folder.stored.items():
        if tensor.dtype not in _FLOAT8 or len(tensor.shape) != 2:
            continue
        rows, columns = tensor.shape
        tall, wide = _block_size(folder)
        names = [scale for scale in (f"{name}_scale_inv", f"{name}_scale") if scale in folder.stored]
        shapes = [(), (1,), (1, 1), (rows,), (rows, 1), (-(-rows // tall), -(-columns // wide))]
        scale = _needed(folder, names[0] if names else f"{name}_scale_inv", name, shapes)
        stored = Stored(tensor.shape, "float8", floating=True)
        yield name, _Float8Tensor(folder, name, stored, _FLOAT8[tensor.dtype], scale), [scale]


@functools.lru_cache(maxsize=8)
def _block_size(folder: SafetensorsFolder) -> tuple[int, int]:
    """Rows and columns that have a scale together, where these are blocks."""
    described = read_json(folder.path / "config.json").get("quantization_config")
    size = described.get("weight_block_size") if isinstance(described, dict) else None
    if size is None:
        return 128, 128
    if not (isinstance(size, list) and len(size) == 2 and all(isinstance(n, int) and n > 0 for n in size)):
        raise SpielError(
            f"{folder.path / 'config.json'}: weight_block_size = {size}: expected two positive integers"
        )
    return size[0], size[1]
