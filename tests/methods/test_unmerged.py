"""A quantised weight with its deltas beside it computes what the merged one does."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import spiel_jax as sj
from spiel_jax.losses.next_token import Objective
from spiel_jax.methods.sparse import SparseMethod
from spiel_jax.methods.unmerged import Unmerged
from spiel_jax.models import ModelConfig, abstract_params, bind, init_params, layer_names
from spiel_jax.models.decoder import ADAPTED
from spiel_jax.models.storage import NF4
from spiel_jax.ops.stored import as_array, is_stored

CONFIG = dataclasses.replace(
    ModelConfig.smollm2_135m(),
    vocab_size=48,
    hidden_size=64,
    intermediate_size=96,
    num_layers=3,
    num_heads=2,
    num_kv_heads=1,
    head_dim=32,
)
UP, DOWN = "model.layers.mlp.up_proj.weight", "model.layers.mlp.down_proj.weight"
TOKENS = np.arange(10).reshape(2, 5)


@pytest.mark.parametrize("layers", [pytest.param(r"\d", marks=pytest.mark.slow), "[02]"], ids=["all", "some"])
def test_a_model_computes_what_the_merged_one_does(layers):
    targets = sj.find_targets(
        abstract_params(CONFIG),
        num_tunable=400,
        rules=(rf".*\.{layers}\.mlp\.(up|down)_proj\.weight",),
        layer_names=lambda name, stack: layer_names(name, stack[0]),
    )
    growth = sj.AccumulatedGradients()
    tx = sj.spiel(sj.aged_adamw(1e-2), targets, growth=growth, schedule=sj.Reselection(4))
    method = SparseMethod(Objective(CONFIG), tx, targets, growth)
    rng = np.random.default_rng(0)
    deltas = {}
    for name, target in targets.items():
        positions = rng.permuted(np.tile(np.arange(target.block_size), (*target.lead, 1)), axis=-1)
        indices = jnp.array(positions[..., : target.block_count], jnp.int32)
        deltas[name] = target.delta(indices, jnp.array(rng.normal(size=indices.shape), jnp.float32))
    params = jax.jit(lambda key: init_params(CONFIG, key, jnp.bfloat16, storage=NF4))(jax.random.key(0))
    beside, merged = method.beside(params, deltas), jax.jit(method.merge)(params, deltas)
    dense = jax.jit(as_array)
    for name in ADAPTED:
        assert isinstance(beside[name], Unmerged) == (name in (UP, DOWN))
        assert is_stored(merged[name]) == (name not in (UP, DOWN))
        np.testing.assert_array_equal(dense(beside[name]), dense(merged[name]))
    logits = jax.jit(lambda params: bind(CONFIG, params)(TOKENS))
    np.testing.assert_array_equal(logits(beside), logits(merged))
    assert np.any(logits(beside) != logits(params))


def test_an_array_alone_is_refused():
    with pytest.raises(TypeError, match=r"an array \(2, 4\) cannot be held .* expected both"):
        Unmerged.hold(jnp.ones((2, 4)))
