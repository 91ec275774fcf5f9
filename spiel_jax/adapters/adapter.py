"""What a run leaves behind, as an object of its own: an adapter, in the names and shapes of Hugging Face.

An adapter knows nothing of block grids, stacked layers or meshes: it names the tensors of the base model that
it changes, one per layer. All its arrays are NumPy's. Whoever holds an adapter holds a valid one: what is
wrong with its parts is told when it is made.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from spiel_jax.errors import SpielError
from spiel_jax.losses.next_token import Params
from spiel_jax.models.config import ModelConfig
from spiel_jax.models.decoder import layer_names
from spiel_jax.models.io.names import Placement, expected_tensors

Tensor = Any
"""An array of NumPy or of JAX."""


class AdapterError(SpielError):
    """An adapter is damaged, or does not fit its base model or what is to be done with it."""


@dataclass(frozen=True)
class Origin:
    """Where an adapter comes from; of somebody else's much is unknown.

    Attributes:
        base: What the base model is called: a folder, a hub id, ...; empty if nothing says.
        fingerprint: Of the base model's weights as the run held them (see ``models.fingerprint``); empty if
            unknown.
        config: The run's configuration, dotted key to value; empty if unknown.
        step: Optimizer steps done; None if unknown.
    """

    base: str = ""
    fingerprint: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    step: int | None = None

    @property
    def dtype(self) -> str:
        """Of the base weights that the adapter was trained on."""
        return self.config.get("model.dtype", "bfloat16")

    @property
    def quantization(self) -> str:
        """How these were held, as ``config.model.quantization``."""
        return self.config.get("model.quantization", "none")


class Adapter(ABC):
    """A change of some tensors of a base model.

    Attributes:
        kind: What it is called in messages.
        whole: Whether it gives tensors without those of the base.
        origin: Where it comes from.
    """

    kind: ClassVar[str]
    whole: ClassVar[bool] = False
    origin: Origin

    @property
    @abstractmethod
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Hugging Face name to shape of the weights it changes."""

    def changes(self, name: str) -> bool:
        """Whether it changes the tensor of that name; of a bias it may be asked too."""
        return name in self.shapes

    @abstractmethod
    def merged(self, name: str, tensor: Tensor, dtype: Any = None) -> Tensor:
        """A tensor of the base model with the change in it.

        Args:
            name: Its Hugging Face name, one that ``changes``.
            tensor: As the base has it, of NumPy or JAX; not written to.
            dtype: Of the result; None for that of ``tensor``. What is computed is rounded once.

        Returns:
            An array of the same kind.
        """

    @abstractmethod
    def merge(self, params: Params, model: ModelConfig) -> Params:
        """Parameters of one of our models with the change in them; traceable.

        Args:
            params: The base model's, by name, layers stacked; or only those that change.
            model: Its shape.
        """

    def parameters(self, model: ModelConfig) -> dict[str, dict[int | None, str]]:
        """Name of each parameter of our model that it changes to its layers and their Hugging Face names.

        Raises:
            AdapterError: If a weight is none of the model's, or has another shape.
        """
        slots, found = tensors_of(model), {}
        for name, shape in self.shapes.items():
            if name not in slots:
                raise AdapterError(f"the adapter changes {name}, which the base model does not have")
            if slots[name].shape != shape:
                raise AdapterError(
                    f"the adapter is for a {name} of {list(shape)}, the base model's is "
                    f"{list(slots[name].shape)}"
                )
            found.setdefault(slots[name].parameter, {})[slots[name].layer] = name
        return {
            name: dict(sorted(layers.items(), key=lambda one: one[0] or 0)) for name, layers in found.items()
        }


def tensors_of(model: ModelConfig) -> dict[str, Placement]:
    """The tensors of a model by their Hugging Face names."""
    return expected_tensors(model, layer_names)


def adapted_layers(layers: Iterable[int | None], model: ModelConfig) -> tuple[int, ...] | None:
    """Which of the stacked layers are adapted; None for all, and for what is not stacked."""
    numbers = tuple(layer for layer in layers if layer is not None)
    return None if len(numbers) in (0, model.num_layers) else numbers


def cast(tensor: Tensor, dtype: Any) -> Tensor:
    """A tensor in another dtype, an array of its own where that is NumPy's.

    Raises:
        AdapterError: If a finite number has no place in the dtype.
    """
    if not isinstance(tensor, np.ndarray):
        return tensor.astype(dtype)
    with np.errstate(over="ignore"):
        out = tensor.astype(dtype)
    if np.dtype(dtype).itemsize < tensor.dtype.itemsize and not np.isfinite(out).all():
        raise AdapterError(
            f"a number of the model is too large for {np.dtype(dtype).name}: choose another dtype"
        )
    return out


def merge_into(
    tensors: Mapping[str, Tensor],
    adapter: Adapter,
    *,
    names: Mapping[str, str] | None = None,
    transposed: bool = False,
) -> dict[str, Tensor]:
    """Merges an adapter into the weights of any model, in any code.

    Args:
        tensors: Name to array of NumPy or JAX, one for each layer's weight; others pass through.
        adapter: What to merge.
        names: Hugging Face name to name in ``tensors``, where they differ.
        transposed: Whether matrices are [in, out], as Flax has them, and not [out, in].

    Returns:
        A new dict, like ``tensors``.

    Raises:
        AdapterError: If a weight is missing or has another shape.

    Example:
        >>> from spiel_jax.adapters import Entries, SparseAdapter
        >>> entries = {"w.weight": Entries((2, 3), np.array([1, 5]), np.array([0.5, -1.0], "float32"))}
        >>> merge_into({"w.weight": np.ones((2, 3), "float32")}, SparseAdapter(entries))["w.weight"].tolist()
        [[1.0, 1.5, 1.0], [1.0, 1.0, 0.0]]
    """
    found, names = dict(tensors), names or {}
    for name, shape in adapter.shapes.items():
        key = names.get(name, name)
        if key not in found:
            raise AdapterError(f"there is no {key!r} to merge {name} into")
        weight = found[key].T if transposed else found[key]
        if tuple(weight.shape) != shape:
            raise AdapterError(f"{key} is {list(weight.shape)}, the adapter is for {list(shape)}")
        merged = adapter.merged(name, weight)
        found[key] = merged.T if transposed else merged
        bias = name.removesuffix("weight") + "bias"
        if adapter.changes(bias) and names.get(bias, bias) in found:
            found[names.get(bias, bias)] = adapter.merged(bias, found[names.get(bias, bias)])
    return found
