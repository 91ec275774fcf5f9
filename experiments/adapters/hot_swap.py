r"""Switching adapters in resident weights against merging each anew: time and memory, as ratios.

    python -m experiments.adapters.hot_swap --layers=2 --rank=64

The matrices are those of the linears of Llama 2 7B of a few layers; entries as many as rank-64
LoRA has parameters, in random places. Merging anew takes the pretrained weights, which must be kept, and
writes every changed one; switching takes the old entries out and puts the new ones in. The memory of all
layers is what the compiled programs say of them, beside the weights in use; nothing of that is allocated.
Writes hot_swap.json into --out.
"""

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from spiel_jax import cli
from spiel_jax.adapters import Entries, HotSwap, SparseAdapter
from spiel_jax.adapters.adapter import tensors_of
from spiel_jax.adapters.hot_swap import _cover, _put_in, _take_out
from spiel_jax.models import ModelConfig
from spiel_jax.models.io.loading import model_shape
from spiel_jax.sparse.delta import SparseDelta, merge

MIB = 2**20


def define_flags(values: flags.FlagValues) -> None:
    """Defines the flags of the command."""
    flags.DEFINE_integer("layers", 2, "Of Llama 2 7B, that are measured.", lower_bound=1, flag_values=values)
    flags.DEFINE_integer("rank", 64, "LoRA's of as many parameters.", lower_bound=1, flag_values=values)
    flags.DEFINE_integer(
        "rounds", 7, "Switches and merges that are timed.", lower_bound=1, flag_values=values
    )
    flags.DEFINE_enum("dtype", "bfloat16", ["bfloat16", "float32"], "Of the weights.", flag_values=values)
    flags.DEFINE_string("out", "results/hot_swap", "Folder to write.", flag_values=values)


def shapes(model: ModelConfig) -> dict[str, tuple[int, int]]:
    """Of the linears of the blocks."""
    found = {n: slot.shape for n, slot in tensors_of(model).items() if n.endswith("_proj.weight")}
    return {name: (rows, columns) for name, (rows, columns) in found.items()}


def random_adapter(model: ModelConfig, rank: int, seed: int) -> SparseAdapter:
    """As many entries of each matrix as LoRA of this rank has parameters."""
    rng, entries = np.random.default_rng(seed), {}
    for name, (rows, columns) in shapes(model).items():
        count = rank * (rows + columns)
        # a random one of each stretch: distinct and ascending without a permutation of the whole matrix
        starts = np.arange(count, dtype=np.int64) * (rows * columns) // count
        positions = starts + rng.integers(0, rows * columns // count, count)
        entries[name] = Entries((rows, columns), positions, rng.normal(0, 0.01, count).astype(np.float32))
    return SparseAdapter(entries)


def seconds(function: Callable[[int], Any], rounds: int) -> float:
    """Median time of a call, after one that compiles each program."""
    times = []
    for number in range(rounds + 2):
        start = time.perf_counter()
        jax.block_until_ready(function(number))
        times.append(time.perf_counter() - start)
    return median(times[2:])


def _temporaries(lowered: Any) -> int:
    """Bytes that a program needs beside what it is given and what it returns."""
    return lowered.compile().memory_analysis().temp_size_in_bytes


def compiled_memory(model: ModelConfig, rank: int, dtype: Any) -> dict[str, float]:
    """MiB that each way needs of a whole model beside the weights in use and the adapter, by compiling."""
    deltas, weights = {}, {}
    for name, (rows, columns) in shapes(replace(model, num_layers=1)).items():
        parameter = name.replace(".0.", ".")
        count = rank * (rows + columns)
        slots = (model.num_layers, count)
        indices, values = (jax.ShapeDtypeStruct(slots, dtype) for dtype in (jnp.int32, jnp.float32))
        deltas[parameter] = SparseDelta(indices, values, (rows, columns))  # pyright: ignore
        weights[parameter] = jax.ShapeDtypeStruct((model.num_layers, rows, columns), dtype)
    held = sum(weight.size * dtype.itemsize for weight in weights.values())
    found = {"weights": held, "adapter": sum(leaf.size * 4 for leaf in jax.tree.leaves(deltas))}
    kept, temporary = 0, []
    for name, delta in deltas.items():
        covered = jax.eval_shape(_cover, weights[name], delta)
        kept += covered.size * covered.dtype.itemsize
        programs = [_cover.lower(weights[name], delta)]
        programs += [program.lower(weights[name], delta, covered) for program in (_put_in, _take_out)]
        temporary += [_temporaries(one) for one in programs]
    found["hot swap"] = kept + max(temporary)
    anew = _temporaries(jax.jit(merge).lower(weights, deltas))
    found["merging anew"] = held + anew  # the pretrained weights beside the merged ones
    return {name: size / MIB for name, size in found.items()}


def main(options: flags.FlagValues) -> None:
    """Measures, prints and writes."""
    whole = model_shape("random", "llama2_7b")
    model = replace(whole, num_layers=options.layers)
    rng = np.random.default_rng(0)
    adapters = [random_adapter(model, options.rank, seed) for seed in range(2)]
    params = {}
    for name, shape in shapes(replace(model, num_layers=1)).items():
        stack = rng.integers(0x3C00, 0x3D00, (model.num_layers, *shape), dtype=np.uint16)  # about 0.01
        params[name.replace(".0.", ".")] = jnp.asarray(stack.view(jnp.bfloat16)).astype(options.dtype)
    deltas = [adapter.deltas(model) for adapter in adapters]
    merging = jax.jit(merge)
    anew = seconds(lambda number: merging(params, deltas[number % 2]), options.rounds)
    swap = HotSwap(params, model)
    for number, adapter in enumerate(adapters):
        swap.add(str(number), adapter)
    swapped = seconds(lambda number: swap.use(str(number % 2)), options.rounds)
    memory = compiled_memory(whole, options.rank, jnp.dtype(options.dtype))
    found = {
        "device": jax.devices()[0].device_kind,
        "dtype": options.dtype,
        "layers": options.layers,
        "entries": adapters[0].count,
        "density": adapters[0].density,
        "seconds merging anew": anew,
        "seconds hot swap": swapped,
        "ratio of time": anew / swapped,
        "MiB of 32 layers": memory,
        "ratio of memory": memory["merging anew"] / memory["hot swap"],
    }
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "hot_swap.json").write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    cli.run(main, define_flags)
