"""SpIEL-MA around Adam: grown entries begin with the second moment that their row and column have."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from spiel_jax.optim.criteria.criterion import Complaint, Observation, Regridding, register
from spiel_jax.optim.criteria.moment_approximation import MomentApproximation
from spiel_jax.optim.inner_optimizers import absorbed
from spiel_jax.sparse.delta import divided
from spiel_jax.sparse.targets import Target

Stats = tuple[tuple[jax.Array, ...], jax.Array]
"""The accumulators (after a survey more), and the steps that they have seen, int32 [...]."""


@register("spiel_ma_adam")
@dataclass(frozen=True)
class SeededMoments(MomentApproximation):
    r"""SpIEL-MA with Adam inside, whose second moments begin where rows and columns say.

    SpIEL-MA has no state per entry: sparse SM3 bounds the second moment of an entry, grown or not, by its
    row's and its column's accumulator. Adam has one, and without candidates it would begin at 0 with every
    grown entry, whose first step is then of full size. Here the accumulators, kept beside Adam, tell it: with
    $r$ and $q$ those of the entry's row and column after $t$ steps, bounds of the sums of squares there,

    $$
    \nu = \frac{\min(r, q)}{t} \left(1 - \beta_2^a\right), \qquad \mu = 0, \qquad \text{age} = a
    $$

    as if ``a`` gradients of that mean square and of mean 0 had been seen: a grown entry begins with small
    steps.

    Attributes:
        b2: Decay rate of Adam's second moment.
        age: What a grown entry begins with, a; 0 seeds nothing.

    Example:
        >>> growth, target = SeededMoments(b2=0.5, age=1), Target((2, 3), 2)
        >>> stats = (jnp.array([8.0, 2.0]), jnp.array([5.0, 1.0, 3.0])), jnp.array(2)
        >>> seeds = growth.seed_at(stats, jnp.array([0, 1]), jnp.array([2, 3]), target)
        >>> seeds["nu"].tolist()  # min(8, 3) / 2 * 0.5, min(2, 5) / 2 * 0.5
        [0.75, 0.5]

    References:
        Accumulators and ranking: SpIEL, section 3.3. The seeds are not in the paper.
    """

    in_original = False
    unused = ()

    b2: float = 0.999
    age: int = 5

    @classmethod
    def from_config(cls, config: Any) -> "SeededMoments":
        """See ``Criterion``: the age is that of an estimation phase, as with SpIEL-AG."""
        return cls(config.spiel.score, b2=config.optimizer.b2, age=config.spiel.accumulation)

    @classmethod
    def complaints(cls, config: Any) -> Iterator[Complaint]:
        """See ``Criterion``. Adam keeps an age."""
        yield from (found for found in super().complaints(config) if found[:2] != ("spiel.drop_by", "age"))

    @classmethod
    def optimizer(
        cls, config: Any, rate: optax.Schedule, targets: Mapping[str, Target]
    ) -> optax.GradientTransformation:
        """Adam with an age per entry, as with SpIEL-AG."""
        return super(MomentApproximation, cls).optimizer(config, rate, targets)

    def init(self, targets: Mapping[str, Target], values: Mapping[str, jax.Array]) -> dict[str, Any]:
        """Zero accumulators, no steps."""
        zero = super().init(targets, values)
        return {name: (zero[name], jnp.zeros(t.lead, jnp.int32)) for name, t in targets.items()}

    def observe(self, stats: dict[str, Any], seen: Observation) -> dict[str, Any]:
        """Raises the accumulators by the gradients of the active entries."""
        new = super().observe({name: old for name, (old, _) in stats.items()}, seen)
        return {name: (new[name], optax.safe_increment(steps)) for name, (_, steps) in stats.items()}

    def survey(self, stats: dict[str, Any], weights: Any, targets: Mapping[str, Target]) -> dict[str, Any]:
        """See ``MomentApproximation``."""
        found = super().survey({name: old for name, (old, _) in stats.items()}, weights, targets)
        return {name: (found[name], steps) for name, (_, steps) in stats.items()}

    def available(self, stats: Stats, indices: jax.Array, target: Target) -> jax.Array | int:
        """See ``MomentApproximation``."""
        return super().available(stats[0], indices, target)

    def incoming(
        self, stats: Stats, indices: jax.Array, dropped: jax.Array, n: jax.Array, target: Target
    ) -> jax.Array:
        """See ``MomentApproximation``."""
        return super().incoming(stats[0], indices, dropped, n, target)

    def proposals(
        self, stats: Stats, indices: jax.Array, dropped: jax.Array, target: Target
    ) -> tuple[jax.Array, jax.Array]:
        """See ``MomentApproximation``."""
        return super().proposals(stats[0], indices, dropped, target)

    def seed_at(
        self, stats: Stats, source: jax.Array, indices: jax.Array, target: Target
    ) -> dict[str, jax.Array]:
        """See above."""
        del source
        if not self.age:
            return {}
        (row, column, *_), steps = stats
        rows, columns = divided(indices, target.block[1])
        bounds = (a.at[i].get(mode="fill", fill_value=0) for a, i in ((row, rows), (column, columns)))
        square = jnp.minimum(*bounds) / jnp.maximum(steps, 1)
        age = jnp.full(indices.shape, self.age, jnp.int32)
        return {"nu": square * absorbed(self.b2, age, square.dtype), "age": age}

    def first_age(self, accumulation: int) -> int:
        """See ``Criterion``."""
        del accumulation
        return self.age

    def regrid(self, stats: Any, move: Regridding) -> Any:
        """See ``MomentApproximation``; the steps are the same for all."""
        return super().regrid(stats[0], move), np.full(move.new.lead, np.max(stats[1]), np.int32)
