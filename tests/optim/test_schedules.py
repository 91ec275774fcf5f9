"""Schedules by hand, against the paper's algorithm and the original implementation's loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spiel_jax.optim.schedules import Phase, Reselection, constant, cosine, linear


def spelled(schedule: Reselection, steps: int) -> str:
    """One letter per step: p(ropose), e(stimate), - (plain); upper case where a reselection ends it."""
    letters = {Phase.PROPOSE: "p", Phase.ESTIMATE: "e", Phase.PLAIN: "-"}
    marks = (letters[schedule.phase(s)] for s in range(1, steps + 1))
    return "".join(m.upper() if schedule.reselects(s) else m for s, m in enumerate(marks, 1))


@pytest.mark.parametrize(
    ("total", "every", "accumulation", "expected"),
    [
        (24, 10, 3, "peE-------peE-------peE-"),
        (22, 10, 3, "peE-------peE---------"),  # no phase begins that no reselection would use
        (24, 10, 4, "peeE------peeE----------"),  # the rate at the last step is 0: nothing to reselect
        (10, 4, 1, "P---P---P-"),
        (10, 3, 3, "peEpeEpeE-"),
        (8, 3, 3, "peEpeE--"),
        (4, 1, 1, "PPP-"),
        (2, 10, 3, "--"),
    ],
)
def test_steps_and_phases_by_hand(total, every, accumulation, expected):
    schedule = Reselection(total, every, accumulation)
    assert spelled(schedule, total) == expected
    assert schedule.steps == [s for s, mark in enumerate(expected, 1) if mark.isupper()]


def test_defaults_of_the_paper():
    schedule = Reselection(100)
    assert schedule.steps == [5, 25, 45, 65, 85]
    assert spelled(schedule, 40) == "peeeE---------------peeeE---------------"


def test_nothing_happens_after_the_last_step():
    schedule = Reselection(10, 5, 2)
    assert spelled(schedule, 20) == "pE---pE---" + "-" * 10


@pytest.mark.parametrize(
    ("total", "every", "accumulation"),
    [(40, 10, 3), (41, 5, 3), (21, 20, 1), (12, 4, 3), (13, 4, 4), (13, 4, 6), (5, 1, 1), (33, 10, 3)],
)
def test_long_phases_follow_the_original_loop(total, every, accumulation):
    schedule = Reselection(total, every, accumulation, long_phases=True).original()
    # the original: hooks go on at construction and when (completed + 1) % R == 0, off when completed % R == A
    hooks, fresh = True, True
    for step in range(1, total + 1):
        phase = (Phase.PROPOSE if fresh else Phase.ESTIMATE) if hooks else Phase.PLAIN
        if accumulation != every - 1:  # there the original clears the statistics and then divides by zero
            assert schedule.phase(step) is phase
        fresh = False
        if (step + 1) % every == 0:
            hooks, fresh = True, True
        assert schedule.reselects(step) == (step % every == accumulation)
        assert (step in schedule.steps) == (step % every == accumulation)
        if step % every == accumulation:
            hooks = False


def test_a_long_phase_begins_although_no_reselection_follows():
    assert spelled(Reselection(11, 5, 2, idle_phases=True), 11) == "pE---pE---p"
    assert spelled(Reselection(11, 5, 2), 11) == "pE---pE----"
    assert spelled(Reselection(11, 5, 2).original(), 11) == "pE--peE--pe"


def test_phases_after_the_first_have_a_step_more():
    assert spelled(Reselection(13, 5, 2, long_phases=True), 13) == "pE--peE--peE-"
    assert spelled(Reselection(13, 5, 2), 13) == "pE---pE---pE-"


def test_as_many_accumulation_steps_as_between_reselections():
    # the original never reselects; corrected, it is an ordinary plan, and more of them are refused
    assert spelled(Reselection(10, 4, 4).original(), 10) == "peepeeepee"
    assert spelled(Reselection(10, 4, 4, long_phases=True), 10) == "----------"
    assert spelled(Reselection(10, 4, 4), 10) == "peeEpeeE--"
    assert Reselection(10, 4, 6, long_phases=True).steps == []


def test_the_original_replaces_everything_first_under_linear_only():
    assert Reselection(40, 10, 3, linear(0.2), first=None).original().rates[0] == 1.0
    assert Reselection(40, 10, 3, cosine(0.2)).original().rates[0] == cosine(0.2)(3, 40)
    assert Reselection(40, 10, 3, cosine(0.2)).rates[0] == 1.0


def test_a_rate_of_zero_is_no_reselection():
    static = Reselection(40, 10, 3, constant(0), first=None)
    assert (static.steps, static.rates, static.last) == ([], [], 0)
    assert spelled(static, 40) == "-" * 40
    assert spelled(Reselection(40, 10, 3, constant(0)), 40) == "peE" + "-" * 37  # the first one only
    gap = Reselection(14, 4, 1, lambda step, total: 0.5 * (step != 5), first=None)
    assert spelled(gap, 14) == "P---P---P---P-"  # inside the run it is one that replaces nothing
    assert gap.counts([10]).tolist() == [[5], [0], [5], [5]]
    assert Reselection(7, 4, 1, constant(0), first=None, idle_phases=True).steps == [1, 5]


@pytest.mark.parametrize("long_phases", [False, True])
@pytest.mark.parametrize("idle_phases", [False, True])
@pytest.mark.parametrize(("total", "every", "accumulation"), [(40, 10, 3), (37, 5, 3), (9, 3, 1), (9, 3, 3)])
def test_arrays_and_ints_agree(total, every, accumulation, long_phases, idle_phases):
    schedule = Reselection(total, every, accumulation, long_phases=long_phases, idle_phases=idle_phases)
    steps = np.arange(1, total + every + 1)
    for of in (schedule.reselects, schedule.proposes, schedule.estimates, schedule.number):
        one_by_one = [of(int(s)) for s in steps]
        np.testing.assert_array_equal(of(steps), one_by_one)
    assert not np.any(schedule.proposes(steps) & schedule.estimates(steps))
    assert all(type(schedule.reselects(int(s))) is bool for s in steps)


def test_reselections_are_numbered():
    schedule = Reselection(40, 10, 3)
    assert [schedule.number(s) for s in schedule.steps] == [0, 1, 2, 3]


def test_rates_by_hand():
    steps = Reselection(40, 10, 3).steps
    assert steps == [3, 13, 23, 33]
    np.testing.assert_allclose(Reselection(40, 10, 3).rates, [1, 0.2 * 27 / 40, 0.2 * 17 / 40, 0.2 * 7 / 40])
    half = Reselection(40, 10, 3, cosine(0.4), first=None).rates
    np.testing.assert_allclose(half, [0.2 * (1 + np.cos(np.pi * s / 40)) for s in steps])
    assert Reselection(40, 10, 3, constant(0.3), first=0.5).rates == [0.5, 0.3, 0.3, 0.3]
    assert linear(0.5)(0, 10) == 0.5
    assert linear(0.5)(10, 10) == cosine(0.5)(10, 10) == 0
    assert Reselection(2, 10, 3).rates == []


def test_counts_by_hand():
    counts = Reselection(40, 10, 3).counts([63, 31, 126])
    assert counts.dtype == np.int32
    np.testing.assert_array_equal(counts, [[63, 31, 126], [8, 4, 17], [5, 2, 10], [2, 1, 4]])
    assert Reselection(2, 10, 3).counts([63, 31]).shape == (0, 2)
    assert Reselection(40, 10, 3).counts([]).shape == (4, 0)


def test_counts_come_from_float64():
    # 0.2 * (1 - 55/100) and others are below or above the float32 number: times k, another integer
    schedule = Reselection(100, 5, 5, first=None)
    entries = list(range(1, 2000))
    counts = schedule.counts(entries)
    expected = [[int(k * (0.2 * (1 - s / 100))) for k in entries] for s in schedule.steps]
    np.testing.assert_array_equal(counts, expected)
    rates = np.array(schedule.rates, np.float32)
    single = (np.array(entries, np.float32) * rates[:, None]).astype(np.int32)
    assert np.any(single != counts)  # the cases exist


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"total_steps": 0}, "total_steps = 0: expected at least 1"),
        ({"accumulation": 0}, "accumulation = 0: expected 1 to every = 20 steps"),
        ({"accumulation": 21}, "accumulation = 21: expected 1 to every = 20 steps"),
        ({"every": 0}, "every = 0: expected at least 1 step"),
        ({"accumulation": 0, "long_phases": True}, "accumulation = 0: expected 1 to"),
        ({"first": 1.5}, "first = 1.5: expected a share between 0 and 1, or None"),
        ({"first": -0.1}, "first = -0.1"),
        ({"first": float("nan")}, "first = nan"),
        ({"rate": constant(1.2)}, r"rate\(25, 100\) = 1.2: expected 0 to 1"),
        ({"rate": linear(-0.2)}, r"rate\(25, 100\) = -0.1"),
        ({"rate": constant(float("nan")), "first": None}, r"rate\(5, 100\) = nan"),
    ],
)
def test_numbers_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Reselection(**{"total_steps": 100, **arguments})


@pytest.mark.parametrize("name", ["total_steps", "every", "accumulation", "first"])
@pytest.mark.parametrize("number", [np.array(1), jnp.float32(1)])
def test_numbers_must_be_static(name, number):
    with pytest.raises(TypeError, match=f"{name} must be static"):
        Reselection(**{"total_steps": 100, name: number})


def test_traced_numbers_are_refused():
    with pytest.raises(TypeError, match=r"total_steps must be static.*static_args"):
        jax.jit(lambda steps: len(Reselection(steps).steps))(100)
    assert Reselection(np.int64(100)).steps == Reselection(100).steps
