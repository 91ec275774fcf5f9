"""The linear that collects a sparse gradient, against dense gradients."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from support.programs import AS_USERS
from support.sparse_cases import CASES, gathered, make

from spiel_jax.ops.matmul import linear
from spiel_jax.sparse.delta import SparseDelta, merge
from spiel_jax.sparse.linear import SparseLinear, candidates_from_proposal, propose, sparse_linear


def products(shape=(4, 6), tokens=(2, 3), dtype=jnp.float32, seed=3):
    rng = np.random.default_rng(seed)
    arrays = [(*tokens, shape[1]), shape, (*tokens, shape[0])]
    return [jnp.array(rng.normal(size=shape), dtype) for shape in arrays]  # x, weight, dy


def dense_gradient(x, dy) -> np.ndarray:
    x, dy = (np.asarray(a.astype(jnp.float32), np.float64).reshape(-1, a.shape[-1]) for a in (x, dy))
    return dy.T @ x


@jax.jit
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
    y, dx, dw, cotangent = pull_back(x, weight, adapter, dy)

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
    y, dx, _, cotangent = pull_back(x, weight, adapter, dy)
    np.testing.assert_array_equal(y, linear(x, weight))
    assert np.all(dx != 0)
    for part in (cotangent.active.values, cotangent.candidates.values, cotangent.proposal):
        assert not np.any(part)
    *_, cotangent = pull_back(x, weight, replace(adapter, enabled=jnp.array(True)), dy)
    np.testing.assert_allclose(cotangent.active.values, gathered(dense_gradient(x, dy), active), rtol=1e-5)


def test_unmerged_adapter_equals_merge_then_linear():
    x, weight, dy = products()
    _, active = make((4, 6), 10)

    def dense(x, values):
        return linear(x, merge({"w": weight}, {"w": active.with_values(values)})["w"])

    y, dx, _, cotangent = pull_back(x, weight, SparseLinear(active, merged=False), dy)
    expected, pull = jax.vjp(dense, x, active.values)
    np.testing.assert_array_equal(y, expected)
    assert not np.array_equal(y, linear(x, weight))
    for found, wanted in zip((dx, cotangent.active.values), pull(dy), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-6)


def test_gradients_of_bfloat16_layers_are_not_rounded_to_bfloat16():
    x, weight, dy = products((24, 16), (64,), jnp.bfloat16)
    _, active = make((24, 16), 200)
    y, dx, _, cotangent = pull_back(x, weight, SparseLinear(active, proposal=jnp.zeros((3, 50))), dy)
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
    found = jax.jit(lambda w: propose({"w": w}, {"w@0,2": active}, {"w@0,2": count}))(weight)["w@0,2"]
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
        return lowered.compile(AS_USERS).memory_analysis().temp_size_in_bytes

    few, many = temporaries(4), temporaries(16)
    assert few > dense  # what is measured includes the one gradient
    assert many - few < 12 * dense / 8
