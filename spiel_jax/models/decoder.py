"""Decoders of the Llama family (Llama, Mistral, Qwen2, Qwen3, SmolLM2), layers stacked and scanned.

The parameters of a model are a flat dict from name to array, or for a linear of the layers to a stored
weight (see ``models.storage``). A name is the Hugging Face one, without the layer number where layers are
stacked: ``model.layers.mlp.up_proj.weight`` is [L, out, in].

Example:
    >>> from dataclasses import replace
    >>> config = replace(ModelConfig.smollm2_135m(), num_layers=2, vocab_size=100)
    >>> params = init_params(config, jax.random.key(0), jnp.bfloat16)
    >>> bind(config, params)(jnp.array([[1, 2, 3]])).shape  # logits, float32
    (1, 3, 100)
"""

import functools
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from spiel_jax.models.attention_masks import sees_past, sees_tree, visible, within
from spiel_jax.models.axes import LAYERS, all_gathered
from spiel_jax.models.cache import Growing, KVCache, Past, Sight
from spiel_jax.models.config import ModelConfig
from spiel_jax.models.decoder_layer import ATTENTION, DecoderLayer
from spiel_jax.models.fused_attention import AttentionKind
from spiel_jax.models.layers import PROJECTION, AdaptedLinear, Embedding, Linear, RMSNorm
from spiel_jax.models.rope import inverse_frequencies, rotation
from spiel_jax.models.stack import Layers, scan
from spiel_jax.models.storage.packed import loop_dtype, packed
from spiel_jax.models.storage.weight import Weight, hold
from spiel_jax.ops.matmul import linear
from spiel_jax.ops.sharded import BATCH_AXES, constrain
from spiel_jax.ops.stored import as_array, is_stored
from spiel_jax.ops.tree import named_key

Remat = Literal["none", "dots", "full"]
EMBEDDING = "model.embed_tokens.weight"
"""Name of the embedding table."""

ADAPTED = tuple(
    f"{LAYERS}{name}.weight"
    for name in (
        *(f"self_attn.{part}_proj" for part in "qkvo"),
        *(f"mlp.{part}_proj" for part in ("gate", "up", "down")),
    )
)
"""Names of the weights that take an adapter: every linear inside the blocks."""


class Decoder(nnx.Module):
    """What Hugging Face keeps under the prefix ``model.``."""

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike):
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, dtype=dtype)
        self.layers = DecoderLayer(config, stack=(config.num_layers,), dtype=dtype)
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, dtype=dtype)


