"""One step of each kind on the device: the numbers that the CPU beside it gets."""

import jax
import jax.numpy as jnp
import numpy as np

from device.reference import assert_near, on_both
from experiments.bench.methods import build_method, kinds_of_step, random_batch
from spiel_jax.losses.next_token import Objective
from spiel_jax.models import ModelConfig, init_params

CONFIG = ModelConfig(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_positions=64,
    tie_embeddings=True,
    initializer_range=0.3,
)
RULES = (r".*\.(q|down)_proj\.weight",)


def method_named(name, model=CONFIG, attention="xla", **options):
    objective = Objective(model, remat="dots", loss_chunk=16, attention=attention)
    settings = {"entries": 400, "rank": 3, "rules": RULES, "dtype": jnp.float32, "learning_rate": 1e-2}
    return build_method(name, objective, **{**settings, **options})


def batch(seed=0, rows=2):
    return random_batch(CONFIG.vocab_size, rows, 16, micro_batches=2, seed=seed)


def follow(name):
    """Runs the kinds of steps of a method one after the other, each from the CPU's state after the last."""
    method = method_named(name)
    params = init_params(CONFIG, jax.random.key(0), jnp.float32)
    state = jax.device_get(jax.jit(method.init)(params))
    for number, (kind, (phase, reselect)) in enumerate(kinds_of_step(method).items()):
        # A GPU would multiply float32 with 10 bits of each operand, a TPU with 8: that hides what is wrong.
        with jax.default_matmul_precision("highest"):

            def step(state, data, phase=phase, reselect=reselect):
                return method.step(state, data, phase=phase, reselect=reselect)

            (ours, metrics), (state, expected) = on_both(step, state, batch(number))
        assert expected["finite"], kind
        assert_near(metrics, expected, 1e-5)
        assert_near(ours, state, 1e-4)


def test_spiel_ag():
    follow("spiel_ag")


def test_spiel_ma():
    follow("spiel_ma")


def test_lora():
    follow("lora")


def test_ia3():
    follow("ia3")


def test_full():
    follow("full")


def test_bfloat16_steps_learn():
    """All kinds of steps in the precision that runs have, on one batch: finite, and the loss goes down."""
    method = method_named("spiel_ag", learning_rate=3e-2)
    state = jax.jit(method.init)(init_params(CONFIG, jax.random.key(0), jnp.bfloat16))
    step = jax.jit(method.step, static_argnames=("phase", "reselect"), donate_argnums=0)
    losses = []
    for phase, reselect in list(kinds_of_step(method).values()) * 2:
        for _ in range(2):
            state, metrics = step(state, batch(), phase=phase, reselect=reselect)
            assert metrics["finite"]
            losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] - 0.05, losses
    assert all(np.isfinite(jax.device_get(values)).all() for values in state.trainable.values())


def test_a_mesh_of_one_changes_nothing():
    from spiel_jax.distributed.mesh import make_mesh

    mesh = make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])
    method = method_named("spiel_ma")
    params = init_params(CONFIG, jax.random.key(0), jnp.float32)

    def run(state):
        step = jax.jit(method.step, static_argnames=("phase", "reselect"))
        for phase, reselect in kinds_of_step(method).values():
            state, _ = step(state, batch(), phase=phase, reselect=reselect)
        return jax.device_get(state)

    alone = run(jax.jit(method.init)(params))
    with jax.set_mesh(mesh):
        there = run(jax.jit(method.init)(jax.device_put(params, jax.NamedSharding(mesh, jax.P()))))
    assert_near(there, alone, 1e-5)
