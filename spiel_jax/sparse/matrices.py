"""The matrices of a weight one after the other, or a few at a time: what is formed of each is small."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from spiel_jax.ops.selection import at_a_time
from spiel_jax.ops.sharded import on_blocks
from spiel_jax.sparse.delta import SparseDelta

_SLOTS_AT_A_TIME = 2**18
"""Slots of the matrices that are treated together: some 60 bytes each for as long as that takes."""


def map_matrices(
    function: Callable[..., Any], delta: SparseDelta, *trees: Any, in_place: bool = False
) -> Any:
    """``function(*trees)`` for each matrix (or block) of a weight, small ones several at a time.

    Args:
        function: Treats the arrays of one matrix.
        delta: Its positions tell how many matrices there are, how large, and how they are spread.
        trees: Pytrees of arrays [*stack, ...], or [*stack, grid_rows, grid_columns, ...] with a block grid.
        in_place: Whether ``function`` returns a pair whose first is like the first of ``trees``, an array: it
            takes its place in memory where that is not needed any more.

    Returns:
        What ``function`` returns, stacked likewise.
    """
    axes = delta.indices.ndim - 1

    def mapped(*trees: Any) -> Any:
        if not axes:
            return function(*trees)
        lead = jax.tree.leaves(trees)[0].shape[:axes]  # of this device's blocks
        flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[axes:]), trees)
        together = at_a_time(math.prod(lead), delta.indices.shape[-1], _SLOTS_AT_A_TIME)
        if in_place:
            results = _mapped_in_place(function, together, *flat)
        else:
            results = lax.map(lambda matrix: function(*matrix), flat, batch_size=together)
        return jax.tree.map(lambda x: x.reshape(*lead, *x.shape[1:]), results)

    return on_blocks(mapped, delta.axes, delta.stack_axes, *trees)


def _mapped_in_place(
    function: Callable[..., Any], together: int | None, *trees: Any
) -> tuple[jax.Array, Any]:
    """``lax.map`` of ``function``, ``together`` at a time, written over the first of ``trees``."""
    if together is not None:
        groups = jax.tree.map(lambda x: x.reshape(-1, together, *x.shape[1:]), trees)
        results = _mapped_in_place(jax.vmap(function), None, *groups)
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), results)

    def one(first: jax.Array, item: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
        number, others = item
        new, more = function(first[number], *others)
        return first.at[number].set(new), more

    first, *others = trees
    return lax.scan(one, first, (jnp.arange(first.shape[0]), others))