class CausalLM(nnx.Module):
    """A decoder with its language-model head.

    Args:
        config: The model's shape.
        rngs: Source of the initial parameters; None declares their shapes only.
        param_dtype: Of the parameters, and so of the activations.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        rngs: nnx.Rngs | None = None,
        param_dtype: DTypeLike = jnp.float32,
    ):
        self.config = config
        self.model = Decoder(config, dtype=param_dtype)
        self.lm_head = (
            None
            if config.tie_embeddings
            else Linear(config.hidden_size, config.vocab_size, dtype=param_dtype)
        )
        if rngs is not None:
            nnx.update(self, _as_state(init_params(config, rngs.params(), param_dtype)))

    @property
    def head(self) -> jax.Array:
        """The head's weight [V, D]: the embedding table when tied."""
        owner = self.model.embed_tokens if self.lm_head is None else self.lm_head
        return owner.weight[...]

    @property
    def dtype(self) -> jnp.dtype:
        """Of the activations: that in which the embedding gives them."""
        return self.model.embed_tokens.weight.get_value().dtype

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Logits [..., V] in float32 of final hidden states [..., D]; never rounded to bfloat16."""
        return linear(hidden.astype(jnp.float32), self.head)

    def __call__(
        self,
        tokens: jax.Array,
        *,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        adapters: Mapping[str, AdaptedLinear] | None = None,
        remat: Remat = "full",
    ) -> jax.Array:
        """Logits [B, S, V] in float32 of tokens [B, S]; see ``hidden``."""
        hidden, _ = self.hidden(
            tokens, positions=positions, segment_ids=segment_ids, adapters=adapters, remat=remat
        )
        return self.logits(hidden)

    def hidden(
        self,
        tokens: jax.Array,
        *,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        adapters: Mapping[str, AdaptedLinear] | None = None,
        cache: KVCache | None = None,
        remat: Remat = "full",
        frozen: bool = False,
        attention: AttentionKind = "xla",
    ) -> tuple[jax.Array, KVCache | None]:
        """Hidden states after the final norm.

        Args:
            tokens: [B, S] integers.
            positions: [B or 1, S] integers for RoPE; None: how many tokens of the segment precede.
            segment_ids: [B, S] integers; a token sees itself and the earlier tokens of its own
                segment. 0 is padding. None: every row is one segment.
            adapters: By parameter name, such as ``model.layers.self_attn.q_proj.weight``; their
                leaves have the leading axis L.
            cache: The tokens before these, which fill its next S slots. Past its end: NaN.
            remat: What the backward pass finds stored of a layer: "none" everything it needs,
                "dots" the outputs of the linears and of attention, "full" the layer's input.
            frozen: Whether no gradient of the parameters is wanted (that of an adapted or a stored weight
                never is): on a CPU, 16-bit ones then take less memory.
            attention: What computes attention, see ``fused_attention``; with a cache always XLA.

        Returns:
            [B, S, D] in the dtype of the embedding, and the new cache (None without a cache).

        Raises:
            ValueError: If an adapter's key or ``remat`` is unknown, or the tokens do not fit the
                cache.
        """
        adapters = adapters or {}
        if unknown := sorted(set(adapters) - set(ADAPTED)):
            raise ValueError(f"unknown adapters {unknown}: expected some of {', '.join(ADAPTED)}")
        adapters = {name.removeprefix(LAYERS): adapter for name, adapter in adapters.items()}

        if cache is not None:
            if segment_ids is None:
                segment_ids = jnp.ones(tokens.shape, jnp.int32)
            cache = cache.advance(segment_ids)
        elif segment_ids is None and self.config.sliding_layers is not None:
            segment_ids = jnp.ones((1, tokens.shape[1]), jnp.int32)
        masks = None if segment_ids is None else _masks(self.config, segment_ids, cache)
        turn = _turn(self.config, _positions(tokens, masks) if positions is None else positions)

        x, cache, _ = self._through_layers(
            tokens, turn, masks, adapters, cache, None, remat, frozen, attention
        )
        x = self.model.norm(x)
        if cache is not None:  # a full cache would otherwise overwrite its last slots unnoticed
            x = jnp.where(cache.length <= cache.segment_ids.shape[1], x, jnp.nan)
        return x, cache

    def following(
        self,
        past: Past,
        tokens: jax.Array,
        sight: Sight,
        *,
        positions: jax.Array,
    ) -> tuple[jax.Array, Past]:
        """Hidden states after the final norm of tokens that follow others, as inference wants them.

        Rows may be of different lengths, and the tokens of a row a tree.

        Args:
            past: The earlier tokens; a token's slot is its position.
            tokens: [B, S] integers.
            sight: What each of them sees.
            positions: [B, S] integers, for RoPE and for a window.

        Returns:
            [B, S, D] in the dtype of the embedding, and the keys and values of these tokens, of each layer
            [B, K, S, head_dim], which ``Past.with_tokens`` takes.
        """
        see = sees_past(sight.reach, past.slots), sees_tree(sight.until)
        places = jnp.arange(past.slots)[None, None], positions[:, None, :]
        masks = see, tuple(self._near(*one, positions) for one in zip(see, places, strict=True))
        turn = _turn(self.config, positions)
        x, _, new = self._through_layers(tokens, turn, masks, {}, None, past, "none", True)
        return self.model.norm(x), new

    def extending(
        self, past: Past, tokens: jax.Array, *, positions: jax.Array, slots: jax.Array
    ) -> tuple[jax.Array, Past]:
        """Hidden states after the final norm of the next tokens of rows, and the past with them.

        Args:
            past: All tokens before them.
            tokens: [B, S] integers.
            positions: [B, S] integers; a token sees the slots up to its own.
            slots: [B, S] integers: the positions, or where a token is not to be kept T or more.
        """
        full = sees_past(positions + 1, past.slots)
        near = self._near(full, jnp.arange(past.slots)[None, None], positions)
        turn, cache = _turn(self.config, positions), Growing(past, slots)
        x, cache, _ = self._through_layers(tokens, turn, (full, near), {}, cache, None, "none", True)
        assert isinstance(cache, Growing)
        return self.model.norm(x), cache.past

    def _near(self, seen: jax.Array, places: jax.Array, positions: jax.Array) -> jax.Array:
        """Which of the visible places [B, S, T] are in the window too, of tokens at positions [B, S]."""
        if self.config.sliding_window is None:
            return seen
        return seen & (places > (positions - self.config.sliding_window)[..., None])

    def _through_layers(
        self,
        tokens: jax.Array,
        turn: tuple[jax.Array, jax.Array],
        masks: tuple[Any, Any] | None,
        adapters: Mapping[str, AdaptedLinear],
        cache: KVCache | Growing | None,
        past: Past | None,
        remat: Remat,
        frozen: bool,
        attention: AttentionKind = "xla",
    ) -> tuple[jax.Array, Any, Any]:
        """The scan over layers: hidden states [B, S, D] before the final norm, and the new cache.

        Args:
            tokens: [B, S].
            turn: From ``rotation``.
            masks: From ``_masks``; None: every layer sees all that precedes, in its window. After a past
                pairs of them, see ``DecoderLayer``.
            adapters: By name within the layer.
            cache: With the slots of these tokens claimed, or a ``Growing``, or None.
            past: Instead of a cache; the last result is then that of these tokens.
            remat: See ``hidden``.
            frozen: See ``hidden``.
            attention: See ``hidden``.
        """
        graphdef, state = nnx.split(self.model.layers)
        weights = {".".join(map(str, path)): leaf.get_value() for path, leaf in nnx.to_flat_state(state)}
        trained = {name for name in weights if not (frozen or name in adapters or is_stored(weights[name]))}

        def body(carry: tuple, inputs: tuple) -> tuple:
            x, cache = carry
            x = x.astype(dtype)
            weights, adapters, layer, slides, past = inputs
            used = {name: _used(name, weights[name], name in trained) for name in weights}
            mask = None
            if masks is not None:
                mask = masks[1]
                if slides is not None:
                    mask = jax.tree.map(partial(jnp.where, slides), masks[1], masks[0])
            block = nnx.merge(graphdef, _as_state(used))
            x, kept = block(x, turn, mask, adapters, cache if past is None else past, layer, attention)
            x = constrain(x, BATCH_AXES, None, None)
            return (x.astype(carried), kept if past is None else cache), None if past is None else kept

        layers = np.arange(self.config.num_layers, dtype=np.int32)
        slides = None if self.config.sliding_layers is None else np.array(self.config.sliding_layers)
        x = constrain(self.model.embed_tokens(tokens), BATCH_AXES, None, None)
        dtype, carried = x.dtype, loop_dtype(x.dtype)
        carry = (x.astype(carried), cache)
        looped = {name: weight if name in trained else _looped(weight) for name, weight in weights.items()}
        inputs = (looped, adapters, layers, slides, past)
        (x, cache), new = scan(_rematerialised(body, remat), carry, inputs)
        return x.astype(dtype), cache, new


def _masks(config: ModelConfig, segment_ids: jax.Array, cache: KVCache | None) -> tuple[jax.Array, jax.Array]:
    """What tokens see without and with the window, [B or 1, 1, S, T]; of these segments, [B or 1, S]."""
    keys = segment_ids if cache is None else cache.segment_ids
    length = segment_ids.shape[1]
    offset = 0 if cache is None else cache.length - length
    full = near = visible(segment_ids, keys, offset)
    if config.sliding_window is not None:
        near = full & within(config.sliding_window, length, keys.shape[1], offset)
    return full, near


def _positions(tokens: jax.Array, masks: tuple[jax.Array, jax.Array] | None) -> jax.Array:
    """[B or 1, S]: how many tokens of its segment precede each token."""
    if masks is None:
        return jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    return jnp.sum(masks[0][:, 0], axis=-1, dtype=jnp.int32) - 1


def _turn(config: ModelConfig, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine of the positions."""
    return rotation(positions, inverse_frequencies(config.head_dim, config.rope_theta, config.rope_scaling))


