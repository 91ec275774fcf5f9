"""Loading models: folders, shares of devices, packed weights, random ones, the hub."""

import json
import os
import socket
import subprocess
import sys

import huggingface_hub
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
import transformers
from huggingface_hub.errors import LocalEntryNotFoundError
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.numpy import save_file
from support.hf_folders import FAMILIES, SIZES, UP, change, load, save
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from spiel_jax.models.config import ModelConfig
from spiel_jax.models.decoder import ADAPTED, abstract_params, bind, init_params, layer_names
from spiel_jax.models.io import loading
from spiel_jax.models.io.huggingface import SafetensorsFolder
from spiel_jax.models.io.loading import ModelSource, open_model
from spiel_jax.models.io.placing import distinct_parts
from spiel_jax.models.storage import Packed, storage_for


def assert_same(params, tensors, config):
    """Bit for bit, and nothing left over."""
    for name, param in params.items():
        layers = param if name.startswith("model.layers.") else [param]
        for theirs, ours in zip(layer_names(name, config.num_layers), layers, strict=True):
            np.testing.assert_array_equal(
                np.asarray(ours, np.float64), tensors.pop(theirs).double().numpy(), err_msg=theirs
            )
    if config.tie_embeddings:
        tensors.pop("lm_head.weight")
    assert not tensors


class TestFolders:
    @pytest.mark.parametrize("shard_size", ["1GB", "30KB"])
    @pytest.mark.parametrize("tied", [False, True])
    @pytest.mark.parametrize("family", FAMILIES)
    def test_equals_what_transformers_saved(self, tmp_path, family, tied, shard_size):
        tensors = save(tmp_path, family, tie_word_embeddings=tied, shard_size=shard_size)
        assert (len(list(tmp_path.glob("*.safetensors"))) > 3) == (shard_size == "30KB")
        source = open_model(str(tmp_path))
        params = source.load(jnp.float32, progress=False)
        specs = abstract_params(source.config, jnp.float32)
        assert {k: (v.shape, v.dtype) for k, v in params.items()} == {
            k: (v.shape, v.dtype) for k, v in specs.items()
        }
        assert_same(params, tensors, source.config)

    @pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32])
    def test_converts_to_the_dtype_asked_for(self, tmp_path, stored):
        tensors = save(tmp_path, dtype=stored)
        source = open_model(str(tmp_path))
        params = source.load(jnp.bfloat16, progress=False)
        assert {param.dtype for param in params.values()} == {jnp.dtype(jnp.bfloat16)}
        rounded = {name: value.bfloat16() for name, value in tensors.items()}
        assert_same(params, rounded, source.config)

    def test_shards_over_devices(self, sharded):
        mesh = jax.make_mesh((2, 4), ("fsdp", "tensor"))

        def sharding(name, shape):
            spec = {1: ("tensor",), 2: (None, "fsdp"), 3: (None, "fsdp", "tensor")}[len(shape)]
            return NamedSharding(mesh, PartitionSpec(*spec))

        whole, parts = load(sharded), load(sharded, sharding=sharding)
        for name, param in parts.items():
            assert param.sharding == sharding(name, param.shape)
            np.testing.assert_array_equal(np.asarray(param), np.asarray(whole[name]))
        stack = parts["model.layers.mlp.up_proj.weight"]
        assert {shard.data.shape for shard in stack.addressable_shards} == {(3, 24, 8)}

    def test_buffers_are_free_to_be_donated(self, single):
        # a buffer that aliased the host array it came from would be copied instead
        for param in load(single).values():
            before = param.unsafe_buffer_pointer()
            after = jax.jit(lambda x: x + 1, donate_argnums=0)(param)
            assert after.unsafe_buffer_pointer() == before

    def test_integer_parameters_are_refused(self, single):
        with pytest.raises(ValueError, match="floating point, got dtype int8"):
            load(single, jnp.int8)

    def test_tokenizer_comes_from_the_folder(self, single_copy):
        backend = Tokenizer(WordLevel({"hello": 0, "world": 1, "?": 2}, unk_token="?"))
        backend.pre_tokenizer = Whitespace()
        transformers.PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(single_copy)
        assert open_model(str(single_copy)).tokenizer()("world hello").input_ids == [1, 0]


