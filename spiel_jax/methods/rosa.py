"""Sparse deltas and matrices of low rank on the same weights: RoSA."""

from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import PartitionSpec

from spiel_jax.losses.next_token import Objective, Params, TokenBatch
from spiel_jax.methods.configured import configured_adamw
from spiel_jax.methods.lora import Lora, LowRankLinear, LowRankParams, low_rank_term
from spiel_jax.methods.method import Method, Metrics, TrainState, guarded
from spiel_jax.methods.parametrization import adapted
from spiel_jax.methods.sparse import SparseMethod
from spiel_jax.models.config import ModelConfig
from spiel_jax.models.layers import AdaptedLinear
from spiel_jax.ops.stored import Stored
from spiel_jax.ops.tree import all_finite
from spiel_jax.optim.criteria.criterion import Complaint
from spiel_jax.optim.positions import active_positions, deltas
from spiel_jax.optim.schedules import Phase
from spiel_jax.sparse.delta import SparseDelta
from spiel_jax.sparse.linear import SparseLinear
from spiel_jax.sparse.targets import Target


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class HybridLinear:
    """A linear layer with both: ``x (W + sparse)^T + scale * drop(x) A^T B^T``.

    Attributes:
        sparse: Collects the gradient of its entries.
        low_rank: The term beside it.
    """

    sparse: SparseLinear
    low_rank: LowRankLinear

    def __call__(self, x: jax.Array, weight: jax.Array | Stored) -> jax.Array:
        """[..., in] and [out, in] give [..., out], dtype of ``x``."""
        term = low_rank_term(x.astype(weight.dtype), self.low_rank)
        return self.sparse(x, weight) + term.astype(x.dtype)


class RosaState(NamedTuple):
    """The optimizers' states."""

    step: jax.Array  # [] int32, steps so far, skipped ones included
    sparse: Any
    low_rank: Any


