"""Zeros of a pruned base: entries are chosen where the weight is not zero, so that its zeros stay.

A weight is looked at as it is during the step, deltas merged. Where an entry is not active that is the
pretrained one, so what is chosen beside the active ones is never a zero of the base.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from spiel_jax.ops.selection import isin, top_in_blocks
from spiel_jax.ops.sharded import on_blocks
from spiel_jax.ops.stored import as_array
from spiel_jax.ops.tree import named_key
from spiel_jax.sparse.delta import SparseDelta
from spiel_jax.sparse.targets import Target, adapted_matrices


def off_zeros(scores: jax.Array, weight: jax.Array) -> jax.Array:
    """The scores, and NaN, which is never chosen, where the weight is zero.

    Example:
        >>> off_zeros(jnp.array([3.0, 2.0]), jnp.array([0.0, 0.5])).tolist()
        [nan, 2.0]
    """
    return jnp.where(weight == 0, jnp.nan, scores)


@functools.cache  # one object for one salience: it is compared where programs are joined
def off_zeros_by(salience: Callable[..., jax.Array] | None) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """A salience (see ``Criterion``) that proposes no zero; None: of gradients."""

    def masked(gradient: jax.Array, weight: jax.Array) -> jax.Array:
        return off_zeros(gradient if salience is None else salience(gradient, weight), weight)

    return masked


def inactive(found: jax.Array, indices: jax.Array, size: int) -> jax.Array:
    """Which of the positions found [C] are neither active nor unused slots.

    Example:
        >>> inactive(jnp.array([1, 4, 6]), jnp.array([4, 0]), 6).tolist()
        [True, False, False]
    """
    return (found < size) & ~isin(found, indices, size)


def best_off_zeros(
    weights: Any, name: str, target: Target, count: int, scores: Callable[[Any], jax.Array], of: Any
) -> jax.Array:
    """The entries of highest score of each block that are not zero, one matrix at a time.

    Args:
        weights: Pytree of weights; stored ones too.
        name: Of the target.
        target: What is adapted.
        count: How many of each block; less where a block is smaller.
        scores: What ``of`` has of one matrix to the scores of its entries, [R, C].
        of: Pytree of arrays [M, ...] of the M matrices that are adapted.

    Returns:
        Positions [*stack, ..., count], int32; the block's size in unused slots.
    """
    count = min(count, target.block_size)

    def found(matrix: jax.Array, scores: jax.Array) -> jax.Array:
        return top_in_blocks(off_zeros(scores, matrix), target.block, count)

    def one(item: tuple[Any, Any]) -> jax.Array:
        return on_blocks(found, target.axes, 0, as_array(item[0]), scores(item[1]))

    positions = lax.map(one, (adapted_matrices(weights, name, target), of))
    return positions.reshape(*target.lead, count)


def draw_off_zeros(weights: Any, name: str, target: Target, count: int, keys: jax.Array) -> jax.Array:
    """As ``best_off_zeros``, at random: each entry of a block that is not zero equally likely.

    Args:
        weights: See there, as for what follows.
        name: See there.
        target: See there.
        count: See there.
        keys: PRNG keys [M].
    """
    return best_off_zeros(
        weights, name, target, count, lambda key: jax.random.uniform(key, target.shape), keys
    )


def random_off_zeros(
    params: Any, targets: Mapping[str, Target], *, seed: int | jax.Array
) -> dict[str, SparseDelta]:
    """Random entries that are not zero: a function of the seed, the target's name, its shape and its zeros.

    Args:
        params: Pytree of pretrained weights, [*stack, rows, columns]; stored ones too.
        targets: What is adapted.
        seed: An int, which may be traced.

    Returns:
        Target name to ``SparseDelta`` without values, for ``place``; slots are unused where a block has
        fewer entries that are not zero.

    Raises:
        KeyError: If a target is no leaf of ``params``.

    Example:
        >>> weights = {"w": jnp.array([[0.0, 5.0, 0.0], [0.0, 1.0, 0.0]])}
        >>> random_off_zeros(weights, {"w": Target((2, 3), 3)}, seed=0)["w"].indices.tolist()  # 6: unused
        [1, 4, 6]
    """
    positions = {}
    for name, target in targets.items():
        key = named_key(jax.random.key(seed), name)
        keys = jax.random.split(key, math.prod(target.stack))
        drawn = draw_off_zeros(params, name, target, target.block_share, keys)
        positions[name] = target.delta(target.filled(drawn))
    return positions