@pytest.fixture
def reads(monkeypatch):
    """(name, shapes of the parts) of every read from a safetensors folder."""
    calls = []
    read = SafetensorsFolder.read

    def recorded(self, name, parts):
        found = read(self, name, parts)
        calls.append((name, [part.shape for part in found]))
        return found

    monkeypatch.setattr(SafetensorsFolder, "read", recorded)
    return calls


def entries(shapes):
    return sum(int(np.prod(shape)) for shape in shapes)


SPECS = {1: ("fsdp",), 2: (None, "fsdp"), 3: (None, "fsdp", "tensor")}

SHARE = """
import json, sys

import jax

jax.distributed.initialize(f"localhost:{sys.argv[2]}", 2, int(sys.argv[3]))

import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from spiel_jax.models.io.loading import open_model
from spiel_jax.models.io.huggingface import SafetensorsFolder

source = open_model(sys.argv[1])
whole = source.load(jnp.float32, progress=False)
read, taken = SafetensorsFolder.read, []

def counted(self, name, parts):
    found = read(self, name, parts)
    taken.append(sum(part.size for part in found))
    return found

SafetensorsFolder.read = counted
mesh = jax.make_mesh((2, 4), ("fsdp", "tensor"))  # the first axis is that of the processes
specs = {1: ("fsdp",), 2: (None, "fsdp"), 3: (None, "fsdp", "tensor")}
place = lambda name, shape: NamedSharding(mesh, PartitionSpec(*specs[len(shape)]))
spread = source.load(jnp.float32, sharding=place, progress=False)
for name, param in spread.items():
    assert len(param.addressable_shards) == 4
    for shard in param.addressable_shards:
        np.testing.assert_array_equal(np.asarray(shard.data), np.asarray(whole[name])[shard.index])
print(json.dumps([sum(taken), sum(param.size for param in spread.values())]))
"""


class TestShares:
    def test_devices_that_hold_the_same_share_a_read(self, sharded, reads):
        mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"))

        def place(name, shape):
            return NamedSharding(mesh, PartitionSpec(*SPECS[len(shape)]))

        params = load(sharded, sharding=place)
        assert sorted(name for name, _ in reads) == sorted(open_model(str(sharded)).checkpoint.stored)
        assert entries(shape for _, shapes in reads for shape in shapes) == sum(
            param.size for param in params.values()
        )
        assert dict(reads)[UP] == [(24, 16)] * 4

    @pytest.mark.parametrize(
        ("spec", "shapes"),
        [
            ((), [(3, 48, 32)]),
            ((None, "fsdp"), [(3, 24, 32)]),
            ((None, None, "tensor"), [(3, 48, 8)] * 4),
            ((None, "tensor", "fsdp"), [(3, 12, 16)] * 4),
            ((None, ("fsdp", "tensor")), [(3, 6, 32)] * 4),
        ],
    )
    def test_parts_of_some_of_the_devices(self, spec, shapes):
        mesh = jax.make_mesh((2, 4), ("fsdp", "tensor"))
        indices = NamedSharding(mesh, PartitionSpec(*spec)).devices_indices_map((3, 48, 32))
        ours = [indices[device] for device in mesh.devices[1]]
        parts = distinct_parts(ours, (3, 48, 32))
        whole = np.arange(3 * 48 * 32).reshape(3, 48, 32)
        found = [whole[tuple(slice(*bounds) for bounds in part)] for part in parts]
        assert [part.shape for part in found] == shapes
        selected = np.unique(np.concatenate([whole[index].ravel() for index in ours]))
        np.testing.assert_array_equal(np.sort(np.concatenate([part.ravel() for part in found])), selected)

    @pytest.mark.slow
    def test_each_process_reads_its_part(self, sharded):
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            port = str(probe.getsockname()[1])
        environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
        runs = [
            subprocess.Popen(
                [sys.executable, "-c", SHARE, str(sharded), port, number],
                env=environment,
                stdout=subprocess.PIPE,
                text=True,
            )
            for number in "01"
        ]
        try:
            outs = [run.communicate(timeout=300)[0] for run in runs]
        finally:
            for run in runs:
                run.kill()
        for run, out in zip(runs, outs, strict=True):
            assert run.returncode == 0
            taken, total = json.loads(out.splitlines()[-1])
            assert taken == total / 2

    @pytest.mark.parametrize("differs", [False, True])
    def test_a_head_is_compared_by_rows(self, tmp_path, monkeypatch, reads, differs):
        save(tmp_path, tie_word_embeddings=True)

        def edit(tensors):
            head = tensors["model.embed_tokens.weight"].copy()
            head[-1, -1] += differs
            tensors["lm_head.weight"] = head

        change(tmp_path, edit)
        monkeypatch.setattr(loading, "_COMPARED", 10 * 32 + 5)
        if differs:
            with pytest.raises(ValueError, match=r"lm_head.weight differs from model.embed_tokens"):
                load(tmp_path)
        else:
            load(tmp_path)
        compared = [shapes for name, shapes in reads if name == "lm_head.weight"]
        assert compared == [[(10, 32)]] * 9 + [[(6, 32)]]

    def test_a_head_of_another_shape_differs(self, tmp_path):
        save(tmp_path, tie_word_embeddings=True)
        change(
            tmp_path,
            lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"][:-1].copy()}),
        )
        with pytest.raises(ValueError, match=r"lm_head.weight differs from model.embed_tokens"):
            load(tmp_path)


