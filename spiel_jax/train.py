r"""Sparse fine-tuning from the command line.

    python -m spiel_jax.train --config=configs/smollm2_135m.py --workdir=runs/smollm2 \
        --config.method=spiel_ma --config.optimizer.learning_rate=1e-3

A folder that already holds checkpoints of the same configuration is continued from the newest.

On several hosts the same command runs once per host, or once per device, with ``--distributed`` where JAX can
tell from the environment how many there are (Slurm, Open MPI, Kubernetes, a TPU pod); elsewhere with
``--coordinator=host:port --num_processes=N --process_id=I``. The run's folder must be one that all see.
"""

import json
import logging
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import app, flags
from absl import logging as absl_logging
from jax.sharding import Mesh
from ml_collections import config_flags

from spiel_jax import build, processes
from spiel_jax.checkpoint import FOLDER, CheckpointError, Checkpoints, newest_facts, stored_targets
from spiel_jax.config import (
    SPARSE,
    Config,
    ConfigError,
    check_config,
    data_config,
    differences,
    flatten,
    micro_batch_size,
)
from spiel_jax.data import Data, DataError, load_data
from spiel_jax.generate import reply
from spiel_jax.loop import Loop, NonFiniteError
from spiel_jax.metrics import Recorder, table
from spiel_jax.models.fingerprint import differing, fingerprint
from spiel_jax.models.loading import ModelSource, open_model
from spiel_jax.models.sharding import (
    local_rows,
    make_mesh,
    param_sharding,
    spread_batch,
    state_shardings,
)
from spiel_jax.profile import Profile
from spiel_jax.training import Training, TrainState, compiler_options

_log = logging.getLogger("spiel_jax.train")  # as a program, this module has another name

_MENDABLE = (
    ConfigError,
    CheckpointError,
    DataError,
    NonFiniteError,
    processes.ProcessError,
    FileNotFoundError,
    ValueError,
)
"""Errors whose message says what to do: the command line shows no traceback."""


@dataclass(frozen=True)
class Summary:
    """What a run came to.

    Attributes:
        step: Optimizer steps done.
        heldout: (step, held-out loss) of every evaluation of this process.
        skipped: Steps of this process that were skipped as not finite.
        seconds: Wall time of this process's run.
        rows: What the printed table shows.
    """

    step: int
    heldout: list[tuple[int, float]]
    skipped: int
    seconds: float
    rows: list[tuple[str, str]]


def _stored_config(workdir: Path) -> dict[str, Any] | None:
    """The flat config of the run whose checkpoints a folder holds; None if it holds none.

    Raises:
        ConfigError: If there are checkpoints, but nothing that tells of which run.
    """
    if not any(child.name.isdigit() for child in workdir.glob(f"{FOLDER}/*")):
        return None
    try:
        return json.loads((workdir / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{workdir} holds checkpoints, but its config.json cannot be read ({error}): put it back, or "
            "choose another --workdir"
        ) from error


def check_workdir(workdir: Path, config: Config, resume: bool) -> None:
    """Claims a folder for a run of this config, or makes sure that it is one.

    A run without a checkpoint has nothing to lose: another may take its folder.

    Raises:
        ConfigError: If the folder is of a run with another config (the differences are shown), or of one
            whose config is lost.
        CheckpointError: If ``resume`` is asked for and there is nothing to continue.
    """
    if (stored := _stored_config(workdir)) is not None:
        changed = differences(stored, json.loads(json.dumps(flatten(config))))
        if changed:
            lines = [f"  {key}: {old!r} there, {new!r} now" for key, (old, new) in changed.items()]
            raise ConfigError(
                f"{workdir} holds a run of another configuration:\n" + "\n".join(lines) + "\n"
                "Choose another --workdir, or set these keys as they are there."
            )
    elif resume:
        raise CheckpointError(f"--resume: {workdir} holds no run to continue")
    workdir.mkdir(parents=True, exist_ok=True)
    path = workdir / "config.json"
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(flatten(config), indent=1))
    temporary.replace(path)


