"""PEFT's SUPERTUNING: flat positions and values that are added to the weight.

With a rank it is Supra (arXiv 2607.09287): matrices of low rank on the same modules as well.
"""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from spiel_jax.adapters.adapter import Adapter, AdapterError
from spiel_jax.adapters.files import read_json
from spiel_jax.adapters.formats.format import Export, register
from spiel_jax.adapters.formats.peft import CONFIG, About, PeftFormat, matrix, sparse_adapter
from spiel_jax.adapters.hybrid import HybridAdapter
from spiel_jax.adapters.parametrized import LoraAdapter, LowRank
from spiel_jax.adapters.sparse_adapter import SparseAdapter

_INDICES, _VALUES = "supertuning_indices", "supertuning_values"
_A, _B = "supertuning_lora_A.weight", "supertuning_lora_B.weight"


@register
class SuperTuning(PeftFormat):
    """All modules have one sparsity: what has fewer entries is filled up with zeros at its last position."""

    name = "peft_supertuning"
    kinds = ("sparse",)
    peft_type = "SUPERTUNING"
    parts = (_INDICES, _VALUES)
    has_rank: ClassVar[bool] = False
    neutral = frozenset(
        {"sparsity", "select_top", "init_weights", "save_precomputed_indices", "lora_dropout"}
    )

    def recognises(self, path: Path) -> bool:
        """See ``Format``."""
        return super().recognises(path) and bool(read_json(path / CONFIG).get("r")) is self.has_rank

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


@register
class Supra(SuperTuning):
    """The hybrid: matrices of low rank on the same modules, of one rank and one scale."""

    name = "peft_supra"
    kinds = ("hybrid",)
    parts = (_INDICES, _VALUES, _A, _B)
    has_rank = True
    read_keys = frozenset({"r", "lora_alpha"})

    def contents(self, export: Export) -> tuple[dict[str, Any], dict[str, dict[str, np.ndarray]]]:
        """See ``PeftFormat``."""
        adapter = export.adapter
        assert isinstance(adapter, HybridAdapter)
        matrices = adapter.low_rank.matrices
        if alone := sorted(adapter.sparse.shapes.keys() ^ matrices.keys()):
            raise AdapterError(
                f"{alone[0]} has deltas or matrices alone: SUPERTUNING has both on every module"
            )
        ranks = {term.rank for term in matrices.values()}
        alphas = {adapter.low_rank.scale(name) * term.rank for name, term in matrices.items()}
        if len(ranks) > 1 or len(alphas) > 1:
            raise AdapterError(
                "SUPERTUNING has one rank and one alpha: "
                f"these are of rank {_some(ranks)} and alpha {_some(alphas)}"
            )
        keys, weights = super().contents(dataclasses.replace(export, adapter=adapter.sparse))
        for name, term in matrices.items():
            weights[name] |= {_A: term.a, _B: term.b}
        return {**keys, "lora_alpha": alphas.pop(), "r": ranks.pop()}, weights

    def meaning(self, adapter: Adapter) -> Any:
        """See ``PeftFormat``: the scale."""
        assert isinstance(adapter, HybridAdapter)
        return sorted({adapter.low_rank.scale(name) for name in adapter.low_rank.matrices})

    def adapter(
        self, config: Mapping[str, Any], weights: Mapping[str, dict[str, np.ndarray]], about: About
    ) -> Adapter:
        """See ``PeftFormat``."""
        rank = config["r"]
        alpha = config.get("lora_alpha")
        alpha = 2 * rank if alpha is None else alpha  # as PEFT has it
        if type(rank) is not int or type(alpha) not in (int, float) or not math.isfinite(alpha):
            raise AdapterError(f"r = {str(rank)[:100]}, lora_alpha = {str(alpha)[:100]}: expected numbers")
        matrices = {}
        for name, parts in weights.items():
            a, b = (matrix(name, parts[part]) for part in (_A, _B))
            if a.ndim != 2 or len(a) != rank:
                raise AdapterError(f"{name}: lora_A is {list(a.shape)}, which contradicts r = {rank}")
            matrices[name] = LowRank(a, b, float(alpha))
        low_rank = LoraAdapter(matrices, False, about.origin)
        for name, shape in low_rank.shapes.items():
            about.known(name, shape)
        return HybridAdapter(sparse_adapter(weights, about, (_INDICES, _VALUES)), low_rank)


def _some(numbers: set[Any]) -> str:
    return ", ".join(f"{number:g}" for number in sorted(numbers)[:5])


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
