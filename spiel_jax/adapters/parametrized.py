"""Adapters that are not sparse: matrices of low rank, scaled activations, all weights."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from spiel_jax.adapters.adapter import Adapter, AdapterError, Origin, Tensor, adapted_layers, cast, tensors_of
from spiel_jax.losses.next_token import Params
from spiel_jax.methods.parametrization import edit_layers
from spiel_jax.models.config import ModelConfig
from spiel_jax.models.decoder import layer_names
from spiel_jax.sparse.targets import Target


def _like(tensor: Tensor, result: jax.Array, dtype: Any) -> Tensor:
    """A float32 result in the kind of array that ``tensor`` is."""
    dtype = tensor.dtype if dtype is None else dtype
    return cast(np.asarray(result) if isinstance(tensor, np.ndarray) else result, dtype)


def _finite(name: str, *arrays: np.ndarray) -> None:
    for array in arrays:
        if array.dtype != np.float32 or not np.isfinite(array).all():
            raise AdapterError(f"{name}: expected finite float32 numbers")


@dataclass(frozen=True)
class LowRank:
    """A term of low rank beside one matrix, ``scale * B A``.

    Attributes:
        a: [r, in] float32.
        b: [out, r] float32.
        alpha: The scale is alpha / r; alpha / sqrt(r) where it is rank-stabilised.
    """

    a: np.ndarray
    b: np.ndarray
    alpha: float

    @property
    def rank(self) -> int:
        """R."""
        return self.a.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.b.shape[0], self.a.shape[1]


@dataclass(frozen=True)
class LoraAdapter(Adapter):
    """LoRA: a matrix of low rank beside each weight.

    Attributes:
        matrices: Hugging Face name of the weight to its term.
        rslora: Whether scales are alpha / sqrt(r).
        origin: Where it comes from.

    Raises:
        AdapterError: If shapes contradict each other, or a number is not finite.
    """

    matrices: Mapping[str, LowRank]
    rslora: bool = False
    origin: Origin = field(default_factory=Origin)

    kind = "lora"

    def __post_init__(self):
        for name, term in self.matrices.items():
            a, b = term.a, term.b
            if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1] or not a.size or not b.size:
                raise AdapterError(
                    f"{name}: A {list(a.shape)} and B {list(b.shape)}, expected [r, in] and [out, r]"
                )
            _finite(name, a, b)
            if not math.isfinite(term.alpha):
                raise AdapterError(f"{name}: alpha = {term.alpha}, expected a finite number")

    @property
    def shapes(self) -> Mapping[str, tuple[int, int]]:
        """See ``Adapter``."""
        return {name: term.shape for name, term in self.matrices.items()}

    def scale(self, name: str) -> float:
        """What B A of a weight is multiplied by."""
        term = self.matrices[name]
        return term.alpha / (math.sqrt(term.rank) if self.rslora else term.rank)

    def merged(self, name: str, tensor: Tensor, dtype: Any = None) -> Tensor:
        """See ``Adapter``: ``W + scale * B A``, formed in float32."""
        term = self.matrices[name]
        return _like(tensor, _low_rank_sum(jnp.asarray(tensor), term.a, term.b, self.scale(name)), dtype)

    def merge(self, params: Params, model: ModelConfig) -> Params:
        """See ``Adapter``; terms of smaller rank than others of a stack are filled up with zeros."""
        merged = dict(params)
        for parameter, layers in self.parameters(model).items():
            terms = [self.matrices[name] for name in layers.values()]
            rank = max(term.rank for term in terms)
            a = np.stack([np.pad(term.a, ((0, rank - term.rank), (0, 0))) for term in terms])
            b = np.stack([np.pad(term.b, ((0, 0), (0, rank - term.rank))) for term in terms])
            scales = np.array([self.scale(name) for name in layers.values()], np.float32)
            parts = [jnp.asarray(part) for part in (a, b, scales)]
            merged[parameter] = _edited(merged[parameter], layers, model, _low_rank_sum, *parts)
        return merged


def _low_rank_sum(weight: jax.Array, a: Any, b: Any, scale: Any) -> jax.Array:
    product = jnp.matmul(jnp.asarray(b), jnp.asarray(a), precision=lax.Precision.HIGHEST)
    return weight.astype(jnp.float32) + scale * product


@dataclass(frozen=True)
class Factors:
    """What the inputs or the outputs of one linear are multiplied by.

    Attributes:
        values: [in] or [out] float32.
        inputs: Whether they are for the inputs.
        shape: (out, in) of the weight.
    """

    values: np.ndarray
    inputs: bool
    shape: tuple[int, int]


@dataclass(frozen=True)
class IA3Adapter(Adapter):
    """(IA)^3: scaled outputs, bias included, or inputs of linears.

    Attributes:
        factors: Hugging Face name of the weight to its factors.
        origin: Where it comes from.

    Raises:
        AdapterError: If there are not as many factors as outputs or inputs, or one is not finite.
    """

    factors: Mapping[str, Factors]
    origin: Origin = field(default_factory=Origin)

    kind = "ia3"

    def __post_init__(self):
        for name, one in self.factors.items():
            expected = one.shape[1 if one.inputs else 0]
            if one.values.shape != (expected,):
                raise AdapterError(f"{name}: factors {list(one.values.shape)}, expected {expected} of them")
            _finite(name, one.values)

    @property
    def shapes(self) -> Mapping[str, tuple[int, int]]:
        """See ``Adapter``."""
        return {name: one.shape for name, one in self.factors.items()}

    def changes(self, name: str) -> bool:
        """See ``Adapter``."""
        return _scaled(name, self.factors) is not None

    def merged(self, name: str, tensor: Tensor, dtype: Any = None) -> Tensor:
        """See ``Adapter``: scaled rows or columns, or a scaled bias; formed in float32."""
        factors = _scaled(name, self.factors)
        assert factors is not None
        return _like(tensor, _scale(jnp.asarray(tensor), factors.values, factors.inputs), dtype)

    def merge(self, params: Params, model: ModelConfig) -> Params:
        """See ``Adapter``."""
        merged = dict(params)
        for parameter, layers in self.parameters(model).items():
            found = [self.factors[name] for name in layers.values()]
            inputs = found[0].inputs
            if any(one.inputs != inputs for one in found):
                raise AdapterError(f"{parameter}: some layers have scaled inputs, others scaled outputs")
            parts = jnp.asarray(np.stack([one.values for one in found]))
            changed = [parameter] + ([] if inputs else [parameter.removesuffix("weight") + "bias"])
            for name in merged.keys() & set(changed):
                edit = _scale_inputs if inputs else _scale_outputs
                merged[name] = _edited(merged[name], layers, model, edit, parts)
        return merged


def _scaled(name: str, factors: Mapping[str, Factors]) -> Factors | None:
    """The factors that change a tensor."""
    if name.endswith(".bias"):
        found = factors.get(name.removesuffix("bias") + "weight")
        return None if found is None or found.inputs else found
    return factors.get(name)


def _scale(tensor: jax.Array, factors: Any, inputs: bool) -> jax.Array:
    if tensor.ndim == 2:
        factors = jnp.expand_dims(jnp.asarray(factors), 0 if inputs else 1)
    return tensor.astype(jnp.float32) * factors


def _scale_inputs(tensor: jax.Array, factors: jax.Array) -> jax.Array:
    return _scale(tensor, factors, True)


def _scale_outputs(tensor: jax.Array, factors: jax.Array) -> jax.Array:
    return _scale(tensor, factors, False)


def _edited(
    param: Any,
    layers: Mapping[int | None, str],
    model: ModelConfig,
    edit: Callable[..., jax.Array],
    *parts: jax.Array,
) -> Any:
    """A parameter with its adapted layers edited, or the only matrix of one that is not stacked."""
    if None in layers:
        return edit(param, *(part[0] for part in parts)).astype(param.dtype)
    target = Target((1, 1), 1, layers=adapted_layers(layers, model))  # only its layers are read
    return edit_layers(param, target, edit, *parts)


@dataclass(frozen=True)
class FullAdapter(Adapter):
    """Full fine-tuning: every weight anew.

    Attributes:
        params: The trained parameters of our model, float32, by name, layers stacked.
        model: Its shape.
        origin: Where it comes from.
    """

    params: Mapping[str, Any]
    model: ModelConfig
    origin: Origin = field(default_factory=Origin)

    kind = "full"
    whole = True

    @cached_property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """See ``Adapter``."""
        return {name: slot.shape for name, slot in tensors_of(self.model).items()}

    @cached_property
    def _places(self) -> dict[str, tuple[str, int | None]]:
        places = {}
        for parameter in self.params:
            names = layer_names(parameter, self.model.num_layers)
            stacked = names != [parameter]
            places |= {name: (parameter, layer if stacked else None) for layer, name in enumerate(names)}
        return places

    def merged(self, name: str, tensor: Tensor, dtype: Any = None) -> Tensor:
        """See ``Adapter``; of ``tensor`` only the dtype and the kind of array are read. May be None."""
        parameter, layer = self._places[name]
        found = self.params[parameter]
        found = found if layer is None else found[layer]
        if tensor is None:
            return cast(np.asarray(found), dtype)
        return _like(tensor, found, dtype)

    def merge(self, params: Params, model: ModelConfig) -> Params:
        """See ``Adapter``: the trained ones, in the dtype that the run's model had."""
        del params, model
        return {name: jnp.asarray(param).astype(self.origin.dtype) for name, param in self.params.items()}
