"""Next-token cross entropy whose [tokens, vocabulary] logits are never whole in memory.

The head's product, the loss and their gradients are formed chunk by chunk over tokens. The gradient is
formed in the forward pass, while a chunk's logits are at hand: they are computed once, not again in the
backward pass.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from spiel_jax.ops.matmul import dot
from spiel_jax.ops.sharded import BATCH_AXES, axis_size, constrain


def _width(tokens: tuple[int, ...], chunk: int) -> int:
    """How many tokens of each row make up a chunk of about ``chunk`` tokens per device."""
    rows = max(math.prod(tokens[:-1]) // math.prod(map(axis_size, BATCH_AXES)), 1)
    return max(min(chunk // rows, tokens[-1]), 1)


def _chunks(x: jax.Array, axis: int, width: int) -> jax.Array:
    """[*rows, T, ...] padded with zeros to [T / width, *rows, width, ...]; T is the axis ``axis``."""
    padding = [(0, 0)] * x.ndim
    padding[axis] = (0, -x.shape[axis] % width)
    x = jnp.pad(x, padding)
    x = x.reshape(*x.shape[:axis], -1, width, *x.shape[axis + 1 :])
    return jnp.moveaxis(x, axis, 0)


def _logits(hidden: jax.Array, head: jax.Array) -> jax.Array:
    return dot(hidden.astype(head.dtype), head, (-1, 1))  # [*rows, width, V]


def _collected(hidden: jax.Array, head: jax.Array) -> tuple[jax.Array, jax.Array]:
    """On a mesh: the rows spread, and the head collected once for all chunks."""
    if hidden.ndim > 1:
        hidden = constrain(hidden, BATCH_AXES, *[None] * (hidden.ndim - 1))
    return hidden, constrain(head, "tensor", None)


def _hits(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Bool [..., V], true at the target. A comparison fuses with what reads it; a gather would not."""
    return targets[..., None] == lax.broadcasted_iota(targets.dtype, logits.shape, logits.ndim - 1)


def _chunk_loss(logits: jax.Array, targets: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Weighted loss of one chunk, and the log of its normalisers [*rows, width]."""
    normaliser = jax.nn.logsumexp(logits, axis=-1)
    chosen = jnp.sum(jnp.where(_hits(logits, targets), logits, 0), axis=-1)
    return jnp.sum(weights * (normaliser - chosen)), normaliser


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def next_token_loss(
    hidden: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array, chunk: int
) -> jax.Array:
    """Sum over tokens of ``weight * -log softmax(hidden @ head.T)[target]``.

    Args:
        hidden: [..., S, D] final hidden states.
        head: [V, D] head of the model.
        targets: [..., S] int32, the next tokens; any number where the weight is 0.
        weights: [..., S] float32, 0 where a token is not supervised. Not differentiated.
        chunk: Tokens per chunk and device; the logits take chunk * V float32 at a time.

    Returns:
        Scalar, float32 (float64 for float64 hidden states).
    """
    axis, width = targets.ndim - 1, _width(targets.shape, chunk)
    hidden, head = _collected(hidden, head)

    def one(total: jax.Array, part: tuple) -> tuple[jax.Array, None]:
        hidden, targets, weights = part
        return total + _chunk_loss(_logits(hidden, head), targets, weights)[0], None

    zero = jnp.zeros((), jnp.promote_types(hidden.dtype, jnp.float32))
    return lax.scan(one, zero, tuple(_chunks(x, axis, width) for x in (hidden, targets, weights)))[0]


def _forward(hidden: Any, head: Any, targets: Any, weights: Any, chunk: int) -> tuple[jax.Array, tuple]:
    with_head = head.perturbed  # a frozen head needs no gradient of its own
    hidden, head, targets, weights = (x.value for x in (hidden, head, targets, weights))
    axis, width = targets.ndim - 1, _width(targets.shape, chunk)
    shape, dtype = hidden.shape, jnp.promote_types(hidden.dtype, jnp.float32)
    hidden, head = _collected(hidden, head)
    parts = tuple(_chunks(x, axis, width) for x in (hidden, targets, weights))

    def one(carry: tuple, part: tuple) -> tuple[tuple, jax.Array]:
        total, head_gradient = carry
        hidden, targets, weights = part
        logits = _logits(hidden, head)
        loss, normaliser = _chunk_loss(logits, targets, weights)
        error = weights[..., None] * (jnp.exp(logits - normaliser[..., None]) - _hits(logits, targets))
        error = error.astype(head.dtype)  # [*rows, width, V]
        if with_head:
            errors, inputs = (x.reshape(-1, x.shape[-1]) for x in (error, hidden.astype(head.dtype)))
            head_gradient = head_gradient + dot(errors, inputs, (0, 0))
        return (total + loss, head_gradient), dot(error, head, (-1, 0)).astype(hidden.dtype)

    zeros = jnp.zeros(head.shape if with_head else (), dtype)
    (total, head_gradient), gradients = lax.scan(one, (jnp.zeros((), dtype), zeros), parts)
    gradients = jnp.moveaxis(gradients, 0, axis)  # [*rows, T / width, width, D]
    gradients = gradients.reshape(*shape[:axis], -1, shape[-1])
    hidden_gradient = lax.slice_in_dim(gradients, 0, shape[axis], axis=axis)
    return total, (hidden_gradient, head_gradient.astype(head.dtype) if with_head else None)


def _backward(chunk: int, residuals: tuple, cotangent: Any) -> tuple:
    del chunk
    hidden_gradient, head_gradient = residuals
    scaled = (hidden_gradient * cotangent).astype(hidden_gradient.dtype)
    if head_gradient is not None:
        head_gradient = (head_gradient * cotangent).astype(head_gradient.dtype)
    return scaled, head_gradient, None, None


next_token_loss.defvjp(_forward, _backward, symbolic_zeros=True)
