"""Adapters: what runs leave behind, in files that other programs read, and on a base model again."""

from spiel_jax.adapters import formats as _formats  # noqa: F401  (registers them)
from spiel_jax.adapters.adapter import Adapter, AdapterError, Origin, merge_into
from spiel_jax.adapters.algebra import (
    add,
    intersect,
    overlap,
    prune,
    scale,
    subtract,
    ties,
    union,
    weighted_sum,
)
from spiel_jax.adapters.base import Base, open_base
from spiel_jax.adapters.entries import Entries
from spiel_jax.adapters.formats.format import FORMATS, Export, Format, register
from spiel_jax.adapters.formats.sparse_update import (
    WeightPatch,
    apply_patches,
    read_patches,
    weight_patches,
)
from spiel_jax.adapters.from_run import adapter_of, adapter_of_run, base_of_run
from spiel_jax.adapters.hot_swap import HotSwap
from spiel_jax.adapters.info import Info, Share, info
from spiel_jax.adapters.interchange import read_adapter, write_adapter
from spiel_jax.adapters.parametrized import Factors, FullAdapter, IA3Adapter, LoraAdapter, LowRank
from spiel_jax.adapters.sparse_adapter import SparseAdapter

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
    "HotSwap",
    "IA3Adapter",
    "Info",
    "LoraAdapter",
    "LowRank",
    "Origin",
    "Share",
    "SparseAdapter",
    "WeightPatch",
    "adapter_of",
    "adapter_of_run",
    "add",
    "apply_patches",
    "base_of_run",
    "info",
    "intersect",
    "merge_into",
    "open_base",
    "overlap",
    "prune",
    "read_adapter",
    "read_patches",
    "register",
    "scale",
    "subtract",
    "ties",
    "union",
    "weight_patches",
    "weighted_sum",
    "write_adapter",
]
