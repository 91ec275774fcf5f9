"""Memory that an export needs, in the process that writes it."""

import json
import threading
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from conftest import make_byte_tokenizer
from safetensors.numpy import save_file
from support.exports import matrices

from spiel_jax.adapters import Entries, Origin, SparseAdapter, open_base, write_adapter
from spiel_jax.adapters.adapter import tensors_of
from spiel_jax.models import ModelConfig
from spiel_jax.models.io.hf_config import hf_config

pytestmark = pytest.mark.slow

MIB = 2**20


class Watch:
    """The most memory that no file stands for of this process, beyond what it was at the start, in bytes."""

    def __enter__(self):
        self._done, self._start = threading.Event(), self._now()
        self.peak = 0
        self._thread = threading.Thread(target=self._look)
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._done.set()
        self._thread.join()

    def _look(self):
        while not self._done.wait(0.001):
            self.peak = max(self.peak, self._now() - self._start)

    @staticmethod
    def _now():
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


@pytest.fixture
def large(tmp_path):
    """A model of 0.4 GB in bfloat16 in ten shards, and an adapter of it."""
    model = ModelConfig(
        vocab_size=16_000,
        hidden_size=1024,
        intermediate_size=4096,
        num_layers=10,
        num_heads=8,
        num_kv_heads=8,
        head_dim=128,
        max_positions=512,
        tie_embeddings=True,
    )
    folder, rng = tmp_path / "base", np.random.default_rng(0)
    folder.mkdir()
    noise = rng.integers(0, 2**14, 2**24, dtype=np.uint16)  # bits of numbers between 0 and 2
    tensors = {n: slot.shape for n, slot in tensors_of(model).items()}
    for number in range(10):
        part = list(tensors)[number::10]
        values = {n: noise[: np.prod(tensors[n])].reshape(tensors[n]).view(ml_dtypes.bfloat16) for n in part}
        save_file(values, folder / f"model-{number}.safetensors")
    (folder / "config.json").write_text(json.dumps(hf_config(model)))
    make_byte_tokenizer().save_pretrained(folder)
    entries = {}
    for name, shape in matrices(model).items():
        size = shape[0] * shape[1]
        positions = np.unique(rng.integers(0, size, size // 100))
        entries[name] = Entries(shape, positions, rng.normal(size=positions.size).astype(np.float32))
    origin = Origin(str(folder), {}, {"model.dtype": "bfloat16"})
    return SparseAdapter(entries, origin), open_base(str(folder), origin)


def test_merged(large, tmp_path):
    """A few copies of the largest tensor, which is less than a shard; the adapter was there before."""
    adapter, base = large
    whole = sum(2 * int(np.prod(slot.shape)) for slot in base.tensors.values())
    largest = max(2 * int(np.prod(slot.shape)) for slot in base.tensors.values())
    write_adapter(adapter, tmp_path / "first", "merged", base=base)  # what is compiled stays
    with Watch() as watch:
        write_adapter(adapter, tmp_path / "out", "merged", base=base, shard_bytes=whole // 2)
    print(*(f"{size / MIB:.0f}" for size in (whole, largest, watch.peak)))
    assert whole > 11 * largest
    assert watch.peak < 5 * largest < whole / 2
