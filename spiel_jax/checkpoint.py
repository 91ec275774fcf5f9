"""Orbax checkpoints of a run: what was trained and all that is needed to continue. Never the base model.

A checkpoint holds the deltas (readable alone: ``restore_deltas``), the optimizer's state, and as JSON the
step, the position in the data, the config, the targets and a fingerprint of the base weights. Positions are
saved in the order of their slots, so that a continued run is the uninterrupted one bit for bit.
"""

# pyright: reportArgumentType=false
# (Orbax annotates with aliases that pyright does not resolve)

import errno
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import jax
import jax.numpy as jnp
from orbax.checkpoint import v1 as ocp

from spiel_jax.errors import SpielError
from spiel_jax.methods.method import Method, TrainState
from spiel_jax.places import local_path
from spiel_jax.sparse.delta import SparseDelta
from spiel_jax.sparse.targets import Target

FOLDER = "checkpoints"
"""Name of the folder of checkpoints in a run's folder."""

Step = int | Literal["best"] | None
"""Which checkpoint: a step, the one of the lowest held-out loss among those that are there, or the newest."""


_LOSS, _HELDOUT = "heldout_loss", "heldout"  # what a checkpoint's metrics hold


class CheckpointError(SpielError):
    """A checkpoint is missing, damaged, or not of this run."""


def _target_json(target: Target) -> dict[str, Any]:
    return {
        "shape": list(target.shape),
        "count": target.count,
        "stack": list(target.stack),
        "grid": list(target.grid),
        "layers": None if target.layers is None else list(target.layers),
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
    )


@jax.jit
def _copy(items: dict[str, Any]) -> dict[str, Any]:
    return jax.tree.map(jnp.copy, items)


class Checkpoints:
    """The checkpoints of one run, saved in the background and committed atomically.

    All processes of the run do the same with them at the same time; each writes and reads what it holds.

    Args:
        directory: The run's folder; checkpoints go to its "checkpoints" folder.
        keep: How many of the latest are kept.
        keep_best: Whether the one of the lowest held-out loss is kept beside them.
        heldout: What tells the held-out examples from others: losses of others are not compared.
    """

    def __init__(
        self, directory: str | Path, keep: int = 2, *, keep_best: bool = False, heldout: str | None = None
    ):
        policies = ocp.training.preservation_policies
        policy = policies.LatestN(keep)
        if keep_best:
            best = policies.BestN(
                get_metric_fn=self._loss, reverse=True, n=1, keep_checkpoints_without_metrics=False
            )
            policy = policies.AnyPreservationPolicy([policy, best])
        self._heldout = heldout
        self._saving: tuple[int, set[str], Any] | None = None  # step, parts, Orbax's response
        logging.getLogger("absl").addFilter(_is_told_once)
        self._checkpointer = ocp.training.Checkpointer(
            Path(directory).absolute() / FOLDER,
            preservation_policy=policy,
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
            cleanup_tmp_directories=True,
        )

    def _loss(self, metrics: Mapping[str, Any]) -> float:
        return metrics[_LOSS] if metrics.get(_HELDOUT) == self._heldout else float("inf")

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
        found = [saved.metrics for saved in self._checkpointer.checkpoints]
        return min((self._loss(metrics) for metrics in found if metrics), default=float("inf"))

    @property
    def latest(self) -> int | None:
        """Step of the newest whole checkpoint; None if there is none."""
        newest = self._checkpointer.latest
        return None if newest is None else newest.step

    def save(
        self,
        step: int,
        state: TrainState,
        method: Method,
        metadata: Mapping[str, Any],
        heldout_loss: float | None = None,
    ) -> None:
        """Starts saving; a save that is still in progress is waited for first, and read back.

        Args:
            step: Optimizer steps done.
            state: The state after them.
            method: Whose state it is.
            metadata: JSON-like: config, data position, fingerprint, ...
            heldout_loss: Of the state, where it was evaluated.

        Raises:
            CheckpointError: If it, or the one before, cannot be saved.
        """
        self.wait()
        # The next step reuses these buffers, and on a CPU the background save reads them in place.
        items = _copy(method.items(state))
        stored = {name: _target_json(target) for name, target in method.targets.items()}
        metrics = None if heldout_loss is None else {_LOSS: heldout_loss, _HELDOUT: self._heldout}
        parts = set(items)  # Orbax adds the metrics to it
        with self._said_plainly(step):
            response = self._checkpointer.save_checkpointables_async(
                step, items, metrics=metrics, custom_metadata={**metadata, "step": step, "targets": stored}
            )
        self._saving = step, parts, response

    def restore(self, like: TrainState, method: Method, step: Step = None) -> TrainState:
        """What was trained and the optimizer's state, in the structure and sharding of ``like``.

        ``params`` and ``base`` are those of ``like``: the caller merges.

        Raises:
            CheckpointError: If there is no such checkpoint, or it does not fit ``like``.
        """
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), method.items(like)
        )
        return method.restored(_load(self._checkpointer, step, abstract), like)

    def wait(self) -> None:
        """Waits until everything is saved, and reads it back: what it holds, not the arrays.

        Raises:
            CheckpointError: If it was not saved, or cannot be read.
        """
        if self._saving is None:
            return
        (step, parts, response), self._saving = self._saving, None
        with self._said_plainly(step):
            response.result()  # which also ends its thread: else each save leaves one, and 3 descriptors
            self._checkpointer.wait()
        found = self._checkpointer.checkpointables_metadata(step).metadata
        if unread := sorted(part for part in parts if found.get(part) is None):
            raise CheckpointError(
                f"checkpoint {step} in {self._checkpointer.directory} was saved, and cannot be read back: "
                f"{', '.join(unread)}. Earlier ones are as they were; choose another folder"
            )

    @contextmanager
    def _said_plainly(self, step: int) -> Iterator[None]:
        """Whatever Orbax raises while it saves a step, in one line."""
        try:
            yield
        except Exception as error:  # of the system, of Orbax or of TensorStore
            raise CheckpointError(
                f"checkpoint {step} could not be saved in {self._checkpointer.directory}: {_reason(error)}. "
                "Earlier ones are whole: mend that, and run the same command to continue from the newest"
            ) from error


