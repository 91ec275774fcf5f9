"""A training run from its configuration to its summary."""

import datetime
import logging
import time
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from spiel_jax.adapters.start import Start, read_start
from spiel_jax.checkpoint import (
    CheckpointError,
    Checkpoints,
    newest_metadata,
    read_metadata,
    restore_state,
    set_aside,
    stored_targets,
)
from spiel_jax.config import (
    Config,
    check_config,
    check_micro_batch,
    flatten,
    micro_batch_size,
    unflatten,
    with_defaults,
)
from spiel_jax.data.reports import taken
from spiel_jax.data.templates import templates_of
from spiel_jax.distributed import processes
from spiel_jax.distributed.mesh import make_mesh, shard_batch
from spiel_jax.inference.chat import reply
from spiel_jax.methods.configured import check_layout, learning_rate
from spiel_jax.methods.method import Method, TrainState, compiled_start
from spiel_jax.methods.registry import build, method_class
from spiel_jax.models.axes import param_sharding
from spiel_jax.models.io.fingerprint import differing, fingerprint
from spiel_jax.models.io.loading import ModelSource, open_model
from spiel_jax.models.storage import storage_for
from spiel_jax.places import local_path
from spiel_jax.training.continuing import (
    check_config_of,
    tell_of_cut_phase,
)
from spiel_jax.training.host_memory import given_back_after_compiling
from spiel_jax.training.inputs import Claim, Inputs, read_inputs, step_tokens, training_batches
from spiel_jax.training.interrupts import stop_on_signal
from spiel_jax.training.loop import Loop
from spiel_jax.training.metrics import Recorder, peak_memory, record_replies, table
from spiel_jax.training.nonfinite import check_base
from spiel_jax.training.profiler import Profile
from spiel_jax.training.watching import watch
from spiel_jax.training.workdir import (
    as_given,
    check_usable,
    find_workdir,
    held,
    settings,
    stored_config,
    with_known_places,
    write_config,
)

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
        finished: Whether all steps are done; otherwise a signal stopped the run.
    """

    step: int
    heldout: list[tuple[int, float]]
    skipped: int
    seconds: float
    rows: list[tuple[str, str]]
    finished: bool


def run(
    config: Config,
    workdir: str | Path,
    *,
    resume: bool = False,
    resume_from: int | None = None,
    extend: bool = False,
    accept_new_data: bool = False,
    progress: bool = True,
) -> Summary:
    """Trains as the config says, or continues what the folder holds.

    Where there are several processes (see ``processes.initialise``) all of them call it alike; the first one
    writes and prints. A run may be continued by any number of processes.

    Args:
        config: See ``default_config``.
        workdir: The run's folder: config, checkpoints, metrics.
        resume: Refuse to start a new run.
        resume_from: Step of the checkpoint to continue from, if not the newest; later ones are moved to the
            folder's "set_aside".
        extend: Let the config ask for more steps than the run had, and for other schedules over them.
        accept_new_data: Continue although data, tokenizer or chat template have changed.
        progress: Whether to show progress bars.

    Returns:
        A ``Summary``.

    Raises:
        ConfigError: If a key has a bad value, the folder is of another configuration or cannot be used.
        CheckpointError: If a checkpoint is damaged, does not fit the run, is of another base model or of
            other data, or cannot be saved.
        InUse: If another process trains in the folder.
        NonFiniteError: If a step is not finite and ``on_nonfinite`` is "stop".
        ProcessError: If several processes do not agree, or one of them failed to prepare the run.
    """
    workdir, first = local_path(workdir, "--workdir"), processes.is_first()
    options = {
        "--resume": resume,
        "--resume_from": resume_from,
        "--extend": extend,
        "--accept_new_data": accept_new_data,
    }
    processes.check_same({**flatten(config), "--workdir": str(workdir.absolute()), **options})
    check_config(config)
    mesh = make_mesh(config.mesh)
    processes.check_devices(mesh)
    check_micro_batch(config, mesh.shape)
    flag = next((name for name in ("--extend", "--resume_from", "--resume") if options[name]), None)
    processes.together(lambda: _check_folder(workdir, flag) if first else None)
    with ExitStack() as stack:
        processes.together(lambda: stack.enter_context(held(workdir)) if first else None)
        known = _known(workdir, resume_from)  # before any process makes the folder of checkpoints
        processes.check_same({"newest checkpoint in --workdir": None if known is None else known["step"]})
        claim = Claim(workdir, as_given(config), known, accept_new_data)
        config = with_known_places(config, known)
        config = with_defaults(config, mesh.shape, {} if known is None else known["config"])
        if known is None:
            processes.together(lambda: write_config(workdir, config) if first else None)
            processes.together(lambda: None if first else find_workdir(workdir, config))
        else:
            check_config_of(workdir, known, config, extend=extend, accept_new_data=accept_new_data)
        source = processes.together(lambda: open_model(config.model.source, preset=config.model.preset))
        has_deltas = method_class(config.method).has_deltas
        check_layout(config, source.config, mesh, has_deltas=has_deltas)
        with jax.set_mesh(mesh), given_back_after_compiling():
            summary = _run(config, claim, source, mesh, progress and first)
            processes.wait_for_all("the end of the run")
    return summary


def _known(workdir: Path, resume_from: int | None) -> dict[str, Any] | None:
    """Metadata of the checkpoint that is continued; None for a new run."""
    return newest_metadata(workdir) if resume_from is None else read_metadata(workdir, resume_from)


def _check_folder(workdir: Path, flag: str | None) -> None:
    """Refuses a folder that no run could use, or, where a flag asks for it, one with nothing to continue."""
    check_usable(workdir)
    if stored_config(workdir) is None and flag is not None:
        raise CheckpointError(f"{flag}: {workdir} holds no run to continue")


def _run(config: Config, claim: Claim, source: ModelSource, mesh: Mesh, progress: bool) -> Summary:
    began, first = time.perf_counter(), processes.is_first()
    workdir, known = claim.workdir, claim.known
    begin = None
    if known is None:  # what does not fit the model is refused before data are read
        begin = processes.together(lambda: read_start(config, source.config))
        build(config, source.config, config.steps or 1, begin and begin.targets)
    now = datetime.datetime.now().isoformat(timespec="seconds")
    date = processes.of_first((known or {}).get("date", now))  # earlier versions kept none
    inputs = processes.together(lambda: read_inputs(config, claim, source, mesh, date, progress))
    if known is not None:  # not before it is known to be the same run
        processes.together(lambda: write_config(workdir, config) if first else None)
    steps = inputs.course.steps
    if known is None and config.steps is None:  # how long the epochs are is known only now
        told = config.copy_and_resolve_references()
        told.steps = steps
        check_config(told)
    method = _method(config, known, source, steps, begin)
    place = config.model.tokenizer or config.model.source
    watched = processes.together(lambda: watch(config, source.config, method, inputs.tokenizer, date, place))
    trained = begin and begin.trainable(method)
    params, base_print = _base(config, claim, source, mesh, method, progress)
    if begin:
        begin.check(base_print, config.model.source)
    size = sum(param.size for param in params.values())

    if known is not None:
        processes.together(lambda: _clear_way(workdir, known["step"]) if first else None)
    with (
        Checkpoints(
            workdir,
            config.checkpoint_keep,
            keep_best=config.checkpoint_keep_best,
            heldout=inputs.data.fingerprint["heldout"]["tokens"],
        ) as checkpoints,
        stop_on_signal(jax.process_count() > 1) as stop_asked,
    ):
        state, start = _first_state(method, params, mesh, workdir, known, trained)
        del params
        tunable = method.tunable(state)
        _log.info("%d tunable of %d parameters (%.2f%%)", tunable, size, 100 * tunable / size)
        if start:
            _log.info("continuing after step %d of %d", start, steps)
        batches = training_batches(config, inputs, known)

        def save(step: int, state: TrainState, heldout_loss: float | None, last: bool) -> None:
            metadata = {
                "config": settings(config),
                "places": claim.places,
                "fingerprint": base_print,
                "identity": inputs.identity,
                "steps": steps,
                "data_since": inputs.course.since,
                "data": batches.get_state(),
                "date": date,
                "chat_template": templates_of(inputs.tokenizer),
            }
            checkpoints.save(step, state, method, metadata, heldout_loss, last=last)

        if jax.process_count() > 1:
            stop_asked = processes.stop_agreed(start)
        samples = bool(config.sample.prompts)
        with Recorder(workdir if first else None, start, steps, progress, samples) as recorder:
            loop = Loop(
                config=config,
                method=method,
                rate=learning_rate(config, steps),
                place=partial(shard_batch, mesh=mesh, rows=micro_batch_size(config)),
                tokens=step_tokens(config, inputs),
                heldout=inputs.heldout,
                recorder=recorder,
                save=save,
                watch=watched,
                best=checkpoints.best_loss if config.checkpoint_keep_best else None,
                profile=Profile(workdir / "profile", start + 3, config.profile if first else 0),
            )
            state, step = loop.run(state, batches, start, steps, stop_asked)
            if step < steps:
                recorder.say(f"stopped after step {step} of {steps}: run the same command to continue")
        checkpoints.wait()

    summary = _summary(loop, inputs, step, time.perf_counter() - began, (tunable, size), workdir)
    if first:
        print(table(summary.rows, f"{config.method} on {config.model.source}"), flush=True)
    if config.sample.prompt and step == steps:
        replies = _sample(config, source.config, method, state, inputs.tokenizer, date)
        if first:
            of = {"base": 0, "tuned": step}
            record_replies(workdir, step, {of[n]: {config.sample.prompt: r} for n, r in replies.items()})
    return summary


def _method(
    config: Config, known: dict[str, Any] | None, source: ModelSource, steps: int, begin: Start | None
) -> Method:
    """What the run trains with, new or as it was."""
    if known is None:
        return build(config, source.config, steps, begin and begin.targets)
    targets = stored_targets(known)  # of a run that was regridded the budget would give others
    method = build(config, source.config, steps, targets)
    if known.get("steps", steps) < steps:
        before = build(unflatten(known["config"]), source.config, known["steps"], targets)
        tell_of_cut_phase(known["step"], before, method)
    return method


def _base(
    config: Config, claim: Claim, source: ModelSource, mesh: Mesh, method: Method, progress: bool
) -> tuple[Any, dict[str, str]]:
    """The model's parameters, and the fingerprint of them."""
    dtype = jnp.dtype(config.model.dtype)
    params = source.load(
        dtype,
        sharding=lambda name, shape: param_sharding(name, shape, mesh),
        seed=config.seed,
        storage=storage_for(config.model.quantization, dtype) if method.keeps_base else None,
        requantize=config.model.requantize,
        progress=progress,
    )
    found = _checked_fingerprint(params, claim.known, claim.workdir)
    check_base(params, config.model.source)
    return params, found


