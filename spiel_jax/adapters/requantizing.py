"""A tuned model held in the way its base was, and what of the tuning is lost by that."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from spiel_jax.errors import SpielError
from spiel_jax.models.storage import Weight


@dataclass(frozen=True)
class Loss:
    """What merging into quantised weights loses.

    Attributes:
        changed: Entries that the tuning has changed.
        kept: Share of them that are nearer to the tuned value than to the base's, quantised again.
        error: Norm of the difference that quantising makes to the tuned weights, over the norm of what the
            tuning has changed. 0: nothing is lost; 1: as much is as there was.
    """

    changed: int
    kept: float
    error: float

    def __str__(self) -> str:
        return f"of {self.changed:,} changed entries {self.kept:.1%} keep a change; error {self.error:.2f}"


def requantized(base: Mapping[str, Any], tuned: dict[str, Any]) -> tuple[dict[str, Any], Loss]:
    """Holds merged weights as those of the base are held.

    A change is lost where it is smaller than half the distance of two levels; where it is the largest of a
    block, it makes the others of the block coarser. So this is for comparisons, and for who has no memory
    for more; what was trained is the base with the deltas beside it.

    Args:
        base: Parameters, some of them quantised.
        tuned: Those of the tuned model: arrays in the place of what was changed. They are taken out of it
            one by one.

    Returns:
        The tuned parameters, quantised where those of the base are, and what that lost.

    Raises:
        SpielError: If none of the base is quantised.
    """
    again = [name for name, weight in base.items() if isinstance(weight, Weight) and not weight.writable]
    if not again:
        raise SpielError("the base is not quantised: its tuned weights are merged exactly, as arrays")
    params, sums = dict(tuned), jnp.zeros((4,))
    for name in again:
        if not isinstance(tuned[name], Weight):
            params[name] = None  # one dense weight less
            params[name], found = _held_again(base[name], tuned.pop(name))
            sums += found
    changed, kept, moved, missing = map(float, sums)
    loss = Loss(int(changed), kept / max(changed, 1), (missing / moved) ** 0.5 if moved else 0.0)
    return params, loss


@jax.jit
def _held_again(base: Weight, tuned: jax.Array) -> tuple[Weight, jax.Array]:
    """A stack of weights, layer by layer, and its sums for ``Loss``."""

    def one(layer: tuple[Weight, jax.Array]) -> tuple[Weight, jax.Array]:
        held, array = layer
        again, wide = held.hold_alike(array), array.astype(jnp.float32)
        change = wide - held.dequantize().astype(jnp.float32)
        error = wide - again.dequantize().astype(jnp.float32)
        kept = (change != 0) & (jnp.abs(error) < jnp.abs(change - error))
        numbers = [change != 0, kept, change**2, error**2]
        return again, jnp.stack([jnp.sum(number, dtype=jnp.float32) for number in numbers])

    params, sums = lax.map(one, (base, tuned))
    return params, sums.sum(0)
