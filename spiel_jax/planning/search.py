"""Settings of a run that need less memory, tried until one fits."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
from tqdm import tqdm

from spiel_jax.config import Config
from spiel_jax.distributed.mesh import MESH_AXES, make_mesh
from spiel_jax.errors import SpielError
from spiel_jax.models import ModelConfig
from spiel_jax.optim.criteria.criterion import CRITERIA
from spiel_jax.planning.hlo import Program
from spiel_jax.planning.run import PlannedRun, micro_batches, prepare
from spiel_jax.planning.topology import Hardware


def needed(held: int, program: Program) -> int:
    """Bytes on each device while a program runs, without the code: what it does not look at is there too."""
    return program.allocated + (0 if program.refusal else max(held - program.arguments, 0))


def easier(config: Config, mesh: Mapping[str, int]) -> Iterator[dict[str, Any]]:
    """Settings that need less and less memory, those first that cost least.

    Args:
        config: Of a run that does not fit, from ``prepare``.
        mesh: Sizes of its mesh.

    Yields:
        Key of the config to its new value; a later dict has the changes of those before it, but for that of
        the method.
    """
    changes: dict[str, Any] = {}

    def smaller(rows: int, shards: int) -> list[int]:
        return [possible for possible in micro_batches(config.batch_size, shards) if possible < rows][::-1]

    def spread(data: int, fsdp: int, tensor: int) -> dict[str, int]:
        return {"mesh.data": data, "mesh.fsdp": fsdp, "mesh.tensor": tensor}

    data, fsdp, tensor = (mesh[axis] for axis in MESH_AXES)
    shards = data * fsdp
    for rows in smaller(config.micro_batch_size, shards):
        changes["micro_batch_size"] = rows
        yield dict(changes)
    choices = ("none", "dots", "full")
    for remat in choices[choices.index(config.model.remat) + 1 :]:
        changes["model.remat"] = remat
        yield dict(changes)
    if data > 1:
        changes |= spread(1, shards, tensor)
        yield dict(changes)
    balanced = any(config.targets.balance.values())
    if config.method in CRITERIA and config.method != "spiel_ma" and not balanced:
        yield changes | {"method": "spiel_ma"}
    while shards % 2 == 0:
        shards, tensor = shards // 2, tensor * 2
        changes |= spread(1, shards, tensor)
        rows = smaller(config.micro_batch_size, shards)
        yield changes | ({"micro_batch_size": rows[-1]} if rows else {})


def as_flags(changes: Mapping[str, Any]) -> str:
    """Changes of a config as they are written on the command line.

    >>> as_flags({"mesh.fsdp": 8, "method": "spiel_ma"})
    '--config.mesh.fsdp=8 --config.method=spiel_ma'
    """
    return " ".join(f"--config.{key}={value}" for key, value in changes.items())


@dataclass(frozen=True)
class Trial:
    """A setting that was tried in the place of one that does not fit.

    Attributes:
        changes: Key of the config to its value.
        needed: Bytes on each device; those that are held between steps where these are too many already.
        compiled: Whether it was compiled to find out.
        fits: The verdict.
    """

    changes: dict[str, Any]
    needed: int
    compiled: bool
    fits: bool


def search(
    run: PlannedRun,
    model: ModelConfig,
    hardware: Hardware,
    kinds: Sequence[str],
    memory: Mapping[str, int],
    limit: int,
    progress: bool = True,
) -> list[Trial]:
    """Tries easier settings until one fits; the last of the trials does, if any.

    Args:
        run: Does not fit.
        model: Shape of the model.
        hardware: To compile for.
        kinds: Kinds of step to compile, what needs most first; of another method all are.
        memory: Bytes of the first's ``temporaries`` and of the ``programs`` of all of them.
        limit: Settings to compile at most.
        progress: Whether to show a progress bar.
    """
    trials: list[Trial] = []
    compiled = 0
    with tqdm(total=limit, desc="searching", unit="trial", disable=not progress) as bar:
        for changes in easier(run.config, run.mesh.shape):
            config = run.given.copy_and_resolve_references()
            config.update_from_flattened_dict(changes)
            try:
                tried = prepare(config, model, make_mesh(config.mesh, hardware.devices))
            except SpielError:  # the mesh does not divide the model
                continue
            held = sum(tried.held().values())
            least = held + memory["programs"]
            if changes.keys() == {"micro_batch_size"}:  # temporaries do not shrink faster than it
                rows = run.config.micro_batch_size
                least += memory["temporaries"] * changes["micro_batch_size"] // rows
            if least > hardware.usable:
                trials.append(Trial(changes, least, compiled=False, fits=False))
                continue
            if compiled == limit:
                break
            compiled += 1
            bar.set_postfix_str(as_flags(changes))
            bar.update()
            peak, fits = 0, True
            try:
                for kind in tried.kinds if "method" in changes else kinds:
                    program = tried.compiled(kind, hardware)
                    peak = max(peak, needed(held, program) + memory["programs"])
                    fits = peak <= hardware.usable and program.refusal is None
                    if not fits:
                        break
            except jax.errors.JaxRuntimeError as error:  # what was found before is worth more
                tqdm.write(f"not compiled with {as_flags(changes)}: {error}", sys.stderr)
                continue
            trials.append(Trial(changes, peak, compiled=True, fits=fits))
            if fits:
                break
    return trials
