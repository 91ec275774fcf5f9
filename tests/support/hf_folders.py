"""Folders of small models as Hugging Face writes them, and changes to their files."""

import json

import jax.numpy as jnp
import torch
import transformers
from safetensors.numpy import load_file, save_file

from spiel_jax.models.io.loading import open_model

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
FAMILIES = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
}
UP = "model.layers.1.mlp.up_proj.weight"


def save(folder, family="llama", *, dtype=torch.float32, shard_size="1GB", **options):
    """A random model of Hugging Face's in a folder, and its tensors."""
    config_class, model_class = FAMILIES[family]
    torch.manual_seed(0)
    model = model_class(config_class(**SIZES, **options)).to(dtype)
    for value in model.parameters():
        torch.nn.init.normal_(value)  # norms and biases too
    model.save_pretrained(folder, max_shard_size=shard_size)
    return {name: value.detach() for name, value in model.state_dict().items()}


def load(source, dtype=jnp.float32, **options):
    return open_model(str(source)).load(dtype, progress=False, **options)


def change(folder, edit):
    """Rewrite a folder's model.safetensors."""
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def change_json(path, edit):
    value = json.loads(path.read_text())
    edit(value)
    path.write_text(json.dumps(value))
