"""LoRA: a trained matrix of low rank beside each frozen weight (arXiv 2106.09685)."""

import math
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from spiel_jax.errors import SpielError
from spiel_jax.losses.next_token import Params
from spiel_jax.methods.configured import OF_SPARSE
from spiel_jax.methods.parametrization import ParametrizationMethod, adapted, among_layers, edit_layers
from spiel_jax.models.axes import weight_axes
from spiel_jax.models.config import ModelConfig
from spiel_jax.models.layers import AdaptedLinear
from spiel_jax.ops.matmul import dot, weight_gradient
from spiel_jax.ops.stored import Stored, as_array
from spiel_jax.ops.tree import named_key, parameter_name
from spiel_jax.sparse.targets import Target

_static = partial(field, metadata={"static": True})

LowRankParams = dict[str, dict[str, jax.Array]]
"""Target name to ``lora_A`` [layers, r, in] and ``lora_B`` [layers, out, r], float32."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LowRankLinear:
    """A linear layer with a frozen weight and a term of low rank, ``x W^T + scale * drop(x) A^T B^T``.

    Attributes:
        a: [*stack, r, in] float32.
        b: [*stack, out, r] float32.
        key: Key of the dropout, one per matrix [*stack]; None: no dropout.
        scale: Static. What the term is multiplied by.
        dropout: Static. Share of the term's inputs that are dropped, in [0, 1).
    """

    a: jax.Array
    b: jax.Array
    key: jax.Array | None = None
    scale: float = _static(default=1.0)
    dropout: float = _static(default=0.0)

    def __call__(self, x: jax.Array, weight: jax.Array | Stored) -> jax.Array:
        """[..., in] and [out, in] give [..., out], dtype of ``x``."""
        return low_rank_linear(x, weight, self)

    @property
    def threshold(self) -> int:
        """How many of the 2^16 values of a draw keep an input."""
        return 2**16 if self.key is None else max(round((1 - self.dropout) * 2**16), 1)

    @property
    def gain(self) -> float:
        """What the term of the kept inputs is multiplied by: ``scale``, and 1 / share kept."""
        return self.scale * (2**16 / self.threshold)

    def kept(self, shape: tuple[int, ...]) -> jax.Array | None:
        """Which inputs of [..., in] dropout keeps, bool; None: all. The same at every call."""
        if self.key is None:
            return None
        # Drawing is most of what dropout costs: each random word serves two inputs.
        words = jax.random.bits(self.key, (*shape[:-1], -(-shape[-1] // 2)), jnp.uint32)
        draws = jnp.concatenate([words & 0xFFFF, words >> 16], axis=-1)
        return draws[..., : shape[-1]] < self.threshold


def _masked(x: jax.Array, kept: jax.Array | None) -> jax.Array:
    return x if kept is None else jnp.where(kept, x, jnp.zeros((), x.dtype))


@jax.custom_vjp
def low_rank_linear(x: jax.Array, weight: jax.Array | Stored, adapter: LowRankLinear) -> jax.Array:
    """``x @ weight.T`` and a term of low rank, of which only the latter has gradients.

    Products take operands in the dtype of the weight and accumulate in float32; the sum is rounded once,
    and the gradients of A and B are not rounded. The backward pass draws the dropout again and so stores
    nothing of the size of ``x`` but ``x``.

    Args:
        x: [..., in].
        weight: [out, in]; its own cotangent is not formed (it is zero).
        adapter: The term; see ``LowRankLinear``.

    Returns:
        [..., out], dtype of ``x``.
    """
    return _low_rank_forward(x, weight, adapter)[0]


def _low_rank_forward(
    x: jax.Array, weight: jax.Array | Stored, adapter: LowRankLinear
) -> tuple[jax.Array, tuple]:
    dtype = weight.dtype
    y = dot(x.astype(dtype), as_array(weight), (-1, 1))
    term, (*_, hidden) = _term_forward(x.astype(dtype), adapter)
    return (y + term).astype(x.dtype), (x, weight, adapter, hidden)


def _low_rank_backward(residuals: tuple, dy: jax.Array) -> tuple[jax.Array, None, LowRankLinear]:
    x, weight, adapter, hidden = residuals
    dtype = weight.dtype
    dy = dy.astype(dtype)
    dx = dot(dy, as_array(weight), (-1, 0))
    gradient, more = _term_gradients(x.astype(dtype), dy, adapter, hidden)
    return (dx + more).astype(x.dtype), None, gradient


def _term_gradients(
    x: jax.Array, dy: jax.Array, adapter: LowRankLinear, hidden: jax.Array
) -> tuple[LowRankLinear, jax.Array]:
    """The gradient of A and B, and the part of that of ``x`` that comes through them."""
    with jax.named_scope("low_rank"):
        dtype, kept = x.dtype, adapter.kept(x.shape)
        # Formed transposed, so that what a CPU transposes for the product is the narrow one of its operands;
        # the barrier keeps XLA from exchanging them again.
        db = adapter.gain * lax.optimization_barrier(weight_gradient(dy, hidden)).T  # [out, r]
        dhidden = (adapter.gain * dot(dy, adapter.b.astype(dtype), (-1, 0))).astype(dtype)  # [..., r]
        da = weight_gradient(_masked(x, kept), dhidden)  # [r, in]
        dx = _masked(dot(dhidden, adapter.a.astype(dtype), (-1, 0)), kept)
    gradient = replace(adapter, a=da.astype(adapter.a.dtype), b=db.astype(adapter.b.dtype), key=None)
    return gradient, dx


low_rank_linear.defvjp(_low_rank_forward, _low_rank_backward)


@jax.custom_vjp
def low_rank_term(x: jax.Array, adapter: LowRankLinear) -> jax.Array:
    """The term of ``low_rank_linear`` alone: [..., in] in the dtype of the weight to [..., out] float32."""
    return _term_forward(x, adapter)[0]


def _term_forward(x: jax.Array, adapter: LowRankLinear) -> tuple[jax.Array, tuple]:
    with jax.named_scope("low_rank"):
        seen = _masked(x, adapter.kept(x.shape))
        hidden = dot(seen, adapter.a.astype(x.dtype), (-1, 1)).astype(x.dtype)  # [..., r]
        return adapter.gain * dot(hidden, adapter.b.astype(x.dtype), (-1, 1)), (x, adapter, hidden)


def _term_backward(residuals: tuple, dy: jax.Array) -> tuple[jax.Array, LowRankLinear]:
    x, adapter, hidden = residuals
    gradient, dx = _term_gradients(x, dy.astype(x.dtype), adapter, hidden)
    return dx.astype(x.dtype), gradient


low_rank_term.defvjp(_term_forward, _term_backward)


@dataclass(frozen=True)
class Lora:
    """LoRA on linear layers; the defaults are those of the baseline in SpIEL's experiments.

    Attributes:
        targets: What is adapted, from ``adapted``.
        rank: r, of every adapted matrix.
        alpha: The term is multiplied by alpha / r.
        dropout: Share of the term's inputs dropped in training, drawn anew for every weight.
        rslora: Multiply by alpha / sqrt(r) instead, which keeps large ranks learning (arXiv 2312.03732).

    Raises:
        SpielError: If a number is out of range.
    """

    targets: Mapping[str, Target]
    rank: int = 64
    alpha: float = 16.0
    dropout: float = 0.1
    rslora: bool = False

    def __post_init__(self):
        if self.rank < 1:
            raise SpielError(f"rank = {self.rank}: expected at least 1")
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise SpielError(f"alpha = {self.alpha}: expected a positive number")
        if not 0 <= self.dropout < 1:
            raise SpielError(f"dropout = {self.dropout}: expected 0 or more and less than 1")

    @property
    def scale(self) -> float:
        """What B A is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    @property
    def changed(self) -> Set[str]:
        """See ``Parametrization``."""
        return set(map(parameter_name, self.targets))

    def init(self, key: jax.Array) -> LowRankParams:
        """A uniform within 1 / sqrt(in), which is PEFT's Kaiming with a = sqrt(5); B zero."""

        def one(name: str, target: Target) -> dict[str, jax.Array]:
            rows, columns = target.shape
            own, bound = named_key(key, name), 1 / math.sqrt(columns)
            a = jax.random.uniform(own, (*target.stack, self.rank, columns), jnp.float32, -bound, bound)
            return {"lora_A": a, "lora_B": jnp.zeros((*target.stack, rows, self.rank), jnp.float32)}

        return {name: one(name, target) for name, target in self.targets.items()}

    def attach(
        self, params: Params, trainable: LowRankParams, key: jax.Array | None
    ) -> tuple[Params, dict[str, AdaptedLinear]]:
        """See ``Parametrization``; a weight's dropout in a layer depends on key, name and layer."""
        adapters: dict[str, AdaptedLinear] = {}
        for name, target in self.targets.items():
            parameter = parameter_name(name)
            layers = params[parameter].shape[0]
            keys = None
            if key is not None and self.dropout:
                keys = jax.random.split(named_key(key, parameter), layers)
            a, b = (among_layers(trainable[name][f"lora_{part}"], target, layers, 0.0) for part in "AB")
            adapters[parameter] = LowRankLinear(a, b, keys, self.scale, self.dropout)
        return params, adapters

    def merge(self, params: Params, trainable: LowRankParams) -> Params:
        """See ``Parametrization``: ``W + scale * B A``, formed in float32 and rounded once."""

        def add(weight: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
            return weight.astype(a.dtype) + self.scale * jnp.matmul(b, a, precision=lax.Precision.HIGHEST)

        merged = dict(params)
        for name, target in self.targets.items():
            parts, parameter = trainable[name], parameter_name(name)
            merged[parameter] = edit_layers(merged[parameter], target, add, parts["lora_A"], parts["lora_B"])
        return merged

    def spec(self, names: Sequence[str]) -> PartitionSpec | None:
        """See ``Parametrization``: A like its weight's columns, B like the rows."""
        parameter = next((parameter_name(name) for name in names if name in self.targets), "")
        rows, columns = weight_axes(parameter)
        if "lora_A" in names:  # [layers, r, in]
            return PartitionSpec(None, None, columns)
        if "lora_B" in names:  # [layers, out, r]
            return PartitionSpec(None, rows)
        return None


class LoraMethod(ParametrizationMethod):
    """LoRA as a method of the trainer: the keys of ``config.lora``."""

    @classmethod
    def unused(cls, config: Any) -> Iterable[str]:
        """See ``Method``."""
        del config
        return OF_SPARSE

    @classmethod
    def parametrization(cls, config: Any, model: ModelConfig) -> Lora:
        """See ``ParametrizationMethod``."""
        return Lora(adapted(model, config.targets.rules), **config.lora)
