"""What every kind of stored weight does, the toy of the tests too; and models and merges on top of them."""

import dataclasses
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from support.sparse_cases import CASES, make
from support.weight_cases import KINDS, QUICK, RowScaled, bits, numbers, with_bit_changed

import spiel_jax as sj
from spiel_jax.distributed.mesh import make_mesh
from spiel_jax.errors import SpielError
from spiel_jax.methods.ia3 import ScaledLinear
from spiel_jax.methods.lora import LowRankLinear
from spiel_jax.methods.method import Method, TrainState
from spiel_jax.models import ModelConfig, abstract_params, bind, fingerprint, init_params
from spiel_jax.models.axes import param_sharding, weight_axes
from spiel_jax.models.decoder import ADAPTED
from spiel_jax.models.storage import Packed, kind_named, register, storage_for
from spiel_jax.models.storage.weight import nbytes
from spiel_jax.ops.matmul import linear
from spiel_jax.ops.stored import as_array, entries_at, is_stored, is_writable, with_entries
from spiel_jax.sparse.delta import set_entries

DOWN = "model.layers.mlp.down_proj.weight"
CONFIG = ModelConfig(
    vocab_size=40,
    hidden_size=16,
    intermediate_size=24,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    max_positions=64,
    tie_embeddings=False,
    initializer_range=0.3,
    attention_bias=True,
)
pytestmark = pytest.mark.filterwarnings("error")
dense, gathered, merged = jax.jit(as_array), jax.jit(sj.gather), jax.jit(sj.merge)


def kinds(quick):
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in KINDS]


@pytest.fixture(params=kinds(QUICK))
def case(request):
    return KINDS[request.param]


# what is the same as on arrays is told by arrays last
beside_arrays = pytest.mark.parametrize("case", kinds([n for n in QUICK if n != "dense"]), indirect=True)


@pytest.mark.parametrize("shape", [(4, 6), (3, 4, 6)])
def test_a_weight_stands_for_what_it_was_made_of(case, shape):
    array = jnp.array(numbers(*shape), case.dtype)
    weight = case.hold(array)
    assert is_stored(weight) == (case.kind is not None)
    assert (weight.shape, weight.dtype, weight.ndim, weight.size) == (
        shape,
        case.dtype,
        len(shape),
        array.size,
    )
    assert weight.nbytes == nbytes(weight) == sum(leaf.nbytes for leaf in jax.tree.leaves(weight))
    found = dense(weight)
    assert (found.shape, found.dtype) == (shape, case.dtype)
    if not case.error:
        assert bits(found) == bits(array)
    wide, exact = np.asarray(found, np.float32), np.asarray(array, np.float32)
    axes = (-2, -1) if case.blocks else -1
    assert np.all(np.abs(wide - exact) <= case.error * np.abs(exact).max(axis=axes, keepdims=True))
    assert bits(as_array(weight)) == bits(found)  # also outside of jit


def test_its_arrays_have_the_rank_of_the_weight_or_belong_to_a_matrix(case):
    shape = (3, 4, case.columns)
    for leaf in jax.tree.leaves(case.hold(numbers(*shape))):
        assert leaf.shape[0] == 3
        if leaf.ndim == 3:
            assert all(size == 1 or whole % size == 0 for size, whole in zip(leaf.shape, shape, strict=True))
        else:
            assert leaf.ndim == 2


def test_a_divisible_weight_is_the_same_in_arrays_that_can_be_cut(case):
    weight = case.hold(numbers(3, 4, case.columns))
    if case.kind is not None:
        assert all(leaf.ndim == 3 for leaf in jax.tree.leaves(weight.divisible()))
        assert bits(dense(weight.divisible())) == bits(dense(weight))


def test_a_stack_is_held_as_its_layers_are_and_scanned(case):
    array = jnp.array(numbers(3, 4, 6), case.dtype)
    weight = case.hold(array)
    one_by_one = lax.map(lambda one: one if case.kind is None else case.kind.hold(one), array)
    assert jax.tree.map(bits, one_by_one) == jax.tree.map(bits, weight)

    def body(carry, layer):
        assert layer.shape == (4, 6)
        return carry, as_array(layer)

    assert bits(jax.jit(lambda w: lax.scan(body, 0, w)[1])(weight)) == bits(dense(weight))


