"""Checks of a configuration: single keys, keys beside each other, near names, and stored configurations."""

import copy

import pytest

from spiel_jax.config import (
    ConfigError,
    check_config,
    data_config,
    default_config,
    differences,
    flatten,
    set_key,
    unflatten,
    with_defaults,
)
from spiel_jax.config.bounds import KEYS
from spiel_jax.config.checks import near_keys, without_effect
from spiel_jax.methods.registry import method_names

ONE_DEVICE = {"data": 1, "fsdp": 1, "tensor": 1}


@pytest.fixture
def config():
    config = default_config()
    config.model.source = "here"
    config.data.sources = ("a.jsonl",)
    config.targets.density = 0.01
    check_config(config)
    return config


def test_a_key_cannot_be_added():
    config = default_config()
    with pytest.raises(AttributeError, match="batch_size"):
        config.bach_size = 3
    with pytest.raises(AttributeError, match="learning_rate"):
        config.optimizer.learning_rat = 3


def test_keys_that_were_added_or_taken_nevertheless_are_refused(config):
    changed = copy.deepcopy(config)
    set_key(changed, "optimizer.lr", 3)
    with pytest.raises(ConfigError, match=r"config\.optimizer\.lr is no key; near: optimizer\.learning_rate"):
        check_config(changed)
    with config.unlocked():
        del config.lora["rank"]
    with pytest.raises(ConfigError, match=r"config\.lora\.rank is missing: .* default_config"):
        check_config(config)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("steps", True, "config.steps = True: expected a whole number, at least 1, or None"),
        ("optimizer.b2", 1.0, "config.optimizer.b2 = 1.0: expected 0 or more and less than 1"),
        ("optimizer.eps", float("nan"), "config.optimizer.eps = nan: expected more than 0, or None"),
        ("sample.max_new_tokens", 0, "config.sample.max_new_tokens = 0: expected at least 1"),
        ("targets.rules", ("a(",), "config.targets.rules = .*'a\\(' is none: missing \\)"),
        (
            "targets.num_tunable",
            5,
            "config.targets.density = 0.01: expected None where num_tunable = 5: .*one of",
        ),
        (
            "targets.density",
            None,
            "config.targets.density = None: expected density or num_tunable, one of them",
        ),
        ("micro_batch_size", 7, "config.micro_batch_size = 7: expected a divisor of batch_size = 128"),
        ("data.sequence_length", 2**25, "expected less, or a smaller micro-batch than 128"),
        ("spiel.accumulation", 21, "config.spiel.accumulation = 21: expected 1 to spiel.every = 20"),
        ("data.sources", ({"path": "a", "wieght": 2},), "no 'wieght': expected some of path, weight,"),
        ("data.sources", ({"weight": 2},), "a source without a path: {'weight': 2}"),
        (
            "data.sources",
            ({"path": "a", "weight": "2"},),
            "config.data.sources: .* in {'path': 'a', 'weight': '2'}",
        ),
        ("data.heldout", ({"path": ""},), "config.data.heldout: .*path"),
        (
            "model.source",
            "x" * 1000 + "\udce9",
            r"config\.model\.source = 'x{99} \.\.\. .{50}: expected a model in UTF-8",
        ),
    ],
)
def test_what_no_run_could_use(config, key, value, message):
    set_key(config, key, value)
    with pytest.raises(ConfigError, match=message) as raised:
        check_config(config)
    assert "reference" not in str(raised.value)
    assert "object at" not in str(raised.value)


@pytest.mark.parametrize(
    ("changes", "key", "beside"),
    [
        ({"steps": 3}, "epochs", "steps = 3: leave it out, or unset that: --config.steps=None"),
        ({}, "sample.max_new_tokens", "sample.prompt = None"),
        ({"data.heldout": 0}, "eval_every", "data.heldout = 0"),
        ({}, "lora.rank", "method = 'spiel_ag'"),
        ({}, "spiel.score", "method = 'spiel_ag'"),
        ({"method": "spiel_ma"}, "optimizer.b1", "method = 'spiel_ma'"),
        ({"method": "random"}, "spiel.candidate_ratio", "method = 'random'"),
        ({"method": "magnitude"}, "spiel.every", "method = 'magnitude'"),
        ({"method": "gradient", "spiel.rate": 0.1}, "spiel.rate", "method = 'gradient'"),
        ({"method": "lora"}, "targets.density", "method = 'lora'"),
        ({"method": "ia3"}, "lora.alpha", "method = 'ia3'"),
        ({"method": "full"}, "targets.rules", "method = 'full'"),
        ({"method": "full", "targets.grid.fsdp": 2}, "targets.grid.fsdp", "method = 'full'"),
    ],
)
def test_a_key_without_effect(config, changes, key, beside):
    for one, value in changes.items():
        set_key(config, one, value)
    (sentence,) = without_effect(config, [key])
    assert sentence.startswith(f"config.{key} = {flatten(config)[key]!r} has no effect beside {beside}")


