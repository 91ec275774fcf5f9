"""Adapters: what runs leave behind, in files that other programs read, and on a base model again."""

from spiel_jax.adapters import formats as _formats  # noqa: F401  (registers them)
from spiel_jax.adapters.adapter import (
    Adapter,
    AdapterError,
    Entries,
    Origin,
    SparseAdapter,
    merge_into,
)
from spiel_jax.adapters.base import Base, open_base
from spiel_jax.adapters.formats.format import FORMATS, Export, Format, register
from spiel_jax.adapters.formats.sparse_update import (
    WeightPatch,
    apply_patches,
    read_patches,
    weight_patches,
)
from spiel_jax.adapters.from_run import adapter_of, adapter_of_run, base_of_run
from spiel_jax.adapters.interchange import read_adapter, write_adapter
from spiel_jax.adapters.parametrized import Factors, FullAdapter, IA3Adapter, LoraAdapter, LowRank

__all__ = [
    "FORMATS",
    "Adapter",
    "AdapterError",
    "Base",
    "Entries",
    "Export",
    "Factors",
    "Format",
    "FullAdapter",
    "IA3Adapter",
    "LoraAdapter",
    "LowRank",
    "Origin",
    "SparseAdapter",
    "WeightPatch",
    "adapter_of",
    "adapter_of_run",
    "apply_patches",
    "base_of_run",
    "merge_into",
    "open_base",
    "read_adapter",
    "read_patches",
    "register",
    "weight_patches",
    "write_adapter",
]
