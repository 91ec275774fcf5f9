"""A run's folder with another block grid."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from spiel_jax.adapters.identity import other_model
from spiel_jax.checkpoint import (
    CheckpointError,
    Checkpoints,
    Step,
    read_metadata,
    restore_state,
    stored_targets,
)
from spiel_jax.config import unflatten
from spiel_jax.distributed.mesh import check_mesh, make_mesh
from spiel_jax.errors import NotFoundError, SpielError
from spiel_jax.methods.configured import configured_grid
from spiel_jax.methods.method import TrainState
from spiel_jax.methods.registry import build, method_class
from spiel_jax.methods.sparse import SparseMethod
from spiel_jax.models.config import ModelConfig
from spiel_jax.models.io.fingerprint import arithmetic
from spiel_jax.models.io.loading import model_shape
from spiel_jax.models.storage import kind_named
from spiel_jax.ops.tree import parameter_name
from spiel_jax.optim.block_grid import Regridded
from spiel_jax.places import local_path
from spiel_jax.sparse.targets import zeros
from spiel_jax.training.metrics import METRICS, SAMPLES, TIMING
from spiel_jax.training.workdir import check_usable, unusable

MUCH_UNUSED = 0.3
"""Share of unused slots from which ``show`` warns."""


def regrid(
    workdir: str | Path,
    grid: Mapping[str, int],
    out: str | Path,
    step: Step = None,
    *,
    model: str | None = None,
) -> dict[str, Regridded]:
    """Writes a run's checkpoint into a new folder, with another block grid; the folder continues the run.

    What is trained, the optimizer's state, the position in the data and the metrics so far go along. The
    continued run has the old one's numbers up to the next reselection, which then selects within the new
    blocks. Candidates in an estimation phase move too; where a block cannot hold all of them, it keeps those
    of largest summed gradient. SpIEL-MA steps otherwise from the first step on: SM3 bounds the moments of
    entries by their row and column in the block, and where blocks join the largest bound is taken.

    Args:
        workdir: The run's folder.
        grid: Blocks of each weight along the mesh axes "fsdp" and "tensor"; an axis that is left out keeps
            its number of blocks.
        out: The new folder: not there yet, or empty.
        step: Which checkpoint; None for the newest.
        model: Where the base model is now, of which only the shape is read; None: where it was.

    Returns:
        Target name to what became of it.

    Raises:
        SpielError: If a size is not allowed, or does not divide a weight.
        CheckpointError: If there is no such checkpoint, it holds no sparse deltas, ``model`` is not its own,
            or ``out`` is not empty.
        NotFoundError: If the base model's configuration is not there.
    """
    workdir, out = local_path(workdir, "--workdir"), local_path(out, "--out")
    check_usable(out)
    metadata = read_metadata(workdir, step)
    settings, targets = metadata["config"], stored_targets(metadata)
    if not targets and method_class(settings["method"]).has_deltas:
        raise CheckpointError(f"{workdir}: a run of method {settings['method']!r} keeps its block grid")
    if not targets:
        raise CheckpointError(
            f"{workdir} holds no sparse deltas: method {settings['method']!r} trains none, and its "
            "checkpoints can be continued on any mesh"
        )
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out} is there already and not empty: choose another folder for the new run")
    blocks = {axis: settings.get(f"targets.grid.{axis}") or 1 for axis in ("fsdp", "tensor")}
    for axis, number in grid.items():
        if axis not in blocks or number < 1:
            raise SpielError(
                f"grid {axis}={number}: expected positive numbers of blocks along fsdp and tensor"
            )
    blocks |= grid
    shape = _shape(metadata, model)
    storage = kind_named(unflatten(settings).model.quantization)
    check_mesh(shape, make_mesh({"data": 1, "fsdp": 1, "tensor": 1}), blocks, storage)

    method = build(unflatten(settings), shape, settings["steps"] or 1, targets)
    assert isinstance(method, SparseMethod)
    tx = method.tx
    values = zeros(targets, method.delta_dtype)
    like = jax.eval_shape(lambda: TrainState({}, {}, values, tx.init(values)))
    state = restore_state(workdir, like, method, metadata["step"])
    settings = settings | {f"targets.grid.{axis}": number for axis, number in blocks.items()}
    grid_of = configured_grid(unflatten(settings), shape)
    grids = {name: grid_of(parameter_name(name)) for name in targets}
    method, state, changed = method.regridded(state, grids)

    try:
        out.mkdir(parents=True, exist_ok=True)
        for name in (METRICS, TIMING, SAMPLES):
            if (workdir / name).exists():
                shutil.copy(workdir / name, out / name)
        (out / "config.json").write_text(json.dumps(settings, indent=1))
    except OSError as error:
        raise unusable(out, error) from error
    with Checkpoints(out) as checkpoints:
        checkpoints.save(metadata["step"], state, method, metadata | {"config": settings}, last=True)
    return changed


def _shape(metadata: Mapping[str, Any], model: str | None) -> ModelConfig:
    """Shape of the base model of a run."""
    settings = metadata["config"]
    try:
        if model is None:
            return model_shape(settings["model.source"], settings["model.preset"])
        shape = model_shape(model)
    except NotFoundError as error:
        raise NotFoundError(f"{error}. If it lies elsewhere now, name the place: --model=...") from error
    known = metadata.get("identity")  # earlier versions kept none
    if known is not None and (changed := other_model(known, {"model": arithmetic(shape)})):
        raise CheckpointError(f"the run was trained on another model than {model}: {'; '.join(changed)}")
    return shape


def show(changed: Mapping[str, Regridded]) -> str:
    """What became of each target as a table, and what there is to know about it."""
    lines = [_table(changed)]
    if forgotten := sum(change.forgotten for change in changed.values()):
        lines.append(f"{forgotten:,} candidates of the estimation phase found no room in their blocks")
    slots = sum(change.new.slots for change in changed.values())
    unused = 1 - sum(change.entries for change in changed.values()) / slots
    if unused > MUCH_UNUSED and not any(change.old.spare for change in changed.values()):
        lines.append(
            f"warning: {unused:.0%} of the slots are unused. They take memory like the others, and "
            "the next reselections fill them. A coarser grid leaves fewer."
        )
    return "\n".join(lines)


def _table(changed: Mapping[str, Regridded]) -> str:
    heads = ("target", "grid", "slots per block", "unused")
    rows = [
        (
            name,
            " -> ".join("{}x{}".format(*target.grid) for target in (change.old, change.new)),
            f"{change.old.block_count:,} -> {change.new.block_count:,}",
            f"{change.unused:.1%}",
        )
        for name, change in changed.items()
    ]
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    lines = ["  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)) for row in (heads, *rows)]
    return "\n".join(line.rstrip() for line in (lines[0], "-" * len(lines[0]), *lines[1:]))
