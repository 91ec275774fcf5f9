"""Saving checkpoints in the background, committed atomically, each with digests of what it holds."""

# pyright: reportArgumentType=false
# (Orbax annotates with aliases that pyright does not resolve)

import errno
import itertools
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import jax.numpy as jnp
from orbax.checkpoint import v1 as ocp

from spiel_jax.checkpoint.arrays import stored_arrays
from spiel_jax.checkpoint.metadata import (
    DIGESTS,
    FOLDER,
    HELDOUT,
    LAYOUT,
    LOSS,
    SEAL,
    CheckpointError,
    Damaged,
    SaveFailed,
    checkpoints_of,
    metadata_of,
    one_line,
    seal,
    steps_of,
    target_json,
)
from spiel_jax.methods.method import Method, TrainState
from spiel_jax.ops.digest import digest
from spiel_jax.ops.tree import all_finite, named_leaves

SET_ASIDE = "set_aside"
"""Name of the folder in a run's folder for checkpoints that a run was continued before."""


def _held(items: Any, copy: bool) -> tuple[Any, dict[str, tuple[jax.Array, jax.Array]]]:
    """A copy, or None, and of each array by name its digest and whether it is finite."""
    described = {name: _described(leaf) for name, leaf in named_leaves(items).items()}
    return _copied(items) if copy else None, described


@jax.jit
def _copied(items: Any) -> Any:
    return jax.tree.map(jnp.copy, items)


@jax.jit  # arrays of a shape share a program: that of a whole tree takes a second to compile
def _described(leaf: Any) -> tuple[jax.Array, jax.Array]:
    return digest(leaf), all_finite(leaf)


@dataclass(frozen=True)
class _Kept:
    """Which checkpoints stay: the latest, and the one of the lowest loss."""

    latest: int
    losses: Mapping[int, float]  # of the steps that were evaluated
    best: bool

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        steps = [checkpoint.step for checkpoint in checkpoints]
        kept = set(sorted(steps)[-self.latest :])
        if self.best and (evaluated := [step for step in steps if step in self.losses]):
            kept.add(min(evaluated, key=lambda step: (self.losses[step], -step)))
        return [step in kept for step in steps]


