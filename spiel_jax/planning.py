"""A run as it would be on hardware that is not here, and settings of it that need less memory."""

import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from tqdm import tqdm

from spiel_jax import build
from spiel_jax.config import SPARSE, Config, ConfigError, micro_batch_size
from spiel_jax.hardware import Hardware
from spiel_jax.loop import kind_of_step
from spiel_jax.models import ModelConfig, abstract_params, open_model
from spiel_jax.models.sharding import MESH_AXES, batch_sharding, make_mesh, state_shardings
from spiel_jax.programs import Program, compile_program
from spiel_jax.schedules import Phase
from spiel_jax.training import Training, TrainState, compiled_step

_STEPS = 1000
"""Steps of a run that is measured in epochs of data that is not read; a small table depends on it."""

_NAMES = {Phase.PLAIN: "ordinary", Phase.PROPOSE: "proposing", Phase.ESTIMATE: "estimating"}

_GATED = {
    f"meta-llama/Llama-2-{size}{kind}": f"llama2_{size}"
    for size in ("7b", "13b", "70b")
    for kind in ("-hf", "-chat-hf")
} | {"meta-llama/Meta-Llama-3-8B": "llama3_8b", "meta-llama/Llama-3.1-8B": "llama3_1_8b"}
"""Hub ids that nobody gets to see without a licence, and presets of their shapes."""


def model_shape(source: str, preset: str | None = None) -> ModelConfig:
    """Shape of a model; its weights need not be here.

    Args:
        source: See ``open_model``. Of a folder and of a hub id the ``config.json`` will do.
        preset: See ``open_model``.

    Raises:
        FileNotFoundError: If nothing there tells a shape.
        ValueError: If what is there cannot be used.
    """
    if preset is not None and source != "random":
        raise ValueError(f"a preset, here {preset!r}, is for the source 'random', not for {source!r}")
    path = Path(source).expanduser()
    if source in _GATED and not path.exists():
        return open_model("random", preset=_GATED[source]).config
    if (path / "config.json").is_file():
        return ModelConfig.from_hf(json.loads((path / "config.json").read_text()))
    if source == "random" or source.startswith("package:") or path.exists() or source.count("/") != 1:
        return open_model(source, preset=preset).config
    try:
        file = huggingface_hub.hf_hub_download(source, "config.json")
    except OSError as error:  # the hub's own errors and those of the network alike
        raise FileNotFoundError(
            f"no config.json of {source!r} here or on the Hugging Face hub ({error}): name its shape by "
            "--config.model.source=random --config.model.preset=..."
        ) from error
    return ModelConfig.from_hf(json.loads(Path(file).read_text()))


@dataclass(frozen=True)
class Run:
    """A run as it would be on a mesh of devices that need not be here.

    Attributes:
        given: The configuration as it was given.
        config: Complete: with the block grid and a micro-batch that can be spread over the mesh.
        mesh: Of the hardware's devices.
        training: The method.
        state: Of ``jax.ShapeDtypeStruct`` with shardings, as ``batch``.
        batch: Of one step.
        kinds: Name of each kind of step that the run has to its phase and whether it reselects.
    """

    given: Config
    config: Config
    mesh: Mesh
    training: Training
    state: TrainState
    batch: dict[str, jax.ShapeDtypeStruct]
    kinds: dict[str, tuple[Phase, bool]]

    def compiled(self, kind: str, hardware: Hardware) -> Program:
        """A kind of step, compiled for the devices of the mesh."""
        phase, reselect = self.kinds[kind]
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.state)
        with jax.set_mesh(self.mesh):
            step: Any = compiled_step(self.training, shardings)
            traced = step.trace(self.state, self.batch, phase=phase, reselect=reselect)
            return compile_program(traced, hardware.options)

    def held(self) -> dict[str, int]:
        """Bytes on each device between steps, by what they are for; without padding of layouts."""
        state = self.state
        active = [
            leaf
            for path, leaf in jax.tree_util.tree_leaves_with_path(state.opt_state)
            if any(getattr(key, "name", None) == "active" for key in path)
        ]
        deltas = [state.trainable, state.base, active]
        return {
            "weights": _device_bytes(state.params),
            "deltas": _device_bytes(deltas),
            "optimizer": _device_bytes(state.opt_state) - _device_bytes(active),
            "batch": _device_bytes(self.batch),
        }


def _device_bytes(tree: Any) -> int:
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def prepare(config: Config, model: ModelConfig, mesh: Mesh) -> Run:
    """A run that could start on this mesh.

    Args:
        config: Checked. Its micro-batch is raised to a number that can be spread over the mesh; its block
            grid, where it is not set, is the mesh's.
        model: Shape of the model.
        mesh: From ``make_mesh``.

    Raises:
        ConfigError: If no micro-batch can be spread over the mesh.
        ValueError: If the mesh does not divide the model or the grid.
    """
    given, config = config, config.copy_and_resolve_references()
    sparse = config.method in SPARSE
    for axis, blocks in config.targets.grid.items():
        config.targets.grid[axis] = blocks or (mesh.shape[axis] if sparse else 1)
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    possible = _micro_batches(config.batch_size, shards)
    if not possible:
        raise ConfigError(
            f"config.batch_size = {config.batch_size}: expected a multiple of {shards}, the size of data x "
            "fsdp in config.mesh"
        )
    wanted = micro_batch_size(config)
    config.micro_batch_size = next((rows for rows in possible if rows >= wanted), possible[-1])
    build.check_layout(config, model, mesh)

    steps = config.steps or _STEPS
    with jax.set_mesh(mesh):
        adapted = build.targets(config, model)
        schedule = build.reselection(config, steps)
        training = build.training(config, model, adapted, schedule, build.learning_rate(config, steps))
        params = abstract_params(model, jnp.dtype(config.model.dtype), packed=config.method != "full")
        state = jax.eval_shape(training.init, params)
    shardings = state_shardings(state, adapted, mesh)
    state = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        state,
        shardings,
    )
    rows = config.micro_batch_size
    shape = (config.batch_size // rows, rows, config.data.sequence_length)
    dtypes = dict.fromkeys(("tokens", "targets", "positions", "segment_ids"), jnp.int32)
    batch = {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=batch_sharding(mesh, 1))
        for name, dtype in {**dtypes, "weights": jnp.float32}.items()
    }
    kinds: dict[str, tuple[Phase, bool]] = {}
    for step in range(1, steps + 1):
        phase, reselects = kind_of_step(training, schedule, step)
        name = _NAMES[phase]
        if reselects:
            name = "reselecting" if phase is Phase.PLAIN else f"{name}+reselecting"
        kinds[name] = phase, reselects
    order = list(Phase)
    kinds = dict(sorted(kinds.items(), key=lambda kind: (order.index(kind[1][0]), kind[1][1])))
    return Run(given, config, mesh, training, state, batch, kinds)


def _micro_batches(batch_size: int, shards: int) -> list[int]:
    """Possible sizes, ascending: multiples of the shards that divide the batch."""
    return [rows for rows in range(shards, batch_size + 1, shards) if batch_size % rows == 0]


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
        return [possible for possible in _micro_batches(config.batch_size, shards) if possible < rows][::-1]

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
    if config.method in SPARSE and config.method != "spiel_ma":
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
    run: Run,
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
            except ValueError:  # the mesh does not divide the model
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
