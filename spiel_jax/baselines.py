"""Growth criteria and positions of the baselines: random entries, and static masks."""

import zlib
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from spiel_jax.blocks import on_blocks
from spiel_jax.growth import Observation
from spiel_jax.selection import top_magnitudes
from spiel_jax.sparse import SparseDelta, parameter_name, path_name
from spiel_jax.targets import Target
from spiel_jax.transform import active_positions


class RandomGrowth(NamedTuple):
    """Grows random entries (SET); at a replacement rate of 0, a static random mask (SHiRA, SpaRTA).

    Its only statistic is a PRNG key per matrix. A reselection takes O(k log k): one entry is drawn from each
    of n equal strata of the inactive entries.

    Attributes:
        key: Seed of the draws, an int, which may be traced.

    References:
        Mocanu et al., `Scalable training of artificial neural networks with adaptive sparse connectivity
        <https://arxiv.org/abs/1707.04780>`_; Bhardwaj et al., `Sparse High Rank Adapters
        <https://arxiv.org/abs/2406.13175>`_.
    """

    key: int | jax.Array = 0

    @property
    def uses_candidates(self) -> bool:
        """It draws blindly."""
        return False

    def init(self, targets: Mapping[str, Target], values: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """A key per matrix: target name to uint32 [..., words]."""
        root = jax.random.fold_in(jax.random.key(self.key), 1)  # not that of the initial positions
        return {
            name: jax.random.key_data(
                jax.random.split(jax.random.fold_in(root, zlib.crc32(name.encode())), target.lead)
            )
            for name, target in targets.items()
        }

    def observe(self, stats: dict[str, jax.Array], seen: Observation) -> dict[str, jax.Array]:
        """Nothing to learn from a step."""
        return stats

    def available(self, stats: jax.Array, indices: jax.Array, target: Target) -> jax.Array:
        """All entries that are not active."""
        return target.block_size - jnp.sum(indices < target.block_size, dtype=jnp.int32)

    def incoming(
        self, stats: jax.Array, indices: jax.Array, dropped: jax.Array, n: jax.Array, target: Target
    ) -> jax.Array:
        """N distinct inactive entries, each about equally likely; dropped ones count as active."""
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

    def seed(self, stats: jax.Array, source: jax.Array) -> dict[str, jax.Array]:
        """Nothing is known of the grown entries."""
        return {}

    def clear(self, stats: dict[str, jax.Array], targets: Mapping[str, Target]) -> dict[str, jax.Array]:
        """The next keys."""

        def advance(data: jax.Array) -> jax.Array:
            keys = jax.random.wrap_key_data(data.reshape(-1, data.shape[-1]))
            return jax.random.key_data(jax.vmap(jax.random.fold_in, (0, None))(keys, 1)).reshape(data.shape)

        return {name: advance(data) for name, data in stats.items()}


class NoGrowth(NamedTuple):
    """Grows nothing: the entries stay where they were placed."""

    @property
    def uses_candidates(self) -> bool:
        """None are looked for."""
        return False

    def init(self, targets: Mapping[str, Target], values: Mapping[str, jax.Array]) -> dict[str, tuple]:
        """No statistics."""
        return dict.fromkeys(targets, ())

    def observe(self, stats: dict[str, tuple], seen: Observation) -> dict[str, tuple]:
        """Nothing to learn from a step."""
        return stats

    def available(self, stats: tuple, indices: jax.Array, target: Target) -> int:
        """None."""
        return 0

    def incoming(
        self, stats: tuple, indices: jax.Array, dropped: jax.Array, n: jax.Array, target: Target
    ) -> jax.Array:
        """Unused slots only."""
        return jnp.full_like(indices, target.block_size)

    def seed(self, stats: tuple, source: jax.Array) -> dict[str, jax.Array]:
        """Nothing."""
        return {}

    def clear(self, stats: dict[str, tuple], targets: Mapping[str, Target]) -> dict[str, tuple]:
        """Nothing."""
        return stats


def magnitude_positions(
    params: Any, targets: Mapping[str, Target], *, largest: bool = True
) -> dict[str, SparseDelta]:
    """The entries of largest (or smallest) pretrained magnitude of each matrix, a static mask (Super-Tuning).

    Exact, ties towards the lowest position, one matrix at a time.

    Args:
        params: Pytree of pretrained weights, [*stack, rows, columns].
        targets: What is adapted.
        largest: Or the smallest.

    Returns:
        Target name to ``SparseDelta`` without values, for ``place``.

    Raises:
        KeyError: If a target is no leaf of ``params``.
    """
    leaves = {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    positions = {}
    for name, target in targets.items():
        parameter = parameter_name(name)
        if parameter not in leaves:
            raise KeyError(f"no parameter {parameter!r}: expected one of {', '.join(leaves)}")
        find = partial(_strongest, target=target, largest=largest)
        indices = on_blocks(find, target.axes, len(target.stack), leaves[parameter])
        positions[name] = target.delta(indices.reshape(*target.lead, target.block_count))
    return positions


def _strongest(weight: jax.Array, target: Target, largest: bool) -> jax.Array:
    """[*stack, grid_rows, grid_columns, k] positions in each block of a weight, or of a part of it."""
    chosen = weight if target.layers is None else weight[jnp.array(target.layers)]

    def strongest(matrix: jax.Array) -> jax.Array:
        rows, columns = target.block
        blocks = matrix.reshape(-1, rows, matrix.shape[1] // columns, columns).swapaxes(1, 2)
        grid = blocks.shape[:2]
        blocks = blocks.reshape(-1, target.block_size)
        if not largest:
            # the bits of non-negative floats are ordered as the floats are: mirror them
            wide = jnp.abs(blocks.astype(jnp.promote_types(blocks.dtype, jnp.float32)))
            bits = jnp.int64 if wide.dtype == jnp.float64 else jnp.int32
            top = lax.bitcast_convert_type(jnp.array(jnp.inf, wide.dtype), bits)
            blocks = lax.bitcast_convert_type(top - lax.bitcast_convert_type(wide, bits), wide.dtype)
        found = lax.map(lambda block: top_magnitudes(block, target.block_count), blocks)
        return found.reshape(*grid, target.block_count)

    found = lax.map(strongest, chosen.reshape(-1, *chosen.shape[-2:]))
    return found.reshape(*target.stack, *found.shape[1:])


def place(opt_state: Any, positions: Mapping[str, SparseDelta]) -> Any:
    """The optimizer state of ``spiel`` with its active entries elsewhere, before the first step.

    Args:
        opt_state: State of ``spiel``, or of any chain, partition or wrapper around it.
        positions: Target name to ``SparseDelta``, as from ``magnitude_positions``; values are not read.

    Raises:
        ValueError: If the state has other targets, or another number of entries, or is not one of ``spiel``.

    Example:
        >>> import spiel_jax as sj
        >>> weights = {"w": jnp.array([[3.0, -4.0], [1.0, 2.0]])}
        >>> targets = {"w": Target((2, 2), 2)}
        >>> place(sj.spiel_ma(0.1, targets, total_steps=9).init(sj.zeros(targets)),
        ...       magnitude_positions(weights, targets)).active["w"].indices
        Array([0, 1], dtype=int32)
    """
    active = active_positions(opt_state)
    shapes = [
        {name: (delta.shape, delta.grid, delta.indices.shape) for name, delta in tree.items()}
        for tree in (active, positions)
    ]
    if shapes[0] != shapes[1]:
        raise ValueError(f"the positions do not fit the state: {shapes[1]}, expected {shapes[0]}")
    return optax.tree.set(opt_state, active={n: d.with_values(None) for n, d in positions.items()})
