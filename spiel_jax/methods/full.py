"""Full fine-tuning: the baseline that trains every weight."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from spiel_jax.losses.next_token import Batch, Objective, Params
from spiel_jax.methods.method import Metrics, TrainState, optimizer_step
from spiel_jax.optim.schedules import Phase


@dataclass(frozen=True)
class DenseTraining:
    """Full fine-tuning: every parameter is trained, in float32, and cast to the base dtype for use.

    Attributes:
        objective: The loss.
        tx: Any Optax optimizer.
        dtype: Dtype of the parameters that the model runs with.
    """

    objective: Objective
    tx: optax.GradientTransformation
    dtype: Any

    def init(self, params: Params) -> TrainState:
        """A float32 copy of the parameters."""
        trainable = {name: param.astype(jnp.float32) for name, param in params.items()}
        return TrainState({}, {}, trainable, self.tx.init(trainable))

    def attach(self, params: Params, trainable: Any, opt_state: Any) -> TrainState:
        """See ``Training``; the pretrained parameters are no longer needed."""
        del params
        return TrainState({}, {}, trainable, opt_state)

    def tuned(self, state: TrainState) -> Params:
        """See ``Training``: the trained parameters in the dtype that the model runs with."""
        return self._used(state.trainable)

    def pretrained(self, state: TrainState) -> None:
        """See ``Training``."""
        del state

    def _used(self, trainable: Params) -> Params:
        return {name: param.astype(self.dtype) for name, param in trainable.items()}

    def step(
        self, state: TrainState, batch: Batch, *, phase: Phase, reselect: bool
    ) -> tuple[TrainState, Metrics]:
        """See ``Training``; phases mean nothing here."""
        del phase, reselect

        def loss(trainable: Params, micro: Batch) -> jax.Array:
            return self.objective(self._used(trainable), micro)

        return optimizer_step(self.tx, loss, state, batch)

    def evaluate(self, state: TrainState, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """See ``Training``."""
        return self.objective(self._used(state.trainable), batch, frozen=True), jnp.sum(batch["weights"])
