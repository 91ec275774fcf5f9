import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spiel_jax.data.chat import Encoded
from spiel_jax.data.examples import Examples
from spiel_jax.data.packing import empty_row, fill_row, plan_rows


def rows(plan):
    return [plan[row].tolist() for row in range(len(plan))]


def test_best_fit_by_hand():
    lengths = np.array([6, 4, 3, 5, 2])  # 5, 3, 2, 4 and 1 slots
    plan = plan_rows(np.arange(5), lengths, sequence_length=8)
    # 5 opens row 0 (3 left), 3 fills it; 2 opens row 1 (6 left), 4 goes there (2 left), 1 too.
    assert rows(plan) == [[0, 1], [2, 3, 4]]
    assert plan.fill == 15 / 16
    # 2 opens row 0 (6 left), 5 goes there (1 left), 4 opens row 1 (4 left), 1 fits best in row 0.
    assert rows(plan_rows(np.array([2, 0, 3, 4, 1]), lengths, 8)) == [[2, 0, 4], [3, 1]]


def test_one_example_per_row():
    plan = plan_rows(np.array([2, 0, 1]), np.array([3, 5, 2]), 4, packing=False)
    assert rows(plan) == [[2], [0], [1]]
    assert plan.fill == (2 + 4 + 1) / 12


def test_nothing_to_plan():
    plan = plan_rows(np.arange(0), np.zeros(0), 4)
    assert len(plan) == 0
    assert plan.fill == 0


@pytest.mark.parametrize(("length", "message"), [(6, "example 1 has 6"), (1, "example 1 has 1")])
def test_examples_that_fit_no_row(length, message):
    with pytest.raises(ValueError, match=message + " tokens: a row of 4 takes 2 to 5"):
        plan_rows(np.arange(2), np.array([3, length]), 4)


@given(st.data())
def test_no_example_is_lost_or_doubled(data):
    size = data.draw(st.integers(1, 40))
    lengths = np.array(data.draw(st.lists(st.integers(2, size + 1), min_size=1, max_size=600)))
    order = np.array(data.draw(st.permutations(range(len(lengths)))))
    packing = data.draw(st.booleans())
    plan = plan_rows(order, lengths, size, packing=packing)
    used = [int((lengths[plan[row]] - 1).sum()) for row in range(len(plan))]
    assert sorted(plan.examples.tolist()) == list(range(len(lengths)))
    assert all(0 < slots <= size for slots in used)
    assert plan.fill == pytest.approx(sum(used) / (len(used) * size))
    if not packing:
        assert plan.examples.tolist() == order.tolist()
    elif len(plan) <= 256:  # no row was ever closed: no two rows could have been one
        assert sum(used) > size * (len(plan) - 1) / 2


def test_rows_are_closed_when_too_many_are_open():
    # 300 examples of 3 slots cannot share rows of 5; then 300 of 2 fill the last 256 rows only.
    lengths = np.array([4] * 300 + [3] * 300)
    plan = plan_rows(np.arange(600), lengths, 5)
    assert sum(len(row) == 1 for row in rows(plan)) == 44
    assert rows(plan)[:44] == [[i] for i in range(44)]
    assert rows(plan)[44] == [44, 300]
    assert rows(plan)[300] == [556, 557]


def test_a_packed_row_by_hand():
    examples = Examples.of(
        [
            Encoded(np.array([5, 6, 7], np.int32), np.array([False, True, True])),
            Encoded(np.array([8, 9], np.int32), np.array([True, True])),
            Encoded(np.array([1, 2, 3], np.int32), np.array([False, False, True])),
        ]
    )
    plan = plan_rows(np.arange(3), examples.lengths, 6)
    row = fill_row(examples, plan, 0)
    assert {key: array.tolist() for key, array in row.items()} == {
        "tokens": [5, 6, 8, 1, 2, 0],
        "labels": [6, 7, 9, 2, 3, 0],
        "weights": [1, 1, 1, 0, 1, 0],
        "positions": [0, 1, 0, 0, 1, 0],
        "segment_ids": [1, 1, 2, 3, 3, 0],
    }
    dtypes = {key: array.dtype for key, array in row.items()}
    assert dtypes == {key: array.dtype for key, array in empty_row(6).items()}
    assert dtypes.pop("weights") == np.float32
    assert set(dtypes.values()) == {np.dtype(np.int32)}
    assert all(not array.any() and array.shape == (6,) for array in empty_row(6).values())


@given(st.data())
def test_rows_give_back_their_examples(data):
    lengths = data.draw(st.lists(st.integers(2, 9), min_size=1, max_size=20))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    examples = Examples.of([Encoded(rng.integers(1, 99, n, np.int32), rng.random(n) < 0.5) for n in lengths])
    plan = plan_rows(np.arange(len(lengths)), examples.lengths, 8)
    for row in range(len(plan)):
        arrays = fill_row(examples, plan, row)
        for segment, index in enumerate(plan[row], start=1):
            mask = arrays["segment_ids"] == segment
            tokens, supervised = examples[index].tokens, examples[index].supervised
            assert arrays["tokens"][mask].tolist() == tokens[:-1].tolist()
            assert arrays["labels"][mask].tolist() == tokens[1:].tolist()
            assert arrays["weights"][mask].tolist() == supervised[1:].tolist()
            assert arrays["positions"][mask].tolist() == list(range(len(tokens) - 1))
        assert not arrays["weights"][arrays["segment_ids"] == 0].any()
