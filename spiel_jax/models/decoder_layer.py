"""One layer of a decoder: attention and MLP, each behind a norm and beside a residual."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from spiel_jax.models.cache import Growing, KVCache, Past
from spiel_jax.models.config import ModelConfig
from spiel_jax.models.fused_attention import AttentionKind, attend
from spiel_jax.models.layers import AdaptedLinear, Linear, RMSNorm
from spiel_jax.models.rope import rotate
from spiel_jax.models.storage.packed import named

ATTENTION = "attention"
"""Name under which ``jax.checkpoint`` policies find rotated queries and keys, and what attention has seen."""

Cache = KVCache | Growing | Past
"""Of the tokens before; see ``DecoderLayer``."""


class Attention(nnx.Module):
    """Grouped-query causal self-attention."""

    def __init__(self, config: ModelConfig, *, stack: tuple[int, ...], dtype: DTypeLike):
        declare = functools.partial(Linear, stack=stack, dtype=dtype)
        width, kv_width = (n * config.head_dim for n in (config.num_heads, config.num_kv_heads))
        self.q_proj = declare(config.hidden_size, width, bias=config.attention_bias)
        self.k_proj = declare(config.hidden_size, kv_width, bias=config.attention_bias)
        self.v_proj = declare(config.hidden_size, kv_width, bias=config.attention_bias)
        self.o_proj = declare(width, config.hidden_size, bias=config.output_bias)
        norm = functools.partial(RMSNorm, config.head_dim, eps=config.rms_norm_eps, stack=stack, dtype=dtype)
        self.q_norm = norm() if config.qk_norm else None
        self.k_norm = norm() if config.qk_norm else None
        self.head_dim = config.head_dim
        self.sliding_window = config.sliding_window

    def __call__(
        self,
        x: jax.Array,
        turn: tuple[jax.Array, jax.Array],
        mask: Any,
        adapters: Mapping[str, AdaptedLinear],
        cache: Cache | None,
        layer: jax.Array,
        kind: AttentionKind = "xla",
    ) -> tuple[jax.Array, Cache | None]:
        """Attend; see ``DecoderLayer``."""

        def heads(projection: Linear, name: str, norm: RMSNorm | None) -> jax.Array:
            y = projection(x, adapters.get(f"self_attn.{name}.weight"))
            y = y.reshape(*y.shape[:-1], -1, self.head_dim)  # [B, S, heads, head_dim]
            return y if norm is None else norm(y)

        queries = named(rotate(heads(self.q_proj, "q_proj", self.q_norm), *turn), ATTENTION)
        keys = named(rotate(heads(self.k_proj, "k_proj", self.k_norm), *turn), ATTENTION)
        values = heads(self.v_proj, "v_proj", None)
        if isinstance(cache, Growing | Past):
            if isinstance(cache, Growing):
                cache, past = cache.write(layer, keys, values)
                parts = [(past, mask)]
            else:
                own = Past(*(jnp.swapaxes(x, 1, 2) for x in (keys, values)))  # [B, K, S, head_dim]
                parts, cache = list(zip((cache, own), mask, strict=True)), own
            return self.o_proj(_seen(queries, parts), adapters.get("self_attn.o_proj.weight")), cache
        if cache is not None:
            cache, keys, values = cache.write(layer, keys, values)
        seen = attend(queries, keys, values, mask, self.sliding_window, kind if cache is None else "xla")
        seen = named(seen.reshape(*seen.shape[:-2], -1), ATTENTION)  # [B, S, H * head_dim]
        return self.o_proj(seen, adapters.get("self_attn.o_proj.weight")), cache


def _seen(queries: jax.Array, parts: Sequence[tuple[Past, jax.Array]]) -> jax.Array:
    """What queries [B, S, H, head_dim] see of several parts, [B, S, H * head_dim].

    Each part is read where it lies: scores are joined, not keys.

    Args:
        queries: Rotated.
        parts: Keys and values of one layer, [B, K, T, head_dim], and which are visible, [B, S, T] bool.
    """
    batch, length, heads, size = queries.shape
    groups = heads // parts[0][0].keys.shape[1]
    asked = jnp.swapaxes(queries, 1, 2).reshape(
        batch, -1, groups * length, size
    )  # [B, K, groups * S, head_dim]

    def scores(keys: Any, mask: jax.Array) -> jax.Array:
        product = jnp.einsum(
            "bkqd,bktd->bkqt", asked, keys.astype(asked.dtype), preferred_element_type=jnp.float32
        )
        masked = jnp.tile(mask, (1, groups, 1))[:, None]
        return jnp.where(masked, product * size**-0.5, jnp.finfo(jnp.float32).min)

    joined = jnp.concatenate([scores(past.keys, mask) for past, mask in parts], axis=-1)
    shares = jax.nn.softmax(joined, axis=-1).astype(asked.dtype)
    ends = np.cumsum([past.keys.shape[2] for past, _ in parts])[:-1]

    def taken(shares: jax.Array, values: Any) -> jax.Array:
        return jnp.einsum(
            "bkqt,bktd->bkqd", shares, values.astype(shares.dtype), preferred_element_type=jnp.float32
        )

    taken_of = [
        taken(own, past.values) for own, (past, _) in zip(jnp.split(shares, ends, -1), parts, strict=True)
    ]
    seen = sum(taken_of[1:], start=taken_of[0]).astype(queries.dtype).reshape(batch, heads, length, size)
    return jnp.swapaxes(seen, 1, 2).reshape(batch, length, heads * size)


class MLP(nnx.Module):
    """SwiGLU (arXiv 2002.05202)."""

    def __init__(self, config: ModelConfig, *, stack: tuple[int, ...], dtype: DTypeLike):
        declare = functools.partial(Linear, stack=stack, dtype=dtype)
        self.gate_proj = declare(config.hidden_size, config.intermediate_size)
        self.up_proj = declare(config.hidden_size, config.intermediate_size)
        self.down_proj = declare(config.intermediate_size, config.hidden_size)

    def __call__(self, x: jax.Array, adapters: Mapping[str, AdaptedLinear]) -> jax.Array:
        """[B, S, D] to [B, S, D]."""
        gate = self.gate_proj(x, adapters.get("mlp.gate_proj.weight"))
        up = self.up_proj(x, adapters.get("mlp.up_proj.weight"))
        return self.down_proj(jax.nn.silu(gate) * up, adapters.get("mlp.down_proj.weight"))


class DecoderLayer(nnx.Module):
    """A block: attention and MLP, each normalised before and added to its input."""

    def __init__(self, config: ModelConfig, *, stack: tuple[int, ...], dtype: DTypeLike):
        norm = functools.partial(
            RMSNorm, config.hidden_size, eps=config.rms_norm_eps, stack=stack, dtype=dtype
        )
        self.input_layernorm = norm()
        self.self_attn = Attention(config, stack=stack, dtype=dtype)
        self.post_attention_layernorm = norm()
        self.mlp = MLP(config, stack=stack, dtype=dtype)

    def __call__(
        self,
        x: jax.Array,
        turn: tuple[jax.Array, jax.Array],
        mask: Any,
        adapters: Mapping[str, AdaptedLinear],
        cache: Cache | None,
        layer: jax.Array,
        attention: AttentionKind = "xla",
    ) -> tuple[jax.Array, Cache | None]:
        """Apply one layer.

        Args:
            x: [B, S, D].
            turn: Cosine and sine of the positions, from ``rotation``.
            mask: [B or 1, 1, S, T] bool, True where a key is visible; None: causal, windowed. In a
                ``Growing`` [B, S, T]; after a ``Past`` two: of its slots, and of these tokens [B, S, S].
            adapters: This layer's, by name within the layer.
            cache: With the slots of these tokens claimed, or None. Or a ``Past``, this layer's only; what is
                returned for it is that of these tokens.
            layer: [] int32, the place in the cache; static where the cache is held by layers.
            attention: What computes attention without a cache, see ``fused_attention``.
        """
        y, cache = self.self_attn(self.input_layernorm(x), turn, mask, adapters, cache, layer, attention)
        x = x + y
        return x + self.mlp(self.post_attention_layernorm(x), adapters), cache
