"""Problems on which the library and the oracle go step by step, and the comparison itself."""

from dataclasses import dataclass, replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from hypothesis import given, settings
from hypothesis import strategies as st

import spiel_jax as sj
from spiel_jax.ops.tree import parameter_name
from spiel_jax.optim import schedules
from spiel_jax.optim.inner_optimizers import descend
from support.oracle import Matrix, Oracle, Rules

RATES = {"linear": schedules.linear, "cosine": schedules.cosine, "constant": schedules.constant}
REFERENCE = {
    "per_micro_batch": True,
    "late_age": True,
    "propose_active": True,
    "long_phases": True,
    "idle_phases": True,
    "clip_candidates": False,
}

MIXED = {
    "stack": sj.Target((4, 6), 9, stack=(2,)),
    "grid": sj.Target((4, 6), 8, grid=(2, 2)),
}
CUT = {
    "both": sj.Target((4, 6), 6, stack=(2,), grid=(1, 2)),
    "some@0,2": sj.Target((5, 3), 4, stack=(2,), layers=(0, 2)),  # of a stack of three
}
TINY = {"one": sj.Target((1, 1), 1), "row": sj.Target((1, 9), 4), "single": sj.Target((9, 1), 1)}
CROWDED = {
    "all": sj.Target((3, 4), 12),
    "most": sj.Target((4, 3), 10),  # fewer inactive entries than are to be replaced
}
LARGE = {"w": sj.Target((48, 64), 25)}  # large enough for the sampled bound of the selection
PLAIN = {"w": sj.Target((6, 8), 12)}


@dataclass(frozen=True, eq=False)
class Case:
    """One compiled program: targets and rules; problems are its random data.

    Attributes:
        name: For test ids.
        targets: What is adapted.
        rules: What the oracle is to do. The library's options are derived from them.
        alias: "corrected" or "reference" where the transformation is built by ``spiel_ag`` or ``spiel_ma``;
            None for ``spiel`` with every option given.
        micro_batches: G.
        dtype: Of the values.
        static: Whether the host tells ``update`` the phase.
        narrow: Whether active gradients have the dtype of the values, as autodiff gives them, or that of the
            dense ones.
    """

    name: str
    targets: dict
    rules: Rules
    alias: str | None = None
    micro_batches: int = 1
    dtype: str = "float32"
    static: bool = False
    narrow: bool = False

    def schedule(self):
        rules = self.rules
        quirks = {} if self.alias else {"long_phases": rules.long_phases, "idle_phases": rules.idle_phases}
        return sj.Reselection(
            total_steps=rules.total_steps,
            every=rules.every,
            accumulation=rules.accumulation,
            rate=RATES[rules.policy](rules.initial),
            first=rules.first,
            **quirks,
        )

    def transformation(self):
        rules = self.rules
        if self.alias:
            options = {"eps": rules.eps, "weight_decay": rules.weight_decay, "clip_norm": rules.clip_norm}
            method = sj.spiel_ma
            if rules.growth == "ag":
                adam = {"b1": rules.b1, "b2": rules.b2}
                method = partial(sj.spiel_ag, **adam, candidate_ratio=rules.ratio, seeds=rules.seeds)
            return method(
                rules.learning_rate, self.targets, schedule=self.schedule(), parity=self.alias, **options
            )
        step = descend(rules.learning_rate, rules.weight_decay)
        inner = {
            "adam": lambda: optax.chain(sj.scale_by_aged_adam(rules.b1, rules.b2, rules.eps), step),
            "sm3": lambda: optax.chain(sj.scale_by_sparse_sm3(self.targets, rules.eps), step),
            "sgd": lambda: optax.sgd(rules.learning_rate),
        }[rules.inner]()
        growth = sj.MomentApproximation(score=rules.score)
        if rules.growth == "ag":
            growth = sj.AccumulatedGradients(
                b1=rules.b1,
                b2=rules.b2,
                ratio=rules.ratio,
                seeds=rules.seeds,
                per_micro_batch=rules.per_micro_batch,
                late_age=rules.late_age,
                propose_active=rules.propose_active,
            )
        return sj.spiel(
            inner,
            self.targets,
            growth=growth,
            schedule=self.schedule(),
            clip_norm=rules.clip_norm,
            clip_candidates=rules.clip_candidates,
        )

    def stack(self, name):
        """Leading axes of the weight, of which a target may adapt some layers only."""
        target = self.targets[name]
        return target.stack if target.layers is None else (3,)


@partial(jax.jit, static_argnames="counts")
def _propose(dense, active, counts):
    return sj.propose(dense, active, dict(counts))  # compiled once for all cases of the same targets


