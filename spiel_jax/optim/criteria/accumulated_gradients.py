"""Growth by accumulated gradients: SpIEL-AG."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from spiel_jax.errors import SpielError
from spiel_jax.ops.selection import isin, largest
from spiel_jax.optim.criteria.criterion import (
    Criterion,
    Flag,
    Observation,
    Regridding,
    register,
)
from spiel_jax.optim.inner_optimizers import absorbed, state_dtype
from spiel_jax.optim.parity import Parity, is_reference
from spiel_jax.optim.schedules import require_static
from spiel_jax.sparse.delta import SparseDelta
from spiel_jax.sparse.targets import Target

Seeds = Literal["second", "both", "neither"]
"""What a grown entry begins with of the gradients that it was chosen by: Adam's second moment, so that its
first steps are small; both moments, as in the paper; or nothing, as at the start of a run."""


def default_seeds(parity: Parity) -> Seeds:
    """What grown entries begin with where it is not said: both moments as in the original, or the second.

    Example:
        >>> default_seeds("corrected"), default_seeds("reference")
        ('second', 'both')

    Raises:
        SpielError: If ``parity`` is none of ``Parity``.
    """
    return "both" if is_reference(parity) else "second"


class CandidateStats(NamedTuple):
    """Statistics of ``AccumulatedGradients`` for one target; c candidates per matrix."""

    indices: jax.Array  # int32 [..., c]; the block's size marks an unused slot
    grad_sum: jax.Array  # [..., c]
    grad_sq_sum: jax.Array  # [..., c]
    samples: jax.Array  # int32 [...]: gradients summed, the same for all matrices
    steps: jax.Array  # int32 [...]: optimizer steps they came from


def _choose(flag: Flag, new: Any, old: Any) -> Any:
    if isinstance(flag, bool):
        return new if flag else old
    return jax.tree.map(lambda n, o: jnp.where(flag, n, o), new, old)


@register("spiel_ag")
@dataclass(frozen=True)
class AccumulatedGradients(Criterion):
    """SpIEL-AG: the gradients of a few candidates, accumulated over an estimation phase.

    The first step of a phase proposes the entries of largest gradient magnitude; their gradients are
    summed over the phase, and those of largest ``|sum|`` grow. In the paper the moments of a grown entry are
    seeded from its sums, as if the optimizer had seen a constant gradient for as many steps. With ``S`` and
    ``Q`` the sums of the ``a`` gradients of a candidate and of their squares,

        rank = |S|,  mu = S / a * (1 - b1^a),  nu = Q / a * (1 - b2^a),  age = a

    Attributes:
        b1: Decay rate of the inner optimizer's first moment, for seeding ``mu``.
        b2: Decay rate of its second moment, for seeding ``nu``.
        ratio: Candidates per active entry, c / k; per slot, where some are spare. At a replacement rate of 1
            with c = k the accumulated gradients cannot change the choice; a larger c lets them, at 12 bytes
            per candidate.
        seeds: What of that a grown entry is given. With "second" ``mu`` is 0 at age a: the paper's ``mu``
            lets all grown entries run on along a gradient that is over. With "neither" all starts as
            ``inner.init`` has it. A static mask of the entries of largest gradient at the start (SIFT) is
            this criterion with "neither", with ``propose_active``, and a schedule that reselects once and
            replaces everything.
        per_micro_batch: As the original implementation has it: candidate gradients come per micro-batch
            (of loss / G) with a leading axis [G], each is a sample, and seeds are G times smaller than the
            step's mean gradient. By default a step is one sample, of the gradient that the inner optimizer
            sees, so that a seeded moment is on the scale of the others.
        late_age: As the original has it: the age of a grown entry is one short at its next step, so its
            bias is corrected for one gradient fewer than its moments absorbed. By default the age counts
            them, for grown and kept entries alike.
        propose_active: As the original has it: active entries may be candidates (6 to 14% are), and then
            take the place of entries that could grow. Read by what proposes.
        low_precision: As the original has it: statistics and seeds in the dtype of the values. In bfloat16
            a decay rate of 0.999 rounds to 1, so that ``nu`` is seeded with 0, and counting stops at 256.
            By default they are float32 or better, and counts integers.
        keep_zeros: See ``Criterion``. Read by what proposes.

    Example:
        >>> growth, target = AccumulatedGradients(), Target((2, 3), 2)
        >>> zero = jnp.zeros(())
        >>> stats = CandidateStats(jnp.array([1, 4]), jnp.array([0.5, -2.0]), zero, zero, zero)
        >>> growth.incoming(stats, jnp.array([0, 5]), jnp.array([True, False]), 1, target).tolist()
        [6, 4]

    Raises:
        SpielError: If ``seeds`` is none of ``Seeds``.

    References:
        SpIEL, section 3.2 and algorithm 1.
    """

    in_original = True
    can_keep_zeros = True
    own = ("spiel.candidate_ratio", "spiel.candidates", "spiel.drop_by", "spiel.seeds")

    b1: float = 0.9
    b2: float = 0.999
    ratio: float = 1.0
    seeds: Seeds = "second"
    per_micro_batch: bool = False
    late_age: bool = False
    propose_active: bool = False
    low_precision: bool = False
    keep_zeros: bool = False

    def __post_init__(self):
        if self.seeds not in get_args(Seeds):
            raise SpielError(f"seeds = {self.seeds!r}: expected one of {', '.join(get_args(Seeds))}")

    @classmethod
    def reference(cls, b1: float = 0.9, b2: float = 0.999) -> "AccumulatedGradients":
        """The criterion exactly as the original implementation has it, every quirk of it."""
        return cls(
            b1, b2, seeds="both", per_micro_batch=True, late_age=True, propose_active=True, low_precision=True
        )

    @classmethod
    def of(
        cls,
        b1: float,
        b2: float,
        candidate_ratio: float,
        parity: Parity = "corrected",
        seeds: Seeds | None = None,
    ) -> "AccumulatedGradients":
        """The criterion of ``spiel_ag``; without ``seeds`` the second moment, and both as the original.

        Raises:
            SpielError: If the original has no such criterion and ``parity`` asks for it.
            TypeError: If the ratio is not static.
        """
        require_static(candidate_ratio=candidate_ratio)
        if candidate_ratio <= 0:
            raise SpielError(f"candidate_ratio = {candidate_ratio}: expected more than 0")
        if seeds is None:
            seeds = default_seeds(parity)
        if not is_reference(parity):
            return cls(b1, b2, candidate_ratio, seeds)
        if seeds != "both":
            raise SpielError(f'seeds = {seeds!r}: the original seeds "both", and so does parity="reference"')
        if candidate_ratio != 1:
            raise SpielError(
                f"candidate_ratio = {candidate_ratio}: the original has as many candidates as active "
                'entries, so parity="reference" needs 1'
            )
        return cls.reference(b1, b2)

    @classmethod
    def from_config(cls, config: Any) -> "AccumulatedGradients":
        """See ``Criterion``."""
        settings, optimizer = config.spiel, config.optimizer
        return cls.of(optimizer.b1, optimizer.b2, settings.candidate_ratio, settings.parity, settings.seeds)

    @property
    def uses_candidates(self) -> bool:
        """Candidates must be given to ``update`` on proposing and estimating steps."""
        return True

    def count(self, target: Target) -> int:
        """Candidates of one matrix (or block).

        Raises:
            TypeError: If the ratio is not static.
        """
        require_static(candidate_ratio=self.ratio)
        return min(max(1, round(self.ratio * target.block_count)), target.block_size)

    def known(self, stats: CandidateStats) -> jax.Array:
        """Positions of the candidates."""
        return stats.indices

    def init(
        self, targets: Mapping[str, Target], values: Mapping[str, jax.Array]
    ) -> dict[str, CandidateStats]:
        """No candidates."""
        stats = {}
        for name, target in targets.items():
            shape = (*target.lead, self.count(target))
            none = jnp.full(shape, target.block_size, jnp.int32)
            dtype = values[name].dtype if name in values else jnp.float32
            dtype = dtype if self.low_precision else state_dtype(dtype)
            zeros, number = jnp.zeros(shape, dtype), jnp.zeros(target.lead, jnp.int32)
            stats[name] = CandidateStats(none, zeros, zeros, number, number)
        return stats

    def observe(self, stats: dict[str, CandidateStats], seen: Observation) -> dict[str, CandidateStats]:
        """Starts afresh on a proposing step, adds on an estimating one."""
        if seen.proposes is False and seen.estimates is False:
            return stats
        if seen.candidates is None:
            raise ValueError(
                "SpIEL-AG needs candidates= (positions and this step's gradients) on proposing and "
                "estimating steps; give phase= where the host knows that this step is neither"
            )
        return {name: self._observe(old, seen.candidates[name], seen) for name, old in stats.items()}

    def _observe(self, old: CandidateStats, candidates: SparseDelta, seen: Observation) -> CandidateStats:
        dtype = old.grad_sum.dtype
        grads = candidates.values.astype(dtype)
        if not self.per_micro_batch:
            grads = grads[None]
        sums, squares = jnp.sum(grads, 0), jnp.sum(jnp.square(grads), 0)
        micro_batches = grads.shape[0]
        limit = jnp.iinfo(jnp.int32).max
        if self.low_precision:
            limit = min(limit, 2 ** (jnp.finfo(dtype).nmant + 1))

        def counted(samples: jax.Array) -> jax.Array:
            return jnp.minimum(samples, limit - micro_batches) + micro_batches

        start, more = counted(jnp.zeros_like(old.samples)), counted(old.samples)
        first = CandidateStats(candidates.indices, sums, squares, start, start // micro_batches)
        again = CandidateStats(
            old.indices, old.grad_sum + sums, old.grad_sq_sum + squares, more, more // micro_batches
        )
        return _choose(seen.proposes, first, _choose(seen.estimates, again, old))

    def _usable(self, stats: CandidateStats, target: Target) -> jax.Array:
        return (stats.indices < target.block_size) & jnp.isfinite(stats.grad_sum)

    def available(self, stats: CandidateStats, indices: jax.Array, target: Target) -> jax.Array:
        """Candidates that are not active; or enough for any n where active ones may be candidates.

        Where k candidates or more may include active entries, as in the original, at most k - n of them
        are kept when n are dropped, so that n are always left.
        """
        usable = self._usable(stats, target)
        known = jnp.sum(usable, dtype=jnp.int32)
        inactive = usable & ~isin(stats.indices, indices, target.block_size)
        return jnp.where(known >= indices.size, indices.size, jnp.sum(inactive, dtype=jnp.int32))

    def incoming(
        self,
        stats: CandidateStats,
        indices: jax.Array,
        dropped: jax.Array,
        n: jax.Array,
        target: Target,
    ) -> jax.Array:
        """The n candidates of largest summed gradient that are not kept."""
        positions, scores = self.proposals(stats, indices, dropped, target)
        return jnp.where(largest(scores, positions, n), positions, target.block_size)

    def proposals(
        self, stats: CandidateStats, indices: jax.Array, dropped: jax.Array, target: Target
    ) -> tuple[jax.Array, jax.Array]:
        """The candidates that are not kept, by their summed gradients."""
        size = target.block_size
        kept = isin(stats.indices, jnp.where(dropped, size, indices), size)
        valid = self._usable(stats, target) & ~kept
        return stats.indices, jnp.where(valid, self.rank(stats), jnp.nan)

    def rank(self, stats: CandidateStats) -> Any:
        """What candidates are compared by, [..., c]; arrays of the device or of the host."""
        return abs(stats.grad_sum)

    def seed(self, stats: CandidateStats, source: jax.Array) -> dict[str, jax.Array]:
        """Age, and what ``seeds`` says of the moments that the mean gradient leaves in the phase's steps."""
        if self.seeds == "neither":
            return {}
        samples = jnp.maximum(stats.samples, 1).astype(stats.grad_sum.dtype)
        mean = stats.grad_sum.at[source].get(mode="fill", fill_value=0) / samples
        square = stats.grad_sq_sum.at[source].get(mode="fill", fill_value=0) / samples
        age = jnp.broadcast_to(stats.steps, mean.shape)
        first = mean if self.seeds == "both" else jnp.zeros_like(mean)
        return {
            "mu": first * absorbed(self.b1, age, mean.dtype),
            "nu": square * absorbed(self.b2, age, mean.dtype),
            "age": age - 1 if self.late_age else age,
        }

    def first_age(self, accumulation: int) -> int:
        """See ``Criterion``: that of the phase."""
        return 0 if self.seeds == "neither" else accumulation

    def clear(
        self, stats: dict[str, CandidateStats], targets: Mapping[str, Target]
    ) -> dict[str, CandidateStats]:
        """Forgets the candidates, so that none outlives the active set it was proposed for."""
        return {
            name: jax.tree.map(jnp.zeros_like, old)._replace(
                indices=jnp.full_like(old.indices, targets[name].block_size)
            )
            for name, old in stats.items()
        }

    def regrid(self, stats: CandidateStats, move: Regridding) -> CandidateStats:
        """Moves the candidates; where a block cannot hold all, it keeps those that come first."""
        sums = np.asarray(stats.grad_sum)
        # one that is not finite is not grown, and comes last
        scores = np.where(np.isfinite(sums), np.asarray(self.rank(stats)), -1)
        moved = move.positions(stats.indices, scores, self.count(move.new))
        # the counts are the same for all matrices
        counts = [np.full(move.new.lead, np.max(n), n.dtype) for n in (stats.samples, stats.steps)]
        kept: Any = moved.indices(), moved(sums), moved(stats.grad_sq_sum), *counts
        return CandidateStats(*kept)
