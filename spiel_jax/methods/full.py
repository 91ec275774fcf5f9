"""Full fine-tuning: the baseline that trains every weight."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from spiel_jax.losses.next_token import Objective, Params, TokenBatch
from spiel_jax.methods.configured import OF_SPARSE, configured_adamw
from spiel_jax.methods.method import Method, Metrics, TrainState, optimizer_step
from spiel_jax.models.config import ModelConfig
from spiel_jax.optim.schedules import Phase
from spiel_jax.sparse.targets import Target


@dataclass(frozen=True)
class FullMethod(Method):
    """Full fine-tuning: every parameter is trained, in float32, and cast to the base dtype for use.

    Attributes:
        objective: The loss.
        tx: Any Optax optimizer.
        dtype: Dtype of the parameters that the model runs with.
    """

    objective: Objective
    tx: optax.GradientTransformation
    dtype: Any

    keeps_base = False

    @classmethod
    def unused(cls, config: Any) -> Iterable[str]:
        """See ``Method``."""
        del config
        return (*OF_SPARSE, "lora.*", "targets.rules")

    @classmethod
    def from_config(
        cls, config: Any, model: ModelConfig, steps: int, targets: Mapping[str, Target] | None = None
    ) -> "FullMethod":
        """See ``Method``."""
        del targets
        tx = configured_adamw(config, steps)
        return cls(Objective.from_config(config, model), tx, jnp.dtype(config.model.dtype))

    def init(self, params: Params) -> TrainState:
        """A float32 copy of the parameters."""
        trainable = {name: param.astype(jnp.float32) for name, param in params.items()}
        return TrainState({}, {}, trainable, self.tx.init(trainable))

    def attach(self, params: Params, trainable: Any, opt_state: Any) -> TrainState:
        """See ``Method``; the pretrained parameters are no longer needed."""
        del params
        return TrainState({}, {}, trainable, opt_state)

    def tuned(self, state: TrainState) -> Params:
        """See ``Method``: the trained parameters in the dtype that the model runs with."""
        return self._used(state.trainable)

    def pretrained(self, state: TrainState) -> None:
        """See ``Method``."""
        del state

    def _used(self, trainable: Params) -> Params:
        return {name: param.astype(self.dtype) for name, param in trainable.items()}

    def step(
        self, state: TrainState, batch: TokenBatch, *, phase: Phase, reselect: bool
    ) -> tuple[TrainState, Metrics]:
        """See ``Method``; phases mean nothing here."""
        del phase, reselect

        def loss(trainable: Params, micro: TokenBatch) -> jax.Array:
            return self.objective(self._used(trainable), micro)

        return optimizer_step(self.tx, loss, state, batch)

    def evaluate(self, state: TrainState, batch: TokenBatch) -> tuple[jax.Array, jax.Array]:
        """See ``Method``."""
        return self.objective(self._used(state.trainable), batch, frozen=True), jnp.sum(batch["weights"])

    def changed(self, trained: Any) -> None:
        """See ``Method``."""
        del trained

    def merge(self, params: Params, trained: Params) -> Params:
        """See ``Method``: what was trained, in the dtype that the model runs with."""
        del params
        return self._used(trained)
