"""A model of the size that is trained in practice loads in little more memory than it takes."""

import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from spiel_jax.models.config import ModelConfig
from spiel_jax.models.decoder import abstract_params, layer_names
from spiel_jax.models.io.loading import open_model
from spiel_jax.models.io.names import expected_tensors

pytestmark = pytest.mark.slow

CONFIG = ModelConfig.llama2_7b()
NEEDED = 20 * 10**9  # bytes of disk and of memory
ALLOWED = 2 * 10**9  # bytes beside the model
SHARDS = 3
PERIOD = 2**23 - 15  # a prime: no two rows are alike


def random_bits():
    """The bits of ``PERIOD`` bfloat16 numbers: those of every tensor, from another start on."""
    values = np.random.default_rng(0).normal(scale=0.02, size=PERIOD)
    return values.astype(ml_dtypes.bfloat16).view(np.uint16)


def start_of(number):
    return number * 1_000_003 % PERIOD


def write_tensor(file, bits, start, count):
    while count:
        part = bits[start : start + count]
        file.write(part.data)
        count -= part.size
        start = 0


def write_model(folder):
    """A folder in the Hugging Face layout, written as a stream."""
    bits = random_bits()
    slots = expected_tensors(CONFIG, layer_names)
    numbers = {name: number for number, name in enumerate(slots)}
    index = {}
    for shard in range(SHARDS):
        file_name = f"model-{shard + 1:05}-of-{SHARDS:05}.safetensors"
        header, end = {}, 0
        for name in list(slots)[shard::SHARDS]:  # the layers of a stack are in all of them
            begin, end = end, end + 2 * math.prod(slots[name].shape)
            header[name] = {"dtype": "BF16", "shape": slots[name].shape, "data_offsets": (begin, end)}
            index[name] = file_name
        head = json.dumps(header).encode()
        head += b" " * (-len(head) % 8)
        with (folder / file_name).open("wb") as file:
            file.write(len(head).to_bytes(8, "little") + head)
            for name in header:
                write_tensor(file, bits, start_of(numbers[name]), math.prod(slots[name].shape))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    config = {
        "model_type": "llama",
        "vocab_size": CONFIG.vocab_size,
        "hidden_size": CONFIG.hidden_size,
        "intermediate_size": CONFIG.intermediate_size,
        "num_hidden_layers": CONFIG.num_layers,
        "num_attention_heads": CONFIG.num_heads,
        "num_key_value_heads": CONFIG.num_kv_heads,
        "head_dim": CONFIG.head_dim,
        "max_position_embeddings": CONFIG.max_positions,
        "rms_norm_eps": CONFIG.rms_norm_eps,
        "tie_word_embeddings": CONFIG.tie_embeddings,
    }
    (folder / "config.json").write_text(json.dumps(config))


def some_entries(count=20):
    """(parameter, index) pairs of every parameter, with the bits that were written there."""
    bits, random = random_bits(), np.random.default_rng(1)
    specs = abstract_params(CONFIG)
    first = {}  # number of a parameter's first tensor
    for number, slot in enumerate(expected_tensors(CONFIG, layer_names).values()):
        first.setdefault(slot.parameter, number)
    places, written = [], []
    for name, spec in specs.items():
        corners = [[0] * len(spec.shape), [size - 1 for size in spec.shape]]
        for index in [*corners, *random.integers(0, spec.shape, (count, len(spec.shape))).tolist()]:
            stacked = name.startswith("model.layers.")
            layer, inner = (index[0], index[1:]) if stacked else (0, index)
            offset = np.ravel_multi_index(inner, spec.shape[stacked:])
            places.append((name, index))
            written.append(int(bits[(start_of(first[name] + layer) + offset) % PERIOD]))
    return places, written


def available_memory():
    """Bytes that a new process can have; None where the system does not say."""
    path = Path("/proc/meminfo")
    found = re.search(r"MemAvailable: *(\d+) kB", path.read_text()) if path.exists() else None
    return None if found is None else int(found[1]) * 1024


@pytest.fixture
def folder(tmp_path):
    free = shutil.disk_usage(tmp_path).free
    if free < NEEDED:
        pytest.skip(f"needs {NEEDED / 1e9:.0f} GB of disk, {free / 1e9:.1f} GB are free")
    memory = available_memory()
    if memory is None or memory < NEEDED:
        found = "unknown" if memory is None else f"{memory / 1e9:.1f} GB"
        pytest.skip(f"needs {NEEDED / 1e9:.0f} GB of memory, available: {found}")
    path = tmp_path / "llama2_7b"
    path.mkdir()
    try:
        write_model(path)
        yield path
    finally:
        shutil.rmtree(path)  # not left to pytest, which keeps the last three


MEASURE = """
import json, resource, sys, time
import jax.numpy as jnp
import numpy as np
import jax
from spiel_jax.models.io.loading import open_model
from spiel_jax.models.storage import Packed

start = time.monotonic()
params = open_model(sys.argv[1]).load(jnp.bfloat16, storage=Packed, progress=False)
result = {
    "seconds": time.monotonic() - start,
    "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    "size": sum(param.nbytes for param in params.values()),
}
bits = {name: np.asarray(*jax.tree.leaves(param)).view(np.uint16) for name, param in params.items()}
result["bits"] = [int(bits[name][tuple(index)]) for name, index in json.load(sys.stdin)]
print(json.dumps(result))
"""


def test_peak_memory_is_that_of_the_model(folder):
    assert open_model(str(folder)).config == CONFIG
    places, written = some_entries()
    command = [sys.executable, "-c", MEASURE, str(folder)]
    run = subprocess.run(command, input=json.dumps(places), stdout=subprocess.PIPE, text=True, check=True)
    result = json.loads(run.stdout)
    print(*(f"{name}={result[name]:,.0f}" for name in ("seconds", "size", "peak")))
    assert result["bits"] == written
    assert result["size"] == 2 * sum(math.prod(spec.shape) for spec in abstract_params(CONFIG).values())
    assert result["peak"] <= result["size"] + ALLOWED
