"""What a growth criterion of SpIEL answers: where new entries would help.

A criterion keeps its own statistics, apart from those of the inner optimizer, so that any criterion works
around any optimizer. ``spiel`` calls ``observe`` on every step; on a reselection it asks, matrix by matrix
(or block by block), how many entries are ``available`` and which ``incoming`` ones rank highest; then
``seed`` may set fields of the inner optimizer's state at the grown entries.

A criterion that is registered under a name is a method of the trainer: ``config.method`` names it.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, NamedTuple, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from spiel_jax.optim import schedules
from spiel_jax.optim.inner_optimizers import aged_adamw
from spiel_jax.optim.parity import is_reference
from spiel_jax.optim.schedules import Reselection
from spiel_jax.sparse.delta import SparseDelta
from spiel_jax.sparse.targets import Target

Flag = bool | jax.Array
"""True or false, known to the host or traced."""

Complaint = tuple[str, Any, str]
"""A key of the configuration, its value, and what is expected there."""

ORIGINAL = "what the original has, as spiel.parity = 'reference' asks for"


class Observation(NamedTuple):
    """What a step shows to a growth criterion.

    Attributes:
        active: Target name to the active positions (values None), those in force during the step.
        grads: Target name to the gradient at the active positions, as the inner optimizer sees it.
        candidates: Target name to candidate positions and this step's gradients there; None if not given.
        proposes: Whether the candidates are newly proposed.
        estimates: Whether they are observed again.
        inner: State of the inner optimizer after its update.
        watched: Target name to what ``Criterion.watch`` or ``measure`` saw in the step, summed; None if
            nothing was seen.
    """

    active: Mapping[str, SparseDelta]
    grads: Mapping[str, jax.Array]
    candidates: Mapping[str, SparseDelta] | None
    proposes: Flag
    estimates: Flag
    inner: Any
    watched: Mapping[str, jax.Array] | None = None


class Regridding(Protocol):
    """How what belongs to one target moves to another block grid; arrays of the host.

    Attributes:
        old: The target before.
        new: The target after.
    """

    old: Target
    new: Target

    def positions(self, indices: Any, scores: np.ndarray | None = None, room: int | None = None) -> Any:
        """Moves positions [*stack, ..., c]: has the new ``indices()``, and moves arrays like them by a call.

        Args:
            indices: Positions in the old blocks.
            scores: Like ``indices``: where a block has room for fewer, those of largest score are kept.
            room: Positions per new block; default: what the fullest needs.
        """
        ...

    def rows(self, bounds: Any) -> np.ndarray:
        """Upper bounds of the rows of each block, [*stack, ..., R]."""
        ...

    def columns(self, bounds: Any) -> np.ndarray:
        """Upper bounds of the columns of each block, [*stack, ..., C]."""
        ...


class Criterion:
    """A growth criterion. Statistics are a dict: target name to a pytree.

    The leaves of the statistics have the leading axes of the target's values ([*stack, ...]), so that one
    matrix's statistics are one slice of them. What is here is a criterion that keeps none, looks at no
    candidates and seeds nothing: ``incoming`` is all that it lacks.

    A criterion with candidates (``uses_candidates``) gets the gradients of a few entries that are not
    active. The first step of an estimation phase proposes the ``count`` of largest gradient magnitude; in
    those that follow, ``known`` says where gradients are wanted again.

    Attributes:
        propose_active: Whether active entries may be candidates.
        per_micro_batch: Whether candidate gradients come per micro-batch, with a leading axis [G].
        keep_zeros: Whether entries are chosen only where the weight is not zero, so that a pruned base keeps
            its zeros. Candidates are proposed so; what finds entries otherwise looks at the weights.
        salience: By what the largest entries are proposed: gradient and weight, two arrays alike, to scores;
            None for the gradient.
        watch: What is to be seen of a linear in a phase: its inputs [..., in] and weight to an array that is
            summed over micro-batches; None: nothing.
        measures: Whether something of the weight gradients is to be seen in a phase; see ``measure``.

    Example:
        >>> from dataclasses import dataclass
        >>> @dataclass(frozen=True)
        ... class First(Criterion):  # grows the first entries that are not active
        ...     def incoming(self, stats, indices, dropped, n, target):
        ...         free = jnp.ones(target.block_size, bool).at[indices].set(False, mode="drop")
        ...         found = jnp.nonzero(free, size=indices.size, fill_value=target.block_size)[0]
        ...         return jnp.where(jnp.arange(indices.size) < n, found, target.block_size).astype(jnp.int32)
        >>> target = Target((2, 3), 2)
        >>> First().incoming((), jnp.array([0, 4]), jnp.array([True, False]), 1, target).tolist()
        [1, 6]
    """

    propose_active: bool = False
    per_micro_batch: bool = False
    keep_zeros: bool = False
    salience: ClassVar[Callable[..., jax.Array] | None] = None
    watch: ClassVar[Callable[..., jax.Array] | None] = None
    measures: ClassVar[bool] = False
    default_rate: ClassVar[float] = 0.2  # of replacement, where ``spiel.rate`` does not say
    in_original: ClassVar[bool] = False  # whether the original implementation has it
    can_share_budget: ClassVar[bool] = False  # whether it has ``proposals``, of what it grows
    can_keep_zeros: ClassVar[bool] = False  # whether ``keep_zeros`` is a field of it
    reselects_once: ClassVar[bool] = False  # its one phase may then be longer than ``spiel.every``
    own: ClassVar[tuple[str, ...] | None] = None  # keys of the configuration that are of it; None: not said
    unused: ClassVar[tuple[str, ...]] = ()  # further keys, of all criteria, that mean nothing to it

    def __init_subclass__(cls, **arguments: Any):
        super().__init_subclass__(**arguments)
        if "proposals" in vars(cls):
            cls.can_share_budget = True
        elif "incoming" in vars(cls):  # inherited proposals are not of what this one grows
            cls.can_share_budget = False

    @property
    def uses_candidates(self) -> bool:
        """Whether ``update`` must be given candidates on proposing and estimating steps."""
        return False

    @property
    def uses_weights(self) -> bool:
        """Whether ``update`` must be given the weights where it ends with a reselection."""
        return False

    def count(self, target: Target) -> int:
        """Candidates of one matrix (or block); asked of criteria that use candidates."""
        raise NotImplementedError(f"{type(self).__name__} uses candidates, but has no count()")

    def known(self, stats: Any) -> jax.Array:
        """Positions [*stack, ..., c] of one target's candidates; asked of criteria that use candidates."""
        raise NotImplementedError(f"{type(self).__name__} uses candidates, but has no known()")

    def measure(self, gradient: jax.Array, block: tuple[int, int]) -> jax.Array:
        """What is to be seen of a weight gradient, summed over micro-batches; asked where ``measures``.

        Args:
            gradient: [R, C] float32, of some of the blocks, that of one micro-batch.
            block: (rows, columns) of one block.

        Returns:
            [R / rows, C / columns, S] float32: S numbers of each block.
        """
        raise NotImplementedError(f"{type(self).__name__} measures, but has no measure()")

    def init(self, targets: Mapping[str, Target], values: Mapping[str, jax.Array]) -> dict[str, Any]:
        """Statistics before the first step."""
        del values
        return dict.fromkeys(targets, ())

    def observe(self, stats: dict[str, Any], seen: Observation) -> dict[str, Any]:
        """Statistics after a step."""
        del seen
        return stats

    def survey(self, stats: dict[str, Any], weights: Any, targets: Mapping[str, Target]) -> dict[str, Any]:
        """What a reselection looks at in the place of the statistics; asked once, before its matrices.

        Args:
            stats: The statistics.
            weights: Pytree of the weights as they are before the step, deltas merged; stored ones too.
            targets: What is adapted.
        """
        del weights, targets
        return stats

    def available(self, stats: Any, indices: jax.Array, target: Target) -> jax.Array | int:
        """How many entries of one matrix could be grown, given its active positions [k].

        ``target.block_size`` marks unused slots among them, here and in ``incoming``.
        """
        del stats
        return target.block_size - jnp.sum(indices < target.block_size, dtype=jnp.int32)

    def incoming(
        self, stats: Any, indices: jax.Array, dropped: jax.Array, n: jax.Array, target: Target
    ) -> jax.Array:
        """Positions [slots] of the n entries to grow, and ``target.block_size`` in unused slots.

        A position that is active and not dropped must not be among them.
        """
        raise NotImplementedError(f"{type(self).__name__} has no incoming()")

    def proposals(
        self, stats: Any, indices: jax.Array, dropped: jax.Array, target: Target
    ) -> tuple[jax.Array, jax.Array]:
        """All that could be grown, where one budget is shared: asked of criteria that ``can_share_budget``.

        Returns:
            Positions [C] int32, and scores [C] by which matrices are compared: non-negative floats, NaN
            where a position cannot grow. C is static, and the k best must be among them. A position that is
            active and not dropped cannot grow.
        """
        raise NotImplementedError(f"{type(self).__name__} has no proposals()")

    def seed(self, stats: Any, source: jax.Array) -> dict[str, jax.Array]:
        """Fields of the inner state of grown entries: name to [k]. May be empty.

        ``source`` [k] is the slot of ``incoming``, or of ``proposals``, that each replaced slot took; what is
        returned for the other slots is not used.
        """
        del stats, source
        return {}

    def seed_at(
        self, stats: Any, source: jax.Array, indices: jax.Array, target: Target
    ) -> dict[str, jax.Array]:
        """As ``seed``, which it asks by default, where it matters where the grown entries are.

        Args:
            stats: Those of one matrix.
            source: See ``seed``.
            indices: [k] positions after the reselection.
            target: What is adapted.
        """
        del indices, target
        return self.seed(stats, source)

    def first_age(self, accumulation: int) -> int:
        """The age, in an inner optimizer that keeps one, that a grown entry begins with.

        Args:
            accumulation: Steps of an estimation phase.
        """
        del accumulation
        return 0

    def clear(self, stats: dict[str, Any], targets: Mapping[str, Target]) -> dict[str, Any]:
        """Statistics after a reselection."""
        del targets
        return stats

    def regrid(self, stats: Any, move: Regridding) -> Any:
        """One target's statistics for another block grid, arrays of the host.

        Raises:
            NotImplementedError: If the criterion has statistics and does not say how they move.
        """
        del move
        if jax.tree.leaves(stats):
            raise NotImplementedError(f"{type(self).__name__} has no regrid()")
        return stats

    # What follows makes a criterion a method of the trainer. ``config`` has the keys of ``default_config``.

    @classmethod
    def from_config(cls, config: Any) -> "Criterion":
        """The criterion as a run's configuration asks for it."""
        del config
        return cls()

    @classmethod
    def complaints(cls, config: Any) -> Iterator[Complaint]:
        """What of the configuration it cannot use, though each key is within its bounds."""
        settings = config.spiel
        every, accumulation, first = settings.every, settings.accumulation, settings.first
        reference = settings.parity == "reference"
        idle = cls.reselects_once or "spiel.accumulation" in cls.unused
        if not (accumulation <= every or reference or idle):
            yield "spiel.accumulation", accumulation, f"1 to spiel.every = {every}"
        if cls.reselects_once and config.steps is not None and accumulation > config.steps:
            # its entries would stay random
            room = f"at most {config.steps}, the steps there are"
            expected = f"{room}: {config.method} chooses its entries after so many"
            yield "spiel.accumulation", accumulation, expected
        adapter = config.init_from.adapter
        if adapter is not None and (cls.reselects_once or cls.start(config) is not None):
            yield "init_from.adapter", adapter, f"unset: {config.method} chooses its own entries"
        if reference and not cls.in_original:
            yield "method", config.method, f"a method of SpIEL: {ORIGINAL}"
        if reference and settings.drop_by != "value":
            yield "spiel.drop_by", settings.drop_by, f"value: {ORIGINAL}"
        if reference and first is not None:
            yield "spiel.first", first, f"unset: {ORIGINAL}"
        if reference and settings.schedule == "constant":
            yield "spiel.schedule", settings.schedule, f"linear or cosine: {ORIGINAL}"
        spare = config.targets.spare
        if spare and not cls.can_share_budget:
            yield "targets.spare", spare, f"0: {config.method} does not compare entries of different weights"
        if spare and adapter is not None:
            yield "targets.spare", spare, "0: the entries of an adapter are where they are"
        if spare and reference:
            yield "targets.spare", spare, f"0: {ORIGINAL}"
        if settings.keep_zeros and not cls.can_keep_zeros:
            yield "spiel.keep_zeros", True, f"False: {config.method} may choose entries that are zero"
        if settings.keep_zeros and adapter is not None:
            expected = "unset: the entries of an adapter are where they are (spiel.keep_zeros)"
            yield "init_from.adapter", adapter, expected
        if settings.candidates == "mean" and cls.salience is not None:
            expected = f"first: {config.method} proposes by a score that is not a sum over micro-batches"
            yield "spiel.candidates", "mean", expected
        if reference and settings.candidates != "first":
            yield "spiel.candidates", settings.candidates, f"first: {ORIGINAL}"
        if reference and settings.seeds not in (None, "both"):
            yield "spiel.seeds", settings.seeds, f"both: {ORIGINAL}"
        if reference and settings.keep_zeros:
            yield "spiel.keep_zeros", True, f"False: {ORIGINAL}"
        if reference and settings.candidate_ratio != 1:
            yield "spiel.candidate_ratio", settings.candidate_ratio, f"1: {ORIGINAL}"

    @classmethod
    def schedule(cls, config: Any, steps: int) -> Reselection:
        """When a run of so many steps reselects; by default everything is replaced first, as in SpIEL.

        Entries that come from an adapter (``init_from``) are not random, and are not all replaced.
        """
        first = 1.0 if config.init_from.adapter is None else None
        return configured_schedule(config.spiel, steps, first, cls.default_rate)

    @classmethod
    def optimizer(
        cls, config: Any, rate: optax.Schedule, targets: Mapping[str, Target]
    ) -> optax.GradientTransformation:
        """The inner optimizer of a run; by default Adam with an age per entry."""
        del targets
        settings = config.optimizer
        return aged_adamw(
            rate,
            settings.b1,
            settings.b2,
            weight_decay=settings.weight_decay,
            low_precision=is_reference(config.spiel.parity),
            **({} if settings.eps is None else {"eps": settings.eps}),
        )

    @classmethod
    def start(cls, config: Any) -> Callable[..., Mapping[str, SparseDelta]] | None:
        """Pretrained parameters and targets to the positions to start from; None for random ones."""
        del config
        return None


