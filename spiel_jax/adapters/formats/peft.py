"""What PEFT's formats have in common; ``--format=peft`` is the one of them that fits the adapter.

A folder with ``adapter_config.json`` and ``adapter_model.safetensors`` (or ``.bin``). A tensor's name is
``base_model.model.``, the module's name, and what it is of the module's adapter.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from spiel_jax.adapters.adapter import Adapter, AdapterError
from spiel_jax.adapters.card import write_card
from spiel_jax.adapters.entries import Entries
from spiel_jax.adapters.files import read_json, read_tensors, write_dict, write_json
from spiel_jax.adapters.formats.description import Description, describe, described
from spiel_jax.adapters.formats.format import FORMATS, Export, Format, register
from spiel_jax.adapters.sparse_adapter import SparseAdapter
from spiel_jax.adapters.torch_file import read_torch
from spiel_jax.errors import SpielError
from spiel_jax.models.config import ModelConfig

CONFIG = "adapter_config.json"
_WEIGHTS, _OLD_WEIGHTS = "adapter_model.safetensors", "adapter_model.bin"
_PREFIX = "base_model.model."

NEUTRAL = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "inference_mode",
        "peft_type",
        "peft_version",
        "revision",
        "runtime_config",
        "target_modules",
        "exclude_modules",
        "layers_pattern",
        "layers_to_transform",
        "task_type",
        "megatron_core",
        "ensure_weight_tying",
    }
)
"""Keys of every configuration of PEFT that change nothing of what its tensors mean."""


class PeftFormat(Format):
    """A type of adapters of PEFT.

    Attributes:
        peft_type: What PEFT calls it.
        parts: What follows a module's name in the names of its tensors.
        neutral: Keys of its configuration that change nothing of what its tensors mean.
        read_keys: Keys that ``adapter`` reads.
    """

    reads = True
    peft_type: ClassVar[str]
    parts: ClassVar[tuple[str, ...]]
    neutral: ClassVar[frozenset[str]] = frozenset()
    read_keys: ClassVar[frozenset[str]] = frozenset()

    def contents(self, export: Export) -> tuple[dict[str, Any], dict[str, dict[str, np.ndarray]]]:
        """Keys of the configuration, and for each weight its tensors by part."""
        raise NotImplementedError

    def adapter(
        self, config: Mapping[str, Any], weights: Mapping[str, dict[str, np.ndarray]], about: "About"
    ) -> Adapter:
        """The adapter of these."""
        raise NotImplementedError

    def meaning(self, adapter: Adapter) -> Any:
        """What of the configuration the tensors' meaning depends on: JSON-like, kept beside the tensors."""
        del adapter

    def write(self, export: Export, folder: Path) -> None:
        """See ``Format``."""
        adapter = export.adapter
        keys, weights = self.contents(export)
        modules = sorted(map(_module, weights))
        config = {
            "auto_mapping": None,
            "base_model_name_or_path": adapter.origin.base,
            "inference_mode": True,
            "peft_type": self.peft_type,
            "revision": None,
            "target_modules": modules,
            "task_type": "CAUSAL_LM",
            **keys,
        }
        tensors = {
            f"{_PREFIX}{_module(name)}.{part}": tensor
            for name, parts in sorted(weights.items())
            for part, tensor in parts.items()
        }
        more = describe(adapter, tensors, self.name, meaning=json.dumps(self.meaning(adapter)))
        write_dict(folder / _WEIGHTS, tensors, {"format": "pt", **more})
        write_json(folder / CONFIG, config)
        write_card(folder, adapter, "peft", format=self.peft_type, modules=len(modules))

    def recognises(self, path: Path) -> bool:
        """See ``Format``."""
        return peft_type(path) == self.peft_type

    def read(self, path: Path, model: ModelConfig | None) -> Adapter:
        """See ``Format``."""
        config, (tensors, metadata) = read_json(path / CONFIG), read_weights(path)
        known = NEUTRAL | self.neutral | self.read_keys
        if odd := sorted(key for key, value in config.items() if value and key not in known):
            raise AdapterError(f"{CONFIG}: {odd[0][:100]} = {str(config[odd[0]])[:100]} is not supported")
        base = config.get("base_model_name_or_path")
        about = About(described(metadata, tensors, base if isinstance(base, str) else ""), model)
        weights: dict[str, dict[str, np.ndarray]] = {}
        for name, tensor in tensors.items():
            module, part = _split(name, self.parts)
            weights.setdefault(f"{module}.weight", {})[part] = tensor
        for name, parts in weights.items():
            if missing := set(self.parts) - parts.keys():
                raise AdapterError(f"{name} has no {', '.join(sorted(missing))}")
        if not weights:
            raise AdapterError("it has no tensors")
        adapter = self.adapter(config, dict(sorted(weights.items())), about)
        said = about.description.said
        if said and said.get("meaning") != json.dumps(self.meaning(adapter)):
            raise AdapterError(f"{CONFIG} was changed after it was written: its tensors were of another one")
        return adapter


