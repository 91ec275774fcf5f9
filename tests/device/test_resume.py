"""A run that is saved and restored on the device goes on bit for bit."""

import tempfile

import jax
import jax.numpy as jnp
import numpy as np

from device.test_steps import CONFIG, batch, method_named
from experiments.bench.methods import kinds_of_step
from spiel_jax.checkpoint import Checkpoints, restore_state
from spiel_jax.models import init_params


def resume(name):
    method = method_named(name)
    params = init_params(CONFIG, jax.random.key(0), jnp.bfloat16)
    start = jax.jit(method.init)
    step = jax.jit(method.step, static_argnames=("phase", "reselect"))
    kinds = list(kinds_of_step(method).values()) * 2
    half = len(kinds) // 2 + 1

    def run(state, numbers):
        for number in numbers:
            phase, reselect = kinds[number]
            state, _ = step(state, batch(number), phase=phase, reselect=reselect)
        return state

    middle = run(start(params), range(half))
    with tempfile.TemporaryDirectory() as folder, Checkpoints(folder) as checkpoints:
        checkpoints.save(half, middle, method, {})
        checkpoints.wait()
        restored = restore_state(folder, start(params), method, half)
    again = jax.jit(method.attach)(params, restored.trainable, restored.opt_state)
    ends = [jax.device_get(run(state, range(half, len(kinds)))) for state in (middle, again)]
    jax.tree.map(np.testing.assert_array_equal, *ends)


def test_spiel_ag_goes_on_bit_for_bit():
    resume("spiel_ag")


def test_spiel_ma_goes_on_bit_for_bit():
    resume("spiel_ma")


def test_lora_goes_on_bit_for_bit():
    resume("lora")
