"""SpIEL as an Optax transformation: drop and grow around any inner optimizer.

What Optax sees as parameters is the tree of values. The positions live in this transformation's state, and
a reselection rewrites them there: for a replaced slot the update is minus its value, so that
``optax.apply_updates`` performs the drop and the grown entry starts at zero in the same slot.
"""

import zlib
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from spiel_jax.growth import Flag, Growth, Observation
from spiel_jax.schedules import Phase, Reselection
from spiel_jax.selection import drop, replace
from spiel_jax.sparse import SparseDelta
from spiel_jax.targets import Target, by_target, like_values


class SpielState(NamedTuple):
    """State of ``spiel``.

    Attributes:
        spiel_count: int32 scalar, optimizer steps taken.
        active: Target name to the active positions, a ``SparseDelta`` without values.
        growth: Target name to the growth criterion's statistics.
        inner: State of the inner optimizer.
        replaced: float32 scalar, share of all entries that the last step replaced; 0 after a step without
            a reselection.
    """

    spiel_count: jax.Array
    active: dict[str, SparseDelta]
    growth: dict[str, Any]
    inner: Any
    replaced: jax.Array


def random_indices(key: jax.Array, size: int, count: int) -> jax.Array:
    """Random distinct positions in O(count) time and memory: one from each of ``count`` equal strata.

    Args:
        key: PRNG key.
        size: Number of entries to draw from.
        count: How many, at most ``size``.

    Returns:
        [count] int32, ascending, distinct, each entry equally likely up to the rounding of the strata.
    """
    width, longer = divmod(size, count)
    number = jnp.arange(count, dtype=jnp.int32)
    starts = number * width + jnp.minimum(number, longer)
    widths = width + (number < longer).astype(jnp.int32)
    return starts + jax.random.randint(key, (count,), 0, widths, jnp.int32)


def initial_positions(targets: Mapping[str, Target], seed: int | jax.Array) -> dict[str, SparseDelta]:
    """Random positions of every target: a function of the seed, the target's name and its shape.

    Args:
        targets: What is adapted.
        seed: An int (which may be traced) or a PRNG key.

    Returns:
        Target name to a ``SparseDelta`` without values.
    """
    is_key = isinstance(seed, jax.Array) and jnp.issubdtype(seed.dtype, jax.dtypes.prng_key)
    root = seed if is_key else jax.random.key(seed)
    positions = {}
    for name, target in targets.items():
        key = jax.random.fold_in(root, zlib.crc32(name.encode()))
        draw = partial(random_indices, size=target.block_size, count=target.block_count)
        for _ in target.lead:
            draw = jax.vmap(draw)
        positions[name] = target.delta(draw(jax.random.split(key, target.lead) if target.lead else key))
    return positions


def deltas(values: Any, opt_state: Any, *, sort: bool = False) -> dict[str, SparseDelta]:
    """Zips the values with the positions that an optimizer state holds.

    Args:
        values: Tree of values.
        opt_state: State of ``spiel`` or of any chain, partition or wrapper around it.
        sort: Whether to order entries by position, for what leaves the run.

    Returns:
        Target name to ``SparseDelta``.

    Raises:
        ValueError: If there is no state of ``spiel`` in ``opt_state``, or it has other targets.
    """
    active = optax.tree.get(opt_state, "active")
    if active is None:
        raise ValueError("no state of spiel() in this optimizer state")
    named = by_target(values, active)
    zipped = {name: delta.with_values(named[name]) for name, delta in active.items()}
    return {name: delta.sort() for name, delta in zipped.items()} if sort else zipped


def _reset(inner: optax.GradientTransformation, state: Any, values: Any, replaced: Any) -> Any:
    """Sets the inner state of replaced entries to what ``inner.init`` gives for the new values."""
    fresh = inner.init(values)

    def mask(leaf: Any, replaced: jax.Array) -> Any:
        return replaced if leaf.shape == replaced.shape else False

    masks = optax.tree.map_params(inner, mask, state, replaced, transform_non_params=lambda _: False)

    def mix(replaced: Any, new: Any, old: Any) -> Any:
        return old if replaced is False else jnp.where(replaced, new, old)

    return jax.tree.map(mix, masks, fresh, state)