@cache
def compiled(case):
    """The initial state of a case, and its step: a user's code around the transformation."""
    tx, schedule, rules = case.transformation(), case.schedule(), case.rules
    if case.alias == "reference":  # as the alias does
        schedule = schedule.original()
    criterion = sj.AccumulatedGradients(ratio=rules.ratio)
    counts = tuple((name, criterion.count(target)) for name, target in case.targets.items())

    def candidates(state, proposed, dense, mean, phase):
        known = {n: t.delta(optax.tree.get(state, "growth")[n].indices) for n, t in case.targets.items()}
        step = optax.tree.get(state, "spiel_count") + 1
        proposes = schedule.proposes(step) if phase is None else phase is sj.Phase.PROPOSE
        seen = {}
        for name in case.targets:
            indices = jnp.where(proposes, proposed[name].indices, known[name].indices)
            at = case.targets[name].delta(indices)
            if rules.per_micro_batch:
                micro = dense[parameter_name(name)] / case.micro_batches
                values = jnp.stack([sj.gather(micro[j], at) for j in range(case.micro_batches)])
            else:
                values = sj.gather(mean[parameter_name(name)], at)
                if case.micro_batches == 1:  # what was proposed has the gradient with it
                    values = jnp.where(proposes, proposed[name].values, values)
            seen[name] = at.with_values(values)
        return seen

    @partial(jax.jit, static_argnames=("phase", "reselect"))
    def advance(values, state, dense, proposed, *, phase=None, reselect=None):
        active = sj.deltas(values, state)
        mean = {name: gradient.mean(0) for name, gradient in dense.items()}
        grads = {name: sj.gather(mean[parameter_name(name)], delta) for name, delta in active.items()}
        if case.narrow:
            grads = {name: gradient.astype(case.dtype) for name, gradient in grads.items()}
        seen = candidates(state, proposed, dense, mean, phase) if rules.growth == "ag" else None
        updates, state = tx.update(grads, state, values, candidates=seen, phase=phase, reselect=reselect)
        return optax.apply_updates(values, updates), state

    def step(values, state, dense, **told):
        proposed = None
        if rules.growth == "ag":
            active = optax.tree.get(state, "active")
            if rules.propose_active:  # unused slots exclude nothing
                active = {n: replace(d, indices=jnp.full_like(d.indices, 10**6)) for n, d in active.items()}
            proposed = _propose({name: gradient[0] for name, gradient in dense.items()}, active, counts)
        return advance(values, state, dense, proposed, **told)

    values = sj.zeros(case.targets, case.dtype)
    return values, jax.jit(tx.init)(values), step, schedule


KINDS = ("normal", "integers", "few", "zeros")


def draw(rng, kind, shape, dtype):
    """Gradients: general ones, ones full of ties, ones mostly zero, and none."""
    if kind == "normal":
        return rng.standard_normal(shape, dtype)
    integers = rng.integers(-2, 3, shape).astype(dtype)
    return integers * {"integers": 1, "few": rng.random(shape) < 0.2, "zeros": 0}[kind]


def blocks(dense, target):
    """Dense [G, *stack, rows, columns] to the [G, rows, columns] of every matrix (or block)."""
    if target.layers is not None:
        dense = dense[:, list(target.layers)]
    rows, columns = target.block
    cut = dense.reshape(len(dense), -1, target.grid[0], rows, target.grid[1], columns)
    return list(np.moveaxis(cut, (1, 2, 4), (0, 1, 2)).reshape(-1, len(dense), rows, columns))


