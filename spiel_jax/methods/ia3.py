"""(IA)^3: learned vectors that scale keys, values and the MLP's inner activations (arXiv 2205.05638)."""

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from spiel_jax.losses.next_token import Params
from spiel_jax.methods.configured import OF_SPARSE
from spiel_jax.methods.parametrization import ParametrizationMethod, adapted, among_layers, edit_layers
from spiel_jax.models.config import ModelConfig
from spiel_jax.models.decoder import LAYERS
from spiel_jax.models.layers import AdaptedLinear
from spiel_jax.ops.matmul import linear
from spiel_jax.ops.stored import Stored
from spiel_jax.ops.tree import parameter_name
from spiel_jax.sparse.targets import Target

OUTPUT_SCALED = tuple(f"{LAYERS}self_attn.{part}_proj.weight" for part in "kv")
"""Weights whose outputs are scaled, their bias included: keys and values."""

INPUT_SCALED = (f"{LAYERS}mlp.down_proj.weight",)
"""Weights whose inputs are scaled: what the MLP's nonlinearity gives."""


@jax.custom_vjp
def scaled(x: jax.Array, factors: jax.Array) -> jax.Array:
    """``x * factors``, formed in the dtype of the factors and rounded to that of ``x``.

    The backward pass needs ``x`` as it is, not a wider copy of it, and does not round the gradient of the
    factors.

    Args:
        x: [..., D].
        factors: [D] float32.
    """
    return (x.astype(factors.dtype) * lax.expand_dims(factors, range(x.ndim - 1))).astype(x.dtype)


def _scaled_forward(x: jax.Array, factors: jax.Array) -> tuple[jax.Array, tuple]:
    return scaled(x, factors), (x, factors)


def _scaled_backward(residuals: tuple, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, factors = residuals
    products = dy.astype(factors.dtype) * x.astype(factors.dtype)
    return scaled(dy, factors), jnp.sum(products, axis=tuple(range(x.ndim - 1)))


scaled.defvjp(_scaled_forward, _scaled_backward)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ScaledLinear:
    """A linear layer with a frozen weight whose outputs or inputs are scaled.

    Attributes:
        factors: [*stack, out], or [*stack, in] for inputs; float32.
        inputs: Static. Whether the inputs are scaled, not the outputs.
    """

    factors: jax.Array
    inputs: bool = field(metadata={"static": True})

    def __call__(self, x: jax.Array, weight: jax.Array | Stored) -> jax.Array:
        """[..., in] and [out, in] give [..., out], dtype of ``x``."""
        frozen = partial(linear, weight=lax.stop_gradient(weight))
        return frozen(scaled(x, self.factors)) if self.inputs else scaled(frozen(x), self.factors)


@dataclass(frozen=True)
class IA3:
    """(IA)^3.

    Attributes:
        targets: What is scaled, some of ``OUTPUT_SCALED`` and ``INPUT_SCALED``.
    """

    targets: Mapping[str, Target]

    @classmethod
    def matching(cls, model: ModelConfig, rules: Sequence[str]) -> "IA3":
        """Scales what the rules match of keys, values and the MLP's inner activations.

        Raises:
            SpielError: If a rule matches nothing of these.
        """
        return cls(adapted(model, rules, OUTPUT_SCALED + INPUT_SCALED))

    @property
    def changed(self) -> Set[str]:
        """See ``Parametrization``; with the biases of what is scaled at the output."""
        return {part for name in self.targets for part in _parts(name)}

    def init(self, key: jax.Array) -> dict[str, jax.Array]:
        """Ones: target name to [layers, out or in] float32."""
        del key
        sizes = {name: t.shape[1 if _inputs(name) else 0] for name, t in self.targets.items()}
        return {name: jnp.ones((*t.stack, sizes[name]), jnp.float32) for name, t in self.targets.items()}

    def attach(
        self, params: Params, trainable: dict[str, jax.Array], key: jax.Array | None
    ) -> tuple[Params, dict[str, AdaptedLinear]]:
        """See ``Parametrization``; biases are scaled beforehand, since adapters see the weights only."""
        del key
        adapters, biases = {}, {}
        for name, target in self.targets.items():
            weight, *rest = _parts(name)
            factors = among_layers(trainable[name], target, params[weight].shape[0], 1.0)
            adapters[weight] = ScaledLinear(factors, _inputs(name))
            for bias in params.keys() & rest:
                biases[bias] = (params[bias].astype(factors.dtype) * factors).astype(params[bias].dtype)
        return params | biases if biases else params, adapters

    def merge(self, params: Params, trainable: dict[str, jax.Array]) -> Params:
        """See ``Parametrization``: scaled rows or columns, and biases; rounded once."""
        merged = dict(params)
        for name, target in self.targets.items():
            scale = partial(_scale_layer, inputs=_inputs(name))
            for part in params.keys() & _parts(name):
                merged[part] = edit_layers(params[part], target, scale, trainable[name])
        return merged

    def spec(self, names: Sequence[str]) -> None:
        """See ``Parametrization``: factors are whole on every device."""
        del names


def _scale_layer(old: jax.Array, factors: jax.Array, inputs: bool) -> jax.Array:
    """A bias [out], or a weight [out, in] by its rows, or by its columns for inputs."""
    if old.ndim == 2:
        factors = jnp.expand_dims(factors, 0 if inputs else 1)
    return old.astype(factors.dtype) * factors


def _inputs(target: str) -> bool:
    return parameter_name(target) in INPUT_SCALED


def _parts(target: str) -> tuple[str, ...]:
    """The weight of a target, and the bias that is scaled with its outputs, which a model need not have."""
    weight = parameter_name(target)
    return (weight,) if _inputs(target) else (weight, weight.removesuffix("weight") + "bias")


class IA3Method(ParametrizationMethod):
    """(IA)^3 as a method of the trainer."""

    @classmethod
    def unused(cls, config: Any) -> Iterable[str]:
        """See ``Method``."""
        del config
        return (*OF_SPARSE, "lora.*")

    @classmethod
    def parametrization(cls, config: Any, model: ModelConfig) -> IA3:
        """See ``ParametrizationMethod``."""
        return IA3.matching(model, config.targets.rules)
