"""A run that starts from an adapter: ``config.init_from``."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import singledispatch
from typing import Any

import numpy as np

from spiel_jax.adapters.adapter import Adapter, AdapterError
from spiel_jax.adapters.base import check_fingerprint
from spiel_jax.adapters.interchange import read_adapter
from spiel_jax.adapters.parametrized import IA3Adapter, LoraAdapter
from spiel_jax.adapters.sparse_adapter import SparseAdapter
from spiel_jax.adapters.stacking import targets_of, trained_deltas
from spiel_jax.config import Config
from spiel_jax.methods.configured import configured_grid
from spiel_jax.methods.ia3 import IA3, INPUT_SCALED, IA3Method
from spiel_jax.methods.lora import Lora, LoraMethod
from spiel_jax.methods.method import Method
from spiel_jax.methods.sparse import SparseMethod
from spiel_jax.models.config import ModelConfig
from spiel_jax.models.decoder import ADAPTED, layer_names
from spiel_jax.ops.tree import parameter_name
from spiel_jax.optim.criteria.criterion import CRITERIA
from spiel_jax.sparse.targets import Target


@dataclass(frozen=True)
class Start:
    """What a run starts from.

    Attributes:
        adapter: The adapter.
        path: Where it was.
        model: Shape of the base model.
        trained: Of a sparse run: target name to ``SparseDelta``, arrays of the host.
        checked: Whether the base model must be the adapter's.
    """

    adapter: Adapter
    path: str
    model: ModelConfig
    trained: Mapping[str, Any] = field(default_factory=dict)
    checked: bool = True

    @property
    def targets(self) -> dict[str, Target] | None:
        """What a sparse run adapts; None for another method, whose configuration says it."""
        return targets_of(self.trained) or None

    def check(self, fingerprint: Mapping[str, str], base: str) -> None:
        """Makes sure that the base model is the adapter's.

        Raises:
            AdapterError: If it is another, and that is not allowed.
        """
        if self.checked:
            check_fingerprint(self.adapter.origin.fingerprint, fingerprint, self.path, base)

    def trainable(self, method: Method) -> Any:
        """What the method's ``begun`` is to be given.

        Raises:
            AdapterError: If the method trains something else.
        """
        return start_of(method, self)


def read_start(config: Config, model: ModelConfig) -> Start | None:
    """What the configuration says that a new run starts from; None: from nothing.

    Args:
        config: Checked, its block grid filled in.
        model: Shape of the base model.

    Raises:
        NotFoundError: If there is no such adapter.
        AdapterError: If it is damaged, does not fit the model, or the method cannot continue it.
    """
    settings = config.init_from
    if settings.adapter is None:
        return None
    adapter = read_adapter(settings.adapter, model)
    start = Start(adapter, settings.adapter, model, checked=not settings.any_base)
    if config.method not in CRITERIA:
        return start
    if not isinstance(adapter, SparseAdapter):
        raise AdapterError(
            f"config.init_from.adapter = {settings.adapter!r} is {adapter.kind}: config.method = "
            f"{config.method!r} continues sparse ones"
        )
    if odd := sorted(adapter.parameters(model).keys() - set(ADAPTED)):
        raise AdapterError(f"{settings.adapter}: {odd[0]} cannot be trained, only the linears of the blocks")
    deltas = trained_deltas(adapter.entries, adapter.parameters(model), model, configured_grid(config, model))
    if settings.what == "positions":
        deltas = {name: delta.with_values(np.zeros_like(delta.values)) for name, delta in deltas.items()}
    return Start(adapter, settings.adapter, model, deltas, not settings.any_base)


@singledispatch
def start_of(method: Method, start: Start) -> Any:
    """What a method's state begins with; a function for each class of methods.

    Raises:
        AdapterError: If the method cannot begin with this adapter.
    """
    raise AdapterError(
        f"config.init_from.adapter = {start.path!r}: {type(method).__name__} cannot start from an adapter; "
        "export it merged, and train from that model"
    )


@start_of.register
def _(method: SparseMethod, start: Start) -> Any:
    del method
    return start.trained


@start_of.register
def _(method: LoraMethod, start: Start) -> Any:
    kind, adapter = method.kind, start.adapter
    assert isinstance(kind, Lora)
    if not isinstance(adapter, LoraAdapter):
        raise AdapterError(f"{start.path} is {adapter.kind}: expected lora")
    _same_weights(kind.targets, start)
    for name, term in adapter.matrices.items():
        if term.rank != kind.rank or adapter.scale(name) != kind.scale:
            raise AdapterError(
                f"{start.path}: {name}: rank {term.rank} and scale {adapter.scale(name):g}, "
                f"config.lora gives {kind.rank} and {kind.scale:g}: set its rank, alpha and rslora to "
                "those of the adapter"
            )

    def stacked(name: str, target: Target) -> dict[str, np.ndarray]:
        terms = [adapter.matrices[one] for one in _weights(name, target, start.model)]
        return {"lora_A": np.stack([t.a for t in terms]), "lora_B": np.stack([t.b for t in terms])}

    return {name: stacked(name, target) for name, target in kind.targets.items()}


@start_of.register
def _(method: IA3Method, start: Start) -> Any:
    kind, adapter = method.kind, start.adapter
    assert isinstance(kind, IA3)
    if not isinstance(adapter, IA3Adapter):
        raise AdapterError(f"{start.path} is {adapter.kind}: expected ia3")
    _same_weights(kind.targets, start)
    found = {}
    for name, target in kind.targets.items():
        factors = [adapter.factors[one] for one in _weights(name, target, start.model)]
        if any(one.inputs != (parameter_name(name) in INPUT_SCALED) for one in factors):
            raise AdapterError(f"{start.path}: {name} is scaled at its other side")
        found[name] = np.stack([one.values for one in factors])
    return found


def _weights(name: str, target: Target, model: ModelConfig) -> list[str]:
    names = layer_names(parameter_name(name), model.num_layers)
    return names if target.layers is None else [names[layer] for layer in target.layers]


def _same_weights(targets: Mapping[str, Target], start: Start) -> None:
    """Raises where the adapter is of other weights than the configuration's rules choose."""
    wanted = {one for name, target in targets.items() for one in _weights(name, target, start.model)}
    if odd := sorted(wanted ^ start.adapter.shapes.keys()):
        who = "config.targets.rules choose" if odd[0] in wanted else "the adapter is of"
        raise AdapterError(f"{start.path}: only {who} {odd[0]}; expected the same weights")
