"""The transformation beside an independent NumPy oracle, and the oracle beside the original, step by step."""

import json
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from support import oracle
from support.oracle import Matrix, Rules, best
from support.oracle_cases import (
    CROWDED,
    CUT,
    KINDS,
    LARGE,
    MIXED,
    PLAIN,
    REFERENCE,
    TINY,
    Case,
    follow,
    run,
)

import spiel_jax as sj
from spiel_jax.optim import schedules

TOLERANCE = 2e-5
GOLDEN = sorted((Path(__file__).parents[1] / "golden").glob("*.npz"))

# Adam and SM3 turn all gradients much larger than eps into the same first step: an eps this large keeps
# cuts between values wider than the precision.
AG = Rules(eps=0.1, weight_decay=0.5)
MA = Rules(growth="ma", inner="sm3", eps=0.5, weight_decay=0.5)
TAIL = {"total_steps": 11, "every": 5, "accumulation": 2}  # a third phase begins, no reselection ends it
EVERY_STEP = {"total_steps": 6, "every": 1, "accumulation": 1, "first": None}


def original(rules, **options):
    return replace(rules, **REFERENCE, **options)


AG_CASE = Case("ag", MIXED, replace(AG, learning_rate=lambda count: 0.2 / (1.0 + count)), "corrected")
MA_CASE = Case("ma", MIXED, replace(MA, initial=0.9), "corrected", micro_batches=2)
CASES = [
    AG_CASE,
    Case("ag, original", CUT, original(AG, **TAIL), "reference", micro_batches=2),
    Case(
        "ag, original, cosine",
        PLAIN,
        original(AG, **TAIL, policy="cosine", first=None, initial=0.9),
        "reference",
        static=True,
    ),
    Case("ag, original, clipped", PLAIN, original(AG, clip_norm=0.5, **TAIL), "reference", micro_batches=2),
    Case("ag, clipped", PLAIN, replace(AG, clip_norm=0.5), "corrected", micro_batches=2, static=True),
    Case("ag, every step", PLAIN, replace(AG, **EVERY_STEP, policy="constant", initial=0.5)),
    Case("ag, always in a phase", PLAIN, replace(AG, every=3, accumulation=3, policy="cosine", initial=1.0)),
    Case("ag, tiny", TINY, replace(AG, every=2, accumulation=1, policy="constant", initial=1.0)),
    Case("ag, crowded", CROWDED, replace(AG, policy="constant", initial=0.6)),
    Case("ag, few candidates", PLAIN, replace(AG, policy="constant", initial=1.0, ratio=0.4), "corrected"),
    Case("ag, many candidates", PLAIN, replace(AG, ratio=2.5), "corrected"),
    Case("ag, many and active candidates", PLAIN, replace(AG, ratio=1.5, propose_active=True)),
    Case("ag, large", LARGE, replace(AG, policy="constant", initial=0.3), "corrected"),
    Case("ag, the second moment seeded", PLAIN, replace(AG, initial=0.6, seeds="second"), "corrected"),
    Case("ag, nothing seeded", PLAIN, replace(AG, initial=0.6, seeds="neither"), "corrected"),
    Case("ag, nothing replaced", PLAIN, replace(AG, policy="constant", initial=0.0, first=None)),
    Case("ag around sm3", PLAIN, replace(AG, inner="sm3", eps=0.5)),
    MA_CASE,
    Case("ma, original", CUT, original(MA, **TAIL, clip_norm=0.5, initial=0.9), "reference", static=True),
    Case("ma, every step", PLAIN, replace(MA, **EVERY_STEP, policy="constant", initial=0.5), "corrected"),
    Case("ma, tiny", TINY, replace(MA, every=2, accumulation=1, policy="constant", initial=1.0)),
    Case("ma, crowded", CROWDED, replace(MA, policy="constant", initial=0.6), "corrected"),
    Case("ma, large", LARGE, replace(MA, policy="constant", initial=0.3)),
    Case("ma by the minimum around adam", PLAIN, replace(AG, growth="ma", score="minimum", initial=0.9)),
]


SLOW = (  # two others have together what is special of each
    "ag, original, cosine",
    "ag, original, clipped",
    "ag, always in a phase",
    "ag, many candidates",
    "ma, tiny",
    "ma, crowded",
    "ma, large",
)


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=case.name, marks=pytest.mark.slow if case.name in SLOW else ()) for case in CASES],
)
def test_every_step(case):
    assert follow(case, 8, tolerance=TOLERANCE) >= 7


