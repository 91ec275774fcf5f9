import jax.numpy as jnp
import numpy as np
import pytest

from spiel_jax.config import default_config
from spiel_jax.methods import configured, registry
from spiel_jax.methods.full import FullMethod
from spiel_jax.methods.parametrization import ParametrizationMethod
from spiel_jax.methods.sparse import SparseMethod
from spiel_jax.models import ModelConfig
from spiel_jax.optim.criteria.accumulated_gradients import AccumulatedGradients
from spiel_jax.optim.criteria.criterion import CRITERIA
from spiel_jax.optim.criteria.lift import LowRankMagnitude
from spiel_jax.optim.criteria.moment_approximation import MomentApproximation
from spiel_jax.optim.criteria.random import RandomGrowth
from spiel_jax.optim.criteria.static import FirstGradients, LargestWeights


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
    rate = configured.learning_rate(config, 8)
    np.testing.assert_allclose([float(rate(step)) for step in range(8)], expected, atol=1e-4)
    config.optimizer.warmup = 0.0
    assert float(configured.learning_rate(config, 8)(0)) == 1.0


def test_targets_of_the_default_are_the_linears_of_the_blocks(config):
    targets = configured.configured_targets(config, ModelConfig.smollm2_135m())
    assert len(targets) == 7
    assert all(target.stack == (30,) for target in targets.values())
    assert 2_499_000 < sum(target.total for target in targets.values()) <= 2_500_000
    for method in ("full", "lora", "ia3"):
        config.method = method
        assert registry.build(config, ModelConfig.smollm2_135m(), 50).targets == {}


@pytest.mark.parametrize(
    ("method", "growth", "steps"),
    [
        ("spiel_ag", AccumulatedGradients(), [5, 25, 45]),
        ("spiel_ma", MomentApproximation(shared=True), [5, 25, 45]),
        ("random", RandomGrowth(), []),
        ("magnitude", LargestWeights(), []),
        ("gradient", FirstGradients(seeds="neither", propose_active=True), [5]),
        ("lift", LowRankMagnitude(128), [20, 40]),
    ],
)
def test_sparse_methods_differ_by_growth_and_schedule(config, method, growth, steps):
    config.method = method
    model = ModelConfig.smollm2_135m()
    training = registry.build(config, model, 50)
    assert isinstance(training, SparseMethod)
    assert training.growth == growth
    schedule = training.schedule
    assert schedule.steps == steps
    assert schedule.rates[:1] == [1.0][: len(steps)]
    assert (training.start is not None) == (method in ("magnitude", "lift"))


def test_options_of_growth(config):
    config.spiel.score = "minimum"
    config.spiel.candidate_ratio = 1.5
    config.spiel.first = 0.5
    config.method = "spiel_ma"
    assert CRITERIA[config.method].from_config(config) == MomentApproximation("minimum", shared=True)
    config.method = "spiel_ag"
    assert CRITERIA[config.method].from_config(config) == AccumulatedGradients(ratio=1.5)
    config.spiel.seeds = "neither"
    assert CRITERIA[config.method].from_config(config) == AccumulatedGradients(ratio=1.5, seeds="neither")
    assert CRITERIA[config.method].schedule(config, 50).rates[0] == 0.5
    config.method = "random"
    config.spiel.first = -1.0
    assert CRITERIA[config.method].schedule(config, 50).steps == []  # a static random mask
    config.spiel.rate = 0.2
    assert CRITERIA[config.method].schedule(config, 50).rates == pytest.approx([0.18, 0.1, 0.02])


@pytest.mark.parametrize(
    ("method", "kind"),
    [("full", FullMethod), ("lora", ParametrizationMethod), ("ia3", ParametrizationMethod)],
)
def test_dense_methods(config, method, kind):
    config.method = method
    model = ModelConfig.smollm2_135m()
    built = registry.build(config, model, 50)
    assert isinstance(built, kind)


def test_reference(config):
    config.spiel.parity = "reference"
    config.spiel.accumulation, config.spiel.every = 4, 3  # the original never reselects
    assert CRITERIA[config.method].schedule(config, 50).steps == []
    config.spiel.every = 10
    plan = CRITERIA[config.method].schedule(config, 54)
    assert plan.steps == [4, 14, 24, 34, 44, 54]
    assert plan.rates[0] == 1.0
    config.spiel.schedule = "cosine"
    assert CRITERIA[config.method].schedule(config, 54).rates[0] < 0.2
    assert CRITERIA[config.method].from_config(config) == AccumulatedGradients.reference()
    config.spiel.seeds = "second"
    with pytest.raises(ValueError, match="seeds = 'second': the original seeds"):
        CRITERIA[config.method].from_config(config)
    config.spiel.seeds = "both"
    config.spiel.candidate_ratio = 2.0
    with pytest.raises(ValueError, match="the original has as many"):
        CRITERIA[config.method].from_config(config)


def test_reselection(config):
    config.spiel.schedule = "cosine"
    config.spiel.first = -1.0
    plan = CRITERIA[config.method].schedule(config, 100)
    assert plan.steps == [5, 25, 45, 65, 85]
    np.testing.assert_allclose(plan.rates, 0.1 * (1 + np.cos(np.pi * np.array(plan.steps) / 100)))
    config.spiel.first = 0.9
    assert CRITERIA[config.method].schedule(config, 100).rates[0] == 0.9


def test_the_paper_recipe_at_7b(config):
    config.targets.num_tunable = 64 * 2_498_560
    targets = configured.configured_targets(config, ModelConfig.llama2_7b())
    total = sum(target.total for target in targets.values())
    assert 0.9999 < total / (64 * 2_498_560) <= 1
    assert jnp.dtype(config.model.dtype) == jnp.bfloat16
