"""Each quirk of the original implementation beside its corrected default, by hand, and all of them together.

What concerns the schedule alone (phases, the first rate) is in test_schedules.py.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import spiel_jax as sj
from spiel_jax.optim.criteria.accumulated_gradients import AccumulatedGradients, CandidateStats
from spiel_jax.optim.criteria.criterion import Observation
from spiel_jax.optim.inner_optimizers import scale_by_aged_adam

EIGHT = {"w": sj.Target(shape=(2, 4), count=3)}
ONCE = sj.Reselection(1, every=1, accumulation=1)


def grown(growth, values, seen, inner=None, plan=ONCE):
    """(positions, state) after one step that ends with a reselection, from positions 0, 3, 6."""
    inner = inner or optax.chain(scale_by_aged_adam(0.9, 0.999), optax.sgd(1e-3))
    tx = sj.spiel(inner, EIGHT, growth=growth, schedule=plan)
    start = {"w": jnp.array(values)}
    state = sj.place(tx.init(start), {"w": EIGHT["w"].delta(jnp.array([0, 3, 6], jnp.int32))})
    updates, state = tx.update({"w": jnp.zeros(3, start["w"].dtype)}, state, start, candidates={"w": seen})
    return optax.apply_updates(start, updates), state


def candidates(indices, gradients):
    return EIGHT["w"].delta(jnp.array(indices, jnp.int32), jnp.array(gradients, jnp.float32))


def test_statistics_per_micro_batch_make_seeds_smaller():
    """Two micro-batches whose gradients of loss / 2 are 0.1 and 0.3: the step's mean gradient is 0.4."""
    corrected = AccumulatedGradients(seeds="both")
    reference = AccumulatedGradients(seeds="both", per_micro_batch=True)
    values = [0.0, 0.0, 0.0]
    _, state = grown(corrected, values, candidates([1, 2, 4], [0.4, 0.4, 0.4]))
    np.testing.assert_allclose(optax.tree.get(state, "mu")["w"], 0.4 * 0.1, rtol=1e-5)
    np.testing.assert_allclose(optax.tree.get(state, "nu")["w"], 0.4**2 * 0.001, rtol=1e-4)
    _, state = grown(reference, values, candidates([1, 2, 4], [[0.1] * 3, [0.3] * 3]))
    np.testing.assert_allclose(optax.tree.get(state, "mu")["w"], 0.2 * 0.1, rtol=1e-5)  # twice too small
    np.testing.assert_allclose(optax.tree.get(state, "nu")["w"], (0.1**2 + 0.3**2) / 2 * 0.001, rtol=1e-4)
    np.testing.assert_array_equal(optax.tree.get(state, "age")["w"], 1)


@pytest.mark.parametrize(("alike", "expected"), [(True, 2.0), (False, 10.0)])
def test_clipping_reaches_the_candidates(alike, expected):
    tx = sj.spiel(
        optax.sgd(1.0),
        EIGHT,
        growth=AccumulatedGradients(),
        schedule=sj.Reselection(9, 9, 9),
        clip_norm=1.0,
        clip_candidates=alike,
    )
    values = sj.zeros(EIGHT)
    seen = {"w": candidates([1, 2, 4], [10.0, 0.0, 0.0])}
    _, state = tx.update({"w": jnp.array([3.0, 0.0, 4.0])}, tx.init(values), values, candidates=seen)
    np.testing.assert_allclose(state.growth["w"].grad_sum[0], expected, rtol=1e-6)


@pytest.mark.parametrize(("active_too", "expected"), [(False, [1, 2, 4]), (True, [0, 1, 2])])
def test_active_entries_are_no_candidates(active_too, expected):
    x, dy = jnp.array([[4.0, 3.0, 2.0, 0.0]]), jnp.array([[1.0, 0.5]])  # dW = [4 3 2 0; 2 1.5 1 0]
    active = EIGHT["w"].delta(jnp.array([0, 3, 6], jnp.int32), jnp.zeros(3))

    def product(slots):
        adapter = sj.SparseLinear(active, proposal=slots, propose_active=active_too)
        return jnp.sum(sj.sparse_linear(x, jnp.zeros((2, 4)), adapter) * dy)

    _, rows, columns = jax.jit(jax.grad(product))(jnp.zeros((3, 3)))
    assert (rows * 4 + columns).tolist() == expected


def test_fewer_valid_candidates_replace_fewer():
    """All three are dropped; corrected candidates are two, the original's include active entries."""
    values = [0.1, 0.2, 0.3]
    _, state = grown(AccumulatedGradients(), values, candidates([1, 2, 8], [3.0, 2.0, 0.0]))
    assert state.active["w"].indices.tolist() == [1, 2, 6]  # the two that moved least are replaced
    reference = AccumulatedGradients(propose_active=True)
    new, state = grown(reference, values, candidates([0, 1, 2], [3.0, 2.0, 1.0]))
    assert state.active["w"].indices.tolist() == [0, 1, 2]
    np.testing.assert_allclose(new["w"], [0.1, 0, 0], rtol=1e-6)  # both dropped and grown: left alone