def test_shapes_are_known_without_arrays(case):
    like = jax.ShapeDtypeStruct((3, 4, 6), case.dtype)
    described = like if case.kind is None else jax.eval_shape(case.kind.hold, like)
    assert (described.shape, described.dtype) == (like.shape, case.dtype)
    assert nbytes(described) == nbytes(case.hold(numbers(3, 4, 6)))
    params = abstract_params(CONFIG, case.dtype, storage=case.kind)
    for name, plain in abstract_params(CONFIG, case.dtype).items():
        assert (params[name].shape, params[name].dtype) == (plain.shape, case.dtype)
        assert is_stored(params[name]) == (case.kind is not None and name in ADAPTED)
    assert sj.find_targets(params, density=0.1) == sj.find_targets(abstract_params(CONFIG), density=0.1)


def test_entries_are_those_of_the_array(case):
    rows, columns = jnp.array([3, 0, 4, 2]), jnp.array([5, 0, 0, 3])  # there is no row 4
    stack = case.hold(numbers(3, 4, 6))
    found = jax.jit(entries_at)(stack, (jnp.int32(2), rows, columns))
    expected = np.asarray(dense(stack))[2][[3, 0, 0, 2], [5, 0, 0, 3]]
    expected[2] = 0
    assert bits(found) == bits(expected)
    matrix = jax.tree.map(lambda leaf: leaf[2], stack)
    assert bits(entries_at(matrix, (rows, columns))) == bits(expected)


def test_entries_are_set_where_they_can_be(case):
    rows, columns = jnp.array([3, 0, 4, 2]), jnp.array([5, 0, 0, 3])
    entries = jnp.array([1.5, -0.0, 9.0, jnp.inf], case.dtype)
    stack = case.hold(numbers(3, 4, 6))
    place = (jnp.int32(2), rows, columns)
    if not is_writable(stack):
        with pytest.raises(TypeError, match=f"held as {type(stack).__name__} cannot be set"):
            with_entries(stack, place, entries)
        return
    changed = jax.jit(with_entries, donate_argnums=0)(jax.tree.map(jnp.copy, stack), place, entries)
    assert jax.tree.structure(changed) == jax.tree.structure(stack)
    expected = np.array(dense(stack))
    expected[2, [3, 0, 2], [5, 0, 3]] = np.asarray(entries)[[0, 1, 3]]
    assert bits(dense(changed)) == bits(expected)


@jax.jit
def there_and_back(weight, delta):
    """What the entries were, the weight with the delta merged, and unmerged again."""
    params, named = {"block": {"w": weight}}, {"block.w": delta}
    base, new = sj.base_entries(params, named), sj.merge(params, named)
    return base["block.w"], new["block"]["w"], sj.unmerge(new, named, base)["block"]["w"]


@beside_arrays
@pytest.mark.parametrize("delta_case", ["matrix", "two stack axes", "layers and grid"])
def test_deltas_work_as_on_the_array(case, delta_case):
    array, delta = make(**CASES[delta_case])
    if case.blocks and array.shape[-1] % 2:
        with pytest.raises(SpielError, match="expected rows of an even number"):
            case.hold(array)
        return
    weight = case.hold(array)
    matrix, entries = dense(weight), jnp.asarray(np.asarray(delta.values).astype(case.dtype))
    base, new, back = there_and_back(weight, delta)
    assert bits(base) == bits(gathered(matrix, delta)) == bits(gathered(weight, delta))
    assert bits(dense(new)) == bits(merged({"w": matrix}, {"w": delta})["w"])
    assert bits(dense(back)) == bits(matrix)
    if is_writable(weight):
        assert jax.tree.structure(new) == jax.tree.structure(back) == jax.tree.structure(weight)
        changed = jax.jit(set_entries)(weight, delta, entries)
        assert bits(dense(changed)) == bits(jax.jit(set_entries)(matrix, delta, entries))
    else:
        assert not is_stored(new)
        with pytest.raises(TypeError, match="cannot be set"):
            set_entries(weight, delta, entries)