def _check_per_entry(inner: optax.GradientTransformation, state: Any, values: Any) -> None:
    """Refuses an inner optimizer whose state is not per entry: replaced entries could not be reset."""

    def check(leaf: Any, value: Any) -> None:
        if leaf.shape != value.shape and leaf.size > 1:
            raise TypeError(
                f"the inner optimizer keeps a state of shape {leaf.shape} for values of shape "
                f"{value.shape}: spiel() needs one whose state is per entry (adam, lion, sgd, adagrad, "
                "unfactored adafactor, ...)"
            )

    try:
        optax.tree.map_params(inner, check, state, values, transform_non_params=lambda _: None)
    except TypeError:
        raise
    except Exception as error:
        raise TypeError(
            "spiel() needs an inner optimizer whose state is per entry; this one's is not built from its "
            f"parameters leaf by leaf: {error}"
        ) from error


def _map_matrices(function: Any, lead: tuple[int, ...], *trees: Any) -> Any:
    """Applies ``function`` to each matrix of arrays with leading axes ``lead``, one at a time."""
    if not lead:
        return function(*trees)
    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[len(lead) :]), trees)
    mapped = lax.map(lambda matrix: function(*matrix), flat)
    return jax.tree.map(lambda x: x.reshape(*lead, *x.shape[1:]), mapped)


