"""Files of adapters: written whole or not at all, and read without trust in what they hold."""

import hashlib
import json
import math
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from spiel_jax.adapters.adapter import AdapterError
from spiel_jax.errors import NotFoundError, SpielError

MARK = "spiel_jax.json"
"""Name of the file that says of a folder what wrote it and which files are its."""

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
}
"""Number types of adapters, as safetensors calls them."""

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Specs(dict[str, tuple[np.dtype, tuple[int, ...]]]):
    """Name to dtype and shape of the tensors that are going to be written."""

    @property
    def nbytes(self) -> int:
        """Bytes of all of them."""
        return sum(dtype.itemsize * math.prod(shape) for dtype, shape in self.values())


def write_tensors(
    path: Path, specs: Specs, tensors: Iterable[np.ndarray], metadata: Mapping[str, str]
) -> None:
    """Writes a safetensors file, a tensor at a time; equal contents give equal bytes.

    Args:
        path: The file.
        specs: What is going to be written, in this order.
        tensors: These tensors.
        metadata: Strings, in this order.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    start = 0
    for name, (dtype, shape) in specs.items():
        end = start + dtype.itemsize * math.prod(shape)
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for (name, (dtype, shape)), tensor in zip(specs.items(), tensors, strict=True):
            if tensor.dtype != dtype or tensor.shape != shape:
                raise ValueError(f"{name} is {tensor.dtype}{tensor.shape}, expected {dtype}{shape}")
            file.write(_bytes(tensor))


def _bytes(tensor: np.ndarray) -> memoryview:
    """The bytes of a tensor, without a copy of one that is contiguous."""
    flat: Any = np.ascontiguousarray(tensor).reshape(-1).view(np.uint8)
    return memoryview(flat)


def specs_of(tensors: Mapping[str, np.ndarray]) -> Specs:
    """What tensors are, wide numbers first, so that all are aligned."""
    order = sorted(tensors, key=lambda name: -tensors[name].dtype.itemsize)
    return Specs({name: (tensors[name].dtype, tensors[name].shape) for name in order})


def write_dict(path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Writes a safetensors file of tensors that are all there."""
    specs = specs_of(tensors)
    write_tensors(path, specs, (tensors[name] for name in specs), metadata)


def read_tensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The tensors and the metadata of a safetensors file.

    Raises:
        NotFoundError: If there is none.
        AdapterError: If it is damaged, or has numbers of a type that adapters do not have.
    """
    if not path.is_file():
        raise NotFoundError(f"there is no {path}")
    try:
        with safe_open(path, framework="np") as file:
            kinds = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
            if odd := {name: kind for name, kind in kinds.items() if kind not in DTYPES}:
                name, kind = next(iter(odd.items()))
                raise AdapterError(f"{path}: {name} is {kind}, expected one of {', '.join(DTYPES)}")
            return {name: file.get_tensor(name) for name in kinds}, dict(file.metadata() or {})
    except (SafetensorError, OSError, ValueError, TypeError, KeyError, OverflowError) as error:
        if isinstance(error, SpielError):
            raise
        raise AdapterError(f"{path} is damaged or no safetensors file: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
        NotFoundError: If there is none.
        AdapterError: If it is no JSON, or holds something else.
    """
    if not path.is_file():
        raise NotFoundError(f"there is no {path}")
    try:
        return parse_object(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise AdapterError(f"{path}: {error}") from error


def parse_object(text: str) -> dict[str, Any]:
    """The object that is JSON's meaning of a text.

    Raises:
        AdapterError: If it is no JSON, or means something else.
    """
    try:
        value = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise AdapterError(f"expected a JSON object, got {type(value).__name__}")
    return value


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file, readable."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def digest(tensors: Mapping[str, np.ndarray], *texts: str) -> str:
    """SHA-256 of tensors, their names, types and shapes, and of texts; hexadecimal."""
    found = hashlib.sha256()
    for text in texts:
        found.update(hashlib.sha256(text.encode()).digest())
    for name in sorted(tensors):
        tensor = tensors[name]
        found.update(f"{name} {_NAMES[tensor.dtype]} {list(tensor.shape)}\n".encode())
        found.update(_bytes(tensor))
    return found.hexdigest()


@contextmanager
def new_folder(out: Path, *, overwrite: bool = False, keep: Iterable[Path] = ()) -> Iterator[Path]:
    """A folder to write into that takes its place when all is written, and is gone after an error.

    Args:
        out: Its place. What this wrote there before is replaced.
        overwrite: Replace anything that is there.
        keep: Files and folders that must not be lost with it.

    Raises:
        AdapterError: If something else is there, or it cannot be written.
    """
    out = Path(os.path.abspath(out.expanduser()))
    _check_place(out, overwrite, keep)
    temporary = out.with_name(f".{out.name}.{secrets.token_hex(4)}")
    try:
        temporary.mkdir(parents=True)
        try:
            yield temporary
            names = sorted(path.name for path in temporary.iterdir())
            write_json(temporary / MARK, {"written_by": "spiel_jax", "files": names})
            old = out.with_name(f"{temporary.name}.old")
            if there := os.path.lexists(out):
                out.rename(old)
            try:
                temporary.rename(out)
            except OSError:
                if there:
                    old.rename(out)
                raise
            if there:
                shutil.rmtree(old)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        if isinstance(error, SpielError):
            raise
        raise AdapterError(f"{out} cannot be written: {error}") from error


def _check_place(out: Path, overwrite: bool, keep: Iterable[Path]) -> None:
    if not os.path.lexists(out):
        return
    if out.is_symlink() or not out.is_dir():
        raise AdapterError(f"{out} is there and no folder: choose another")
    real = out.resolve()
    for path in (Path.cwd(), Path.home(), *(path.expanduser() for path in keep)):
        if path.exists() and path.resolve().is_relative_to(real):
            raise AdapterError(f"{out} holds {path}, which is needed: choose another folder")
    found = {path.name for path in out.iterdir()}
    if found and not overwrite and not found <= _written(out):
        others = ", ".join(sorted(found - _written(out))[:3])
        raise AdapterError(f"{out} holds what this did not write ({others}): choose another, or --overwrite")


def _written(folder: Path) -> set[str]:
    """Names of the files that ``new_folder`` wrote into a folder."""
    try:
        mark = read_json(folder / MARK)
    except SpielError:
        return set()
    files = mark.get("files")
    return {MARK, *map(str, files)} if isinstance(files, list) else set()