@beside_arrays
@pytest.mark.parametrize("largest", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_magnitudes_are_those_of_the_array(case, largest):
    array = jnp.array(numbers(3, 4, 6), case.dtype)
    weight = case.hold(array)
    targets = {"w": sj.Target((4, 6), 5, (3,)), "w@0,2": sj.Target((4, 6), 4, (2,), (2, 1), layers=(0, 2))}
    find = jax.jit(partial(sj.magnitude_positions, targets=targets, largest=largest))
    found, expected = find({"w": weight}), find({"w": dense(weight)})
    for name in targets:
        np.testing.assert_array_equal(found[name].indices, expected[name].indices)


def on_mesh(weight, mesh):
    return jax.tree.map(lambda x: jax.device_put(x, param_sharding(DOWN, x.shape, mesh)), weight)


def test_on_a_mesh_it_lies_like_the_array_and_blocks_stay_where_they_are(case):
    mesh = make_mesh({"data": 1, "fsdp": 2, "tensor": 2}, jax.devices()[:4])
    columns = case.columns
    weight = case.hold(numbers(3, 4, columns))
    target = sj.Target((4, columns), 8, (3,), (2, 2), axes=weight_axes(DOWN))
    indices = np.tile(np.arange(columns, dtype=np.int32), (3, 2, 2, 1))
    indices = np.random.default_rng(0).permuted(indices, axis=-1)
    delta = target.delta(jnp.array(indices[..., :2]))
    expected = sj.gather(dense(weight), dataclasses.replace(delta, axes=None))
    entries = expected * 2
    with jax.set_mesh(mesh):
        spread = on_mesh(weight, mesh)
        shapes = [leaf.addressable_shards[0].data.shape for leaf in jax.tree.leaves(spread)]
        whole = jax.tree.leaves(weight)[0].shape[-1]
        assert shapes[0] == (3, 2, whole // 2)
        state = TrainState({DOWN: spread}, {}, {}, ())
        found = Method().shardings(state, mesh).params[DOWN]
        assert jax.tree.leaves(found) == [leaf.sharding for leaf in jax.tree.leaves(spread)]
        assert bits(jax.jit(as_array)(spread)) == bits(dense(weight))
        assert bits(jax.jit(sj.gather)(spread, delta)) == bits(expected)
        if is_writable(weight):
            changed = jax.jit(set_entries)(spread, delta, entries)
            again = set_entries(dense(weight), dataclasses.replace(delta, axes=None), entries)
            assert bits(dense(changed)) == bits(again)
    assert fingerprint({DOWN: spread}) == fingerprint({DOWN: weight})


def test_every_array_counts_in_the_fingerprint(case):
    weight = case.hold(numbers(3, 4, 6))
    (printed,) = fingerprint({DOWN: weight}).values()
    assert printed.startswith(f"{jnp.dtype(case.dtype)}[3,4,6]:")
    prints = {printed}
    for number in range(len(jax.tree.leaves(weight))):
        prints |= set(fingerprint({DOWN: with_bit_changed(weight, number)}).values())
    assert len(prints) == 1 + len(jax.tree.leaves(weight))


def adapters():
    """Every product that a weight [8, 6] goes through."""
    rng = np.random.default_rng(1)
    delta = sj.SparseDelta(jnp.array([40, 3, 17, 48]), jnp.array([0.5, -1.0, 2.0, 0.0]), (8, 6))
    candidates = delta.with_values(jnp.zeros(4))
    return {
        "linear": lambda x, weight: linear(x, lax.stop_gradient(weight)),
        "sparse": sj.SparseLinear(delta, dataclasses.replace(candidates, indices=jnp.array([1, 2, 4, 5]))),
        "per use": sj.SparseLinear(delta, proposal=jnp.zeros((3, 5)), merged=False),
        "low rank": LowRankLinear(jnp.array(rng.normal(size=(2, 6))), jnp.array(rng.normal(size=(8, 2)))),
        "scaled inputs": ScaledLinear(jnp.arange(6.0), inputs=True),
        "scaled outputs": ScaledLinear(jnp.arange(8.0), inputs=False),
    }


@cache
def differentiated(name):
    """A product, its gradients and what is trained in it; traced once for all kinds of weights."""
    adapter = adapters()[name]
    leaves, structure = jax.tree.flatten(adapter)
    trained = None if callable(leaves[0]) else leaves

    @jax.jit
    def value_and_gradients(x, trained, weight):
        def product(x, trained):
            used = adapter if trained is None else jax.tree.unflatten(structure, trained)
            return used(x, weight)

        y, pull = jax.vjp(product, x, trained)
        gradients = pull(jnp.sin(y.astype(jnp.float32)).astype(y.dtype))
        return y, [g for g in jax.tree.leaves(gradients) if g.dtype != jax.dtypes.float0]

    return value_and_gradients, trained


@beside_arrays
@pytest.mark.parametrize("name", adapters())
def test_products_are_those_with_the_array_bit_for_bit(case, name):
    weight = case.hold(numbers(8, 6))
    x = jnp.array(numbers(2, 5, 6, seed=2), case.dtype)
    value_and_gradients, trained = differentiated(name)
    found = value_and_gradients(x, trained, weight)
    expected = value_and_gradients(x, trained, dense(weight))
    assert jax.tree.map(bits, found) == jax.tree.map(bits, expected)
    assert any(np.any(np.asarray(g, np.float32)) for g in found[1])


def held(params, case):
    return {
        name: case.hold(param) if name in ADAPTED else jnp.array(param, case.dtype)
        for name, param in params.items()
    }


@pytest.fixture(scope="module")
def params():
    return jax.jit(init_params, static_argnums=0)(CONFIG, jax.random.key(0))


TOKENS = np.arange(12).reshape(2, 6) % CONFIG.vocab_size


@jax.jit
def logits(params):
    return bind(CONFIG, params)(TOKENS)


@beside_arrays
def test_a_model_computes_what_it_does_with_the_arrays(case, params):
    stored = held(params, case)
    arrays = {name: dense(param) for name, param in stored.items()}
    assert bits(logits(stored)) == bits(logits(arrays))
    assert bind(CONFIG, stored).dtype == case.dtype


def test_random_weights_are_the_same_however_they_are_held(case):
    def draw(storage):
        return jax.jit(lambda key: init_params(CONFIG, key, case.dtype, storage=storage)[DOWN])(
            jax.random.key(0)
        )

    found, described = draw(case.kind), abstract_params(CONFIG, case.dtype, storage=case.kind)[DOWN]
    assert jax.tree.structure(found) == jax.tree.structure(described)
    assert [(x.shape, x.dtype) for x in jax.tree.leaves(found)] == [
        (x.shape, x.dtype) for x in jax.tree.leaves(described)
    ]
    assert jax.tree.map(bits, found) == jax.tree.map(bits, case.hold(draw(None)))


@pytest.mark.parametrize("remat", ["none", "dots"])
def test_the_backward_pass_finds_weights_as_they_are_held(case, params, remat):
    """Nothing of the size of a stack's dense array is kept for it, but for a stack that is dense."""
    stored = held(params, case)
    ones = {name: jnp.ones((CONFIG.num_layers, stored[name].shape[1])) for name in ADAPTED}

    def hidden(factors, stored):
        scaled = {name: ScaledLinear(factor, inputs=False) for name, factor in factors.items()}
        model = bind(CONFIG, stored)
        return model.hidden(TOKENS, adapters=scaled, remat=remat, frozen=True)[0]

    kept = jax.eval_shape(
        lambda ones, stored: jax.vjp(lambda ones: hidden(ones, stored), ones)[1], ones, stored
    )
    shapes = {param.shape for name, param in stored.items() if name in ADAPTED}
    floats = [x.shape for x in jax.tree.leaves(kept) if x.shape in shapes and x.dtype == case.dtype]
    assert bool(floats) == (case.kind is None)


def test_kinds_are_found_by_name():
    assert kind_named("toy") is storage_for("toy", jnp.float32) is RowScaled
    assert kind_named("none") is storage_for("none", jnp.float32) is None
    assert storage_for("none", jnp.bfloat16) is Packed
    with pytest.raises(ValueError, match="quantization = 'nf3': expected one of none, nf4, fp4, int8, toy"):
        kind_named("nf3")
    with pytest.raises(ValueError, match=r"quantization 'toy' is taken by .*RowScaled"):
        register("toy")(Packed)
    assert register("toy")(RowScaled) is RowScaled
