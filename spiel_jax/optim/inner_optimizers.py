"""Inner scalings for sparse values: Adam with an age per entry, and sparse SM3.

Both are ordinary Optax transformations over the tree of values, whose leaves are [*stack, ..., k].
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from spiel_jax.sparse.delta import SparseDelta, divided
from spiel_jax.sparse.matrices import map_matrices
from spiel_jax.sparse.targets import Target, by_target, like_values


def state_dtype(dtype: Any) -> jnp.dtype:
    """The dtype of statistics over values of ``dtype``: never less than float32."""
    return jnp.promote_types(dtype, jnp.float32)


class ScaleByAgedAdamState(NamedTuple):
    """State of ``scale_by_aged_adam``; all trees are like the values."""

    age: Any  # int32: updates that the moments of an entry have absorbed
    mu: Any
    nu: Any


def scale_by_aged_adam(
    b1: float = 0.9, b2: float = 0.999, eps: float = 1e-6, *, low_precision: bool = False
) -> optax.GradientTransformation:
    r"""Adam whose bias correction counts each entry's own updates.

    A reset entry under Adam's single shared count would step three to six times too far: its moments are
    small, and a large count corrects nothing. With $a$ the age of an entry, this update included,

    $$
    \mu \leftarrow \beta_1 \mu + (1 - \beta_1) g, \qquad
    \nu \leftarrow \beta_2 \nu + (1 - \beta_2) g^2, \qquad
    u = \frac{\mu}{1 - \beta_1^a} \cdot \frac{\sqrt{1 - \beta_2^a}}{\sqrt{\nu} + \epsilon}
    $$

    As in the original implementation eps is bias-corrected too.

    Args:
        b1: Decay rate of the first moment.
        b2: Decay rate of the second moment.
        eps: Added to the root of the second moment.
        low_precision: As the original has it: moments in the dtype of the values, and an age that is
            counted only where that is float32 (it increments a converted copy elsewhere), so that the bias
            correction stays that of the first update, or of the seed. By default moments are float32 or
            better and ages always counted: in bfloat16 ``0.999 * nu`` rounds back to ``nu``.

    Returns:
        A ``GradientTransformation``; the state's fields are ``age`` (int32), ``mu``, ``nu``.

    Example:
        >>> tx = scale_by_aged_adam()
        >>> updates, state = tx.update({"w": jnp.array([4.0, -0.5])}, tx.init({"w": jnp.zeros(2)}))
        >>> updates["w"].round(3).tolist(), state.age["w"].tolist()  # a first step is the gradient's sign
        ([1.0, -1.0], [1, 1])

    References:
        Ansell et al., `Scaling Sparse Fine-Tuning to Large Language Models
        <https://arxiv.org/abs/2401.16405>`_, section 3.2.
    """

    def init(values: optax.Params) -> ScaleByAgedAdamState:
        def moments() -> optax.Params:
            wide = state_dtype if not low_precision else lambda dtype: dtype
            return jax.tree.map(lambda v: jnp.zeros(v.shape, wide(v.dtype)), values)

        age = jax.tree.map(lambda v: jnp.zeros(v.shape, jnp.int32), values)
        return ScaleByAgedAdamState(age, moments(), moments())

    def update(
        grads: optax.Updates, state: ScaleByAgedAdamState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, ScaleByAgedAdamState]:
        del params
        age = jax.tree.map(lambda a: a + 1, state.age)
        # a 16-bit gradient is widened before it is scaled or squared
        wide = jax.tree.map(lambda m, g: g.astype(jnp.promote_types(m.dtype, g.dtype)), state.mu, grads)
        mu = jax.tree.map(lambda m, g: (b1 * m + (1 - b1) * g).astype(m.dtype), state.mu, wide)
        nu = jax.tree.map(lambda v, g: (b2 * v + (1 - b2) * jnp.square(g)).astype(v.dtype), state.nu, wide)

        def direction(g: jax.Array, a: jax.Array, m: jax.Array, v: jax.Array) -> jax.Array:
            wide = state_dtype(m.dtype)
            first, second = absorbed(b1, a, wide), absorbed(b2, a, wide)
            return (m / first * jnp.sqrt(second) / (jnp.sqrt(v) + eps)).astype(g.dtype)

        updates = jax.tree.map(direction, grads, age, mu, nu)
        if low_precision:
            age = jax.tree.map(lambda a, o, m: a if m.dtype == jnp.float32 else o, age, state.age, mu)
        return updates, ScaleByAgedAdamState(age, mu, nu)

    return optax.GradientTransformation(init, update)  # pyright: ignore[reportArgumentType]


def absorbed(decay: float, age: jax.Array, dtype: Any) -> jax.Array:
    """``1 - decay^age``: the weight of the gradients in a moment, without cancellation at small ages."""
    return -jnp.expm1(age.astype(dtype) * jnp.log(jnp.array(decay, dtype)))


def sm3_observe(
    row: jax.Array, column: jax.Array, delta: SparseDelta, grads: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """One step of sparse SM3: bounds the second moments of the active entries by their row and column.

    Args:
        row: [..., R] row accumulators of each matrix (or block).
        column: [..., C] column accumulators.
        delta: The active positions, [..., k].
        grads: [..., k].

    Returns:
        New row accumulators, new column accumulators, and [..., k] the moments ``u = min(row, column) +
        g^2`` of the entries (SM3-II), where the accumulators of an unused slot are 0. In dtype of the
        accumulators.

    References:
        Anil et al., `Memory-Efficient Adaptive Optimization <https://arxiv.org/abs/1901.11150>`_;
        SpIEL, section 3.3.
    """
    return map_matrices(partial(_sm3_matrix, delta.block), delta, row, column, delta.indices, grads)


def _sm3_matrix(
    block: tuple[int, int], row: jax.Array, column: jax.Array, indices: jax.Array, grads: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """``sm3_observe`` of one matrix (or block)."""
    height, width = block
    rows, columns = divided(indices, width)  # [k]
    columns = jnp.where(rows < height, columns, width)  # of unused slots neither is there
    bounds = (a.at[i].get(mode="fill", fill_value=0) for a, i in ((row, rows), (column, columns)))
    moments = jnp.minimum(*bounds) + jnp.square(grads.astype(row.dtype))
    # moments only grow, so a maximum with the old accumulator changes no row that has entries
    row, column = row.at[rows].max(moments, mode="drop"), column.at[columns].max(moments, mode="drop")
    return row, column, moments


def _sm3_scaled(
    block: tuple[int, int],
    eps: float,
    gradient: jax.Array,
    row: jax.Array,
    column: jax.Array,
    indices: jax.Array,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Of one matrix (or block) the updates in the place of the gradients, and new accumulators."""
    row, column, moments = _sm3_matrix(block, row, column, indices, gradient)
    scaled = gradient.astype(moments.dtype) / jnp.sqrt(moments + eps)
    return scaled.astype(gradient.dtype), (row, column)


