"""Which tokens see which, in packed sequences and in a window."""

import jax
import jax.numpy as jnp


def visible(queries: jax.Array, keys: jax.Array, offset: int | jax.Array = 0) -> jax.Array:
    """Which keys a query sees: those of its segment that are not after it.

    Args:
        queries: Segment ids [B, S].
        keys: Segment ids [B, T].
        offset: The slot of the first query among the keys.

    Returns:
        [B, 1, S, T] bool; the unit axis is that of the heads.
    """
    causal = _distance(queries.shape[1], keys.shape[1], offset) >= 0
    return causal & (queries[:, None, :, None] == keys[:, None, None, :])


def within(window: int, queries: int, keys: int, offset: int | jax.Array = 0) -> jax.Array:
    """Which keys are fewer than ``window`` slots before a query: [1, 1, queries, keys] bool."""
    return _distance(queries, keys, offset) < window


def _distance(queries: int, keys: int, offset: int | jax.Array) -> jax.Array:
    """Slots from a key forward to a query, [1, 1, queries, keys] int32."""
    query = jnp.arange(queries, dtype=jnp.int32) + offset
    return (query[:, None] - jnp.arange(keys, dtype=jnp.int32)[None, :])[None, None]


def sees_past(reach: jax.Array, slots: int) -> jax.Array:
    """Which of ``slots`` earlier tokens a query sees, [B, S, slots] bool; see ``models.cache.Sight``."""
    return jnp.arange(slots, dtype=jnp.int32) < reach[..., None]


def sees_tree(until: jax.Array) -> jax.Array:
    """Which tokens of a tree, laid out depth first, see which: [B, S, S] bool; see ``models.cache.Sight``."""
    place = jnp.arange(until.shape[1], dtype=jnp.int32)
    return (place[None, None, :] <= place[None, :, None]) & (place[None, :, None] < until[:, None, :])
