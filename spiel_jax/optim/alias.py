"""SpIEL-AG and SpIEL-MA as the paper has them: an inner optimizer and its growth criterion."""

from collections.abc import Mapping

import jax
import optax

from spiel_jax.optim.criteria.accumulated_gradients import AccumulatedGradients, Seeds
from spiel_jax.optim.criteria.moment_approximation import MomentApproximation, Score
from spiel_jax.optim.inner_optimizers import aged_adamw, sparse_sm3
from spiel_jax.optim.parity import Parity, is_reference
from spiel_jax.optim.schedules import Reselection
from spiel_jax.optim.spiel import spiel
from spiel_jax.sparse.targets import Target


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
    seeds: Seeds | None = None,
    clip_norm: float | None = None,
    seed: int | jax.Array = 0,
    parity: Parity = "corrected",
) -> optax.GradientTransformationExtraArgs:
    """SpIEL-AG: Adam with an age per entry, growth by accumulated gradients (SpIEL, algorithm 1).

    But for the seeds: algorithm 1 has ``seeds="both"``.

    A reselection drops the n entries of smallest ``|value|`` of each matrix and grows the n candidates whose
    gradients, summed over the estimation phase, are largest: see ``AccumulatedGradients``, and
    ``scale_by_aged_adam`` for the step.

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
        seeds: What a grown entry begins with of Adam's moments, see ``Seeds``; default: "second", and "both"
            as the original implementation.
        clip_norm: Global norm for the gradients of active entries and, alike, of candidates.
        seed: Of the initial positions.
        parity: "corrected", or "reference" for the original implementation's behaviour; see ``Parity``.

    Returns:
        A ``GradientTransformationExtraArgs``; see ``spiel``. Under ``optax.inject_hyperparams`` the static
        numbers are named in ``static_args``, also where they are left at their defaults; learning rate,
        decays, eps, clip norm and seed need not be. With bfloat16 values give it
        ``hyperparam_dtype=jnp.float32``.

    Raises:
        SpielError: If a value is not allowed.
        ValueError: If both or none of ``schedule`` and ``total_steps`` are given.
        TypeError: If a number is traced that must be static.

    Example:
        >>> import jax.numpy as jnp
        >>> import spiel_jax as sj
        >>> targets = {"w": Target((2, 2), 2)}
        >>> tx, values = spiel_ag(0.1, targets, schedule=Reselection(9, accumulation=1)), sj.zeros(targets)
        >>> state = sj.place(tx.init(values), {"w": targets["w"].delta(jnp.array([0, 2]))})
        >>> dense = {"w": jnp.array([[0.0, -2.0], [0.0, 3.0]])}  # gradient of the whole weight
        >>> candidates = sj.propose(dense, sj.deltas(values, state), {"w": 2})
        >>> updates, state = tx.update({"w": jnp.zeros(2)}, state, values, candidates=candidates)
        >>> sorted(sj.deltas(values, state)["w"].indices.tolist())  # where gradients are largest
        [1, 3]
    """
    reference = is_reference(parity)
    return spiel(
        aged_adamw(learning_rate, b1, b2, eps, weight_decay, low_precision=reference),
        targets,
        growth=AccumulatedGradients.of(b1, b2, candidate_ratio, parity, seeds),
        schedule=_schedule(schedule, total_steps, parity),
        seed=seed,
        clip_norm=clip_norm,
        clip_candidates=not reference,
    )


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
    """SpIEL-MA: sparse SM3, growth by its row and column accumulators (SpIEL, algorithm 2).

    A reselection drops the n entries of smallest ``|value|`` of each matrix and grows the n others whose row
    and column accumulators have the largest product: see ``MomentApproximation``, and ``scale_by_sparse_sm3``
    for the step. It needs no more than the gradients of the active entries.

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
        SpielError: If a value is not allowed.
        ValueError: If both or none of ``schedule`` and ``total_steps`` are given.
        TypeError: If a number is traced that must be static.

    Example:
        >>> import jax.numpy as jnp
        >>> import spiel_jax as sj
        >>> targets = {"w": Target((2, 3), 2)}
        >>> tx, values = spiel_ma(0.1, targets, schedule=Reselection(9, accumulation=1)), sj.zeros(targets)
        >>> state = sj.place(tx.init(values), {"w": targets["w"].delta(jnp.array([0, 5]))})
        >>> updates, state = tx.update({"w": jnp.array([3.0, 1.0])}, state, values)
        >>> sorted(sj.deltas(values, state)["w"].indices.tolist())  # rows have 9, 1 now, columns 9, 0, 1
        [2, 3]
    """
    return spiel(
        sparse_sm3(learning_rate, targets, eps, weight_decay),
        targets,
        growth=MomentApproximation.of(score, parity),
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
