"""Our own format: one safetensors file that nothing but ``safetensors`` is needed to read."""

from pathlib import Path

import numpy as np

from spiel_jax.adapters.adapter import Adapter, AdapterError
from spiel_jax.adapters.entries import Entries
from spiel_jax.adapters.files import DTYPES, read_tensors, write_dict
from spiel_jax.adapters.formats.description import describe, described
from spiel_jax.adapters.formats.format import Export, Format, register
from spiel_jax.adapters.sparse_adapter import SparseAdapter
from spiel_jax.models.config import ModelConfig

FILE = "adapter.safetensors"
_POSITIONS, _VALUES = ".positions", ".values"


@register
class Native(Format):
    """``adapter.safetensors``: positions and values of each weight; see the page on the format."""

    name = "native"
    kinds = ("sparse",)
    reads = True

    def write(self, export: Export, folder: Path) -> None:
        """See ``Format``; the dtype is that of the values, float32 or bfloat16."""
        adapter, dtype = export.adapter, np.dtype(export.dtype or np.float32)
        assert isinstance(adapter, SparseAdapter)
        if dtype not in (DTYPES["F32"], DTYPES["BF16"]):
            raise AdapterError(f"values of dtype {dtype}: native has float32 or bfloat16")
        tensors = {}
        for name, entries in sorted(adapter.entries.items()):
            tensors[name + _POSITIONS] = entries.positions
            tensors[name + _VALUES] = entries.values.astype(dtype)
        metadata = describe(adapter, tensors, self.name, density=adapter.density)
        write_dict(folder / FILE, tensors, metadata)

    def recognises(self, path: Path) -> bool:
        """See ``Format``."""
        return path.suffix == ".safetensors" if path.is_file() else (path / FILE).is_file()

    def read(self, path: Path, model: ModelConfig | None) -> Adapter:
        """See ``Format``."""
        tensors, metadata = read_tensors(path if path.is_file() else path / FILE)
        about = described(metadata, tensors)
        if about.said.get("format") != self.name:
            raise AdapterError(f"its format is {about.said.get('format')!r}, expected {self.name!r}")
        names = {name.removesuffix(_POSITIONS).removesuffix(_VALUES) for name in tensors}
        if tensors.keys() != {name + part for name in names for part in (_POSITIONS, _VALUES)}:
            raise AdapterError("expected positions and values of each weight and nothing else")
        if names != about.shapes.keys():
            raise AdapterError("it does not say the shapes of just the weights that it has entries of")
        entries = {}
        for name in sorted(names):
            shape = about.shape(name, model)
            try:
                entries[name] = Entries(shape, tensors[name + _POSITIONS], tensors[name + _VALUES])
            except AdapterError as error:
                raise AdapterError(f"{name}: {error}") from error
        return SparseAdapter(entries, about.origin)
