"""Random growth: SET and static random masks."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from spiel_jax.ops.selection import largest
from spiel_jax.ops.tree import named_key
from spiel_jax.optim.criteria.criterion import Complaint, Regridding, configured_schedule, register
from spiel_jax.optim.criteria.non_zeros import NonZeros
from spiel_jax.optim.schedules import Reselection
from spiel_jax.optim.zeros import draw_off_zeros, inactive
from spiel_jax.sparse.targets import Target


@register("random")
@dataclass(frozen=True)
class RandomGrowth(NonZeros):
    """Random entries: a static mask (SHiRA, SpaRTA), or with a replacement rate others grow (SET).

    Its only statistic is a PRNG key per matrix. A reselection takes O(k log k): one entry is drawn from each
    of n equal strata of the inactive entries.

    Attributes:
        key: Seed of the draws, an int, which may be traced.
        keep_zeros: See ``Criterion``. A reselection then draws a number for every entry, matrix by matrix.

    Example:
        >>> growth, target = RandomGrowth(), Target((2, 3), 5)
        >>> stats = growth.init({"w": target}, {})["w"]
        >>> active = jnp.array([0, 1, 2, 4, 5])
        >>> growth.incoming(stats, active, jnp.ones(5, bool), 1, target).tolist()  # one entry is left
        [3, 6, 6, 6, 6]

    References:
        Mocanu et al., `Scalable training of artificial neural networks with adaptive sparse connectivity
        <https://arxiv.org/abs/1707.04780>`_; Bhardwaj et al., `Sparse High Rank Adapters
        <https://arxiv.org/abs/2406.13175>`_.
    """

    own = ("spiel.drop_by",)
    default_rate = 0.0

    key: int | jax.Array = 0
    keep_zeros: bool = False

    @classmethod
    def from_config(cls, config: Any) -> "RandomGrowth":
        """See ``Criterion``."""
        return cls(config.seed)

    @classmethod
    def complaints(cls, config: Any) -> Iterator[Complaint]:
        """See ``Criterion``."""
        yield from super().complaints(config)
        if config.targets.spare and not config.spiel.rate and (config.spiel.first or 0) <= 0:
            yield "targets.spare", config.targets.spare, "0 where nothing is replaced: give spiel.rate"

    @classmethod
    def schedule(cls, config: Any, steps: int) -> Reselection:
        """See ``Criterion``; the first reselection is no other than the rest."""
        return configured_schedule(config.spiel, steps, None, cls.default_rate)

    def init(self, targets: Mapping[str, Target], values: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """A key per matrix: target name to uint32 [..., words]."""
        root = jax.random.fold_in(jax.random.key(self.key), 1)  # not that of the initial positions
        return {
            name: jax.random.key_data(jax.random.split(named_key(root, name), target.lead))
            for name, target in targets.items()
        }

    def survey(self, stats: dict[str, Any], weights: Any, targets: Mapping[str, Target]) -> dict[str, Any]:
        """The keys, and random entries [..., 2k] that are not zero: k of them or more are not active."""
        if not self.keep_zeros:
            return stats
        found = {}
        for name, target in targets.items():
            keys = stats[name].reshape(math.prod(target.stack), -1, stats[name].shape[-1])[:, 0]
            keys = jax.random.wrap_key_data(keys)
            found[name] = stats[name], draw_off_zeros(weights, name, target, 2 * target.block_count, keys)
        return found

    def incoming(
        self, stats: Any, indices: jax.Array, dropped: jax.Array, n: jax.Array, target: Target
    ) -> jax.Array:
        """N distinct inactive entries, each about equally likely; dropped ones count as active."""
        if self.keep_zeros:
            data, found = stats
            positions, scores = self._scored(data, found, indices, target)
            return jnp.where(largest(scores, positions, n), positions, target.block_size)
        count = indices.size
        slot = jnp.arange(count, dtype=jnp.int32)
        free = self.available(stats, indices, target)
        width, longer = free // jnp.maximum(n, 1), free % jnp.maximum(n, 1)
        widths = jnp.maximum(width + (slot < longer), 1)
        # the ranks of the drawn entries among the inactive ones
        rank = slot * width + jnp.minimum(slot, longer)
        rank = rank + jax.random.randint(jax.random.wrap_key_data(stats), (count,), 0, widths, jnp.int32)
        before = jnp.sort(indices) - slot  # inactive entries before each active one; unused slots are last
        before = jnp.where(slot < target.block_size - free, before, free)
        position = rank + jnp.searchsorted(before, rank, side="right").astype(jnp.int32)
        return jnp.where(slot < n, position, target.block_size)

    def proposals(
        self, stats: Any, indices: jax.Array, dropped: jax.Array, target: Target
    ) -> tuple[jax.Array, jax.Array]:
        """As many inactive entries as there are slots, as far as there are, with random scores."""
        if self.keep_zeros:
            data, found = stats
            return self._scored(data, found, indices, target)
        n = jnp.minimum(indices.size, self.available(stats, indices, target))
        return self._scored(stats, self.incoming(stats, indices, dropped, n, target), indices, target)

    def _scored(
        self, data: jax.Array, positions: jax.Array, indices: jax.Array, target: Target
    ) -> tuple[jax.Array, jax.Array]:
        """The positions with random scores, NaN where active."""
        scores = jax.random.uniform(jax.random.fold_in(jax.random.wrap_key_data(data), 2), positions.shape)
        return positions, jnp.where(inactive(positions, indices, target.block_size), scores, jnp.nan)

    def clear(self, stats: dict[str, jax.Array], targets: Mapping[str, Target]) -> dict[str, jax.Array]:
        """The next keys."""

        def advance(data: jax.Array) -> jax.Array:
            keys = jax.random.wrap_key_data(data.reshape(-1, data.shape[-1]))
            return jax.random.key_data(jax.vmap(jax.random.fold_in, (0, None))(keys, 1)).reshape(data.shape)

        return {name: advance(data) for name, data in stats.items()}

    def regrid(self, stats: Any, move: Regridding) -> Any:
        """The keys of the first blocks, split."""
        old, new = move.old, move.new
        if old.grid == new.grid:
            return stats
        data = stats if old.grid == (1, 1) else stats[..., 0, 0, :]
        split = jax.random.split
        for _ in new.stack:
            split = jax.vmap(split, (0, None))
        keys = split(jax.random.wrap_key_data(jnp.asarray(data)), int(np.prod(new.grid)))
        return jax.random.key_data(keys).reshape(*new.lead, -1)
