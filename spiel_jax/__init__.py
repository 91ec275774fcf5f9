"""Sparse fine-tuning of large language models in JAX.

The names here are the library's core: they need only JAX and Optax, and work on any pytree of parameters.
Models, data, training and checkpoints are in the submodules.
"""

from importlib import metadata as _metadata

from spiel_jax.optim.alias import spiel_ag, spiel_ma
from spiel_jax.optim.criteria.accumulated_gradients import AccumulatedGradients
from spiel_jax.optim.criteria.criterion import Criterion, Growth, Observation, register
from spiel_jax.optim.criteria.moment_approximation import MomentApproximation
from spiel_jax.optim.criteria.random import RandomGrowth
from spiel_jax.optim.criteria.static import NoGrowth, magnitude_positions
from spiel_jax.optim.inner_optimizers import aged_adamw, scale_by_aged_adam, scale_by_sparse_sm3, sparse_sm3
from spiel_jax.optim.positions import deltas, place
from spiel_jax.optim.schedules import Phase, Reselection, constant, cosine, linear
from spiel_jax.optim.spiel import SpielState, spiel
from spiel_jax.sparse.delta import SparseDelta, base_entries, gather, merge, unmerge
from spiel_jax.sparse.linear import SparseLinear, propose, sparse_linear
from spiel_jax.sparse.targets import Rule, Target, find_targets, zeros

__all__ = [
    "AccumulatedGradients",
    "Criterion",
    "Growth",
    "MomentApproximation",
    "NoGrowth",
    "Observation",
    "Phase",
    "RandomGrowth",
    "Reselection",
    "Rule",
    "SparseDelta",
    "SparseLinear",
    "SpielState",
    "Target",
    "aged_adamw",
    "base_entries",
    "constant",
    "cosine",
    "deltas",
    "find_targets",
    "gather",
    "linear",
    "magnitude_positions",
    "merge",
    "place",
    "propose",
    "register",
    "scale_by_aged_adam",
    "scale_by_sparse_sm3",
    "sparse_linear",
    "sparse_sm3",
    "spiel",
    "spiel_ag",
    "spiel_ma",
    "unmerge",
    "zeros",
]

try:
    __version__ = _metadata.version("spiel_jax")
except _metadata.PackageNotFoundError:  # a source tree that is not installed
    __version__ = "0+unknown"
