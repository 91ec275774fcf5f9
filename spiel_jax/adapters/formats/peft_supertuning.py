"""PEFT's SUPERTUNING: flat positions and values that are added to the weight."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from spiel_jax.adapters.adapter import Adapter, AdapterError, SparseAdapter
from spiel_jax.adapters.formats.format import Export, register
from spiel_jax.adapters.formats.peft import About, PeftFormat, sparse_adapter

_INDICES, _VALUES = "supertuning_indices", "supertuning_values"


@register
class SuperTuning(PeftFormat):
    """All modules have one sparsity: what has fewer entries is filled up with zeros at its last position."""

    name = "peft_supertuning"
    kinds = ("sparse",)
    peft_type = "SUPERTUNING"
    parts = (_INDICES, _VALUES)
    neutral = frozenset(
        {"sparsity", "select_top", "init_weights", "save_precomputed_indices", "lora_dropout"}
    )

    def contents(self, export: Export) -> tuple[dict[str, Any], dict[str, dict[str, np.ndarray]]]:
        """See ``PeftFormat``."""
        adapter = export.adapter
        assert isinstance(adapter, SparseAdapter)
        sparsity = _sparsity(adapter)
        weights = {}
        for name, entries in adapter.entries.items():
            if entries.positions.dtype != np.int32:
                raise AdapterError(f"{name} has more entries than SUPERTUNING's int32 can count: use SHIRA")
            more = _count(entries.shape, sparsity) - entries.count
            last = entries.positions[-1]
            weights[name] = {
                _INDICES: np.pad(entries.positions, (0, more), constant_values=last),
                _VALUES: np.pad(entries.values, (0, more)),
            }
        keys = {
            "init_weights": True,
            "lora_alpha": None,
            "lora_dropout": 0.0,
            "modules_to_save": None,
            "r": None,
            "save_precomputed_indices": True,
            "select_top": True,
            "sparsity": sparsity,
        }
        return keys, weights

    def adapter(
        self, config: Mapping[str, Any], weights: Mapping[str, dict[str, np.ndarray]], about: About
    ) -> Adapter:
        """See ``PeftFormat``."""
        return sparse_adapter(weights, about, (_INDICES, _VALUES))


def _count(shape: tuple[int, int], sparsity: float) -> int:
    """Entries of a module, by PEFT's own formula."""
    return int(shape[0] * shape[1] * (1 - sparsity))


def _sparsity(adapter: SparseAdapter) -> float:
    """The largest that leaves every module room for its entries."""
    filled = [(e.count, e.shape[0] * e.shape[1]) for e in adapter.entries.values()]
    count, size = max(filled, key=lambda one: one[0] / one[1])
    if count == size:
        return 0.0
    sparsity = 1 - (count + 0.5) / size  # count / size can come out one too few
    while any(_count(e.shape, sparsity) < e.count for e in adapter.entries.values()):
        sparsity = max(0.0, sparsity - 0.1 / max(size for _, size in filled))
    return max(0.0, sparsity)
