"""Sparse deltas against dense NumPy arrays built entry by entry."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.sparse_cases import CASES, gathered, make, places

from spiel_jax.sparse.delta import (
    SparseDelta,
    base_entries,
    gather,
    merge,
    set_entries,
    stack_layers,
    unmerge,
)
from spiel_jax.sparse.linear import propose


@pytest.mark.parametrize("case", CASES)
def test_merge_gather_set_and_gradient_equal_numpy(case):
    weight, delta = make(**CASES[case])
    factor = np.random.default_rng(1).normal(size=weight.shape).astype(np.float32)
    entries = np.random.default_rng(2).normal(size=delta.indices.shape).astype(np.float32)

    @jax.jit
    def everything(weight, delta, entries):
        def loss(values, weight):
            merged = merge({"w": weight}, {"w": delta.with_values(values)})["w"]
            return jnp.sum(merged * factor), merged

        gradients, merged = jax.grad(loss, (0, 1), has_aux=True)(delta.values, weight)
        return merged, gradients, gather(weight, delta), set_entries(weight, delta, entries)

    merged, gradients, taken, changed = everything(weight, delta, entries)
    expected_merged, expected_changed = weight.copy(), weight.copy()
    for slot, entry in places(delta):
        expected_merged[entry] += np.asarray(delta.values)[slot]
        expected_changed[entry] = entries[slot]
    np.testing.assert_array_equal(merged, expected_merged)
    np.testing.assert_array_equal(changed, expected_changed)
    np.testing.assert_array_equal(taken, gathered(weight, delta))
    np.testing.assert_array_equal(gradients[0], gathered(factor, delta))
    np.testing.assert_array_equal(gradients[1], factor)


@pytest.mark.parametrize("case", ["matrix", "stack", "two stack axes", "layers and grid"])
def test_merge_of_bfloat16_weights_is_rounded_once_and_differentiable(case):
    weight, delta = make(**CASES[case])
    weight = jnp.array(weight, jnp.bfloat16)

    @jax.jit
    def value_and_gradient(values):
        def loss(values):
            merged = merge({"w": weight}, {"w": delta.with_values(values)})["w"]
            return jnp.sum(merged.astype(jnp.float32) * 2), merged

        return jax.grad(loss, has_aux=True)(values)

    gradient, merged = value_and_gradient(delta.values)
    expected = np.asarray(weight).copy()
    for slot, entry in places(delta):
        total = np.float32(expected[entry]) + np.asarray(delta.values)[slot]
        expected[entry] = total.astype(expected.dtype)
    assert merged.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(merged), expected)
    assert gradient.dtype == jnp.float32
    np.testing.assert_array_equal(gradient, 2 * gathered(np.ones(weight.shape, np.float32), delta))


def test_merge_rounds_the_sum_and_not_the_delta():
    # 1 + 2^-8 is half way between two bfloat16 numbers; the delta is a little more, and would lose it
    delta = SparseDelta(jnp.array([0]), jnp.array([2**-8 * (1 + 2**-9)]), (1, 1))
    merged = merge({"w": jnp.ones((1, 1), jnp.bfloat16)}, {"w": delta})["w"]
    assert float(merged[0, 0]) == 1 + 2**-7


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("case", ["matrix", "stack", "layers", "stack and grid"])
def test_unmerge_restores_every_bit(case, dtype):
    weight, delta = make(**CASES[case])
    params = {"w": jnp.array(weight, dtype), "b": jnp.ones(3, dtype)}
    # the sums lose the base's bits, overflow, or are no numbers
    hard = np.resize([1e30, 3.4e38, -np.inf, np.nan, 1e-30, 1.0], delta.values.shape).astype(np.float32)

    @jax.jit
    def there_and_back(params, delta):
        base = base_entries(params, {"w": delta})
        merged = merge(params, {"w": delta})
        return base, merged, unmerge(merged, {"w": delta}, base)

    base, merged, back = there_and_back(params, delta.with_values(jnp.array(hard)))
    assert base["w"].dtype == dtype
    assert not np.array_equal(np.asarray(merged["w"]), np.asarray(params["w"]))
    for name in params:
        assert np.asarray(back[name]).tobytes() == np.asarray(params[name]).tobytes()


def test_targets_on_parts_of_one_stack_are_merged_one_after_the_other():
    weight, first = make((5, 7), 6, (4,), layers=(0, 3))
    _, second = make((5, 7), 4, (4,), layers=(2,), seed=1)
    deltas = {"block.w@0,3": first, "block.w@2": second}
    merged = merge({"block": {"w": weight}}, deltas)["block"]["w"]
    expected = weight.copy()
    for delta in deltas.values():
        for slot, entry in places(delta):
            expected[entry] += np.asarray(delta.values)[slot]
    np.testing.assert_array_equal(merged, expected)
    taken = base_entries({"block": {"w": jnp.array(weight)}}, deltas)
    assert list(taken) == list(deltas)
    np.testing.assert_array_equal(taken["block.w@2"], gathered(weight, second))


def test_unknown_names_list_the_known_ones():
    _, delta = make(**CASES["matrix"])
    params = {"mlp": {"up": jnp.zeros((5, 7)), "down": jnp.zeros((5, 7))}}
    message = r"no parameter 'mlp\.gate': expected one of mlp\.down, mlp\.up"
    for call in (
        merge,
        base_entries,
        partial(unmerge, base={"mlp.gate": delta.values}),
        partial(propose, count={}),
    ):
        with pytest.raises(KeyError, match=message):
            call(params, {"mlp.gate": delta})


def test_sort_orders_positions_within_each_block_and_takes_values_along():
    weight, delta = make(**CASES["stack and grid"])
    ordered = delta.sort()
    assert np.all(np.diff(ordered.indices, axis=-1) > 0)
    assert (ordered.shape, ordered.grid, ordered.layers) == (delta.shape, delta.grid, delta.layers)
    np.testing.assert_array_equal(
        merge({"w": weight}, {"w": ordered})["w"], merge({"w": weight}, {"w": delta})["w"]
    )
    np.testing.assert_array_equal(delta.with_values(None).sort().indices, ordered.indices)


def test_spread_joins_layers():
    _, first = make((5, 7), 6, (4,), layers=(0, 3))
    _, second = make((5, 7), 4, (4,), layers=(2,), seed=1)
    weight = np.zeros((4, 5, 7), np.float32)
    joined = stack_layers([first, second], 4)
    assert joined.layers is None
    assert joined.indices.shape == joined.values.shape == (4, 6)
    assert np.all(np.asarray(joined.indices[1]) == 35)  # layer 1 has unused slots only
    separately = merge({"w": weight}, {"w@0,3": first, "w@2": second})["w"]
    np.testing.assert_array_equal(merge({"w": weight}, {"w": joined})["w"], separately)
    np.testing.assert_array_equal(stack_layers([first.with_values(None)], 4).indices[0], first.indices[0])

    def loss(values):
        return jnp.sum(stack_layers([first, second.with_values(values)], 4).values[2] * jnp.arange(6.0))

    np.testing.assert_array_equal(jax.grad(loss)(second.values), [[0.0, 1.0, 2.0, 3.0]])


# -------------------------------------------------------------------------------------------- sparse_linear