@pytest.mark.parametrize(("late", "exact"), [(False, True), (True, False)])
def test_a_grown_entry_is_corrected_for_the_gradients_it_absorbed(late, exact):
    """A constant gradient moves an unbiased Adam by exactly the learning rate, grown entries too."""
    inner = optax.chain(scale_by_aged_adam(0.9, 0.999, eps=0.0), optax.scale(-1.0))
    growth = AccumulatedGradients(seeds="both", late_age=late)
    _, state = grown(growth, [0.0] * 3, candidates([1, 2, 4], [[0.5] * 3][0]), inner)
    assert optax.tree.get(state, "age")["w"].tolist() == [0 if late else 1] * 3
    updates, _ = inner.update({"w": jnp.full(3, 0.5)}, state.inner)
    assert np.allclose(updates["w"], -1.0, rtol=1e-5) == exact


class TestLowPrecision:
    """Values, and in the original so all statistics, in bfloat16."""

    def test_ages_count(self):
        grads = {"w": jnp.ones(3, jnp.bfloat16)}
        for low, expected, dtype in ((False, 3, jnp.float32), (True, 0, jnp.bfloat16)):
            tx = scale_by_aged_adam(low_precision=low)
            state = tx.init(grads)
            for _ in range(3):
                updates, state = tx.update(grads, state)
            assert state.age["w"].tolist() == [expected] * 3
            assert state.nu["w"].dtype == dtype
            assert updates["w"].dtype == jnp.bfloat16

    def test_ages_count_in_float32_in_the_original_too(self):
        grads = {"w": jnp.ones(3)}
        corrected, reference = scale_by_aged_adam(), scale_by_aged_adam(low_precision=True)
        both = [tx.update(grads, tx.init(grads)) for tx in (corrected, reference)]
        jax.tree.map(np.testing.assert_array_equal, *both)

    def test_second_moments_are_seeded(self):
        values = jnp.zeros(3, jnp.bfloat16)
        for low, expected in ((False, 0.25 * 0.001), (True, 0.0)):
            inner = optax.chain(scale_by_aged_adam(0.9, 0.999, low_precision=low), optax.sgd(1e-3))
            growth = AccumulatedGradients(seeds="both", low_precision=low)
            _, state = grown(growth, values, candidates([1, 2, 4], [0.5] * 3), inner)
            np.testing.assert_allclose(optax.tree.get(state, "nu")["w"], expected, rtol=1e-3)
            assert (optax.tree.get(state, "mu")["w"] > 0).all()

    def test_samples_are_counted_past_256(self):
        for low, expected in ((False, 260), (True, 256)):
            growth = AccumulatedGradients(low_precision=low)
            stats = growth.init(EIGHT, {"w": jnp.zeros(3, jnp.bfloat16)})
            seen = {"w": candidates([1, 2, 4], [1.0, 1.0, 1.0])}
            for step in range(260):
                stats = growth.observe(
                    stats, Observation({}, {}, seen, proposes=step == 0, estimates=step > 0, inner=None)
                )
            assert isinstance(stats["w"], CandidateStats)
            assert int(stats["w"].samples) == int(stats["w"].steps) == expected
            assert stats["w"].grad_sum.tolist() == [expected] * 3  # the sums stop there too


def test_score_is_the_product_and_the_minimum_an_option():
    row, column = jnp.array([100.0, 2.0]), jnp.array([1.0, 2.0])
    target = sj.Target((2, 2), 1)
    for score, expected in (("product", 0), ("minimum", 3)):  # entry 1, of the largest score, is active
        criterion = sj.MomentApproximation(score)
        incoming = jax.jit(partial(criterion.incoming, n=1, target=target))
        found = incoming((row, column), jnp.array([1]), jnp.array([True]))
        assert found.tolist() == [expected]


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        (sj.spiel_ag, {"candidate_ratio": 2.0}, "candidate_ratio = 2.0: the original has as many"),
        (sj.spiel_ma, {"score": "minimum"}, "score = 'minimum': the original ranks by the product"),
        (sj.spiel_ag, {"schedule": sj.Reselection(20, 5, 4)}, "accumulation = 4.*divides by zero"),
    ],
)
def test_what_the_original_does_not_have_is_refused_as_reference(method, options, message):
    arguments = {"schedule": sj.Reselection(20)} | options
    method(0.1, EIGHT, **arguments)
    with pytest.raises(ValueError, match=message):
        method(0.1, EIGHT, **arguments, parity="reference")


def test_bad_options_are_refused():
    with pytest.raises(ValueError, match="parity = 'exact': expected one of corrected, reference"):
        sj.spiel_ma(0.1, EIGHT, total_steps=3, parity="exact")
    with pytest.raises(ValueError, match="score = 'sum': expected one of product, minimum"):
        sj.spiel_ma(0.1, EIGHT, total_steps=3, score="sum")
    with pytest.raises(ValueError, match="candidate_ratio = 0: expected more than 0"):
        sj.spiel_ag(0.1, EIGHT, total_steps=3, candidate_ratio=0)
    with pytest.raises(ValueError, match="seeds = 'first': expected one of second, both, neither"):
        sj.spiel_ag(0.1, EIGHT, total_steps=3, seeds="first")


