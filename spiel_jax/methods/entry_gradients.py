"""Gradients of a few entries of each weight: forward and backward passes over the micro-batches of a step."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from spiel_jax.losses.next_token import Objective, Params, TokenBatch, supervised
from spiel_jax.methods.method import TrainState, scan_micro_batches
from spiel_jax.methods.unmerged import by_parameter, joined, unmerged
from spiel_jax.models.layers import AdaptedLinear
from spiel_jax.ops.selection import compact, largest
from spiel_jax.ops.tree import parameter_name
from spiel_jax.optim.criteria.criterion import Criterion
from spiel_jax.optim.inner_optimizers import state_dtype
from spiel_jax.optim.positions import deltas
from spiel_jax.optim.schedules import Phase
from spiel_jax.optim.zeros import off_zeros_by
from spiel_jax.sparse.delta import SparseDelta
from spiel_jax.sparse.linear import SparseLinear, candidates_from_proposal
from spiel_jax.sparse.targets import Target

Beside = Callable[[dict[str, SparseLinear], Any, TokenBatch], Mapping[str, AdaptedLinear]]
"""The adapters of the deltas, what else is trained, and a micro-batch, to what the model runs with."""


ProposeFrom = Literal["first", "mean"]
"""What proposes the candidates of a step: its first micro-batch, or all of them together."""

_KEPT = 2
"""Candidates that are kept from micro-batch to micro-batch, for each that is proposed in the end."""


class Seen(NamedTuple):
    """What a step saw for the growth criterion; see ``Observation``."""

    candidates: dict[str, SparseDelta] | None = None
    watched: Params | None = None


def alone(adapters: dict[str, SparseLinear], others: Any, micro: TokenBatch) -> dict[str, SparseLinear]:
    """Nothing beside the deltas."""
    del others, micro
    return adapters


class _Step(NamedTuple):
    """What all passes of a step have in common."""

    params: Params  # the tuned model's, some with their deltas beside them
    active: dict[str, SparseDelta]
    values: Any  # zeros in the place of the active values, whose gradients are wanted
    total: jax.Array  # supervised tokens
    others: Any
    beside: Beside


@dataclass(frozen=True)
class EntryGradients:
    """The passes of a step.

    Attributes:
        objective: The loss.
        targets: What is adapted.
        growth: Says which further entries are looked at, and what is watched.
        candidates: What proposes them.
    """

    objective: Objective
    targets: Mapping[str, Target]
    growth: Criterion
    candidates: ProposeFrom = "first"

    def of(
        self, state: TrainState, batch: TokenBatch, others: Any, beside: Beside, *, phase: Phase
    ) -> tuple[jax.Array, tuple[dict[str, jax.Array], Any], Seen]:
        """Mean loss, its gradient at the active entries and of the others, and what the criterion sees.

        On a proposing step micro-batch 0 proposes the candidates, the others observe them; or all propose,
        and all observe them in a second pass. Candidate gradients are those of the step's mean loss; for a
        criterion that wants them per micro-batch they have a leading axis [G].

        Args:
            state: The state.
            batch: Arrays [G, B, S]; further arrays [G, ...] are passed on to ``beside``.
            others: What else is differentiated.
            beside: What the model runs with.
            phase: Of the step.
        """
        held, layers = deltas(state.trainable, state.opt_state), self.objective.config.num_layers
        params = unmerged(state.params, {n: d for n, d in held.items() if n not in state.base}, layers)
        # the model runs with the deltas in or beside its weights: no values in the dtype of their gradients
        slots = jax.tree.map(lambda v: jnp.zeros(v.shape, state_dtype(v.dtype)), state.trainable)
        step = _Step(params, deltas(slots, state.opt_state), slots, supervised(batch), others, beside)
        if phase is not Phase.PLAIN and (self.growth.measures or self.growth.watch is not None):
            return self._watched(step, batch)
        if phase is Phase.PLAIN or not self.growth.uses_candidates:
            loss, grads, _ = self._observed(step, batch, None)
            return loss, grads, Seen()
        if phase is Phase.ESTIMATE:
            candidates = {}
            for name, stats in optax.tree.get(state.opt_state, "growth").items():
                candidates[name] = self._zeros_at(step, name, self.growth.known(stats))
            loss, grads, seen = self._observed(step, batch, candidates)
            return loss, grads, Seen({n: d.with_values(seen[n]) for n, d in candidates.items()})
        if self.candidates == "mean" and batch["tokens"].shape[0] > 1:
            candidates = self._proposed_by_all(step, batch)
            loss, grads, seen = self._observed(step, batch, candidates)
            found = {name: delta.with_values(seen[name]) for name, delta in candidates.items()}
            return loss, grads, Seen({n: _fewer(d, self._count(n)) for n, d in found.items()})

        stacked = self.growth.per_micro_batch
        loss, grads, candidates = self._proposed(step, jax.tree.map(lambda x: x[0], batch))
        seen = {name: delta.values for name, delta in candidates.items()}
        if stacked:
            seen = jax.tree.map(lambda x: x[None], seen)
        if batch["tokens"].shape[0] > 1:
            more = self._observed(step, jax.tree.map(lambda x: x[1:], batch), candidates)
            join = (lambda a, b: jnp.concatenate([a, b])) if stacked else jnp.add
            loss, grads = jax.tree.map(jnp.add, (loss, grads), more[:2])
            seen = jax.tree.map(join, seen, more[2])
        return loss, grads, Seen({n: d.with_values(seen[n]) for n, d in candidates.items()})

    def _pass(
        self,
        step: _Step,
        micro: TokenBatch,
        slots: Any,
        adapters: Callable[[dict[str, SparseDelta], Any], dict[str, SparseLinear]],
    ) -> tuple[jax.Array, tuple[Params, Any], Any]:
        """Loss of a micro-batch, gradients of what is trained, and what the slots of the adapters collect."""

        def loss(trained: tuple[Params, Any], slots: Any) -> jax.Array:
            values, more = trained
            positions = {name: delta.with_values(values[name]) for name, delta in step.active.items()}
            both = step.beside(adapters(positions, slots), more, micro)
            return self.objective(step.params, micro, both, frozen=True) / step.total

        value, (grads, collected) = jax.value_and_grad(loss, (0, 1))((step.values, step.others), slots)
        return value, grads, collected

    def _observed(
        self, step: _Step, batch: TokenBatch, candidates: dict[str, SparseDelta] | None
    ) -> tuple[Any, ...]:
        """Loss, gradients, and those at the candidates, which are summed or one for each micro-batch."""
        stacked = self.growth.per_micro_batch

        def adapters(active: dict[str, SparseDelta], slots: Params | None) -> dict[str, SparseLinear]:
            probes = None
            if candidates is not None and slots is not None:
                probes = {name: delta.with_values(slots[name]) for name, delta in candidates.items()}
            return self.adapters(active, candidates=probes)

        def function(micro: TokenBatch) -> tuple[Any, Any]:
            slots = candidates and {n: jnp.zeros_like(d.values) for n, d in candidates.items()}
            value, grads, seen = self._pass(step, micro, slots, adapters)
            return ((value, grads), seen) if stacked else ((value, grads, seen), None)

        total, each = scan_micro_batches(function, batch)
        return (*total, each) if stacked else total

    def _watched(self, step: _Step, batch: TokenBatch) -> tuple[jax.Array, tuple[Params, Any], Seen]:
        """Loss and gradients, and what the criterion watches of the layers, or measures of gradients."""
        layers, empty = self.objective.config.num_layers, {}
        watch, measure = self.growth.watch, self.growth.measure if self.growth.measures else None
        for name, group in by_parameter(step.active).items():
            delta = step.active[group[0]]
            abstract = partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
            if measure is not None:
                part = jax.eval_shape(partial(measure, block=delta.block), abstract(delta.shape))
                shape = (layers, *(delta.grid if delta.block_axes == 3 else ()), part.shape[-1])
            else:
                assert watch is not None
                part = jax.eval_shape(watch, abstract((1, delta.shape[1])), abstract(delta.shape))
                shape = (layers, *part.shape)
            empty[name] = jnp.zeros(shape, part.dtype)

        def adapters(active: dict[str, SparseDelta], slots: Params) -> dict[str, SparseLinear]:
            plain = self.adapters(active)
            if measure is not None:
                return {n: replace(one, measured=slots[n], measure=measure) for n, one in plain.items()}
            return {n: replace(one, watched=slots[n], watch=watch) for n, one in plain.items()}

        (loss, grads, watched), _ = scan_micro_batches(
            lambda micro: (self._pass(step, micro, empty, adapters), None), batch
        )
        found = {}
        for name, delta in step.active.items():
            seen = watched[parameter_name(name)]
            found[name] = seen if delta.layers is None else seen[jnp.array(delta.layers)]
        return loss, grads, Seen(watched=found)

    def _count(self, name: str) -> int:
        """Candidates of one matrix (or block) of a target."""
        return self.growth.count(self.targets[name])

    def _zeros_at(self, step: _Step, name: str, positions: jax.Array) -> SparseDelta:
        """Candidates of a target at these positions, with zeros."""
        dtype = step.active[name].values.dtype
        return self.targets[name].delta(positions, jnp.zeros(positions.shape, dtype))

    def _proposal_slots(self, step: _Step) -> Params:
        """Parameter name to what its layers' proposals come out of."""
        active, params, slots = step.active, step.params, {}
        for name, group in by_parameter(active).items():
            lead = active[group[0]].indices.shape[:-1]
            if active[group[0]].layers is not None:
                lead = (self.objective.config.num_layers, *lead[1:])
            dtype = jnp.promote_types(params[name].dtype, jnp.float32)
            slots[name] = jnp.zeros((*lead, 3, max(map(self._count, group))), dtype)
        return slots

    def _found(self, step: _Step, proposals: Params) -> dict[str, SparseDelta]:
        """The candidates that came out of the slots."""
        candidates = {}
        for name, delta in step.active.items():
            proposal = proposals[parameter_name(name)]
            if delta.layers is not None:
                proposal = proposal[jnp.array(delta.layers)]
            candidates[name] = _fewer(candidates_from_proposal(proposal, delta), self._count(name))
        return candidates

    def _proposed(
        self, step: _Step, micro: TokenBatch
    ) -> tuple[jax.Array, tuple[Params, Any], dict[str, SparseDelta]]:
        """Loss and gradients of a micro-batch, and the candidates it proposes."""

        def adapters(active: dict[str, SparseDelta], slots: Params) -> dict[str, SparseLinear]:
            return self.adapters(active, proposals=slots)

        value, grads, proposals = self._pass(step, micro, self._proposal_slots(step), adapters)
        return value, grads, self._found(step, proposals)

    def _proposed_by_all(self, step: _Step, batch: TokenBatch) -> dict[str, SparseDelta]:
        """Twice as many candidates as wanted, about those of largest gradient of all micro-batches together.

        No sum of dense gradients is held, so they are found as a stream: each micro-batch adds its gradients
        to those of the entries that are kept so far, and proposes others; those of largest sum are kept. What
        enters late has a sum of fewer, and may be missed: that is what makes it approximate.
        """

        def visit(kept: dict[str, SparseDelta], micro: TokenBatch) -> tuple[dict[str, SparseDelta], None]:
            def adapters(active: dict[str, SparseDelta], slots: Any) -> dict[str, SparseLinear]:
                probes = {name: delta.with_values(slots[0][name]) for name, delta in kept.items()}
                return self.adapters(active, candidates=probes, proposals=slots[1])

            zeros = {name: jnp.zeros_like(delta.values) for name, delta in kept.items()}
            slots = zeros, self._proposal_slots(step)
            _, _, (seen, proposals) = self._pass(step, micro, slots, adapters)
            new = self._found(step, proposals)
            return {name: _kept(delta, seen[name], new[name]) for name, delta in kept.items()}, None

        none = {}
        for name, target in self.targets.items():
            room = min(_KEPT * self._count(name), target.block_size)
            positions = jnp.full((*target.lead, room), target.block_size, jnp.int32)
            none[name] = self._zeros_at(step, name, positions)
        kept, _ = lax.scan(visit, none, batch)
        return {name: delta.with_values(jnp.zeros_like(delta.values)) for name, delta in kept.items()}

    def adapters(
        self,
        active: dict[str, SparseDelta],
        *,
        candidates: dict[str, SparseDelta] | None = None,
        proposals: Params | None = None,
    ) -> dict[str, SparseLinear]:
        """One adapter per weight; where only some layers are adapted, the others are switched off.

        Args:
            active: Deltas by target name.
            candidates: As ``active``, or None.
            proposals: Slots by parameter name, or None.
        """
        layers, salience = self.objective.config.num_layers, self.growth.salience
        if self.growth.keep_zeros:
            salience = off_zeros_by(salience)

        def enabled(group: list[str]) -> jax.Array | None:
            if active[group[0]].layers is None:
                return None
            adapted = [layer for name in group for layer in active[name].layers or ()]
            return jnp.zeros((layers,), bool).at[jnp.array(adapted)].set(True)

        return {
            name: SparseLinear(
                active=joined(active, group, layers),
                candidates=None if candidates is None else joined(candidates, group, layers),
                proposal=None if proposals is None else proposals[name],
                enabled=enabled(group),
                propose_active=self.growth.propose_active,
                propose_candidates=False,
                salience=salience,
            )
            for name, group in by_parameter(active).items()
        }


def _kept(kept: SparseDelta, seen: jax.Array, new: SparseDelta) -> SparseDelta:
    """As many as are kept: those with what was seen of them, and new ones, of largest sum."""
    sums = jnp.concatenate([kept.values + seen, new.values.astype(seen.dtype)], -1)
    both = replace(kept, indices=jnp.concatenate([kept.indices, new.indices], -1), values=sums)
    return _fewer(both, kept.values.shape[-1])


def _fewer(candidates: SparseDelta, count: int) -> SparseDelta:
    """The ``count`` largest of each matrix's candidates."""
    if candidates.values.shape[-1] == count:
        return candidates
    size = candidates.block[0] * candidates.block[1]

    def one(indices: jax.Array, gradients: jax.Array) -> tuple[jax.Array, jax.Array]:
        chosen = largest(jnp.where(indices < size, jnp.abs(gradients), jnp.nan), indices, count)
        return compact(chosen, indices, count, size), compact(chosen, gradients, count, 0)

    for _ in candidates.indices.shape[:-1]:
        one = jax.vmap(one)
    indices, gradients = one(candidates.indices, candidates.values)
    return replace(candidates, indices=indices, values=gradients)
