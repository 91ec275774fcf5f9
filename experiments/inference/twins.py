"""A model of ours in transformers: the same weights."""

from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from spiel_jax.models import layer_names


def reference(config: Any, params: Any) -> Any:
    """The model in transformers."""
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            rms_norm_eps=config.rms_norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            tie_word_embeddings=config.tie_embeddings,
            max_position_embeddings=config.max_positions,
        )
    ).eval()
    state = model.state_dict()
    for name, param in params.items():
        names, array = layer_names(name, config.num_layers), torch.tensor(np.asarray(param))
        for own, part in zip(names, array if len(names) > 1 else [array], strict=True):
            state[own].copy_(part)
    return model
