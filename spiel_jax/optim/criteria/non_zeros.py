"""What criteria that are not told of zeros by gradients have in common where they keep a base's zeros."""

from typing import Any

import jax
import jax.numpy as jnp

from spiel_jax.optim.criteria.criterion import Criterion
from spiel_jax.optim.zeros import inactive
from spiel_jax.sparse.targets import Target


class NonZeros(Criterion):
    """A criterion that looks at weights to keep their zeros, and for nothing else.

    Where it keeps them its ``survey`` gives each target's statistics a further part, the last: positions
    [..., C] of entries that are not zero, of which it grows those that are not active.
    """

    can_keep_zeros = True

    @property
    def uses_weights(self) -> bool:
        """See ``Criterion``: for their zeros."""
        return self.keep_zeros

    def available(self, stats: Any, indices: jax.Array, target: Target) -> jax.Array | int:
        """All that are not active; of those surveyed, where zeros are kept."""
        if not self.keep_zeros:
            return super().available(stats, indices, target)
        return jnp.sum(inactive(stats[-1], indices, target.block_size), dtype=jnp.int32)
