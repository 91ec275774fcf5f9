"""Static masks: criteria that never grow, or once, and the positions of largest weights."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from spiel_jax.ops.selection import top_in_blocks
from spiel_jax.ops.sharded import on_blocks
from spiel_jax.ops.stored import Stored, as_array
from spiel_jax.optim.criteria.accumulated_gradients import AccumulatedGradients, Seeds
from spiel_jax.optim.criteria.criterion import Criterion, Observation, register
from spiel_jax.optim.schedules import Reselection, constant
from spiel_jax.optim.zeros import off_zeros
from spiel_jax.sparse.delta import SparseDelta
from spiel_jax.sparse.targets import Target, adapted_matrices


@dataclass(frozen=True)
class NoGrowth(Criterion):
    """Grows nothing: the entries stay where they were placed.

    Attributes:
        keep_zeros: See ``Criterion``. Read by what places them.

    Example:
        >>> NoGrowth().available((), jnp.array([0, 1]), Target((2, 3), 2))
        0
    """

    keep_zeros: bool = False

    def available(self, stats: tuple, indices: jax.Array, target: Target) -> int:
        """None."""
        return 0

    def incoming(
        self, stats: tuple, indices: jax.Array, dropped: jax.Array, n: jax.Array, target: Target
    ) -> jax.Array:
        """Unused slots only."""
        return jnp.full_like(indices, target.block_size)

    @classmethod
    def schedule(cls, config: Any, steps: int) -> Reselection:
        """Never."""
        del config
        return Reselection(steps, rate=constant(0.0), first=None)


@register("magnitude")
class LargestWeights(NoGrowth):
    """The largest or smallest pretrained weights, a static mask (Super-Tuning).

    Example:
        >>> from spiel_jax.config import default_config
        >>> config, weights = default_config(), {"w": jnp.array([[3.0, -4.0], [1.0, 2.0]])}
        >>> LargestWeights.start(config)(weights, {"w": Target((2, 2), 2)})["w"].indices.tolist()
        [0, 1]

    References:
        Super-Tuning, `arXiv 2607.09287 <https://arxiv.org/abs/2607.09287>`_, which has 1% of the entries, the
        largest or the smallest.
    """

    can_keep_zeros = True
    own = ("spiel.magnitude",)
    unused = ("spiel.every", "spiel.accumulation", "spiel.schedule", "spiel.rate", "spiel.first")

    @classmethod
    def start(cls, config: Any) -> Callable[..., Mapping[str, SparseDelta]]:
        """See ``Criterion``."""
        largest, keep_zeros = config.spiel.magnitude == "largest", config.spiel.keep_zeros
        return partial(magnitude_positions, largest=largest, keep_zeros=keep_zeros)


@register("gradient")
@dataclass(frozen=True)
class FirstGradients(AccumulatedGradients):
    """The largest gradients of the first steps, a static mask (SIFT): chosen once, at the end of a phase.

    Accumulated gradients that may stay where they are, and seed nothing. The phase's first step proposes
    ``ratio`` candidates per entry; with one, the default, it has decided, and further steps of the phase are
    for nothing: a phase of 1 chooses the same entries, and with ``ratio=4`` the sums of all its steps decide.
    (Measured once, three batches chose no better than one.)

    Example:
        >>> growth = FirstGradients(ratio=2.0)
        >>> growth.count(Target((2, 3), 2)), growth.seeds  # candidates of a matrix with two entries
        (4, 'neither')

    References:
        Song et al., `Sparse is Enough in Fine-tuning Pre-trained Large Language Models
        <https://arxiv.org/abs/2312.11875>`_.
    """

    seeds: Seeds = "neither"
    propose_active: bool = True
    in_original = False
    reselects_once = True
    unused = (
        *("spiel.every", "spiel.schedule", "spiel.rate", "spiel.first", "spiel.drop_by"),
        "spiel.seeds",
    )

    @classmethod
    def from_config(cls, config: Any) -> "FirstGradients":
        """See ``Criterion``."""
        return cls(ratio=config.spiel.candidate_ratio)

    @classmethod
    def schedule(cls, config: Any, steps: int) -> Reselection:
        """See ``Criterion``: everything is replaced at the end of step ``spiel.accumulation``."""
        return chosen_once(config, steps)


def chosen_once(config: Any, steps: int) -> Reselection:
    """The schedule of a static mask that is chosen at the end of step ``spiel.accumulation``."""
    phase = config.spiel.accumulation
    return Reselection(steps, max(steps, phase), phase, constant(0.0), first=1.0)


class BySums(Criterion):
    """A static mask by sums of what a phase's steps let it watch or measure; chosen once, at its end.

    Its statistics are one array of sums per target; ``incoming`` is all that is to be chosen.
    """

    can_keep_zeros = True
    own = ()
    unused = ("spiel.every", "spiel.schedule", "spiel.rate", "spiel.first")
    reselects_once = True

    @classmethod
    def schedule(cls, config: Any, steps: int) -> Reselection:
        """See ``Criterion``: everything is replaced at the end of step ``spiel.accumulation``."""
        return chosen_once(config, steps)

    def observe(self, stats: dict[str, jax.Array], seen: Observation) -> dict[str, jax.Array]:
        """Adds what the step gave."""
        if seen.watched is None:
            return stats
        return {name: old + seen.watched[name].astype(old.dtype) for name, old in stats.items()}

    def available(self, stats: jax.Array, indices: jax.Array, target: Target) -> int:
        """All are replaced; where fewer were found, slots are unused."""
        return indices.size

    def clear(self, stats: dict[str, jax.Array], targets: Mapping[str, Target]) -> dict[str, jax.Array]:
        """Sums of 0."""
        return jax.tree.map(jnp.zeros_like, stats)


def magnitude_positions(
    params: Any, targets: Mapping[str, Target], *, largest: bool = True, keep_zeros: bool = False
) -> dict[str, SparseDelta]:
    """The entries of largest (or smallest) pretrained magnitude of each matrix, a static mask (Super-Tuning).

    Exact, ties towards the lowest position, one matrix at a time.

    Args:
        params: Pytree of pretrained weights, [*stack, rows, columns]; stored ones too.
        targets: What is adapted.
        largest: Or the smallest.
        keep_zeros: Only weights that are not zero; where they are too few, slots are unused.

    Returns:
        Target name to ``SparseDelta`` without values, for ``place``.

    Raises:
        KeyError: If a target is no leaf of ``params``.

    Example:
        >>> weights, targets = {"w": jnp.array([[3.0, -4.0], [1.0, 2.0]])}, {"w": Target((2, 2), 2)}
        >>> magnitude_positions(weights, targets)["w"].indices.tolist()
        [0, 1]
        >>> magnitude_positions(weights, targets, largest=False)["w"].indices.tolist()
        [2, 3]
    """
    positions = {}
    for name, target in targets.items():
        find = partial(_strongest, target=target, largest=largest, keep_zeros=keep_zeros)
        indices = on_blocks(find, target.axes, 1, adapted_matrices(params, name, target))
        positions[name] = target.delta(indices.reshape(*target.lead, target.block_count))
    return positions


def _strongest(matrices: Any, target: Target, largest: bool, keep_zeros: bool) -> jax.Array:
    """[M, grid_rows, grid_columns, k] positions in each block of a stack of weights, or of parts of them."""

    def strongest(weight: jax.Array | Stored) -> jax.Array:
        matrix = scores = as_array(weight)
        if not largest:
            # the bits of non-negative floats are ordered as the floats are: mirror them
            wide = jnp.abs(matrix.astype(jnp.promote_types(matrix.dtype, jnp.float32)))
            bits = jnp.int64 if wide.dtype == jnp.float64 else jnp.int32
            top = lax.bitcast_convert_type(jnp.array(jnp.inf, wide.dtype), bits)
            scores = lax.bitcast_convert_type(top - lax.bitcast_convert_type(wide, bits), wide.dtype)
        if keep_zeros:
            scores = off_zeros(scores, matrix)
        return top_in_blocks(scores, target.block, target.block_count)

    return lax.map(strongest, matrices)
