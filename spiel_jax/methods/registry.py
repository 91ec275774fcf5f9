"""From a checked config to the objects of a run: learning-rate schedule, optimizer, method."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import jax.numpy as jnp
import optax
from jax.sharding import Mesh

import spiel_jax.optim.schedules as replacement
from spiel_jax.config import SPARSE, Config, flatten
from spiel_jax.distributed.mesh import check_mesh
from spiel_jax.losses.next_token import Objective
from spiel_jax.methods.full import DenseTraining
from spiel_jax.methods.ia3 import IA3
from spiel_jax.methods.lora import Lora
from spiel_jax.methods.method import Training
from spiel_jax.methods.parametrization import AdapterKind, AdapterTraining, adapted
from spiel_jax.methods.sparse import SparseTraining
from spiel_jax.models import ModelConfig, abstract_params, layer_names
from spiel_jax.models.axes import weight_axes, weight_grid
from spiel_jax.ops.tree import parameter_name
from spiel_jax.optim.alias import accumulated_gradients, is_reference, moment_approximation
from spiel_jax.optim.criteria.accumulated_gradients import AccumulatedGradients
from spiel_jax.optim.criteria.criterion import Growth
from spiel_jax.optim.criteria.random import RandomGrowth
from spiel_jax.optim.criteria.static import NoGrowth, magnitude_positions
from spiel_jax.optim.inner_optimizers import aged_adamw, sparse_sm3
from spiel_jax.optim.schedules import Reselection
from spiel_jax.optim.spiel import spiel
from spiel_jax.sparse.targets import Target, find_targets


def learning_rate(config: Config, steps: int) -> optax.Schedule:
    """Warm-up to the peak over a share of the steps, then the chosen decay.

    The first step already has ``peak / warmup_steps``: a rate of 0 would waste it.
    """
    settings = config.optimizer
    peak, warmup = settings.learning_rate, round(settings.warmup * steps)
    rest = max(steps - warmup, 1)
    after = {
        "linear": lambda: optax.linear_schedule(peak, 0.0, rest),
        "cosine": lambda: optax.cosine_decay_schedule(peak, rest),
        "constant": lambda: optax.constant_schedule(peak),
    }[settings.schedule]()
    if warmup == 0:
        return after
    rise = optax.linear_schedule(peak / warmup, peak, max(warmup - 1, 1))
    return optax.join_schedules([rise, after], [warmup])


def reselection(config: Config, steps: int) -> Reselection:
    """When entries are reselected in a run of so many steps; never for a static mask."""
    settings = config.spiel
    if config.method == "magnitude":
        return Reselection(steps, rate=replacement.constant(0.0), first=None)
    if config.method == "gradient":  # once, at the end of the first phase
        every = max(steps, settings.accumulation)
        return Reselection(steps, every, settings.accumulation, replacement.constant(0.0), first=1.0)
    first = settings.first
    if first is None and config.method != "random":
        first = 1.0
    rates = {
        "linear": replacement.linear,
        "cosine": replacement.cosine,
        "constant": replacement.constant,
    }
    schedule = Reselection(
        total_steps=steps,
        every=settings.every,
        accumulation=settings.accumulation,
        rate=rates[settings.schedule](settings.rate),
        first=None if first is None or first < 0 else first,
        long_phases=is_reference(settings.parity),
    )
    return schedule.original() if is_reference(settings.parity) else schedule


def targets(config: Config, model: ModelConfig) -> dict[str, Target]:
    """What has sparse deltas; empty for methods that train none.

    Raises:
        ValueError: If a rule matches nothing, or the budget does not fit.
    """
    if config.method not in SPARSE:
        return {}
    blocks = {axis: number or 1 for axis, number in config.targets.grid.items()}
    found = find_targets(
        abstract_params(model),
        density=config.targets.density,
        num_tunable=config.targets.num_tunable,
        rules=tuple(config.targets.rules),
        grid=partial(weight_grid, blocks=blocks),
        layer_names=lambda name, stack: layer_names(name, stack[0]),
    )
    return with_axes(found)


def check_layout(config: Config, model: ModelConfig, mesh: Mesh) -> None:
    """Makes sure that a mesh divides the model, and the block grid where the method has sparse deltas.

    Args:
        config: With its block grid filled in.
        model: Shape of the model.
        mesh: From ``make_mesh``.

    Raises:
        ValueError: See ``check_mesh``.
    """
    check_mesh(model, mesh, config.targets.grid if config.method in SPARSE else mesh.shape)


def with_axes(targets: Mapping[str, Target]) -> dict[str, Target]:
    """The targets with the mesh axes of their weights, where they have a block grid."""
    return {
        name: target if target.grid == (1, 1) else replace(target, axes=weight_axes(parameter_name(name)))
        for name, target in targets.items()
    }


def training(
    config: Config,
    model: ModelConfig,
    adapted: dict[str, Target],
    schedule: Reselection,
    rate: optax.Schedule,
) -> Training:
    """The method that the config names, ready to ``init`` and ``step``."""
    objective = Objective(model, config.model.remat, config.model.loss_chunk)
    settings = config.optimizer
    eps: dict[str, Any] = {} if settings.eps is None else {"eps": settings.eps}
    if config.method not in SPARSE:
        clip = [] if settings.clip_norm is None else [optax.clip_by_global_norm(settings.clip_norm)]
        adamw = optax.adamw(rate, settings.b1, settings.b2, weight_decay=settings.weight_decay, **eps)
        tx, kind = optax.chain(*clip, adamw), adapter_kind(flatten(config), model)
        if kind is None:
            return DenseTraining(objective, tx, jnp.dtype(config.model.dtype))
        return AdapterTraining(objective, tx, kind, config.seed)
    reference = is_reference(config.spiel.parity)
    start = None
    if config.method == "magnitude":
        largest = config.spiel.magnitude == "largest"
        start = partial(magnitude_positions, targets=adapted, largest=largest)
    if config.method == "spiel_ma":
        inner = sparse_sm3(rate, adapted, weight_decay=settings.weight_decay, **eps)
    else:
        inner = aged_adamw(
            rate,
            settings.b1,
            settings.b2,
            weight_decay=settings.weight_decay,
            low_precision=reference,
            **eps,
        )
    growth = criterion(config)
    tx = spiel(
        inner,
        adapted,
        growth=growth,
        schedule=schedule,
        seed=config.seed,
        clip_norm=settings.clip_norm,
        clip_candidates=not reference,
    )
    return SparseTraining(objective, tx, adapted, growth, config.spiel.merge == "resident", start)


def criterion(config: Config) -> Growth:
    """What chooses the entries to grow."""
    settings, optimizer = config.spiel, config.optimizer
    match config.method:
        case "spiel_ag":
            return accumulated_gradients(
                optimizer.b1, optimizer.b2, settings.candidate_ratio, settings.parity
            )
        case "spiel_ma":
            return moment_approximation(settings.score, settings.parity)
        case "random":
            return RandomGrowth(config.seed)
        case "magnitude":
            return NoGrowth()
        case "gradient":
            return AccumulatedGradients(ratio=settings.candidate_ratio, seeds=False, propose_active=True)
    raise ValueError(f"method = {config.method!r}: expected one of {', '.join(SPARSE)}")


def adapter_kind(settings: Mapping[str, Any], model: ModelConfig) -> AdapterKind | None:
    """The kind of adapter that a run trains; None if its method trains none.

    Args:
        settings: The run's configuration, dotted key to value; that of a checkpoint too.
        model: Shape of the model.

    Raises:
        ValueError: If a rule matches nothing, or a number is out of range.
    """
    rules = settings["targets.rules"]
    if settings["method"] == "lora":
        names = ("rank", "alpha", "dropout", "rslora")
        return Lora(adapted(model, rules), **{name: settings[f"lora.{name}"] for name in names})
    if settings["method"] == "ia3":
        return IA3.matching(model, rules)
    return None
