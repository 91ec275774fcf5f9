import dataclasses
import json

import pytest
from transformers import AutoConfig

from spiel_jax.errors import SpielError
from spiel_jax.models import ModelConfig
from spiel_jax.models.io.hf_config import hf_config
from spiel_jax.models.io.huggingface import read_config

PRESETS = [
    name
    for name, value in vars(ModelConfig).items()
    if isinstance(value, classmethod) and not name.startswith(("_", "from_"))
]


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_there_and_back_and_in_transformers(preset, tmp_path):
    config = getattr(ModelConfig, preset)()
    (tmp_path / "config.json").write_text(json.dumps(hf_config(config)))
    assert read_config(tmp_path) == config
    theirs = AutoConfig.from_pretrained(tmp_path)
    assert theirs.rope_parameters["rope_theta"] == config.rope_theta
    assert theirs.rope_parameters["rope_type"] == (
        config.rope_scaling.kind if config.rope_scaling else "default"
    )
    assert (theirs.head_dim, theirs.rms_norm_eps) == (config.head_dim, config.rms_norm_eps)


def test_layers_with_a_window_and_layers_without():
    flags = tuple(layer % 2 == 0 for layer in range(28))
    config = dataclasses.replace(ModelConfig.qwen3_0_6b(), sliding_window=128, sliding_layers=flags)
    assert ModelConfig.from_hf(hf_config(config)) == config


def test_what_no_config_describes():
    config = dataclasses.replace(ModelConfig.llama2_7b(), attention_bias=True)
    config = dataclasses.replace(config, output_bias=True, sliding_window=9)
    with pytest.raises(SpielError, match=r"no config.json of transformers describes"):
        hf_config(config)
