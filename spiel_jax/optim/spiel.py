"""SpIEL as an Optax transformation: drop and grow around any inner optimizer.

What Optax sees as parameters is the tree of values. The positions live in this transformation's state, and
a reselection rewrites them there: for a replaced slot the update is minus its value, so that
``optax.apply_updates`` performs the drop and the grown entry starts at zero in the same slot.
"""

import functools
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from spiel_jax.errors import SpielError
from spiel_jax.optim import one_budget, own_budgets
from spiel_jax.optim.criteria.criterion import Criterion, Flag, Observation
from spiel_jax.optim.entry_state import ReplacedSlots, check_per_entry, reset
from spiel_jax.optim.inner_optimizers import state_dtype
from spiel_jax.optim.positions import initial_positions
from spiel_jax.optim.schedules import Phase, Reselection
from spiel_jax.sparse.delta import SparseDelta, base_entries
from spiel_jax.sparse.targets import Target, by_target, like_values

DropBy = Literal["value", "age", "weight"]
"""Which entries a reselection drops: those of smallest ``|value|`` (SpIEL, section 3.1), or of the smallest
relative to the steps that the inner optimizer has trained them (its ``age``, without what a grown entry's was
seeded with), or to the tuned weight."""


class SpielState(NamedTuple):
    """State of ``spiel``.

    Attributes:
        spiel_count: int32 scalar, optimizer steps taken.
        active: Target name to the active positions, a ``SparseDelta`` without values.
        growth: Target name to the growth criterion's statistics.
        inner: State of the inner optimizer.
        replaced: float32 scalar, share of all entries that the last step replaced; 0 after a step without
            a reselection.

    Example:
        >>> import spiel_jax as sj
        >>> targets = {"w": Target((4, 4), 2)}
        >>> state = sj.spiel_ma(0.1, targets, total_steps=9).init(sj.zeros(targets))
        >>> state.active["w"].indices.shape, int(optax.tree.get(state, "spiel_count"))
        ((2,), 0)
    """

    spiel_count: jax.Array
    active: dict[str, SparseDelta]
    growth: dict[str, Any]
    inner: Any
    replaced: jax.Array


_TINY = 1e-12
"""Of a weight that is 0 to the size that a value there is relative to."""

_MULTI_STEPS = (optax.MultiSteps.init.__code__, optax.MultiSteps.update.__code__)


def _refuse_multi_steps(growth: Criterion) -> None:
    """Refuses candidates inside ``optax.MultiSteps``.

    It accumulates gradients, but passes on the extra arguments of its last micro-step alone, and nothing in
    what it passes tells so. It can only be seen among the callers.
    """
    if not growth.uses_candidates:
        return
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code in _MULTI_STEPS:
            raise TypeError(
                "SpIEL-AG inside optax.MultiSteps would see the candidates of the last micro-step only: "
                "accumulate gradients and candidates yourself, or use SpIEL-MA"
            )
        frame = frame.f_back


