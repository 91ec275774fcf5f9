"""The key-value caches of generation: functional pytrees of static shape."""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from spiel_jax.models.config import ModelConfig
from spiel_jax.ops.sharded import BATCH_AXES, constrain


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVCache:
    """Keys and values of the tokens seen so far, of every layer.

    All rows fill the same slots; a shorter row is padded with segment 0, on the left when the model
    has a sliding window (which counts slots, as in Hugging Face).

    Attributes:
        keys: [L, B, T, K, head_dim], after RoPE.
        values: [L, B, T, K, head_dim].
        segment_ids: [B, T] int32; 0 for padding and for slots not yet written.
        length: [] int32, number of slots written.
    """

    keys: jax.Array
    values: jax.Array
    segment_ids: jax.Array
    length: jax.Array

    def advance(self, segment_ids: jax.Array) -> "KVCache":
        """Claim the next S slots for tokens of these segments [B, S].

        Raises:
            ValueError: If the batch differs, or S exceeds the cache.
        """
        batch, capacity = self.segment_ids.shape
        if segment_ids.shape[0] != batch or segment_ids.shape[1] > capacity:
            raise ValueError(
                f"tokens of shape {segment_ids.shape} do not fit a cache of {batch} rows and {capacity} slots"
            )
        written = jax.lax.dynamic_update_slice(
            self.segment_ids, segment_ids.astype(jnp.int32), (0, self.length)
        )
        return replace(self, segment_ids=written, length=self.length + segment_ids.shape[1])

    def write(
        self, layer: jax.Array, keys: jax.Array, values: jax.Array
    ) -> tuple["KVCache", jax.Array, jax.Array]:
        """Fill the slots claimed last, in one layer.

        Args:
            layer: [] int32.
            keys: [B, S, K, head_dim].
            values: [B, S, K, head_dim].

        Returns:
            The new cache, and the layer's keys and values of all slots, [B, T, K, head_dim] in the
            dtype of ``keys``.
        """
        start = (layer, 0, self.length - keys.shape[1], 0, 0)

        def put(slots: jax.Array, new: jax.Array) -> jax.Array:
            return jax.lax.dynamic_update_slice(slots, new[None].astype(slots.dtype), start)

        cache = replace(self, keys=put(self.keys, keys), values=put(self.values, values))
        return cache, cache.keys[layer].astype(keys.dtype), cache.values[layer].astype(keys.dtype)


def init_cache(config: ModelConfig, batch: int, length: int, dtype: DTypeLike = jnp.bfloat16) -> KVCache:
    """An empty cache.

    Args:
        config: The model's.
        batch: Number of rows.
        length: Number of slots: padded prompt plus new tokens. A cache that overflows gives NaN.
        dtype: Of keys and values; the parameters' dtype loses nothing.
    """
    shape = (config.num_layers, batch, length, config.num_kv_heads, config.head_dim)
    return KVCache(
        keys=jnp.zeros(shape, dtype),
        values=jnp.zeros(shape, dtype),
        segment_ids=jnp.zeros((batch, length), jnp.int32),
        length=jnp.zeros((), jnp.int32),
    )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Past:
    """Keys and values of earlier tokens, each row's at slots of its own: a token's slot is its position.

    Attributes:
        keys: [L, B, K, T, head_dim], after RoPE.
        values: [L, B, K, T, head_dim].
    """

    keys: jax.Array
    values: jax.Array

    @property
    def slots(self) -> int:
        """T."""
        return self.keys.shape[3]

    def spread(self) -> "Past":
        """Laid over the current mesh: rows like those of a batch, heads like those of the weights."""
        return jax.tree.map(lambda x: constrain(x, None, BATCH_AXES, "tensor", None, None), self)

    def with_tokens(self, new: "Past", slots: jax.Array) -> "Past":
        """With the keys and values of further tokens.

        Args:
            new: Of S tokens, [L, B, K, S, head_dim].
            slots: [B, S] int32, where they go; T or more: nowhere.
        """
        rows = jnp.arange(slots.shape[0])[:, None]

        def put(old: jax.Array, new: jax.Array) -> jax.Array:
            moved = jnp.transpose(new, (1, 3, 0, 2, 4)).astype(old.dtype)  # indexed axes come first
            return old.at[:, rows, :, slots].set(moved, mode="drop", unique_indices=True)

        return jax.tree.map(put, self, new).spread()


def init_past(config: ModelConfig, batch: int, slots: int, dtype: DTypeLike = jnp.bfloat16) -> Past:
    """No tokens yet.

    Args:
        config: The model's.
        batch: Number of rows.
        slots: The longest row, in tokens.
        dtype: Of keys and values.
    """
    shape = (config.num_layers, batch, config.num_kv_heads, slots, config.head_dim)
    return Past(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)).spread()


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sight:
    """What tokens see that follow a ``Past``; each sees itself.

    Attributes:
        reach: [B, S] int32, how many slots of the past.
        until: [B, S] int32: the tokens of these S from this one to before that number see it. Of a text
            without branches S everywhere; of a tree, laid out depth first, the end of a token's subtree.
    """

    reach: jax.Array
    until: jax.Array
