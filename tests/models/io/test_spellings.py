import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from spiel_jax.models.decoder import bind
from spiel_jax.models.io.loading import open_model
from spiel_jax.models.io.spellings import plain_name, plain_names

TOKENS = np.arange(12)[None]
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def rewrite(folder, edit):
    path = folder / "model.safetensors"
    save_file(edit(load_file(path)), path, metadata={"format": "pt"})


def ours(folder):
    source = open_model(str(folder))
    return np.asarray(bind(source.config, source.load(jnp.float32, progress=False))(TOKENS, remat="none"))


def theirs(folder):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(torch.tensor(TOKENS)).logits.numpy()


def assert_close(actual, expected):
    assert np.max(np.abs(actual - expected)) < 1e-5 * np.max(np.abs(expected))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Tied and not: folders of a random model."""
    folders = {}
    for tied in (False, True):
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            vocab_size=40,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=32,
            initializer_range=0.3,
            tie_word_embeddings=tied,
        )
        folders[tied] = tmp_path_factory.mktemp("model")
        transformers.LlamaForCausalLM(config).save_pretrained(folders[tied])
    return folders


@pytest.fixture
def copy(saved, tmp_path):
    return lambda tied=False: shutil.copytree(saved[tied], tmp_path / "model")


class TestWhatTransformersReads:
    def test_a_tied_model_stored_by_its_head(self, copy):
        folder = copy(tied=True)
        rewrite(folder, lambda t: {HEAD if name == EMBEDDING else name: x for name, x in t.items()})
        assert_close(ours(folder), theirs(folder))

    @pytest.mark.parametrize("head", [False, True])
    def test_a_decoder_saved_alone(self, copy, head):
        folder = copy(tied=not head)  # with its head beside it, or tied

        def edit(tensors):
            return {name.removeprefix("model."): x for name, x in tensors.items()}

        rewrite(folder, edit)
        assert_close(ours(folder), theirs(folder))

    def test_a_base_models_own_save(self, copy, tmp_path):
        folder = copy(tied=True)
        transformers.LlamaModel.from_pretrained(folder).save_pretrained(tmp_path / "base")
        assert "embed_tokens.weight" in load_file(tmp_path / "base" / "model.safetensors")
        assert_close(ours(tmp_path / "base"), theirs(folder))

    @pytest.mark.parametrize("key", ["dtype", "torch_dtype", "hidden_act", "hidden_activation"])
    def test_keys_of_other_versions(self, copy, key):
        folder = copy()
        config = json.loads((folder / "config.json").read_text())
        config.pop("dtype"), config.pop("hidden_act")
        config[key] = "float32" if "dtype" in key else "swish"
        (folder / "config.json").write_text(json.dumps(config))
        assert_close(ours(folder), theirs(folder))


@pytest.mark.parametrize(
    "spell",
    [
        lambda name: f"_orig_mod.{name}",
        lambda name: f"module.{name}",
        lambda name: f"_orig_mod.module.{name}",
        lambda name: f"language_model.{name}",
        lambda name: f"model.{name}",
        lambda name: name.replace("model.", "model.language_model."),
        lambda name: name.replace("layers.1.", "layers.1._checkpoint_wrapped_module."),
        lambda name: "_fsdp_wrapped_module." + name.replace("mlp.", "mlp._fsdp_wrapped_module."),
    ],
)
def test_wrappers(copy, spell, saved):
    folder = copy()
    rewrite(folder, lambda tensors: {spell(name): x for name, x in tensors.items()})
    expected = open_model(str(saved[False])).checkpoint
    found = open_model(str(folder)).checkpoint
    assert found.stored == expected.stored
    for name, tensor in found.stored.items():
        whole = [tuple(slice(0, size) for size in tensor.shape)]
        np.testing.assert_array_equal(found.read(name, whole)[0], expected.read(name, whole)[0])


def test_names_of_the_model_stay(saved):
    for tied in (False, True):
        for name in load_file(saved[tied] / "model.safetensors"):
            assert plain_name(name) == name


def test_two_spellings_of_one_tensor():
    with pytest.raises(ValueError, match=r"x holds one tensor twice: as 'norm.w' and as 'model.norm.w'"):
        plain_names("x", ["norm.w", "model.norm.w"])


@pytest.mark.parametrize(
    "name",
    [
        "base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight",
        "base_model.model.model.norm.weight",
        "model.layers.0.self_attn.q_proj.lora_A.default.weight",
        "model.layers.0.mlp.up_proj.base_layer.weight",
    ],
)
def test_adapters_that_are_not_merged(name):
    with pytest.raises(ValueError, match=r"x is a PEFT model .*merge_and_unload\(\)"):
        plain_names("x", [name])


class TestHeads:
    def test_a_missing_head_is_no_tie(self, copy):
        folder = copy()
        rewrite(folder, lambda tensors: {name: x for name, x in tensors.items() if name != HEAD})
        with pytest.raises(ValueError, match=r"missing: lm_head.weight \(.*tie_word_embeddings.* true"):
            open_model(str(folder))

    def test_a_missing_embedding_of_an_untied_model(self, copy):
        folder = copy()
        rewrite(folder, lambda tensors: {name: x for name, x in tensors.items() if name != EMBEDDING})
        with pytest.raises(ValueError, match=r"missing: model.embed_tokens.weight"):
            open_model(str(folder))

    def test_another_head_is_told(self, copy):
        folder = copy()
        rewrite(folder, lambda tensors: {name.replace("lm_head", "score"): x for name, x in tensors.items()})
        with pytest.raises(ValueError, match=r"missing: lm_head.weight .*\n.*unknown: score.weight"):
            open_model(str(folder))
