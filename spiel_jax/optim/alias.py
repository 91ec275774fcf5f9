"""SpIEL-AG and SpIEL-MA as the paper has them: an inner optimizer and its growth criterion."""

from collections.abc import Mapping
from typing import Literal, get_args

import jax
import optax

from spiel_jax.optim.criteria.accumulated_gradients import AccumulatedGradients
from spiel_jax.optim.criteria.moment_approximation import MomentApproximation, Score
from spiel_jax.optim.inner_optimizers import aged_adamw, sparse_sm3
from spiel_jax.optim.schedules import Reselection, require_static
from spiel_jax.optim.spiel import spiel
from spiel_jax.sparse.targets import Target

Parity = Literal["corrected", "reference"]
"""Whether a method is corrected, or has every quirk of the original implementation.

The quirks, and the options that have each of them alone:

* Candidate gradients come per micro-batch of loss / G, so that seeded moments are G times smaller than the
  step's mean gradient: ``AccumulatedGradients(per_micro_batch=True)``.
* Clipping does not reach the candidates: ``spiel(clip_candidates=False)``.
* Active entries may be candidates: ``AccumulatedGradients(propose_active=True)``.
* Estimation phases after the first have one more step; A = R - 1 divides by zero, and A >= R never
  reselects: ``Reselection(long_phases=True)``.
* Phases begin whether or not a reselection follows: ``Reselection(idle_phases=True)``.
* The age of a grown entry is one short at its next step: ``AccumulatedGradients(late_age=True)``.
* Statistics, seeds, moments and ages in the precision of the values:
  ``AccumulatedGradients(low_precision=True)``, ``scale_by_aged_adam(low_precision=True)``.
* Everything is replaced first under "linear" only: ``Reselection.first``.

"reference" also refuses what the original does not have: another number of candidates than of active
entries, another score than the product.
"""


def is_reference(parity: str) -> bool:
    """Whether ``parity`` asks for the original's behaviour.

    Raises:
        ValueError: If it is no ``Parity``.
    """
    if parity not in get_args(Parity):
        raise ValueError(f"parity = {parity!r}: expected one of {', '.join(get_args(Parity))}")
    return parity == "reference"


def spiel_ag(
    learning_rate: optax.ScalarOrSchedule,
    targets: Mapping[str, Target],
    *,
    schedule: Reselection | None = None,
    total_steps: int | None = None,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-6,
    weight_decay: float = 0.0,
    candidate_ratio: float = 1.0,
    clip_norm: float | None = None,
    seed: int | jax.Array = 0,
    parity: Parity = "corrected",
) -> optax.GradientTransformationExtraArgs:
    """SpIEL-AG: Adam with an age per entry, growth by accumulated gradients.

    Args:
        learning_rate: A number or a schedule. The paper tries 1e-4, 3e-5, 1e-5 and 3e-6.
        targets: What is adapted, from ``find_targets``.
        schedule: When to reselect and how much to replace; default ``Reselection(total_steps)``.
        total_steps: Optimizer steps of the run, where no ``schedule`` is given; static.
        b1: Decay rate of the first moment.
        b2: Decay rate of the second moment.
        eps: Added to the root of the second moment.
        weight_decay: Decay of the values, that is towards the pretrained weights.
        candidate_ratio: Candidates per active entry; static.
        clip_norm: Global norm for the gradients of active entries and, alike, of candidates.
        seed: Of the initial positions.
        parity: "corrected", or "reference" for the original implementation's behaviour; see ``Parity``.

    Returns:
        A ``GradientTransformationExtraArgs``; see ``spiel``. Under ``optax.inject_hyperparams`` the static
        numbers are named in ``static_args``, also where they are left at their defaults; learning rate,
        decays, eps, clip norm and seed need not be. With bfloat16 values give it
        ``hyperparam_dtype=jnp.float32``.

    Raises:
        ValueError: If a value is not allowed, or both or none of ``schedule`` and ``total_steps`` are given.
        TypeError: If a number is traced that must be static.
    """
    reference = is_reference(parity)
    return spiel(
        aged_adamw(learning_rate, b1, b2, eps, weight_decay, low_precision=reference),
        targets,
        growth=accumulated_gradients(b1, b2, candidate_ratio, parity),
        schedule=_schedule(schedule, total_steps, parity),
        seed=seed,
        clip_norm=clip_norm,
        clip_candidates=not reference,
    )


