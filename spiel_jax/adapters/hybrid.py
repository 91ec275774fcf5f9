"""Adapters of two kinds on the same weights: sparse deltas and matrices of low rank."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from spiel_jax.adapters.adapter import Adapter, Origin, Tensor
from spiel_jax.adapters.parametrized import LoraAdapter
from spiel_jax.adapters.sparse_adapter import SparseAdapter
from spiel_jax.losses.next_token import Params
from spiel_jax.models.config import ModelConfig


@dataclass(frozen=True)
class HybridAdapter(Adapter):
    """Sparse deltas and LoRA: the deltas are merged first, then the matrices.

    Attributes:
        sparse: The deltas.
        low_rank: The matrices.
    """

    sparse: SparseAdapter
    low_rank: LoraAdapter

    kind = "hybrid"

    @property
    def origin(self) -> Origin:  # pyright: ignore[reportIncompatibleVariableOverride]
        """See ``Adapter``."""
        return self.sparse.origin

    @property
    def shapes(self) -> Mapping[str, tuple[int, int]]:
        """See ``Adapter``."""
        return {**self.sparse.shapes, **self.low_rank.shapes}

    def merged(self, name: str, tensor: Tensor, dtype: Any = None) -> Tensor:
        """See ``Adapter``; in another dtype than the tensor's the sum is rounded once."""
        if name not in self.low_rank.shapes:
            return self.sparse.merged(name, tensor, dtype)
        if name in self.sparse.shapes:
            first = None if dtype is None or dtype == tensor.dtype else np.float32
            dtype = tensor.dtype if dtype is None else dtype
            tensor = self.sparse.merged(name, tensor, first)
        return self.low_rank.merged(name, tensor, dtype)

    def merge(self, params: Params, model: ModelConfig) -> Params:
        """See ``Adapter``."""
        return self.low_rank.merge(self.sparse.merge(params, model), model)
