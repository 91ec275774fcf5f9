"""The loss of a batch through the model."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from spiel_jax.models.config import ModelConfig
from spiel_jax.models.decoder import Remat, bind
from spiel_jax.models.fused_attention import AttentionKind
from spiel_jax.models.layers import AdaptedLinear
from spiel_jax.ops.cross_entropy import next_token_loss

Params = dict[str, Any]
"""Parameter name to array, or to a stored weight (see ``models.storage``)."""
TokenBatch = Mapping[str, jax.Array]
"""Arrays [B, S]: tokens, targets, positions, segment_ids (int32), weights (float32)."""


@dataclass(frozen=True)
class Objective:
    """Weighted next-token loss of a model.

    Attributes:
        config: Shape of the model.
        remat: What the backward pass finds stored of a layer: "none", "dots" or "full".
        loss_chunk: Tokens per chunk of the head's logits.
        attention: What computes attention, see ``models.fused_attention``.
    """

    config: ModelConfig
    remat: Remat = "full"
    loss_chunk: int = 512
    attention: AttentionKind = "xla"

    @classmethod
    def from_config(cls, config: Any, model: ModelConfig) -> "Objective":
        """As a run's configuration asks for it."""
        return cls(model, config.model.remat, config.model.loss_chunk, config.model.attention)

    def __call__(
        self,
        params: Params,
        batch: TokenBatch,
        adapters: Mapping[str, AdaptedLinear] | None = None,
        *,
        frozen: bool = False,
    ) -> jax.Array:
        """Sum over supervised tokens of their loss, a float32 scalar.

        Args:
            params: The model's parameters.
            batch: See ``TokenBatch``.
            adapters: See ``CausalLM.hidden``.
            frozen: Whether no gradient of ``params`` is wanted.
        """
        model = bind(self.config, params)
        with jax.named_scope("layers"):  # of the backward pass: transpose(jvp(layers))
            hidden, _ = model.hidden(
                batch["tokens"],
                positions=batch["positions"],
                segment_ids=batch["segment_ids"],
                adapters=adapters,
                remat=self.remat,
                frozen=frozen,
                attention=self.attention,
            )
        chunk = min(self.loss_chunk, batch["tokens"].size)
        with jax.named_scope("head_loss"):
            return next_token_loss(hidden, model.head, batch["labels"], batch["weights"], chunk)


def supervised(batch: TokenBatch) -> jax.Array:
    """Total weight of a batch's supervised tokens, at least 1 so that it can be divided by."""
    return jnp.maximum(jnp.sum(batch["weights"]), 1.0)