# ------------------------------------------------------------------------------------ all of them together

TARGETS = {"w": sj.Target(shape=(6, 8), count=9)}
PLAN = sj.Reselection(16, every=5, accumulation=2, rate=sj.cosine(0.4))
STEPS, MICRO_BATCHES = 16, 2


gathered = jax.jit(jax.vmap(sj.gather, (0, None)))
proposed = jax.jit(lambda dense, excluded: sj.propose({"w": dense}, {"w": excluded}, {"w": 9})["w"])


def trajectory(tx, plan, growth, dtype=jnp.bfloat16):
    """Values and state after every step, of random dense gradients in two micro-batches."""
    rng = np.random.default_rng(0)
    values = sj.zeros(TARGETS, dtype)
    state = tx.init(values)
    history, update = [], jax.jit(tx.update)
    for step in range(1, STEPS + 1):
        dense = jnp.array(rng.standard_normal((MICRO_BATCHES, 6, 8)) / MICRO_BATCHES, jnp.float32)
        active = sj.deltas(values, state)
        grads = {"w": gathered(dense, active["w"]).sum(0).astype(dtype)}
        seen = None
        if growth is not None:
            known = TARGETS["w"].delta(state.growth["w"].indices)
            if plan.proposes(step):
                none = jnp.full(9, 48, jnp.int32)
                excluded = none if growth.propose_active else active["w"].indices
                known = proposed(dense[0], TARGETS["w"].delta(excluded))
            each = gathered(dense, known)
            seen = {"w": known.with_values(each if growth.per_micro_batch else each.sum(0))}
        updates, state = update(grads, state, values, candidates=seen)
        values = optax.apply_updates(values, updates)
        history.append((values, state))
    return history


def accumulated(clip_candidates=True, low_precision=False, plan=PLAN, **flags):
    growth = AccumulatedGradients(0.9, 0.99, **flags, low_precision=low_precision)
    inner = sj.aged_adamw(0.05, 0.9, 0.99, weight_decay=0.1, low_precision=low_precision)
    tx = sj.spiel(
        inner, TARGETS, growth=growth, schedule=plan, clip_norm=2.0, clip_candidates=clip_candidates
    )
    return trajectory(tx, plan, growth)


def same(one, other):
    return all(
        np.array_equal(a, b) for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    )


@pytest.fixture(scope="module")
def corrected():
    return accumulated()


SWITCHES = {
    "seeds": {"seeds": "both"},
    "per_micro_batch": {"per_micro_batch": True},
    "clip_candidates": {"clip_candidates": False},
    "propose_active": {"propose_active": True},
    "late_age": {"late_age": True},
    "low_precision": {"low_precision": True},
    "long_phases": {"plan": sj.Reselection(16, 5, 2, sj.cosine(0.4), long_phases=True)},
    "idle_phases": {"plan": sj.Reselection(16, 5, 2, sj.cosine(0.4), idle_phases=True)},
    "first": {"plan": sj.Reselection(16, 5, 2, sj.cosine(0.4), first=None)},
}


def test_the_default_is_corrected(corrected):
    tx = sj.spiel_ag(0.05, TARGETS, schedule=PLAN, b2=0.99, weight_decay=0.1, clip_norm=2.0)
    assert same(trajectory(tx, PLAN, AccumulatedGradients()), corrected)


@pytest.mark.parametrize(
    "switch",
    # of the others test_oracle.py tells it by default
    [
        switch if switch in ("low_precision", "first") else pytest.param(switch, marks=pytest.mark.slow)
        for switch in SWITCHES
    ],
)
def test_each_correction_can_be_switched_off_alone(switch, corrected):
    assert not same(accumulated(**SWITCHES[switch]), corrected)


def test_with_all_corrections_off_it_is_the_reference():
    options = {key: value for switch in SWITCHES.values() for key, value in switch.items()}
    options["plan"] = sj.Reselection(16, 5, 2, sj.cosine(0.4), first=None, long_phases=True, idle_phases=True)
    by_hand = accumulated(**options)
    tx = sj.spiel_ag(
        0.05, TARGETS, schedule=PLAN, b2=0.99, weight_decay=0.1, clip_norm=2.0, parity="reference"
    )
    assert same(trajectory(tx, PLAN.original(), AccumulatedGradients.reference()), by_hand)


@pytest.mark.slow
def test_moment_approximation_differs_by_its_schedule_only():
    plan = sj.Reselection(16, 5, 2, sj.cosine(0.4), first=None, long_phases=True, idle_phases=True)
    reference = sj.spiel_ma(0.05, TARGETS, schedule=PLAN, parity="reference")
    assert same(
        trajectory(reference, plan, None), trajectory(sj.spiel_ma(0.05, TARGETS, schedule=plan), plan, None)
    )
    assert not same(
        trajectory(reference, plan, None), trajectory(sj.spiel_ma(0.05, TARGETS, schedule=PLAN), PLAN, None)
    )