def with_grid(config: Config, workdir: Path, mesh: Mesh) -> Config:
    """The config with its block grid filled in: that of the run in the folder, or the mesh's.

    Raises:
        ConfigError: If a micro-batch cannot be spread over the mesh, or the config of that run is lost.
    """
    config = config.copy_and_resolve_references()
    known = _stored_config(workdir) or {}
    for axis, blocks in config.targets.grid.items():
        if blocks is None:
            sparse = config.method in SPARSE
            config.targets.grid[axis] = known.get(f"targets.grid.{axis}", mesh.shape[axis] if sparse else 1)
    rows, shards = micro_batch_size(config), mesh.shape["data"] * mesh.shape["fsdp"]
    if rows % shards:
        raise ConfigError(
            f"config.micro_batch_size = {rows}: expected a multiple of {shards}, the size of data x fsdp in "
            "config.mesh"
        )
    return config


@contextmanager
def _stop_on_signal() -> Iterator[Callable[[], bool]]:
    """Turns the first SIGINT or SIGTERM into a request to stop after the current step.

    With several processes SIGTERM is for JAX, which tells all of them (see ``processes.stop_agreed``).
    """
    asked = []
    several = jax.process_count() > 1

    def ask(number: int, frame: Any) -> None:
        asked.append(number)
        for name, handler in before.items():
            signal.signal(name, handler)  # a second signal means it
        if several:
            signal.raise_signal(signal.SIGTERM)

    before = {}
    try:
        for name in (signal.SIGINT,) if several else (signal.SIGINT, signal.SIGTERM):
            before[name] = signal.signal(name, ask)
    except ValueError:  # not in the main thread: whoever runs us there handles signals
        pass
    try:
        yield lambda: bool(asked)
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)


def _find_workdir(workdir: Path, config: Config) -> None:
    """Makes sure that this process sees the folder that the first one has claimed."""
    path, wanted = workdir / "config.json", json.loads(json.dumps(flatten(config)))
    for _ in range(60):  # a network file system may show it late
        if path.exists() and json.loads(path.read_text()) == wanted:
            return
        time.sleep(1)
    raise ConfigError(f"{workdir} is not what process 0 has written there: all processes must see one folder")


def _load_data(config: Config, tokenizer: Any, progress: bool) -> tuple[Data, int]:
    """The data, and the number of steps of the run."""
    data = load_data(data_config(config), tokenizer, progress=progress)
    for source in data.report.sources + data.report.heldout_sources:
        _log.info("%s", source)
    if config.steps is not None:
        return data, config.steps
    return data, len(data.train_dataset(config.batch_size, epochs=config.epochs))


def run(config: Config, workdir: str | Path, *, resume: bool = False, progress: bool = True) -> Summary:
    """Trains as the config says, or continues what the folder holds.

    Where there are several processes (see ``processes.initialise``) all of them call it alike; the first one
    writes and prints. A run may be continued by any number of processes.

    Args:
        config: See ``default_config``.
        workdir: The run's folder: config, checkpoints, metrics.
        resume: Refuse to start a new run.
        progress: Whether to show progress bars.

    Returns:
        A ``Summary``.

    Raises:
        ConfigError: If a key has a bad value, or the folder is of another configuration.
        CheckpointError: If a checkpoint does not fit the run, or is of another base model.
        NonFiniteError: If a step is not finite and ``on_nonfinite`` is "stop".
        ProcessError: If several processes do not agree, or one of them failed to prepare the run.
    """
    workdir = Path(workdir).expanduser()
    processes.check_same({**flatten(config), "--workdir": str(workdir.absolute()), "--resume": resume})
    check_config(config)
    mesh = make_mesh(config.mesh)
    processes.check_devices(mesh)
    config = processes.together(lambda: with_grid(config, workdir, mesh))
    first = processes.is_first()
    processes.together(lambda: check_workdir(workdir, config, resume) if first else None)
    processes.together(lambda: None if first else _find_workdir(workdir, config))
    source = processes.together(lambda: open_model(config.model.source, preset=config.model.preset))
    build.check_layout(config, source.config, mesh)
    with jax.set_mesh(mesh):
        summary = _run(config, workdir, source, mesh, resume, progress and first)
        processes.wait_for_all("the end of the run")
    return summary


