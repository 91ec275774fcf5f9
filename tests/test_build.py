import jax.numpy as jnp
import numpy as np
import pytest

from spiel_jax import build
from spiel_jax.config import default_config
from spiel_jax.models import ModelConfig
from spiel_jax.sparse_training import SparseTraining
from spiel_jax.training import DenseTraining


@pytest.fixture
def config():
    config = default_config()
    config.targets.num_tunable = 2_500_000
    config.optimizer.learning_rate = 1.0
    return config


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("linear", [0.25, 0.5, 0.75, 1.0, 1.0, 0.75, 0.5, 0.25]),
        ("cosine", [0.25, 0.5, 0.75, 1.0, 1.0, 0.8536, 0.5, 0.1464]),
        ("constant", [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0]),
    ],
)
def test_learning_rate_by_hand(config, schedule, expected):
    config.optimizer.warmup = 0.5
    config.optimizer.schedule = schedule
    rate = build.learning_rate(config, 8)
    np.testing.assert_allclose([float(rate(step)) for step in range(8)], expected, atol=1e-4)
    config.optimizer.warmup = 0.0
    assert float(build.learning_rate(config, 8)(0)) == 1.0


def test_targets_of_the_default_are_the_linears_of_the_blocks(config):
    targets = build.targets(config, ModelConfig.smollm2_135m())
    assert len(targets) == 7
    assert all(target.stack == (30,) for target in targets.values())
    assert 2_499_000 < sum(target.total for target in targets.values()) <= 2_500_000
    config.method = "full"
    assert build.targets(config, ModelConfig.smollm2_135m()) == {}


def test_methods(config):
    model = ModelConfig.smollm2_135m()
    for method, kind in (("spiel_ag", SparseTraining), ("spiel_ma", SparseTraining), ("full", DenseTraining)):
        config.method = method
        targets = build.targets(config, model)
        schedule, rate = build.reselection(config, 50), build.learning_rate(config, 50)
        assert isinstance(build.training(config, model, targets, schedule, rate), kind)


def test_reselection(config):
    config.spiel.schedule = "cosine"
    config.spiel.first = -1.0
    plan = build.reselection(config, 100)
    assert plan.steps == [5, 25, 45, 65, 85]
    np.testing.assert_allclose(plan.rates, 0.1 * (1 + np.cos(np.pi * np.array(plan.steps) / 100)))
    config.spiel.first = 0.9
    assert build.reselection(config, 100).rates[0] == 0.9


def test_the_paper_recipe_at_7b(config):
    config.targets.num_tunable = 64 * 2_498_560
    targets = build.targets(config, ModelConfig.llama2_7b())
    total = sum(target.total for target in targets.values())
    assert 0.9999 < total / (64 * 2_498_560) <= 1
    assert jnp.dtype(config.model.dtype) == jnp.bfloat16
