"""Next-token cross entropy whose [tokens, vocabulary] logits are never whole in memory.

The head's product, the loss and their gradients are formed chunk by chunk over tokens. The gradient is
formed in the forward pass, while a chunk's logits are at hand: they are computed once, not again in the
backward pass.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from spiel_jax.products import dot


def _chunks(x: jax.Array, chunk: int) -> jax.Array:
    """[T, ...] padded with zeros to [T / chunk, chunk, ...]."""
    padding = [(0, -x.shape[0] % chunk)] + [(0, 0)] * (x.ndim - 1)
    return jnp.pad(x, padding).reshape(-1, chunk, *x.shape[1:])


def _logits(hidden: jax.Array, head: jax.Array) -> jax.Array:
    return dot(hidden.astype(head.dtype), head, (-1, 1))  # [chunk, V]


def _chunk_loss(logits: jax.Array, targets: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Weighted loss of one chunk, and the log of its normalisers [chunk]."""
    normaliser = jax.nn.logsumexp(logits, axis=-1)
    chosen = jnp.take_along_axis(logits, targets[:, None], axis=-1, mode="clip")[:, 0]
    return jnp.sum(weights * (normaliser - chosen)), normaliser


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def next_token_loss(
    hidden: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array, chunk: int
) -> jax.Array:
    """Sum over tokens of ``weight * -log softmax(hidden @ head.T)[target]``.

    Args:
        hidden: [..., D] final hidden states.
        head: [V, D] head of the model.
        targets: [...] int32, the next tokens; any number where the weight is 0.
        weights: [...] float32, 0 where a token is not supervised. Not differentiated.
        chunk: Tokens per chunk; the logits take chunk * V float32 at a time.

    Returns:
        Scalar, float32 (float64 for float64 hidden states).
    """
    parts = (x.reshape(-1, *x.shape[targets.ndim :]) for x in (hidden, targets, weights))

    def one(total: jax.Array, part: tuple) -> tuple[jax.Array, None]:
        hidden, targets, weights = part
        return total + _chunk_loss(_logits(hidden, head), targets, weights)[0], None

    zero = jnp.zeros((), jnp.promote_types(hidden.dtype, jnp.float32))
    return lax.scan(one, zero, tuple(_chunks(x, chunk) for x in parts))[0]


def _forward(hidden: Any, head: Any, targets: Any, weights: Any, chunk: int) -> tuple[jax.Array, tuple]:
    with_head = head.perturbed  # a frozen head needs no gradient of its own
    hidden, head, targets, weights = (x.value for x in (hidden, head, targets, weights))
    shape = hidden.shape
    parts = tuple(_chunks(x.reshape(-1, *x.shape[targets.ndim :]), chunk) for x in (hidden, targets, weights))
    dtype = jnp.promote_types(hidden.dtype, jnp.float32)

    def one(carry: tuple, part: tuple) -> tuple[tuple, jax.Array]:
        total, head_gradient = carry
        hidden, targets, weights = part
        logits = _logits(hidden, head)
        loss, normaliser = _chunk_loss(logits, targets, weights)
        # a comparison in the same pass over the logits; a scatter would be another
        hit = targets[:, None] == lax.broadcasted_iota(targets.dtype, logits.shape, 1)
        error = weights[:, None] * (jnp.exp(logits - normaliser[:, None]) - hit)
        error = error.astype(head.dtype)  # [chunk, V]
        if with_head:
            head_gradient = head_gradient + dot(error, hidden.astype(head.dtype), (0, 0))
        return (total + loss, head_gradient), dot(error, head, (-1, 0)).astype(hidden.dtype)

    zeros = jnp.zeros(head.shape if with_head else (), dtype)
    (total, head_gradient), hidden_gradient = lax.scan(one, (jnp.zeros((), dtype), zeros), parts)
    tokens = targets.size
    hidden_gradient = hidden_gradient.reshape(-1, shape[-1])[:tokens].reshape(shape)
    return total, (hidden_gradient, head_gradient.astype(head.dtype) if with_head else None)


def _backward(chunk: int, residuals: tuple, cotangent: Any) -> tuple:
    del chunk
    hidden_gradient, head_gradient = residuals
    scaled = (hidden_gradient * cotangent).astype(hidden_gradient.dtype)
    if head_gradient is not None:
        head_gradient = (head_gradient * cotangent).astype(head_gradient.dtype)
    return scaled, head_gradient, None, None


next_token_loss.defvjp(_forward, _backward, symbolic_zeros=True)
