"""A linear layer that collects the gradient of some entries of its weight, and of no others."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec

from spiel_jax.ops.matmul import dot, input_gradient, weight_gradient
from spiel_jax.ops.selection import top_in_blocks
from spiel_jax.ops.sharded import BATCH_AXES, current_axes, on_blocks
from spiel_jax.ops.stored import Stored, as_array
from spiel_jax.ops.tree import edit
from spiel_jax.sparse.delta import SparseDelta, divided, gather, merge

_static = partial(field, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SparseLinear:
    """A linear layer that differentiates with respect to some entries of its weight only.

    Called as ``y = adapter(x, weight)`` it forms ``x @ weight.T``. Its backward pass forms the weight
    gradient of this one product in float32, keeps the entries asked for, and lets the rest go: it never
    leaves the layer, and is never rounded to the dtype of the weight.

    Attributes:
        active: Active entries. The cotangent of its values is the gradient there.
        candidates: Further entries whose gradient is wanted (they are merged nowhere), or None.
        proposal: Zeros [*stack, ..., 3, c], float32 or float64, or None. Their cotangent holds, for the c
            entries of largest gradient magnitude that are not excluded, gradient, row and column in the block
            as floats (exact up to 2^24); an unused slot has the number of rows as its row.
        watched: Zeros, or None; their cotangent is what ``watch`` gives.
        enabled: Bool scalar per matrix, false where the weight gradient of this layer is not wanted and
            should not be computed; None for true.
        merged: Static. True where ``weight`` already holds the active deltas (a in-place merge); False
            where they are scattered into it on each use.
        propose_active: Static. Whether active entries may be proposed.
        propose_candidates: Static. Whether candidates may be proposed.
        salience: Static. Gradient and weight to the scores by which entries are proposed; None: the gradient.
        watch: Static. Inputs and weight to what is to be seen of them; see ``Criterion.watch``.
        measured: Zeros [*stack, ..., S] float32, or None; their cotangent is what ``measure`` gives of the
            weight gradient.
        measure: Static. Weight gradient [rows, columns] of some blocks and the shape of one to numbers
            [grid_rows, grid_columns, S]; see ``Criterion.measure``.
        batch_axes: Static. Mesh axes over which the leading axis of ``x`` is spread under ``jax.set_mesh``.
            An axis that is also one of the weight's (``active.axes``) is one over which the weight is
            collected for its use, as "fsdp" is.
    """

    active: SparseDelta
    candidates: SparseDelta | None = None
    proposal: jax.Array | None = None
    enabled: jax.Array | None = None
    merged: bool = _static(default=True)
    propose_active: bool = _static(default=False)
    batch_axes: tuple[str, ...] = _static(default=BATCH_AXES)
    watched: jax.Array | None = None
    salience: Callable[[jax.Array, jax.Array], jax.Array] | None = _static(default=None)  # noqa: RUF009
    watch: Callable[[jax.Array, jax.Array], jax.Array] | None = _static(default=None)  # noqa: RUF009
    propose_candidates: bool = _static(default=True)
    measured: jax.Array | None = None
    measure: Callable[[jax.Array, tuple[int, int]], jax.Array] | None = _static(default=None)  # noqa: RUF009

    def __call__(self, x: jax.Array, weight: jax.Array | Stored) -> jax.Array:
        """[..., in] and [out, in] give [..., out], dtype of ``x``."""
        return sparse_linear(x, weight, self)


def _used_weight(weight: jax.Array | Stored, adapter: SparseLinear) -> jax.Array:
    """The array that is multiplied: of a stored weight, what it dequantises to, and the deltas in it."""
    matrix = as_array(weight)
    if adapter.merged:
        return matrix
    return merge({"weight": matrix}, {"weight": adapter.active})["weight"]


@jax.custom_vjp
def sparse_linear(x: jax.Array, weight: jax.Array | Stored, adapter: SparseLinear) -> jax.Array:
    r"""``x @ weight.T`` whose only weight gradient is the one that ``adapter`` collects.

    Of $y = x W^\top$ with cotangent $\bar{y}$ the backward pass gives

    $$
    \bar{x} = \bar{y} W, \qquad \bar{\delta}_j = G_{i_j}, \qquad G = \sum_{\text{tokens}} \bar{y}^\top x
    $$

    Args:
        x: [..., in].
        weight: [out, in]; its own cotangent is not formed (it is zero).
        adapter: What to collect; see ``SparseLinear``.

    Returns:
        [..., out], dtype of ``x``.

    Example:
        >>> x, weight = jnp.array([[1.0, 2.0]]), jnp.zeros((3, 2))
        >>> delta = SparseDelta(jnp.array([0, 3]), jnp.zeros(2), shape=(3, 2))
        >>> def loss(values):
        ...     return sparse_linear(x, weight, SparseLinear(delta.with_values(values), merged=False)).sum()
        >>> jax.grad(loss)(delta.values).tolist()  # of entries (0, 0) and (1, 1)
        [1.0, 2.0]
    """
    return dot(x.astype(weight.dtype), _used_weight(weight, adapter), (-1, 1)).astype(x.dtype)


def _sparse_linear_forward(x: jax.Array, weight: jax.Array, adapter: SparseLinear):
    return sparse_linear(x, weight, adapter), (x, weight, adapter)


def _collect(x: jax.Array, dy: jax.Array, adapter: SparseLinear, weight: jax.Array | None) -> tuple:
    """Float32 cotangents of (active values, candidate values, proposal, measured) from one dense gradient.

    The weight is given where entries are proposed by it too.

    On a mesh each device forms the gradient of its own examples, and takes the entries from it before
    anything is summed over devices; only what proposes or measures sums the dense gradient.
    """
    rows, columns = current_axes(adapter.active.axes or (None, None))
    batch = tuple(name for name in current_axes(adapter.batch_axes) if name)
    # for its use the weight is collected over these: (mesh axis, axis of the weight and of its grid)
    whole = [(name, axis) for axis, name in enumerate((rows, columns)) if name in batch]
    others = tuple(name for name in batch if name not in (rows, columns))

    def reduced(x: jax.Array) -> jax.Array:
        for name, axis in whole:
            x = lax.psum_scatter(x, name, scatter_dimension=axis, tiled=True)
        return lax.psum(x, others) if others else x

    def collect(
        x: jax.Array, dy: jax.Array, active: Any, candidates: Any, proposal: Any, measured: Any, part: Any
    ) -> tuple:
        dense = proposal is not None or measured is not None
        # what is transposed on its way into the product is the narrower of the two
        turned = x.shape[-1] < dy.shape[-1]
        with jax.named_scope("weight_gradient"):
            gradient = weight_gradient(dy, x) if turned else weight_gradient(x, dy)  # [in, out] if turned
            if dense:
                # the barrier keeps XLA from exchanging the operands again
                gradient = reduced(lax.optimization_barrier(gradient).T if turned else gradient)

        def entries(indices: jax.Array) -> jax.Array:
            if dense:
                return gather(gradient, adapter.active.part(indices))
            for name, axis in whole:
                indices = lax.all_gather(indices, name, axis=axis, tiled=True)
            return reduced(gather(gradient, adapter.active.part(indices), transposed=turned))

        with jax.named_scope("gather_gradient"):
            found = entries(active)
            probed = None if candidates is None else entries(candidates)
        sums = None
        if measured is not None and adapter.measure is not None:
            with jax.named_scope("measure"):
                sums = adapter.measure(gradient, adapter.active.block).reshape(measured.shape)
        if proposal is None:
            return found, probed, None, sums
        with jax.named_scope("propose"):
            own = replace(adapter, active=adapter.active.part(active), proposal=proposal)
            if adapter.candidates is not None and candidates is not None:
                own = replace(own, candidates=adapter.candidates.part(candidates))
            return found, probed, _propose(gradient, own, part), sums

    candidates = None if adapter.candidates is None else adapter.candidates.indices
    parts = (x, dy, adapter.active.indices, candidates, adapter.proposal, adapter.measured, weight)
    if not (batch or rows or columns):
        return collect(*parts)
    between = [None] * (x.ndim - 2)
    of_weight = PartitionSpec(rows, columns) if rows or columns else PartitionSpec()
    specs = (
        PartitionSpec(batch or None, *between, None if columns in batch else columns),
        PartitionSpec(batch or None, *between, None if rows in batch else rows),
        *[of_weight] * 5,
    )
    return jax.shard_map(collect, in_specs=specs, out_specs=of_weight, check_vma=False)(*parts)


def _propose(gradient: jax.Array, adapter: SparseLinear, weight: jax.Array | None = None) -> jax.Array:
    """[..., 3, c]: gradient, row and column of the largest entries of each block."""
    slots = adapter.proposal
    assert slots is not None
    count = slots.shape[-1]
    grid, block = adapter.active.grid, adapter.active.block
    known = [] if adapter.propose_active else [adapter.active]
    known += [] if adapter.propose_candidates or adapter.candidates is None else [adapter.candidates]
    excluded = [delta.indices.reshape(math.prod(grid), -1) for delta in known]
    scores = gradient
    if adapter.salience is not None and weight is not None:
        scores = adapter.salience(gradient, weight.astype(gradient.dtype))
    positions = top_in_blocks(scores, block, count, jnp.concatenate(excluded, -1) if excluded else None)
    found = SparseDelta(positions, None, adapter.active.shape, grid, axes=(None, None))
    entries = gather(gradient, found)
    # one by one: a stack of bfloat16 entries and positions would round the positions
    parts = (entries, *divided(positions, block[1]))
    return jnp.stack([part.astype(slots.dtype) for part in parts], axis=-2).reshape(slots.shape)


def _sparse_linear_backward(residuals: tuple, dy: jax.Array) -> tuple:
    x, weight, adapter = residuals
    used = _used_weight(weight, adapter)
    dx = input_gradient(dy, used).astype(x.dtype)
    seen = None if adapter.proposal is None or adapter.salience is None else used
    x, dy = x.astype(weight.dtype), dy.astype(weight.dtype)
    if adapter.enabled is None:
        active, candidates, proposal, measured = _collect(x, dy, adapter, seen)
    else:
        shapes = jax.eval_shape(_collect, x, dy, adapter, seen)
        active, candidates, proposal, measured = lax.cond(
            adapter.enabled,
            _collect,
            lambda *_: jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes),
            x,
            dy,
            adapter,
            seen,
        )
    cotangent = jax.tree.map(
        lambda leaf: (
            jnp.zeros_like(leaf) if jnp.issubdtype(leaf.dtype, jnp.floating) else _no_cotangent(leaf)
        ),
        adapter,
    )
    cotangent = replace(
        cotangent,
        active=cotangent.active.with_values(active.astype(adapter.active.values.dtype)),
        proposal=proposal,
        measured=measured,
    )
    if adapter.watched is not None and adapter.watch is not None:
        with jax.named_scope("watch"):
            cotangent = replace(cotangent, watched=adapter.watch(x, used))
    if adapter.candidates is not None:
        cotangent = replace(cotangent, candidates=cotangent.candidates.with_values(candidates))
    return dx, None, cotangent


def _no_cotangent(leaf: jax.Array) -> Any:
    """The cotangent of an integer or boolean array."""
    return np.zeros(leaf.shape, jax.dtypes.float0)


sparse_linear.defvjp(_sparse_linear_forward, _sparse_linear_backward)


def candidates_from_proposal(proposal: jax.Array, active: SparseDelta) -> SparseDelta:
    """Candidates and their gradients from the cotangent of ``SparseLinear.proposal``.

    Args:
        proposal: [*stack, ..., 3, c] float32 or float64.
        active: Any delta of the same weight, for its static shape and grid.

    Returns:
        A ``SparseDelta`` with indices and gradients [*stack, ..., c].
    """
    gradients, rows, columns = (proposal[..., i, :] for i in range(3))
    indices = rows.astype(jnp.int32) * active.block[1] + columns.astype(jnp.int32)
    return replace(active, indices=indices, values=gradients)


def propose(
    gradients: Any, deltas: Mapping[str, SparseDelta], count: Mapping[str, int]
) -> dict[str, SparseDelta]:
    """Candidates from dense gradients, for code that has them: the largest entries that are not active.

    Args:
        gradients: Pytree like the parameters, dense gradients.
        deltas: Active entries by target name; values are not read.
        count: Candidates per matrix (or block) of each target.

    Returns:
        Target name to ``SparseDelta`` of positions and gradients, [*stack, ..., c].

    Raises:
        KeyError: If a name is no leaf of ``gradients``.

    Example:
        >>> gradients = {"w": jnp.array([[9.0, -3.0], [1.0, 4.0]])}
        >>> found = propose(gradients, {"w": SparseDelta(jnp.array([0]), None, shape=(2, 2))}, {"w": 2})["w"]
        >>> sorted(zip(found.indices.tolist(), found.values.tolist()))
        [(1, -3.0), (3, 4.0)]
    """
    found = {}

    def find(gradient: jax.Array, name: str, delta: SparseDelta) -> jax.Array:
        dtype = jnp.promote_types(gradient.dtype, jnp.float32)

        def strongest(gradient: jax.Array, indices: jax.Array) -> jax.Array:
            part = replace(delta.part(indices), layers=None)
            selected = gradient if delta.layers is None else gradient[jnp.array(delta.layers)]
            stack = part.stack_axes
            slots = jnp.zeros((*indices.shape[:-1], 3, count[name]), dtype)
            adapter = SparseLinear(
                active=replace(part, indices=indices.reshape(-1, *indices.shape[stack:])),
                proposal=slots.reshape(-1, *slots.shape[stack:]),
            )
            matrices = selected.reshape(-1, *part.shape)
            return lax.map(lambda item: _propose(*item), (matrices, adapter)).reshape(slots.shape)

        proposal = on_blocks(strongest, delta.axes, delta.stack_axes, gradient, delta.indices)
        found[name] = candidates_from_proposal(proposal, delta)
        return gradient

    edit(gradients, {name: partial(find, name=name, delta=delta) for name, delta in deltas.items()})
    return found
