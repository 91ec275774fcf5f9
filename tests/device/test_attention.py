"""Attention in one kernel on the device: the numbers and gradients of the same in float32."""

import os
import subprocess
import sys
from pathlib import Path
from unittest import SkipTest

import jax
import jax.numpy as jnp
import numpy as np

from device.test_steps import batch, method_named
from experiments.bench.methods import kinds_of_step
from spiel_jax.models import ModelConfig, init_params
from spiel_jax.models.attention_masks import visible, within
from spiel_jax.models.fused_attention import attend

TOLERANCE = 2e-2
"""A share of the largest number: operands have 8 bits, and so have the shares of attention inside cuDNN."""


def take_nvidia():
    if "cuda" not in jax.devices()[0].client.platform_version:
        raise SkipTest("takes an NVIDIA GPU")


def compare(queries, keys, values, mask, window):
    """Output and gradients in bfloat16 by cuDNN, and in float32 by XLA."""

    def run(kind, dtype):
        weights = jnp.asarray(np.random.default_rng(1).normal(size=queries.shape), jnp.float32)

        def loss(*arrays):
            seen = attend(*arrays, mask, window, kind)
            return jnp.sum(seen.astype(jnp.float32) * weights), seen

        arrays = [x.astype(jnp.bfloat16).astype(dtype) for x in (queries, keys, values)]
        gradients, seen = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(*arrays)
        return jax.device_get([seen, *gradients])

    with jax.default_matmul_precision("highest"):
        expected = run("xla", jnp.float32)
    for ours, theirs in zip(run("cudnn", jnp.bfloat16), expected, strict=True):
        scale = np.abs(theirs).max()
        np.testing.assert_allclose(np.asarray(ours, np.float32), theirs, rtol=0, atol=TOLERANCE * scale)


def test_cudnn_sees_what_xla_sees():
    take_nvidia()
    rng = np.random.default_rng(0)
    for heads, kv_heads, size, length in ((4, 4, 64, 128), (9, 3, 64, 256), (8, 2, 128, 192)):
        shapes = [(2, length, count, size) for count in (heads, kv_heads, kv_heads)]
        arrays = [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]
        segments = np.ones((2, length), np.int32)
        segments[0, length // 3 :] = 2
        segments[1, length // 2 :] = 0
        mask = visible(jnp.asarray(segments), jnp.asarray(segments))
        compare(*arrays, None, None)
        compare(*arrays, None, 32)
        compare(*arrays, mask, None)
        compare(*arrays, mask & within(32, length, length), None)


def test_a_step_with_cudnn_is_one_without():
    """Losses and gradient norms of all kinds of steps, from the same state."""
    take_nvidia()
    size = {"vocab_size": 96, "hidden_size": 128, "intermediate_size": 96, "num_layers": 2}
    heads = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 32, "max_positions": 64}
    config = ModelConfig(**size, **heads, tie_embeddings=True, initializer_range=0.3)
    params = init_params(config, jax.random.key(0), jnp.bfloat16)
    methods = [method_named("spiel_ag", model=config, attention=kind) for kind in ("xla", "cudnn")]
    state = jax.jit(methods[0].init)(params)
    for number, (phase, reselect) in enumerate(kinds_of_step(methods[0]).values()):
        steps = [jax.jit(one.step, static_argnames=("phase", "reselect")) for one in methods]
        wide = jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, state)
        with jax.default_matmul_precision("highest"):
            exact = steps[0](wide, batch(number), phase=phase, reselect=reselect)[1]
        found = [step(state, batch(number), phase=phase, reselect=reselect) for step in steps]
        (state, usual), (_, ours) = found
        for key in ("loss", "grad_norm"):  # with 8 bits neither is the exact one: cuDNN's is as near
            allowed = abs(usual[key] - exact[key]) + TOLERANCE * exact[key]
            assert abs(ours[key] - exact[key]) <= allowed, (key, exact[key], usual[key], ours[key])


def print_repeats(kind):
    """Whether gradients of one program and its operands are the same, bit for bit, ten times."""
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = [(4, 1024, heads, 64) for heads in (8, 2, 2, 8)]  # many tiles of keys add to a query's gradient
    *arrays, weights = (jax.random.normal(k, s, jnp.bfloat16) for k, s in zip(keys, shapes, strict=True))

    @jax.jit
    def gradients(*arrays):
        return jax.grad(lambda *arrays: jnp.sum(attend(*arrays, None, None, kind) * weights), (0, 1, 2))(
            *arrays
        )

    first = jax.device_get(gradients(*arrays))
    found = [jax.device_get(gradients(*arrays)) for _ in range(9)]
    print(all(np.array_equal(x, y) for one in found for x, y in zip(one, first, strict=True)))


def test_cudnn_repeats_itself_when_told_to():
    take_nvidia()
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_deterministic_ops=true"
    told = {"XLA_FLAGS": flags, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    words = [sys.executable, "-c", "from device.test_attention import *; print_repeats('cudnn')"]
    path = os.pathsep.join([str(Path(__file__).parents[1]), str(Path(__file__).parents[2])])
    env = {**os.environ, **told, "PYTHONPATH": path}
    ended = subprocess.run(words, env=env, capture_output=True, text=True, check=False, timeout=300)
    assert ended.stdout.split()[-1:] == ["True"], ended.stderr[-1000:]
