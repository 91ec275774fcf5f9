import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from spiel_jax.models import (
    CausalLM,
    ModelConfig,
    abstract_params,
    bind,
    init_cache,
    init_params,
    layer_names,
)

TINY = ModelConfig(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_positions=64,
    initializer_range=0.2,
)
TOKENS = jnp.array(np.random.default_rng(0).integers(0, TINY.vocab_size, (2, 12)))


@pytest.fixture(scope="module")
def params():
    return jax.jit(init_params, static_argnums=0)(TINY, jax.random.key(0))


@functools.partial(jax.jit, static_argnames=("config", "remat"))
def forward(params, tokens, config=TINY, **options):
    return bind(config, params)(tokens, **options)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class LowRankLinear:
    """x W^T + x A^T B^T, the smallest useful adapter."""

    a: jax.Array  # [L, rank, in]
    b: jax.Array  # [L, out, rank]

    def __call__(self, x, weight):
        return x @ weight.T + (x @ self.a.T) @ self.b.T


def test_names_shapes_and_orientation():
    assert {name: param.shape for name, param in abstract_params(TINY).items()} == {
        "lm_head.weight": (61, 32),
        "model.embed_tokens.weight": (61, 32),
        "model.layers.input_layernorm.weight": (3, 32),
        "model.layers.mlp.down_proj.weight": (3, 32, 48),
        "model.layers.mlp.gate_proj.weight": (3, 48, 32),
        "model.layers.mlp.up_proj.weight": (3, 48, 32),
        "model.layers.post_attention_layernorm.weight": (3, 32),
        "model.layers.self_attn.k_proj.weight": (3, 16, 32),
        "model.layers.self_attn.o_proj.weight": (3, 32, 32),
        "model.layers.self_attn.q_proj.weight": (3, 32, 32),
        "model.layers.self_attn.v_proj.weight": (3, 16, 32),
        "model.norm.weight": (32,),
    }


def test_optional_parameters():
    def added(**options):
        other = abstract_params(dataclasses.replace(TINY, **options), jnp.bfloat16)
        assert all(param.dtype == jnp.bfloat16 for param in other.values())
        return {name: other[name].shape for name in other.keys() ^ abstract_params(TINY).keys()}

    attention = "model.layers.self_attn."
    assert added(attention_bias=True) == {
        f"{attention}q_proj.bias": (3, 32),
        f"{attention}k_proj.bias": (3, 16),
        f"{attention}v_proj.bias": (3, 16),
    }
    assert added(output_bias=True) == {f"{attention}o_proj.bias": (3, 32)}
    assert added(qk_norm=True) == {
        f"{attention}q_norm.weight": (3, 8),
        f"{attention}k_norm.weight": (3, 8),
    }
    tied = abstract_params(dataclasses.replace(TINY, tie_embeddings=True))
    assert abstract_params(TINY).keys() - tied.keys() == {"lm_head.weight"}


def test_layer_names():
    assert layer_names("model.layers.self_attn.q_proj.bias", 2) == [
        "model.layers.0.self_attn.q_proj.bias",
        "model.layers.1.self_attn.q_proj.bias",
    ]
    assert layer_names("model.norm.weight", 2) == ["model.norm.weight"]


def test_initialisation():
    config = dataclasses.replace(TINY, attention_bias=True, hidden_size=128, vocab_size=999)
    params = init_params(config, jax.random.key(3))
    for name, param in params.items():
        if name.endswith("norm.weight"):
            assert np.all(param == 1), name
        elif name.endswith("bias"):
            assert np.all(param == 0), name
        else:
            np.testing.assert_allclose(np.std(param), 0.2, rtol=0.05, err_msg=name)
    gate, up = (params[f"model.layers.mlp.{part}_proj.weight"] for part in ("gate", "up"))
    assert not np.any(gate == up)

    other = init_params(dataclasses.replace(config, tie_embeddings=True), jax.random.key(3))
    for name, param in other.items():  # a tensor's values depend on the key and its name only
        np.testing.assert_array_equal(param, params[name])
    again = init_params(config, jax.random.key(4), jnp.bfloat16)
    assert again["lm_head.weight"].dtype == jnp.bfloat16
    assert np.mean(again["lm_head.weight"] == params["lm_head.weight"].astype(jnp.bfloat16)) < 0.1


def test_module_constructed_directly():
    model = CausalLM(TINY, rngs=nnx.Rngs(0), param_dtype=jnp.float32)
    params = init_params(TINY, nnx.Rngs(0).params())
    np.testing.assert_array_equal(jax.jit(model)(TOKENS), forward(params, TOKENS))
    assert model.head.shape == (61, 32)


