"""What a method of fine-tuning is, and its compiled step: state and batch to state and metrics.

A batch has a leading axis of micro-batches; their gradients are summed in a scan inside the step. The loss
of a step is the mean over its supervised tokens, however they are spread over micro-batches.

A step whose loss or gradient is not finite changes nothing but the count of steps, so that the host, which
knows the phase of a step from its number, stays in agreement with the state.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from spiel_jax.losses.next_token import Objective, Params, TokenBatch, supervised
from spiel_jax.models.axes import logical_axes, param_sharding
from spiel_jax.models.config import ModelConfig
from spiel_jax.models.storage.packed import runs_on_cpu
from spiel_jax.ops.tree import all_finite, parameter_name
from spiel_jax.optim.criteria.criterion import Complaint
from spiel_jax.optim.schedules import Phase
from spiel_jax.sparse.targets import Target

Metrics = dict[str, Any]
"""What a step tells: loss, norm of the gradient, whether both are finite, tokens learnt, ...; scalars.

At a reselection "since" can be a dict: the step since which entries are there to the share of these.
"""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """What a step reads and writes.

    Attributes:
        params: What the model runs with; holds the merged weights of a in-place merge. Those that are not
            trained themselves can be stored weights (see ``models.storage``).
        base: Target name to pretrained entries at the active positions, for targets whose weight holds the
            deltas merged.
        trainable: What the optimizer sees as its parameters.
        opt_state: State of the optimizer.
    """

    params: Params
    base: Params
    trainable: Any
    opt_state: Any


class Method:
    """A method of fine-tuning: what it trains, a step of it, and what of it others need to know.

    What is here is of a method that adds something to frozen weights, and has no kinds of steps. A method
    needs ``from_config``, ``init``, ``tuned``, ``step``, ``evaluate``, ``changed`` and ``merge`` of its own.

    Attributes:
        objective: The loss.
        targets: What has sparse deltas.
        has_deltas: Whether sparse deltas are among what it trains, and a block grid means something to it.
        keeps_base: Whether the model runs with the pretrained weights, which are then held as training
            stores them.
    """

    objective: Objective
    targets: Mapping[str, Target] = MappingProxyType({})
    has_deltas: ClassVar[bool] = False
    keeps_base: ClassVar[bool] = True

    @classmethod
    def complaints(cls, config: Any) -> Iterator[Complaint]:
        """What of a configuration (see ``default_config``) it cannot use."""
        del config
        yield from ()

    @classmethod
    def unused(cls, config: Any) -> Iterable[str]:
        """Keys of a configuration that mean nothing to it, or patterns of them such as ``lora.*``."""
        del config
        return ()

    @classmethod
    def from_config(
        cls, config: Any, model: ModelConfig, steps: int, targets: Mapping[str, Target] | None = None
    ) -> "Method":
        """The method of a run.

        Args:
            config: Checked, its block grid filled in.
            model: Shape of the model.
            steps: Optimizer steps of the run.
            targets: Of a checkpoint that is continued, where they need not be those of the configuration.

        Raises:
            SpielError: If a rule matches nothing, or a number is out of range.
        """
        raise NotImplementedError

    def init(self, params: Params) -> TrainState:
        """State before the first step, from pretrained parameters."""
        raise NotImplementedError

    def tunable(self, state: TrainState) -> int:
        """How many numbers it trains."""
        return sum(leaf.size for leaf in jax.tree.leaves(state.trainable))

    def attach(self, params: Params, trainable: Any, opt_state: Any) -> TrainState:
        """State from pretrained parameters and what a checkpoint holds."""
        return TrainState(params, {}, trainable, opt_state)

    def tuned(self, state: TrainState) -> Params:
        """The tuned model's parameters; some can be stored weights (see ``models.storage``)."""
        raise NotImplementedError

    def pretrained(self, state: TrainState) -> Params | None:
        """The base model's parameters, exactly, stored weights too; None where they are not kept."""
        return state.params

    def step_kind(self, step: int) -> tuple[Phase, bool]:
        """Phase of a step, from 1, and whether it ends with a reselection; what ``step`` is to be given."""
        del step
        return Phase.PLAIN, False

    def step(
        self, state: TrainState, batch: TokenBatch, *, phase: Phase, reselect: bool
    ) -> tuple[TrainState, Metrics]:
        """One optimizer step; batch arrays are [G, B, S]. ``phase`` and ``reselect`` are static."""
        raise NotImplementedError

    def evaluate(self, state: TrainState, batch: TokenBatch) -> tuple[jax.Array, jax.Array]:
        """Summed loss of a batch [B, S] and its number of supervised tokens."""
        raise NotImplementedError

    def changed(self, trained: Any) -> Set[str] | None:
        """Names of the pretrained parameters that ``merge`` changes; None: it needs none of them."""
        raise NotImplementedError

    def merge(self, params: Params, trained: Any) -> Params:
        """Parameters of a plain model from what ``restore_trained`` reads.

        Args:
            params: The pretrained parameters, or only those that change; empty where it needs none.
            trained: Target name to ``SparseDelta``, or what ``trainable`` was.
        """
        raise NotImplementedError

    def beside(self, params: Params, trained: Any) -> Params:
        """As ``merge``; quantised weights stay so, with what was trained beside them, if the method can."""
        return self.merge(params, trained)

    def items(self, state: TrainState) -> dict[str, Any]:
        """What a checkpoint holds, as named parts."""
        return {"trainable": state.trainable, "optimizer": state.opt_state}

    def begun(self, like: TrainState, trained: Any) -> TrainState:
        """A state before the first step with what was trained before; the rest is that of ``like``.

        Args:
            like: From ``init``.
            trained: What ``merge`` takes.
        """
        return replace(like, trainable=trained)

    def restored(self, items: Mapping[str, Any], like: TrainState) -> TrainState:
        """A state with what a checkpoint holds; the rest is that of ``like``."""
        return replace(like, trainable=items["trainable"], opt_state=items["optimizer"])

    def memory(self, state: TrainState) -> dict[str, Any]:
        """The arrays of a state by what they are for: weights, deltas (or what is trained) and optimizer."""
        return {
            "weights": state.params,
            "deltas": [state.trainable, state.base],
            "optimizer": state.opt_state,
        }

    def spec(self, names: Sequence[str], shape: tuple[int, ...]) -> PartitionSpec | None:
        """How an array of what is trained, or of the optimizer's, is spread over the mesh.

        Args:
            names: Keys on the way to it in the state, such as the name of a target.
            shape: Its shape.

        Returns:
            None: like the parameter of its name if it has its rank, else whole on every device.
        """
        del names, shape
        return None

    def shardings(self, state: Any, mesh: Mesh) -> Any:
        """Where the arrays of a training state lie: parameters by the table, what belongs to one like it.

        Args:
            state: A ``TrainState`` of arrays or ``jax.ShapeDtypeStruct``.
            mesh: From ``make_mesh``.

        Returns:
            A tree like ``state`` of ``NamedSharding``.
        """

        def place(path: tuple, leaf: Any) -> NamedSharding:
            names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
            if getattr(path[0], "name", None) != "params":
                spec = self.spec(names, leaf.shape)
                if spec is not None:
                    return NamedSharding(mesh, spec)
            for parameter in map(parameter_name, names):
                axes = logical_axes(parameter)
                if axes is not None and len(leaf.shape) == len(axes):
                    return param_sharding(parameter, leaf.shape, mesh)
            return NamedSharding(mesh, PartitionSpec())

        return jax.tree_util.tree_map_with_path(place, state)