@pytest.fixture(scope="module", params=["safetensors", "random"])
def both(request, single):
    """A model's shape, its parameters as they are, and packed."""
    source = open_model(str(single))
    if request.param == "random":
        source = ModelSource(source.config, None)
    plain = source.load(jnp.bfloat16, progress=False)
    return source.config, plain, source.load(jnp.bfloat16, storage=Packed, progress=False)


class TestPacked:
    def test_bits_are_those_of_the_numbers(self, both):
        config, plain, packed = both
        specs = abstract_params(config, jnp.bfloat16, storage=Packed)
        assert plain.keys() == packed.keys() == specs.keys()
        for name, param in packed.items():
            assert plain[name].dtype == param.dtype == specs[name].dtype == jnp.bfloat16
            assert isinstance(param, Packed) == isinstance(specs[name], Packed) == (name in ADAPTED)
            assert not isinstance(plain[name], Packed)
            held = param.bits if name in ADAPTED else param
            np.testing.assert_array_equal(
                np.asarray(held).view(np.uint16), np.asarray(plain[name]).view(np.uint16), err_msg=name
            )

    def test_gives_the_same_logits(self, both):
        config, plain, packed = both
        tokens = jnp.arange(10).reshape(2, 5)
        run = jax.jit(lambda params: bind(config, params)(tokens))
        ours, theirs = np.asarray(run(packed)), np.asarray(run(plain))
        assert np.isfinite(ours).all()
        np.testing.assert_array_equal(ours.view(np.uint32), theirs.view(np.uint32))

    def test_other_widths_stay_as_they_are(self, single):
        assert storage_for("none", jnp.float32) is None
        params = load(single, storage=storage_for("none", jnp.float32))
        assert {param.dtype for param in params.values()} == {jnp.dtype(jnp.float32)}
        with pytest.raises(ValueError, match="bits are held of bfloat16 and float16 weights, got float32"):
            load(single, storage=Packed)


