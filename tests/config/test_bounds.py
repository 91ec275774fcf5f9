"""Every key has bounds, and they hold for what people type and what their programs compute."""

import math

import numpy as np
import pytest

from spiel_jax.config import default_config, flatten
from spiel_jax.config.bounds import (
    KEYS,
    HeldOut,
    Number,
    OneOf,
    OrNone,
    Rules,
    Sources,
    Switch,
    Text,
    Whole,
)

UNSET = ("model.source", "data.sources")  # what every config has to set


def inner(kind):
    return kind.kind if isinstance(kind, OrNone) else kind


def test_every_key_has_bounds_and_its_default_is_within():
    defaults = flatten(default_config())
    assert defaults.keys() == KEYS.keys()
    assert [key for key, value in defaults.items() if KEYS[key].expected(value)] == sorted(UNSET)


@pytest.mark.parametrize("key", KEYS)
def test_no_key_takes_what_is_not_finite_or_of_another_type(key):
    kind = inner(KEYS[key])
    wrong = [math.nan, math.inf, -math.inf, object(), {}, -2, 10**400]
    if not isinstance(kind, Switch):
        wrong.append(True)
    if not isinstance(kind, Number | HeldOut):
        wrong += [0.5, np.float64(0.5)]
    if isinstance(kind, Whole | Number | Switch | HeldOut):
        wrong += ["1", ""]
    if not isinstance(KEYS[key], OrNone):
        wrong.append(None)
    if key == "spiel.first":
        wrong.remove(-2)
    for value in wrong:
        assert KEYS[key].expected(value), value


@pytest.mark.parametrize(
    ("key", "inside", "outside"),
    [
        ("optimizer.b1", [0, 0.0, 0.9, np.float64(0.9), 1 - 2**-24], [1, 1.0, -0.1, 1 - 1e-9]),
        ("optimizer.eps", [1e-8, 1e-37, None], [0, 0.0, -1e-8, 1e-39, 1e-300]),
        ("optimizer.learning_rate", [1e-5, 1e38], [0.0, 1e39, 1e300]),
        ("optimizer.warmup", [0, 1, 0.03], [1.1, -0.1]),
        ("targets.density", [1, 1e-6, None], [0.0, 1.1]),
        ("spiel.first", [-1.0, 0.0, 1.0, None], [1.5]),
        ("lora.rank", [1, 65536], [0, 65537, 2.0, np.int64(2)]),
        ("seed", [0, 2**63 - 1], [-1, 2**63]),
        ("steps", [1, None], [0, 2**31, 1.0]),
        ("eval_batches", [0, None], [-1]),
        ("mesh.data", [-1, 4], [-2, 0.5]),
        ("method", ["spiel_ag", "lora"], ["SPIEL_AG", ""]),
        ("data.heldout", [0, 8, 64.0, 0.02, ("a.jsonl",)], [-1, -0.5, 1.5, True, (), "a.jsonl", (3,)]),
        ("data.sources", [("a",), ["a"], ({"path": "a"},)], ["a", (), ("",), (3,), None]),
        (
            "targets.rules",
            [(".*",), ["a", "b"]],
            [".*", (), ("(",), ("[a",), (None,), ("a" * 3 + "(?P<1>)",)],
        ),
        ("sample.prompt", ["hi", "", "None of it", None], [3, "\udce9"]),
        ("model.source", ["a", "Ä"], ["", "a\udce9", 3]),
    ],
)
def test_bounds(key, inside, outside):
    kind = KEYS[key]
    assert [value for value in inside if kind.expected(value)] == []
    assert [value for value in outside if not kind.expected(value)] == []


@pytest.mark.parametrize(
    ("kind", "texts"),
    [
        (Whole(), {"3": 3, "1_000": 1000, "0x10": 16, "+3": 3, "1e3": "1e3", "3.0": "3.0", "": ""}),
        (Number(), {"1": 1.0, "1e-4": 1e-4, ".5": 0.5, "True": "True", "1,5": "1,5"}),
        (
            Switch(),
            {"true": True, "TRUE": True, "1": True, "yes": True, "on": True, "False": False, "0": False},
        ),
        (OneOf(lambda: ("none", "full")), {"none": "none", "None": "None"}),
        (OrNone(Whole()), {"None": None, "none": None, "3": 3}),
        (OrNone(Text()), {"None": None, "none": "none", "3": "3", "('a',)": "('a',)"}),
        (
            Sources("paths"),
            {
                "a.jsonl": ("a.jsonl",),
                "/a b/c.jsonl": ("/a b/c.jsonl",),
                "a,b.jsonl": ("a,b.jsonl",),
                "'a'": ("a",),
                "3": ("3",),
                "('a', 'b')": ("a", "b"),
                "['a']": ("a",),
                "('a')": ("a",),
                "()": (),
                "({'path': 'a', 'weight': 2},)": ({"path": "a", "weight": 2},),
                "{'path': 'a'}": ({"path": "a"},),
                "('a', 'b'": "('a', 'b'",
                "({'path': a},)": "({'path': a},)",
            },
        ),
        (
            Rules("rules"),
            {r".*\.(o|up)_proj": (r".*\.(o|up)_proj",), "(a|b).*": ("(a|b).*",), "[ab]+": ("[ab]+",)},
        ),
        (HeldOut("paths"), {"100": 100, "0.1": 0.1, "1e-2": 0.01, "a.jsonl": ("a.jsonl",), "('a',)": ("a",)}),
    ],
)
def test_what_texts_of_the_command_line_stand_for(kind, texts):
    for text, value in texts.items():
        found = kind.read(text)
        assert (found, type(found)) == (value, type(value)), text
