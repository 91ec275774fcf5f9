"""A model of its own in the Hugging Face layout: the base with the adapter in it."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from spiel_jax.adapters.adapter import AdapterError
from spiel_jax.adapters.base import Base
from spiel_jax.adapters.card import write_card
from spiel_jax.adapters.files import DTYPES, Specs, read_json, write_json, write_tensors
from spiel_jax.adapters.formats.format import Export, Format, register
from spiel_jax.errors import SpielError
from spiel_jax.inference.chat import stop_tokens
from spiel_jax.models.io.hf_config import hf_config

FLOATS = ("BF16", "F16", "F32", "F64")
"""What ``--dtype`` can be, as safetensors calls it."""


@register
class Merged(Format):
    """Shards of safetensors and their index, config.json, generation_config.json, tokenizer, chat template.

    Tensors are read, merged and written one at a time. By default they are those of the run, bit for bit. In
    another dtype base and delta are summed in float32 and rounded once, to that.
    """

    name = "merged"
    kinds = ("sparse", "lora", "ia3", "full", "hybrid")
    needs_base = True

    def write(self, export: Export, folder: Path) -> None:
        """See ``Format``."""
        base = export.base
        assert base is not None
        base, dtype = base.fresh(), weights_dtype(export, base)
        specs = Specs({name: (dtype, slot.shape) for name, slot in base.tensors.items()})
        shards = _shards(specs, export.shard_bytes)
        files = {}
        for number, shard in enumerate(shards, 1):
            file = "model.safetensors"
            if len(shards) > 1:
                file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            tensors = (merged_tensor(export, base, name, dtype) for name in shard)
            write_tensors(folder / file, shard, tensors, {"format": "pt"})
            files |= dict.fromkeys(shard, file)
        if not export.adapter.whole:
            base.check(export.expected, "the adapter")
        if len(shards) > 1:
            index = {"metadata": {"total_size": specs.nbytes}, "weight_map": dict(sorted(files.items()))}
            write_json(folder / "model.safetensors.index.json", index)
        _write_the_rest(export, base, dtype, folder)


def weights_dtype(export: Export, base: Base) -> np.dtype:
    """The dtype of the weights that are written.

    Raises:
        AdapterError: If a checkpoint cannot have it.
    """
    dtype = np.dtype(base.dtype if export.dtype is None else export.dtype)
    if dtype not in [DTYPES[name] for name in FLOATS]:
        raise AdapterError(f"dtype {dtype.name}: expected bfloat16, float16, float32 or float64")
    return dtype


def merged_tensor(export: Export, base: Base, name: str, dtype: np.dtype) -> np.ndarray:
    """A tensor of the merged model."""
    adapter = export.adapter
    if adapter.whole:
        return adapter.merged(name, None, dtype)
    tensor = base.tensor(name)
    found = adapter.merged(name, tensor, dtype) if adapter.changes(name) else tensor.astype(dtype, copy=False)
    if not np.isfinite(found).all():
        raise AdapterError(f"{name} is not finite as {dtype.name}: choose another dtype")
    return found


def _shards(specs: Specs, most: int) -> list[Specs]:
    """Tensors in their order in files of at most so many bytes."""
    shards = [Specs()]
    for name, spec in specs.items():
        one = Specs({name: spec})
        if shards[-1] and shards[-1].nbytes + one.nbytes > most:
            shards.append(Specs())
        shards[-1] |= one
    return shards


def _write_the_rest(export: Export, base: Base, dtype: np.dtype, folder: Path) -> None:
    there = next(_folders(base), None)
    config = hf_config(base.config) if there is None else read_json(there / "config.json")
    for key in ("_name_or_path", "quantization_config"):
        config.pop(key, None)
    for key in {"dtype", "torch_dtype"} & config.keys() or {"torch_dtype"}:
        config[key] = dtype.name
    tokenizer = _tokenizer(base)
    said: dict[str, Any] = {}
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
        said = {
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": sorted(stop_tokens(tokenizer)) or None,
            "pad_token_id": tokenizer.pad_token_id,
        }
    if there is None:
        config |= {key: value for key, value in said.items() if key != "eos_token_id"}
        config["eos_token_id"] = None if tokenizer is None else tokenizer.eos_token_id
    write_json(folder / "config.json", config)
    if there is not None and (there / "generation_config.json").is_file():
        shutil.copyfile(there / "generation_config.json", folder / "generation_config.json")
    else:
        write_json(folder / "generation_config.json", said)
    write_card(folder, export.adapter, "transformers", dtype=dtype.name)


def _folders(base: Base) -> Iterator[Path]:
    """The folder of a base in the Hugging Face layout, if it is one."""
    checkpoint = base.source.checkpoint
    if checkpoint is not None and checkpoint.path.is_dir() and (checkpoint.path / "config.json").is_file():
        yield checkpoint.path


def _tokenizer(base: Base) -> Any:
    """The tokenizer of the run; None where the model has none, as a random one."""
    if base.source.checkpoint is None and base.tokenizer_name is None:
        return None
    try:
        return base.tokenizer()
    except SpielError as error:
        raise AdapterError(f"the merged model needs its tokenizer: {error}") from error
