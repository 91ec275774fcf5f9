"""Which entries a reselection drops, by hand."""

import functools

import jax.numpy as jnp
import optax
import pytest

import spiel_jax as sj
from spiel_jax.config import ConfigError, check_config, default_config

TARGETS = {"w": sj.Target((2, 4), 3)}
WEIGHTS = {"w": jnp.array([[0.1, 1.0, 4.0, 0.0], [1.0, 1.0, 1.0, 1.0]])}


def dropped(drop_by, ages, inner=None):
    """Of entries 0, 1 and 2 with values 0.3, 0.4 and 0.5, the one that goes."""
    plan = sj.Reselection(2, 1, 1, sj.constant(0.34), first=None)
    inner = inner or sj.aged_adamw(0.0)
    tx = sj.spiel(inner, TARGETS, growth=sj.RandomGrowth(), schedule=plan, drop_by=drop_by)
    values = {"w": jnp.array([0.3, -0.4, 0.5])}
    state = sj.place(tx.init(values), {"w": TARGETS["w"].delta(jnp.array([0, 1, 2]))})
    if ages is not None:
        state = optax.tree.set(state, age={"w": jnp.array(ages)})
    _, state = tx.update({"w": jnp.zeros(3)}, state, values, weights=WEIGHTS)
    (gone,) = {0, 1, 2} - set(state.active["w"].indices.tolist())
    return gone


def test_the_smallest_value_goes_or_the_smallest_relative_to_age_or_weight():
    ages = [1, 4, 2]  # and one step more: 0.3 / 2, 0.4 / 5, 0.5 / 3
    assert dropped("value", ages) == 0
    assert dropped("age", ages) == 1
    assert dropped("weight", ages) == 2  # 0.3 / 0.1, 0.4 / 1, 0.5 / 4


def test_the_gradients_that_seeded_an_entry_did_not_train_it():
    plan = sj.Reselection(4, 2, 2, sj.constant(0.34), first=None)
    tx = sj.spiel(sj.aged_adamw(0.0), TARGETS, growth=sj.AccumulatedGradients(), schedule=plan, drop_by="age")
    values = {"w": jnp.array([0.3, -0.9, 2.0])}
    state = sj.place(tx.init(values), {"w": TARGETS["w"].delta(jnp.array([0, 1, 2]))})
    candidates = {"w": TARGETS["w"].delta(jnp.array([4, 5, 6]), jnp.ones(3))}
    update = functools.partial(tx.update, {"w": jnp.zeros(3)}, params=values, candidates=candidates)
    _, state = update(state=state)
    state = optax.tree.set(state, age={"w": jnp.array([2, 6, 6])})  # of which two are the phase's
    _, state = update(state=state)
    assert set(state.active["w"].indices.tolist()) >= {0, 2}  # 0.3 / 1, 0.9 / 5, 2 / 5: not by 3, 7 and 7


def test_without_ages_it_says_what_is_missing():
    with pytest.raises(ValueError, match="the inner optimizer keeps none"):
        dropped("age", None, optax.adamw(0.0))
    config = default_config()
    config.model.source, config.data.sources, config.targets.density = "random", ("chat.jsonl",), 0.1
    config.method, config.spiel.drop_by = "spiel_ma", "age"
    with pytest.raises(ConfigError, match="drop_by = 'age': expected value or weight: SM3 keeps no age"):
        check_config(config)