def compiled_step(method: Method, shardings: TrainState) -> Callable[..., tuple[TrainState, Metrics]]:
    """The step of a method as a compiled function that reuses the memory of the state it is given.

    Args:
        method: The method.
        shardings: Where the arrays of the state lie, and stay.

    Returns:
        ``step(state, batch, phase=..., reselect=...)``; one program for each phase.
    """
    return jax.jit(
        lambda state, batch, phase, reselect: method.step(state, batch, phase=phase, reselect=reselect),
        static_argnames=("phase", "reselect"),
        donate_argnums=0,
        out_shardings=(shardings, None),
        compiler_options=compiler_options(),
    )


def compiled_evaluation(method: Method) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """``evaluate`` of a method as a compiled function of a state and a batch."""
    return jax.jit(lambda state, batch: method.evaluate(state, batch), compiler_options=compiler_options())


def compiled_start(
    method: Method, shardings: TrainState
) -> tuple[Callable[[Any], TrainState], Callable[..., TrainState]]:
    """``init`` and ``attach`` of a method as compiled functions that reuse the memory of the parameters.

    Args:
        method: The method.
        shardings: Where the arrays of the state are to lie.

    Returns:
        ``init(params)`` and ``attach(params, trainable, opt_state)``.
    """
    compiled = partial(
        jax.jit, donate_argnums=0, out_shardings=shardings, compiler_options=compiler_options()
    )
    return compiled(lambda params: method.init(params)), compiled(lambda *parts: method.attach(*parts))


