"""One table of tensor names: our parameters, Hugging Face checkpoints, GGUF files.

A parameter of the model is one array; inside the blocks it stacks the layers. A checkpoint stores
one tensor per layer. The Hugging Face name is the parameter's with the layer number after
``model.layers.`` (``layer_names``), so the table needs only two columns.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from spiel_jax.errors import SpielError
from spiel_jax.models.config import ModelConfig
from spiel_jax.models.decoder import LAYERS, abstract_params
from spiel_jax.models.io.messages import bullets

HEAD = "lm_head.weight"
"""The language-model head, in Hugging Face checkpoints."""

GGUF = {  # {} is the layer
    "model.embed_tokens.weight": "token_embd.weight",
    "model.layers.input_layernorm.weight": "blk.{}.attn_norm.weight",
    "model.layers.self_attn.q_proj.weight": "blk.{}.attn_q.weight",
    "model.layers.self_attn.q_proj.bias": "blk.{}.attn_q.bias",
    "model.layers.self_attn.k_proj.weight": "blk.{}.attn_k.weight",
    "model.layers.self_attn.k_proj.bias": "blk.{}.attn_k.bias",
    "model.layers.self_attn.v_proj.weight": "blk.{}.attn_v.weight",
    "model.layers.self_attn.v_proj.bias": "blk.{}.attn_v.bias",
    "model.layers.self_attn.o_proj.weight": "blk.{}.attn_output.weight",
    "model.layers.self_attn.o_proj.bias": "blk.{}.attn_output.bias",
    "model.layers.self_attn.q_norm.weight": "blk.{}.attn_q_norm.weight",
    "model.layers.self_attn.k_norm.weight": "blk.{}.attn_k_norm.weight",
    "model.layers.post_attention_layernorm.weight": "blk.{}.ffn_norm.weight",
    "model.layers.mlp.gate_proj.weight": "blk.{}.ffn_gate.weight",
    "model.layers.mlp.up_proj.weight": "blk.{}.ffn_up.weight",
    "model.layers.mlp.down_proj.weight": "blk.{}.ffn_down.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}

# Tensors that the config determines: inverse frequencies in old Hugging Face checkpoints, and
# llama.cpp's llama3 rope factors, which become the config's rope scaling.
_DETERMINED = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq|rope_freqs\.weight")


def gguf_names(parameter: str, num_layers: int) -> list[str]:
    """Names in a GGUF file of a parameter, layer by layer: the counterpart of ``layer_names``.

    >>> gguf_names("model.layers.mlp.up_proj.weight", 2)
    ['blk.0.ffn_up.weight', 'blk.1.ffn_up.weight']
    """
    name = GGUF[parameter]
    return [name.format(layer) for layer in range(num_layers if "{}" in name else 1)]


@dataclass(frozen=True)
class Placement:
    """Where a tensor of a checkpoint goes.

    Attributes:
        parameter: The parameter's name.
        layer: Its index on the parameter's leading axis; None if the parameter is not stacked.
        shape: The shape the tensor must have, in Hugging Face orientation.
    """

    parameter: str
    layer: int | None
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Stored:
    """What a checkpoint's header says of a tensor.

    Attributes:
        shape: In Hugging Face orientation.
        dtype: The format's own name of the number type.
        floating: Whether the reader can turn it into floating-point numbers.
    """

    shape: tuple[int, ...]
    dtype: str
    floating: bool


_DENSE = {"F64", "F32", "F16", "BF16"}


def quantized_as(tensor: Stored) -> str | None:
    """The format that a tensor of a checkpoint is quantised in; None: it is not."""
    return None if tensor.dtype in _DENSE else tensor.dtype


def expected_tensors(config: ModelConfig, naming: Callable[[str, int], list[str]]) -> dict[str, Placement]:
    """Every tensor a checkpoint must hold, by its name there, one parameter after another.

    Args:
        config: The model's shape.
        naming: ``layer_names`` for Hugging Face checkpoints, ``gguf_names`` for GGUF files.
    """
    slots = {}
    for parameter, spec in abstract_params(config).items():
        stacked = parameter.startswith(LAYERS)
        shape = spec.shape[1:] if stacked else spec.shape
        for layer, name in enumerate(naming(parameter, config.num_layers)):
            slots[name] = Placement(parameter, layer if stacked else None, shape)
    return slots


def check_tensors(
    source: str,
    expected: Mapping[str, Placement],
    stored: Mapping[str, Stored],
    *,
    optional: Iterable[str] = (),
) -> None:
    """Compare what a checkpoint holds with what the model needs; reads no weights.

    Args:
        source: Path, for the message.
        expected: From ``expected_tensors``.
        stored: From the checkpoint's header.
        optional: Further names that may be present.

    Raises:
        SpielError: Naming every tensor that is missing, unknown, of another shape, or not of a
            floating-point type.
    """
    problems = [f"missing: {name}" for name in expected if name not in stored]
    if problems == [f"missing: {HEAD}"]:
        problems[0] += ' (if the head is the embedding, "tie_word_embeddings" has to be true in config.json)'
    for name, tensor in stored.items():
        if name not in expected:
            if name not in optional and not _DETERMINED.fullmatch(name):
                problems.append(f"unknown: {name} {list(tensor.shape)}")
        elif tensor.shape != expected[name].shape:
            problems.append(f"mis-shaped: {name} {list(tensor.shape)}, expected {list(expected[name].shape)}")
        elif not tensor.floating:
            problems.append(f"not floating point: {name} is {tensor.dtype}")
    if problems:
        raise SpielError(
            f"{source} does not hold the model that its configuration describes:{bullets(problems)}"
        )