def _looped(weight: Any) -> Any:
    """A parameter of the layers that has no gradient, as it goes through their loop."""
    return weight if is_stored(weight) or isinstance(weight, Layers) else packed(weight)


def _used(name: str, weight: Any, trained: bool) -> Any:
    """One layer's parameter as its module takes it: linears dequantise their weight for each product."""
    if LAYERS + name not in ADAPTED:
        return as_array(weight)
    return weight if trained else all_gathered(LAYERS + name, weight)  # its gradient would be collected too


def _rematerialised(body: Callable, remat: Remat) -> Callable:
    if remat == "none":
        return body
    if remat == "full":
        return jax.checkpoint(body, prevent_cse=False)
    if remat == "dots":
        # by name, since the products themselves are hidden in custom rules
        policy = jax.checkpoint_policies.save_only_these_names(PROJECTION, ATTENTION)
        return jax.checkpoint(body, prevent_cse=False, policy=policy)
    raise ValueError(f"unknown remat {remat!r}: expected one of {', '.join(get_args(Remat))}")


@functools.lru_cache
def _structure(config: ModelConfig) -> tuple[nnx.GraphDef, Mapping[str, tuple[int, ...]]]:
    """The graph of a model, and the shapes of its parameters by name."""
    graphdef, state = nnx.split(CausalLM(config))
    shapes = {".".join(map(str, path)): leaf.get_value().shape for path, leaf in nnx.to_flat_state(state)}
    return graphdef, MappingProxyType(shapes)