def test_bind_names_what_is_wrong(params):
    without = {name: param for name, param in params.items() if name != "model.norm.weight"}
    with pytest.raises(ValueError, match=r"missing parameters: model\.norm\.weight"):
        bind(TINY, without)
    with pytest.raises(ValueError, match=r"unknown parameters: model\.extra"):
        bind(TINY, params | {"model.extra": params["model.norm.weight"]})
    with pytest.raises(ValueError, match=r"lm_head\.weight has shape \(3,\), expected \(61, 32\)"):
        bind(TINY, params | {"lm_head.weight": jnp.zeros(3)})


def test_head_is_the_embedding_when_tied(params):
    tied = {name: param for name, param in params.items() if name != "lm_head.weight"}
    config = dataclasses.replace(TINY, tie_embeddings=True)
    embedding = params["model.embed_tokens.weight"]
    np.testing.assert_array_equal(bind(config, tied).head, embedding)
    untied = forward(tied | {"lm_head.weight": embedding}, TOKENS)
    np.testing.assert_array_equal(forward(tied, TOKENS, config), untied)


@pytest.mark.parametrize("packed", [False, True])
def test_window_sees_exactly_that_many_tokens(packed):
    config = dataclasses.replace(TINY, num_layers=1, sliding_window=4)
    params = init_params(config, jax.random.key(0))
    options = {"config": config, "segment_ids": jnp.ones_like(TOKENS) if packed else None}
    changed = forward(params, TOKENS.at[:, 2].add(1), **options)
    differs = jnp.any(changed != forward(params, TOKENS, **options), axis=(0, 2))
    assert np.flatnonzero(differs).tolist() == [2, 3, 4, 5]


def test_segments_are_isolated(params):
    segments = jnp.array([[1] * 5 + [2] * 7, [1] * 9 + [0] * 3])
    changed = forward(params, TOKENS.at[:, 3].add(1), segment_ids=segments)
    differs = jnp.any(changed != forward(params, TOKENS, segment_ids=segments), axis=-1)
    assert np.flatnonzero(differs[0]).tolist() == [3, 4]
    assert np.flatnonzero(differs[1]).tolist() == [3, 4, 5, 6, 7, 8]


def test_positions_default_to_the_place_in_the_segment(params):
    segments = jnp.array([[1] * 5 + [2] * 7] * 2)
    positions = jnp.array([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6]])
    default = forward(params, TOKENS, segment_ids=segments)
    given = forward(params, TOKENS, segment_ids=segments, positions=positions)
    np.testing.assert_array_equal(default, given)
    stretched = forward(params, TOKENS, segment_ids=segments, positions=2 * positions)
    assert np.max(np.abs(stretched - default)) > 1e-3


def test_cache_token_by_token_equals_the_whole(params):
    model = bind(TINY, params)

    @jax.jit
    def step(token, cache):
        hidden, cache = model.hidden(token, cache=cache)
        return model.logits(hidden), cache

    cache, steps = init_cache(TINY, 2, 12, jnp.float32), []
    for t in range(12):
        logits, cache = step(TOKENS[:, t : t + 1], cache)
        steps.append(logits)
    np.testing.assert_allclose(jnp.concatenate(steps, axis=1), forward(params, TOKENS), atol=1e-5)
    overfull, _ = step(TOKENS[:, :1], cache)
    assert np.isnan(overfull).all()


def test_right_padded_prompt_in_the_cache(params):
    """Without a window, padding may also stand between the prompt and what follows."""
    model = bind(TINY, params)
    cache = init_cache(TINY, 2, 16, jnp.float32)
    _, cache = model.hidden(
        jnp.pad(TOKENS[:, :6], ((0, 0), (0, 3))),
        segment_ids=jnp.array([[1] * 6 + [0] * 3] * 2),
        cache=cache,
    )
    hidden, _ = model.hidden(TOKENS[:, 6:], cache=cache)
    np.testing.assert_allclose(model.logits(hidden), forward(params, TOKENS)[:, 6:], atol=1e-5)


def test_cache_too_small_or_of_another_batch(params):
    model = bind(TINY, params)
    with pytest.raises(ValueError, match=r"\(2, 12\) do not fit a cache of 2 rows and 8 slots"):
        model.hidden(TOKENS, cache=init_cache(TINY, 2, 8))
    with pytest.raises(ValueError, match=r"do not fit a cache of 1 rows"):
        model.hidden(TOKENS, cache=init_cache(TINY, 1, 16))


def test_token_beyond_the_vocabulary_is_not_another_token(params):
    logits = forward(params, TOKENS.at[0, 5].set(61))
    assert np.isnan(logits[0]).all()
    assert np.isfinite(logits[1]).all()