def compiler_options() -> dict[str, Any] | None:
    """For ``jax.jit``: where a CPU runs it, let XLA order a program for the least memory.

    By default its CPU backend orders it for concurrency, and a step of a 7B model takes 6 GB more.
    """
    return {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"} if runs_on_cpu() else None


def scan_micro_batches(
    function: Callable[[TokenBatch], tuple[Any, Any]], batch: TokenBatch
) -> tuple[Any, Any]:
    """Sums the first result of ``function`` over micro-batches, and stacks the second.

    Args:
        function: Micro-batch, arrays [B, S], to two pytrees.
        batch: Arrays [G, B, S].
    """
    first = jax.tree.map(lambda x: x[0], batch)
    if batch["tokens"].shape[0] == 1:
        summed, stacked = function(first)
        return summed, jax.tree.map(lambda x: x[None], stacked)
    shapes = jax.eval_shape(function, first)[0]
    initial = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

    def body(total: Any, micro: TokenBatch) -> tuple[Any, Any]:
        summed, other = function(micro)
        return jax.tree.map(jnp.add, total, summed), other

    return lax.scan(body, initial, batch)


def guarded(
    finite: jax.Array,
    change: Callable[[Any, Any], tuple[Any, Any]],
    trainable: Any,
    opt_state: Any,
    *,
    branch: bool = True,
) -> tuple[Any, Any]:
    """``change(trainable, opt_state)`` if finite; otherwise both as they are, but for the count of steps.

    Args:
        finite: Bool scalar.
        change: Gives both after a step.
        trainable: What is trained.
        opt_state: State of its optimizer.
        branch: Whether ``change`` is a branch of the program, or done in any case, and chosen entry by entry
            whether it counts. A branch holds all that it is given, and beside it all that it gives, until it
            is over. But XLA copies statistics of entries to choose between them, and fuses their products and
            sums otherwise.
    """

    def skip(trainable: Any, opt_state: Any) -> tuple[Any, Any]:
        count = optax.tree.get(opt_state, "spiel_count")
        if count is not None:
            opt_state = optax.tree.set(opt_state, spiel_count=count + 1)
        return trainable, opt_state

    def chosen(new: jax.Array, old: jax.Array) -> jax.Array:
        return old if new is old else jnp.where(finite, new, old)

    if branch:
        return lax.cond(finite, change, skip, trainable, opt_state)
    return jax.tree.map(chosen, change(trainable, opt_state), skip(trainable, opt_state))


def optimizer_step(
    tx: optax.GradientTransformation,
    loss: Callable[[Any, TokenBatch], jax.Array],
    state: TrainState,
    batch: TokenBatch,
) -> tuple[TrainState, Metrics]:
    """One step of an ordinary optimizer on all that is trainable.

    Args:
        tx: The optimizer of ``state.opt_state``.
        loss: Trainable and a micro-batch, arrays [B, S], to the loss summed over its supervised tokens.
        state: Before the step.
        batch: Arrays [G, B, S]; further arrays [G, ...] are passed on to ``loss``.

    Returns:
        The state after it, and the metrics; the loss is the mean.
    """
    total = supervised(batch)

    def gradients(micro: TokenBatch) -> tuple[Any, None]:
        return jax.value_and_grad(lambda trainable: loss(trainable, micro) / total)(state.trainable), None

    (mean, grads), _ = scan_micro_batches(gradients, batch)
    norm = optax.tree.norm(grads)
    finite = jnp.isfinite(mean) & jnp.isfinite(norm)

    def change(trainable: Any, opt_state: Any) -> tuple[Any, Any]:
        updates, opt_state = tx.update(grads, opt_state, trainable)
        return optax.apply_updates(trainable, updates), opt_state

    with jax.named_scope("optimizer"):
        trainable, opt_state = guarded(finite, change, state.trainable, state.opt_state)
    metrics = {
        "loss": mean,
        "grad_norm": norm,
        "finite": finite,
        "values_finite": all_finite(trainable),
        "supervised_tokens": jnp.sum(batch["weights"]),
    }
    return replace(state, trainable=trainable, opt_state=opt_state), metrics
