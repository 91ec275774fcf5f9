"""What is in a run's checkpoints, for whoever wants to use or continue it."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax

from spiel_jax.checkpoint.arrays import check_whole, here, load_arrays, stored_arrays
from spiel_jax.checkpoint.metadata import (
    CheckpointError,
    Damaged,
    Step,
    checkpoints_of,
    chosen,
    metadata_of,
    steps_of,
    stored_targets,
)
from spiel_jax.methods.method import Method, TrainState
from spiel_jax.sparse.delta import SparseDelta


@contextmanager
def naming_a_whole_one() -> Iterator[None]:
    """Of a damaged checkpoint's run, says which the newest whole one is."""
    try:
        yield
    except Damaged as error:
        folder, step = error.folder, error.step
        others = [other for other in reversed(steps_of(folder)) if other != step]
        whole = next((other for other in others if _is_whole(folder, other)), None)
        if whole is None:
            advice = ". No other in the folder is whole"
        else:
            advice = (
                f". The newest whole one is {whole}: --resume_from={whole} continues from it, --step={whole} "
                "takes it elsewhere. Nothing was deleted"
            )
        raise Damaged(folder, step, error.problem, advice) from error


def _is_whole(folder: Path, step: int) -> bool:
    try:
        if jax.process_count() == 1:
            check_whole(folder, step)
        else:  # reading arrays is a common act of all processes, who may not be here together
            stored_arrays(folder, step)
    except Damaged:
        return False
    return True


def read_metadata(directory: str | Path, step: Step = None) -> dict[str, Any]:
    """The JSON part of a run's checkpoint: step, config, targets, fingerprint of the base, ...

    Args:
        directory: The run's folder (``--workdir``).
        step: Which checkpoint; None for the newest, "best" for the lowest held-out loss.

    Raises:
        CheckpointError: If there is no such checkpoint.
        Damaged: If it is not what was saved; the newest whole one is named.
    """
    folder = checkpoints_of(directory)
    with naming_a_whole_one():
        return metadata_of(folder, chosen(folder, step))


def newest_metadata(directory: str | Path) -> dict[str, Any] | None:
    """What ``read_metadata`` gives for a run's newest checkpoint; None if it has none yet.

    Raises:
        Damaged: If it is not what was saved; the newest whole one is named.
    """
    try:
        folder = checkpoints_of(directory)
    except CheckpointError:
        return None
    return read_metadata(directory) if steps_of(folder) else None


def restore_state(directory: str | Path, like: TrainState, method: Method, step: Step = None) -> TrainState:
    """What was trained and the optimizer's state, in the structure and sharding of ``like``.

    Args:
        directory: The run's folder (``--workdir``).
        like: Its structure, shapes, dtypes and shardings; without shardings everything comes to one device.
            ``params`` and ``base`` are its own: the caller merges.
        method: Whose state it is.
        step: Which checkpoint; None for the newest, "best" for the lowest held-out loss.

    Raises:
        CheckpointError: If there is no such checkpoint, or it does not fit ``like``.
        Damaged: If it is not what was saved; the newest whole one is named.
    """
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding or here()), method.items(like)
    )
    folder = checkpoints_of(directory)
    with naming_a_whole_one():
        return method.restored(load_arrays(folder, chosen(folder, step), abstract), like)


def restore_deltas(
    directory: str | Path,
    step: Step = None,
    *,
    sharding: Callable[[str], jax.sharding.Sharding] | None = None,
) -> dict[str, SparseDelta]:
    """The deltas of a run's checkpoint, sorted by position; nothing else is read.

    Args:
        directory: The run's folder (``--workdir``).
        step: Which checkpoint; None for the newest, "best" for the lowest held-out loss.
        sharding: Target name to the sharding of its positions and values, which have one shape; None for one
            device.

    Returns:
        Target name to ``SparseDelta``: give it to ``merge`` with the base parameters.

    Raises:
        CheckpointError: If there is no such checkpoint, or it holds no deltas (another method).
        Damaged: If it is not what was saved; the newest whole one is named.
    """
    metadata = read_metadata(directory, step)
    targets = stored_targets(metadata)
    if not targets:
        raise CheckpointError(f"{directory} holds no sparse deltas: its method trains none")
    found = _part(directory, metadata, "deltas", sharding)
    return {name: target.delta(**found[name]).sort() for name, target in targets.items()}


def restore_trainable(directory: str | Path, step: Step = None) -> Any:
    """What was trained, of a checkpoint of full fine-tuning or of adapters.

    Returns:
        Parameter name to array, or target name to the adapter's array or dict of arrays (see ``Lora``,
        ``IA3``); float32.

    Raises:
        CheckpointError: If there is no such checkpoint, or it holds sparse deltas.
        Damaged: If it is not what was saved; the newest whole one is named.
    """
    metadata = read_metadata(directory, step)
    if metadata["targets"]:
        raise CheckpointError(f"{directory} holds sparse deltas: read them with restore_deltas")
    return _part(directory, metadata, "trainable")


def restore_trained(directory: str | Path, step: Step = None) -> Any:
    """What was trained: ``restore_deltas`` of a sparse method, ``restore_trainable`` of another."""
    sparse = bool(read_metadata(directory, step)["targets"])
    return restore_deltas(directory, step) if sparse else restore_trainable(directory, step)


def _part(
    directory: str | Path,
    metadata: Mapping[str, Any],
    part: str,
    sharding: Callable[[str], jax.sharding.Sharding] | None = None,
) -> Any:
    """A part of a checkpoint as it is stored, on one device or as ``sharding`` says by name."""
    folder, step = checkpoints_of(directory), metadata["step"]
    with naming_a_whole_one():
        stored = stored_arrays(folder, step)
        if part not in stored:
            raise CheckpointError(f"checkpoint {step} in {folder} holds no {part}, but {', '.join(stored)}")
        like = stored[part]
        if sharding is not None:
            like = {
                name: {key: leaf.update(sharding=sharding(name)) for key, leaf in leaves.items()}
                for name, leaves in like.items()
            }
        return load_arrays(folder, step, {part: like})[part]
