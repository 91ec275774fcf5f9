"""Which checkpoints a run has, and the JSON part of each: sealed, so that changes are noticed."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from spiel_jax.errors import SpielError
from spiel_jax.places import local_path
from spiel_jax.sparse.targets import Target

FOLDER = "checkpoints"
"""Name of the folder of checkpoints in a run's folder."""

Step = int | Literal["best"] | None
"""Which checkpoint: a step, the one of the lowest held-out loss among those that are there, or the newest."""

LAYOUT = 1
"""Of what a checkpoint holds, and where; stored in it. Checkpoints that have none are of this one."""

SEAL, DIGESTS, LOSS, HELDOUT = "seal", "digests", "heldout_loss", "heldout"
"""Keys of the metadata: a digest of the others; of every array; the held-out loss, and of which examples."""

_FILE = "_CHECKPOINT_METADATA"  # Orbax's


class CheckpointError(SpielError):
    """A checkpoint is missing, damaged, or not of this run."""


class SaveFailed(CheckpointError):
    """A checkpoint could not be saved."""

    at_once = True  # Orbax's threads wait five minutes for what does not come any more


class Damaged(CheckpointError):
    """A checkpoint is not what was saved.

    Attributes:
        folder: The folder of checkpoints.
        step: Which of them.
        problem: What is wrong with it.
    """

    def __init__(self, folder: Path, step: int, problem: str, advice: str = ""):
        super().__init__(f"checkpoint {step} in {folder} is damaged: {problem}{advice}")
        self.folder, self.step, self.problem = folder, step, problem


def checkpoints_of(directory: str | Path) -> Path:
    """The folder of checkpoints of a run.

    Raises:
        CheckpointError: If there is none.
    """
    folder = local_path(directory, "the run's folder").absolute() / FOLDER
    if not folder.is_dir():
        raise CheckpointError(f"{directory} is no folder of a run: it has no {FOLDER!r} in it")
    return folder


def steps_of(folder: Path) -> list[int]:
    """The steps that have a checkpoint, whole or damaged, rising. What is being written has another name."""
    return sorted(
        int(path.name) for path in folder.iterdir() if path.name.isascii() and path.name.isdecimal()
    )


def chosen(folder: Path, step: Step) -> int:
    """The step that is asked for.

    Raises:
        CheckpointError: If it is not there.
    """
    steps = steps_of(folder)
    if not steps:
        raise CheckpointError(f"no checkpoint in {folder}")
    if step is None:
        return steps[-1]
    if step == "best":
        return _best(folder, steps)
    if step not in steps:
        raise CheckpointError(f"no checkpoint {step} in {folder}: there are {', '.join(map(str, steps))}")
    return step


def _best(folder: Path, steps: list[int]) -> int:
    evaluated = [found for found in (metadata_of(folder, step) for step in steps) if LOSS in found]
    if not evaluated:
        raise CheckpointError(
            f"no checkpoint in {folder} was evaluated, so none is the best: train with "
            "config.checkpoint_keep_best and held-out examples"
        )
    latest = evaluated[-1][HELDOUT]  # losses of other examples are not compared
    alike = [found for found in evaluated if found[HELDOUT] == latest]
    return min(alike, key=lambda found: (found[LOSS], -found["step"]))["step"]


def seal(metadata: Mapping[str, Any]) -> str:
    """A digest of metadata, as JSON gives them back."""
    text = json.dumps({key: value for key, value in metadata.items() if key != SEAL}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def metadata_of(folder: Path, step: int) -> dict[str, Any]:
    """The JSON part of a checkpoint.

    Raises:
        Damaged: If it cannot be read, or is not what was written.
    """
    place = folder / str(step)
    if not place.is_dir():
        raise Damaged(folder, step, "it is a file")
    if not any(place.iterdir()):
        raise Damaged(folder, step, "its folder is empty")
    try:  # not by Orbax, which opens all arrays for it
        found = json.loads((place / _FILE).read_bytes())["custom_metadata"]
        complete = {"step", "targets"} <= found.keys()
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        complete, found = False, {}
    if not complete:
        raise Damaged(folder, step, f"its metadata ({_FILE}) is lost or cut off")
    if found["step"] != step or (SEAL in found and found[SEAL] != seal(found)):
        raise Damaged(folder, step, f"its metadata ({_FILE}) is not what was saved")
    if (layout := found.get("layout", LAYOUT)) != LAYOUT:
        raise CheckpointError(
            f"checkpoint {step} in {folder} has layout {layout}, and this version of spiel_jax reads "
            f"{LAYOUT}: use the version that wrote it, or a newer one"
        )
    return found


def target_json(target: Target) -> dict[str, Any]:
    """A target as metadata hold it."""
    return {
        "shape": list(target.shape),
        "count": target.count,
        "stack": list(target.stack),
        "grid": list(target.grid),
        "layers": None if target.layers is None else list(target.layers),
        "spare": target.spare,
    }


def _target(stored: Mapping[str, Any]) -> Target:
    rows, columns = stored["shape"]
    grid_rows, grid_columns = stored["grid"]
    layers = stored["layers"]
    return Target(
        (rows, columns),
        stored["count"],
        tuple(stored["stack"]),
        (grid_rows, grid_columns),
        None if layers is None else tuple(layers),
        spare=stored.get("spare", 0),  # not in what earlier versions wrote
    )


def stored_targets(metadata: Mapping[str, Any]) -> dict[str, Target]:
    """The targets of a checkpoint from its metadata, without mesh axes; empty where nothing has deltas."""
    return {name: _target(stored) for name, stored in metadata["targets"].items()}


def one_line(error: Exception) -> str:
    """What an error says, in a line that can be read."""
    return " ".join(str(error).split())[:300] or type(error).__name__
