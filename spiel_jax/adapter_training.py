"""Training of adapters on frozen weights, and the kinds that a configuration can name."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from spiel_jax.adapters import AdapterKind, adapted
from spiel_jax.ia3 import IA3
from spiel_jax.lora import Lora
from spiel_jax.models.config import ModelConfig
from spiel_jax.models.decoder import unpacked
from spiel_jax.objective import Batch, Objective, Params
from spiel_jax.schedules import Phase
from spiel_jax.training import Metrics, TrainState, optimizer_step


def adapter_kind(settings: Mapping[str, Any], model: ModelConfig) -> AdapterKind | None:
    """The kind of adapter that a run trains; None if its method trains none.

    Args:
        settings: The run's configuration, dotted key to value; that of a checkpoint too.
        model: Shape of the model.

    Raises:
        ValueError: If a rule matches nothing, or a number is out of range.
    """
    rules = settings["targets.rules"]
    if settings["method"] == "lora":
        names = ("rank", "alpha", "dropout", "rslora")
        return Lora(adapted(model, rules), **{name: settings[f"lora.{name}"] for name in names})
    if settings["method"] == "ia3":
        return IA3.matching(model, rules)
    return None


class AdapterState(NamedTuple):
    """What is checkpointed of an adapter's training beside its parameters."""

    step: jax.Array  # [] int32, steps so far, skipped ones included: the dropout's place in its sequence
    optimizer: Any


@dataclass(frozen=True)
class AdapterTraining:
    """Trains adapters of one kind; the model's own parameters stay as they are.

    Attributes:
        objective: The loss.
        tx: Any Optax optimizer.
        kind: The adapters.
        seed: Of their initial parameters and their dropout.
    """

    objective: Objective
    tx: optax.GradientTransformation
    kind: AdapterKind
    seed: int = 0

    def _keys(self) -> jax.Array:
        """[2]: the keys of the initial parameters and of the dropout."""
        return jax.random.split(jax.random.key(self.seed))

    def init(self, params: Params) -> TrainState:
        """See ``Training``."""
        trainable = self.kind.init(self._keys()[0])
        state = AdapterState(jnp.zeros((), jnp.int32), self.tx.init(trainable))
        return self.attach(params, trainable, state)

    def attach(self, params: Params, trainable: Any, opt_state: Any) -> TrainState:
        """See ``Training``."""
        return TrainState(params, {}, trainable, opt_state)

    def tuned(self, state: TrainState) -> Params:
        """See ``Training``: the adapters merged into the weights."""
        return self.kind.merge(unpacked(state.params), state.trainable)

    def pretrained(self, state: TrainState) -> Params:
        """See ``Training``."""
        return state.params

    def step(
        self, state: TrainState, batch: Batch, *, phase: Phase, reselect: bool
    ) -> tuple[TrainState, Metrics]:
        """See ``Training``; phases mean nothing here. Each micro-batch has a dropout of its own."""
        del phase, reselect
        step, optimizer = state.opt_state
        keys = jax.random.split(jax.random.fold_in(self._keys()[1], step), batch["tokens"].shape[0])

        def loss(trainable: Any, micro: Batch) -> jax.Array:
            params, adapters = self.kind.attach(state.params, trainable, micro["dropout"])
            frozen = params is state.params  # otherwise some of them depend on what is trained
            return self.objective(params, micro, adapters, frozen=frozen)

        state = replace(state, opt_state=optimizer)
        state, metrics = optimizer_step(self.tx, loss, state, {**batch, "dropout": keys})
        return replace(state, opt_state=AdapterState(step + 1, state.opt_state)), metrics

    def evaluate(self, state: TrainState, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """See ``Training``; without dropout."""
        params, adapters = self.kind.attach(state.params, state.trainable, None)
        return self.objective(params, batch, adapters, frozen=True), jnp.sum(batch["weights"])