class About:
    """What is known of the weights of an adapter that is read.

    Attributes:
        description: What the file says.
        model: Shape of the base model, where it is known.
    """

    def __init__(self, description: Description, model: ModelConfig | None):
        self.description, self.model = description, model

    @property
    def origin(self) -> Any:
        """Of the adapter."""
        return self.description.origin

    def shape(self, name: str) -> tuple[int, int]:
        """(out, in) of a weight; raises ``AdapterError`` where nothing says it."""
        return self.description.shape(name, self.model)

    def known(self, name: str, shape: tuple[int, int]) -> None:
        """Makes sure of a shape that the tensors themselves tell."""
        if (self.model is not None or self.description.shapes) and self.shape(name) != shape:
            raise AdapterError(f"{name} is {list(shape)}, expected {list(self.shape(name))}")


def sparse_adapter(
    weights: Mapping[str, dict[str, np.ndarray]],
    about: About,
    parts: tuple[str, str],
    flat: Callable[[np.ndarray, tuple[int, int]], np.ndarray] | None = None,
) -> SparseAdapter:
    """The adapter whose positions and values are two tensors of each weight.

    Args:
        weights: Name of the weight to its tensors by part.
        about: The folder that they are of.
        parts: Names of the positions and of the values.
        flat: Makes flat positions of a weight's, given its shape; None: they are flat.

    Raises:
        AdapterError: If a weight's are not valid, with its name.
    """
    indices, values = parts
    entries = {}
    for name, tensors in weights.items():
        shape = about.shape(name)
        try:
            positions = tensors[indices] if flat is None else flat(tensors[indices], shape)
            entries[name] = Entries.unordered(shape, positions, tensors[values])
        except AdapterError as error:
            raise AdapterError(f"{name}: {error}") from error
    return SparseAdapter(entries, about.origin)


def matrix(name: str, tensor: np.ndarray) -> np.ndarray:
    """A factor of a weight's term of low rank, in float32.

    Raises:
        AdapterError: If its numbers are of another kind.
    """
    if tensor.dtype.kind not in "fV":
        raise AdapterError(f"{name}: {tensor.dtype} matrices, expected floating-point numbers")
    return tensor.astype(np.float32)


def peft_type(path: Path) -> str | None:
    """What type a folder's configuration says; None if there is none that can be read."""
    try:
        found = read_json(path / CONFIG).get("peft_type")
    except SpielError:
        return None
    return found if isinstance(found, str) else None


def read_weights(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Tensors and metadata of an adapter's folder.

    Raises:
        NotFoundError: If there are none.
        AdapterError: If they are damaged.
    """
    if (path / _WEIGHTS).exists() or not (path / _OLD_WEIGHTS).exists():
        return read_tensors(path / _WEIGHTS)
    return read_torch(path / _OLD_WEIGHTS), {}


def _module(weight: str) -> str:
    return weight.removesuffix(".weight")


def _split(name: str, parts: tuple[str, ...]) -> tuple[str, str]:
    """Module and part of a tensor's name."""
    for part in parts:
        if name.startswith(_PREFIX) and name.endswith(f".{part}"):
            return name.removeprefix(_PREFIX).removesuffix(f".{part}"), part
    raise AdapterError(
        f"the tensor {name[:200]!r} is not supported: expected {_PREFIX}MODULE.{{{', '.join(parts)}}}"
    )


@register
class Peft(Format):
    """The type of PEFT's that fits: SUPERTUNING (of sparse and low rank with a rank), SHIRA, LORA, IA3."""

    name = "peft"
    kinds = ("sparse", "lora", "ia3", "hybrid")

    def write(self, export: Export, folder: Path) -> None:
        """See ``Format``."""
        kind = export.adapter.kind
        if kind == "sparse":
            kind = "supertuning" if export.adapter.origin.quantization == "none" else "shira"
        elif kind == "hybrid":
            if export.adapter.origin.quantization != "none":
                raise AdapterError(
                    "PEFT has no sparse deltas and LoRA in one on a quantised base: use merged"
                )
            kind = "supra"
        FORMATS[f"peft_{kind}"].write(export, folder)
