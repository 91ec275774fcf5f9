"""A model that somebody names with an adapter in it, ready to be used."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from spiel_jax.adapters.base import check_fingerprint, open_base
from spiel_jax.adapters.interchange import read_adapter
from spiel_jax.models.config import ModelConfig
from spiel_jax.models.io.fingerprint import fingerprint
from spiel_jax.models.io.loading import model_shape
from spiel_jax.ops.stored import is_writable


@dataclass(frozen=True)
class AdaptedModel:
    """A base model with an adapter merged into it.

    Attributes:
        config: The model's shape.
        params: The parameters, merged.
        tokenizer: The base model's.
        step: Optimizer steps that the adapter was trained; None if unknown.
    """

    config: ModelConfig
    params: dict[str, Any]
    tokenizer: Any
    step: int | None


def load_adapter(
    path: str | Path, model: str, *, tokenizer: str | None = None, check: bool = True
) -> AdaptedModel:
    """Loads a model and merges an adapter into it, in place: one copy of the model is held.

    The base is held in the dtype, and quantised, as the adapter says that it was trained; one that says
    nothing is put on bfloat16 weights.

    Args:
        path: See ``read_adapter``.
        model: The base model, see ``open_model``.
        tokenizer: Another source that the tokenizer comes from.
        check: Whether it must be the one the adapter was trained on, by its fingerprint, where the adapter
            has one.

    Raises:
        NotFoundError: If the one or the other is not there.
        AdapterError: If the adapter is damaged, or of another base model.
        SpielError: If the base model cannot be used.
    """
    adapter = read_adapter(path, model_shape(model))
    opened = open_base(model, adapter.origin, tokenizer=tokenizer)
    params = opened.source.load(opened.dtype, seed=opened.seed, storage=opened.kind)
    if check and adapter.origin.fingerprint:
        check_fingerprint(adapter.origin.fingerprint, fingerprint(params), str(path), model)
    changed = adapter.parameters(opened.config).keys()
    changed |= {name.removesuffix("weight") + "bias" for name in changed}
    before = {name: params[name] for name in changed & params.keys()}
    in_place = all(map(is_writable, before.values()))
    merge = jax.jit(lambda params: adapter.merge(params, opened.config), donate_argnums=0 if in_place else ())
    return AdaptedModel(opened.config, params | merge(before), opened.tokenizer(), adapter.origin.step)
