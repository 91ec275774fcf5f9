"""A weight that cannot be written with its deltas beside it: a tuned model as small as its quantised base."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import jax

from spiel_jax.losses.next_token import Params
from spiel_jax.models.storage import Weight
from spiel_jax.models.storage.packed import packed
from spiel_jax.ops.stored import as_array, is_stored
from spiel_jax.ops.tree import parameter_name
from spiel_jax.sparse.delta import SparseDelta, merge, stack_layers


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Unmerged(Weight):
    """A weight, quantised as a rule, and a sparse delta on it, merged on each use: a layer at a time.

    It stands for what ``merge`` makes of the two, bit for bit.

    Attributes:
        base: The weight, [*stack, out, in], an array or a stored one.
        delta: On every matrix of it; its values may be held as a stored weight is.
    """

    base: Any
    delta: SparseDelta

    @property
    def shape(self) -> tuple[int, ...]:
        """See ``Weight``."""
        return self.base.shape

    @property
    def dtype(self) -> Any:
        """See ``Weight``."""
        return self.base.dtype

    @classmethod
    def hold(cls, array: jax.Array) -> Self:
        """Of an array alone there is none.

        Raises:
            TypeError: Always.
        """
        raise TypeError(f"an array {array.shape} cannot be held as a weight and a delta: expected both")

    def dequantize(self) -> jax.Array:
        """See ``Weight``."""
        # by their bits where a scatter of 16-bit floats would make all of the matrix float32
        matrix, delta = packed(as_array(self.base)), self.delta.with_values(as_array(self.delta.values))
        return as_array(merge({"weight": matrix}, {"weight": delta})["weight"])


def unmerged(params: Params, deltas: Mapping[str, SparseDelta], layers: int) -> Params:
    """Parameters of which some have deltas beside them, ready to go through a loop over the layers.

    Args:
        params: Parameter name to array or stored weight.
        deltas: Target name to delta, of all targets on a parameter or of none.
        layers: Of the model.
    """
    beside = dict(params)
    for name, group in by_parameter(deltas).items():
        weight, delta = params[name], joined(deltas, group, layers)
        held = weight if is_stored(weight) else packed(weight)
        beside[name] = Unmerged(held, delta.with_values(packed(delta.values)))
    return beside


def by_parameter(deltas: Mapping[str, Any]) -> dict[str, list[str]]:
    """Parameter name to the targets on it."""
    groups: dict[str, list[str]] = {}
    for name in deltas:
        groups.setdefault(parameter_name(name), []).append(name)
    return groups


def joined(parts: Mapping[str, SparseDelta], group: list[str], layers: int) -> SparseDelta:
    """The deltas on one parameter as one delta on all of its layers."""
    whole = parts[group[0]].layers is None
    return parts[group[0]] if whole else stack_layers([parts[name] for name in group], layers)