def spiel(
    inner: optax.GradientTransformation,
    targets: Mapping[str, Target],
    *,
    growth: Criterion,
    schedule: Reselection,
    seed: int | jax.Array = 0,
    clip_norm: float | None = None,
    clip_candidates: bool = True,
    drop_by: DropBy = "value",
) -> optax.GradientTransformationExtraArgs:
    """Evolves the positions of sparse values around an inner optimizer (SpIEL, algorithms 1 and 2).

    Every step applies ``inner`` to the values. A step that ends with a reselection also drops the n entries
    of smallest ``|value|`` of each matrix, grows the n that ``growth`` ranks highest, and resets the
    inner state of the replaced ones to what ``inner.init`` gives. Kept entries stay in their slot, and
    their values and moments are what the inner update made them. n is rounded down, and is less
    where fewer entries can be grown.

    Where targets have spare slots (``Target.spare``) the budget is one of all: what is dropped and what grows
    is compared across matrices, and those with more to grow get more entries, as far as they have slots.

    Whatever else has a state per entry belongs into ``inner``, for only there replaced entries are reset:
    momentum before it in a chain, or ``optax.lookahead`` or ``schedule_free`` around it, would bring dropped
    values back. In a chain it comes last: a scaling by s after it (``optax.scale``, ``reduce_on_plateau``)
    would scale the drop too, and leave 1 - s of a dropped value to the entry grown in its slot.

    SpIEL-MA works inside ``optax.MultiSteps``; SpIEL-AG is refused there. Inside ``optax.apply_if_finite``
    leave phase and reselection to the state, whose count stands still on a skipped step while a host's goes
    on; by a host's count, a phase whose proposing step was skipped replaces nothing.

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
        drop_by: Which entries are dropped; see ``DropBy``.

    Returns:
        A ``GradientTransformationExtraArgs``. Its update takes, besides gradients, state and values:

        * ``candidates``: target name to ``SparseDelta`` of candidate positions and this step's gradients
          there (SpIEL-AG); needed on proposing and estimating steps.
        * ``weights``: pytree of the weights as they are, deltas merged; needed where the step ends with a
          reselection of a criterion that looks at them (``uses_weights``).
        * ``watched``: target name to what a criterion saw of the layers (``Criterion.watch``), in a phase.
        * ``phase``: the step's ``Phase``, and ``reselect``: whether it ends with a reselection. A host that
          knows them (``schedule.phase(step)``, ``schedule.reselects(step)``) gives them as Python
          values, and what never runs is not compiled. Where absent they follow from the state's count.

        Gradients and values are trees whose leaves' last key is the name of a target. An update has the
        dtype of its gradient, or that of the value where the gradient is narrower.

    Raises:
        TypeError: At ``init``, if the state of ``inner`` is not per entry; inside ``optax.MultiSteps``, if
            ``growth`` uses candidates.
        SpielError: If phases as long as the original's leave no gap; if targets have spare slots and
            ``growth`` does not compare entries of different matrices, or the original's parity is asked for.
        ValueError: If the values do not match the targets.

    Example:
        >>> import spiel_jax as sj
        >>> targets = {"w": Target((4, 4), 2)}
        >>> schedule = Reselection(9, every=1, accumulation=1)
        >>> tx = spiel(optax.adamw(0.1), targets, growth=sj.RandomGrowth(), schedule=schedule)
        >>> values = sj.zeros(targets)
        >>> state = tx.init(values)
        >>> updates, state = tx.update({"w": jnp.array([1.0, -1.0])}, state, values)
        >>> bool((updates["w"] == 0).all()), float(state.replaced)  # all is replaced at first: nothing moves
        (True, 1.0)
    """
    if growth.uses_candidates and schedule.long_phases and schedule.accumulation == schedule.every - 1:
        raise SpielError(
            f"accumulation = {schedule.accumulation}: with every = {schedule.every} the original's phases "
            "would begin as they end, and it divides by zero"
        )
    if any(target.spare for target in targets.values()):
        _check_one_budget(targets, growth, schedule)
    evolution = _Evolution(
        optax.with_extra_args_support(inner),
        targets,
        growth,
        schedule,
        seed,
        clip_norm,
        clip_candidates,
        drop_by,
    )
    functions: Any = evolution.init, evolution.update
    return optax.GradientTransformationExtraArgs(*functions)


def _check_one_budget(targets: Mapping[str, Target], growth: Criterion, schedule: Reselection) -> None:
    """Raises where entries cannot go from one matrix to another."""
    if not getattr(growth, "can_share_budget", False):
        raise SpielError(
            f"targets have spare slots, and {type(growth).__name__} does not compare entries of different "
            "matrices: find_targets(spare=0)"
        )
    if schedule.long_phases:
        raise SpielError("targets have spare slots, and the original has none: find_targets(spare=0)")
    slots = sum(target.slots for target in targets.values())
    if slots > jnp.iinfo(jnp.int32).max:
        raise SpielError(f"one budget of {slots} slots: expected less than 2^31, they are counted in int32")