Growth = Criterion
"""Earlier name of ``Criterion``."""

C = TypeVar("C", bound=type[Criterion])

CRITERIA: dict[str, type[Criterion]] = {}
"""Name, as ``config.method`` has it, to criterion."""


def register(name: str) -> Callable[[C], C]:
    """Makes a criterion a method of the trainer.

    Args:
        name: What ``config.method`` calls it.

    Raises:
        ValueError: If another one has the name.

    Example:
        >>> @register("docs_example")
        ... class Example(Criterion): ...
        >>> CRITERIA.pop("docs_example").__name__
        'Example'
    """

    def add(criterion: C) -> C:
        if CRITERIA.setdefault(name, criterion) is not criterion:
            raise ValueError(f"a criterion is registered as {name!r} already: {CRITERIA[name].__name__}")
        return criterion

    return add


def unused_keys(criterion: type[Criterion]) -> tuple[str, ...]:
    """Keys of the configuration that mean nothing to a criterion: those of others, if it says its own."""
    if criterion.own is None:
        return criterion.unused
    owned = dict.fromkeys(key for other in CRITERIA.values() for key in other.own or ())
    return (*criterion.unused, *(key for key in owned if key not in criterion.own))


def configured_schedule(settings: Any, steps: int, first: float | None, rate: float) -> Reselection:
    """The schedule that ``config.spiel`` describes.

    Args:
        settings: That section.
        steps: Optimizer steps of the run.
        first: Rate of the first reselection where the section does not say; None: as the others.
        rate: Replacement rate where it does not say.
    """
    rates = {"linear": schedules.linear, "cosine": schedules.cosine, "constant": schedules.constant}
    first = first if settings.first is None else settings.first
    rate = rate if settings.rate is None else settings.rate
    schedule = Reselection(
        total_steps=steps,
        every=settings.every,
        accumulation=settings.accumulation,
        rate=rates[settings.schedule](rate),
        first=None if first is None or first < 0 else first,
        long_phases=is_reference(settings.parity),
    )
    return schedule.original() if is_reference(settings.parity) else schedule
