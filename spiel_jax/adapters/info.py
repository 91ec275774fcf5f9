"""What is in a sparse adapter: entries, density and norm by layer and kind of weight."""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from spiel_jax.adapters.adapter import Adapter, AdapterError
from spiel_jax.adapters.sparse_adapter import SparseAdapter

_LAYER = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True)
class Share:
    """What an adapter has of some weights.

    Attributes:
        count: Entries of the adapter.
        size: Entries of the weights.
        squares: Sum of the squares of its values.
        largest: Of their magnitudes.
    """

    count: int
    size: int
    squares: float
    largest: float

    @property
    def density(self) -> float:
        """Entries as a share of those of the weights."""
        return self.count / self.size

    @property
    def norm(self) -> float:
        """Of the values, Euclidean."""
        return math.sqrt(self.squares)


@dataclass(frozen=True)
class Info:
    """What is in a sparse adapter.

    Attributes:
        cells: (layer, kind of weight such as "mlp.up_proj") to what is there; the layer is -1 outside of one.
    """

    cells: Mapping[tuple[int, str], Share]

    @property
    def total(self) -> Share:
        """All of it."""
        return _sum(self.cells.values())

    @property
    def layers(self) -> dict[int, Share]:
        """Layer by layer."""
        numbers = sorted({layer for layer, _ in self.cells})
        return {n: _sum(share for (layer, _), share in self.cells.items() if layer == n) for n in numbers}

    @property
    def modules(self) -> dict[str, Share]:
        """By kind of weight."""
        kinds = dict.fromkeys(kind for _, kind in self.cells)
        return {k: _sum(share for (_, kind), share in self.cells.items() if kind == k) for k in kinds}


def info(adapter: Adapter) -> Info:
    """Counts and norms of a sparse adapter.

    Raises:
        AdapterError: If it is not sparse.

    Example:
        >>> from spiel_jax.adapters import Entries
        >>> entries = Entries((2, 3), np.array([1, 5]), np.array([3.0, -4.0], "float32"))
        >>> found = info(SparseAdapter({"model.layers.7.mlp.up_proj.weight": entries}))
        >>> list(found.cells), found.total.norm, round(found.total.density, 2)
        ([(7, 'mlp.up_proj')], 5.0, 0.33)
    """
    if not isinstance(adapter, SparseAdapter):
        raise AdapterError(f"an adapter is {adapter.kind}: expected a sparse one, which has entries")
    cells = {}
    for name, entries in adapter.entries.items():
        values = entries.values.astype(np.float64)
        size = entries.shape[0] * entries.shape[1]
        share = Share(entries.count, size, float(values @ values), float(np.abs(values).max()))
        cells[layer_and_module(name)] = share
    return Info(cells)


def layer_and_module(name: str) -> tuple[int, str]:
    """Layer and kind of a weight by its Hugging Face name; layer -1 for one that is in none.

    Example:
        >>> layer_and_module("model.layers.12.self_attn.q_proj.weight")
        (12, 'self_attn.q_proj')
        >>> layer_and_module("lm_head.weight")
        (-1, 'lm_head')
    """
    plain = name.removesuffix(".weight")
    found = _LAYER.search(plain)
    return (int(found[1]), plain[found.end() :]) if found else (-1, plain)


def _sum(shares: Iterable[Share]) -> Share:
    shares = list(shares)
    return Share(
        sum(one.count for one in shares),
        sum(one.size for one in shares),
        sum(one.squares for one in shares),
        max((one.largest for one in shares), default=0.0),
    )
