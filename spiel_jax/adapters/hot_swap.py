"""Adapters in and out of the weights of a model that is in use, in time and memory of their entries."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from spiel_jax.adapters.adapter import Adapter, AdapterError
from spiel_jax.adapters.base import check_fingerprint
from spiel_jax.adapters.sparse_adapter import SparseAdapter
from spiel_jax.losses.next_token import Params
from spiel_jax.models.config import ModelConfig
from spiel_jax.models.storage.weight import kind_name
from spiel_jax.ops.stored import is_stored, is_writable, one_stack
from spiel_jax.sparse.delta import SparseDelta, gather, merged_entries, set_entries


class HotSwap:
    """The weights of a model, with one of several sparse adapters in them, or none.

    What an adapter covers of the pretrained weights is kept while it is in, so that they come back bit for
    bit. The arrays that change are given up: what ``params`` was before a change must not be used after it.

    Attributes:
        params: The parameters as they are now.
        active: Name of the adapter that is in them; None for the pretrained ones.
    """

    def __init__(self, params: Params, model: ModelConfig, fingerprint: Mapping[str, str] | None = None):
        """Takes over the parameters.

        Args:
            params: Of the base model, by name, layers stacked. They are given up, see above.
            model: Its shape.
            fingerprint: Of the parameters, that adapters are checked against; None: they are not.
        """
        self.params: Params = dict(params)
        self.active: str | None = None
        self._model, self._fingerprint = model, fingerprint
        self._adapters: dict[str, dict[str, SparseDelta]] = {}
        self._covered: dict[str, jax.Array] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """Of the adapters that are at hand."""
        return tuple(self._adapters)

    def add(self, name: str, adapter: Adapter) -> None:
        """Holds an adapter in the memory of the device, ready to be put in.

        Several adapters are in at a time as their sum, ``spiel_jax.adapters.add``.

        Raises:
            AdapterError: If it is not sparse, does not fit the model or is of another one, its weights are
                held so that entries cannot be set, or there is one of this name.
        """
        if name in self._adapters:
            raise AdapterError(f"there is an adapter {name!r} already: discard it first")
        if not isinstance(adapter, SparseAdapter):
            raise AdapterError(f"{name} is {adapter.kind}: only sparse adapters can be swapped in place")
        if self._fingerprint is not None:
            check_fingerprint(adapter.origin.fingerprint, self._fingerprint, name, "this one")
        deltas = adapter.deltas(self._model)
        if odd := [one for one in deltas if not is_writable(self.params[one])]:
            kind = type(self.params[odd[0]])
            held = kind_name(kind) or kind.__name__
            raise AdapterError(
                f"entries of {odd[0]} cannot be set: it is held as {held}. Load the model dequantised, or "
                "merge the adapter"
            )
        self._adapters[name] = deltas

    def discard(self, name: str) -> None:
        """Forgets an adapter, and takes it out if it is in.

        Raises:
            AdapterError: If there is none of this name.
        """
        self._deltas(name)
        if self.active == name:
            self.use(None)
        del self._adapters[name]

    def use(self, name: str | None) -> Params:
        """Puts an adapter into the weights, in the place of the one that is in; None takes that out.

        Returns:
            ``params``, as they are then.

        Raises:
            AdapterError: If there is none of this name.
        """
        deltas = {} if name is None else self._deltas(name)
        if name == self.active:
            return dict(self.params)
        if self.active is not None:
            for one, delta in self._adapters[self.active].items():
                self.params[one] = _take_out(self.params[one], delta, self._covered.pop(one))
        self.active = name
        for one, delta in deltas.items():
            self._covered[one] = _cover(self.params[one], delta)
            self.params[one] = _put_in(self.params[one], delta, self._covered[one])
        return dict(self.params)

    def _deltas(self, name: str) -> dict[str, SparseDelta]:
        if name not in self._adapters:
            raise AdapterError(f"there is no adapter {name!r}: expected one of {', '.join(self._adapters)}")
        return self._adapters[name]


# A program for each weight: nothing is read from what is set, and the temporaries are those of one.


@jax.jit
def _cover(weight: Any, delta: SparseDelta) -> jax.Array:
    """What is to be covered; its bits, where the weight is of 16 bits."""
    return gather(lax.bitcast_convert_type(weight, jnp.uint16) if _is_narrow(weight) else weight, delta)


@partial(jax.jit, donate_argnums=0)
def _put_in(weight: Any, delta: SparseDelta, covered: jax.Array) -> Any:
    """Merged."""
    if not _is_narrow(weight):
        return set_entries(weight, delta, merged_entries(covered, delta.values, weight.dtype))
    base = lax.bitcast_convert_type(covered, weight.dtype)
    merged = merged_entries(base, delta.values, weight.dtype)
    return _with_bits(weight, delta, lax.bitcast_convert_type(merged, jnp.uint16))


@partial(jax.jit, donate_argnums=0)
def _take_out(weight: Any, delta: SparseDelta, covered: jax.Array) -> Any:
    return (_with_bits if _is_narrow(weight) else set_entries)(weight, delta, covered)


def _is_narrow(weight: Any) -> bool:
    """Whether entries are read and set as integers.

    XLA's CPU backend makes float32 of a matrix of bfloat16 to scatter into it, and bfloat16 of that again.
    """
    return not is_stored(weight) and weight.dtype.itemsize == 2


def _with_bits(weight: jax.Array, delta: SparseDelta, bits: jax.Array) -> jax.Array:
    """The weight with other entries, given by their bits; one matrix at a time."""
    stack = one_stack(weight)
    numbers = jnp.arange(len(stack)) if delta.layers is None else jnp.array(delta.layers)
    indices = delta.indices.reshape(len(numbers), *delta.indices.shape[delta.stack_axes :])
    bits = bits.reshape(indices.shape)

    def one(slot: jax.Array, stack: jax.Array) -> jax.Array:
        matrix = lax.dynamic_index_in_dim(stack, numbers[slot], keepdims=False)
        alone = replace(delta, indices=indices[slot], values=None, layers=None)
        matrix = set_entries(lax.bitcast_convert_type(matrix, jnp.uint16), alone, bits[slot])
        matrix = lax.bitcast_convert_type(matrix, weight.dtype)
        return lax.dynamic_update_index_in_dim(stack, matrix, numbers[slot], 0)

    return lax.fori_loop(0, len(numbers), one, stack).reshape(weight.shape)
