"""Training of sparse deltas: a step of them, and the in-place merge."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

from spiel_jax.losses.next_token import Objective, Params, TokenBatch
from spiel_jax.methods.configured import configured_targets, learning_rate, with_axes
from spiel_jax.methods.entry_gradients import EntryGradients, ProposeFrom, Seen, alone
from spiel_jax.methods.method import Method, Metrics, TrainState, guarded
from spiel_jax.methods.unmerged import unmerged
from spiel_jax.models.config import ModelConfig
from spiel_jax.ops.stored import is_writable
from spiel_jax.ops.tree import all_finite, parameter_name
from spiel_jax.optim.block_grid import Regridded, convert
from spiel_jax.optim.cohorts import cohorts
from spiel_jax.optim.criteria.criterion import CRITERIA, Complaint, Criterion, unused_keys
from spiel_jax.optim.parity import is_reference
from spiel_jax.optim.positions import active_positions, deltas, place
from spiel_jax.optim.schedules import Phase, Reselection
from spiel_jax.optim.spiel import spiel
from spiel_jax.optim.zeros import random_off_zeros
from spiel_jax.sparse.delta import (
    SparseDelta,
    gather,
    merge,
    merged_entries,
    set_entries,
    unmerge,
)
from spiel_jax.sparse.targets import Target, zeros


@dataclass(frozen=True)
class SparseMethod(Method):
    """Trains sparse deltas: SpIEL and static masks.

    Attributes:
        objective: The loss.
        tx: ``spiel`` or a chain that ends with it.
        targets: What is adapted.
        growth: The growth criterion inside ``tx``.
        in_place: Hold the weights merged, those that can be written, and set the active entries once per
            step. Otherwise the deltas are scattered into each weight on each use, and the parameters stay
            the pretrained ones.
        start: Pretrained parameters and targets to the positions to start from; None for random ones.
        delta_dtype: Of the values. Their gradients, sums and statistics are float32 or better.
        looks: Whether ``tx`` looks at the weights where it reselects; None: as the criterion says.
        candidates: What proposes them; see ``EntryGradients``.
        schedule: That of ``tx``; None where the steps' kinds are not asked of the method.
    """

    has_deltas: ClassVar[bool] = True

    objective: Objective
    tx: optax.GradientTransformationExtraArgs
    targets: Mapping[str, Target] = field()
    growth: Criterion
    in_place: bool = True
    start: Callable[..., Mapping[str, SparseDelta]] | None = None
    schedule: Reselection | None = None
    delta_dtype: Any = jnp.float32
    looks: bool | None = None
    candidates: ProposeFrom = "first"

    @classmethod
    def complaints(cls, config: Any) -> Iterator[Complaint]:
        """See ``Method``: those of the criterion, and of the budget."""
        density, number = config.targets.density, config.targets.num_tunable
        if density is None and number is None and config.init_from.adapter is None:
            yield "targets.density", density, "density or num_tunable, one of them, and both are None"
        if density is not None and number is not None:
            expected = f"None where num_tunable = {number}: density or num_tunable, one of them"
            yield "targets.density", density, f"{expected} (--config.targets.num_tunable=None unsets that)"
        balance = config.targets.balance
        if config.init_from.adapter is not None and (balance.rows or balance.columns):
            expected = "unset: the entries of an adapter are where they are (targets.balance)"
            yield "init_from.adapter", config.init_from.adapter, expected
        yield from CRITERIA[config.method].complaints(config)

    @classmethod
    def unused(cls, config: Any) -> Iterable[str]:
        """See ``Method``: what is of other methods, and of other criteria."""
        return ("lora.*", "rosa.*", *unused_keys(CRITERIA[config.method]))

    @classmethod
    def from_config(
        cls, config: Any, model: ModelConfig, steps: int, targets: Mapping[str, Target] | None = None
    ) -> "SparseMethod":
        """See ``Method``; ``config.method`` is the name of a criterion."""
        criterion = CRITERIA[config.method]
        targets = with_axes(configured_targets(config, model) if targets is None else targets)
        growth, schedule = criterion.from_config(config), criterion.schedule(config, steps)
        start = criterion.start(config)
        if config.spiel.keep_zeros:
            growth = replace(growth, keep_zeros=True)  # pyright: ignore[reportArgumentType]
            start = start or partial(random_off_zeros, seed=config.seed)
        tx = spiel(
            criterion.optimizer(config, learning_rate(config, steps), targets),
            targets,
            growth=growth,
            schedule=schedule,
            seed=config.seed,
            clip_norm=config.optimizer.clip_norm,
            clip_candidates=not is_reference(config.spiel.parity),
            drop_by=config.spiel.drop_by,
        )
        in_place = config.spiel.merge == "resident"
        objective = Objective.from_config(config, model)
        dtype = jnp.dtype(config.spiel.delta_dtype)
        looks = growth.uses_weights or config.spiel.drop_by == "weight"
        proposers = config.spiel.candidates
        return cls(objective, tx, targets, growth, in_place, start, schedule, dtype, looks, proposers)

    @property
    def passes(self) -> EntryGradients:
        """The forward and backward passes of its steps."""
        return EntryGradients(self.objective, self.targets, self.growth, self.candidates)

    def step_kind(self, step: int) -> tuple[Phase, bool]:
        """See ``Method``: as the schedule says."""
        if self.schedule is None:
            raise ValueError("a method without a schedule does not know the kinds of its steps")
        growth = self.growth
        has_phases = growth.uses_candidates or growth.measures or growth.watch is not None
        phase = self.schedule.phase(step) if has_phases else Phase.PLAIN
        return phase, bool(self.schedule.reselects(step))

    def init(self, params: Params) -> TrainState:
        """Zero deltas at their first positions."""
        values = zeros(self.targets, self.delta_dtype)
        opt_state = self.tx.init(values)
        if self.start is not None:
            opt_state = place(opt_state, self.start(params, self.targets))
        return self.attach(params, values, opt_state)

    def tunable(self, state: TrainState) -> int:
        """See ``Method``: without spare slots."""
        del state
        return sum(target.total for target in self.targets.values())

    def attach(self, params: Params, trainable: Any, opt_state: Any) -> TrainState:
        """See ``Method``: remembers the pretrained entries and merges, where merges are in place."""
        zipped, params, base = deltas(trainable, opt_state), dict(params), {}
        for name, delta in zipped.items():
            weight = params[parameter_name(name)]
            if self.in_place and is_writable(weight):
                base[name] = gather(weight, delta)
                entries = merged_entries(base[name], delta.values, weight.dtype)
                params[parameter_name(name)] = set_entries(weight, delta, entries)
        return TrainState(params, base, trainable, opt_state)

    def tuned(self, state: TrainState) -> Params:
        """See ``Method``."""
        return self.beside(state.params, self.unmerged(state))

    def pretrained(self, state: TrainState) -> Params:
        """See ``Method``."""
        zipped = deltas(state.trainable, state.opt_state)
        return unmerge(state.params, {name: zipped[name] for name in state.base}, state.base)

    def merged(self, state: TrainState) -> Params:
        """The tuned weights, each matrix merged when it is used."""
        return unmerged(state.params, self.unmerged(state), self.objective.config.num_layers)

    def unmerged(self, state: TrainState) -> dict[str, SparseDelta]:
        """The deltas that the parameters do not hold."""
        zipped = deltas(state.trainable, state.opt_state)
        return {name: delta for name, delta in zipped.items() if name not in state.base}

    def step(
        self, state: TrainState, batch: TokenBatch, *, phase: Phase, reselect: bool
    ) -> tuple[TrainState, Metrics]:
        """See ``Method``."""
        loss, (grads, _), seen = self.passes.of(state, batch, {}, alone, phase=phase)
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        values, opt_state = self.changed_by(state, grads, seen, finite=finite, phase=phase, reselect=reselect)
        new = self.merged_again(state, replace(state, trainable=values, opt_state=opt_state), reselect)
        metrics: Metrics = {
            "loss": loss,
            "grad_norm": norm,
            # a skipped step leaves the share of the step before it in the state
            "replaced": jnp.where(finite, optax.tree.get(new.opt_state, "replaced"), 0.0),
            "finite": finite,
            "values_finite": all_finite(new.trainable),
            "supervised_tokens": jnp.sum(batch["weights"]),
        }
        if reselect and self.schedule is not None:
            first_age = self.growth.first_age(self.schedule.accumulation)
            with jax.named_scope("cohorts"):
                metrics["since"] = cohorts(new.opt_state, self.targets, self.schedule, first_age)
        return new, metrics

    def changed_by(
        self,
        state: TrainState,
        grads: Any,
        seen: Seen,
        *,
        finite: jax.Array,
        phase: Phase,
        reselect: bool,
    ) -> tuple[Params, Any]:
        """Values and optimizer state after a step of these gradients; as they are if it is not finite."""
        looks = self.growth.uses_weights if self.looks is None else self.looks
        weights = self.merged(state) if reselect and looks else None

        def change(values: Params, opt_state: Any) -> tuple[Any, Any]:
            updates, opt_state = self.tx.update(
                grads,
                opt_state,
                values,
                candidates=seen.candidates,
                watched=seen.watched,
                phase=phase,
                reselect=reselect,
                weights=weights,
            )
            return optax.apply_updates(values, updates), opt_state

        shapes = {values.shape for values in jax.tree.leaves(state.trainable)}
        statistics = jax.tree.leaves(optax.tree.set(state.opt_state, active={}))
        of_entries = any(leaf.shape in shapes for leaf in statistics)  # as Adam's, not as SM3's
        with jax.named_scope("optimizer"):
            return guarded(finite, change, state.trainable, state.opt_state, branch=of_entries)

    def evaluate(self, state: TrainState, batch: TokenBatch) -> tuple[jax.Array, jax.Array]:
        """See ``Method``."""
        return self.objective(self.merged(state), batch, frozen=True), jnp.sum(batch["weights"])

    def changed(self, trained: Mapping[str, SparseDelta]) -> Set[str]:
        """See ``Method``."""
        return set(map(parameter_name, trained))

    def merge(self, params: Params, trained: Mapping[str, SparseDelta]) -> Params:
        """See ``Method``."""
        return merge(params, trained)

    def beside(self, params: Params, trained: Mapping[str, SparseDelta]) -> Params:
        """See ``Method``."""
        written = {
            name: delta for name, delta in trained.items() if is_writable(params[parameter_name(name)])
        }
        beside = {name: delta for name, delta in trained.items() if name not in written}
        return unmerged(merge(params, written), beside, self.objective.config.num_layers)

    def items(self, state: TrainState) -> dict[str, Any]:
        """See ``Method``: the positions are in "deltas" and nowhere else."""
        zipped = {
            name: {"indices": delta.indices, "values": delta.values}
            for name, delta in deltas(state.trainable, state.opt_state).items()
        }
        return {"deltas": zipped, "optimizer": optax.tree.set(state.opt_state, active={})}

    def begun(self, like: TrainState, trained: Mapping[str, SparseDelta]) -> TrainState:
        """See ``Method``: target name to delta, in the blocks of the targets."""
        active = active_positions(like.opt_state)
        positions = {name: replace(delta, indices=trained[name].indices) for name, delta in active.items()}
        values = {name: trained[name].values for name in like.trainable}
        return replace(like, trainable=values, opt_state=place(like.opt_state, positions))

    def restored(self, items: Mapping[str, Any], like: TrainState) -> TrainState:
        """See ``Method``."""
        stored = items["deltas"]
        positions = {
            name: replace(delta, indices=stored[name]["indices"])
            for name, delta in active_positions(like.opt_state).items()
        }
        return replace(
            like,
            trainable={name: stored[name]["values"] for name in positions},
            opt_state=optax.tree.set(items["optimizer"], active=positions),
        )

    def memory(self, state: TrainState) -> dict[str, Any]:
        """See ``Method``: the positions count among the deltas."""
        parts, active = super().memory(state), active_positions(state.opt_state)
        optimizer = optax.tree.set(state.opt_state, active={})
        return parts | {"deltas": [*parts["deltas"], active], "optimizer": optimizer}

    def spec(self, names: Sequence[str], shape: tuple[int, ...]) -> PartitionSpec | None:
        """See ``Method``: what belongs to a target lies where its weight's blocks do."""
        name = next((name for name in names if name in self.targets), None)
        if name is None:
            return None
        target = self.targets[name]
        if target.axes is None or len(shape) < len(target.lead):
            return PartitionSpec()
        return PartitionSpec(*[None] * len(target.stack), *target.axes)

    def regridded(
        self, state: TrainState, grids: Mapping[str, tuple[int, int]]
    ) -> tuple["SparseMethod", TrainState, dict[str, Regridded]]:
        """The method and a state of it for other block grids; see ``convert``. Weights are not read."""
        values, opt_state, changed = convert(
            state.trainable, state.opt_state, self.targets, grids, self.growth
        )
        targets = {name: change.new for name, change in changed.items()}
        return replace(self, targets=targets), TrainState({}, {}, values, opt_state), changed

    def gradients(
        self, state: TrainState, batch: TokenBatch, *, phase: Phase
    ) -> tuple[jax.Array, dict[str, jax.Array], dict[str, SparseDelta] | None]:
        """Mean loss, its gradient at the active entries, and the candidates with theirs; see ``passes``."""
        loss, (grads, _), seen = self.passes.of(state, batch, {}, alone, phase=phase)
        return loss, grads, seen.candidates

    @jax.named_scope("merge")
    def merged_again(self, old: TrainState, new: TrainState, reselect: bool) -> TrainState:
        """Sets the active entries of weights that hold the deltas; dropped ones become pretrained again."""
        params, base = dict(new.params), dict(new.base)
        before = deltas(old.trainable, old.opt_state)
        after = deltas(new.trainable, new.opt_state)
        for name in old.base:
            delta, weight = after[name], params[parameter_name(name)]
            entries = merged_entries(base[name], delta.values, weight.dtype)
            if not reselect:
                weight = set_entries(weight, delta, entries)
            else:
                replaced = before[name].indices != delta.indices
                weight = set_entries(weight, before[name], jnp.where(replaced, base[name], entries))
                base[name] = jnp.where(replaced, gather(weight, delta), base[name])
            params[parameter_name(name)] = weight
        return replace(new, params=params, base=base)
