"""Static masks by the activations of the first steps: Super-Tuning with Wanda's scores, MIGU."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from spiel_jax.ops.matmul import dot
from spiel_jax.ops.selection import top_in_blocks
from spiel_jax.ops.sharded import on_blocks
from spiel_jax.ops.stored import as_array
from spiel_jax.optim.criteria.criterion import Regridding, register
from spiel_jax.optim.criteria.static import BySums
from spiel_jax.optim.zeros import off_zeros
from spiel_jax.sparse.targets import Target, adapted_matrices


@dataclass(frozen=True)
class _Activations(BySums):
    """Entries by a score of the weight and of sums over the tokens of a phase."""

    side: ClassVar[int]  # axis of the matrix that the sums belong to

    keep_zeros: bool = False

    @staticmethod
    def score(matrix: jax.Array, sums: jax.Array) -> jax.Array:
        """Scores of the entries, [R, C]; the sums are [R, 1] or [1, C]."""
        raise NotImplementedError

    @property
    def uses_weights(self) -> bool:
        """See ``Criterion``."""
        return True

    def init(self, targets: Mapping[str, Target], values: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """Sums of 0: target name to [*stack, inputs or outputs]."""
        del values
        return {name: jnp.zeros((*t.stack, t.shape[self.side])) for name, t in targets.items()}

    def survey(
        self, stats: dict[str, jax.Array], weights: Any, targets: Mapping[str, Target]
    ) -> dict[str, jax.Array]:
        """Where the entries of largest score are: target name to positions [..., k]."""
        found = {}
        for name, target in targets.items():

            def largest(matrix: jax.Array, sums: jax.Array, target: Target = target) -> jax.Array:
                scores = self.score(matrix, sums)
                scores = off_zeros(scores, matrix) if self.keep_zeros else scores
                return top_in_blocks(scores, target.block, target.block_count)

            def one(
                item: tuple[Any, jax.Array], target: Target = target, largest: Any = largest
            ) -> jax.Array:
                sums = jnp.expand_dims(item[1], 1 - self.side)
                return on_blocks(largest, target.axes, 0, as_array(item[0]), sums)

            sums = stats[name].reshape(-1, stats[name].shape[-1])
            positions = lax.map(one, (adapted_matrices(weights, name, target), sums))
            found[name] = positions.reshape(*target.lead, target.block_count)
        return found

    def incoming(
        self, stats: jax.Array, indices: jax.Array, dropped: jax.Array, n: jax.Array, target: Target
    ) -> jax.Array:
        """All that were found: everything is replaced."""
        return stats

    def regrid(self, stats: Any, move: Regridding) -> Any:
        """The same sums: they belong to whole rows or columns."""
        return stats


def input_squares(x: jax.Array, weight: jax.Array) -> jax.Array:
    """Of each input the sum of its squares over all tokens, [in] float32."""
    del weight
    return jnp.sum(jnp.square(x.reshape(-1, x.shape[-1]).astype(jnp.float32)), axis=0)


def output_sizes(x: jax.Array, weight: jax.Array) -> jax.Array:
    """Of each output, without its bias, the sum of its magnitudes over all tokens, [out] float32."""
    y = dot(x.reshape(-1, x.shape[-1]), weight, (-1, 1))
    return jnp.sum(jnp.abs(y), axis=0).astype(jnp.float32)


@register("wanda")
@dataclass(frozen=True)
class WeightTimesInput(_Activations):
    r"""The largest weights times the size of their inputs, a static mask (Super-Tuning with Wanda's scores).

    $$
    \text{rank}(x, y) = |W[x, y]| \, \Big( \sum_{\text{tokens}} X_y^2 \Big)^{1/2}
    $$

    over all tokens, padding too, of the first ``spiel.accumulation`` steps; chosen once, at their end.

    Example:
        >>> WeightTimesInput().score(jnp.array([[3.0, -1.0]]), jnp.array([[1.0, 16.0]])).tolist()
        [[3.0, 4.0]]

    References:
        Super-Tuning, `arXiv 2607.09287 <https://arxiv.org/abs/2607.09287>`_, which has 1% of the entries and
        finds the magnitude alone a little better; Sun et al., `A Simple and Effective Pruning Approach for
        Large Language Models <https://arxiv.org/abs/2306.11695>`_.
    """

    side = 1
    watch: ClassVar[Callable[..., jax.Array] | None] = staticmethod(input_squares)

    @staticmethod
    def score(matrix: jax.Array, sums: jax.Array) -> jax.Array:
        """See above."""
        return jnp.abs(matrix.astype(sums.dtype)) * jnp.sqrt(sums)


@register("migu")
@dataclass(frozen=True)
class LargestOutputs(_Activations):
    r"""The rows of largest output, a static mask (MIGU): whole rows, the last one in part.

    $$
    \text{rank}(x, y) = \sum_{\text{tokens}} \Big| \sum_j W[x, j] X_j \Big|
    $$

    over all tokens, padding too, of the first ``spiel.accumulation`` steps; chosen once, at their end. (The
    paper masks the gradients of each step by its own outputs.) With ``targets.balance.columns`` each part
    of the columns has its own rows.

    Example:
        >>> LargestOutputs().score(jnp.ones((2, 2)), jnp.array([[1.0], [3.0]])).tolist()
        [[1.0, 1.0], [3.0, 3.0]]

    References:
        Du et al., `Unlocking Continual Learning Abilities in Language Models
        <https://arxiv.org/abs/2406.17245>`_.
    """

    side = 0
    watch: ClassVar[Callable[..., jax.Array] | None] = staticmethod(output_sizes)

    @staticmethod
    def score(matrix: jax.Array, sums: jax.Array) -> jax.Array:
        """See above."""
        return jnp.broadcast_to(sums, matrix.shape)
