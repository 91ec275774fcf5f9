"""What a run leaves behind, as an object of its own: an adapter, in the names and shapes of Hugging Face.

An adapter knows nothing of block grids, stacked layers or meshes: it names the tensors of the base model that
it changes, one per layer. All its arrays are NumPy's. Whoever holds an adapter holds a valid one: what is
wrong with its parts is told when it is made.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import jax
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


def position_dtype(shape: tuple[int, int]) -> type[np.signedinteger]:
    """int32, or int64 for a matrix with more entries than int32 can count."""
    return np.int32 if shape[0] * shape[1] <= 2**31 else np.int64


@dataclass(frozen=True)
class Entries:
    """Some entries of one matrix.

    Attributes:
        shape: (rows, columns) of the matrix.
        positions: [k] flat and row-major in the whole matrix, ascending, distinct; int32 (int64 where the
            matrix has more than 2^31 entries).
        values: [k] float32, what is added to the base.

    Raises:
        AdapterError: If that is not so, or a value is not finite.
    """

    shape: tuple[int, int]
    positions: np.ndarray
    values: np.ndarray

    def __post_init__(self):
        size = self.shape[0] * self.shape[1]
        if self.positions.ndim != 1 or self.positions.shape != self.values.shape:
            raise AdapterError(
                f"positions {list(self.positions.shape)} and values {list(self.values.shape)}: expected two "
                "lists of one length"
            )
        if self.positions.dtype.kind != "i" or self.values.dtype.kind not in "fV":
            raise AdapterError(
                f"positions are {self.positions.dtype} and values {self.values.dtype}: expected integers and "
                "floating-point numbers"
            )
        if self.positions.size == 0:
            raise AdapterError("there are no entries")
        if self.positions.min() < 0 or self.positions.max() >= size:
            bad = self.positions[(self.positions < 0) | (self.positions >= size)][0]
            raise AdapterError(f"position {bad} is outside a matrix of {list(self.shape)}")
        if (np.diff(self.positions) <= 0).any():
            raise AdapterError("positions are not ascending and distinct")
        object.__setattr__(self, "positions", self.positions.astype(position_dtype(self.shape)))
        object.__setattr__(self, "values", self.values.astype(np.float32))
        if not np.isfinite(self.values).all():
            raise AdapterError("a value is not finite")

    @classmethod
    def unordered(cls, shape: tuple[int, int], positions: np.ndarray, values: np.ndarray) -> "Entries":
        """Entries in any order; zeros may repeat a position, as what pads a list does.

        Raises:
            AdapterError: See ``Entries``; if a position has two values.
        """
        if positions.ndim == 1 and positions.shape == values.shape and positions.size:
            order = np.argsort(positions, kind="stable")
            positions, values = positions[order], values[order]
            again = np.concatenate([[False], positions[1:] == positions[:-1]])
            if (values[again] != 0).any():
                raise AdapterError(f"position {positions[again & (values != 0)][0]} has two values")
            positions, values = positions[~again], values[~again]
        return cls(shape, positions, values)

    @property
    def count(self) -> int:
        """How many entries."""
        return self.positions.size

    def coordinates(self) -> tuple[np.ndarray, np.ndarray]:
        """Row and column of each entry."""
        rows, columns = np.divmod(self.positions, self.shape[1])
        return rows, columns


@dataclass(frozen=True)
class SparseAdapter(Adapter):
    """Sparse deltas: what a run of SpIEL, or of a static mask, leaves.

    Attributes:
        entries: Hugging Face name of the weight to its entries.
        origin: Where it comes from.
    """

    entries: Mapping[str, Entries]
    origin: Origin = field(default_factory=Origin)

    kind = "sparse"

    @property
    def shapes(self) -> Mapping[str, tuple[int, int]]:
        """See ``Adapter``."""
        return {name: entries.shape for name, entries in self.entries.items()}

    @property
    def count(self) -> int:
        """Entries of all matrices."""
        return sum(entries.count for entries in self.entries.values())

    @property
    def density(self) -> float:
        """Entries as a share of those of the weights that it changes."""
        return self.count / sum(rows * columns for rows, columns in self.shapes.values())

    def merged(self, name: str, tensor: Tensor, dtype: Any = None) -> Tensor:
        """See ``Adapter``: base + value at the entries, formed in float32."""
        entries = self.entries[name]
        dtype = tensor.dtype if dtype is None else dtype
        place = entries.coordinates()
        new = cast(tensor[place].astype(np.float32) + entries.values, dtype)
        whole = cast(tensor, dtype)
        if isinstance(whole, jax.Array):
            return whole.at[place].set(new, unique_indices=True, indices_are_sorted=True)
        whole[place] = new
        return whole

    def merge(self, params: Params, model: ModelConfig) -> Params:
        """See ``Adapter``."""
        from spiel_jax.adapters.stacking import stacked_deltas
        from spiel_jax.sparse.delta import merge

        return merge(params, stacked_deltas(self, model))
