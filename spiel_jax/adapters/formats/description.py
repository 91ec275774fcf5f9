"""What the files that this writes say of themselves: strings in the header of a safetensors file.

All keys begin with ``spiel_jax.``, so that they can stand beside those of another format.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from spiel_jax.adapters.adapter import Adapter, AdapterError, Origin, tensors_of
from spiel_jax.adapters.files import digest, parse_object
from spiel_jax.models.config import ModelConfig

VERSION = "1"
"""Of what is described here."""

_PREFIX = "spiel_jax."
_WEIGHT = re.compile(r"[A-Za-z_]\w*(\.\w+)*\.weight", re.ASCII)


def describe(adapter: Adapter, tensors: Mapping[str, np.ndarray], format: str, **more: Any) -> dict[str, str]:
    """The header's strings for an adapter.

    Args:
        adapter: The adapter.
        tensors: What the file holds.
        format: Name of the format.
        **more: Further keys; JSON-like.
    """
    origin = adapter.origin
    shapes = {name: list(adapter.shapes[name]) for name in sorted(adapter.shapes)}
    said = {
        "format": format,
        "version": VERSION,
        "base": origin.base,
        "fingerprint": dict(sorted(origin.fingerprint.items())),
        "config": dict(sorted(origin.config.items())),
        "step": origin.step,
        "shapes": shapes,
        **more,
    }
    texts = {
        _PREFIX + key: value if isinstance(value, str) else json.dumps(value, allow_nan=False)
        for key, value in said.items()
    }
    return texts | {_PREFIX + "sha256": _sum(tensors, texts)}


def _sum(tensors: Mapping[str, np.ndarray], texts: Mapping[str, str]) -> str:
    return digest(tensors, *(text for key in sorted(texts) for text in (key, texts[key])))


@dataclass(frozen=True)
class Description:
    """What a file says of itself.

    Attributes:
        origin: Of the adapter.
        shapes: Name to shape of the weights; empty if it does not say.
        said: All that it says, key to string.
    """

    origin: Origin
    shapes: Mapping[str, tuple[int, int]]
    said: Mapping[str, str]

    def shape(self, name: str, model: ModelConfig | None) -> tuple[int, int]:
        """Shape of a weight, from the model and from what the file says; both must agree.

        Raises:
            AdapterError: If they do not, neither knows it, or the name is none of a weight.
        """
        if not _WEIGHT.fullmatch(name):
            raise AdapterError(f"{name[:200]!r} is no name of a weight")
        said = self.shapes.get(name)
        if model is None:
            if said is None:
                raise AdapterError(f"the file does not say the shape of {name}: name the base model")
            return said
        slot = tensors_of(model).get(name)
        if slot is None or len(slot.shape) != 2:
            raise AdapterError(f"the adapter changes {name}, which is no weight of the base model")
        rows, columns = slot.shape
        if said is not None and said != slot.shape:
            raise AdapterError(
                f"the adapter is for a {name} of {list(said)}, the base model's is {list(slot.shape)}"
            )
        return rows, columns


def described(metadata: Mapping[str, str], tensors: Mapping[str, np.ndarray], base: str = "") -> Description:
    """What a file says of itself, checked; of a file that says nothing all is unknown.

    Args:
        metadata: Of the header.
        tensors: What the file holds.
        base: What its base model is called, if the header does not say.

    Raises:
        AdapterError: If it is of a later version, contradicts itself, or was changed since it was written.
    """
    texts = {key: text for key, text in metadata.items() if key.startswith(_PREFIX)}
    if not texts:
        return Description(Origin(base), {}, {})
    said = {key.removeprefix(_PREFIX): text for key, text in texts.items()}
    if (version := said.get("version")) != VERSION:
        raise AdapterError(
            f"the file is of version {version!r}, this reads {VERSION}: a newer spiel_jax may do"
        )
    found = texts.pop(_PREFIX + "sha256", None)
    if found is None or found != _sum(tensors, texts):
        raise AdapterError("the file was changed or damaged after it was written: its sha256 differs")
    fingerprint, config = (parse_object(said.get(key, "{}")) for key in ("fingerprint", "config"))
    if not all(isinstance(value, str) for value in fingerprint.values()):
        raise AdapterError("fingerprint: expected strings")
    step = said.get("step", "null")
    if not re.fullmatch(r"null|\d{1,15}", step, re.ASCII):
        raise AdapterError(f"step = {step[:50]!r}: expected a number")
    origin = Origin(said.get("base", base), fingerprint, config, None if step == "null" else int(step))
    shapes = {name: _shape(name, shape) for name, shape in parse_object(said.get("shapes", "{}")).items()}
    return Description(origin, shapes, said)


def _shape(name: str, shape: Any) -> tuple[int, int]:
    good = isinstance(shape, list) and len(shape) == 2
    if not good or not all(type(size) is int and 0 < size < 2**31 for size in shape):
        raise AdapterError(f"shape of {name[:200]!r} is {str(shape)[:100]}: expected [rows, columns]")
    return shape[0], shape[1]
