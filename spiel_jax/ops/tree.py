"""Names of the leaves of pytrees, and edits of the named ones."""

from collections.abc import Callable, Mapping
from typing import Any

import jax


def parameter_name(target: str) -> str:
    """Name of the weight that a target's name stands for: what precedes the ``@`` of a layer subset."""
    return target.partition("@")[0]


def path_name(path: tuple) -> str:
    """Dotted name of a leaf of a pytree from its key path: ``("mlp", "kernel")`` is "mlp.kernel"."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


def edit(params: Any, edits: Mapping[str, Callable[[jax.Array], jax.Array]]) -> Any:
    """Applies to the named leaves of a pytree the edits of the targets on them."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(params)
    named = {path_name(path): leaf for path, leaf in leaves}
    for target, edit in edits.items():
        name = parameter_name(target)
        if name not in named:
            raise KeyError(f"no parameter {name!r}: expected one of {', '.join(named)}")
        named[name] = edit(named[name])
    return jax.tree_util.tree_unflatten(structure, list(named.values()))
