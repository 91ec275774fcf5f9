"""What kinds of adapters have in common: which linears they adapt, and their place among stacked layers."""

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import PartitionSpec

from spiel_jax.losses.next_token import Objective, Params, TokenBatch
from spiel_jax.methods.configured import configured_adamw
from spiel_jax.methods.method import Method, Metrics, TrainState, optimizer_step
from spiel_jax.models.config import ModelConfig
from spiel_jax.models.decoder import ADAPTED, abstract_params, layer_names
from spiel_jax.models.layers import AdaptedLinear
from spiel_jax.models.storage.packed import packed
from spiel_jax.models.storage.weight import hold
from spiel_jax.ops.stored import as_array, is_stored, is_writable
from spiel_jax.optim.schedules import Phase
from spiel_jax.sparse.targets import Rule, Target, find_targets


class Parametrization(Protocol):
    """A kind of adapter on frozen weights: its parameters, what they do in the model, and their merge."""

    @property
    def changed(self) -> Set[str]:
        """Names of the parameters that ``merge`` changes; a model need not have all of them."""
        ...

    def init(self, key: jax.Array) -> dict[str, Any]:
        """Fresh parameters, float32, by the name of what they adapt; the model is the pretrained one."""
        ...

    def attach(
        self, params: Params, trainable: dict[str, Any], key: jax.Array | None
    ) -> tuple[Params, dict[str, AdaptedLinear]]:
        """What the model runs with: parameters, and adapters by the name of the weight.

        The parameters are ``params`` itself where none of them depends on what is trained.

        Args:
            params: The pretrained parameters.
            trainable: The adapters' parameters, like those of ``init``.
            key: Of what is random in training; None: nothing is.
        """
        ...

    def merge(self, params: Params, trainable: dict[str, Any]) -> Params:
        """Parameters of a plain model that computes the same, in the dtypes of ``params``.

        They are held as in ``params``, but for those that change of a stored weight that cannot be written
        exactly: these are arrays.

        Args:
            params: The pretrained parameters, or only those that change.
            trainable: The adapters' parameters.
        """
        ...

    def spec(self, names: Sequence[str]) -> PartitionSpec | None:
        """How an array of ``trainable`` is spread over a mesh, by the keys to it; see ``Method``."""
        ...


def adapted(model: ModelConfig, rules: Sequence[str], names: Sequence[str] = ADAPTED) -> dict[str, Target]:
    """Which weights of a model are adapted, matched as in ``find_targets``.

    Args:
        model: Shape of the model.
        rules: Regular expressions on names, layer numbers included; a weight that none matches is frozen.
        names: Parameters to choose from; default: every linear inside the blocks.

    Returns:
        Target name to ``Target``; all its entries count. One target per parameter.

    Raises:
        SpielError: If a rule matches nothing (near names are listed) or can never apply.
    """
    shapes = abstract_params(model)
    return find_targets(
        {name: shapes[name] for name in names},
        rules=[Rule(rule, density=1.0) for rule in rules],
        layer_names=lambda name, stack: layer_names(name, stack[0]),
    )


def among_layers(parts: jax.Array, target: Target, layers: int, fill: float) -> jax.Array:
    """[adapted layers, ...] in their places among all [L, ...]; differentiable.

    Args:
        parts: One array per adapted layer, stacked.
        target: Which layers these are.
        layers: L.
        fill: What the other layers have.
    """
    if target.layers is None:
        return parts
    return jnp.full((layers, *parts.shape[1:]), fill, parts.dtype).at[jnp.array(target.layers)].set(parts)


