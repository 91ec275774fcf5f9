"""An adapter of sparse deltas."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from spiel_jax.adapters.adapter import Adapter, Origin, Tensor, cast
from spiel_jax.adapters.entries import Entries
from spiel_jax.adapters.stacking import stacked_deltas
from spiel_jax.losses.next_token import Params
from spiel_jax.models.config import ModelConfig
from spiel_jax.sparse.delta import SparseDelta, merge


@dataclass(frozen=True)
class SparseAdapter(Adapter):
    """Sparse deltas: what a run of SpIEL, or of a static mask, leaves.

    Attributes:
        entries: Hugging Face name of the weight to its entries.
        origin: Where it comes from.
    """

    entries: Mapping[str, Entries]
    origin: Origin = field(default_factory=Origin)

    kind = "sparse"

    @property
    def shapes(self) -> Mapping[str, tuple[int, int]]:
        """See ``Adapter``."""
        return {name: entries.shape for name, entries in self.entries.items()}

    @property
    def count(self) -> int:
        """Entries of all matrices."""
        return sum(entries.count for entries in self.entries.values())

    @property
    def density(self) -> float:
        """Entries as a share of those of the weights that it changes."""
        return self.count / sum(rows * columns for rows, columns in self.shapes.values())

    def merged(self, name: str, tensor: Tensor, dtype: Any = None) -> Tensor:
        """See ``Adapter``: base + value at the entries, formed in float32."""
        entries = self.entries[name]
        dtype = tensor.dtype if dtype is None else dtype
        place = entries.coordinates()
        new = cast(tensor[place].astype(np.float32) + entries.values, dtype)
        whole = cast(tensor, dtype)
        if isinstance(whole, jax.Array):
            return whole.at[place].set(new, unique_indices=True, indices_are_sorted=True)
        whole[place] = new
        return whole

    def merge(self, params: Params, model: ModelConfig) -> Params:
        """See ``Adapter``."""
        return merge(params, self.deltas(model))

    def deltas(self, model: ModelConfig) -> dict[str, SparseDelta]:
        """The adapter as deltas to ``merge`` into one of our models: one for each parameter.

        Raises:
            AdapterError: If it does not fit the model.
        """
        return stacked_deltas(self.entries, self.parameters(model), model)