def _run(
    config: Config, workdir: Path, source: ModelSource, mesh: Mesh, resume: bool, progress: bool
) -> Summary:
    began, first = time.perf_counter(), processes.is_first()
    known = newest_facts(workdir)  # before any process makes the folder of checkpoints

    def read() -> tuple[Any, Data, int]:
        named = source if config.model.tokenizer is None else open_model(config.model.tokenizer)
        tokenizer = named.tokenizer()
        if len(tokenizer) > source.config.vocab_size:
            raise ConfigError(
                f"the tokenizer has {len(tokenizer)} tokens, the model only {source.config.vocab_size}"
            )
        return tokenizer, *_load_data(config, tokenizer, progress)

    tokenizer, data, total = processes.together(read)
    micro = micro_batch_size(config)
    mine = local_rows(micro, mesh)  # the rows of every micro-batch that this process makes
    heldout = data.heldout_batches(micro, mine)[: config.eval_batches]
    if known is None:
        adapted = build.targets(config, source.config)
    else:  # a run that was regridded has other numbers of entries than its budget would give
        adapted = build.with_axes(stored_targets(known))
    schedule = build.reselection(config, total)
    rate = build.learning_rate(config, total)
    training = build.training(config, source.config, adapted, schedule, rate)

    params = source.load(
        jnp.dtype(config.model.dtype),
        sharding=lambda name, shape: param_sharding(name, shape, mesh),
        seed=config.seed,
        packed=config.method != "full",
        progress=progress,
    )
    base_print = fingerprint(params)
    if known is not None and (names := differing(known["fingerprint"], base_print)):
        raise CheckpointError(
            f"{workdir} was trained on another base model: these weights differ: {', '.join(names)}"
        )
    size = sum(param.size for param in params.values())

    with (
        Checkpoints(workdir, config.checkpoint_keep) as checkpoints,
        _stop_on_signal() as stop_asked,
    ):
        if resume and known is None:
            raise CheckpointError(f"--resume: {workdir} holds no checkpoint to continue from")
        shardings = state_shardings(jax.eval_shape(training.init, params), adapted, mesh)
        compiled = partial(
            jax.jit, donate_argnums=0, out_shardings=shardings, compiler_options=compiler_options()
        )
        begin = compiled(lambda params: training.init(params))
        state = begin(params)
        del params
        tunable = sum(leaf.size for leaf in jax.tree.leaves(state.trainable))
        _log.info("%d tunable of %d parameters (%.2f%%)", tunable, size, 100 * tunable / size)
        rows = [start + row for start in range(0, config.batch_size, micro) for row in mine]
        batches = data.train_iterator(config.batch_size, steps=total, rows=rows)
        start = 0
        if known is not None:
            start = known["step"]
            batches.set_state(known["data"])
            restored = checkpoints.restore(state, start)
            attach = compiled(lambda *parts: training.attach(*parts))
            state = attach(state.params, restored.trainable, restored.opt_state)
            _log.info("continuing after step %d of %d", start, total)

        def save(step: int, state: TrainState) -> None:
            facts = {"config": flatten(config), "fingerprint": base_print, "data": batches.get_state()}
            checkpoints.save(step, state, adapted, facts)

        place = partial(spread_batch, mesh=mesh, rows=micro)
        tokens = data.batch_tokens(config.batch_size, steps=total).tolist()
        if jax.process_count() > 1:
            stop_asked = processes.stop_agreed(start)
        with Recorder(workdir if first else None, start, total, progress) as recorder:
            profile = Profile(workdir / "profile", start + 3, config.profile if first else 0)
            loop = Loop(config, training, schedule, rate, place, tokens, heldout, recorder, save, profile)
            state, step = loop.run(state, batches, start, total, stop_asked)
            if step < total:
                recorder.say(f"stopped after step {step} of {total}: run the same command to continue")
        checkpoints.wait()

    rows = [
        ("steps", f"{step} of {total}"),
        ("tunable parameters", f"{tunable:,} ({100 * tunable / size:.2f}% of {size:,})"),
        ("train examples", f"{data.report.examples:,} ({data.report.fill:.0%} of row slots filled)"),
        *[(f"held-out loss, step {s}", f"{loss:.4f}") for s, loss in loop.heldout_losses],
        ("skipped steps", str(loop.skipped)),
        ("seconds, all / training", f"{time.perf_counter() - began:.0f} / {loop.seconds:.0f}"),
        ("peak memory", f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB of host"),
        ("run folder", str(workdir)),
    ]
    if first:
        print(table(rows, f"{config.method} on {config.model.source}"), flush=True)
    if config.sample.prompt and step == total:
        _show_sample(config, source.config, training, state, tokenizer)
    return Summary(step, loop.heldout_losses, loop.skipped, time.perf_counter() - began, rows)


def _show_sample(config: Config, model: Any, training: Training, state: TrainState, tokenizer: Any) -> None:
    """Prints what the base and the tuned model reply to the config's prompt; all processes compute it."""
    say = partial(print, flush=True) if processes.is_first() else lambda text: None
    say(f"\nprompt: {config.sample.prompt}")
    for name, params in (("base", training.pretrained(state)), ("tuned", training.tuned(state))):
        if params is not None:
            text = reply(
                model, params, tokenizer, config.sample.prompt, max_new_tokens=config.sample.max_new_tokens
            )
            say(f"{name:>6}: {text}")


_CONFIG = config_flags.DEFINE_config_file("config", None, "A file with get_config(), such as configs/*.py.")
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of the run; default: runs/ and the name of the config file."
)
_RESUME = flags.DEFINE_bool("resume", False, "Continue the run in --workdir; refuse to start a new one.")
_DISTRIBUTED = flags.DEFINE_bool("distributed", False, "One of several processes; JAX detects which.")
_COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "host:port of process 0, in all of several processes."
)
_PROCESSES = flags.DEFINE_integer("num_processes", None, "With --coordinator: how many processes there are.")
_PROCESS = flags.DEFINE_integer("process_id", None, "With --coordinator: which of these this is, from 0.")


def main(argv: list[str]) -> None:
    """Entry point of ``python -m spiel_jax.train``."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    name = Path(config_flags.get_config_filename(flags.FLAGS["config"])).stem
    workdir = _WORKDIR.value or os.path.join("runs", name)
    where = ""
    try:
        processes.initialise(_COORDINATOR.value, _PROCESSES.value, _PROCESS.value, detect=_DISTRIBUTED.value)
        where = f" in {processes.name()}" if processes.name() else ""
        if not processes.is_first():  # what is worth saying, the first says; errors are raised
            logging.getLogger("spiel_jax").setLevel(logging.ERROR)
        run(_CONFIG.value, workdir, resume=_RESUME.value)
    except _MENDABLE as error:
        _log.debug("", exc_info=True)
        sys.exit(f"error{where}: {error}")
    except Exception as error:
        if where:
            error.add_note(f"This was{where}.")
        raise


if __name__ == "__main__":
    absl_logging.set_verbosity(absl_logging.WARNING)  # Orbax tells of every file at INFO
    logging.getLogger("spiel_jax").setLevel(logging.INFO)
    flags.mark_flag_as_required("config")
    app.run(main)
