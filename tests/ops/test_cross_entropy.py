"""The chunked loss against one dense softmax."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.programs import AS_USERS

from spiel_jax.ops.cross_entropy import next_token_loss

D, V = 8, 50


def batch(*lead: int, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    hidden = jnp.array(rng.normal(size=(*lead, D)), dtype)
    head = jnp.array(rng.normal(size=(V, D)), dtype)
    targets = jnp.array(rng.integers(0, V, lead), jnp.int32)
    weights = jnp.array(rng.random(lead) * (rng.random(lead) < 0.7), jnp.float32)  # some are 0
    return hidden, head, targets, weights


def dense_loss(hidden, head, targets, weights):
    logits = hidden.astype(jnp.float32) @ head.astype(jnp.float32).T
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]
    return -jnp.sum(weights * chosen)


def both(loss, hidden, head, *rest):
    """Value, and gradients with respect to the hidden states and the head."""
    return jax.jit(jax.value_and_grad(loss, (0, 1)))(hidden, head, *rest)


def test_by_hand():
    # logits (0, log 3): the probabilities are 1/4 and 3/4
    hidden, head = jnp.array([[1.0], [1.0]]), jnp.array([[0.0], [np.log(3.0)]])
    targets, weights = jnp.array([0, 1]), jnp.array([1.0, 10.0])
    expected = np.log(4) + 10 * np.log(4 / 3)
    np.testing.assert_allclose(next_token_loss(hidden, head, targets, weights, 2), expected, rtol=1e-6)


@pytest.mark.parametrize("chunk", [1, 5, 12, 100])
def test_equals_the_dense_loss_for_any_chunk(chunk):
    arrays = batch(3, 4)
    value, gradients = both(partial(next_token_loss, chunk=chunk), *arrays)
    expected, expected_gradients = both(dense_loss, *arrays)
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(next_token_loss(*arrays, chunk), expected, rtol=1e-6)  # not differentiated
    for found, wanted in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


def test_gradient_of_the_hidden_states_alone_scales_with_the_cotangent():
    hidden, head, targets, weights = batch(6)
    found = jax.grad(lambda h: 3 * next_token_loss(h, head, targets, weights, 4))(hidden)
    wanted = jax.grad(lambda h: 3 * dense_loss(h, head, targets, weights))(hidden)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


def test_gradient_of_the_head_alone():
    hidden, head, targets, weights = batch(6)
    found = jax.grad(lambda head: next_token_loss(hidden, head, targets, weights, 4))(head)
    wanted = jax.grad(lambda head: dense_loss(hidden, head, targets, weights))(head)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


def test_tokens_of_weight_zero_count_for_nothing():
    hidden, head, targets, weights = batch(6)
    weights = weights.at[2:].set(0)
    value, (dhidden, dhead) = both(partial(next_token_loss, chunk=4), hidden, head, targets, weights)
    assert not np.any(dhidden[2:])
    short = both(partial(next_token_loss, chunk=4), hidden[:2], head, targets[:2], weights[:2])
    np.testing.assert_allclose(value, short[0], rtol=1e-6)
    np.testing.assert_allclose(dhead, short[1][1], rtol=1e-6, atol=1e-7)
    nothing = both(partial(next_token_loss, chunk=4), hidden, head, targets, jnp.zeros(6))
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(nothing))


def test_large_logits_do_not_overflow():
    hidden, head, targets, weights = batch(6)
    value, gradients = both(partial(next_token_loss, chunk=4), 1000 * hidden, head, targets, weights)
    np.testing.assert_allclose(value, dense_loss(1000 * hidden, head, targets, weights), rtol=1e-6)
    assert all(np.all(np.isfinite(g)) for g in gradients)


def test_bfloat16_operands_give_a_float32_loss():
    arrays = batch(40, dtype=jnp.bfloat16)
    value, (dhidden, dhead) = both(partial(next_token_loss, chunk=16), *arrays)
    expected, wanted = both(dense_loss, *arrays)
    assert (value.dtype, dhidden.dtype, dhead.dtype) == (jnp.float32, jnp.bfloat16, jnp.bfloat16)
    np.testing.assert_allclose(value, expected, rtol=1e-5)  # products of bfloat16 numbers are exact
    for found, exact in zip((dhidden, dhead), wanted, strict=True):
        found, exact = (np.asarray(g.astype(jnp.float32)) for g in (found, exact))
        np.testing.assert_allclose(found, exact, rtol=0.02, atol=0.02)


def test_inside_scan_and_checkpoint():
    hidden, head, targets, weights = batch(2, 5)

    def loss(hidden):
        def one(total, part):
            return total + next_token_loss(part[0], head, part[1], part[2], 4), None

        return jax.lax.scan(jax.checkpoint(one), 0.0, (hidden, targets, weights))[0]

    wanted = jax.grad(dense_loss)(hidden, head, targets, weights)
    np.testing.assert_allclose(jax.jit(jax.grad(loss))(hidden), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("argnums", [0, (0, 1)])
def test_the_logits_are_never_whole_in_memory(argnums):
    tokens, vocabulary, width = 1024, 8192, 16
    shape = jax.ShapeDtypeStruct
    arguments = (
        shape((tokens, width), jnp.float32),
        shape((vocabulary, width), jnp.float32),
        shape((tokens,), jnp.int32),
        shape((tokens,), jnp.float32),
    )
    gradient = jax.jit(jax.grad(partial(next_token_loss, chunk=64), argnums))
    needed = gradient.lower(*arguments).compile(AS_USERS).memory_analysis().temp_size_in_bytes
    assert needed < tokens * vocabulary * 4 / 3
