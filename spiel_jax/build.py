"""From a checked config to the objects of a run: learning-rate schedule, optimizer, method."""

from typing import Any

import jax.numpy as jnp
import optax

import spiel_jax.schedules as replacement
from spiel_jax.alias import is_reference
from spiel_jax.config import Config
from spiel_jax.growth import AccumulatedGradients, MomentApproximation
from spiel_jax.models import ModelConfig, abstract_params, layer_names
from spiel_jax.objective import Objective
from spiel_jax.optim import descend, scale_by_aged_adam, scale_by_sparse_sm3
from spiel_jax.schedules import Reselection
from spiel_jax.sparse_training import SparseTraining
from spiel_jax.targets import Target, find_targets
from spiel_jax.training import DenseTraining, Training
from spiel_jax.transform import spiel


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
    """When entries are reselected in a run of so many steps.

    The original implementation replaces everything at the first reselection under "linear" only.
    """
    settings = config.spiel
    reference = is_reference(settings.parity)
    first = None if settings.first < 0 else settings.first
    if reference:
        first = 1.0 if settings.schedule == "linear" else None
    rates = {
        "linear": replacement.linear,
        "cosine": replacement.cosine,
        "constant": replacement.constant,
    }
    return Reselection(
        total_steps=steps,
        every=settings.every,
        accumulation=settings.accumulation,
        rate=rates[settings.schedule](settings.rate),
        first=first,
        long_phases=reference,
    )


def targets(config: Config, model: ModelConfig) -> dict[str, Target]:
    """What is adapted; empty for full fine-tuning.

    Raises:
        ValueError: If a rule matches nothing, or the budget does not fit.
    """
    if config.method == "full":
        return {}
    return find_targets(
        abstract_params(model),
        density=config.targets.density,
        num_tunable=config.targets.num_tunable,
        rules=tuple(config.targets.rules),
        layer_names=lambda name, stack: layer_names(name, stack[0]),
    )


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
    down = descend(rate, settings.weight_decay)
    eps: dict[str, Any] = {} if settings.eps is None else {"eps": settings.eps}
    adam = scale_by_aged_adam(settings.b1, settings.b2, **eps)
    if config.method == "full":
        clip = [] if settings.clip_norm is None else [optax.clip_by_global_norm(settings.clip_norm)]
        adamw = optax.adamw(rate, settings.b1, settings.b2, weight_decay=settings.weight_decay, **eps)
        return DenseTraining(objective, optax.chain(*clip, adamw), jnp.dtype(config.model.dtype))
    reference = is_reference(config.spiel.parity)
    if config.method == "spiel_ag":
        criterion = AccumulatedGradients.reference if reference else AccumulatedGradients
        growth = criterion(settings.b1, settings.b2, config.spiel.candidate_ratio)
        inner = optax.chain(adam, down)
    else:
        growth = MomentApproximation(shared=True)
        inner = optax.chain(scale_by_sparse_sm3(adapted, **eps), down)
    tx = spiel(
        inner,
        adapted,
        growth=growth,
        schedule=schedule,
        seed=config.seed,
        clip_norm=settings.clip_norm,
        clip_candidates=not reference,
    )
    return SparseTraining(objective, tx, adapted, growth, config.spiel.merge == "resident")
