"""The layout of the original implementation (AlanAnsell/peft): PEFT's, of a type SFT."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from spiel_jax.adapters.adapter import Adapter, AdapterError
from spiel_jax.adapters.formats.format import Export, register
from spiel_jax.adapters.formats.peft import About, PeftFormat, sparse_adapter
from spiel_jax.adapters.sparse_adapter import SparseAdapter

_INDICES, _VALUES = "sft_delta.indices", "sft_delta.values"

_ALGORITHMS = {"spiel_ag": "rigl", "spiel_ma": "sm3"}


@register
class Reference(PeftFormat):
    """Flat positions and values of each module, whose number the configuration lists."""

    name = "reference"
    kinds = ("sparse",)
    peft_type = "SFT"
    parts = (_INDICES, _VALUES)
    neutral = frozenset(
        {
            "candidate_reselection_proportion",
            "candidate_reselection_steps",
            "density",
            "dtype",
            "initial_reselection_rate",
            "num_tunable_weights",
            "reselection_rate_policy",
            "reselection_steps",
            "selection_accumulation_steps",
            "selection_algorithm",
        }
    )
    read_keys = frozenset({"num_deltas"})

    def contents(self, export: Export) -> tuple[dict[str, Any], dict[str, dict[str, np.ndarray]]]:
        """See ``PeftFormat``."""
        adapter, settings = export.adapter, export.adapter.origin.config
        assert isinstance(adapter, SparseAdapter)
        weights, counts = {}, {}
        for name, entries in sorted(adapter.entries.items()):
            if entries.positions.dtype != np.int32:
                raise AdapterError(f"{name} has more entries than int32 can count: use another format")
            weights[name] = {_INDICES: entries.positions, _VALUES: entries.values}
            counts[name.removesuffix(".weight")] = entries.count
        policy = settings.get("spiel.schedule")
        keys = {
            "candidate_reselection_steps": None,
            "density": settings.get("targets.density"),
            "dtype": "float32",
            "initial_reselection_rate": settings.get("spiel.rate", 0.2),
            "modules_to_save": None,
            "num_deltas": counts,
            "num_tunable_weights": settings.get("targets.num_tunable") or adapter.count,
            "reselection_rate_policy": policy if policy in ("linear", "cosine") else "linear",
            "reselection_steps": settings.get("spiel.every", 20),
            "selection_accumulation_steps": settings.get("spiel.accumulation", 5),
            "selection_algorithm": _ALGORITHMS.get(settings.get("method", ""), "rigl"),
        }
        return keys, weights

    def adapter(
        self, config: Mapping[str, Any], weights: Mapping[str, dict[str, np.ndarray]], about: About
    ) -> Adapter:
        """See ``PeftFormat``."""
        counts = config.get("num_deltas")
        if not isinstance(counts, dict):
            raise AdapterError(
                f"num_deltas = {str(counts)[:100]}: expected the number of deltas of each module"
            )
        found = {name.removesuffix(".weight"): parts[_INDICES].size for name, parts in weights.items()}
        if counts != found:
            name = sorted(n for n in counts.keys() | found.keys() if counts.get(n) != found.get(n))[0]
            raise AdapterError(
                f"num_deltas says {counts.get(name)} of {name[:200]!r}, the file has {found.get(name)}"
            )
        return sparse_adapter(weights, about, (_INDICES, _VALUES))