def spiel(
    inner: optax.GradientTransformation,
    targets: Mapping[str, Target],
    *,
    growth: Growth,
    schedule: Reselection,
    seed: int | jax.Array = 0,
    clip_norm: float | None = None,
    clip_candidates: bool = True,
) -> optax.GradientTransformationExtraArgs:
    """Evolves the positions of sparse values around an inner optimizer (SpIEL, algorithms 1 and 2).

    Every step applies ``inner`` to the values. A step that ends with a reselection also drops the n entries
    of smallest ``|value|`` of each matrix, grows the n that ``growth`` ranks highest, and resets the
    inner state of the replaced ones to what ``inner.init`` gives. Kept entries stay in their slot, and
    their values and moments are what the inner update made them. n is rounded down, and is less
    where fewer entries can be grown.

    Place it last in a chain: a scaling after it would scale the drop too.

    Args:
        inner: Any Optax optimizer whose state is per entry; it is given ``active`` (the positions) and all
            extra arguments of the update.
        targets: What is adapted, from ``find_targets``; static.
        growth: ``AccumulatedGradients`` (SpIEL-AG), ``MomentApproximation`` (SpIEL-MA) or another.
        schedule: When to reselect and how much to replace; static.
        seed: Of the initial random positions; an int or a PRNG key.
        clip_norm: Global norm to which the gradients of the active entries are clipped, or None. Candidate
            gradients are scaled by the same factor, which a clipping before this one in a chain could not
            do.
        clip_candidates: Whether they are (the original implementation's are not).

    Returns:
        A ``GradientTransformationExtraArgs``. Its update takes, besides gradients, state and values:

        * ``candidates``: target name to ``SparseDelta`` of candidate positions and this step's gradients
          there (SpIEL-AG); needed on proposing and estimating steps.
        * ``phase``: the step's ``Phase``, and ``reselect``: whether it ends with a reselection. A host that
          knows them (``schedule.phase(step)``, ``schedule.reselects(step)``) gives them as Python
          values, and what never runs is not compiled. Where absent they follow from the state's count.

        Gradients and values are trees whose leaves' last key is the name of a target.

    Raises:
        TypeError: At ``init``, if the state of ``inner`` is not per entry.
        ValueError: If the values do not match the targets.
    """
    inner = optax.with_extra_args_support(inner)
    counts = schedule.counts([target.block_count for target in targets.values()])
    total = sum(target.total for target in targets.values())

    def init(values: optax.Params) -> SpielState:
        named = by_target(values, targets)
        for name, value in named.items():
            expected = (*targets[name].lead, targets[name].block_count)
            if value.shape != expected:
                raise ValueError(f"values of {name} are {value.shape}: expected {expected}")
        state = inner.init(values)
        if named:
            _check_per_entry(inner, jax.eval_shape(inner.init, values), values)
        return SpielState(
            spiel_count=jnp.zeros((), jnp.int32),
            active=initial_positions(targets, seed),
            growth=growth.init(targets, named),
            inner=state,
            replaced=jnp.zeros((), jnp.float32),
        )

    def reselect_now(
        updates: Any, values: Any, state: SpielState, number: jax.Array | int
    ) -> tuple[Any, SpielState]:
        table = jnp.asarray(counts)[number]  # [targets]
        new_values = by_target(optax.apply_updates(values, updates), targets)
        active, replaced, seeds = {}, {}, {}
        for position, (name, target) in enumerate(targets.items()):
            one = partial(_reselect_matrix, n=table[position], target=target, growth=growth)
            indices, replaced[name], seeds[name] = _map_matrices(
                one, target.lead, state.active[name].indices, new_values[name], state.growth[name]
            )
            active[name] = target.delta(indices)

        tree = partial(like_values, values, targets=targets)
        masks = tree(replaced)
        updates = jax.tree.map(lambda u, v, r: jnp.where(r, -v, u), updates, values, masks)
        kept = {name: jnp.where(replaced[name], 0, v) for name, v in new_values.items()}
        inner_state = _reset(inner, state.inner, tree(kept), masks)
        for field in next(iter(seeds.values())):
            old = optax.tree.get(inner_state, field)
            if old is not None:  # an inner optimizer without this moment has nothing to seed
                grown = tree({name: seed[field] for name, seed in seeds.items()})
                mixed = jax.tree.map(
                    lambda r, new, o: jnp.where(r, new.astype(o.dtype), o), masks, grown, old
                )
                inner_state = optax.tree.set(inner_state, **{field: mixed})
        changed = sum(jnp.sum(mask, dtype=jnp.float32) for mask in replaced.values())
        return updates, state._replace(
            active=active,
            growth=growth.clear(state.growth, targets),
            inner=inner_state,
            replaced=jnp.asarray(changed / total, jnp.float32),
        )

    def update(
        grads: optax.Updates,
        state: SpielState,
        values: optax.Params | None = None,
        *,
        candidates: Mapping[str, SparseDelta] | None = None,
        phase: Phase | None = None,
        reselect: Flag | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, SpielState]:
        if values is None:
            raise ValueError("spiel needs the values: call update(grads, state, values)")
        step = state.spiel_count + 1
        proposes: Flag = schedule.proposes(step) if phase is None else phase is Phase.PROPOSE
        estimates: Flag = schedule.estimates(step) if phase is None else phase is Phase.ESTIMATE
        ends: Flag = schedule.reselects(step) if reselect is None else reselect

        if clip_norm is not None:
            norm = optax.tree.norm(grads)
            factor = jnp.minimum(1.0, clip_norm / jnp.maximum(norm, jnp.finfo(norm.dtype).tiny))
            grads = jax.tree.map(lambda g: (g * factor).astype(g.dtype), grads)
            if clip_candidates and candidates is not None:
                candidates = {
                    name: delta.with_values(delta.values * factor) for name, delta in candidates.items()
                }

        with jax.named_scope("inner_optimizer"):
            updates, inner_state = inner.update(grads, state.inner, values, active=state.active, **extra_args)
        with jax.named_scope("observe"):
            observed = growth.observe(
                state.growth,
                Observation(
                    state.active,
                    by_target(grads, targets),
                    candidates if growth.uses_candidates else None,
                    proposes if growth.uses_candidates else False,
                    estimates if growth.uses_candidates else False,
                    inner_state,
                ),
            )
        state = state._replace(
            spiel_count=optax.safe_increment(state.spiel_count),
            growth=observed,
            inner=inner_state,
            replaced=jnp.zeros((), jnp.float32),
        )
        if ends is False or not len(counts):
            return updates, state
        number = jnp.clip(schedule.number(step), 0, len(counts) - 1)
        with jax.named_scope("reselection"):
            if ends is True:
                return reselect_now(updates, values, state, number)
            return lax.cond(
                ends,
                lambda updates, state: reselect_now(updates, values, state, number),
                lambda updates, state: (updates, state),
                updates,
                state,
            )

    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType]


def _reselect_matrix(
    indices: jax.Array,
    values: jax.Array,
    stats: Any,
    *,
    n: jax.Array,
    target: Target,
    growth: Growth,
) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
    """Drop and grow in one matrix: new indices [k], replaced [k], seeds."""
    n = jnp.minimum(n, growth.available(stats, indices, target))
    dropped = drop(values, indices, n)
    incoming = growth.incoming(stats, indices, dropped, n, target)
    new = replace(indices, dropped, incoming, target.block_size)
    return new.indices, new.replaced, growth.seed(stats, new.source)