@dataclass(frozen=True)
class RosaMethod(Method):
    """RoSA: sparse deltas and LoRA on the same weights, each with its own budget, optimizer and clipping.

    In a warm-up LoRA trains alone. Then entries are chosen, and both train: as the growth criterion
    ``config.rosa.entries`` has it, whose schedules begin after the warm-up. With "gradient" that is RoSA,
    where accumulated gradients choose: a ``spiel.candidate_ratio`` above 1 (see ``FirstGradients``); Supra
    (arXiv 2607.09287) is "magnitude" without a warm-up.

    Attributes:
        sparse: The sparse part.
        low_rank: The other.
        tx: Optimizer of the other.
        warmup: Steps in which it trains alone.
        seed: Of the matrices and their dropout.

    Example:
        >>> from spiel_jax.config import default_config
        >>> config = default_config()
        >>> config.rosa.warmup, config.spiel.accumulation, config.targets.num_tunable = 3, 2, 1000
        >>> method = RosaMethod.from_config(config, ModelConfig.llama2_7b(), steps=9)
        >>> [method.step_kind(step)[0].value for step in (3, 4, 5, 6)]  # entries are chosen after step 5
        ['plain', 'propose', 'estimate', 'plain']

    References:
        Nikdan et al., `RoSA: Accurate Parameter-Efficient Fine-Tuning via Robust Adaptation
        <https://arxiv.org/abs/2401.04679>`_. Its runs have 0.6% of the entries beside rank 16, and a
        warm-up of 64 steps.
    """

    has_deltas: ClassVar[bool] = True

    sparse: SparseMethod
    low_rank: Lora
    tx: optax.GradientTransformation
    warmup: int = 0
    seed: int = 0

    @property
    def objective(self) -> Objective:  # pyright: ignore[reportIncompatibleVariableOverride]
        """See ``Method``."""
        return self.sparse.objective

    @classmethod
    def complaints(cls, config: Any) -> Iterator[Complaint]:
        """See ``Method``: those of the sparse part, and of the warm-up."""
        warmup = config.rosa.warmup
        if config.steps is not None and warmup >= config.steps:
            expected = f"at most {config.steps - 1}: the deltas train after it, in {config.steps} steps"
            yield "rosa.warmup", warmup, expected
            return
        sparse = _sparse_config(config)
        if config.steps is not None:
            sparse.steps = config.steps - warmup
        for key, value, expected in SparseMethod.complaints(sparse):
            yield ("rosa.entries" if key == "method" else key), value, expected
        if config.spiel.keep_zeros:
            yield "spiel.keep_zeros", True, "False: matrices of low rank fill the zeros of a weight"

    @classmethod
    def unused(cls, config: Any) -> Iterable[str]:
        """See ``Method``: what the criterion does not use."""
        idle = SparseMethod.unused(_sparse_config(config))
        return (key for key in idle if not key.startswith(("lora", "rosa")))

    @classmethod
    def from_config(
        cls, config: Any, model: ModelConfig, steps: int, targets: Mapping[str, Target] | None = None
    ) -> "RosaMethod":
        """See ``Method``."""
        settings = config.rosa
        after = max(steps - settings.warmup, 1)  # of a run that is only read again, steps is 1
        sparse = SparseMethod.from_config(_sparse_config(config), model, after, targets or None)
        own = config.copy_and_resolve_references()
        if settings.learning_rate is not None:
            own.optimizer.learning_rate = settings.learning_rate
        low_rank = Lora(adapted(model, config.targets.rules), **config.lora)
        return cls(sparse, low_rank, configured_adamw(own, steps), settings.warmup, config.seed)

    def _keys(self) -> jax.Array:
        """[2]: the keys of the initial matrices and of the dropout."""
        return jax.random.split(jax.random.key(self.seed))

    def step_kind(self, step: int) -> tuple[Phase, bool]:
        """See ``Method``: as the sparse part says, once the warm-up is over."""
        if step <= self.warmup:
            return Phase.PLAIN, False
        return self.sparse.step_kind(step - self.warmup)

    def _sparse(self, state: TrainState) -> TrainState:
        """The state of the sparse part."""
        return replace(state, trainable=state.trainable["sparse"], opt_state=state.opt_state.sparse)

    def init(self, params: Params) -> TrainState:
        """See ``Method``."""
        begun, low_rank = self.sparse.init(params), self.low_rank.init(self._keys()[0])
        return replace(
            begun,
            trainable={"sparse": begun.trainable, "low_rank": low_rank},
            opt_state=RosaState(jnp.zeros((), jnp.int32), begun.opt_state, self.tx.init(low_rank)),
        )

    def tunable(self, state: TrainState) -> int:
        """See ``Method``."""
        low_rank = sum(leaf.size for leaf in jax.tree.leaves(state.trainable["low_rank"]))
        return self.sparse.tunable(self._sparse(state)) + low_rank

    def attach(self, params: Params, trainable: Any, opt_state: RosaState) -> TrainState:
        """See ``Method``."""
        merged = self.sparse.attach(params, trainable["sparse"], opt_state.sparse)
        return replace(merged, trainable=trainable, opt_state=opt_state)

    def tuned(self, state: TrainState) -> Params:
        """See ``Method``: the deltas merged, then the matrices."""
        return self.low_rank.merge(self.sparse.tuned(self._sparse(state)), state.trainable["low_rank"])

    def pretrained(self, state: TrainState) -> Params:
        """See ``Method``."""
        return self.sparse.pretrained(self._sparse(state))

    def _beside(
        self, params: Params, adapters: Mapping[str, SparseLinear], low_rank: LowRankParams, key: Any
    ) -> dict[str, AdaptedLinear]:
        """The adapters of the sparse part with the matrices beside them; some weights have these alone."""
        terms: Any = self.low_rank.attach(params, low_rank, key)[1]
        both = {name: HybridLinear(adapters[name], terms[name]) for name in adapters.keys() & terms.keys()}
        return {**adapters, **terms, **both}

    def step(
        self, state: TrainState, batch: TokenBatch, *, phase: Phase, reselect: bool
    ) -> tuple[TrainState, Metrics]:
        """See ``Method``. Each micro-batch has a dropout of its own."""
        count, before, optimizer = state.opt_state
        keys = jax.random.split(jax.random.fold_in(self._keys()[1], count), batch["tokens"].shape[0])
        old = self._sparse(state)

        def beside(adapters: Any, low_rank: LowRankParams, micro: TokenBatch) -> Any:
            return self._beside(state.params, adapters, low_rank, micro["dropout"])

        loss, (grads, more), seen = self.sparse.passes.of(
            old, {**batch, "dropout": keys}, state.trainable["low_rank"], beside, phase=phase
        )
        norm = optax.tree.norm((grads, more))
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)

        def change(low_rank: LowRankParams, optimizer: Any) -> tuple[Any, Any]:
            updates, optimizer = self.tx.update(more, optimizer, low_rank)
            return optax.apply_updates(low_rank, updates), optimizer

        with jax.named_scope("low_rank_optimizer"):
            low_rank, optimizer = guarded(finite, change, state.trainable["low_rank"], optimizer)
        values, after = lax.cond(
            count >= self.warmup,
            lambda: self.sparse.changed_by(old, grads, seen, finite=finite, phase=phase, reselect=reselect),
            lambda: (old.trainable, before),
        )
        new = self.sparse.merged_again(old, replace(old, trainable=values, opt_state=after), reselect)
        metrics = {
            "loss": loss,
            "grad_norm": norm,
            "replaced": jnp.where(finite, optax.tree.get(after, "replaced"), 0.0),
            "finite": finite,
            "values_finite": all_finite((values, low_rank)),
            "supervised_tokens": jnp.sum(batch["weights"]),
        }
        trainable = {"sparse": values, "low_rank": low_rank}
        return replace(new, trainable=trainable, opt_state=RosaState(count + 1, after, optimizer)), metrics

    def evaluate(self, state: TrainState, batch: TokenBatch) -> tuple[jax.Array, jax.Array]:
        """See ``Method``; without dropout."""
        params = self.sparse.merged(self._sparse(state))
        adapters = self.sparse.passes.adapters(self.sparse.unmerged(self._sparse(state)))
        both = self._beside(params, adapters, state.trainable["low_rank"], None)
        return self.objective(params, batch, both, frozen=True), jnp.sum(batch["weights"])

    def changed(self, trained: Any) -> Set[str]:
        """See ``Method``."""
        return self.sparse.changed(self.deltas(trained)) | self.low_rank.changed

    def merge(self, params: Params, trained: Any) -> Params:
        """See ``Method``."""
        return self.low_rank.merge(self.sparse.merge(params, self.deltas(trained)), trained["low_rank"])

    def deltas(self, trained: Any) -> dict[str, SparseDelta]:
        """The deltas among what a checkpoint holds as trained, sorted by position."""
        stored = trained["deltas"]
        return {
            name: target.delta(stored[name]["indices"], stored[name]["values"]).sort()
            for name, target in self.sparse.targets.items()
        }

    def items(self, state: TrainState) -> dict[str, Any]:
        """See ``Method``: the positions are in "trainable" and nowhere else."""
        zipped = {
            name: {"indices": delta.indices, "values": delta.values}
            for name, delta in deltas(state.trainable["sparse"], state.opt_state.sparse).items()
        }
        return {
            "trainable": {"deltas": zipped, "low_rank": state.trainable["low_rank"]},
            "optimizer": state.opt_state._replace(sparse=optax.tree.set(state.opt_state.sparse, active={})),
        }

    def restored(self, items: Mapping[str, Any], like: TrainState) -> TrainState:
        """See ``Method``."""
        trained, optimizer = items["trainable"], RosaState(*items["optimizer"])
        one = {"deltas": trained["deltas"], "optimizer": optimizer.sparse}
        sparse = self.sparse.restored(one, self._sparse(like))
        return replace(
            like,
            trainable={"sparse": sparse.trainable, "low_rank": trained["low_rank"]},
            opt_state=optimizer._replace(sparse=sparse.opt_state),
        )

    def memory(self, state: TrainState) -> dict[str, Any]:
        """See ``Method``: the positions count among the deltas."""
        parts, active = super().memory(state), active_positions(state.opt_state.sparse)
        optimizer = state.opt_state._replace(sparse=optax.tree.set(state.opt_state.sparse, active={}))
        return parts | {"deltas": [*parts["deltas"], active], "optimizer": optimizer}

    def spec(self, names: Sequence[str], shape: tuple[int, ...]) -> PartitionSpec | None:
        """See ``Method``."""
        if {"lora_A", "lora_B"} & set(names):
            return self.low_rank.spec(names)
        return self.sparse.spec(names, shape)


def _sparse_config(config: Any) -> Any:
    """The configuration of the sparse part by itself."""
    own = config.copy_and_resolve_references()
    own.method = config.rosa.entries
    return own
