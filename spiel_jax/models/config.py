"""The shape of a decoder: read from a Hugging Face config.json or a GGUF file, or a preset."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Self, get_args

import numpy as np

from spiel_jax.errors import SpielError
from spiel_jax.models.config_keys import LARGEST, Keys, one_of, shown
from spiel_jax.models.rope import RopeKind, RopeScaling, inverse_frequencies

# Hugging Face's num_key_value_heads and max_position_embeddings where the keys are absent, by family
_KV_HEADS = {"llama": LARGEST, "mistral": 8, "qwen2": 32, "qwen3": 32}  # or, if fewer, as many as heads
_POSITIONS = {"llama": 2048, "mistral": 131_072, "qwen2": 32_768, "qwen3": 32_768}
_GGUF_ARCHITECTURES = ("llama", "qwen2", "qwen3")
_MOST_LAYERS = 10_000  # whatever grows by layers is made before the weights are asked


QUANT_METHODS = ("bitsandbytes", "fp8", "fbgemm_fp8", "compressed-tensors", "modelopt")
"""What ``quantization_config`` of a config.json can name; see ``models.io.prequantized``."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Everything that determines a model's shapes and arithmetic; hashable.

    Attributes:
        vocab_size: V, rows of the embedding.
        hidden_size: D.
        intermediate_size: Width of the gated MLP.
        num_layers: L.
        num_heads: H, query heads.
        num_kv_heads: K, key and value heads; divides H.
        head_dim: Size of a head; even. H * head_dim need not equal D.
        max_positions: Context length in tokens. Information only: nothing is truncated to it.
        rms_norm_eps: Added to the mean square in every norm.
        rope_theta: Base of the rotary wavelengths.
        rope_scaling: Stretch of the rotary wavelengths, or None.
        tie_embeddings: The head is the embedding table; there is no ``lm_head.weight``.
        attention_bias: q_proj, k_proj and v_proj have a bias.
        output_bias: o_proj has a bias.
        qk_norm: Queries and keys are normalised per head before RoPE (Qwen3).
        sliding_window: A token sees itself and the ``sliding_window - 1`` before it; None: all.
        sliding_layers: Which layers have the window, one flag per layer; None: every layer.
        initializer_range: Standard deviation of freshly initialised weights.

    Raises:
        SpielError: If the numbers contradict each other.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    tie_embeddings: bool = False
    attention_bias: bool = False
    output_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None
    sliding_layers: tuple[bool, ...] | None = None
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        for field in fields(self):
            if field.type is int and getattr(self, field.name) < 1:
                raise SpielError(f"{field.name} must be at least 1, got {getattr(self, field.name)}")
        if self.num_heads % self.num_kv_heads:
            raise SpielError(
                f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise SpielError(f"head_dim must be even for rotary embeddings, got {self.head_dim}")
        if self.sliding_window is not None and self.sliding_window < 1:
            raise SpielError(f"sliding_window must be at least 1, got {self.sliding_window}")
        if self.sliding_layers is not None:
            if self.sliding_window is None:
                raise SpielError("sliding_layers needs a sliding_window")
            if len(self.sliding_layers) != self.num_layers:
                flags = len(self.sliding_layers)
                raise SpielError(f"sliding_layers has {flags} flags for {self.num_layers} layers")
            if len(set(self.sliding_layers)) == 1:  # equal models have to compare equal
                raise SpielError(
                    "sliding_layers is for models that mix: leave it None when every layer has the "
                    "window, and sliding_window too when none has"
                )

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Self:
        """Read the contents of a Hugging Face ``config.json``.

        Args:
            config: The parsed file. Both ways of writing RoPE are read: ``rope_parameters``
                (Transformers 5), and ``rope_theta`` with ``rope_scaling``.

        Raises:
            SpielError: If a key is missing or asks for what is not supported; it is named.
        """
        keys = Keys(config)
        model_type = keys.choice("model_type", tuple(_KV_HEADS))
        for key in ("hidden_act", "hidden_activation"):
            keys.choice(key, ("silu", "swish"), "silu")  # two names of one function
        quantization = keys.mapping("quantization_config").values
        if quantization and quantization.get("quant_method") not in QUANT_METHODS:
            raise SpielError(
                f"quantised checkpoints of quant_method {shown(quantization.get('quant_method'))} are not "
                f"supported: expected one of {', '.join(QUANT_METHODS)} (4 bits, LLM.int8, float8), or a "
                "model that is not quantised"
            )
        if keys.flag("mlp_bias", False):
            raise SpielError("mlp_bias is not supported: expected false")

        hidden_size, num_heads = keys.integer("hidden_size"), keys.integer("num_attention_heads")
        num_layers = keys.integer("num_hidden_layers", most=_MOST_LAYERS)
        # what transformers takes where the key is absent; null is another thing there
        absent = _KV_HEADS[model_type] if "num_key_value_heads" not in config else num_heads
        bias = keys.flag("attention_bias", False) and model_type in ("llama", "qwen3")
        window, sliding_layers = _hf_window(keys, model_type, num_layers)
        theta, scaling = _hf_rope(keys)
        return cls(
            vocab_size=keys.integer("vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=keys.integer("intermediate_size"),
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=keys.integer("num_key_value_heads", min(absent, num_heads)),
            head_dim=_hf_head_dim(keys, model_type, hidden_size, num_heads),
            max_positions=keys.integer("max_position_embeddings", _POSITIONS[model_type]),
            rms_norm_eps=keys.number("rms_norm_eps", 1e-6),
            rope_theta=theta,
            rope_scaling=scaling,
            tie_embeddings=keys.flag("tie_word_embeddings", False),
            attention_bias=bias or model_type == "qwen2",
            output_bias=bias,
            qk_norm=model_type == "qwen3",
            sliding_window=window,
            sliding_layers=sliding_layers,
            initializer_range=keys.number("initializer_range", 0.02),
        )

    @classmethod
    def from_gguf(
        cls, metadata: Mapping[str, Any], *, tied: bool, rope_factors: np.ndarray | None = None
    ) -> Self:
        """Read the metadata of a GGUF file.

        Args:
            metadata: Plain Python values by GGUF key, such as ``llama.block_count``.
            tied: Whether the file lacks the tensor ``output.weight``.
            rope_factors: The tensor ``rope_freqs.weight`` [head_dim / 2] when the file has it: that
                is where GGUF keeps the llama3 scaling, of which the metadata says nothing.

        Raises:
            SpielError: If a key is missing or asks for what is not supported; it is named.
        """
        keys = Keys(metadata)
        architecture = keys.choice("general.architecture", _GGUF_ARCHITECTURES)

        def own(key: str) -> str:
            return f"{architecture}.{key}"

        if keys.integer(own("expert_count"), 0, least=0):
            raise SpielError(f"mixtures of experts are not supported: {own('expert_count')}")
        for key in map(own, ("attention.head_count", "attention.head_count_kv")):
            if isinstance(value := metadata.get(key), Sequence) and not isinstance(value, str):
                raise SpielError(f"heads that vary by layer are not supported: {key} {shown(value)}")
        num_heads = keys.integer(own("attention.head_count"))
        hidden_size = keys.integer(own("embedding_length"))
        head_dim = keys.integer(own("attention.key_length"), None)
        if head_dim is None:
            head_dim = _per_head(hidden_size, num_heads, own("embedding_length"))
        for key in map(own, ("attention.value_length", "rope.dimension_count")):
            if (size := keys.integer(key, head_dim)) != head_dim:
                raise SpielError(f"{key} must equal the head size {head_dim}, got {size}")
        tokens = keys.items("tokenizer.ggml.tokens", None)

        theta = _decimal(keys.number(own("rope.freq_base"), 10_000.0, least=1.0))
        kind, scaling = keys.choice(own("rope.scaling.type"), ("none", "linear"), "none"), None
        if kind == "linear":
            scaling = RopeScaling("linear", _decimal(keys.number(own("rope.scaling.factor"))))
        if rope_factors is not None:
            if scaling is not None:
                raise SpielError("rope_freqs.weight and linear rope scaling exclude each other")
            scaling = _llama3_scaling(np.asarray(rope_factors), head_dim, theta)
        vocab_size = own("vocab_size")
        return cls(
            vocab_size=keys.integer(vocab_size) if tokens is None else keys.integer(vocab_size, len(tokens)),
            hidden_size=hidden_size,
            intermediate_size=keys.integer(own("feed_forward_length")),
            num_layers=keys.integer(own("block_count"), most=_MOST_LAYERS),
            num_heads=num_heads,
            num_kv_heads=keys.integer(own("attention.head_count_kv"), num_heads),
            head_dim=head_dim,
            max_positions=keys.integer(own("context_length")),
            rms_norm_eps=_decimal(keys.number(own("attention.layer_norm_rms_epsilon"))),
            rope_theta=theta,
            rope_scaling=scaling,
            tie_embeddings=tied,
            attention_bias=architecture == "qwen2",
            qk_norm=architecture == "qwen3",
            sliding_window=keys.integer(own("attention.sliding_window"), 0, least=0) or None,
        )

    @classmethod
    def llama2_7b(cls) -> Self:
        """Llama 2 7B."""
        return cls(**_llama2(4096, 11_008, 32, 32, 32))

    @classmethod
    def llama2_13b(cls) -> Self:
        """Llama 2 13B."""
        return cls(**_llama2(5120, 13_824, 40, 40, 40))

    @classmethod
    def llama2_70b(cls) -> Self:
        """Llama 2 70B."""
        return cls(**_llama2(8192, 28_672, 80, 64, 8))

    @classmethod
    def tinyllama_1_1b(cls) -> Self:
        """TinyLlama 1.1B."""
        return cls(**_llama2(2048, 5632, 22, 32, 4, context=2048))

    @classmethod
    def llama3_8b(cls) -> Self:
        """Llama 3 8B."""
        return cls(**_llama3(4096, 14_336, 32, 32, 8))

    @classmethod
    def llama3_1_8b(cls) -> Self:
        """Llama 3.1 8B."""
        return cls(**_llama3(4096, 14_336, 32, 32, 8, stretch=8.0))

    @classmethod
    def llama3_2_1b(cls) -> Self:
        """Llama 3.2 1B."""
        return cls(**_llama3(2048, 8192, 16, 32, 8, stretch=32.0), tie_embeddings=True)

    @classmethod
    def llama3_2_3b(cls) -> Self:
        """Llama 3.2 3B."""
        return cls(**_llama3(3072, 8192, 28, 24, 8, stretch=32.0), tie_embeddings=True)

    @classmethod
    def mistral_7b(cls) -> Self:
        """Mistral 7B v0.1."""
        return cls(**_llama2(4096, 14_336, 32, 32, 8, context=32_768), sliding_window=4096)

    @classmethod
    def qwen2_5_0_5b(cls) -> Self:
        """Qwen2.5 0.5B."""
        return cls(**_qwen(896, 4864, 24, 14, 2), attention_bias=True, max_positions=32_768)

    @classmethod
    def qwen2_5_1_5b(cls) -> Self:
        """Qwen2.5 1.5B."""
        return cls(**_qwen(1536, 8960, 28, 12, 2), attention_bias=True, max_positions=32_768)

    @classmethod
    def qwen2_5_3b(cls) -> Self:
        """Qwen2.5 3B."""
        return cls(**_qwen(2048, 11_008, 36, 16, 2), attention_bias=True, max_positions=32_768)

    @classmethod
    def qwen3_0_6b(cls) -> Self:
        """Qwen3 0.6B."""
        return cls(**_qwen(1024, 3072, 28, 16, 8, 128), qk_norm=True, max_positions=40_960)

    @classmethod
    def qwen3_1_7b(cls) -> Self:
        """Qwen3 1.7B."""
        return cls(**_qwen(2048, 6144, 28, 16, 8, 128), qk_norm=True, max_positions=40_960)

    @classmethod
    def qwen3_4b(cls) -> Self:
        """Qwen3 4B."""
        return cls(**_qwen(2560, 9728, 36, 32, 8, 128), qk_norm=True, max_positions=40_960)

    @classmethod
    def smollm2_135m(cls) -> Self:
        """SmolLM2 135M."""
        return cls(**_smollm2(576, 1536, 30, 9, 3), rope_theta=1e5, initializer_range=1 / 24)

    @classmethod
    def smollm2_360m(cls) -> Self:
        """SmolLM2 360M."""
        return cls(**_smollm2(960, 2560, 32, 15, 5), rope_theta=1e5)

    @classmethod
    def smollm2_1_7b(cls) -> Self:
        """SmolLM2 1.7B."""
        return cls(**_smollm2(2048, 8192, 24, 32, 32), rope_theta=1.3e5)


def _per_head(hidden_size: int, num_heads: int, key: str) -> int:
    """Size of a head where no key tells it."""
    if hidden_size % num_heads:
        raise SpielError(f"{key} {hidden_size} is not a multiple of the number of heads {num_heads}")
    return hidden_size // num_heads


def _decimal(value: float) -> float:
    """The short decimal number that was stored as a float32: 9.99999975e-06 is 1e-05."""
    return float(np.format_float_scientific(np.float32(value)))


def _hf_head_dim(keys: Keys, model_type: str, hidden_size: int, num_heads: int) -> int:
    if model_type == "qwen3" or keys.has("head_dim"):
        return keys.integer("head_dim", 128)
    return _per_head(hidden_size, num_heads, "hidden_size")


def _hf_window(keys: Keys, model_type: str, num_layers: int) -> tuple[int | None, tuple[bool, ...] | None]:
    """``sliding_window`` and ``sliding_layers`` by the rules of each Hugging Face model."""
    if model_type == "llama":
        return None, None
    # null is no window; an absent key is the default
    window = keys.integer("sliding_window", None if "sliding_window" in keys.values else 4096)
    if model_type == "mistral":
        return window, None
    if not keys.flag("use_sliding_window", False):
        window = None
    types = keys.items("layer_types", None)
    if types is None:
        first = keys.integer("max_window_layers", 28, least=0)
        flags = tuple(window is not None and layer >= first for layer in range(num_layers))
    else:
        for layer_type in types:
            one_of("layer type", layer_type, ("full_attention", "sliding_attention"))
        if len(types) != num_layers:
            raise SpielError(f"layer_types has {len(types)} entries for {num_layers} layers")
        flags = tuple(layer_type == "sliding_attention" for layer_type in types)
        if any(flags) and window is None:
            raise SpielError("layer_types has sliding_attention, but there is no sliding_window")
    if not any(flags):
        return None, None
    return window, None if all(flags) else flags


def _hf_rope(keys: Keys) -> tuple[float, RopeScaling | None]:
    """``rope_theta`` and ``rope_scaling``; the newer ``rope_parameters`` holds both."""
    old = keys.mapping("rope_scaling")
    rope = old if old.values else keys.mapping("rope_parameters")
    if any(isinstance(value, Mapping) for value in rope.values.values()):
        raise SpielError(f"rope parameters that vary by layer are not supported: {sorted(rope.values)}")
    partial = rope.number("partial_rotary_factor", keys.number("partial_rotary_factor", 1.0))
    if partial != 1.0:
        raise SpielError(f"partial_rotary_factor must be 1, got {partial}")
    theta = rope.number("rope_theta", keys.number("rope_theta", 10_000.0, least=1.0), least=1.0)
    kinds = ("default", *get_args(RopeKind))
    try:
        kind = rope.choice("rope_type" if rope.has("rope_type") else "type", kinds, "default")
    except SpielError as error:
        raise SpielError(f"{'rope_scaling' if old.values else 'rope_parameters'}: {error}") from None
    if kind == "default":
        return theta, None
    factor = rope.number("factor")
    if kind == "linear":
        return theta, RopeScaling(kind, factor)
    return theta, RopeScaling(
        kind,
        factor,
        rope.number("low_freq_factor"),
        rope.number("high_freq_factor"),
        rope.integer("original_max_position_embeddings", keys.integer("max_position_embeddings", None)),
    )


def _llama3_scaling(factors: np.ndarray, head_dim: int, theta: float) -> RopeScaling:
    """The llama3 scaling that a GGUF file stores as divisors of the frequencies."""
    if factors.shape != (head_dim // 2,):
        raise SpielError(f"rope_freqs.weight must have shape [{head_dim // 2}], got {list(factors.shape)}")
    scaling = RopeScaling("llama3", _decimal(factors.max()), 1.0, 4.0, 8192)  # all published ones
    plain = inverse_frequencies(head_dim, theta)
    expected = plain / inverse_frequencies(head_dim, theta, scaling)
    if not np.allclose(factors, expected, rtol=1e-3):
        raise SpielError(f"rope_freqs.weight is not the llama3 scaling of factor {scaling.factor}")
    return scaling


def _sizes(
    hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, head_dim: int = 0
) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_layers": layers,
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": head_dim or hidden // heads,
    }


def _llama2(*sizes: int, context: int = 4096) -> dict[str, Any]:
    return {**_sizes(*sizes), "vocab_size": 32_000, "max_positions": context}


def _llama3(*sizes: int, stretch: float | None = None) -> dict[str, Any]:
    return {
        **_sizes(*sizes),
        "vocab_size": 128_256,
        "max_positions": 131_072 if stretch else 8192,
        "rope_theta": 500_000.0,
        "rope_scaling": RopeScaling("llama3", stretch, 1.0, 4.0, 8192) if stretch else None,
    }


def _qwen(*sizes: int) -> dict[str, Any]:
    return {
        **_sizes(*sizes),
        "vocab_size": 151_936,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "tie_embeddings": True,
    }


def _smollm2(*sizes: int) -> dict[str, Any]:
    return {
        **_sizes(*sizes),
        "vocab_size": 49_152,
        "max_positions": 8192,
        "tie_embeddings": True,
    }