QUIRKS = {
    quirk: Case(
        quirk, PLAIN, replace(AG, clip_norm=1.0, initial=0.9, **TAIL, **{quirk: value}), micro_batches=2
    )
    for quirk, value in REFERENCE.items()
}


@pytest.mark.parametrize("quirk", QUIRKS)
def test_each_quirk_of_the_original_alone(quirk):
    """With it in both they agree; with it in one of them the comparison tells."""
    case = QUIRKS[quirk]
    assert follow(case, 8, tolerance=TOLERANCE) >= 7
    without = replace(case.rules, **{quirk: not REFERENCE[quirk]})
    with pytest.raises(AssertionError):
        run(case, 0, "normal", tolerance=TOLERANCE, rules=without)


def last_of_equals(scores, allowed, n):
    """``best``, but of equals the highest position comes first."""
    return best(scores[::-1, ::-1], allowed[::-1, ::-1], n)[::-1, ::-1]


@pytest.mark.parametrize("case", [AG_CASE, MA_CASE], ids=lambda case: case.name)
def test_the_comparison_tells_the_other_direction_of_ties(monkeypatch, case):
    run(case, 0, "integers", tolerance=TOLERANCE)
    monkeypatch.setattr(oracle, "best", last_of_equals)
    with pytest.raises(AssertionError, match="not equal"):
        run(case, 0, "integers", tolerance=TOLERANCE)


@pytest.mark.parametrize(
    ("case", "wrong"),
    [
        (AG_CASE, {"late_age": True}),
        (AG_CASE, {"b2": 0.9991}),
        (AG_CASE, {"eps": 0.1001}),
        (AG_CASE, {"weight_decay": 0.501}),
        (MA_CASE, {"eps": 0.501}),
        (MA_CASE, {"score": "minimum"}),
        (MA_CASE, {"initial": 0.5}),
        (MA_CASE, {"first": 0.9}),
    ],
    ids=lambda value: getattr(value, "name", None) or "-".join(value),
)
def test_the_comparison_tells_another_number(case, wrong):
    with pytest.raises(AssertionError):
        run(case, 0, "normal", tolerance=TOLERANCE, rules=replace(case.rules, **wrong))


HALF = {"dtype": "bfloat16"}
HALF_SGD = Rules(inner="sgd", learning_rate=0.5, value_dtype=jnp.bfloat16, initial=0.5)
HALF_ADAM = Rules(learning_rate=0.0, value_dtype=jnp.bfloat16, initial=0.5)
HALF_CASES = [
    # steps of halves are exact, so that each value is rounded once, to bfloat16
    Case("ag", PLAIN, HALF_SGD, **HALF),
    Case("ag, every step", PLAIN, replace(HALF_SGD, **EVERY_STEP), narrow=True, **HALF),
    Case("ma, every step", PLAIN, replace(HALF_SGD, growth="ma", **EVERY_STEP), narrow=True, **HALF),
    # the values stand still and the moments do not
    Case("ag, adam", PLAIN, HALF_ADAM, **HALF),
    Case("ag, adam, narrow gradients", PLAIN, HALF_ADAM, narrow=True, **HALF),
    Case("ma, sm3", PLAIN, replace(MA, learning_rate=0.0, value_dtype=jnp.bfloat16), **HALF),
]


@pytest.mark.parametrize(
    "case",
    [
        # the narrow ones are the harder
        pytest.param(case, id=case.name, marks=pytest.mark.slow if case.name in ("ag", "ag, adam") else ())
        for case in HALF_CASES
    ],
)
def test_bfloat16_values(case):
    """Their statistics and moments are float32, and as accurate as others."""
    exact = case.rules.inner == "sgd" or case.narrow  # small integers are exact in bfloat16 too
    kinds = ("integers", "few") if exact else KINDS
    normal = lambda rng, shape: rng.standard_normal(shape)  # noqa: E731
    assert follow(case, 8, tolerance=TOLERANCE, kinds=kinds, start=normal) >= 7


