"""Names that checkpoints give to the tensors of a model besides its own.

What saved a model may have been around it: a compiler, a data-parallel wrapper, a model of images and text
that has it as a part; or it was the decoder without its head. The weights are the same.
"""

import re
from collections.abc import Iterable

from spiel_jax.errors import SpielError
from spiel_jax.models.config_keys import shown

# Wrappers that put a segment before or among the others
_SEGMENTS = re.compile(r"(?:(?<=\.)|^)(?:_orig_mod|module|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# Prefixes, and what a name has in their place; in this order
_PREFIXES = (
    (re.compile(r"^(?:model\.)?language_model\.(?=(?:model|lm_head)\.)"), ""),
    (re.compile(r"^(?:model\.)?language_model\."), "model."),
    (re.compile(r"^model\.(?=(?:model|lm_head)\.)"), ""),
    (re.compile(r"^(?=(?:embed_tokens|layers|norm|rotary_emb)\.)"), "model."),
)
_ADAPTED = re.compile(r"(?:^|\.)(?:base_model\.model|base_layer|lora_\w+|ia3_l|modules_to_save)\.")


def plain_name(name: str) -> str:
    """The model's own name of a tensor.

    >>> plain_name("_orig_mod.model.norm.weight"), plain_name("layers.0.mlp.up_proj.weight")
    ('model.norm.weight', 'model.layers.0.mlp.up_proj.weight')
    """
    name = _SEGMENTS.sub("", name)
    for prefix, own in _PREFIXES:
        name = prefix.sub(own, name)
    return name


def plain_names(source: str, names: Iterable[str]) -> dict[str, str]:
    """The name in the checkpoint of each tensor, by the model's own name of it.

    Args:
        source: Path, for the message.
        names: As they are in the checkpoint.

    Raises:
        SpielError: If adapters are among the weights, or two tensors have one name.
    """
    found: dict[str, str] = {}
    for name in names:
        if _ADAPTED.search(name):
            raise SpielError(
                f"{source} is a PEFT model with adapters that are not merged ({shown(name)}): give its base "
                "model, or merge them first, by PEFT's merge_and_unload() and save_pretrained()"
            )
        other = found.setdefault(plain_name(name), name)
        if other != name:
            raise SpielError(f"{source} holds one tensor twice: as {shown(other)} and as {shown(name)}")
    return found
