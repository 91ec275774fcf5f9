"""Reselections of matrices with unused slots, against sorting in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import spiel_jax as sj
from spiel_jax.optim.criteria.accumulated_gradients import AccumulatedGradients, CandidateStats
from spiel_jax.optim.criteria.moment_approximation import MomentApproximation
from spiel_jax.optim.own_budgets import reselect_matrix

ROWS, COLUMNS, SLOTS = 4, 6, 9
SIZE = ROWS * COLUMNS
TARGET = sj.Target((ROWS, COLUMNS), SLOTS)

few = settings(max_examples=80, deadline=None, database=None, derandomize=True)
permuted = st.permutations(range(SIZE)).map(np.array)
used = st.lists(st.booleans(), min_size=SLOTS, max_size=SLOTS).map(np.array)
small = st.integers(0, 3).map(float)


def numbers(count):
    return st.lists(small, min_size=count, max_size=count).map(lambda drawn: np.array(drawn, np.float32))


def expected(indices, values, n, ranking):
    """Active positions after a reselection of n, and how many slots are still unused.

    ``ranking`` has what may be grown, best first, whatever is active.
    """
    active = indices < SIZE
    filled = min(n, int(np.sum(~active)))
    order = np.lexsort((indices[active], np.abs(values[active])))
    dropped = set(indices[active][order][: n - filled])
    kept = set(indices[active]) - dropped
    grown = [position for position in ranking if position not in kept][:n]
    return kept | set(grown), SLOTS - len(kept) - len(grown)


def check(result, indices, wanted, unused):
    new, replaced = np.asarray(result[0]), np.asarray(result[1])
    assert sorted(new) == sorted(wanted) + [SIZE] * unused
    np.testing.assert_array_equal(new[~replaced], indices[~replaced])


def reselect(indices, values, stats, **options):
    updates = values / 4  # moved by an update, as in a step; exact
    return reselect_matrix(indices, values - updates, updates, stats, target=TARGET, **options)


@jax.jit
def by_moments(indices, values, row, column, n):
    growth = MomentApproximation()
    return reselect(indices, values, (row, column), n=n, growth=growth)


@few
@given(permuted, used, numbers(SLOTS), numbers(ROWS), numbers(COLUMNS), st.integers(0, SLOTS))
def test_moment_approximation_fills_unused_slots_first(order, used, values, row, column, n):
    indices = np.where(used, order[:SLOTS], SIZE).astype(np.int32)
    values = np.where(used, values, 0).astype(np.float32)
    scores = np.outer(row, column).ravel()
    # dropped entries do not come back
    ranking = [p for p in np.argsort(-scores, kind="stable") if p not in set(indices)]
    wanted, unused = expected(indices, values, n, ranking)
    check(by_moments(indices, values, row, column, n), indices, wanted, unused)
    assert int(MomentApproximation().available(None, jnp.array(indices), TARGET)) == SIZE - used.sum()


@jax.jit
def by_gradients(indices, values, candidates, sums, n):
    count = jnp.ones((), jnp.int32)
    stats = CandidateStats(candidates, sums, sums**2, count, count)
    growth = AccumulatedGradients(seeds="both")
    *result, seeds = reselect(indices, values, stats, n=n, growth=growth)
    return *result, seeds["mu"]


@few
@given(permuted, permuted, used, used, numbers(SLOTS), numbers(SLOTS), st.integers(0, SLOTS))
def test_accumulated_gradients_fill_unused_slots_first(order, others, used, given, values, sums, n):
    indices = np.where(used, order[:SLOTS], SIZE).astype(np.int32)
    values = np.where(used, values, 0).astype(np.float32)
    inactive = [p for p in others if p not in set(indices)][:SLOTS]  # as proposed
    candidates = np.where(given, inactive, SIZE).astype(np.int32)
    n = min(n, int(given.sum())) if given.sum() < SLOTS else n  # what `available` makes of it
    slots = np.lexsort((candidates, -sums))
    ranking = [candidates[slot] for slot in slots if candidates[slot] < SIZE]
    wanted, unused = expected(indices, values, n, ranking)
    result = by_gradients(indices, values, candidates, sums, n)
    check(result, indices, wanted, unused)
    of = dict(zip(candidates, sums, strict=True))
    for position, replaced, mu in zip(*result, strict=True):
        if replaced:
            assert float(mu) == pytest.approx(0.1 * of[int(position)], rel=1e-5)


@pytest.mark.parametrize("inner", [sj.aged_adamw(0.1), sj.sparse_sm3(0.1, {"w": TARGET}), optax.lion(0.1)])
def test_unused_slots_stay_at_zero_until_they_are_filled(inner):
    plan = sj.Reselection(30, every=4, accumulation=4, rate=sj.constant(0.25), first=None)
    tx = sj.spiel(inner, {"w": TARGET}, growth=MomentApproximation(), schedule=plan)
    values = sj.zeros({"w": TARGET})
    indices = jnp.array([3, SIZE, 17, SIZE, SIZE, 8, 0, SIZE, SIZE], jnp.int32)
    state = sj.place(tx.init(values), {"w": TARGET.delta(indices)})
    update, unused = jax.jit(tx.update), []
    for _ in range(12):
        free = state.active["w"].indices == SIZE
        updates, state = update({"w": jnp.where(free, 0.0, 1.0)}, state, values)
        values = optax.apply_updates(values, updates)
        assert np.all(np.isfinite(values["w"]))
        free = state.active["w"].indices == SIZE
        assert not np.any(values["w"][free])
        unused.append(int(free.sum()))
    assert unused == [5] * 3 + [3] * 4 + [1] * 4 + [0]  # two at a time
