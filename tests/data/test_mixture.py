import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spiel_jax.data.mixture import epoch_counts, epoch_order, heldout_mask


def test_heldout_mask():
    mask = heldout_mask(10, 3, seed=0)
    assert mask.sum() == 3
    assert (mask == heldout_mask(10, 3, seed=0)).all()
    assert len({heldout_mask(10, 3, seed).tobytes() for seed in range(5)}) > 1


def test_counts_by_hand():
    assert epoch_counts([10, 30], None) == [10, 30]
    assert epoch_counts([10, 30], [1, 1]) == [20, 20]
    assert epoch_counts([10, 30], [3, 1]) == [30, 10]
    # 10 / 3 each: the first of equal remainders gets the one left over.
    assert epoch_counts([2, 3, 5], [1, 1, 1]) == [4, 3, 3]
    with pytest.raises(ValueError, match="leave a source without an example in an epoch of 4"):
        epoch_counts([2, 2], [1, 0.01])


@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=4),
    st.integers(0, 5),
    st.integers(0, 3),
)
def test_without_weights_an_epoch_has_every_example_once(sizes, seed, epoch):
    order = epoch_order(sizes, epoch_counts(sizes, None), seed, epoch)
    assert sorted(order.tolist()) == list(range(sum(sizes)))


def test_passes_through_a_source_continue_across_epochs():
    # 3 and 9 examples, 6 of each per epoch: the first twice, the second two thirds of a pass.
    orders = [epoch_order([3, 9], [6, 6], seed=0, epoch=epoch) for epoch in range(3)]
    for order in orders:
        assert np.bincount(order[order < 3]).tolist() == [2, 2, 2]
    second = np.concatenate([order[order >= 3] for order in orders])
    assert np.bincount(second - 3).tolist() == [2] * 9  # 18 of them, two passes
    assert len(set(orders[0][orders[0] >= 3].tolist())) == 6


def test_order_depends_on_seed_and_epoch_alone():
    order = epoch_order([50], [50], 1, 2)
    assert (order == epoch_order([50], [50], 1, 2)).all()
    assert (order != epoch_order([50], [50], 2, 2)).any()
    assert (order != epoch_order([50], [50], 1, 1)).any()


def test_every_pass_through_a_source_is_shuffled_anew():
    # Half of the first source's eight examples in each epoch: a pass takes two epochs.
    halves = [epoch_order([8, 8], [4, 12], seed=0, epoch=epoch) for epoch in range(0, 12, 2)]
    assert len({tuple(sorted(order[order < 8].tolist())) for order in halves}) > 1