class TestRandom:
    def test_is_what_init_params_draws(self):
        config = ModelConfig(
            vocab_size=8,
            hidden_size=8,
            intermediate_size=8,
            num_layers=2,
            num_heads=2,
            num_kv_heads=2,
            head_dim=4,
            max_positions=16,
        )
        place = NamedSharding(jax.make_mesh((8,), ("fsdp",)), PartitionSpec())
        params = ModelSource(config, None).load(
            jnp.bfloat16, seed=7, sharding=lambda name, shape: place, progress=False
        )
        expected = init_params(config, jax.random.key(7), jnp.bfloat16)
        assert params.keys() == expected.keys()
        for name, param in params.items():
            assert (param.dtype, param.sharding) == (jnp.bfloat16, place)
            np.testing.assert_array_equal(
                np.asarray(param, np.float32), np.asarray(expected[name], np.float32)
            )

    def test_takes_a_preset(self):
        assert open_model("random", preset="llama2_7b").config == ModelConfig.llama2_7b()

    @pytest.mark.parametrize("preset", [None, "llama9", "from_hf", "__init__"])
    def test_unknown_preset_lists_the_known_ones(self, preset):
        with pytest.raises(ValueError, match=r"preset.*: expected one of .*llama2_7b, .*smollm2_135m"):
            open_model("random", preset=preset)

    def test_preset_of_another_source_is_refused(self, single):
        with pytest.raises(ValueError, match='a preset is for the source "random"'):
            open_model(str(single), preset="llama2_7b")

    def test_has_no_tokenizer(self):
        with pytest.raises(ValueError, match="a random model has no tokenizer"):
            open_model("random", preset="llama2_7b").tokenizer()


class TestHub:
    def test_downloads_one_format_and_loads_it(self, single, monkeypatch, tmp_path):
        calls = []

        def download(repo, **options):
            calls.append((repo, options))
            return str(single)

        monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
        config = open_model("some-org/Some.Model_1", cache_dir=tmp_path).config
        assert config.num_layers == 3
        ((repo, options),) = calls
        assert repo == "some-org/Some.Model_1"
        assert options["cache_dir"] == tmp_path
        wanted = huggingface_hub.utils.filter_repo_objects(
            [
                "config.json",
                "model-00001-of-00002.safetensors",
                "tokenizer.model",
                "chat_template.jinja",
                "pytorch_model.bin",
                "consolidated.safetensors",
                "original/params.json",
            ],
            allow_patterns=options["allow_patterns"],
            ignore_patterns=options["ignore_patterns"],
        )
        assert list(wanted) == [
            "config.json",
            "model-00001-of-00002.safetensors",
            "tokenizer.model",
            "chat_template.jinja",
        ]

    def test_without_a_network(self, monkeypatch):
        def download(repo, **options):
            raise LocalEntryNotFoundError("no connection")

        monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
        with pytest.raises(FileNotFoundError, match=r"'a/b' is neither .* hub: no connection"):
            open_model("a/b")

    @pytest.mark.parametrize("source", ["nowhere", "./no/model", "/no/model", "no/model.gguf"])
    def test_what_cannot_be_an_id_is_not_looked_up(self, source, monkeypatch):
        monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
        with pytest.raises(FileNotFoundError, match="no model at"):
            open_model(source)


MEASURE = """
import resource, sys
import jax.numpy as jnp
from spiel_jax.models.io.loading import open_model

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

source = open_model(sys.argv[1])
jnp.zeros(3).block_until_ready()
before = peak()
params = source.load(sys.argv[2], progress=False)
print((peak() - before) / sum(param.nbytes for param in params.values()))
"""


@pytest.mark.slow
def test_peak_host_memory_is_near_the_models_size(tmp_path):
    config = SIZES | {
        "model_type": "llama",
        "hidden_size": 1024,
        "intermediate_size": 8192,
        "num_hidden_layers": 8,
        "head_dim": 64,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    specs = abstract_params(ModelConfig.from_hf(config))
    tensors = {}
    for name, spec in specs.items():
        for layer in layer_names(name, 8):
            shape = spec.shape[1:] if name.startswith("model.layers.") else spec.shape
            tensors[layer] = np.ones(shape, ml_dtypes.bfloat16)
    save_file(tensors, tmp_path / "model.safetensors")  # 400 MB
    command = [sys.executable, "-c", MEASURE, str(tmp_path), "bfloat16"]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert float(run.stdout) < 1.25