class Comparison:
    """Compares two states; errors are relative to the largest entry so far."""

    def __init__(self, case, tolerance):
        self.case, self.tolerance, self.peaks = case, tolerance, {}

    def close(self, name, ours, oracle):
        oracle = np.asarray(oracle)
        self.peaks[name] = peak = max(self.peaks.get(name, 0.0), np.abs(oracle).max(initial=0))
        error = np.abs(np.asarray(ours, np.float64) - oracle).max(initial=0)
        assert error <= self.tolerance * peak, f"{self.case.name}: {name} is off by {error} of {peak}"

    def check(self, oracle, values, state):
        get = partial(optax.tree.get, state)
        wide = jnp.promote_types(self.case.dtype, jnp.float32)
        assert int(get("spiel_count")) == oracle.step_number
        np.testing.assert_allclose(get("replaced"), oracle.replaced, rtol=1e-6)
        entries = {name: get(name) for name in ("mu", "nu", "age")}
        entries = {name: leaf for name, leaf in entries.items() if leaf is not None}
        active, growth, rows = get("active"), get("growth"), get("row_moments")  # each walks the whole state
        accumulators = [growth] if self.case.rules.growth == "ma" else []
        if rows is not None:
            pairs = zip(rows.values(), get("column_moments").values(), strict=True)
            accumulators.append(dict(zip(rows, pairs, strict=True)))
        start = 0
        for name, target in self.case.targets.items():
            assert values[name].dtype == self.case.dtype
            count = int(np.prod(target.lead))
            matrices = oracle.matrices[start : start + count]
            start += count
            flat = lambda array, n=count: np.asarray(array).reshape(n, -1)  # noqa: E731
            for number, matrix in enumerate(matrices):
                indices = flat(active[name].indices)[number]
                where = f"{name}, matrix {number}, step {oracle.step_number}"
                expected = np.flatnonzero(matrix.active)
                np.testing.assert_array_equal(np.sort(indices), expected, err_msg=where)
                self.close("value", flat(values[name])[number], matrix.value.flat[indices])
                for field, leaf in entries.items():
                    ours = flat(leaf[name])[number]
                    if field == "age":  # the library counts what the moments have absorbed
                        np.testing.assert_array_equal(ours + 1, matrix.age.flat[indices], err_msg=where)
                        continue
                    assert ours.dtype == wide
                    self.close(field, ours, getattr(matrix, field).flat[indices])
                for leaf in accumulators:
                    row, column = (flat(part)[number] for part in leaf[name])
                    assert row.dtype == column.dtype == wide
                    self.close("row", row, matrix.row)
                    self.close("column", column, matrix.column)
                if self.case.rules.growth == "ag":
                    stats = jax.tree.map(lambda leaf, i=number, f=flat: f(leaf)[i], growth[name])
                    self.candidates(stats, matrix, where)
                    assert stats.grad_sum.dtype == stats.grad_sq_sum.dtype == wide

    def candidates(self, stats, matrix, where):
        used = stats.indices < matrix.active.size
        indices = stats.indices[used]
        np.testing.assert_array_equal(np.sort(indices), np.flatnonzero(matrix.candidates), err_msg=where)
        self.close("sum", stats.grad_sum[used], matrix.sum.flat[indices])
        self.close("square", stats.grad_sq_sum[used], matrix.square.flat[indices])
        assert (stats.samples.item(), stats.steps.item()) == (matrix.samples, matrix.steps), where


def run(case, seed, kind, *, tolerance, rules=None, start=None):
    """Follows one random problem; true if to its end, false if a cut was too narrow to be compared.

    Args:
        case: The program.
        seed: Of positions and gradients.
        kind: One of ``KINDS``.
        tolerance: Relative to the largest entry so far; cuts narrower than it are not compared.
        rules: Rules for the oracle, where they are not the case's.
        start: Function of (rng, shape) to initial values, which otherwise are zero.
    """
    rng = np.random.default_rng(seed)
    values, state, step, schedule = compiled(case)
    oracle = Oracle(rules or case.rules, [])
    active = {}
    for name, target in case.targets.items():
        count = int(np.prod(target.lead))
        indices = np.stack([rng.permutation(target.block_size)[: target.block_count] for _ in range(count)])
        shape = (*target.lead, target.block_count)
        active[name] = target.delta(jnp.asarray(indices.reshape(shape), jnp.int32))
        matrices = [Matrix(oracle.rules, target.block, row) for row in indices]
        if start is not None:
            values = {**values, name: jnp.asarray(start(rng, shape), case.dtype)}
            for matrix, row, value in zip(matrices, indices, values[name].reshape(count, -1), strict=True):
                matrix.value.flat[row] = np.asarray(value, np.float64)
        oracle.matrices += matrices
    state = optax.tree.set(state, active=active)

    comparison = Comparison(case, tolerance)
    dtype = "float64" if case.dtype == "float64" else "float32"
    for number in range(1, case.rules.total_steps + 1):
        dense = {}
        for name, target in case.targets.items():
            shape = (case.micro_batches, *case.stack(name), *target.shape)
            dense[name] = draw(rng, kind, shape, dtype)
        told = {}
        if case.static:
            told = {"phase": schedule.phase(number), "reselect": bool(schedule.reselects(number))}
        values, state = step(values, state, {parameter_name(n): d for n, d in dense.items()}, **told)
        oracle.step([b.astype(np.float64) for n, t in case.targets.items() for b in blocks(dense[n], t)])
        if oracle.margin < tolerance:
            return False
        comparison.check(oracle, *jax.device_get((values, state)))
    return True


def follow(case, problems, kinds=KINDS, **options):
    """Follows random problems, always the same ones, to their end but for a few; returns their number."""
    ended = {}

    @settings(max_examples=problems, deadline=None, derandomize=True)
    @given(st.integers(0, 2**32 - 1), st.sampled_from(kinds))
    def problem(seed, kind):
        ended[seed, kind] = run(case, seed, kind, **options)

    problem()
    assert sum(ended.values()) >= 0.9 * len(ended), f"{case.name}: too many narrow cuts"
    return sum(ended.values())