@pytest.mark.parametrize("method", ["gradient", "gem", "wanda", "smt", "rosa"])
def test_a_run_that_ends_before_its_entries_are_chosen_is_refused(config, method):
    config.method, config.spiel.tile.rows, config.rosa.warmup = method, 1, 60
    config.steps = 65 if method == "rosa" else 5
    check_config(config)
    config.steps -= 1
    with pytest.raises(
        ConfigError, match=r"spiel\.accumulation = 5: expected at most 4, the steps there are"
    ):
        check_config(config)


def test_keys_with_an_effect(config):
    config.sample.prompt = "hi"
    idle = {"lora": ["lora.rank", "targets.rules"], "magnitude": ["spiel.magnitude", "spiel.merge"]}
    idle |= {"gradient": ["spiel.accumulation", "spiel.candidate_ratio"], "spiel_ma": ["spiel.score"]}
    for method in method_names():
        config.method = method
        always = [
            "epochs",
            "sample.max_new_tokens",
            "eval_every",
            "optimizer.weight_decay",
            "targets.num_tunable",
        ]
        assert list(without_effect(config, always + idle.get(method, []))) == []
    config.data.heldout = config.eval_every = 0
    assert list(without_effect(config, ["eval_every"])) == []


@pytest.mark.parametrize(
    ("mistyped", "meant"),
    [
        ("lr", "optimizer.learning_rate"),
        ("packing", "data.packing"),
        ("methd", "method"),
        ("lora_rank", "lora.rank"),
    ],
)
def test_near_names(mistyped, meant):
    assert near_keys(mistyped)[0] == meant


def test_the_share_of_an_earlier_version_is_a_number(config):
    for value in (64, 64.0):
        config.data.heldout = value
        assert data_config(config).heldout == 64
    config.data.heldout = ("b.jsonl",)
    assert [source.path for source in data_config(config).heldout] == ["b.jsonl"]


def test_a_stored_configuration_of_another_version(config):
    stored = flatten(config)
    del stored["lora.rslora"]
    stored |= {"data.heldout": 64.0, "optimizer.old": 3, "gone.section": [1]}
    known = unflatten(stored)
    assert (known.lora.rslora, known.optimizer.old, known.gone.section) == (False, 3, [1])
    assert known.is_locked
    config.data.heldout = 64
    assert differences(stored, flatten(config)) == {"optimizer.old": (3, None), "gone.section": ([1], None)}


def test_every_key_can_be_set_to_any_type(config):
    for value in (None, 3, 0.5, "a", ("a",), [1], True):
        for key in KEYS:
            set_key(config, key, value)
        stored = flatten(unflatten(flatten(config)))
        assert stored == dict.fromkeys(KEYS, list(value) if isinstance(value, tuple) else value)
    assert config.is_locked


@pytest.mark.parametrize(("parity", "new"), [("corrected", "second"), ("reference", "both")])
def test_seeds_are_the_method_s_or_the_continued_run_s_and_those_of_old_runs_what_they_were(
    config, parity, new
):
    config.spiel.parity = parity
    assert with_defaults(config, ONE_DEVICE, {}).spiel.seeds == new
    assert with_defaults(config, ONE_DEVICE, {"spiel.seeds": "neither"}).spiel.seeds == "neither"
    filled = with_defaults(config, ONE_DEVICE, {"method": "spiel_ag"})  # of a version without the key
    assert filled.spiel.seeds == "both"
    old = {key: value for key, value in flatten(filled).items() if key != "spiel.seeds"}
    assert not differences(old, flatten(filled))
    config.spiel.seeds = "second"
    assert differences(old, flatten(with_defaults(config, ONE_DEVICE, old))) == {
        "spiel.seeds": ("both", "second")
    }


@pytest.mark.parametrize(
    ("method", "entries", "rate"),
    [
        ("spiel_ma", "gradient", 0.2),
        ("random", "gradient", 0.0),
        ("rosa", "random", 0.0),
        ("rosa", "spiel_ag", 0.2),
        ("lora", "gradient", None),
    ],
)
def test_the_replacement_rate_is_the_method_s_or_the_continued_run_s(config, method, entries, rate):
    config.method, config.rosa.entries = method, entries
    assert with_defaults(config, ONE_DEVICE, {}).spiel.rate == rate
    assert with_defaults(config, ONE_DEVICE, {"spiel.rate": 0.3}).spiel.rate == 0.3
    config.spiel.rate = 0.5
    assert with_defaults(config, ONE_DEVICE, {"spiel.rate": 0.3}).spiel.rate == 0.5
    assert config.targets.grid.fsdp is None  # a copy was filled in