def _clear_way(workdir: Path, step: int) -> None:
    """Moves checkpoints of later steps away; none of them is the one that is continued."""
    for place in set_aside(workdir, step):
        _log.warning("a checkpoint of a later step than %d, which is continued, is now %s", step, place)


def _checked_fingerprint(params: Any, known: dict[str, Any] | None, workdir: Path) -> dict[str, str]:
    """The fingerprint of the base weights, which must be that of the run that is continued."""
    found = fingerprint(params)
    if known is not None and (names := differing(known["fingerprint"], found)):
        raise CheckpointError(
            f"{workdir} was trained on another base model: these weights differ: {', '.join(names)}"
        )
    return found


def _first_state(
    method: Method,
    params: Any,
    mesh: Mesh,
    workdir: Path,
    known: dict[str, Any] | None,
    trained: Any,
) -> tuple[TrainState, int]:
    """The state to start from and its step; reuses the memory of ``params``.

    It is that of the checkpoint ``known``, or a new one, with what an adapter has ``trained``.
    """
    shardings = method.shardings(jax.eval_shape(method.init, params), mesh)
    begin, attach = compiled_start(method, shardings)
    state = begin(params)
    if known is None and trained is None:
        return state, 0
    if known is None:
        first = method.begun(state, trained)
        first = jax.tree.map(lambda new, old: jax.device_put(new, old.sharding), first, state)
    else:
        first = restore_state(workdir, state, method, known["step"])
    return attach(state.params, first.trainable, first.opt_state), known["step"] if known else 0


