"""Whether a method is as we correct it, or as the original implementation has it."""

from typing import Literal, get_args

from spiel_jax.errors import SpielError

Parity = Literal["corrected", "reference"]
"""Whether a method is corrected, or has every quirk of the original implementation.

The quirks, and the options that have each of them alone:

* A grown entry begins with both of Adam's moments, as in the paper: ``AccumulatedGradients(seeds="both")``.
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
        SpielError: If it is no ``Parity``.
    """
    if parity not in get_args(Parity):
        raise SpielError(f"parity = {parity!r}: expected one of {', '.join(get_args(Parity))}")
    return parity == "reference"
