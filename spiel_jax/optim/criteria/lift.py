"""Growth by low-rank magnitude: LIFT."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from spiel_jax.ops.low_rank import low_rank
from spiel_jax.ops.selection import isin, top_in_blocks
from spiel_jax.ops.sharded import on_blocks
from spiel_jax.ops.stored import as_array
from spiel_jax.optim.criteria.criterion import Criterion, register
from spiel_jax.optim.schedules import Reselection, constant
from spiel_jax.optim.zeros import off_zeros
from spiel_jax.sparse.delta import SparseDelta
from spiel_jax.sparse.targets import Target, adapted_matrices


@register("lift")
@dataclass(frozen=True)
class LowRankMagnitude(Criterion):
    r"""LIFT: the entries of largest magnitude in the best rank-r approximation of the weight.

    They are looked for at the start and again at each reselection, in the weights as they are then. With the
    singular values and vectors of $W$,

    $$
    W_r = \sum_{i \le r} \sigma_i u_i v_i^\top, \qquad \text{rank}(x, y) = |W_r[x, y]|
    $$

    An entry that stays keeps value and moments. In the paper one that leaves keeps its value too, so that
    more and more entries differ from the pretrained ones; here it becomes the pretrained one again.

    Attributes:
        rank: Of the approximation. The paper takes 32 to 128.
        keep_zeros: See ``Criterion``.

    Example:
        >>> weights = {"w": jnp.array([[2.0, 2.0, 0.0], [2.0, 2.0, 0.0], [0.0, 0.0, 3.0]])}
        >>> targets = {"w": Target((3, 3), 4)}
        >>> growth = LowRankMagnitude(rank=1)  # of the two blocks, singular values 4 and 3, the first
        >>> found = growth.survey({}, weights, targets)["w"]
        >>> found.tolist()
        [0, 1, 3, 4]

    References:
        Liu et al., `LIFT the Veil for the Truth <https://arxiv.org/abs/2506.00772>`_. Its runs have 5% of the
        entries, new ones every 10 to 400 steps (``spiel.every``), learning rates of 1e-4 and 2e-4.
    """

    can_keep_zeros = True
    own = ("spiel.filter_rank",)
    unused = ("spiel.accumulation", "spiel.schedule", "spiel.rate", "spiel.first")

    rank: int = 128
    keep_zeros: bool = False

    @classmethod
    def from_config(cls, config: Any) -> "LowRankMagnitude":
        """See ``Criterion``."""
        return cls(config.spiel.filter_rank)

    @classmethod
    def start(cls, config: Any) -> Callable[..., Mapping[str, SparseDelta]]:
        """See ``Criterion``."""
        settings = config.spiel
        return partial(low_rank_positions, rank=settings.filter_rank, keep_zeros=settings.keep_zeros)

    @classmethod
    def schedule(cls, config: Any, steps: int) -> Reselection:
        """See ``Criterion``: all entries that are not among the largest any more, every so many steps."""
        every = config.spiel.every
        return Reselection(steps, every, every, constant(1.0), first=None)

    @property
    def uses_weights(self) -> bool:
        """See ``Criterion``."""
        return True

    def survey(self, stats: Any, weights: Any, targets: Mapping[str, Target]) -> dict[str, jax.Array]:
        """Where the largest entries are: target name to positions [..., k]."""
        del stats
        found = low_rank_positions(weights, targets, rank=self.rank, keep_zeros=self.keep_zeros)
        return {name: delta.indices for name, delta in found.items()}

    def available(self, stats: Any, indices: jax.Array, target: Target) -> jax.Array:
        """As many as were found: those among them that are active stay."""
        return jnp.sum(stats < target.block_size, dtype=jnp.int32)

    def incoming(
        self, stats: jax.Array, indices: jax.Array, dropped: jax.Array, n: jax.Array, target: Target
    ) -> jax.Array:
        """The first n of the largest entries that are not kept; all of them where everything is replaced."""
        size = target.block_size
        new = (stats < size) & ~isin(stats, jnp.where(dropped, size, indices), size)
        return jnp.where(new & (jnp.cumsum(new, dtype=jnp.int32) <= n), stats, size)


def low_rank_positions(
    params: Any, targets: Mapping[str, Target], *, rank: int, keep_zeros: bool = False
) -> dict[str, SparseDelta]:
    """The entries of largest magnitude in an approximation of each matrix of a rank.

    The approximation is of the whole matrix, also where a block grid gives each block its own share. One
    matrix at a time; on a mesh a device forms its own part of the approximation.

    Args:
        params: Pytree of weights, [*stack, rows, columns]; stored ones too.
        targets: What is adapted.
        rank: Of the approximation.
        keep_zeros: Only entries where the weight is not zero; where they are too few, slots are unused.

    Returns:
        Target name to ``SparseDelta`` without values, for ``place``.

    Raises:
        KeyError: If a target is no leaf of ``params``.

    Example:
        >>> weights = {"w": jnp.array([[1.0, 5.0], [1.0, 5.0]])}
        >>> low_rank_positions(weights, {"w": Target((2, 2), 2)}, rank=1)["w"].indices.tolist()
        [1, 3]
    """
    positions = {}
    for name, target in targets.items():

        def largest(
            left: jax.Array, right: jax.Array, *matrix: jax.Array, target: Target = target
        ) -> jax.Array:
            part = jnp.matmul(left[:, 0], right[0].T, precision=lax.Precision.HIGHEST)
            part = off_zeros(part, matrix[0]) if matrix else part
            return top_in_blocks(part, target.block, target.block_count)

        def one(weight: Any, target: Target = target, largest: Any = largest) -> jax.Array:
            matrix = as_array(weight)
            left, right = low_rank(matrix, rank)
            looked_at = (matrix,) if keep_zeros else ()
            # rows and columns of the weight first: these are spread over a mesh, ranks are not
            return on_blocks(largest, target.axes, 0, left[:, None], right.T[None], *looked_at)

        found = lax.map(one, adapted_matrices(params, name, target))
        positions[name] = target.delta(found.reshape(*target.lead, target.block_count))
    return positions
