"""One layer of a decoder: attention and MLP, each behind a norm and beside a residual."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from spiel_jax.models.cache import KVCache, Past
from spiel_jax.models.config import ModelConfig
from spiel_jax.models.layers import AdaptedLinear, Linear, RMSNorm
from spiel_jax.models.rope import rotate
from spiel_jax.models.storage.packed import named

ATTENTION = "attention"
"""Name under which ``jax.checkpoint`` policies find rotated queries and keys, and what attention has seen."""


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
        cache: KVCache | Past | None,
        layer: jax.Array,
    ) -> tuple[jax.Array, KVCache | Past | None]:
        """Attend; see ``DecoderLayer``."""

        def heads(projection: Linear, name: str, norm: RMSNorm | None) -> jax.Array:
            y = projection(x, adapters.get(f"self_attn.{name}.weight"))
            y = y.reshape(*y.shape[:-1], -1, self.head_dim)  # [B, S, heads, head_dim]
            return y if norm is None else norm(y)

        queries = named(rotate(heads(self.q_proj, "q_proj", self.q_norm), *turn), ATTENTION)
        keys = named(rotate(heads(self.k_proj, "k_proj", self.k_norm), *turn), ATTENTION)
        values = heads(self.v_proj, "v_proj", None)
        if isinstance(cache, Past):
            seen, cache = _after(cache, queries, keys, values, mask)
            return self.o_proj(seen, adapters.get("self_attn.o_proj.weight")), cache
        if cache is not None:
            cache, keys, values = cache.write(layer, keys, values)
        if mask is None:  # leave it to the implementation to skip what is not visible
            window = None if self.sliding_window is None else (self.sliding_window - 1, 0)
            seen = jax.nn.dot_product_attention(
                queries, keys, values, is_causal=True, local_window_size=window
            )
        else:
            seen = jax.nn.dot_product_attention(queries, keys, values, mask=mask)
        seen = named(seen.reshape(*seen.shape[:-2], -1), ATTENTION)  # [B, S, H * head_dim]
        return self.o_proj(seen, adapters.get("self_attn.o_proj.weight")), cache


def _after(
    past: Past, queries: jax.Array, keys: jax.Array, values: jax.Array, masks: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, Past]:
    """What tokens see of the past and of each other, [B, S, H * head_dim], and their own keys and values.

    The past is read where it lies: scores are joined, not keys.

    Args:
        past: One layer's, [B, K, T, head_dim].
        queries: [B, S, H, head_dim].
        keys: [B, S, K, head_dim].
        values: [B, S, K, head_dim].
        masks: See ``DecoderLayer``.
    """
    batch, length, heads, size = queries.shape
    own = Past(*(jnp.swapaxes(x, 1, 2) for x in (keys, values)))  # [B, K, S, head_dim]
    groups = heads // own.keys.shape[1]
    asked = jnp.swapaxes(queries, 1, 2).reshape(
        batch, -1, groups * length, size
    )  # [B, K, groups * S, head_dim]

    def scores(keys: jax.Array, mask: jax.Array) -> jax.Array:
        product = jnp.einsum(
            "bkqd,bktd->bkqt", asked, keys.astype(asked.dtype), preferred_element_type=jnp.float32
        )
        masked = jnp.tile(mask, (1, groups, 1))[:, None]
        return jnp.where(masked, product * size**-0.5, jnp.finfo(jnp.float32).min)

    joined = jnp.concatenate([scores(past.keys, masks[0]), scores(own.keys, masks[1])], axis=-1)
    shares = jax.nn.softmax(joined, axis=-1).astype(asked.dtype)
    slots = past.keys.shape[2]

    def taken(shares: jax.Array, values: jax.Array) -> jax.Array:
        return jnp.einsum(
            "bkqt,bktd->bkqd", shares, values.astype(shares.dtype), preferred_element_type=jnp.float32
        )

    seen = taken(shares[..., :slots], past.values) + taken(shares[..., slots:], own.values)
    seen = seen.astype(queries.dtype).reshape(batch, heads, length, size)
    return jnp.swapaxes(seen, 1, 2).reshape(batch, length, heads * size), own


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
        cache: KVCache | Past | None,
        layer: jax.Array,
    ) -> tuple[jax.Array, KVCache | Past | None]:
        """Apply one layer.

        Args:
            x: [B, S, D].
            turn: Cosine and sine of the positions, from ``rotation``.
            mask: [B or 1, 1, S, T] bool, True where a key is visible; None: causal, windowed. After a
                ``Past`` two masks: of its slots [B, S, T], and of these tokens [B, S, S].
            adapters: This layer's, by name within the layer.
            cache: With the slots of these tokens claimed, or None. Or a ``Past``, this layer's only; what is
                returned for it is that of these tokens.
            layer: [] int32, the place in the cache.
        """
        y, cache = self.self_attn(self.input_layernorm(x), turn, mask, adapters, cache, layer)
        x = x + y
        return x + self.mlp(self.post_attention_layernorm(x), adapters), cache
