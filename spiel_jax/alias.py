"""SpIEL-AG and SpIEL-MA as the paper has them: an inner optimizer and its growth criterion."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal, get_args

import jax
import optax

from spiel_jax.growth import AccumulatedGradients, MomentApproximation
from spiel_jax.optim import descend, scale_by_aged_adam, scale_by_sparse_sm3
from spiel_jax.schedules import Reselection
from spiel_jax.targets import Target
from spiel_jax.transform import spiel

Parity = Literal["corrected", "reference"]
"""Whether a method is corrected, or has every quirk of the original implementation.

The quirks, and the options that have each of them alone:

* Candidate gradients come per micro-batch of loss / G, so that seeded moments are G times smaller than the
  step's mean gradient: ``AccumulatedGradients(per_micro_batch=True)``.
* Active entries may be candidates: ``AccumulatedGradients(propose_active=True)``.
* The age of a grown entry is one short at its next step: ``AccumulatedGradients(late_age=True)``.
* Estimation phases after the first have one more step, and begin whether or not a reselection follows:
  ``Reselection(long_phases=True)``.
* Clipping does not reach the candidates: ``spiel(clip_candidates=False)``.
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
        total_steps: Optimizer steps of the run, where no ``schedule`` is given.
        b1: Decay rate of the first moment.
        b2: Decay rate of the second moment.
        eps: Added to the root of the second moment.
        weight_decay: Decay of the values, that is towards the pretrained weights.
        candidate_ratio: Candidates per active entry.
        clip_norm: Global norm for the gradients of active entries and, alike, of candidates.
        seed: Of the initial positions.
        parity: "corrected", or "reference" for the original implementation's behaviour; see ``Parity``.

    Returns:
        A ``GradientTransformationExtraArgs``; see ``spiel``.
    """
    inner = optax.chain(scale_by_aged_adam(b1, b2, eps), descend(learning_rate, weight_decay))
    criterion = AccumulatedGradients.reference if is_reference(parity) else AccumulatedGradients
    growth = criterion(b1, b2, candidate_ratio)
    return spiel(
        inner,
        targets,
        growth=growth,
        schedule=_schedule(schedule, total_steps, parity),
        seed=seed,
        clip_norm=clip_norm,
        clip_candidates=not is_reference(parity),
    )


def spiel_ma(
    learning_rate: optax.ScalarOrSchedule,
    targets: Mapping[str, Target],
    *,
    schedule: Reselection | None = None,
    total_steps: int | None = None,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    clip_norm: float | None = None,
    seed: int | jax.Array = 0,
    parity: Parity = "corrected",
) -> optax.GradientTransformationExtraArgs:
    """SpIEL-MA: sparse SM3, growth by its row and column accumulators.

    Args:
        learning_rate: A number or a schedule. The paper tries 2e-3, 1e-3, 7e-4 and 4e-4.
        targets: What is adapted, from ``find_targets``.
        schedule: When to reselect and how much to replace; default ``Reselection(total_steps)``.
        total_steps: Optimizer steps of the run, where no ``schedule`` is given.
        eps: Added to the moment, inside the root.
        weight_decay: Decay of the values, that is towards the pretrained weights.
        clip_norm: Global norm for the gradients.
        seed: Of the initial positions.
        parity: "corrected", or "reference" for the original implementation's behaviour; see ``Parity``.

    Returns:
        A ``GradientTransformationExtraArgs``; see ``spiel``.
    """
    inner = optax.chain(scale_by_sparse_sm3(targets, eps), descend(learning_rate, weight_decay))
    return spiel(
        inner,
        targets,
        growth=MomentApproximation(shared=True),
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
    return replace(schedule, long_phases=True) if is_reference(parity) else schedule
