"""Model folders in the Hugging Face layout: config.json, safetensors, tokenizer files."""

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes  # noqa: F401  (gives numpy the bfloat16 that safetensors asks it for)
import numpy as np
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedTokenizerBase

from spiel_jax.errors import NotFoundError, SpielError
from spiel_jax.models.config import ModelConfig
from spiel_jax.models.config_keys import shown
from spiel_jax.models.decoder import EMBEDDING, layer_names
from spiel_jax.models.io.json_files import read_json
from spiel_jax.models.io.messages import bullets, pointer_hint, told
from spiel_jax.models.io.names import HEAD, Stored
from spiel_jax.models.io.parts import parts_of
from spiel_jax.models.io.spellings import plain_names
from spiel_jax.models.io.tokenizer_files import read_tokenizer

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_FLOATING = {"F64", "F32", "F16", "BF16"}
_UNSAFE = {".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack"}


class SafetensorsFolder:
    """A model folder whose headers have been read and found consistent.

    Attributes:
        path: The folder.
        config: From its config.json.
        stored: Every tensor by the model's own name of it, however the folder spells it.

    Raises:
        NotFoundError: If config.json, the weights, or one of their shards is missing.
        SpielError: If a file is damaged or the shards contradict each other or the index.
    """

    naming = staticmethod(layer_names)

    def __init__(self, path: Path):
        self.path = path
        self.config = read_config(path)
        tensors = _read_tensors(path)
        self._places = {
            name: (tensors[spelt].file, spelt) for name, spelt in plain_names(str(path), tensors).items()
        }
        if self.config.tie_embeddings and HEAD in self._places and EMBEDDING not in self._places:
            self._places[EMBEDDING] = self._places.pop(HEAD)  # one of the two is enough
        self.stored = {name: tensors[spelt].stored for name, (_, spelt) in self._places.items()}

    def read(self, name: str, parts: Sequence[tuple[slice, ...]]) -> list[np.ndarray]:
        """Parts of one tensor, in the type it is stored in."""
        path, spelt = self._places[name]
        # opened anew each time: what a mapped file has shown stays resident until it is closed
        with safe_open(path, framework="np") as file:
            tensor = file.get_slice(spelt)
            return [tensor[part] for part in parts]

    def mapped(self, name: str) -> np.ndarray:
        """The bytes of one tensor, whatever its type; read as they are looked at, let go with the array."""
        path, spelt = self._places[name]
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            first, stop = json.loads(file.read(length))[spelt]["data_offsets"]
        return np.memmap(path, np.uint8, "r", 8 + length + first, (stop - first,))

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The folder's tokenizer.

        Raises:
            SpielError: If there is none, or it cannot be read.
        """
        return read_tokenizer(self.path)


def read_config(folder: Path) -> ModelConfig:
    """The shape that the config.json of a folder tells.

    Raises:
        NotFoundError: If there is none.
        SpielError: If it cannot be used; the key is named.
    """
    path = folder / "config.json"
    if not os.path.isfile(path):
        if (folder / "adapter_config.json").exists():
            raise NotFoundError(
                f"{folder} is an adapter and has no config.json: give the model it belongs to"
            )
        raise NotFoundError(f"{folder} has no config.json")
    values = read_json(path)
    try:
        return ModelConfig.from_hf(values)
    except SpielError as error:
        raise SpielError(f"{path}: {error}") from error


@dataclass(frozen=True)
class _Tensor:
    file: Path
    stored: Stored


def _read_tensors(path: Path) -> dict[str, _Tensor]:
    """Every tensor of a folder, by its name there."""
    index = _read_index(path)
    files = sorted(set(index.values())) if index else [file.name for file in _weight_files(path)]
    tensors: dict[str, _Tensor] = {}
    problems = []
    for file in files:
        for name, tensor in _read_header(path / file).items():
            if name in tensors:
                problems.append(f"doubled: {name} in {tensors[name].file.name} and {file}")
            elif index and index.get(name) != file:
                listed = f"listed in {index[name]}" if name in index else "not listed"
                problems.append(f"{listed}: {name}, found in {file}")
            tensors[name] = _Tensor(path / file, tensor)
    absent = sorted(index.keys() - tensors.keys())
    problems += [f"absent: {name}, listed in {index[name]}" for name in absent]
    if problems:
        who = f"{path / INDEX} and its shards" if index else f"the files of {path}"
        raise SpielError(f"{who} disagree:{bullets(problems)}")
    return tensors


def _weight_files(path: Path) -> list[Path]:
    """The files of a folder without an index: the usual one, or all there are."""
    if (path / SINGLE).is_file():
        return [path / SINGLE]
    files = sorted(path.glob("*.safetensors"))
    if not files:
        found = sorted(p.name for p in path.iterdir() if p.suffix in _UNSAFE)
        hint = ""
        if found:
            hint = (
                f"; {', '.join(found)} cannot be read safely: convert with "
                "transformers' save_pretrained, which writes safetensors"
            )
        raise NotFoundError(f"{path} has neither {SINGLE} nor {INDEX}{hint}")
    for file in files:
        parts_of(file)
    return files


def _read_index(path: Path) -> dict[str, str]:
    """The file of each tensor; empty for a model without an index."""
    if not os.path.isfile(path / INDEX):
        return {}
    index = read_json(path / INDEX).get("weight_map")
    if not isinstance(index, dict) or not index:
        raise SpielError(f"{path / INDEX} has no weight_map")
    for name, file in index.items():
        if not isinstance(file, str) or not _inside(file):
            raise SpielError(
                f"{path / INDEX} must name a file of its folder for {shown(name)}, got {shown(file)}"
            )
    files = set(index.values())
    if absent := sorted(file for file in files if not os.path.isfile(path / file)):
        raise NotFoundError(f"{path / INDEX} names absent shards: {', '.join(map(told, absent[:5]))}")
    if SINGLE not in files and (path / SINGLE).exists():
        raise SpielError(f"{path} has both {SINGLE} and {INDEX}, which does not list it")
    return index


def _inside(file: str) -> bool:
    """Whether a file's name stays in its folder, on any system."""
    return not (file.startswith(("/", "\\")) or ":" in file or ".." in re.split(r"[/\\]", file))


def _read_header(path: Path) -> dict[str, Stored]:
    try:
        with safe_open(path, framework="np") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            kinds = {name: part.get_dtype() for name, part in slices.items()}
            return {
                name: Stored(tuple(part.get_shape()), kinds[name], kinds[name] in _FLOATING)
                for name, part in slices.items()
            }
    except (SafetensorError, OSError, ValueError) as error:
        problem = pointer_hint(path) or f" is damaged or truncated: {told(error)}"
        raise SpielError(f"{path}{problem}") from error
