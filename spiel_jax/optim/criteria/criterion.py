"""Growth criteria of SpIEL: where new entries would help.

A criterion keeps its own statistics, apart from those of the inner optimizer, so that any criterion works
around any optimizer. ``spiel`` calls ``observe`` on every step; on a reselection it asks, matrix by matrix
(or block by block), how many entries are ``available`` and which ``incoming`` ones rank highest; then
``seed`` may set fields of the inner optimizer's state at the grown entries.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import jax

from spiel_jax.sparse.delta import SparseDelta
from spiel_jax.sparse.targets import Target

Flag = bool | jax.Array
"""True or false, known to the host or traced."""


class Observation(NamedTuple):
    """What a step shows to a growth criterion.

    Attributes:
        active: Target name to the active positions (values None), those in force during the step.
        grads: Target name to the gradient at the active positions, as the inner optimizer sees it.
        candidates: Target name to candidate positions and this step's gradients there; None if not given.
        proposes: Whether the candidates are newly proposed.
        estimates: Whether they are observed again.
        inner: State of the inner optimizer after its update.
    """

    active: Mapping[str, SparseDelta]
    grads: Mapping[str, jax.Array]
    candidates: Mapping[str, SparseDelta] | None
    proposes: Flag
    estimates: Flag
    inner: Any


class Growth(Protocol):
    """Protocol of a growth criterion. Statistics are a dict: target name to a pytree.

    The leaves of the statistics have the leading axes of the target's values ([*stack, ...]), so that one
    matrix's statistics are one slice of them.
    """

    @property
    def uses_candidates(self) -> bool:
        """Whether ``update`` must be given candidates on proposing and estimating steps."""
        ...

    def init(self, targets: Mapping[str, Target], values: Mapping[str, jax.Array]) -> dict[str, Any]:
        """Statistics before the first step."""
        ...

    def observe(self, stats: dict[str, Any], seen: Observation) -> dict[str, Any]:
        """Statistics after a step."""
        ...

    def available(self, stats: Any, indices: jax.Array, target: Target) -> jax.Array | int:
        """How many entries of one matrix could be grown, given its active positions [k].

        ``target.block_size`` marks unused slots among them, here and in ``incoming``.
        """
        ...

    def incoming(
        self, stats: Any, indices: jax.Array, dropped: jax.Array, n: jax.Array, target: Target
    ) -> jax.Array:
        """Positions [slots] of the n entries to grow, and ``target.block_size`` in unused slots.

        A position that is active and not dropped must not be among them.
        """
        ...

    def seed(self, stats: Any, source: jax.Array) -> dict[str, jax.Array]:
        """Fields of the inner state of grown entries: name to [k]. May be empty.

        ``source`` [k] is the slot of ``incoming`` that each replaced slot took; what is returned for the
        other slots is not used.
        """
        ...

    def clear(self, stats: dict[str, Any], targets: Mapping[str, Target]) -> dict[str, Any]:
        """Statistics after a reselection."""
        ...
