"""PEFT's SHIRA: rows, columns and values that are added to the weight; it merges into 4- and 8-bit bases."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from spiel_jax.adapters.adapter import Adapter, AdapterError
from spiel_jax.adapters.formats.format import Export, register
from spiel_jax.adapters.formats.peft import About, PeftFormat, sparse_adapter
from spiel_jax.adapters.sparse_adapter import SparseAdapter

_INDICES, _VALUES = "shira_indices", "shira_weight"


@register
class Shira(PeftFormat):
    """Every module has r (in + out) entries: fewer are filled up with zeros at the last position."""

    name = "peft_shira"
    kinds = ("sparse",)
    peft_type = "SHIRA"
    parts = (_INDICES, _VALUES)
    neutral = frozenset({"r", "mask_type", "random_seed", "init_weights"})

    def contents(self, export: Export) -> tuple[dict[str, Any], dict[str, dict[str, np.ndarray]]]:
        """See ``PeftFormat``."""
        adapter = export.adapter
        assert isinstance(adapter, SparseAdapter)
        rank = max(-(-entries.count // sum(entries.shape)) for entries in adapter.entries.values())
        weights = {}
        for name, entries in adapter.entries.items():
            count = rank * sum(entries.shape)
            if count > entries.shape[0] * entries.shape[1]:
                raise AdapterError(
                    f"SHIRA would have {count} entries in every matrix like {name}, {list(entries.shape)}, "
                    "which are more than it has: use another format"
                )
            more = count - entries.count
            place = np.stack(entries.coordinates()).astype(np.int32)
            weights[name] = {
                _INDICES: np.pad(place, ((0, 0), (0, more)), mode="edge"),
                _VALUES: np.pad(entries.values, (0, more)),
            }
        keys = {
            "fan_in_fan_out": False,
            "init_weights": True,
            # of "random" PEFT draws a mask of every weight first, only to overwrite it
            "mask_type": "spiel_jax",
            "modules_to_save": None,
            "r": rank,
            "random_seed": None,
        }
        return keys, weights

    def adapter(
        self, config: Mapping[str, Any], weights: Mapping[str, dict[str, np.ndarray]], about: About
    ) -> Adapter:
        """See ``PeftFormat``."""
        return sparse_adapter(weights, about, (_INDICES, _VALUES), _flat)


def _flat(place: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Flat positions of [2, k] rows and columns, which on Windows are saved as float32."""
    if place.ndim != 2 or place.shape[0] != 2:
        raise AdapterError(f"{_INDICES} is {list(place.shape)}: expected [2, k]")
    if place.dtype.kind == "f":
        if not (
            np.isfinite(place).all() and (np.abs(place) < 2**31).all() and (place == np.trunc(place)).all()
        ):
            raise AdapterError(f"{_INDICES}: expected whole numbers")
        place = place.astype(np.int64)
    if place.dtype.kind != "i":
        raise AdapterError(f"{_INDICES} are {place.dtype}: expected integers")
    for numbers, size, what in zip(place, shape, ("row", "column"), strict=True):
        if ((numbers < 0) | (numbers >= size)).any():
            raise AdapterError(f"a {what} is outside a matrix of {list(shape)}")
    return place[0].astype(np.int64) * shape[1] + place[1]