def _summary(
    loop: Loop, inputs: Inputs, step: int, seconds: float, sizes: tuple[int, int], workdir: Path
) -> Summary:
    (tunable, size), report = sizes, inputs.data.report
    rows = [
        ("steps", f"{step} of {inputs.course.steps}"),
        ("tunable parameters", f"{tunable:,} ({100 * tunable / size:.2f}% of {size:,})"),
        ("train examples", f"{report.examples:,} ({report.fill:.0%} of row slots filled)"),
        ("rows left out / cut", taken(report.sources)),
        *[(f"held-out loss, step {s}", f"{loss:.4f}") for s, loss in loop.heldout_losses],
        ("skipped steps", str(loop.skipped)),
        ("seconds, all / training", f"{seconds:.0f} / {loop.seconds:.0f}"),
        ("peak memory", f"{peak_memory()['peak_host_gib']:.2f} GiB of host"),
        ("run folder", str(workdir)),
    ]
    finished = step == inputs.course.steps
    return Summary(step, loop.heldout_losses, loop.skipped, seconds, rows, finished)


def _sample(
    config: Config, model: Any, method: Method, state: TrainState, tokenizer: Any, date: str
) -> dict[str, str]:
    """What the base and the tuned model reply to the config's prompt, printed; all processes compute it."""
    say = partial(print, flush=True) if processes.is_first() else lambda text: None
    say(f"\nprompt: {config.sample.prompt}")
    replies = {}
    for name, params in (("base", method.pretrained(state)), ("tuned", method.tuned(state))):
        if params is not None:
            replies[name] = reply(
                model,
                params,
                tokenizer,
                config.sample.prompt,
                max_new_tokens=config.sample.max_new_tokens,
                date=datetime.datetime.fromisoformat(date),
            )
            say(f"{name:>6}: {replies[name]}")
    return replies
