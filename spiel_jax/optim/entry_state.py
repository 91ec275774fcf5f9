"""The state of an inner optimizer, entry by entry: checked at the start, reset where entries are replaced."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax


@dataclass(frozen=True)
class ReplacedSlots:
    """What a reselection does to the slots of one target; to JAX a leaf."""

    replaced: jax.Array  # [*stack, ..., k] bool
    seeds: Mapping[str, jax.Array]  # field of the inner state -> [*stack, ..., k] for grown entries


def _map_entries(inner: optax.GradientTransformation, function: Any, state: Any, *trees: Any) -> Any:
    """Maps over those leaves of the inner state that belong to a target, with trees like the values.

    Other leaves become False.
    """

    def each(leaf: Any, *rest: Any) -> Any:
        return leaf if isinstance(leaf, optax.MaskedNode) else function(leaf, *rest)

    return optax.tree.map_params(
        inner,
        each,
        state,
        *trees,
        transform_non_params=lambda _: False,
        is_leaf=lambda x: isinstance(x, optax.MaskedNode),  # what the inner optimizer leaves out
    )


def reset(inner: optax.GradientTransformation, state: Any, values: Any, slots: Any) -> Any:
    """Sets the inner state of replaced entries to their seeds, or to what ``inner.init`` gives for them."""

    def slot_of(leaf: Any, slot: ReplacedSlots) -> Any:
        return slot if jnp.shape(leaf) == slot.replaced.shape else False

    def mix(path: tuple, slot: Any, new: Any, old: Any) -> Any:
        if slot is False:
            return old
        for field, seed in slot.seeds.items():
            if jax.tree_util.GetAttrKey(field) in path:
                new = seed.astype(old.dtype)
        return jnp.where(slot.replaced, new, old)

    owners = _map_entries(inner, slot_of, state, slots)
    return jax.tree_util.tree_map_with_path(mix, owners, inner.init(values), state)


def check_per_entry(inner: optax.GradientTransformation, state: Any, values: Any) -> None:
    """Refuses an inner optimizer whose state is not per entry: replaced entries could not be reset."""
    needed = (
        "spiel() needs an inner optimizer whose state is per entry (adam, lion, sgd, adagrad, unfactored "
        "adafactor, ...)"
    )
    if optax.tree.get_all_with_path(state, "MuonState"):
        raise TypeError(f"{needed}; muon works on whole matrices, and the values of a target are none")
    wrong = []

    def check(leaf: Any, value: Any) -> None:
        if leaf.shape != value.shape and leaf.size > 1:
            wrong.append(f"a state of shape {leaf.shape} for values of shape {value.shape}")

    try:
        _map_entries(inner, check, state, values)
    except Exception as error:
        raise TypeError(
            f"{needed}; the state of this one is not built from its parameters leaf by leaf: {error}"
        ) from error
    if wrong:
        raise TypeError(f"{needed}; this one keeps {wrong[0]}")
