"""What the base model is, so that deltas are never put on top of another: its weights and its arithmetic."""

import json
from collections.abc import Mapping
from dataclasses import MISSING, asdict, fields
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from spiel_jax.models.config import ModelConfig
from spiel_jax.models.storage.packed import packed
from spiel_jax.ops.digest import digest, mixed
from spiel_jax.ops.stored import is_stored


def fingerprint(params: Mapping[str, Any]) -> dict[str, str]:
    """Dtype, shape and a 32-bit digest of the contents of every parameter.

    The digest is a sum of hashes of the entries' bits and positions, formed where the parameters are: it
    does not depend on how they are spread over devices and processes. Of a stored weight it is the digest of
    the arrays that hold it, which are the same on any hardware; held by their bits, 16-bit floats have the
    digest that they have as an array. Not a cryptographic hash: it tells models apart, it does not prove
    who made them.

    Args:
        params: The model's parameters, arrays and stored weights.

    Returns:
        Parameter name to, for example, ``"bfloat16[30,576,576]:1c291ca3"``; sorted by name.
    """
    found = {}
    for name in sorted(params):
        found[name] = _text(params[name], _digest(params[name]))
    return found


def differing(one: Mapping[str, str], other: Mapping[str, str]) -> list[str]:
    """The names whose digests differ or that only one of two fingerprints has, sorted."""
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))


_UNUSED = ("max_positions", "initializer_range")
"""What a ``ModelConfig`` says that changes no result of given weights."""


def arithmetic(config: ModelConfig) -> dict[str, Any]:
    """What a model computes with its weights, JSON-like: heads, RoPE, window, the norms' eps, tying, ...

    Two models of equal weights can differ in it, and then give other logits.
    """
    said = {name: value for name, value in asdict(config).items() if name not in _UNUSED}
    return json.loads(json.dumps(said))


def differing_arithmetic(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """What differs between two models by ``arithmetic``, as ``"rope_theta: 10000.0 then, 500000.0 now"``.

    A field that an earlier version did not store has its default.
    """
    defaults = {field.name: field.default for field in fields(ModelConfig)}

    def said(found: Mapping[str, Any], name: str) -> Any:
        return found.get(name, defaults.get(name, MISSING))

    names = sorted(one.keys() | other.keys())
    pairs = {name: (said(one, name), said(other, name)) for name in names}
    return [
        f"{name}: {then!r} then, {now!r} now"
        for name, (then, now) in pairs.items()
        if then != now and MISSING not in (then, now)
    ]


class Fingerprinter:
    """The fingerprint of parameters whose layers come one by one, in any order.

    Example:
        >>> whole = jnp.arange(12.0).reshape(2, 2, 3)
        >>> one = Fingerprinter()
        >>> for layer in range(2):
        ...     one.add("w", whole[layer : layer + 1], layer)
        >>> one.found({"w": jax.ShapeDtypeStruct((2, 2, 3), "float32")}) == fingerprint({"w": whole})
        True
    """

    def __init__(self):
        self._sums: dict[str, list[int]] = {}

    def add(self, parameter: str, weight: Any, layer: int = 0) -> None:
        """Takes in a parameter that is not stacked, or a layer [1, ...] of one that is.

        Args:
            parameter: Its name.
            weight: An array or a stored weight.
            layer: Number of the layer.
        """
        sums = [int(np.asarray(part)) for part in _sums(weight, jnp.uint32(layer))]
        before = self._sums.get(parameter, [0] * len(sums))
        self._sums[parameter] = [(a + b) % 2**32 for a, b in zip(before, sums, strict=True)]

    def found(self, specs: Mapping[str, Any]) -> dict[str, str]:
        """The fingerprint of what was taken in, whole.

        Args:
            specs: Parameter name to what has its dtype and shape, layers stacked.
        """
        digests = {name: _joined([jnp.uint32(part) for part in sums]) for name, sums in self._sums.items()}
        return {name: _text(specs[name], digests[name]) for name in sorted(digests)}


def _text(weight: Any, digest: jax.Array) -> str:
    return f"{weight.dtype}[{','.join(map(str, weight.shape))}]:{int(np.asarray(digest)):08x}"


@jax.jit
def _digest(weight: Any) -> jax.Array:
    """[] uint32, of an array or a stored weight."""
    return _joined(_sums(weight, jnp.uint32(0)))


@jax.jit
def _sums(weight: Any, start: jax.Array) -> list[jax.Array]:
    """[] uint32 of each array that holds a weight, whose first matrix, or row of vectors, has a number."""
    leaves = jax.tree.leaves(weight if is_stored(weight) else packed(weight))
    return [digest(leaf, start) for leaf in leaves]


def _joined(sums: list[jax.Array]) -> jax.Array:
    """[] uint32, of those of the arrays that hold a weight."""
    first, *others = sums
    return sum((mixed(other + jnp.uint32(i)) for i, other in enumerate(others)), start=first)
