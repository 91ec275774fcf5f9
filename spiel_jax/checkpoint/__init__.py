"""Orbax checkpoints of a run: what was trained and all that is needed to continue. Never the base model.

A checkpoint holds the deltas (readable alone: ``restore_deltas``), the optimizer's state, and as JSON the
step, the position in the data, the config, the targets, a fingerprint of the base weights and a digest of
every array. Positions are saved in the order of their slots, so that a continued run is the uninterrupted one
bit for bit.
"""

from spiel_jax.checkpoint.metadata import (
    FOLDER,
    CheckpointError,
    Damaged,
    SaveFailed,
    Step,
    stored_targets,
)
from spiel_jax.checkpoint.reading import (
    newest_metadata,
    read_metadata,
    restore_deltas,
    restore_state,
    restore_trainable,
    restore_trained,
)
from spiel_jax.checkpoint.saving import SET_ASIDE, Checkpoints, set_aside

read_facts = read_metadata
"""Earlier name of ``read_metadata``."""

__all__ = [
    "FOLDER",
    "SET_ASIDE",
    "CheckpointError",
    "Checkpoints",
    "Damaged",
    "SaveFailed",
    "Step",
    "newest_metadata",
    "read_facts",
    "read_metadata",
    "restore_deltas",
    "restore_state",
    "restore_trainable",
    "restore_trained",
    "set_aside",
    "stored_targets",
]