class ScaleBySparseSM3State(NamedTuple):
    """State of ``scale_by_sparse_sm3``; target name to accumulators of each matrix (or block)."""

    row_moments: dict[str, jax.Array]  # [..., R]
    column_moments: dict[str, jax.Array]  # [..., C]


def scale_by_sparse_sm3(
    targets: Mapping[str, Target], eps: float = 1e-8
) -> optax.GradientTransformationExtraArgs:
    r"""SM3 over sparse entries: one accumulator per row and per column, none per entry.

    The entry at row $x$ and column $y$ bounds its second moment by its row's and its column's,

    $$
    u = \min(r_x, q_y) + g^2, \qquad r_x \leftarrow \max(r_x, u), \qquad q_y \leftarrow \max(q_y, u),
    $$

    and its update is $g / \sqrt{u + \epsilon}$: eps is inside the root, as in the original implementation.
    It needs the positions of the entries, which ``spiel`` passes to its inner transformation.

    Args:
        targets: What is adapted; static.
        eps: Added to the moment, inside the root.

    Returns:
        A ``GradientTransformationExtraArgs`` whose update takes ``active``, target name to SparseDelta.

    Example:
        >>> targets = {"w": Target((2, 2), 2)}
        >>> tx, values = scale_by_sparse_sm3(targets), {"w": jnp.zeros(2)}
        >>> active = {"w": SparseDelta(jnp.array([0, 1]), None, shape=(2, 2))}  # both in row 0
        >>> _, state = tx.update({"w": jnp.array([3.0, 4.0])}, tx.init(values), values, active=active)
        >>> state.row_moments["w"].tolist(), state.column_moments["w"].tolist()
        ([16.0, 0.0], [9.0, 16.0])

    References:
        SpIEL, section 3.3; Anil et al., `Memory-Efficient Adaptive Optimization
        <https://arxiv.org/abs/1901.11150>`_.
    """

    def init(values: optax.Params) -> ScaleBySparseSM3State:
        return sm3_init(targets, by_target(values, targets))

    def update(
        grads: optax.Updates,
        state: ScaleBySparseSM3State,
        params: optax.Params | None = None,
        *,
        active: Mapping[str, SparseDelta] | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, ScaleBySparseSM3State]:
        del params, extra_args
        if active is None:
            raise ValueError(
                "scale_by_sparse_sm3 needs the positions of the entries: use it inside spiel(), or pass "
                "active=deltas"
            )
        rows, columns, updates = {}, {}, {}
        for name, gradient in by_target(grads, targets).items():
            delta, scaled = active[name], partial(_sm3_scaled, active[name].block, eps)
            moments = state.row_moments[name], state.column_moments[name]
            updates[name], (rows[name], columns[name]) = map_matrices(
                scaled, delta, gradient, *moments, delta.indices, in_place=True
            )
        return like_values(grads, updates, targets), ScaleBySparseSM3State(rows, columns)

    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType]


