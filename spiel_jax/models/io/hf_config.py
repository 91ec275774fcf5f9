"""The config.json of a model that came without one: from a GGUF file, or drawn at random."""

from typing import Any

from spiel_jax.errors import SpielError
from spiel_jax.models.config import ModelConfig

_CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}


def hf_config(config: ModelConfig) -> dict[str, Any]:
    """What a Hugging Face ``config.json`` says of a model of this shape: the inverse of ``from_hf``.

    Raises:
        SpielError: If none says it.

    Example:
        >>> hf_config(ModelConfig.qwen3_0_6b())["architectures"]
        ['Qwen3ForCausalLM']
    """
    model_type = _model_type(config)
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if (scaling := config.rope_scaling) is not None:
        rope |= {"rope_type": scaling.kind, "factor": scaling.factor}
        if scaling.kind == "llama3":
            rope |= {
                "low_freq_factor": scaling.low_freq_factor,
                "high_freq_factor": scaling.high_freq_factor,
                "original_max_position_embeddings": scaling.original_max_positions,
            }
    said = {
        "architectures": [_CLASSES[model_type]],
        "model_type": model_type,
        "hidden_act": "silu",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.rms_norm_eps,
        # what transformers 5 reads, and what came before it and vLLM reads too
        "rope_parameters": rope,
        "rope_theta": config.rope_theta,
        "rope_scaling": None if scaling is None else {k: v for k, v in rope.items() if k != "rope_theta"},
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.initializer_range,
    }
    if model_type in ("llama", "qwen3"):
        said |= {"attention_bias": config.attention_bias}
    if model_type == "llama":
        said |= {"mlp_bias": False}
    if model_type != "llama":
        said |= _window(config, model_type)
    if ModelConfig.from_hf(said) != config:
        raise SpielError(f"no config.json of transformers describes this model: {config}")
    return said


def _model_type(config: ModelConfig) -> str:
    if config.qk_norm:
        return "qwen3"
    if config.attention_bias and not config.output_bias:
        return "qwen2"
    return "llama" if config.sliding_window is None else "mistral"


def _window(config: ModelConfig, model_type: str) -> dict[str, Any]:
    if model_type == "mistral":
        return {"sliding_window": config.sliding_window}
    windowed = config.sliding_window is not None
    flags = config.sliding_layers or (windowed,) * config.num_layers
    return {
        "use_sliding_window": windowed,
        "sliding_window": config.sliding_window,
        "layer_types": ["sliding_attention" if flag else "full_attention" for flag in flags],
    }
