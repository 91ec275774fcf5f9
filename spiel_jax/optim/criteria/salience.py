"""Static masks by other scores of the first gradients: GEM, TaLoS."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from spiel_jax.ops.tree import named_leaves, parameter_name
from spiel_jax.optim.criteria.accumulated_gradients import CandidateStats
from spiel_jax.optim.criteria.criterion import register
from spiel_jax.optim.criteria.static import FirstGradients
from spiel_jax.sparse.delta import gather
from spiel_jax.sparse.targets import Target

_TINY = 1e-12
"""Keeps a weight or a gradient of zero from a score that is not finite."""


@register("gem")
@dataclass(frozen=True)
class GradientOverWeight(FirstGradients):
    r"""The largest gradients relative to the weight, a static mask (GEM): chosen once, at the end of a phase.

    $$
    \text{rank}(x, y) = \left| \frac{S[x, y]}{W[x, y]} \right|
    $$

    with the sum S of the phase's gradients. Its first step proposes by the same score of its own gradients.
    The paper shares the budget among layers by the entropy of their scores; here each weight has its own.

    Example:
        >>> growth = GradientOverWeight()
        >>> growth.salience(jnp.array([2.0, -3.0]), jnp.array([1.0, 6.0])).tolist()
        [2.0, -0.5]

    References:
        `GEM <https://arxiv.org/abs/2508.16191>`_: gradient to weight ratio and entropy-guided masking; it has
        0.1% of the entries.
    """

    @staticmethod
    def salience(gradient: jax.Array, weight: jax.Array) -> jax.Array:
        """See ``Criterion``."""
        return gradient / jnp.maximum(jnp.abs(weight), _TINY)

    @property
    def uses_weights(self) -> bool:
        """See ``Criterion``."""
        return True

    def survey(
        self, stats: dict[str, CandidateStats], weights: Any, targets: Mapping[str, Target]
    ) -> dict[str, CandidateStats]:
        """The statistics with sums relative to the weights."""
        leaves, found = named_leaves(weights), {}
        for name, old in stats.items():
            entries = gather(leaves[parameter_name(name)], targets[name].delta(old.indices))
            score = self.salience(old.grad_sum, entries.astype(old.grad_sum.dtype))
            found[name] = old._replace(grad_sum=score)
        return found


@register("talos")
@dataclass(frozen=True)
class LowSensitivity(FirstGradients):
    r"""The entries of least sensitivity, a static mask (TaLoS): chosen once, at the end of a phase.

    $$
    \text{rank}(x, y) = \left( \sum_t g_t[x, y]^2 \right)^{-1/2}
    $$

    of the phase's gradients, the diagonal of an empirical Fisher matrix. Of its first step's entries of
    smallest gradient ``candidate_ratio`` per active entry are looked at again.

    Example:
        >>> LowSensitivity().salience(jnp.array([2.0, -0.5]), None).tolist()
        [0.5, 2.0]

    References:
        `Efficient Model Editing with Task-Localized Sparse Fine-tuning <https://arxiv.org/abs/2504.02620>`_,
        which tunes 10% of the entries.
    """

    @staticmethod
    def salience(gradient: jax.Array, weight: Any) -> jax.Array:
        """See ``Criterion``."""
        del weight
        return 1 / jnp.maximum(jnp.abs(gradient), _TINY)

    def rank(self, stats: CandidateStats) -> Any:
        """See ``AccumulatedGradients``: the root of the inverse of the squares."""
        return self.salience(stats.grad_sq_sum**0.5, None)
