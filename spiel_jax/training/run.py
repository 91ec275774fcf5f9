"""A training run from its configuration to its summary."""

import logging
import resource
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from spiel_jax.checkpoint import CheckpointError, Checkpoints, newest_facts, stored_targets
from spiel_jax.config import Config, ConfigError, check_config, data_config, flatten, micro_batch_size
from spiel_jax.data import Data, load_data
from spiel_jax.distributed import processes
from spiel_jax.distributed.mesh import local_rows, make_mesh, spread_batch
from spiel_jax.inference.chat import reply
from spiel_jax.methods import registry as build
from spiel_jax.methods.method import Training, TrainState, compiler_options, state_shardings
from spiel_jax.models.axes import param_sharding
from spiel_jax.models.io.fingerprint import differing, fingerprint
from spiel_jax.models.io.loading import ModelSource, open_model
from spiel_jax.training.loop import Loop
from spiel_jax.training.metrics import Recorder, table
from spiel_jax.training.profiler import Profile
from spiel_jax.training.workdir import check_workdir, find_workdir, with_grid

_log = logging.getLogger(__name__)


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
    processes.together(lambda: None if first else find_workdir(workdir, config))
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