def test_bfloat16_stays_bfloat16(params):
    half = {name: param.astype(jnp.bfloat16) for name, param in params.items()}
    with jax.numpy_dtype_promotion("standard"):  # jax.nn.dot_product_attention needs it
        hidden, _ = jax.eval_shape(lambda half: bind(TINY, half).hidden(TOKENS), half)
        logits = forward(half, TOKENS)
        gradients = jax.grad(lambda half: jnp.sum(forward(half, TOKENS) ** 2))(half)
    assert hidden.dtype == jnp.bfloat16
    assert logits.dtype == jnp.float32
    assert np.any(logits != logits.astype(jnp.bfloat16).astype(jnp.float32))  # not rounded
    exact = forward(params, TOKENS)
    assert np.linalg.norm(logits - exact) < 0.03 * np.linalg.norm(exact)
    assert all(gradient.dtype == jnp.bfloat16 for gradient in gradients.values())


def low_rank(names, params):
    random = np.random.default_rng(5)

    def one(name):
        layers, out, into = params[name].shape
        shapes = (layers, 2, into), (layers, out, 2)
        return LowRankLinear(*(jnp.array(random.normal(0, 0.3, shape), jnp.float32) for shape in shapes))

    return {name: one(name) for name in names}


def test_adapters_equal_the_merged_weights(params):
    every = [name for name in params if "_proj.weight" in name]
    adapters = low_rank(every, params)
    assert len(adapters) == 7

    def loss(logits):
        return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - logits[..., 0])

    def adapted(adapters):
        return loss(forward(params, TOKENS, adapters=adapters))

    def merged(adapters):
        merged = {name: params[name] + adapter.b @ adapter.a for name, adapter in adapters.items()}
        return loss(forward(params | merged, TOKENS))

    actual, gradients = jax.jit(jax.value_and_grad(adapted))(adapters)
    expected, dense_gradients = jax.jit(jax.value_and_grad(merged))(adapters)
    np.testing.assert_allclose(actual, expected, rtol=1e-6)
    for name in every:
        for part in ("a", "b"):
            leaf, dense = getattr(gradients[name], part), getattr(dense_gradients[name], part)
            assert np.all(np.any(dense != 0, axis=(1, 2)))  # every layer learns
            np.testing.assert_allclose(leaf, dense, atol=1e-4 * np.max(np.abs(dense)))


def test_some_adapters_and_a_bias():
    config = dataclasses.replace(TINY, attention_bias=True)
    params = init_params(config, jax.random.key(0))
    name = "model.layers.self_attn.v_proj"
    params[f"{name}.bias"] += 0.5
    adapters = low_rank([f"{name}.weight"], params)
    (adapter,) = adapters.values()
    merged = params | {f"{name}.weight": params[f"{name}.weight"] + adapter.b @ adapter.a}
    actual = forward(params, TOKENS, config, adapters=adapters)
    np.testing.assert_allclose(actual, forward(merged, TOKENS, config), atol=1e-4)


def test_unknown_adapters_are_named(params):
    message = r"\['model\.norm\.weight'\]: expected some of model\.layers\.self_attn\.q_proj\.weig"
    with pytest.raises(ValueError, match=message):
        bind(TINY, params)(TOKENS, adapters={"model.norm.weight": lambda x, weight: x})


def test_remat_stores_what_it_says():
    config = dataclasses.replace(TINY, hidden_size=64, head_dim=16)
    tokens = jnp.zeros((2, 128), jnp.int32)

    def stored(remat):
        """Bytes kept between the forward and the backward pass."""

        def hidden(params):
            return bind(config, params).hidden(tokens, remat=remat)[0]

        backward = jax.eval_shape(lambda params: jax.vjp(hidden, params)[1], abstract_params(config))
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(backward))

    none, dots, full = map(stored, ("none", "dots", "full"))
    # rotated q and k, v, what attention saw, o, gate, up; the output of down is not needed
    outputs = 64 + 32 + 32 + 64 + 64 + 48 + 48
    assert dots - full == 4 * outputs * tokens.size * config.num_layers
    assert none > 1.5 * dots


def test_unknown_remat_is_named(params):
    with pytest.raises(ValueError, match="unknown remat 'some': expected one of none, dots, full"):
        bind(TINY, params)(TOKENS, remat="some")


@pytest.mark.parametrize("name", ["llama2_7b", "llama2_70b", "qwen2_5_3b", "qwen3_4b"])
def test_large_shapes_trace_at_no_cost(name):
    config = getattr(ModelConfig, name)()
    tokens = jax.ShapeDtypeStruct((4, 2048), jnp.int32)

    def loss(params, tokens):
        return jnp.mean(bind(config, params)(tokens, segment_ids=tokens))

    with jax.numpy_dtype_promotion("standard"):
        params = abstract_params(config, jnp.bfloat16)
        gradients = jax.eval_shape(jax.grad(loss), params, tokens)
    assert gradients == params
