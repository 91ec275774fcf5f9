"""Model folders in the Hugging Face layout: config.json, safetensors, tokenizer files."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (gives numpy the bfloat16 that safetensors asks it for)
import numpy as np
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedTokenizerBase

from spiel_jax.errors import NotFoundError, SpielError
from spiel_jax.models.config import ModelConfig
from spiel_jax.models.decoder import layer_names
from spiel_jax.models.io.names import Stored
from spiel_jax.models.io.tokenizer_files import read_tokenizer

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_FLOATING = {"F64", "F32", "F16", "BF16"}


class SafetensorsFolder:
    """A model folder whose headers have been read and found consistent.

    Attributes:
        path: The folder.
        config: From its config.json.
        stored: Every tensor by its Hugging Face name.

    Raises:
        NotFoundError: If config.json, the weights, or a shard named by the index is missing.
        SpielError: If a file is damaged or the shards contradict each other or the index.
    """

    naming = staticmethod(layer_names)

    def __init__(self, path: Path):
        self.path = path
        if not (path / "config.json").is_file():
            raise NotFoundError(f"{path} has no config.json")
        self.config = ModelConfig.from_hf(read_json(path / "config.json"))
        self.stored: dict[str, Stored] = {}
        self._files: dict[str, Path] = {}
        index = _read_index(path)
        problems = []
        for file in sorted(set(index.values())) if index else [SINGLE]:
            for name, tensor in _read_header(path / file).items():
                if name in self._files:
                    problems.append(f"doubled: {name} in {self._files[name].name} and {file}")
                elif index and index.get(name) != file:
                    listed = f"listed in {index[name]}" if name in index else "not listed"
                    problems.append(f"{listed}: {name}, found in {file}")
                self.stored[name], self._files[name] = tensor, path / file
        absent = sorted(index.keys() - self.stored.keys())
        problems += [f"absent: {name}, listed in {index[name]}" for name in absent]
        if problems:
            raise SpielError(f"{path / INDEX} and its shards disagree:\n  " + "\n  ".join(problems))

    def read(self, name: str, parts: Sequence[tuple[slice, ...]]) -> list[np.ndarray]:
        """Parts of one tensor, in the type it is stored in."""
        # opened anew each time: what a mapped file has shown stays resident until it is closed
        with safe_open(self._files[name], framework="np") as file:
            tensor = file.get_slice(name)
            return [tensor[part] for part in parts]

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The folder's tokenizer.

        Raises:
            SpielError: If there is none, or it cannot be read.
        """
        return read_tokenizer(self.path)


def read_json(path: Path, **options: Any) -> dict[str, Any]:
    """The object that a JSON file holds; ``options`` are those of ``json.loads``.

    Raises:
        SpielError: If it is no JSON, or holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"), **options)
    except ValueError as error:
        raise SpielError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise SpielError(f"{path} must hold a JSON object, got {type(value).__name__}")
    return value


def _read_index(path: Path) -> dict[str, str]:
    """The file of each tensor; empty for a model in one file."""
    if not (path / INDEX).is_file():
        if not (path / SINGLE).is_file():
            found = sorted(p.name for p in path.iterdir() if p.suffix in {".bin", ".pt", ".pth"})
            hint = ""
            if found:
                hint = (
                    f"; {', '.join(found)} cannot be read safely: convert with "
                    "transformers' save_pretrained, which writes safetensors"
                )
            raise NotFoundError(f"{path} has neither {SINGLE} nor {INDEX}{hint}")
        return {}

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        # json keeps the last of two equal keys without a word
        doubled = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
        if doubled:
            raise ValueError(f"doubled: {', '.join(doubled)}")
        return dict(pairs)

    index = read_json(path / INDEX, object_pairs_hook=unique).get("weight_map")
    if not isinstance(index, dict) or not index:
        raise SpielError(f"{path / INDEX} has no weight_map")
    files = set(index.values())
    if absent := sorted(file for file in files if not (path / file).is_file()):
        raise NotFoundError(f"{path / INDEX} names absent shards: {', '.join(absent)}")
    if SINGLE not in files and (path / SINGLE).exists():
        raise SpielError(f"{path} has both {SINGLE} and {INDEX}, which does not list it")
    return index


def _read_header(path: Path) -> dict[str, Stored]:
    try:
        with safe_open(path, framework="np") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            kinds = {name: part.get_dtype() for name, part in slices.items()}
            return {
                name: Stored(tuple(part.get_shape()), kinds[name], kinds[name] in _FLOATING)
                for name, part in slices.items()
            }
    except SafetensorError as error:
        raise SpielError(f"{path} is damaged or truncated: {error}") from error
