"""The key-value caches of generation: functional pytrees of static shape."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from spiel_jax.models.config import ModelConfig
from spiel_jax.models.stack import Layers, Stack, each_layer
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
        keys: Of each layer [B, K, T, head_dim], after RoPE.
        values: Of each layer [B, K, T, head_dim].
    """

    keys: Stack
    values: Stack

    @property
    def rows(self) -> int:
        """B."""
        return self.keys.shape[1]

    @property
    def slots(self) -> int:
        """T."""
        return self.keys.shape[3]

    def map(self, function: Callable[..., jax.Array], *more: "Past") -> "Past":
        """With ``function`` of every layer's keys, and of its values; laid over the current mesh.

        Rows then lie like those of a batch, heads like those of the weights.

        Args:
            function: Of an array [B, K, T, head_dim], and of those of ``more``.
            more: Further ones.
        """

        def each(stack: Stack, *others: Stack) -> Stack:
            return each_layer(lambda *x: constrain(function(*x), *_AXES), stack, *others)

        others = [(one.keys, one.values) for one in more]
        keys, values = zip((self.keys, self.values), *others, strict=True)
        return Past(each(*keys), each(*values))

    def with_tokens(self, new: "Past", rows: jax.Array, slots: jax.Array) -> "Past":
        """With the keys and values of further tokens.

        Args:
            new: Of S tokens, of each layer [R, K, S, head_dim].
            rows: [R, S] int32, where they go.
            slots: [R, S] int32, where in their rows; T or more: nowhere.
        """
        return self.map(lambda old, new: _put(old, jnp.swapaxes(new, 1, 2), rows, slots), new)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Growing:
    """A past that takes up tokens before they look at it.

    Attributes:
        past: Where to.
        slots: [B, S] int32, which slots; T or more: none.
    """

    past: Past
    slots: jax.Array

    def write(self, layer: Any, keys: jax.Array, values: jax.Array) -> tuple["Growing", Past]:
        """Takes up tokens in one layer.

        Args:
            layer: Its number.
            keys: [B, S, K, head_dim].
            values: [B, S, K, head_dim].

        Returns:
            The new cache, and what is now in the layer, a ``Past`` of arrays [B, K, T, head_dim].
        """
        rows = jnp.arange(self.slots.shape[0])[:, None]

        def put(stack: Stack, new: jax.Array) -> tuple[Stack, jax.Array]:
            if isinstance(stack, Layers):
                own = constrain(_put(stack.parts[layer], new, rows, self.slots), *_AXES)
                return Layers((*stack.parts[:layer], own, *stack.parts[layer + 1 :])), own
            whole = _put(stack, new, rows, self.slots, layer)
            return whole, whole[layer]

        (all_keys, own_keys), (all_values, own_values) = (
            put(self.past.keys, keys),
            put(self.past.values, values),
        )
        return replace(self, past=Past(all_keys, all_values)), Past(own_keys, own_values)


_AXES = (BATCH_AXES, "tensor", None, None)  # of one layer's keys and values


def _put(old: jax.Array, new: jax.Array, rows: jax.Array, slots: jax.Array, *layer: jax.Array) -> jax.Array:
    """[(L,) B, K, T, head_dim] with tokens [R, S, K, head_dim] at rows and slots [R, S]."""
    at = old.at[(*layer, rows, slice(None), slots)]  # axes that arrays index come first
    return at.set(new.astype(old.dtype), mode="drop", unique_indices=True)


def init_past(
    config: ModelConfig, batch: int, slots: int, dtype: DTypeLike = jnp.bfloat16, *, by_layer: bool = False
) -> Past:
    """No tokens yet.

    Args:
        config: The model's.
        batch: Number of rows.
        slots: The longest row, in tokens.
        dtype: Of keys and values.
        by_layer: Whether each layer is held by itself, as the model's weights are then.
    """
    shape = (batch, config.num_kv_heads, slots, config.head_dim)

    def empty() -> Stack:
        if by_layer:
            return Layers(tuple(jnp.zeros(shape, dtype) for _ in range(config.num_layers)))
        return jnp.zeros((config.num_layers, *shape), dtype)

    return Past(empty(), empty()).map(lambda x: x)


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
