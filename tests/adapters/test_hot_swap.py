"""Adapters in and out of resident weights: what a merge gives, and the pretrained bits again."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.exports import lora_adapter, origin_of, sparse_adapter

from spiel_jax.adapters import AdapterError, HotSwap, Origin, add, write_adapter
from spiel_jax.adapters.adapted import load_adapters
from spiel_jax.adapters.hot_swap import _cover, _put_in, _take_out
from spiel_jax.models import fingerprint, open_model
from spiel_jax.sparse.delta import SparseDelta


@pytest.fixture(scope="module")
def source(llama_folder):
    return open_model(str(llama_folder))


def bits(params):
    return {name: np.asarray(array).tobytes() for name, array in params.items()}


def test_any_order_gives_what_a_merge_gives_and_the_pretrained_bits(source):
    """In bfloat16, where taking a sum apart again would not."""
    model, params = source.config, source.load("bfloat16", progress=False)
    base = bits(params)
    adapters = {
        "a": sparse_adapter(model, seed=0, names=lambda name: "up" in name),
        "b": sparse_adapter(model, seed=1, names=lambda name: "up" in name or "q_" in name, density=0.2),
        "few": sparse_adapter(model, seed=2, names=lambda name: ".1.mlp.up" in name),
    }
    adapters["a and b"] = add(adapters["a"], adapters["b"])
    expected = {None: base} | {
        n: bits(jax.jit(partial(one.merge, model=model))(params)) for n, one in adapters.items()
    }
    swap = HotSwap(params, model)
    for name, adapter in adapters.items():
        swap.add(name, adapter)
    assert swap.names == tuple(adapters)
    rng = np.random.default_rng(0)
    for name in [*adapters, None, *rng.choice([*adapters, None], 6)]:
        assert bits(swap.use(name)) == expected[name], name
        assert swap.active == name
    swap.use("b")
    swap.discard("b")
    assert bits(swap.params) == base
    with pytest.raises(AdapterError, match=r"no adapter 'b': expected one of a, few"):
        swap.use("b")


def test_nothing_as_large_as_a_weight_is_made(source):
    """The weights are changed where they are; what is made has the size of the adapter's entries."""
    size, layers = 512, 8
    changes = {"hidden_size": size, "intermediate_size": 2 * size, "num_layers": layers}
    model = dataclasses.replace(source.config, **changes)
    adapter = sparse_adapter(model, density=1e-3, names=lambda name: "mlp" in name)
    deltas = adapter.deltas(model)
    weights = {
        name: jax.ShapeDtypeStruct((layers, *delta.shape), jnp.bfloat16) for name, delta in deltas.items()
    }
    for name, weight in weights.items():
        delta = deltas[name]
        covered = jax.eval_shape(_cover, weight, delta)
        # a copy of the one matrix that entries are set in, and what it becomes
        most = 4 * size * 2 * size + 40 * delta.values.size
        assert _cover.lower(weight, delta).compile().memory_analysis().temp_size_in_bytes < most
        for program in (_put_in, _take_out):
            memory = program.lower(weight, delta, covered).compile().memory_analysis()
            assert memory.alias_size_in_bytes == memory.output_size_in_bytes == 2 * weight.size
            assert memory.temp_size_in_bytes < most < 2 * weight.size / 3


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("layers", [None, (2,)])
def test_every_pattern_of_bits_stays_or_comes_back(dtype, layers):
    """Infinities, subnormal numbers, both zeros; all but what is no number."""
    rng = np.random.default_rng(0)
    patterns = np.stack([rng.permutation(2**16).astype(np.uint16) for _ in range(3)])
    with np.errstate(all="ignore"):
        patterns[np.isnan(patterns.view(dtype))] = 0
    used = [0, 1, 2] if layers is None else [*layers]
    positions = np.stack([np.sort(rng.choice(2**16, 5000, replace=False)) for _ in used]).astype(np.int32)
    values = rng.normal(size=positions.shape).astype(np.float32)
    expected = patterns.copy()
    place = np.array(used)[:, None], positions
    with np.errstate(all="ignore"):
        merged = (patterns[place].view(dtype).astype(np.float32) + values).astype(dtype)
    expected[place] = merged.view(np.uint16)

    delta = SparseDelta(jnp.asarray(positions), jnp.asarray(values), (128, 512), layers=layers)
    weight = jnp.asarray(patterns.view(dtype).reshape(3, 128, 512))
    covered = _cover(weight, delta)
    weight = _put_in(weight, delta, covered)
    np.testing.assert_array_equal(np.array(weight).view(np.uint16).reshape(3, -1), expected)
    weight = _take_out(weight, delta, covered)
    np.testing.assert_array_equal(np.array(weight).view(np.uint16).reshape(3, -1), patterns)


def test_what_cannot_be_swapped(source):
    params = source.load("float32", progress=False)
    swap = HotSwap(params, source.config, fingerprint(params))
    swap.add("a", sparse_adapter(source.config))
    with pytest.raises(AdapterError, match="'a' already"):
        swap.add("a", sparse_adapter(source.config))
    with pytest.raises(AdapterError, match="b is lora: only sparse"):
        swap.add("b", lora_adapter(source.config))
    wide = dataclasses.replace(source.config, intermediate_size=64)
    with pytest.raises(AdapterError, match="the base model's is"):
        swap.add("b", sparse_adapter(wide))
    wrong = dict.fromkeys(fingerprint(params), "float32[1]:0")
    origin = dataclasses.replace(sparse_adapter(source.config).origin, fingerprint=wrong)
    with pytest.raises(AdapterError, match="b was trained on another base model"):
        swap.add("b", dataclasses.replace(sparse_adapter(source.config), origin=origin))


class TestLoadAdapters:
    def test_sparse_ones_are_swapped_and_others_merged(self, source, llama_folder, tmp_path):
        model, params = source.config, source.load("float32", progress=False)
        few = {"names": lambda name: ".1.mlp.up" in name}
        made = {"a": sparse_adapter(model, seed=1, **few), "b": sparse_adapter(model, seed=2, **few)}
        made["c"] = lora_adapter(model)
        expected, origin = {}, origin_of(llama_folder)
        for name, adapter in made.items():
            write_adapter(dataclasses.replace(adapter, origin=origin), tmp_path / name, "peft")
            merge = jax.jit(partial(adapter.merge, model=model))
            expected[str(tmp_path / name)] = bits(merge(params))
        for names in ("ab", "ac", "c"):
            paths = [str(tmp_path / name) for name in names]
            weights = load_adapters(paths, str(llama_folder), keep_base=names == "ac").weights
            assert isinstance(weights, HotSwap) == (names == "ab")
            for path in paths * 2:
                assert bits(weights.use(path)) == expected[path], path
            if len(names) > 1:
                assert bits(weights.use(None)) == bits(params)

    def test_weights_that_were_held_differently(self, source, llama_folder, tmp_path):
        for name, dtype in (("a", "float32"), ("b", "bfloat16")):
            adapter = sparse_adapter(source.config, Origin(config={"model.dtype": dtype}))
            write_adapter(adapter, tmp_path / name)
        with pytest.raises(AdapterError, match=r"held as float32 none, .*b on bfloat16 none"):
            load_adapters([tmp_path / "a", tmp_path / "b"], str(llama_folder))
