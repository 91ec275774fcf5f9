import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from peft import LoraConfig, get_peft_model
from support.adapter_cases import Place, check_against_peft, twins

from spiel_jax.config import LINEAR_LAYERS
from spiel_jax.methods.lora import Lora, LowRankLinear, low_rank_linear
from spiel_jax.methods.parametrization import adapted
from spiel_jax.models import ModelConfig, layer_names


def with_peft(model, **options):
    modules = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]
    settings = LoraConfig(r=4, lora_alpha=16, target_modules=modules, lora_dropout=0.0, **options)
    return get_peft_model(model, settings)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # used by PEFT
def test_equals_peft():
    model, config, params = twins()
    kind = Lora(adapted(config, LINEAR_LAYERS), rank=4, alpha=16.0, dropout=0.0)
    model = with_peft(model)
    tensors = dict(model.named_parameters())

    def place(name, part):
        names = [one.removesuffix(".weight") for one in layer_names(name, config.num_layers)]
        return Place([tensors[f"base_model.model.{one}.lora_{part}.default.weight"] for one in names])

    theirs = {name: {f"lora_{part}": place(name, part) for part in "AB"} for name in kind.targets}
    assert len(theirs) == 7
    check_against_peft(model, config, params, kind, theirs)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # used by PEFT
@pytest.mark.parametrize("rslora", [False, True])
def test_scale_is_that_of_peft(rslora):
    model = with_peft(twins()[0], use_rslora=rslora)
    module = model.get_submodule("base_model.model.model.layers.0.mlp.up_proj")
    assert module.scaling == {"default": Lora({}, rank=4, alpha=16.0, rslora=rslora).scale}


def test_initial_parameters_are_those_of_peft():
    """Uniform within 1 / sqrt(in), and B zero."""
    config = twins()[1]
    kind = Lora(adapted(config, LINEAR_LAYERS), rank=32)
    trainable = kind.init(jax.random.key(0))
    for name, parts in trainable.items():
        (rows, columns), a = kind.targets[name].shape, np.asarray(parts["lora_A"])
        assert a.shape == (3, 32, columns)
        assert np.abs(a).max() == pytest.approx(1 / math.sqrt(columns), rel=0.02)
        assert a.std() == pytest.approx(1 / math.sqrt(3 * columns), rel=0.05)
        assert parts["lora_B"].shape == (3, rows, 32)
        assert not parts["lora_B"].any()
        assert a.dtype == parts["lora_B"].dtype == np.float32
    q, k = (trainable[f"model.layers.self_attn.{x}_proj.weight"]["lora_A"] for x in "qk")
    assert np.unique(np.concatenate([q.ravel(), k.ravel()])).size > 0.99 * 2 * q.size


@pytest.mark.parametrize(
    ("model", "per_rank"), [(ModelConfig.llama2_7b(), 2_498_560), (ModelConfig.llama2_13b(), 3_911_680)]
)
def test_sizes_of_the_paper(model, per_rank):
    kind = Lora(adapted(model, LINEAR_LAYERS), rank=16)
    shapes = jax.eval_shape(kind.init, jax.random.key(0))
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) == 16 * per_rank


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank = 0: expected at least 1"),
        ({"alpha": 0.0}, "alpha = 0.0: expected a positive number"),
        ({"alpha": math.nan}, "alpha = nan"),
        ({"dropout": 1.0}, r"dropout = 1.0: expected 0 or more and less than 1"),
        ({"dropout": -0.1}, "dropout = -0.1"),
    ],
)
def test_numbers_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Lora({}, **options)


def case(dtype=jnp.float32, dropout=0.0, rows=(2, 5), sizes=(7, 9), rank=3):
    """Odd sizes, and x, weight, dy and an adapter of the size of 1."""
    keys = iter(jax.random.split(jax.random.key(0), 6))
    draw = lambda *shape: jax.random.normal(next(keys), shape)  # noqa: E731
    x, weight, dy = draw(*rows, sizes[1]), draw(*sizes), draw(*rows, sizes[0])
    adapter = LowRankLinear(draw(rank, sizes[1]), draw(sizes[0], rank), next(keys), 0.7, dropout)
    return x.astype(dtype), weight.astype(dtype), dy.astype(dtype), adapter


def explicit(x, weight, a, b, kept, adapter):
    dropped = jnp.where(kept, x, 0.0) / (1 - adapter.dropout)
    return x @ weight.T + adapter.scale * (dropped @ a.T) @ b.T


