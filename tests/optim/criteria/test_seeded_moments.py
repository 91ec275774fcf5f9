"""SpIEL-MA around Adam: what grows, and what it begins with, against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import spiel_jax as sj
from spiel_jax.config import ConfigError, check_config, default_config
from spiel_jax.methods.registry import build
from spiel_jax.models import ModelConfig
from spiel_jax.optim.criteria.moment_approximation import MomentApproximation
from spiel_jax.optim.criteria.seeded_moments import SeededMoments

B2, AGE, ROWS, COLUMNS, SLOTS = 0.9, 3, 5, 7, 6


def test_a_grown_entry_begins_with_the_moment_of_its_row_and_column():
    targets = {"w": sj.Target((ROWS, COLUMNS), SLOTS, stack=(2,))}
    plan = sj.Reselection(9, every=4, accumulation=4, rate=sj.constant(0.5), first=None)
    growth = SeededMoments(b2=B2, age=AGE)
    tx = sj.spiel(sj.aged_adamw(0.1, b2=B2), targets, growth=growth, schedule=plan)
    values, rng = sj.zeros(targets), np.random.default_rng(0)
    state, update = tx.init(values), jax.jit(tx.update)
    active = np.asarray(state.active["w"].indices)
    row, column = np.zeros((2, ROWS)), np.zeros((2, COLUMNS))
    for _ in range(4):
        grads = rng.normal(size=(2, SLOTS)).astype(np.float32)
        for matrix, gradient in enumerate(grads):
            x, y = active[matrix] // COLUMNS, active[matrix] % COLUMNS
            moments = np.minimum(row[matrix, x], column[matrix, y]) + gradient**2
            np.maximum.at(row[matrix], x, moments)
            np.maximum.at(column[matrix], y, moments)
        updates, state = update({"w": jnp.array(grads)}, state, values)
        values = optax.apply_updates(values, updates)
    inner = state.inner[0]
    new = np.asarray(state.active["w"].indices)
    for matrix in range(2):
        grown = new[matrix] != active[matrix]
        assert grown.sum() == SLOTS // 2
        scores = np.outer(row[matrix], column[matrix]).ravel()
        scores[active[matrix]] = -1
        assert {*new[matrix][grown]} == {*np.argsort(-scores, kind="stable")[: SLOTS // 2]}
        x, y = new[matrix][grown] // COLUMNS, new[matrix][grown] % COLUMNS
        expected = np.minimum(row[matrix, x], column[matrix, y]) / 4 * (1 - B2**AGE)
        np.testing.assert_allclose(np.asarray(inner.nu["w"])[matrix][grown], expected, rtol=1e-5)
        assert not np.asarray(inner.mu["w"])[matrix][grown].any()
        assert np.all(np.asarray(inner.age["w"])[matrix] == np.where(grown, AGE, 4))
        assert not np.asarray(values["w"])[matrix][grown].any()


def test_without_an_age_nothing_is_seeded():
    target = sj.Target((2, 3), 2)
    assert SeededMoments(age=0).seed_at(((), 0), None, jnp.zeros(2, jnp.int32), target) == {}


def configured(**keys):
    config = default_config()
    config.method, config.model.source, config.model.preset = "spiel_ma_adam", "random", "smollm2_135m"
    config.data.sources, config.targets.num_tunable = ("rows.jsonl",), 2_500_000
    config.update_from_flattened_dict(keys)
    return config


def test_the_trainer_has_adam_inside():
    config = configured(**{"spiel.drop_by": "age", "optimizer.b2": 0.99, "spiel.accumulation": 7})
    check_config(config)
    training = build(config, ModelConfig.smollm2_135m(), 50)
    assert training.growth == SeededMoments(b2=0.99, age=7)
    assert training.growth.first_age(2) == 7
    assert training.growth != MomentApproximation()
    with pytest.raises(ConfigError, match="expected a method of SpIEL"):
        check_config(configured(**{"spiel.parity": "reference"}))