def sm3_init(targets: Mapping[str, Target], values: Mapping[str, jax.Array]) -> ScaleBySparseSM3State:
    """Zero accumulators for each matrix (or block) of the targets, in ``state_dtype`` of their values."""
    rows, columns = {}, {}
    for name, target in targets.items():
        dtype = state_dtype(values[name].dtype) if name in values else jnp.float32
        rows[name] = jnp.zeros((*target.lead, target.block[0]), dtype)
        columns[name] = jnp.zeros((*target.lead, target.block[1]), dtype)
    return ScaleBySparseSM3State(rows, columns)


def descend(learning_rate: optax.ScalarOrSchedule, weight_decay: float = 0.0) -> optax.GradientTransformation:
    """Steps down by the learning rate, then decays the stepped values.

    ``v <- (v - lr * u) * (1 - lr * weight_decay)``: decay follows the update, as in the original
    implementation, and pulls the deltas to 0, that is the weights to their pretrained values.

    Args:
        learning_rate: A number or a schedule of the count of updates.
        weight_decay: Decay per unit of learning rate.
    """

    def init(values: optax.Params) -> optax.ScaleByScheduleState:
        del values
        return optax.ScaleByScheduleState(count=jnp.zeros((), jnp.int32))

    def update(
        updates: optax.Updates,
        state: optax.ScaleByScheduleState,
        params: optax.Params | None = None,
    ) -> tuple[optax.Updates, optax.ScaleByScheduleState]:
        if params is None:
            raise ValueError("descend needs the values: call update(updates, state, values)")
        rate = learning_rate(state.count) if callable(learning_rate) else learning_rate

        def step(update: jax.Array, value: jax.Array) -> jax.Array:
            move = -jnp.asarray(rate, update.dtype) * update
            shrink = jnp.asarray(rate * weight_decay, update.dtype)
            return move - shrink * (value + move)

        count = optax.safe_increment(state.count)
        return jax.tree.map(step, updates, params), optax.ScaleByScheduleState(count)

    return optax.GradientTransformation(init, update)  # pyright: ignore[reportArgumentType]


def aged_adamw(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-6,
    weight_decay: float = 0.0,
    *,
    low_precision: bool = False,
) -> optax.GradientTransformation:
    r"""The inner optimizer of SpIEL-AG: ``scale_by_aged_adam``, then a step and decay.

    $$
    \delta \leftarrow (\delta - \eta u)(1 - \eta \lambda)
    $$

    Args:
        learning_rate: A number or a schedule of the count of updates.
        b1: Decay rate of the first moment.
        b2: Decay rate of the second moment.
        eps: Added to the root of the second moment.
        weight_decay: Decay per unit of learning rate, towards the pretrained weights.
        low_precision: See ``scale_by_aged_adam``.

    Example:
        >>> values = {"w": jnp.zeros(1)}
        >>> tx = aged_adamw(0.1, weight_decay=1.0)
        >>> updates, _ = tx.update({"w": jnp.array([2.0])}, tx.init(values), values)
        >>> updates["w"].round(3).tolist()  # a step to -0.1, of which a tenth decays
        [-0.09000000357627869]
    """
    return optax.chain(
        scale_by_aged_adam(b1, b2, eps, low_precision=low_precision), descend(learning_rate, weight_decay)
    )


def sparse_sm3(
    learning_rate: optax.ScalarOrSchedule,
    targets: Mapping[str, Target],
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> optax.GradientTransformationExtraArgs:
    """The inner optimizer of SpIEL-MA: ``scale_by_sparse_sm3``, then the step and decay of ``aged_adamw``.

    Args:
        learning_rate: A number or a schedule of the count of updates.
        targets: What is adapted; static.
        eps: Added to the moment, inside the root.
        weight_decay: Decay per unit of learning rate, towards the pretrained weights.

    Example:
        >>> targets = {"w": Target((2, 2), 1)}
        >>> tx, values = sparse_sm3(0.1, targets), {"w": jnp.zeros(1)}
        >>> active = {"w": SparseDelta(jnp.array([3]), None, shape=(2, 2))}
        >>> updates, _ = tx.update({"w": jnp.array([2.0])}, tx.init(values), values, active=active)
        >>> updates["w"].round(3).tolist()
        [-0.10000000149011612]
    """
    return optax.chain(scale_by_sparse_sm3(targets, eps), descend(learning_rate, weight_decay))
