import dataclasses

import gguf
import pytest

from spiel_jax.models.config import ModelConfig
from spiel_jax.models.decoder import abstract_params, layer_names
from spiel_jax.models.io.names import GGUF, Placement, Stored, check_tensors, expected_tensors, gguf_names

# every optional part of the family at once
CONFIG = ModelConfig(
    vocab_size=11,
    hidden_size=8,
    intermediate_size=12,
    num_layers=12,
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
    max_positions=16,
    attention_bias=True,
    output_bias=True,
    qk_norm=True,
)


def stored(config=CONFIG, naming=layer_names):
    expected = expected_tensors(config, naming)
    return {name: Stored(slot.shape, "F32", True) for name, slot in expected.items()}


def check(tensors, config=CONFIG, **options):
    check_tensors("a/folder", expected_tensors(config, layer_names), tensors, **options)


def test_table_has_exactly_the_parameters_of_the_family():
    assert set(GGUF) == set(abstract_params(CONFIG))


def test_gguf_names_are_those_of_llama_cpp():
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, CONFIG.num_layers)
    table.mapping |= gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, CONFIG.num_layers).mapping
    for parameter in GGUF:
        ours = gguf_names(parameter, CONFIG.num_layers)
        theirs = layer_names(parameter, CONFIG.num_layers)
        assert len(ours) == len(theirs)
        for our, their in zip(ours, theirs, strict=True):
            assert table.get_name(their, try_suffixes=(".weight", ".bias")) == our


def test_expected_tensors_places_each_layer():
    expected = expected_tensors(CONFIG, layer_names)
    assert expected["model.layers.11.self_attn.k_proj.weight"] == Placement(
        "model.layers.self_attn.k_proj.weight", 11, (4, 8)
    )
    assert expected["lm_head.weight"] == Placement("lm_head.weight", None, (11, 8))
    assert len(expected) == 3 + 12 * (len(GGUF) - 3)
    assert expected_tensors(CONFIG, gguf_names)["blk.11.attn_k.weight"].layer == 11


def test_a_complete_checkpoint_passes():
    check(stored())


def test_buffers_that_the_config_determines_are_ignored():
    extra = Stored((2,), "F32", True)
    names = ["model.layers.11.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq"]
    check(stored() | dict.fromkeys([*names, "rope_freqs.weight"], extra))


def test_every_problem_is_named():
    tensors = stored()
    del tensors["model.norm.weight"], tensors["model.layers.3.mlp.up_proj.weight"]
    tensors["model.layers.12.mlp.up_proj.weight"] = Stored((12, 8), "F32", True)
    tensors["model.layers.0.mlp.up_proj.weight"] = Stored((8, 12), "F32", True)
    tensors["model.layers.1.mlp.up_proj.weight"] = Stored((12, 8), "I8", False)
    with pytest.raises(ValueError, match=r"a/folder does not hold the model") as error:
        check(tensors)
    assert str(error.value).splitlines()[1:] == [
        "  missing: model.layers.3.mlp.up_proj.weight",
        "  missing: model.norm.weight",
        "  mis-shaped: model.layers.0.mlp.up_proj.weight [8, 12], expected [12, 8]",
        "  not floating point: model.layers.1.mlp.up_proj.weight is I8",
        "  unknown: model.layers.12.mlp.up_proj.weight [12, 8]",
    ]


def test_the_head_of_a_tied_model_is_unknown_unless_optional():
    tied = dataclasses.replace(CONFIG, tie_embeddings=True)
    with pytest.raises(ValueError, match=r"unknown: lm_head.weight \[11, 8\]"):
        check(stored(), tied)
    check(stored(), tied, optional=["lm_head.weight"])
