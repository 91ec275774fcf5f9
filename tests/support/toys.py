"""A growth criterion and a method of somebody else: what they need, and nothing of the library changed."""

import contextlib
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

import spiel_jax as sj
from spiel_jax.losses.next_token import Objective
from spiel_jax.methods.configured import configured_adamw
from spiel_jax.methods.method import Method, TrainState, optimizer_step
from spiel_jax.methods.registry import METHODS
from spiel_jax.optim.criteria.criterion import CRITERIA


@dataclass(frozen=True)
class Strongest(sj.Criterion):
    """Grows the candidates whose strongest gradient of the phase was largest; there are 2 per entry."""

    @property
    def uses_candidates(self):
        return True

    def count(self, target):
        return 2 * target.block_count

    def known(self, stats):
        return stats["indices"]

    def init(self, targets, values):
        shapes = {name: (*target.lead, self.count(target)) for name, target in targets.items()}
        return {
            name: {"indices": jnp.full(shape, targets[name].block_size, jnp.int32), "peak": jnp.zeros(shape)}
            for name, shape in shapes.items()
        }

    def observe(self, stats, seen):
        if seen.candidates is None:
            return stats
        found = {}
        for name, old in stats.items():
            now = {
                "indices": seen.candidates[name].indices,
                "peak": jnp.abs(seen.candidates[name].values),
            }
            more = {"indices": old["indices"], "peak": jnp.maximum(old["peak"], now["peak"])}
            found[name] = jax.tree.map(lambda start, again: jnp.where(seen.proposes, start, again), now, more)
        return found

    def available(self, stats, indices, target):
        known = stats["indices"]
        new = (known < target.block_size) & ~jnp.isin(known, indices)
        return jnp.sum(new, dtype=jnp.int32)

    def incoming(self, stats, indices, dropped, n, target):
        known = stats["indices"]
        new = (known < target.block_size) & ~jnp.isin(known, indices)
        order = jnp.argsort(-jnp.where(new, stats["peak"], -1.0))
        first = jnp.where(jnp.arange(known.size) < n, known[order], target.block_size)
        return first[: indices.size]


@dataclass(frozen=True)
class NormMethod(Method):
    """Trains the norms' weights and nothing else."""

    objective: Objective
    tx: optax.GradientTransformation

    @classmethod
    def from_config(cls, config, model, steps, targets=None):
        return cls(Objective.from_config(config, model), configured_adamw(config, steps))

    def init(self, params):
        trainable = {name: param for name, param in params.items() if name.endswith("norm.weight")}
        trainable = jax.tree.map(lambda param: param.astype(jnp.float32), trainable)
        return self.attach(params, trainable, self.tx.init(trainable))

    def merge(self, params, trained):
        return params | {name: trained[name].astype(params[name].dtype) for name in trained}

    def changed(self, trained):
        return set(trained)

    def tuned(self, state):
        return self.merge(state.params, state.trainable)

    def step(self, state: TrainState, batch: Any, *, phase: Any, reselect: bool):
        def loss(trainable, micro):
            return self.objective(self.merge(state.params, trainable), micro)

        return optimizer_step(self.tx, loss, state, batch)

    def evaluate(self, state, batch):
        return self.objective(self.tuned(state), batch), jnp.sum(batch["weights"])


@contextlib.contextmanager
def registered():
    """While these have names in the registries: "strongest" and "norms"."""
    sj.register("strongest")(Strongest)
    METHODS["norms"] = NormMethod
    try:
        yield
    finally:
        del CRITERIA["strongest"], METHODS["norms"]