def test_phases_are_those_of_the_original_loop():
    """The order of operations of the original: hooks that go on and off."""
    for total, every, accumulation in [(40, 10, 3), (11, 5, 2), (12, 5, 2), (9, 4, 1), (1, 3, 1)]:
        rules = Rules(
            total_steps=total,
            every=every,
            accumulation=accumulation,
            long_phases=True,
            idle_phases=True,
        )
        on, observed, reselected = [], [], []
        hooks = True
        for step in range(1, total + 1):
            if hooks:
                on.append(step)
            if (step + 1) % every == 0:
                hooks = True
            if step % every == accumulation:
                hooks = False
                observed.append(len(on))
                reselected.append(step)
                on = []
        assert list(rules.reselections()) == reselected
        phases = [[step for step in phase if step <= total] for phase in rules.phases()]
        assert [len(phase) for phase in phases][: len(observed)] == observed
        assert phases[len(observed) :] == ([on] if on else [])


def test_public_rates():
    """The names that settings of a schedule are made of."""
    for name in ("linear", "cosine", "constant"):
        assert getattr(sj, name) is getattr(schedules, name)


@pytest.mark.parametrize("file", GOLDEN, ids=lambda file: file.stem)
def test_oracle_replays_the_original(file):
    """From the recorded gradients and candidates every state of the original at every step."""
    with np.load(file) as stored_arrays:
        golden = dict(stored_arrays)
    meta = json.loads(str(golden["meta_json"]))
    hyper, growing = meta["optimizer_hparams"], meta["selection_algorithm"] == "rigl"
    rules = Rules(
        growth="ag" if growing else "ma",
        inner="adam" if growing else "sm3",
        total_steps=meta["steps"],
        every=meta["reselection_steps"],
        accumulation=meta["selection_accumulation_steps"],
        policy=meta["reselection_rate_policy"],
        initial=meta["initial_reselection_rate"],
        first=1.0 if meta["reselection_rate_policy"] == "linear" else None,
        learning_rate=hyper["lr"],
        eps=hyper["eps"],
        weight_decay=hyper["weight_decay"],
        **dict(zip(("b1", "b2"), hyper.get("betas", ()), strict=False)),
        dtype=np.float32,  # as the original's: 1 - 0.999^4 is known to 1.5e-5 only
        value_dtype=np.float32,
        **REFERENCE,
    )
    shares = rules.reselections()
    assert list(shares) == golden["select_steps"].tolist()
    assert list(shares.values()) == golden["select_p"].tolist()
    phases = {phase[-1]: len(phase) for phase in rules.phases()}
    fields = {"values": "value", "accumulator_0": "row", "accumulator_1": "column"}
    if growing:
        fields = {"values": "value", "age": "age", "exp_avg": "mu", "exp_avg_sq": "nu"}

    for module, shape in zip(golden["module_names"], golden["module_shapes"], strict=True):
        indices = golden[f"init/{module}/indices"]
        matrix = Matrix(rules, tuple(shape), indices)
        stored = {key: golden[f"step/{module}/{key}"] for key in ("grad", "indices", *fields)}
        for step in range(1, rules.total_steps + 1):
            gradient = np.zeros(shape, np.float32)
            gradient.flat[indices] = stored["grad"][step - 1]
            matrix.update(gradient, rules.learning_rate)
            if step in shares:
                if growing:
                    seen = {
                        key: golden[f"candidates/{step}/{module}/{key}"]
                        for key in ("indices", "grad_sum", "grad_sq_sum", "samples")
                    }
                    matrix.candidates.flat[seen["indices"]] = True
                    matrix.sum.flat[seen["indices"]] = seen["grad_sum"]
                    matrix.square.flat[seen["indices"]] = seen["grad_sq_sum"]
                    matrix.steps = phases[step]
                    matrix.samples = matrix.steps * meta["grad_accumulation_steps"]
                    assert (seen["samples"] == matrix.samples).all()
                matrix.reselect(shares[step])
            indices = stored["indices"][step - 1]
            np.testing.assert_array_equal(np.sort(indices), np.flatnonzero(matrix.active))
            for key, field in fields.items():
                ours, theirs = getattr(matrix, field), stored[key][step - 1]
                ours = ours.flat[indices] if ours.ndim == 2 else ours
                error = np.abs(ours - theirs).max()
                assert error <= 1e-5 * np.abs(theirs).max(), f"{key} of {module} at step {step}: {error}"