def _as_state(params: Mapping[str, Any]) -> nnx.State:
    return nnx.from_flat_state([(tuple(name.split(".")), params[name]) for name in sorted(params)])


def abstract_params(
    config: ModelConfig, dtype: DTypeLike = jnp.float32, *, storage: type[Weight] | None = None
) -> dict[str, Any]:
    """Names, shapes and dtypes of a model's parameters; allocates nothing.

    Args:
        config: The model's shape.
        dtype: Of the parameters.
        storage: See ``init_params``.

    Returns:
        Name to ``jax.ShapeDtypeStruct``, or for the weights in ``ADAPTED`` to a stored weight of these.
    """

    def described(name: str, shape: tuple[int, ...]) -> Any:
        array = jax.ShapeDtypeStruct(shape, dtype)
        return jax.eval_shape(storage.hold, array) if storage and name in ADAPTED else array

    return {name: described(name, shape) for name, shape in _structure(config)[1].items()}


def init_params(
    config: ModelConfig,
    key: jax.Array,
    dtype: DTypeLike = jnp.float32,
    *,
    storage: type[Weight] | None = None,
) -> dict[str, Any]:
    """Fresh parameters as Hugging Face initialises them: normal weights, norms 1, biases 0.

    Each tensor depends on the key and its own name only.

    Args:
        config: The model's shape.
        key: A JAX random key.
        dtype: Of the result; drawn in float32.
        storage: How the weights in ``ADAPTED`` are held, see ``models.storage``; None: as arrays.

    Returns:
        Name to array or stored weight.
    """

    def draw(name: str, shape: tuple[int, ...]) -> Any:
        if name.endswith("norm.weight"):
            return jnp.ones(shape, dtype)
        if name.endswith(".bias"):
            return jnp.zeros(shape, dtype)
        own = named_key(key, name)
        if not name.startswith(LAYERS):
            return normal(own, shape)
        # layer by layer: the float32 draw of a whole stack can be larger than the model
        kind = storage if name in ADAPTED else None
        return jax.lax.map(lambda k: hold(normal(k, shape[1:]), kind), jax.random.split(own, shape[0]))

    def normal(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        return (config.initializer_range * jax.random.normal(key, shape, jnp.float32)).astype(dtype)

    return {name: draw(name, shape) for name, shape in _structure(config)[1].items()}


def bind(config: ModelConfig, params: Mapping[str, Any]) -> CausalLM:
    """The model with these parameters, stored weights too; cheap, and usable while tracing.

    Raises:
        ValueError: If a parameter is missing, unknown or of the wrong shape; it is named.
    """
    graphdef, shapes = _structure(config)
    if missing := sorted(set(shapes) - set(params)):
        raise ValueError(f"missing parameters: {', '.join(missing)}")
    if unknown := sorted(set(params) - set(shapes)):
        raise ValueError(f"unknown parameters: {', '.join(unknown)}")
    for name, shape in shapes.items():
        if params[name].shape != shape:
            raise ValueError(f"{name} has shape {params[name].shape}, expected {shape}")
    return nnx.merge(graphdef, _as_state(params))


def layer_names(name: str, num_layers: int) -> list[str]:
    """Hugging Face names of a parameter, layer by layer.

    >>> layer_names("model.layers.mlp.up_proj.weight", 2)
    ['model.layers.0.mlp.up_proj.weight', 'model.layers.1.mlp.up_proj.weight']

    A parameter outside the layers has one name, its own.
    """
    if not name.startswith(LAYERS):
        return [name]
    return [f"{LAYERS}{layer}.{name.removeprefix(LAYERS)}" for layer in range(num_layers)]