def edit_layers(stacked: Any, target: Target, edit: Callable[..., jax.Array], *parts: jax.Array) -> Any:
    """Edits the adapted layers of a stacked parameter, in place where donated.

    One layer at a time: the intermediate results of a whole stack can be larger than the model. Not
    differentiable in a 16-bit ``stacked`` on a CPU.

    Args:
        stacked: [L, ...], an array or a stored weight.
        target: Which layers are adapted.
        edit: Layer [...] and its slices of ``parts`` to the new layer; cast to the dtype of ``stacked``.
        parts: [adapted layers, ...].

    Returns:
        The parameter, held as ``stacked`` is; an array in the place of a stored weight that is not writable.
    """
    numbers = jnp.arange(stacked.shape[0]) if target.layers is None else jnp.array(target.layers)
    dtype, keeps = stacked.dtype, is_stored(stacked) and is_writable(stacked)
    held = stacked if keeps else packed(as_array(stacked))
    kind: Any = type(held) if is_stored(held) else None

    def one(slot: jax.Array, held: Any) -> Any:
        take = partial(lax.dynamic_index_in_dim, index=numbers[slot], keepdims=False)
        old = as_array(jax.tree.map(take, held))
        new = hold(edit(old, *(part[slot] for part in parts)).astype(dtype), kind)
        put = partial(lax.dynamic_update_index_in_dim, index=numbers[slot], axis=0)
        return jax.tree.map(put, held, new)

    edited = lax.fori_loop(0, numbers.size, one, held)
    return edited if keeps else as_array(edited)


class ParametrizationState(NamedTuple):
    """What is checkpointed of an adapter's training beside its parameters."""

    step: jax.Array  # [] int32, steps so far, skipped ones included: the dropout's place in its sequence
    optimizer: Any


@dataclass(frozen=True)
class ParametrizationMethod(Method):
    """Trains adapters of one kind; the model's own parameters stay as they are.

    Attributes:
        objective: The loss.
        tx: Any Optax optimizer.
        kind: The adapters.
        seed: Of their initial parameters and their dropout.
    """

    objective: Objective
    tx: optax.GradientTransformation
    kind: Parametrization
    seed: int = 0

    @classmethod
    def parametrization(cls, config: Any, model: ModelConfig) -> Parametrization:
        """What a run's configuration parametrizes, and how."""
        raise NotImplementedError

    @classmethod
    def from_config(
        cls, config: Any, model: ModelConfig, steps: int, targets: Mapping[str, Target] | None = None
    ) -> "ParametrizationMethod":
        """See ``Method``."""
        del targets
        objective, tx = Objective.from_config(config, model), configured_adamw(config, steps)
        return cls(objective, tx, cls.parametrization(config, model), config.seed)

    def _keys(self) -> jax.Array:
        """[2]: the keys of the initial parameters and of the dropout."""
        return jax.random.split(jax.random.key(self.seed))

    def init(self, params: Params) -> TrainState:
        """See ``Method``."""
        trainable = self.kind.init(self._keys()[0])
        state = ParametrizationState(jnp.zeros((), jnp.int32), self.tx.init(trainable))
        return self.attach(params, trainable, state)

    def tuned(self, state: TrainState) -> Params:
        """See ``Method``: the adapters merged into the weights."""
        return self.kind.merge(state.params, state.trainable)

    def step(
        self, state: TrainState, batch: TokenBatch, *, phase: Phase, reselect: bool
    ) -> tuple[TrainState, Metrics]:
        """See ``Method``; phases mean nothing here. Each micro-batch has a dropout of its own."""
        del phase, reselect
        step, optimizer = state.opt_state
        keys = jax.random.split(jax.random.fold_in(self._keys()[1], step), batch["tokens"].shape[0])

        def loss(trainable: Any, micro: TokenBatch) -> jax.Array:
            params, adapters = self.kind.attach(state.params, trainable, micro["dropout"])
            frozen = params is state.params  # otherwise some of them depend on what is trained
            return self.objective(params, micro, adapters, frozen=frozen)

        state = replace(state, opt_state=optimizer)
        state, metrics = optimizer_step(self.tx, loss, state, {**batch, "dropout": keys})
        return replace(state, opt_state=ParametrizationState(step + 1, state.opt_state)), metrics

    def evaluate(self, state: TrainState, batch: TokenBatch) -> tuple[jax.Array, jax.Array]:
        """See ``Method``; without dropout."""
        params, adapters = self.kind.attach(state.params, state.trainable, None)
        return self.objective(params, batch, adapters, frozen=True), jnp.sum(batch["weights"])

    def changed(self, trained: Any) -> Set[str]:
        """See ``Method``."""
        del trained
        return self.kind.changed

    def merge(self, params: Params, trained: Any) -> Params:
        """See ``Method``."""
        return self.kind.merge(params, trained)

    def spec(self, names: Sequence[str], shape: tuple[int, ...]) -> PartitionSpec | None:
        """See ``Method``: as the parametrization says."""
        return self.kind.spec(names)