@dataclass(frozen=True)
class _Evolution:
    """The two functions of ``spiel``; for the attributes see there."""

    inner: optax.GradientTransformationExtraArgs
    targets: Mapping[str, Target]
    growth: Criterion
    schedule: Reselection
    seed: int | jax.Array
    clip_norm: float | None
    clip_candidates: bool
    drop_by: DropBy

    @functools.cached_property
    def counts(self) -> np.ndarray:
        """[reselections, targets] int32: how many entries of a matrix (or block) are replaced.

        Of all together, [reselections, 1], where the budget is one.
        """
        targets = self.targets.values()
        if self.has_one_budget:
            return self.schedule.counts([sum(target.total for target in targets)])
        return self.schedule.counts([target.block_count for target in targets])

    @functools.cached_property
    def has_one_budget(self) -> bool:
        """Whether entries may go from one matrix to another."""
        return any(target.spare for target in self.targets.values())

    def init(self, values: optax.Params) -> SpielState:
        """See ``spiel``."""
        _refuse_multi_steps(self.growth)
        named = by_target(values, self.targets)
        for name, value in named.items():
            expected = (*self.targets[name].lead, self.targets[name].block_count)
            if value.shape != expected:
                raise ValueError(f"values of {name} are {value.shape}: expected {expected}")
        state = self.inner.init(values)
        if named:
            check_per_entry(self.inner, jax.eval_shape(self.inner.init, values), values)
        return SpielState(
            spiel_count=jnp.zeros((), jnp.int32),
            active=initial_positions(self.targets, self.seed),
            growth=self.growth.init(self.targets, named),
            inner=state,
            replaced=jnp.zeros((), jnp.float32),
        )

    def update(
        self,
        grads: optax.Updates,
        state: SpielState,
        params: optax.Params | None = None,
        *,
        candidates: Mapping[str, SparseDelta] | None = None,
        phase: Phase | None = None,
        reselect: Flag | None = None,
        weights: Any = None,
        watched: Mapping[str, jax.Array] | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, SpielState]:
        """See ``spiel``."""
        _refuse_multi_steps(self.growth)
        if params is None:
            raise ValueError("spiel needs the values: call update(grads, state, values)")
        values, step = params, state.spiel_count + 1
        grads, candidates = self._clipped(grads, candidates)
        with jax.named_scope("inner_optimizer"):
            updates, inner_state = self.inner.update(
                grads, state.inner, values, active=state.active, **extra_args
            )
            # where gradients are narrower than values, a drop of their dtype would leave a rest
            updates = jax.tree.map(
                lambda u, v: u.astype(jnp.promote_types(u.dtype, v.dtype)), updates, values
            )
        with jax.named_scope("observe"):
            seen = self._seen(grads, state, candidates, phase, inner_state)._replace(watched=watched)
            observed = self.growth.observe(state.growth, seen)
        state = state._replace(
            spiel_count=optax.safe_increment(state.spiel_count),
            growth=observed,
            inner=inner_state,
            replaced=jnp.zeros((), jnp.float32),
        )
        ends: Flag = self.schedule.reselects(step) if reselect is None else reselect
        if ends is False or not len(self.counts):
            return updates, state
        # rounded up: the count of a host that gives reselect= is ahead of this one where steps were skipped
        number = self.schedule.number(step + self.schedule.every - 1)
        number = jnp.clip(number, 0, len(self.counts) - 1)
        with jax.named_scope("reselection"):
            if ends is True:
                return self._reselect(updates, values, state, number, weights)
            return lax.cond(
                ends,
                lambda updates, state: self._reselect(updates, values, state, number, weights),
                lambda updates, state: (updates, state),
                updates,
                state,
            )

    def _clipped(
        self, grads: Any, candidates: Mapping[str, SparseDelta] | None
    ) -> tuple[Any, Mapping[str, SparseDelta] | None]:
        """Gradients, and alike those of candidates, within the global norm of the former."""
        if self.clip_norm is None:
            return grads, candidates
        norm = optax.tree.norm(jax.tree.map(lambda g: g.astype(state_dtype(g.dtype)), grads))
        factor = jnp.minimum(1.0, self.clip_norm / jnp.maximum(norm, jnp.finfo(norm.dtype).tiny))
        grads = jax.tree.map(lambda g: (g * factor).astype(g.dtype), grads)
        if self.clip_candidates and candidates is not None:
            candidates = {
                name: delta.with_values(delta.values * factor) for name, delta in candidates.items()
            }
        return grads, candidates

    def _seen(
        self,
        grads: Any,
        state: SpielState,
        candidates: Mapping[str, SparseDelta] | None,
        phase: Phase | None,
        inner_state: Any,
    ) -> Observation:
        """What the step shows to the criterion."""
        proposes: Flag = False
        estimates: Flag = False
        if not self.growth.uses_candidates:
            candidates = None
        elif phase is not None:
            proposes, estimates = phase is Phase.PROPOSE, phase is Phase.ESTIMATE
        else:
            step = state.spiel_count + 1
            proposes, estimates = self.schedule.proposes(step), self.schedule.estimates(step)
        named = by_target(grads, self.targets)
        return Observation(state.active, named, candidates, proposes, estimates, inner_state)

    def _reselect(
        self, updates: Any, values: Any, state: SpielState, number: jax.Array | int, weights: Any
    ) -> tuple[Any, SpielState]:
        """Drops and grows: updates and state after reselection ``number``, from 0."""
        stats = state.growth
        if weights is None and getattr(self.growth, "uses_weights", False):
            kind = type(self.growth).__name__
            raise ValueError(f"{kind} looks at the weights: give update(weights=) where it reselects")
        if weights is not None:
            stats = self.growth.survey(stats, weights, self.targets)
        targets = self.targets
        old_values, named_updates = by_target(values, targets), by_target(updates, targets)
        budgets = one_budget if self.has_one_budget else own_budgets
        found = budgets.reselect(
            state.active,
            old_values,
            named_updates,
            stats,
            self._drop_scales(state, weights),
            counts=jnp.asarray(self.counts)[number],
            targets=targets,
            growth=self.growth,
        )
        active = {name: target.delta(found[name][0]) for name, target in targets.items()}
        replaced = {name: mask for name, (_, mask, _) in found.items()}
        seeds = {name: seed for name, (_, _, seed) in found.items()}

        tree = partial(like_values, values, targets=targets)
        slots = tree({name: ReplacedSlots(replaced[name], seeds[name]) for name in targets})
        new_values = by_target(optax.apply_updates(values, updates), targets)
        kept = {name: jnp.where(replaced[name], 0, v) for name, v in new_values.items()}
        inner_state = reset(self.inner, state.inner, tree(kept), slots)
        updates = jax.tree.map(lambda u, v, s: jnp.where(s.replaced, -v, u), updates, values, slots)
        changed = sum(
            jnp.sum(mask & (active[name].indices < targets[name].block_size), dtype=jnp.float32)
            for name, mask in replaced.items()
        )
        total = sum(target.total for target in targets.values())
        return updates, state._replace(
            active=active,
            growth=self.growth.clear(state.growth, targets),
            inner=inner_state,
            replaced=jnp.asarray(changed / total, jnp.float32),
        )

    def _drop_scales(self, state: SpielState, weights: Any) -> dict[str, jax.Array]:
        """What the values are relative to where entries are dropped: target name to [..., k]; empty for 1."""
        if self.drop_by == "value":
            return {}
        if self.drop_by == "age":
            ages = optax.tree.get(state.inner, "age")
            if ages is None:
                raise ValueError('drop_by = "age": the inner optimizer keeps none; use aged_adamw')
            seeded = self.growth.first_age(self.schedule.accumulation)  # of gradients that trained nothing
            return {name: jnp.maximum(age - seeded, 1) for name, age in by_target(ages, self.targets).items()}
        if weights is None:
            raise ValueError('drop_by = "weight" looks at the weights: give update(weights=)')
        entries = base_entries(weights, state.active)
        return {name: jnp.maximum(jnp.abs(one.astype(jnp.float32)), _TINY) for name, one in entries.items()}