class Checkpoints:
    """The checkpoints of one run, saved in the background and committed atomically.

    All processes of the run do the same with them at the same time; each writes what it holds.

    Args:
        directory: The run's folder; checkpoints go to its "checkpoints" folder.
        keep: How many of the latest are kept.
        keep_best: Whether the one of the lowest held-out loss is kept beside them.
        heldout: What tells the held-out examples from others: losses of others are not compared.
    """

    def __init__(
        self, directory: str | Path, keep: int = 2, *, keep_best: bool = False, heldout: str | None = None
    ):
        self._heldout = heldout
        self._losses: dict[int, float] = {}
        self._saving: tuple[int, Any] | None = None  # step, Orbax's response
        self._folder = Path(directory).absolute() / FOLDER
        logging.getLogger("absl").addFilter(_is_told_once)
        self._checkpointer = ocp.training.Checkpointer(
            self._folder,
            preservation_policy=_Kept(keep, self._losses, keep_best),
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
            cleanup_tmp_directories=True,
        )
        for found in self._checkpointer.checkpoints:
            self._note_loss(found.step)

    def _note_loss(self, step: int) -> None:
        try:
            found = metadata_of(self._folder, step)
        except Damaged:  # who reads it is told
            return
        if LOSS in found and found[HELDOUT] == self._heldout:
            self._losses[step] = found[LOSS]

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._checkpointer.close()
        except Exception:
            if kind is None:  # else the first error says more
                raise
        finally:
            logging.getLogger("absl").removeFilter(_is_told_once)

    @property
    def best_loss(self) -> float:
        """The lowest held-out loss of a checkpoint that is there; infinite if none has one."""
        steps = {found.step for found in self._checkpointer.checkpoints}
        return min((loss for step, loss in self._losses.items() if step in steps), default=float("inf"))

    def save(
        self,
        step: int,
        state: TrainState,
        method: Method,
        metadata: Mapping[str, Any],
        heldout_loss: float | None = None,
        *,
        last: bool = False,
    ) -> None:
        """Starts saving; a save that is still in progress is waited for first, and read back.

        Args:
            step: Optimizer steps done.
            state: The state after them.
            method: Whose state it is.
            metadata: JSON-like: config, data position, fingerprint, ...
            heldout_loss: Of the state, where it was evaluated.
            last: Whether no step follows: the state is saved from where it is then, without a copy of it,
                and may not be donated before ``wait``.

        Raises:
            CheckpointError: If it, or the one before, cannot be saved; or it holds what is not finite.
        """
        self.wait()
        # The next step reuses these buffers, and on a CPU the background save reads them in place.
        items = method.items(state)
        copied, described = _held(items, copy=not last)
        items, described = items if last else copied, jax.device_get(described)
        if lost := [name for name, (_, finite) in described.items() if not finite]:
            raise CheckpointError(
                f"checkpoint {step} is not written to {self._folder}: {', '.join(lost[:3])} hold values that "
                "are infinite or not a number. Earlier ones are whole"
            )
        metadata = dict(metadata) | {
            "layout": LAYOUT,
            "step": step,
            "targets": {name: target_json(target) for name, target in method.targets.items()},
            DIGESTS: {name: f"{int(value):08x}" for name, (value, _) in described.items()},
        }
        if heldout_loss is not None:
            metadata |= {LOSS: heldout_loss, HELDOUT: self._heldout}
            self._losses[step] = heldout_loss
        metadata[SEAL] = seal(metadata)
        with self._said_plainly(step):
            response = self._checkpointer.save_checkpointables_async(step, items, custom_metadata=metadata)
        self._saving = step, response

    def wait(self) -> None:
        """Waits until everything is saved, and reads it back: what it holds, not the arrays.

        Raises:
            CheckpointError: If it was not saved, or cannot be read.
        """
        if self._saving is None:
            return
        (step, response), self._saving = self._saving, None
        with self._said_plainly(step):
            response.result()  # which also ends its thread: else each save leaves one, and 3 descriptors
            self._checkpointer.wait()
        try:
            stored_arrays(self._folder, step)
        except Damaged as error:
            raise CheckpointError(
                f"checkpoint {step} in {self._folder} was saved, and cannot be read back: {error.problem}. "
                "Earlier ones are as they were; choose another folder"
            ) from error

    @contextmanager
    def _said_plainly(self, step: int) -> Iterator[None]:
        """Whatever Orbax raises while it saves a step, in one line."""
        try:
            yield
        except Exception as error:  # of the system, of Orbax or of TensorStore
            raise SaveFailed(
                f"checkpoint {step} could not be saved in {self._folder}: {_reason(error)}. "
                "Earlier ones are whole: mend that, and run the same command to continue from the newest"
            ) from error


def set_aside(directory: str | Path, after: int) -> list[Path]:
    """Moves the checkpoints of later steps out of the way of a run that continues from an earlier one.

    Args:
        directory: The run's folder; they go to its folder "set_aside".
        after: The step that is continued from.

    Returns:
        Where they are now.

    Raises:
        CheckpointError: If one cannot be moved.
    """
    folder = checkpoints_of(directory)
    aside = folder.parent / SET_ASIDE
    moved = []
    for step in (step for step in steps_of(folder) if step > after):
        names = itertools.chain([str(step)], (f"{step}-{number}" for number in itertools.count(2)))
        place = next(aside / name for name in names if not (aside / name).exists())
        try:
            aside.mkdir(exist_ok=True)
            (folder / str(step)).rename(place)
        except OSError as error:
            raise CheckpointError(f"{folder / str(step)} cannot be moved to {place}: {error}") from error
        moved.append(place)
    return moved


def _is_told_once(record: logging.LogRecord) -> bool:
    """Whether a record is none of Orbax's own tracebacks: every thread logs the error that is raised too."""
    return not (record.levelno >= logging.ERROR and "/orbax/" in record.pathname)


def _reason(error: Exception) -> str:
    """What went wrong with storage, without the names of Orbax's files where the system says what it is."""
    codes = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO)
    text = " ".join(str(error).split())
    said = [os.strerror(code) for code in codes if os.strerror(code) in text]
    return said[0] if said else one_line(error)