def _is_told_once(record: logging.LogRecord) -> bool:
    """Whether a record is none of Orbax's own tracebacks: every thread logs the error that is raised too."""
    return not (record.levelno >= logging.ERROR and "/orbax/" in record.pathname)


def _reason(error: Exception) -> str:
    """What went wrong with storage, without the names of Orbax's files where the system says what it is."""
    text = " ".join(str(error).split())
    codes = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO)
    said = [os.strerror(code) for code in codes if os.strerror(code) in text]
    return said[0] if said else text[:300] or type(error).__name__


def _existing(checkpointer: Any, step: Step) -> int:
    steps = [found.step for found in checkpointer.checkpoints]
    if not steps:
        raise CheckpointError(f"no checkpoint in {checkpointer.directory}")
    if step is None:
        return max(steps)
    if step == "best":
        return _best(checkpointer)
    if step not in steps:
        raise CheckpointError(f"no checkpoint {step} in {checkpointer.directory}: there are {steps}")
    return step


def _best(checkpointer: Any) -> int:
    evaluated = [found for found in checkpointer.checkpoints if found.metrics]
    if not evaluated:
        raise CheckpointError(
            f"no checkpoint in {checkpointer.directory} was evaluated, so none is the best: train with "
            "config.checkpoint_keep_best and held-out examples"
        )
    latest = evaluated[-1].metrics.get(_HELDOUT)  # losses of other examples are not compared
    alike = [found for found in evaluated if found.metrics.get(_HELDOUT) == latest]
    return min(alike, key=lambda found: (found.metrics[_LOSS], -found.step)).step


def _load(checkpointer: Any, step: Step, abstract: Any) -> Any:
    step = _existing(checkpointer, step)
    try:
        return checkpointer.load_checkpointables(step, abstract)
    except (ValueError, KeyError, FileNotFoundError) as error:
        raise CheckpointError(f"checkpoint {step} does not fit this run: {error}") from error


def _metadata(checkpointer: Any, step: Step) -> dict[str, Any]:
    return dict(checkpointer.checkpointables_metadata(_existing(checkpointer, step)).custom_metadata)


def _open(directory: str | Path) -> Any:
    folder = local_path(directory, "the run's folder").absolute() / FOLDER
    if not folder.is_dir():
        raise CheckpointError(f"{directory} is no folder of a run: it has no {FOLDER!r} in it")
    return ocp.training.Checkpointer(folder)


