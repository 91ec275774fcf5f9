"""Names of the leaves of pytrees, and edits of the named ones. A stored weight is a leaf."""

from collections.abc import Callable, Mapping
from typing import Any

import jax

from spiel_jax.ops.stored import is_stored


def parameter_name(target: str) -> str:
    """Name of the weight that a target's name stands for: what precedes the ``@`` of a layer subset."""
    return target.partition("@")[0]


def path_name(path: tuple) -> str:
    """Dotted name of a leaf of a pytree from its key path: ``("mlp", "kernel")`` is "mlp.kernel"."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


def named_leaves(params: Any) -> dict[str, Any]:
    """The leaves of a pytree by name, in their order."""
    return {path_name(path): leaf for path, leaf in jax.tree.leaves_with_path(params, is_leaf=is_stored)}


def edit(params: Any, edits: Mapping[str, Callable[[Any], Any]]) -> Any:
    """Applies to the named leaves of a pytree the edits of the targets on them."""
    named, structure = named_leaves(params), jax.tree.structure(params, is_leaf=is_stored)
    for target, edit in edits.items():
        name = parameter_name(target)
        if name not in named:
            raise KeyError(f"no parameter {name!r}: expected one of {', '.join(named)}")
        named[name] = edit(named[name])
    return jax.tree.unflatten(structure, list(named.values()))
