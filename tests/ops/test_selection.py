"""Selection against sorting in NumPy, and by hand.

Each function is compiled for a few fixed shapes and called with many contents.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.programs import AS_USERS

from spiel_jax.ops import selection

kth_largest = jax.jit(selection.kth_largest)
largest = jax.jit(selection.largest)
drop = jax.jit(selection.drop, static_argnums=3)
isin = jax.jit(selection.isin, static_argnums=2)
compact = jax.jit(selection.compact, static_argnums=(2, 3))
replace_dropped = jax.jit(selection.replace_dropped, static_argnums=3)
top_magnitudes = jax.jit(selection.top_magnitudes, static_argnums=1)
top_products = jax.jit(selection.top_products, static_argnames=("slots", "combine"))

few = settings(max_examples=80, deadline=None, database=None, derandomize=True)
SLOTS = 12
floats = st.sampled_from([0.0, 1.0, 2.0, -1.0, 3.5, np.nan, np.inf])


def arrays(elements: st.SearchStrategy, slots: int = SLOTS) -> st.SearchStrategy:
    return st.lists(elements, min_size=slots, max_size=slots).map(np.array)


def distinct(size: int, slots: int = SLOTS) -> st.SearchStrategy:
    return st.permutations(range(size)).map(lambda p: np.array(p[:slots], np.int32))


def partly_used(size: int, slots: int = SLOTS) -> st.SearchStrategy:
    """Distinct positions, and ``size`` in some of the slots: none to all of them."""
    used = arrays(st.booleans(), slots) | st.booleans().map(lambda all_or_none: np.full(slots, all_or_none))
    return st.tuples(distinct(size, slots), used).map(
        lambda drawn: np.where(drawn[1], drawn[0], size).astype(np.int32)
    )


def best(scores: np.ndarray, positions: np.ndarray, n: int) -> np.ndarray:
    """Slots of the n largest scores that are not NaN, equal ones by position, by sorting."""
    able = np.flatnonzero(~np.isnan(scores))
    return able[np.lexsort((positions[able], -scores[able]))][:n]


def contents(shape: tuple[int, ...], seed: int = 0):
    """Matrices of every kind that makes selection hard, by name."""
    rng = np.random.default_rng(seed)
    normal = rng.normal(size=shape).astype(np.float32)
    some = rng.random(shape) < 0.3
    yield "normal", normal
    yield "ties", rng.integers(-2, 3, shape).astype(np.float32)
    yield "zeros", np.zeros(shape, np.float32)
    yield "constant", np.full(shape, -7.0, np.float32)
    yield "mostly zero", np.where(rng.random(shape) < 0.05, normal, 0).astype(np.float32)
    yield "wide", (normal * 10.0 ** rng.integers(-15, 15, shape)).astype(np.float32)
    yield "infinite", np.where(some, np.inf, normal).astype(np.float32)
    yield "some NaN", np.where(some, np.nan, rng.integers(-2, 3, shape)).astype(np.float32)
    yield "all NaN", np.full(shape, np.nan, np.float32)


# ---------------------------------------------------------------------------------------------- kth_largest


def test_kth_largest_by_hand():
    magnitudes = jnp.array([4.0, 0.0, 2.0, jnp.nan, 4.0, jnp.inf])
    found = [float(kth_largest(magnitudes, n)) for n in (1, 2, 3, 4)]
    assert found == [np.inf, 4.0, 4.0, 2.0]
    # XLA's CPU code takes subnormal numbers for 0, so 0 may come back as the largest of them
    assert float(kth_largest(magnitudes, 5)) < np.finfo(np.float32).tiny
    assert float(kth_largest(magnitudes, 6)) == 0.0  # only five can be chosen


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_kth_largest_is_an_entry_of_that_rank(dtype):
    magnitudes = jnp.abs(jax.random.normal(jax.random.key(0), (100,))).astype(dtype)
    ordered = np.sort(np.asarray(magnitudes.astype(jnp.float32)))[::-1]
    for n in (1, 2, 50, 99, 100):
        found = kth_largest(magnitudes, n)
        assert found.dtype == dtype
        assert float(found) == ordered[n - 1]


def test_kth_largest_tells_float64_neighbours_apart():
    with jax.enable_x64(True):
        base = np.float64(1.0)
        magnitudes = np.array([base, np.nextafter(base, 2), np.nextafter(base, 0), 1e300, 1e-300])
        ordered = np.sort(magnitudes)[::-1]
        for n in range(1, 6):
            found = kth_largest(jnp.asarray(magnitudes), n)
            assert found.dtype == jnp.float64
            assert float(found) == ordered[n - 1]


# --------------------------------------------------------------------------------------------- largest, drop


def test_largest_by_hand():
    scores = jnp.array([1.0, 5.0, 5.0, 0.0, 5.0])
    positions = jnp.array([8, 30, 10, 2, 20])
    marks = {n: list(np.flatnonzero(largest(scores, positions, n))) for n in range(6)}
    assert marks == {0: [], 1: [2], 2: [2, 4], 3: [1, 2, 4], 4: [0, 1, 2, 4], 5: [0, 1, 2, 3, 4]}


def test_largest_never_chooses_nan():
    scores = jnp.array([jnp.nan, 1.0, jnp.nan, 0.0])
    positions = jnp.array([0, 1, 2, 3])
    assert list(largest(scores, positions, 4)) == [False, True, False, True]
    assert not any(largest(jnp.full((4,), jnp.nan), positions, 4))


@few
@given(arrays(floats), distinct(40), st.integers(0, SLOTS))
def test_largest_equals_sorting(scores, positions, n):
    scores = np.abs(scores).astype(np.float32)
    marks = largest(scores, positions, n)
    assert set(np.flatnonzero(marks)) == set(best(scores, positions, n))


def test_largest_at_the_last_position_of_int32():
    positions = jnp.array([2**31 - 2, 0, 2**31 - 3])
    assert list(largest(jnp.ones(3), positions, 2)) == [False, True, True]
    assert list(largest(jnp.ones(3), positions, 3)) == [True, True, True]


def test_drop_by_hand():
    values = jnp.array([0.5, 0.0, -0.25, 0.0, 0.25, -0.0])
    indices = jnp.array([3, 9, 50, 4, 7, 6])
    marks = {n: list(np.flatnonzero(drop(values, indices, n, 60))) for n in range(7)}
    # zeros first, by position 4, 6, 9; then |0.25| by position 7, 50; then 0.5
    assert marks == {
        0: [],
        1: [3],
        2: [3, 5],
        3: [1, 3, 5],
        4: [1, 3, 4, 5],
        5: [1, 2, 3, 4, 5],
        6: [0, 1, 2, 3, 4, 5],
    }


@few
@given(arrays(floats), partly_used(40), st.integers(0, SLOTS))
def test_drop_equals_sorting(values, indices, n):
    moved = np.where(np.isnan(values), np.inf, np.abs(values))  # NaN is not "moved least"
    unused = list(np.flatnonzero(indices == 40))[:n]  # they go before any entry, even one that is 0
    moved[indices == 40] = np.nan
    marks = drop(values.astype(np.float32), indices, n, 40)
    assert set(np.flatnonzero(marks)) == {*unused, *best(-moved, indices, n - len(unused))}


def test_drop_does_not_depend_on_the_order_of_slots():
    rng = np.random.default_rng(0)
    values, indices = rng.integers(-2, 3, 50).astype(np.float32), rng.permutation(200)[:50]
    order = rng.permutation(50)
    marks = drop(values, indices, 20, 200)
    np.testing.assert_array_equal(drop(values[order], indices[order], 20, 200), marks[order])


def test_drop_of_bfloat16_values():
    values = jnp.array([0.3, -0.1, 0.2], jnp.bfloat16)
    assert list(drop(values, jnp.array([0, 5, 7]), 2, 8)) == [False, True, True]


# --------------------------------------------------------------------------------------------- isin, compact


@pytest.mark.parametrize("size", [1, 31, 32, 33, 100])
def test_isin_equals_numpy(size):
    rng = np.random.default_rng(size)
    for members_used in {0, 1, size // 2, size}:
        members = np.full(size + 3, size, np.int32)  # the rest are unused slots
        members[:members_used] = rng.permutation(size)[:members_used]
        positions = np.concatenate([rng.permutation(size), [size, size + 1, 10 * size + 64]]).astype(np.int32)
        expected = np.isin(positions, members) & (positions < size)
        np.testing.assert_array_equal(isin(positions, members, size), expected)


def test_isin_of_nothing():
    none = jnp.zeros((0,), jnp.int32)
    assert not any(isin(jnp.arange(3), none, 3))
    assert isin(none, jnp.arange(3), 3).shape == (0,)


def test_compact_by_hand():
    payload = jnp.array([5, 6, 7, 8])
    mask = jnp.array([False, True, False, True])
    assert list(compact(mask, payload, 3, -1)) == [6, 8, -1]
    assert list(compact(mask, payload, 1, -1)) == [6]
    assert list(compact(jnp.zeros(4, bool), payload, 2, 9)) == [9, 9]


# ------------------------------------------------------------------------------------------- replace_dropped


def test_replace_by_hand():
    indices = jnp.array([10, 20, 30, 40])
    dropped = jnp.array([True, False, True, True])
    # 30 is both dropped and grown: its slot is left alone
    new = replace_dropped(indices, dropped, jnp.array([30, 5, 99, 100]), 100)
    assert list(new.indices) == [5, 20, 30, 99]
    assert list(new.replaced) == [True, False, False, True]
    assert [int(s) for s, r in zip(new.source, new.replaced, strict=True) if r] == [1, 2]


def test_replace_everything_and_nothing():
    indices = jnp.array([1, 0])
    everything = replace_dropped(indices, jnp.array([True, True]), jnp.array([3, 2]), 4)
    assert list(everything.indices) == [3, 2]
    nothing = replace_dropped(indices, jnp.array([False, False]), jnp.array([4, 4]), 4)
    assert list(nothing.indices) == [1, 0]
    assert not any(nothing.replaced)


@few
@given(partly_used(30), arrays(st.booleans()), st.permutations(range(30)), st.permutations(range(SLOTS)))
def test_replace_keeps_its_invariants(indices, dropped, others, slots):
    size, kept = 30, set(indices[~dropped])
    grown = [p for p in others if p not in kept][: dropped.sum()]
    incoming = np.full(SLOTS, size, np.int32)
    incoming[sorted(slots[: len(grown)]) or slice(0)] = grown  # unused slots anywhere
    new = jax.tree.map(np.asarray, replace_dropped(indices, dropped, incoming, size))

    used = new.indices[new.indices < size]
    assert set(new.indices) == kept | set(grown)
    assert len(set(used)) == used.size
    assert SLOTS - used.size == np.sum(indices[~dropped] == size)  # a dropped unused slot is filled
    np.testing.assert_array_equal(new.indices[~new.replaced], indices[~new.replaced])
    np.testing.assert_array_equal(new.replaced, dropped & ~np.isin(indices, grown))
    np.testing.assert_array_equal(incoming[new.source[new.replaced]], new.indices[new.replaced])
    assert np.all(np.diff(new.source[new.replaced]) > 0)  # paired in the order of their slots


# -------------------------------------------------------------------------------------------- top_magnitudes


def top_by_sorting(dense: np.ndarray, k: int, exclude: np.ndarray) -> np.ndarray:
    scores = np.abs(dense.reshape(-1)).astype(np.float64)
    scores[exclude[exclude < scores.size]] = np.nan
    chosen = np.sort(best(scores, np.arange(scores.size), k))
    return np.concatenate([chosen, np.full(k - chosen.size, scores.size)])


def test_top_magnitudes_by_hand():
    dense = jnp.array([[0.0, -3.0, 3.0], [jnp.nan, 1.0, -4.0]])
    assert list(top_magnitudes(dense, 2)) == [1, 5]
    assert list(top_magnitudes(dense, 2, jnp.array([5, 1]))) == [2, 4]
    assert list(top_magnitudes(dense, 6)) == [0, 1, 2, 4, 5, 6]  # NaN is never chosen
    assert list(top_magnitudes(dense, 0)) == []


@pytest.mark.parametrize(
    ("shape", "ks"),
    [
        ((1, 1), (1,)),
        ((1, 7), (3,)),
        ((9, 1), (9,)),
        ((5, 13), (1, 40, 65)),
        ((8, 8), (64,)),
        ((2, 3, 16), (33,)),
    ],
)
def test_top_magnitudes_equals_sorting(shape, ks):
    size = int(np.prod(shape))
    rng = np.random.default_rng(size)
    for k in ks:
        for name, dense in contents(shape):
            active = np.full(size, size, np.int32)
            active[: size // 3] = rng.permutation(size)[: size // 3]
            for exclude in (active, np.full(size, size, np.int32)):
                found = top_magnitudes(dense, k, exclude)
                np.testing.assert_array_equal(found, top_by_sorting(dense, k, exclude), err_msg=name)


LARGE, LARGE_K = (301, 199), 20_000  # large enough to be sampled, and no multiple of the block size


def sampled(dense: np.ndarray, k: int, exclude: np.ndarray) -> str | None:
    """What the bound from the sample is: "fits", "too high", "too low"; None where there is no sample."""
    flat = np.abs(dense.reshape(-1)).astype(np.float64)
    flat[exclude[exclude < flat.size]] = np.nan
    flat = np.pad(flat, (0, -flat.size % selection._BLOCK), constant_values=np.nan)
    sample = flat[:: selection._SAMPLE]
    rank, room = selection._sampling(k)
    if room >= dense.size // 2:
        return None
    entries = np.sort(sample[~np.isnan(sample)])[::-1]
    bound = entries[rank - 1] if rank <= entries.size else 0.0
    count = np.sum(flat >= bound)
    return "too high" if count < k else "too low" if count > room else "fits"


def large_contents():
    yield from contents(LARGE)
    rng = np.random.default_rng(1)
    flat = rng.normal(size=LARGE[0] * LARGE[1]).astype(np.float32)
    at = np.arange(flat.size) % selection._SAMPLE == 0
    yield "sampled entries huge", np.where(at, 1e6 + flat, flat).reshape(LARGE)
    yield "sampled entries tiny", np.where(at, 1e-6 * flat, flat).reshape(LARGE)
    yield "sampled entries NaN", np.where(at, np.nan, flat).reshape(LARGE)
    yield "sorted", np.sort(flat).reshape(LARGE)


def test_top_magnitudes_of_a_sampled_matrix_equals_sorting():
    size = LARGE[0] * LARGE[1]
    none = np.full(5000, size, np.int32)
    rng = np.random.default_rng(2)
    paths = {}
    for name, dense in large_contents():
        largest_ones = np.argsort(-np.abs(np.nan_to_num(dense)).reshape(-1))[:5000].astype(np.int32)
        for exclude in (none, rng.permutation(size)[:5000].astype(np.int32), largest_ones):
            found = top_magnitudes(dense, LARGE_K, exclude)
            np.testing.assert_array_equal(found, top_by_sorting(dense, LARGE_K, exclude), err_msg=name)
            paths.setdefault(sampled(dense, LARGE_K, exclude), set()).add(name)
    assert {"normal", "wide", "sorted"} <= paths["fits"]
    assert "sampled entries huge" in paths["too high"]
    assert {"constant", "zeros", "sampled entries tiny"} <= paths["too low"]


def test_top_magnitudes_of_bfloat16_gradients():
    dense = jax.random.normal(jax.random.key(0), LARGE).astype(jnp.bfloat16)  # many ties
    expected = top_by_sorting(np.asarray(dense.astype(jnp.float32)), LARGE_K, np.zeros(0, int))
    np.testing.assert_array_equal(top_magnitudes(dense, LARGE_K), expected)


def test_top_magnitudes_of_subnormal_entries_are_k_distinct_ones():
    dense = (1e-40 * np.arange(65)).astype(np.float32).reshape(5, 13)  # may count as zeros
    found = np.asarray(top_magnitudes(dense, 40, np.full(65, 65, np.int32)))
    assert len(set(found)) == 40
    assert found.max() < 65


def test_top_magnitudes_refuses_more_than_int32_positions():
    top = partial(selection.top_magnitudes, k=5)
    found = jax.eval_shape(top, jax.ShapeDtypeStruct((2**16 - 1, 2**15), jnp.float32))
    assert found.shape == (5,)
    for shape in [(2**31 - 1,), (2**16, 2**15)]:
        with pytest.raises(ValueError, match="do not fit int32 positions: use a finer block grid"):
            jax.eval_shape(top, jax.ShapeDtypeStruct(shape, jnp.float32))


def temporaries(function, *shapes: tuple[tuple[int, ...], type]) -> int:
    """Bytes that the compiled function needs besides its arguments and results."""
    arguments = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes]
    return jax.jit(function).lower(*arguments).compile(AS_USERS).memory_analysis().temp_size_in_bytes


def test_top_magnitudes_needs_no_second_dense_temporary():
    dense = 1024 * 1024 * 4
    top = partial(selection.top_magnitudes, k=10_000)
    matrix, active = ((1024, 1024), jnp.float32), ((10_000,), jnp.int32)
    assert temporaries(top, matrix) < 0.5 * dense
    assert temporaries(lambda dense, exclude: top(dense, exclude=exclude), matrix, active) < 1.5 * dense


# ---------------------------------------------------------------------------------------------- top_products


def products_by_sorting(row, column, n, exclude, combine) -> set[int]:
    with np.errstate(over="ignore"):
        scores = combine(row[:, None], column[None, :]).reshape(-1)
    scores = scores.astype(np.float64)
    scores[[position for position in exclude if position < scores.size]] = np.nan
    return set(best(scores, np.arange(scores.size), n))


def check_products(row, column, n, slots, exclude, combine=jnp.multiply, message=""):
    found = np.asarray(top_products(row, column, n, slots, exclude, combine=combine))
    size = row.size * column.size
    assert found.shape == (slots,)
    assert np.all(found[n:] == size), message
    assert len(set(found[:n])) == n, message
    reference = {jnp.multiply: np.multiply, jnp.minimum: np.minimum}[combine]
    assert set(found[:n]) == products_by_sorting(row, column, n, exclude, reference), message


def factors(shape: tuple[int, int]):
    for seed in range(2):
        for (name, row), (_, column) in zip(
            contents(shape[:1], seed), contents(shape[1:], seed + 9), strict=True
        ):
            if "NaN" in name or name == "infinite":
                continue
            yield name, np.abs(row), np.abs(column)
    yield "product overflows", np.full(shape[0], 1e30, np.float32), np.full(shape[1], 1e30, np.float32)


def test_top_products_by_hand():
    #          3   1   2
    #     2    6   2   4
    #     1    3   1   2
    row, column, none = np.array([2, 1], np.float32), np.array([3, 1, 2], np.float32), np.zeros(0, np.int32)

    def found(n, exclude=none, combine=jnp.multiply):
        positions = top_products(row, column, n, 4, exclude, combine=combine).tolist()
        assert positions[n:] == [6] * (4 - n)  # unused slots
        return sorted(positions[:n])

    assert found(0) == []
    assert found(1) == [0]
    assert found(3) == [0, 2, 3]
    assert found(4) == [0, 1, 2, 3]  # of two 2s, the lower position
    assert found(2, np.array([0, 3], np.int32)) == [1, 2]
    # minimum: [[2, 1, 2], [1, 1, 1]]
    assert found(3, combine=jnp.minimum) == [0, 1, 2]


@pytest.mark.parametrize("combine", [jnp.multiply, jnp.minimum])
@pytest.mark.parametrize(
    ("shape", "active"), [((1, 1), 0), ((1, 9), 3), ((9, 1), 0), ((5, 7), 11), ((16, 3), 40)]
)
def test_top_products_equals_sorting(shape, active, combine):
    size = shape[0] * shape[1]
    slots = size - active
    rng = np.random.default_rng(size)
    for name, row, column in factors(shape):
        exclude = rng.permutation(size)[:active].astype(np.int32)
        for n in {0, 1, slots // 2, slots}:
            check_products(row, column, n, slots, exclude, combine, name)
        exclude[::2] = size  # unused slots
        for n in {1, slots}:
            check_products(row, column, n, slots, exclude, combine, name)


@few
@given(arrays(st.integers(0, 3), 6), arrays(st.integers(0, 3), 8), partly_used(48, 10), st.integers(0, 20))
def test_top_products_with_ties_everywhere(row, column, exclude, n):
    check_products(row.astype(np.float32), column.astype(np.float32), n, 20, exclude)


def test_top_products_of_a_larger_matrix():
    shape, active, slots = (150, 130), 1000, 900
    rng = np.random.default_rng(0)
    for name, row, column in factors(shape):
        size = row.size * column.size
        top = np.array(sorted(products_by_sorting(row, column, active, [], np.multiply)), np.int32)
        for exclude in (top, rng.permutation(size)[:active].astype(np.int32)):
            for n in (1, 333, slots):
                check_products(row, column, n, slots, exclude, message=name)
        none = np.full(active, size, np.int32)
        check_products(row, column, slots, slots, none, message=name)


def test_top_products_in_float64():
    # products that float32 could not tell apart
    with jax.enable_x64(True):
        row = 1 + 1e-12 * np.random.default_rng(0).permutation(6)
        column = 1 + 1e-11 * np.random.default_rng(1).permutation(8)
        exclude = np.arange(5, dtype=np.int32)
        for n in (1, 7, 20):
            check_products(row, column, n, 20, exclude)


def test_top_products_never_forms_the_products():
    rows, columns, k = 2048, 1024, 4096
    vectors = ((rows,), jnp.float32), ((columns,), jnp.float32), ((k,), jnp.int32)
    needed = temporaries(
        lambda row, column, exclude: selection.top_products(row, column, k, k, exclude), *vectors
    )
    assert needed < rows * columns * 4 / 8
