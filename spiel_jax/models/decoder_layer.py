"""One layer of a decoder: attention and MLP, each behind a norm and beside a residual."""

import functools
from collections.abc import Mapping

import jax
from flax import nnx
from jax.typing import DTypeLike

from spiel_jax.models.cache import KVCache
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
        mask: jax.Array | None,
        adapters: Mapping[str, AdaptedLinear],
        cache: KVCache | None,
        layer: jax.Array,
    ) -> tuple[jax.Array, KVCache | None]:
        """Attend; see ``DecoderLayer``."""

        def heads(projection: Linear, name: str, norm: RMSNorm | None) -> jax.Array:
            y = projection(x, adapters.get(f"self_attn.{name}.weight"))
            y = y.reshape(*y.shape[:-1], -1, self.head_dim)  # [B, S, heads, head_dim]
            return y if norm is None else norm(y)

        queries = named(rotate(heads(self.q_proj, "q_proj", self.q_norm), *turn), ATTENTION)
        keys = named(rotate(heads(self.k_proj, "k_proj", self.k_norm), *turn), ATTENTION)
        values = heads(self.v_proj, "v_proj", None)
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
        mask: jax.Array | None,
        adapters: Mapping[str, AdaptedLinear],
        cache: KVCache | None,
        layer: jax.Array,
    ) -> tuple[jax.Array, KVCache | None]:
        """Apply one layer.

        Args:
            x: [B, S, D].
            turn: Cosine and sine of the positions, from ``rotation``.
            mask: [B or 1, 1, S, T] bool, True where a key is visible; None: causal, windowed.
            adapters: This layer's, by name within the layer.
            cache: With the slots of these tokens claimed, or None.
            layer: [] int32, the place in the cache.
        """
        y, cache = self.self_attn(self.input_layernorm(x), turn, mask, adapters, cache, layer)
        x = x + y
        return x + self.mlp(self.post_attention_layernorm(x), adapters), cache
