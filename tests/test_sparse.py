"""Sparse deltas against dense NumPy arrays built entry by entry."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from spiel_jax.linear import linear
from spiel_jax.sparse import (
    SparseDelta,
    SparseLinear,
    base_entries,
    candidates_from_proposal,
    gather,
    merge,
    propose,
    set_entries,
    sparse_linear,
    spread,
    unmerge,
)

CASES = {
    "matrix": {"shape": (5, 7), "k": 6},
    "stack": {"shape": (5, 7), "k": 6, "stack": (3,)},
    "two stack axes": {"shape": (4, 3), "k": 5, "stack": (2, 2)},
    "layers": {"shape": (5, 7), "k": 6, "stack": (4,), "layers": (1, 3)},
    "grid": {"shape": (4, 6), "k": 3, "grid": (2, 2)},
    "stack and grid": {"shape": (3, 8), "k": 4, "stack": (2,), "grid": (1, 4)},
    "layers and grid": {"shape": (4, 6), "k": 3, "stack": (3,), "grid": (2, 2), "layers": (0, 2)},
}


def make(shape, k, stack=(), grid=(1, 1), layers=None, unused=1, seed=0) -> tuple[np.ndarray, SparseDelta]:
    """A random weight, and a delta on it whose positions are distinct, unsorted, and in part unused."""
    rng = np.random.default_rng(seed)
    block = shape[0] // grid[0] * (shape[1] // grid[1])
    lead = (len(layers),) if layers is not None else stack
    lead += () if grid == (1, 1) else grid
    indices = np.array([rng.permutation(block)[:k] for _ in range(int(np.prod(lead)))], np.int32)
    indices[:, k - unused :] = block
    indices = rng.permuted(indices, axis=1).reshape(*lead, k)
    values = rng.normal(size=indices.shape).astype(np.float32)
    weight = rng.normal(size=(*stack, *shape)).astype(np.float32)
    return weight, SparseDelta(jnp.array(indices), jnp.array(values), shape, grid, layers)


def places(delta: SparseDelta):
    """(slot, entry of the weight) of each slot in use."""
    rows, columns = delta.shape[0] // delta.grid[0], delta.shape[1] // delta.grid[1]
    for slot, index in np.ndenumerate(np.asarray(delta.indices)):
        if index == rows * columns:
            continue
        stack, block = slot[:-1], (0, 0)
        if delta.grid != (1, 1):
            stack, block = slot[:-3], slot[-3:-1]
        if delta.layers is not None:
            stack = (delta.layers[stack[0]],)
        yield slot, (*stack, block[0] * rows + index // columns, block[1] * columns + index % columns)


def gathered(weight: np.ndarray, delta: SparseDelta) -> np.ndarray:
    entries = np.zeros(delta.indices.shape, weight.dtype)
    for slot, entry in places(delta):
        entries[slot] = weight[entry]
    return entries


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
    joined = spread([first, second], 4)
    assert joined.layers is None
    assert joined.indices.shape == joined.values.shape == (4, 6)
    assert np.all(np.asarray(joined.indices[1]) == 35)  # layer 1 has unused slots only
    separately = merge({"w": weight}, {"w@0,3": first, "w@2": second})["w"]
    np.testing.assert_array_equal(merge({"w": weight}, {"w": joined})["w"], separately)
    np.testing.assert_array_equal(spread([first.with_values(None)], 4).indices[0], first.indices[0])

    def loss(values):
        return jnp.sum(spread([first, second.with_values(values)], 4).values[2] * jnp.arange(6.0))

    np.testing.assert_array_equal(jax.grad(loss)(second.values), [[0.0, 1.0, 2.0, 3.0]])


# -------------------------------------------------------------------------------------------- sparse_linear


def products(shape=(4, 6), tokens=(2, 3), dtype=jnp.float32, seed=3):
    rng = np.random.default_rng(seed)
    arrays = [(*tokens, shape[1]), shape, (*tokens, shape[0])]
    return [jnp.array(rng.normal(size=shape), dtype) for shape in arrays]  # x, weight, dy


def dense_gradient(x, dy) -> np.ndarray:
    x, dy = (np.asarray(a.astype(jnp.float32), np.float64).reshape(-1, a.shape[-1]) for a in (x, dy))
    return dy.T @ x


def pull_back(x, weight, adapter, dy):
    """y, and the cotangents of x, the weight and the adapter."""
    y, pull = jax.vjp(sparse_linear, x, weight, adapter)
    return y, *pull(dy)


def top_entries(gradient: np.ndarray, count: int, exclude: np.ndarray) -> np.ndarray:
    magnitudes = np.abs(gradient).reshape(-1)
    magnitudes[exclude[exclude < magnitudes.size]] = -1
    return np.sort(np.argsort(-magnitudes, kind="stable")[:count])


@pytest.mark.parametrize("propose_active", [False, True])
@pytest.mark.parametrize("grid", [(1, 1), (2, 2)])
def test_sparse_linear_collects_what_the_dense_gradient_holds(grid, propose_active):
    x, weight, dy = products()
    k = 10 if grid == (1, 1) else 3
    _, active = make((4, 6), k, grid=grid)
    _, candidates = make((4, 6), k, grid=grid, seed=5)
    proposal = jnp.zeros((*active.indices.shape[:-1], 3, 2))
    adapter = SparseLinear(active, candidates, proposal, propose_active=propose_active)
    y, dx, dw, cotangent = jax.jit(pull_back)(x, weight, adapter, dy)

    expected_y, pull = jax.vjp(linear, x, weight)
    np.testing.assert_array_equal(y, expected_y)
    np.testing.assert_allclose(dx, pull(dy)[0], rtol=1e-6, atol=1e-6)
    assert not np.any(dw)
    gradient = dense_gradient(x, dy)
    np.testing.assert_allclose(cotangent.active.values, gathered(gradient, active), rtol=1e-5)
    np.testing.assert_allclose(cotangent.candidates.values, gathered(gradient, candidates), rtol=1e-5)

    found = candidates_from_proposal(cotangent.proposal, active)
    assert found.indices.dtype == jnp.int32
    np.testing.assert_allclose(found.values, gathered(gradient, found), rtol=1e-5)
    rows, columns = active.block
    for block in np.ndindex(*active.indices.shape[:-1]):
        at = block or (0, 0)
        part = gradient[at[0] * rows : (at[0] + 1) * rows, at[1] * columns : (at[1] + 1) * columns]
        exclude = np.zeros(0, int) if propose_active else np.asarray(active.indices[block])
        np.testing.assert_array_equal(found.indices[block], top_entries(part, 2, exclude))
    if propose_active:  # it makes a difference here
        assert np.isin(found.indices, active.indices).any()


def test_proposal_with_more_slots_than_inactive_entries():
    x, weight, dy = products((2, 2))
    active = SparseDelta(jnp.array([1, 2, 0]), jnp.zeros(3), (2, 2))
    *_, cotangent = pull_back(x, weight, SparseLinear(active, proposal=jnp.zeros((3, 2))), dy)
    found = candidates_from_proposal(cotangent.proposal, active)
    assert list(found.indices) == [3, 4]  # 4 marks an unused slot
    assert float(found.values[1]) == 0


def test_disabled_layer_collects_zeros():
    x, weight, dy = products()
    _, active = make((4, 6), 10)
    adapter = SparseLinear(active, active, jnp.zeros((3, 2)), enabled=jnp.array(False))
    collect = jax.jit(pull_back)
    y, dx, _, cotangent = collect(x, weight, adapter, dy)
    np.testing.assert_array_equal(y, linear(x, weight))
    assert np.all(dx != 0)
    for part in (cotangent.active.values, cotangent.candidates.values, cotangent.proposal):
        assert not np.any(part)
    *_, cotangent = collect(x, weight, replace(adapter, enabled=jnp.array(True)), dy)
    np.testing.assert_allclose(cotangent.active.values, gathered(dense_gradient(x, dy), active), rtol=1e-5)


def test_unmerged_adapter_equals_merge_then_linear():
    x, weight, dy = products()
    _, active = make((4, 6), 10)

    def dense(x, values):
        return linear(x, merge({"w": weight}, {"w": active.with_values(values)})["w"])

    y, dx, _, cotangent = jax.jit(pull_back)(x, weight, SparseLinear(active, merged=False), dy)
    expected, pull = jax.vjp(dense, x, active.values)
    np.testing.assert_array_equal(y, expected)
    assert not np.array_equal(y, linear(x, weight))
    for found, wanted in zip((dx, cotangent.active.values), pull(dy), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-6)


def test_gradients_of_bfloat16_layers_are_not_rounded_to_bfloat16():
    x, weight, dy = products((24, 16), (64,), jnp.bfloat16)
    _, active = make((24, 16), 200)
    y, dx, _, cotangent = jax.jit(pull_back)(x, weight, SparseLinear(active, proposal=jnp.zeros((3, 50))), dy)
    assert y.dtype == dx.dtype == jnp.bfloat16
    expected = gathered(dense_gradient(x, dy), active)
    for found in (cotangent.active.values, cotangent.proposal[0]):
        assert found.dtype == jnp.float32
        rounded = found.astype(jnp.bfloat16).astype(jnp.float32)
        assert np.mean(np.asarray(found) != np.asarray(rounded)) > 0.9
    np.testing.assert_allclose(cotangent.active.values, expected, rtol=1e-5, atol=1e-5)


def stacked_loss(adapters, weights, x):
    """A scanned and rematerialised stack of layers tanh(W x)."""

    def layer(x, per_layer):
        weight, adapter = per_layer
        return jnp.tanh(adapter(x, weight)), None

    return jnp.sum(lax.scan(jax.checkpoint(layer), x, (weights, adapters))[0] ** 2)


def test_sparse_linear_in_a_scanned_and_rematerialised_stack():
    layers, width = 3, 8
    rng = np.random.default_rng(0)
    x = jnp.array(rng.normal(size=(5, width)), jnp.float32)
    weights, active = make((width, width), 12, (layers,), seed=1)
    weights = jnp.array(weights / 3)
    _, candidates = make((width, width), 7, (layers,), seed=2)
    enabled = jnp.array([True, False, True])
    adapters = SparseLinear(active, candidates, jnp.zeros((layers, 3, 4)), enabled)

    collected = jax.jit(jax.grad(stacked_loss, allow_int=True))(adapters, weights, x)

    def dense_loss(weights):
        y = x
        for weight in weights:
            y = jnp.tanh(y @ weight.T)
        return jnp.sum(y**2)

    gradient = np.array(jax.jit(jax.grad(dense_loss))(weights))
    gradient[1] = 0  # the disabled layer
    near = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
    near(collected.active.values, gathered(gradient, active))
    near(collected.candidates.values, gathered(gradient, candidates))
    found = candidates_from_proposal(collected.proposal, active)
    for layer in (0, 2):
        expected = top_entries(gradient[layer], 4, np.asarray(active.indices[layer]))
        np.testing.assert_array_equal(found.indices[layer], expected)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_propose_equals_the_proposal_of_sparse_linear(dtype):
    layers, rows, columns = 2, 12, 300  # columns past 256 are no bfloat16 numbers
    xs, weights, dys = products((rows, columns), (layers, 5))
    _, active = make((rows, columns), 20, (layers,))
    gradients = jnp.stack([jnp.array(dense_gradient(x, dy), dtype) for x, dy in zip(xs, dys, strict=True)])
    found = jax.jit(lambda g: propose({"w": g}, {"w": active}, {"w": 30}))(gradients)["w"]
    assert found.values.dtype == jnp.float32
    assert found.indices.shape == (layers, 30)
    for layer in range(layers):
        gradient = np.asarray(gradients[layer].astype(jnp.float32))
        expected = top_entries(gradient, 30, np.asarray(active.indices[layer]))
        np.testing.assert_array_equal(found.indices[layer], expected)
        np.testing.assert_array_equal(found.values[layer], gradient.reshape(-1)[expected])
        if dtype == jnp.float32:
            one = SparseDelta(active.indices[layer], active.values[layer], active.shape)
            adapter = SparseLinear(one, proposal=jnp.zeros((3, 30)))
            *_, cotangent = pull_back(xs[layer], weights, adapter, dys[layer])
            collected = candidates_from_proposal(cotangent.proposal, one)
            np.testing.assert_array_equal(found.indices[layer], collected.indices)
            np.testing.assert_allclose(found.values[layer], collected.values, rtol=1e-5)


def test_propose_of_some_layers_and_of_a_block_grid():
    weight, active = make(**CASES["layers and grid"])
    count = 2
    found = propose({"w": weight}, {"w@0,2": active}, {"w@0,2": count})["w@0,2"]
    assert (found.grid, found.layers) == (active.grid, active.layers)
    np.testing.assert_array_equal(found.values, gathered(weight, found))
    for slot in np.ndindex(2, 2, 2):
        part = gathered(weight, replace(active, indices=jnp.broadcast_to(jnp.arange(6), (2, 2, 2, 6))))[slot]
        expected = top_entries(part, count, np.asarray(active.indices[slot]))
        np.testing.assert_array_equal(found.indices[slot], expected)


def test_a_scanned_stack_holds_one_dense_gradient_at_a_time():
    width, tokens, k = 256, 4, 100
    dense = width * width * 4

    def temporaries(layers: int) -> int:
        shape = partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
        indices = jax.ShapeDtypeStruct((layers, k), jnp.int32)
        active = SparseDelta(indices, shape((layers, k)), (width, width))
        adapters = SparseLinear(active, proposal=shape((layers, 3, k)))
        gradient = jax.jit(jax.grad(stacked_loss, allow_int=True))
        lowered = gradient.lower(adapters, shape((layers, width, width)), shape((tokens, width)))
        return lowered.compile().memory_analysis().temp_size_in_bytes

    few, many = temporaries(4), temporaries(16)
    assert few > dense  # what is measured includes the one gradient
    assert many - few < 12 * dense / 8
