"""Tensors of a file that torch.save wrote, read without torch and without running what is in it."""

import pickle
import zipfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from spiel_jax.adapters.adapter import AdapterError
from spiel_jax.errors import NotFoundError

_STORAGES = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
}


def read_torch(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a file that ``torch.save`` wrote of a dict of them.

    Nothing but dicts and dense tensors is made of it, whatever it asks for.

    Raises:
        NotFoundError: If there is none.
        AdapterError: If it is damaged, of an old format, or holds anything else.
    """
    if not path.is_file():
        raise NotFoundError(f"there is no {path}")
    try:
        with zipfile.ZipFile(path) as archive:
            (program,) = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            if archive.getinfo(program).file_size > 2**28:
                raise ValueError("its index is larger than 256 MiB")
            with archive.open(program) as file:
                found = _Unpickler(file, archive, program.removesuffix("data.pkl")).load()
    except Exception as error:  # a pickle can be wrong in any way
        raise AdapterError(f"{path} is damaged, or more than tensors of torch: {error}") from error
    if not isinstance(found, dict):
        raise AdapterError(f"{path} holds a {type(found).__name__}, expected a dict of tensors")
    for name, tensor in found.items():
        if not isinstance(name, str) or not isinstance(tensor, np.ndarray):
            raise AdapterError(f"{path}: {name!r} is no tensor")
    return found


class _Unpickler(pickle.Unpickler):
    """Knows the few functions that a dict of tensors is made with."""

    def __init__(self, file: Any, archive: zipfile.ZipFile, prefix: str):
        super().__init__(file)
        self._archive, self._prefix = archive, prefix

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _tensor
        if module == "torch" and name in _STORAGES:
            return np.dtype(_STORAGES[name])
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")

    def persistent_load(self, pid: Any) -> np.ndarray:
        _, dtype, key, _, size = pid
        if not isinstance(dtype, np.dtype) or not str(key).isalnum():
            raise pickle.UnpicklingError(f"a storage {pid!r}")
        info = self._archive.getinfo(f"{self._prefix}data/{key}")
        if info.file_size != size * dtype.itemsize or info.compress_type != zipfile.ZIP_STORED:
            raise pickle.UnpicklingError(f"a storage of {info.file_size} bytes for {size} of {dtype}")
        return np.frombuffer(self._archive.read(info), dtype)


def _tensor(storage: np.ndarray, offset: int, shape: Any, stride: Any, *_: Any) -> np.ndarray:
    """A part of a storage; only such as reads it row by row."""
    shape, count = tuple(map(int, shape)), 1
    for size, step in zip(reversed(shape), reversed(stride), strict=True):
        if size < 0 or (size > 1 and step != count):
            raise pickle.UnpicklingError(f"a tensor {shape} of strides {tuple(stride)}")
        count *= size
    if not 0 <= offset <= storage.size - count:
        raise pickle.UnpicklingError(f"a tensor of {count} numbers at {offset} of {storage.size}")
    return storage[offset : offset + count].reshape(shape)
