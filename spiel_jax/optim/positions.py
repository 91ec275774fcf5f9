"""Where the entries of sparse values are: at the start, and in the state of an optimizer."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from spiel_jax.ops.tree import named_key
from spiel_jax.sparse.delta import SparseDelta
from spiel_jax.sparse.targets import Target, by_target


def random_indices(key: jax.Array, size: int, count: int) -> jax.Array:
    """Random distinct positions in O(count) time and memory: one from each of ``count`` equal strata.

    Args:
        key: PRNG key.
        size: Number of entries to draw from.
        count: How many, at most ``size``.

    Returns:
        [count] int32, ascending, distinct, each entry equally likely up to the rounding of the strata.
    """
    width, longer = divmod(size, count)
    number = jnp.arange(count, dtype=jnp.int32)
    starts = number * width + jnp.minimum(number, longer)
    widths = width + (number < longer).astype(jnp.int32)
    return starts + jax.random.randint(key, (count,), 0, widths, jnp.int32)


def initial_positions(targets: Mapping[str, Target], seed: int | jax.Array) -> dict[str, SparseDelta]:
    """Random positions of every target: a function of the seed, the target's name and its shape.

    Args:
        targets: What is adapted.
        seed: An int (which may be traced) or a PRNG key.

    Returns:
        Target name to a ``SparseDelta`` without values.
    """
    is_key = isinstance(seed, jax.Array) and jnp.issubdtype(seed.dtype, jax.dtypes.prng_key)
    root: Any = seed if is_key else jax.random.key(seed)
    positions = {}
    for name, target in targets.items():
        key = named_key(root, name)
        drawn = _drawn(key, target.lead, target.block_size, target.block_share)
        positions[name] = target.delta(target.filled(drawn))
    return positions


@partial(jax.jit, static_argnames=("lead", "size", "count"))  # where ``init`` is not, too
def _drawn(key: jax.Array, lead: tuple[int, ...], size: int, count: int) -> jax.Array:
    """``random_indices`` of every matrix or block: [*lead, count]."""
    draw = partial(random_indices, size=size, count=count)
    for _ in lead:
        draw = jax.vmap(draw)
    return draw(jax.random.split(key, lead) if lead else key)


def active_positions(opt_state: Any) -> dict[str, SparseDelta]:
    """The positions that an optimizer state holds: target name to ``SparseDelta`` without values.

    Args:
        opt_state: State of ``spiel`` or of any chain, partition or wrapper around it.

    Raises:
        ValueError: If there is no state of ``spiel`` in it, or several share a target.
    """
    active: dict[str, SparseDelta] = {}
    for _, found in optax.tree.get_all_with_path(opt_state, "active", _is_active):
        if active.keys() & found.keys():
            raise ValueError(
                f"several states of spiel() have the targets {sorted(active.keys() & found.keys())}: give "
                "deltas() one of the states and its values"
            )
        active |= found
    if not active:
        raise ValueError("no state of spiel() in this optimizer state")
    return active


def deltas(values: Any, opt_state: Any, *, sort: bool = False) -> dict[str, SparseDelta]:
    """Zips the values with the positions that an optimizer state holds.

    Args:
        values: Tree of values.
        opt_state: State of ``spiel`` or of any chain, partition or wrapper around it.
        sort: Whether to order entries by position, for what leaves the run.

    Returns:
        Target name to ``SparseDelta``.

    Raises:
        ValueError: If there is no state of ``spiel`` in ``opt_state``, it has other targets, or several
            states share one.

    Example:
        >>> import spiel_jax as sj
        >>> targets = {"w": Target((4, 4), 2)}
        >>> tx = optax.chain(optax.clip(1.0), sj.spiel_ma(0.1, targets, total_steps=9))
        >>> values = sj.zeros(targets)
        >>> deltas(values, tx.init(values))["w"].values.tolist()
        [0.0, 0.0]
    """
    active = active_positions(opt_state)
    named = by_target(values, active)
    zipped = {name: delta.with_values(named[name]) for name, delta in active.items()}
    return {name: delta.sort() for name, delta in zipped.items()} if sort else zipped


def _is_active(_: Any, found: Any) -> bool:
    """Tells ``SpielState.active`` from a target that is named "active" too."""
    return isinstance(found, Mapping) and all(isinstance(delta, SparseDelta) for delta in found.values())


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
        ...       sj.magnitude_positions(weights, targets)).active["w"].indices
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