@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_gradients_are_those_of_the_explicit_formula(dropout):
    x, weight, dy, adapter = case(dropout=dropout)
    kept = adapter.kept(x.shape)
    assert kept.shape == x.shape
    assert 0 < np.sum(~kept) < x.size or dropout == 0.0
    y, gradient = jax.vjp(low_rank_linear, x, weight, adapter)
    expected, exact = jax.vjp(
        lambda *arrays: explicit(*arrays, kept, adapter), x, weight, adapter.a, adapter.b
    )
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    dx, dweight, da, db = exact(dy)
    ours = gradient(dy)
    np.testing.assert_allclose(ours[0], dx, rtol=1e-5, atol=1e-5)
    assert dweight.any()
    assert not ours[1].any()  # frozen
    np.testing.assert_allclose(ours[2].a, da, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(ours[2].b, db, rtol=1e-5, atol=1e-5)


def test_bfloat16_operands_and_float32_accumulation():
    x, weight, dy, adapter = case(jnp.bfloat16, 0.25, rows=(4, 64), sizes=(48, 40))
    y, gradient = jax.vjp(low_rank_linear, x, weight, adapter)
    dx, _, ours = gradient(dy)
    assert y.dtype == dx.dtype == jnp.bfloat16
    wide = [array.astype(jnp.float32) for array in (x, weight, dy)]
    expected, exact = jax.vjp(
        lambda x, a, b: explicit(x, wide[1], a, b, adapter.kept(x.shape), adapter),
        wide[0],
        *(array.astype(jnp.bfloat16).astype(jnp.float32) for array in (adapter.a, adapter.b)),
    )
    for found, array in zip((y, dx, ours.a, ours.b), (expected, *exact(wide[2])), strict=True):
        scale = np.abs(array).max()
        np.testing.assert_allclose(found.astype(jnp.float32), array, atol=2**-8 * scale)
    for found in (ours.a, ours.b):  # not rounded
        assert found.dtype == jnp.float32
        assert np.mean(found.astype(jnp.bfloat16).astype(jnp.float32) == found) < 0.1


def test_statistics_of_dropout():
    x, weight, _, adapter = case(dropout=0.1, rows=(1000,), sizes=(3, 301))
    kept = np.asarray(adapter.kept(x.shape))
    assert abs(kept.mean() - 0.9) < 5 * math.sqrt(0.9 * 0.1 / kept.size)
    # each input of each token by itself, the two of a random word too
    tolerance = 5 * math.sqrt(0.9 * 0.1 / 1000)
    np.testing.assert_allclose(kept.mean(0), 0.9, atol=tolerance)
    half = -(-301 // 2)
    for distance in (1, half):
        both = (kept[:, :-distance] & kept[:, distance:]).mean(0)
        np.testing.assert_allclose(both, 0.81, atol=6 * math.sqrt(0.81 * 0.19 / 1000))
    np.testing.assert_array_equal(kept, adapter.kept(x.shape))
    # the expected output is that without dropout
    ones = jnp.ones_like(x)
    plain = LowRankLinear(jnp.abs(adapter.a), jnp.abs(adapter.b), None, adapter.scale, adapter.dropout)
    dropped = LowRankLinear(plain.a, plain.b, adapter.key, adapter.scale, adapter.dropout)
    np.testing.assert_allclose(
        low_rank_linear(ones, weight, dropped).mean(0), low_rank_linear(ones, weight, plain)[0], rtol=0.01
    )


def test_each_weight_and_layer_has_a_dropout_of_its_own():
    _, config, params = twins()
    kind = Lora(adapted(config, LINEAR_LAYERS), rank=2, dropout=0.5)
    trainable = kind.init(jax.random.key(0))
    masks = []
    for key in (jax.random.key(0), jax.random.key(1)):
        for adapter in kind.attach(params, trainable, key)[1].values():
            for layer in range(3):
                one = jax.tree.map(lambda leaf, layer=layer: leaf[layer], adapter)
                masks.append(np.asarray(one.kept((4, 16))))
    assert len({mask.tobytes() for mask in masks}) == 2 * 7 * 3
    again = kind.attach(params, trainable, jax.random.key(0))[1]
    first = jax.tree.map(lambda leaf: leaf[0], next(iter(again.values())))
    np.testing.assert_array_equal(first.kept((4, 16)), masks[0])
    for adapter in kind.attach(params, trainable, None)[1].values():
        assert adapter.key is None
        assert adapter.gain == kind.scale