def accumulated_gradients(
    b1: float, b2: float, candidate_ratio: float, parity: Parity
) -> AccumulatedGradients:
    """The growth criterion of SpIEL-AG.

    Raises:
        ValueError: If the original has no such criterion and ``parity`` asks for it.
        TypeError: If the ratio is not static.
    """
    require_static(candidate_ratio=candidate_ratio)
    if candidate_ratio <= 0:
        raise ValueError(f"candidate_ratio = {candidate_ratio}: expected more than 0")
    if not is_reference(parity):
        return AccumulatedGradients(b1, b2, candidate_ratio)
    if candidate_ratio != 1:
        raise ValueError(
            f"candidate_ratio = {candidate_ratio}: the original has as many candidates as active entries, so "
            'parity="reference" needs 1'
        )
    return AccumulatedGradients.reference(b1, b2)


def moment_approximation(score: Score, parity: Parity) -> MomentApproximation:
    """The growth criterion of SpIEL-MA, on the accumulators of sparse SM3.

    Raises:
        ValueError: If the score is unknown, or the original does not have it and ``parity`` asks for it.
    """
    if score not in get_args(Score):
        raise ValueError(f"score = {score!r}: expected one of {', '.join(get_args(Score))}")
    if is_reference(parity) and score != "product":
        raise ValueError(f'score = {score!r}: the original ranks by the product, so parity="reference" does')
    return MomentApproximation(score, shared=True)


def spiel_ma(
    learning_rate: optax.ScalarOrSchedule,
    targets: Mapping[str, Target],
    *,
    schedule: Reselection | None = None,
    total_steps: int | None = None,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    score: Score = "product",
    clip_norm: float | None = None,
    seed: int | jax.Array = 0,
    parity: Parity = "corrected",
) -> optax.GradientTransformationExtraArgs:
    """SpIEL-MA: sparse SM3, growth by its row and column accumulators.

    Args:
        learning_rate: A number or a schedule. The paper tries 2e-3, 1e-3, 7e-4 and 4e-4.
        targets: What is adapted, from ``find_targets``.
        schedule: When to reselect and how much to replace; default ``Reselection(total_steps)``.
        total_steps: Optimizer steps of the run, where no ``schedule`` is given; static.
        eps: Added to the moment, inside the root.
        weight_decay: Decay of the values, that is towards the pretrained weights.
        score: What ranks an entry to grow, of its row's and its column's accumulator: "product" or "minimum".
        clip_norm: Global norm for the gradients.
        seed: Of the initial positions.
        parity: "corrected", or "reference" for the original implementation's behaviour; see ``Parity``.

    Returns:
        A ``GradientTransformationExtraArgs``; see ``spiel``. Under ``optax.inject_hyperparams`` the static
        numbers are named in ``static_args``, also where they are left at their defaults; learning rate,
        decays, eps, clip norm and seed need not be. With bfloat16 values give it
        ``hyperparam_dtype=jnp.float32``.

    Raises:
        ValueError: If a value is not allowed, or both or none of ``schedule`` and ``total_steps`` are given.
        TypeError: If a number is traced that must be static.
    """
    return spiel(
        sparse_sm3(learning_rate, targets, eps, weight_decay),
        targets,
        growth=moment_approximation(score, parity),
        schedule=_schedule(schedule, total_steps, parity),
        seed=seed,
        clip_norm=clip_norm,
    )


def _schedule(schedule: Reselection | None, total_steps: int | None, parity: Parity) -> Reselection:
    if (schedule is None) == (total_steps is None):
        raise ValueError("give schedule or total_steps, one of them")
    if schedule is None:
        assert total_steps is not None
        schedule = Reselection(total_steps)
    return schedule.original() if is_reference(parity) else schedule
