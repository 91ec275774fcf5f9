"""Damaged and hostile model files: mutants of each kind are refused plainly, or read as what they say."""

import itertools
import json
import os
import random
import time

import gguf
import numpy as np
import pytest
import transformers
from safetensors.numpy import load_file, save_file
from support.mutants import bytes_mutated, json_mutated
from tokenizers import Tokenizer, models, pre_tokenizers

from spiel_jax.errors import SpielError
from spiel_jax.models.config import ModelConfig
from spiel_jax.models.decoder import layer_names
from spiel_jax.models.io.loading import open_model
from spiel_jax.models.io.names import expected_tensors, gguf_names

SEVERAL, MANY = 20, int(os.environ.get("SPIEL_JAX_MUTANTS", "200"))
SECONDS = 20  # of one mutant; each takes about a hundredth of one
CONFIG = {
    "model_type": "qwen2",
    "vocab_size": 8,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 16,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "use_sliding_window": True,
    "sliding_window": 4,
    "max_window_layers": 1,
    "layer_types": ["full_attention", "sliding_attention"],
}
TOKENS = ["<s>", "a", "b", "c", "ab", "bc", "Ġ", "d"]


def tensors_of(naming):
    slots = expected_tensors(ModelConfig.from_hf(CONFIG), naming)
    return {name: np.ones(slot.shape, np.float32) for name, slot in slots.items()}


def write_gguf(folder):
    writer = gguf.GGUFWriter(folder / "tiny.gguf", "qwen2")
    writer.add_block_count(2)
    writer.add_context_length(16)
    writer.add_embedding_length(8)
    writer.add_feed_forward_length(8)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(1e4)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] + [1] * 7)
    writer.add_token_merges(["a b", "b c"])
    writer.add_bos_token_id(0)
    writer.add_chat_template("{{ messages }}")
    for name, value in tensors_of(gguf_names).items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_folder(folder):
    (folder / "config.json").write_text(json.dumps(CONFIG))
    items = list(tensors_of(layer_names).items())
    files = {"one.safetensors": dict(items[:9]), "two.safetensors": dict(items[9:])}
    for file, tensors in files.items():
        save_file(tensors, folder / file)
    index = {name: file for file, tensors in files.items() for name in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(TOKENS)}, [("a", "b"), ("b", "c")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    transformers.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>").save_pretrained(folder)


def header_end(data):
    return 8 + int.from_bytes(data[:8], "little")


KINDS = {
    "tiny.gguf": (write_gguf, lambda draw, data: bytes_mutated(draw, data, data.rindex(b".weight") + 32)),
    "one.safetensors": (write_folder, lambda draw, data: bytes_mutated(draw, data, header_end(data))),
    "config.json": (write_folder, json_mutated),
    "model.safetensors.index.json": (write_folder, json_mutated),
    "tokenizer.json": (write_folder, json_mutated),
    "tokenizer_config.json": (write_folder, json_mutated),
}


def use(folder):
    """Everything that a run takes from a model's files."""
    source = open_model(str(folder))
    checkpoint = source.checkpoint
    for name, stored in checkpoint.stored.items():
        (array,) = checkpoint.read(name, [tuple(slice(0, size) for size in stored.shape)])
        assert array.shape == stored.shape
        assert np.issubdtype(array.dtype, np.floating) or not stored.floating
    assert source.tokenizer() is not None
    return source.config


@pytest.mark.parametrize("count", [SEVERAL, pytest.param(MANY, marks=pytest.mark.slow)])
@pytest.mark.parametrize("file", KINDS)
def test_mutants_are_refused_plainly_or_read(tmp_path, file, count):
    write, mutate = KINDS[file]
    write(tmp_path)
    whole = (tmp_path / file).read_bytes()
    expected = use(tmp_path)
    refused = 0
    for seed in range(count):
        (tmp_path / file).write_bytes(mutate(random.Random(f"{file} {seed}"), whole))
        start = time.monotonic()
        try:
            config = use(tmp_path)
        except SpielError as error:
            refused += 1
            message = str(error)
            assert str(tmp_path) in message, seed
            assert len(message.encode()) < 20_000, seed  # no lone surrogates, which cannot be printed
        except BaseException as error:
            raise AssertionError(f"mutant {seed} of {file} raises {type(error).__name__}") from error
        else:
            if file not in ("tiny.gguf", "config.json"):
                assert config == expected, seed
        assert time.monotonic() - start < SECONDS, seed
    assert refused > count / 5  # or the mutators change nothing that matters


def test_the_unmutated_files_are_read(tmp_path):
    write_folder(tmp_path)
    config = use(tmp_path)
    assert config.sliding_layers == (False, True)
    assert sorted(itertools.chain(*(load_file(f) for f in tmp_path.glob("*.safetensors")))) == sorted(
        tensors_of(layer_names)
    )
