"""A model that somebody names and adapters for it, ready to be used one after the other."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax

from spiel_jax.adapters.adapter import Adapter, AdapterError
from spiel_jax.adapters.base import Base, check_fingerprint, open_base
from spiel_jax.adapters.hot_swap import HotSwap
from spiel_jax.adapters.interchange import read_adapter
from spiel_jax.losses.next_token import Params
from spiel_jax.models.config import ModelConfig
from spiel_jax.models.io.fingerprint import fingerprint
from spiel_jax.models.io.loading import model_shape
from spiel_jax.ops.stored import is_writable


@dataclass(frozen=True)
class AdaptedModel:
    """A base model and adapters for it.

    Attributes:
        config: The model's shape.
        tokenizer: The base model's.
        weights: Its ``use(name)`` gives the parameters with that adapter, ``use(None)`` the pretrained ones.
            Those that it gave before must not be used any more.
    """

    config: ModelConfig
    tokenizer: Any
    weights: "HotSwap | Merging | Merged"


class Merging:
    """Adapters of any kind, merged anew into the weights that change each time that one is used."""

    def __init__(self, params: Params, model: ModelConfig, adapters: Mapping[str, Adapter]):
        self._params, self._model, self._adapters = params, model, dict(adapters)

    def use(self, name: str | None) -> Params:
        """The parameters with an adapter; None for the pretrained ones."""
        if name is None:
            return self._params
        before = _changed(self._params, self._adapters[name], self._model)
        return self._params | jax.jit(partial(self._adapters[name].merge, model=self._model))(before)


class Merged:
    """One adapter of any kind, merged once, in place where the weights can be written."""

    def __init__(self, params: Params, model: ModelConfig, adapter: Adapter):
        before = _changed(params, adapter, model)
        in_place = all(map(is_writable, before.values()))
        merge = jax.jit(partial(adapter.merge, model=model), donate_argnums=0 if in_place else ())
        self._params = params | merge(before)

    def use(self, name: str | None) -> Params:
        """The parameters with the adapter."""
        assert name is not None
        return self._params


def load_adapters(
    paths: Sequence[str | Path],
    model: str,
    *,
    tokenizer: str | None = None,
    check: bool = True,
    keep_base: bool = False,
    in_place: bool = True,
) -> AdaptedModel:
    """Loads a model and adapters for it; one copy of the model is held where they are sparse.

    The base is held in the dtype, and quantised, as the adapters say that they were trained; where they say
    nothing, on bfloat16 weights.

    Args:
        paths: See ``read_adapter``; they are the adapters' names.
        model: The base model, see ``open_model``.
        tokenizer: Another source that the tokenizer comes from.
        check: Whether it must be the one that the adapters were trained on, by its fingerprint, where they
            have one.
        keep_base: Whether the pretrained weights are asked for too.
        in_place: Whether what ``use`` gave may be lost with its next call. Otherwise weights that change are
            copied, and the base can be held beside a tuned model.

    Raises:
        NotFoundError: If the one or the other is not there.
        AdapterError: If an adapter is damaged, or of another base model, or they were trained on weights that
            were held differently.
        SpielError: If the base model cannot be used.
    """
    shape = model_shape(model)
    adapters = {str(path): read_adapter(path, shape) for path in paths}
    opened = _opened(adapters, model, tokenizer)
    params = opened.source.load(opened.dtype, seed=opened.seed, storage=opened.kind)
    found = (
        fingerprint(params) if check and any(one.origin.fingerprint for one in adapters.values()) else None
    )
    for name, adapter in adapters.items():
        check_fingerprint(adapter.origin.fingerprint if check else {}, found or {}, name, model)
    return AdaptedModel(
        opened.config, opened.tokenizer(), _weights(params, opened.config, adapters, keep_base, in_place)
    )


def _opened(adapters: Mapping[str, Adapter], model: str, tokenizer: str | None) -> Base:
    held = {name: (one.origin.dtype, one.origin.quantization) for name, one in adapters.items()}
    first, *others = held
    for name in others:
        if held[name] != held[first]:
            raise AdapterError(
                f"{first} was trained on weights held as {' '.join(held[first])}, {name} on "
                f"{' '.join(held[name])} (dtype, quantization): use them apart"
            )
    return open_base(model, adapters[first].origin, tokenizer=tokenizer)


def _weights(
    params: Params, model: ModelConfig, adapters: Mapping[str, Adapter], keep_base: bool, in_place: bool
) -> "HotSwap | Merging | Merged":
    changed = [weight for one in adapters.values() for weight in _changed(params, one, model).values()]
    sparse = all(one.kind == "sparse" for one in adapters.values())
    if in_place and sparse and all(map(is_writable, changed)):
        swap = HotSwap(params, model)
        for name, adapter in adapters.items():
            swap.add(name, adapter)
        return swap
    if len(adapters) > 1 or keep_base:
        return Merging(params, model, adapters)
    (adapter,) = adapters.values()
    return Merged(params, model, adapter)


def _changed(params: Params, adapter: Adapter, model: ModelConfig) -> Params:
    """The parameters that an adapter changes, biases among them."""
    names = adapter.parameters(model).keys()
    names |= {name.removesuffix("weight") + "bias" for name in names}
    return {name: params[name] for name in names & params.keys()}
