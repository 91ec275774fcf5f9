import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spiel_jax.models.rope import RopeScaling, inverse_frequencies, rotate, rotation


def test_frequencies_by_hand():
    np.testing.assert_array_equal(inverse_frequencies(4, 100.0), np.array([1.0, 0.1], np.float32))
    linear = inverse_frequencies(4, 100.0, RopeScaling("linear", 4.0))
    np.testing.assert_array_equal(linear, np.array([0.25, 0.025], np.float32))


def test_llama3_divides_slow_frequencies_only():
    plain = inverse_frequencies(64, 500_000.0)
    scaling = RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)
    scaled = inverse_frequencies(64, 500_000.0, scaling)
    turns = 8192 * plain / (2 * np.pi)
    np.testing.assert_array_equal(scaled[turns > 4], plain[turns > 4])
    np.testing.assert_allclose(scaled[turns < 1], plain[turns < 1] / 8, rtol=1e-6)
    between = (turns > 1) & (turns < 4)
    assert between.any()
    assert np.all((scaled[between] < plain[between]) & (scaled[between] > plain[between] / 8))


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": 10_000.0},
        {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 2.5},
        {
            "rope_type": "llama3",
            "rope_theta": 500_000.0,
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    ],
)
def test_rotation_equals_transformers(rope):
    import torch
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    from spiel_jax.models import ModelConfig

    config = LlamaConfig(hidden_size=128, num_attention_heads=2, rope_parameters=rope)
    ours = ModelConfig.from_hf(config.to_dict())
    x = np.random.default_rng(0).normal(size=(2, 5, 3, 64)).astype(np.float32)
    positions = np.array([[0, 1, 2, 3, 4], [7, 100, 3, 900, 2047]])

    cos, sin = LlamaRotaryEmbedding(config)(torch.tensor(x), torch.tensor(positions))
    q = torch.tensor(x).transpose(1, 2)
    expected = apply_rotary_pos_emb(q, q, cos, sin)[0].transpose(1, 2).numpy()

    frequencies = inverse_frequencies(ours.head_dim, ours.rope_theta, ours.rope_scaling)
    actual = rotate(jnp.array(x), *rotation(jnp.array(positions), frequencies))
    np.testing.assert_allclose(actual, expected, atol=5e-4)  # positions near 2000 times one ulp
    np.testing.assert_allclose(actual[0], expected[0], atol=2e-6)


def test_rotation_is_relative():
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 8))
    frequencies = inverse_frequencies(8, 10_000.0)

    def score(i, j):
        rotated = [rotate(x, *rotation(jnp.array([[at]]), frequencies)) for x, at in ((q, i), (k, j))]
        return jnp.vdot(*rotated)

    np.testing.assert_allclose(score(9, 4), score(25, 20), rtol=1e-4)
    assert abs(score(9, 4) - score(9, 5)) > 1e-2


def test_rotation_keeps_dtype_and_computes_in_float32():
    x = jax.random.normal(jax.random.key(0), (1, 4, 2, 8), jnp.bfloat16)
    turn = rotation(jnp.arange(4)[None], inverse_frequencies(8, 10_000.0))
    rotated = rotate(x, *turn)
    assert rotated.dtype == jnp.bfloat16
    exact = rotate(x.astype(jnp.float32), *turn)
    np.testing.assert_array_equal(rotated, exact.astype(jnp.bfloat16))


def test_bad_scalings_are_refused():
    with pytest.raises(ValueError, match="'yarn': expected one of default, linear, llama3"):
        RopeScaling("yarn", 2.0)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="at least 1, got 0"):
        RopeScaling("linear", 0.0)
    with pytest.raises(ValueError, match="original_max_positions"):
        RopeScaling("llama3", 8.0)
    with pytest.raises(ValueError, match="low_freq_factor < high_freq_factor"):
        RopeScaling("llama3", 8.0, 4.0, 1.0, 8192)
