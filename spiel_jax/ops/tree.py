"""Names of the leaves of pytrees, and edits of the named ones. A stored weight is a leaf."""

import functools
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from spiel_jax.ops.stored import as_array, is_stored


def parameter_name(target: str) -> str:
    """Name of the weight that a target's name stands for: what precedes the ``@`` of a layer subset."""
    return target.partition("@")[0]


def path_name(path: tuple) -> str:
    """Dotted name of a leaf of a pytree from its key path: ``("mlp", "kernel")`` is "mlp.kernel"."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


def named_key(key: jax.Array, name: str) -> jax.Array:
    """A PRNG key for each name, whatever other names there are.

    >>> import jax
    >>> bool((named_key(jax.random.key(0), "a") == named_key(jax.random.key(0), "b")).all())
    False
    """
    return jax.random.fold_in(key, zlib.crc32(name.encode()))


def named_leaves(params: Any) -> dict[str, Any]:
    """The leaves of a pytree by name, in their order."""
    return {path_name(path): leaf for path, leaf in jax.tree.leaves_with_path(params, is_leaf=is_stored)}


def all_finite(tree: Any) -> jax.Array:
    """Whether no float of a pytree of arrays is infinite or not a number: [] bool.

    >>> bool(all_finite({"a": jnp.ones(3), "b": jnp.arange(2)})), bool(all_finite([jnp.array(jnp.nan)]))
    (True, False)
    """
    floats = (leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.floating))
    return functools.reduce(jnp.logical_and, map(_array_finite, floats), jnp.array(True))


def _array_finite(array: jax.Array) -> jax.Array:
    """As integers, the bits of infinities and NaNs are above those of the largest number of their sign.

    So nothing is computed before it is reduced: XLA writes out on a CPU what `isfinite(array).all()` reduces,
    a mask as long as the array. (The largest magnitude is not NaN there where one is.)
    """
    info = jnp.finfo(array.dtype)
    signed, unsigned = jnp.dtype(f"i{array.itemsize}"), jnp.dtype(f"u{array.itemsize}")
    positive, negative = info.max.view(signed), info.min.view(unsigned)
    # of signed bits every positive number is above the negative ones, of unsigned ones below
    positives = jax.lax.bitcast_convert_type(array, signed).max(initial=0) <= positive
    negatives = jax.lax.bitcast_convert_type(array, unsigned).max(initial=0) <= negative
    return positives & negatives


@functools.partial(jax.jit, static_argnames="stacked")
def _held_finite(leaf: Any, layer: Any, stacked: bool) -> jax.Array:
    if stacked:  # a layer at a time: other weights become arrays
        leaf = jax.tree.map(lambda part: jax.lax.dynamic_index_in_dim(part, layer, keepdims=False), leaf)
    # floats that are held as bits, else the floats that hold others
    floats = any(jnp.issubdtype(part.dtype, jnp.floating) for part in jax.tree.leaves(leaf))
    return all_finite(leaf if floats else as_array(leaf))


def not_finite(tree: Any) -> list[str]:
    """The names of the leaves of a pytree that hold a float that is infinite or not a number."""

    def finite(leaf: Any) -> bool:
        stacked = leaf.ndim > 2  # [LAYERS, ...]
        layers = range(leaf.shape[0] if stacked else 1)
        return all(bool(_held_finite(leaf, np.int32(layer), stacked)) for layer in layers)

    return [name for name, leaf in named_leaves(tree).items() if not finite(leaf)]


def edit(params: Any, edits: Mapping[str, Callable[[Any], Any]]) -> Any:
    """Applies to the named leaves of a pytree the edits of the targets on them."""
    named, structure = named_leaves(params), jax.tree.structure(params, is_leaf=is_stored)
    for target, edit in edits.items():
        name = parameter_name(target)
        if name not in named:
            raise KeyError(f"no parameter {name!r}: expected one of {', '.join(named)}")
        named[name] = edit(named[name])
    return jax.tree.unflatten(structure, list(named.values()))