def read_metadata(directory: str | Path, step: Step = None) -> dict[str, Any]:
    """The JSON part of a run's checkpoint: step, config, targets, fingerprint of the base, ...

    Args:
        directory: The run's folder (``--workdir``).
        step: Which checkpoint; None for the newest, "best" for the lowest held-out loss.

    Raises:
        CheckpointError: If there is no such checkpoint.
    """
    with _open(directory) as checkpointer:
        return _metadata(checkpointer, step)


read_facts = read_metadata
"""Earlier name of ``read_metadata``."""


def newest_metadata(directory: str | Path) -> dict[str, Any] | None:
    """What ``read_metadata`` gives for a run's newest checkpoint; None if it has none yet."""
    if not (local_path(directory, "the run's folder") / FOLDER).is_dir():
        return None
    with _open(directory) as checkpointer:
        return None if checkpointer.latest is None else _metadata(checkpointer, None)


def stored_targets(metadata: Mapping[str, Any]) -> dict[str, Target]:
    """The targets of a checkpoint from its metadata, without mesh axes; empty where nothing has deltas."""
    return {name: _target(stored) for name, stored in metadata["targets"].items()}


def restore_state(directory: str | Path, like: TrainState, method: Method, step: Step = None) -> TrainState:
    """What was trained and the optimizer's state, on one device.

    Args:
        directory: The run's folder (``--workdir``).
        like: Its structure, shapes and dtypes.
        method: Whose state it is.
        step: Which checkpoint; None for the newest, "best" for the lowest held-out loss.

    Raises:
        CheckpointError: If there is no such checkpoint, or it does not fit ``like``.
    """
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=_here()), method.items(like)
    )
    with _open(directory) as checkpointer:
        return method.restored(_load(checkpointer, step, abstract), like)


def restore_deltas(directory: str | Path, step: Step = None) -> dict[str, SparseDelta]:
    """The deltas of a run's checkpoint, sorted by position; nothing else is read.

    Args:
        directory: The run's folder (``--workdir``).
        step: Which checkpoint; None for the newest, "best" for the lowest held-out loss.

    Returns:
        Target name to ``SparseDelta``: give it to ``merge`` with the base parameters.

    Raises:
        CheckpointError: If there is no such checkpoint, or it holds no deltas (another method).
    """
    with _open(directory) as checkpointer:
        targets = stored_targets(_metadata(checkpointer, step))
        if not targets:
            raise CheckpointError(f"{directory} holds no sparse deltas: its method trains none")
        abstract = {
            name: {
                "indices": jax.ShapeDtypeStruct((*t.lead, t.block_count), jnp.int32),
                "values": jax.ShapeDtypeStruct((*t.lead, t.block_count), jnp.float32),
            }
            for name, t in targets.items()
        }
        abstract = jax.tree.map(lambda s: s.update(sharding=_here()), abstract)
        found = _load(checkpointer, step, {"deltas": abstract})
    return {name: target.delta(**found["deltas"][name]).sort() for name, target in targets.items()}


def restore_trainable(directory: str | Path, step: Step = None) -> Any:
    """What was trained, of a checkpoint of full fine-tuning or of adapters.

    Returns:
        Parameter name to array, or target name to the adapter's array or dict of arrays (see ``Lora``,
        ``IA3``); float32.

    Raises:
        CheckpointError: If there is no such checkpoint, or it holds sparse deltas.
    """
    with _open(directory) as checkpointer:
        if _metadata(checkpointer, step)["targets"]:
            raise CheckpointError(f"{directory} holds sparse deltas: read them with restore_deltas")
        step = _existing(checkpointer, step)
        stored = checkpointer.checkpointables_metadata(step).metadata["trainable"]
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=_here()), stored)
        return _load(checkpointer, step, {"trainable": abstract})["trainable"]


def restore_trained(directory: str | Path, step: Step = None) -> Any:
    """What was trained: ``restore_deltas`` of a sparse method, ``restore_trainable`` of another."""
    sparse = bool(read_metadata(directory, step)["targets"])
    return restore_deltas(directory, step) if sparse else restore_trainable(directory, step)


def _here() -> jax.sharding.Sharding:
    """On one device, wherever it was saved."""
    return jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
