"""In float64 the transformation and the oracle agree to rounding, on problems of every kind."""

from dataclasses import replace

import jax
import pytest
from support.oracle import Rules
from support.oracle_cases import CROWDED, CUT, LARGE, MIXED, PLAIN, REFERENCE, TINY, Case, follow

TOLERANCE = 1e-12
PROBLEMS = 25  # of each case

AG = Rules(weight_decay=0.5)
MA = Rules(growth="ma", inner="sm3", eps=1e-8, weight_decay=0.5)
TAIL = {"total_steps": 11, "every": 5, "accumulation": 2}
EVERY_STEP = {"total_steps": 6, "every": 1, "accumulation": 1, "first": None}

WIDE = {"dtype": "float64"}
CASES = [
    Case("ag", MIXED, replace(AG, clip_norm=3.0), "corrected", micro_batches=2, **WIDE),
    Case("ag, quirks", CUT, replace(AG, clip_norm=3.0, **TAIL, **REFERENCE), micro_batches=2, **WIDE),
    # the original counts ages in float32 only
    Case("ag, original", PLAIN, replace(AG, **TAIL, **REFERENCE, stuck_age=True), "reference", **WIDE),
    Case("ag, every step", PLAIN, replace(AG, **EVERY_STEP, policy="constant", initial=0.5), **WIDE),
    Case("ag, always in a phase", PLAIN, replace(AG, every=3, accumulation=3, policy="cosine"), **WIDE),
    Case("ag, tiny", TINY, replace(AG, every=2, accumulation=1, policy="constant", initial=1.0), **WIDE),
    Case("ag, crowded", CROWDED, replace(AG, policy="constant", initial=0.6, ratio=0.5), **WIDE),
    Case("ag, large", LARGE, replace(AG, policy="constant", initial=0.5, ratio=2.0), **WIDE),
    Case("ma", MIXED, replace(MA, initial=0.9, clip_norm=3.0), "corrected", **WIDE),
    Case("ma, every step", CROWDED, replace(MA, **EVERY_STEP, policy="constant", initial=0.5), **WIDE),
    Case("ma by the minimum around adam", PLAIN, replace(AG, growth="ma", score="minimum"), **WIDE),
]


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


# What the float32 cases of test_oracle.py have too is slow here.
FEW = ("ag", "ag, original", "ag, tiny", "ma", "ma by the minimum around adam")


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=() if case.name in FEW else pytest.mark.slow, id=case.name) for case in CASES],
)
def test_every_step_in_float64(case):
    """Together these are more than two hundred problems."""
    assert follow(case, PROBLEMS, tolerance=TOLERANCE) * len(CASES) >= 200
