"""The adapter of a run's checkpoint."""

from dataclasses import replace
from functools import singledispatch
from pathlib import Path
from typing import Any

import numpy as np

from spiel_jax.adapters.adapter import Adapter, AdapterError, Origin
from spiel_jax.adapters.base import Base, open_base
from spiel_jax.adapters.hybrid import HybridAdapter
from spiel_jax.adapters.parametrized import Factors, FullAdapter, IA3Adapter, LoraAdapter, LowRank
from spiel_jax.adapters.sparse_adapter import SparseAdapter
from spiel_jax.adapters.stacking import entries_of
from spiel_jax.checkpoint import read_metadata, restore_trained, stored_targets
from spiel_jax.config import unflatten
from spiel_jax.methods.full import FullMethod
from spiel_jax.methods.ia3 import IA3, INPUT_SCALED, IA3Method
from spiel_jax.methods.lora import Lora, LoraMethod
from spiel_jax.methods.method import Method
from spiel_jax.methods.registry import build
from spiel_jax.methods.rosa import RosaMethod
from spiel_jax.methods.sparse import SparseMethod
from spiel_jax.models.config import ModelConfig
from spiel_jax.models.decoder import layer_names
from spiel_jax.models.io.loading import model_shape
from spiel_jax.ops.tree import parameter_name
from spiel_jax.sparse.targets import Target


def adapter_of_run(directory: str | Path, step: int | None = None, *, model: str | None = None) -> Adapter:
    """What a run has trained, as an adapter.

    Args:
        directory: The run's folder (``--workdir``).
        step: Which checkpoint; None for the newest.
        model: Where the base model is, if no longer where the run's configuration says; only its shape is
            read.

    Raises:
        CheckpointError: If there is no such checkpoint.
        NotFoundError: If nothing tells the base model's shape.
        AdapterError: If what the run trains has no adapter.
    """
    metadata = read_metadata(directory, step)
    settings = metadata["config"]
    name = settings["model.source"] if model is None else model
    shape = model_shape(name, settings["model.preset"] if name == "random" else None)
    method = build(unflatten(settings), shape, 1, stored_targets(metadata))  # the length means nothing
    origin = Origin(settings["model.source"], metadata["fingerprint"], settings, metadata["step"])
    return adapter_of(method, restore_trained(directory, metadata["step"]), shape, origin)


def base_of_run(
    directory: str | Path,
    step: int | None = None,
    *,
    model: str | None = None,
    tokenizer: str | None = None,
) -> Base:
    """The base model of a run, as the run held it, with the tokenizer and chat template of the run.

    Args:
        directory: The run's folder (``--workdir``).
        step: Which checkpoint; None for the newest.
        model: Where the base model is, if no longer where the run's configuration says.
        tokenizer: Where the tokenizer is, if no longer there either.

    Raises:
        CheckpointError: If there is no such checkpoint.
        NotFoundError: If there is no base model.
    """
    metadata = read_metadata(directory, step)
    settings = metadata["config"]
    name = settings["model.source"] if model is None else model
    base = open_base(
        name,
        Origin(settings["model.source"], metadata["fingerprint"], settings),
        preset=settings["model.preset"] if name == "random" else None,
        tokenizer=settings["model.tokenizer"] if tokenizer is None else tokenizer,
    )
    return replace(base, chat_template=metadata.get("chat_template"))


@singledispatch
def adapter_of(method: Method, trained: Any, model: ModelConfig, origin: Origin) -> Adapter:
    """What a method has trained, as an adapter; a function for each class of methods.

    A method of your own has an adapter once ``adapter_of.register`` has told which.

    Args:
        method: The method.
        trained: What ``restore_trained`` reads.
        model: Shape of the model.
        origin: Of the adapter.

    Raises:
        AdapterError: If nothing is registered for it.
    """
    del trained, model, origin
    raise AdapterError(f"what {type(method).__name__} trains has no adapter: see adapter_of.register")


@adapter_of.register
def _(method: SparseMethod, trained: Any, model: ModelConfig, origin: Origin) -> Adapter:
    del method
    return SparseAdapter(entries_of(trained, model), origin)


@adapter_of.register
def _(method: LoraMethod, trained: Any, model: ModelConfig, origin: Origin) -> Adapter:
    assert isinstance(method.kind, Lora)
    return _lora_adapter(method.kind, trained, model, origin)


@adapter_of.register
def _(method: RosaMethod, trained: Any, model: ModelConfig, origin: Origin) -> Adapter:
    sparse = SparseAdapter(entries_of(method.deltas(trained), model), origin)
    return HybridAdapter(sparse, _lora_adapter(method.low_rank, trained["low_rank"], model, origin))


def _lora_adapter(kind: Lora, trained: Any, model: ModelConfig, origin: Origin) -> LoraAdapter:
    matrices = {}
    for name, target in kind.targets.items():
        a, b = (np.asarray(trained[name][f"lora_{part}"]) for part in "AB")
        for number, weight in enumerate(_weights(name, target, model)):
            matrices[weight] = LowRank(a[number], b[number], float(kind.alpha))
    return LoraAdapter(matrices, kind.rslora, origin)


@adapter_of.register
def _(method: IA3Method, trained: Any, model: ModelConfig, origin: Origin) -> Adapter:
    kind, factors = method.kind, {}
    assert isinstance(kind, IA3)
    for name, target in kind.targets.items():
        values, inputs = np.asarray(trained[name]), parameter_name(name) in INPUT_SCALED
        for number, weight in enumerate(_weights(name, target, model)):
            factors[weight] = Factors(values[number], inputs, target.shape)
    return IA3Adapter(factors, origin)


@adapter_of.register
def _(method: FullMethod, trained: Any, model: ModelConfig, origin: Origin) -> Adapter:
    del method
    return FullAdapter(trained, model, origin)


def _weights(target: str, stacked: Target, model: ModelConfig) -> list[str]:
    """Hugging Face names of the weights of a target, layer by layer."""
    names = layer_names(parameter_name(target), model.num_layers)
    return names if stacked.layers is None else [names[layer] for layer in stacked.layers]
