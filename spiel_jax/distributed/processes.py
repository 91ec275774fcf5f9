"""Runs of several processes, each with devices of its own: how they find each other, agree, and stop.

All processes run the same program. Errors that one of them comes upon alone are agreed on where the others
would wait for it otherwise. With one process, nothing here does anything.
"""

import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from spiel_jax.errors import SpielError

T = TypeVar("T")

_PATIENCE = 30
"""Seconds that a process that ends waits for the others, before JAX ends them all."""


class ProcessError(SpielError, RuntimeError):
    """The processes of a run do not find each other, do not agree, or another one failed."""


def initialise(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    detect: bool = False,
) -> None:
    """Connects the processes of a run; to be called before JAX looks for devices.

    Args:
        coordinator: host:port at which process 0 can be reached, the same in all processes.
        num_processes: How many there are.
        process_id: Which one this is, from 0.
        detect: Take all of these from the environment: Slurm, Open MPI, Kubernetes, a TPU pod.

    Raises:
        SpielError: If only some of the three are given, or a value is not allowed.
        ProcessError: If there is nothing to detect, or the others are not found.
    """
    given = {"--coordinator": coordinator, "--num_processes": num_processes, "--process_id": process_id}
    missing = [name for name, value in given.items() if value is None]
    if len(missing) == len(given):
        if detect:
            _connect("--distributed: JAX detects no processes here (or give --coordinator, ...)")
        return
    if detect:
        found = ", ".join(name for name in given if name not in missing)
        raise SpielError(f"--distributed detects what {found} would say: give one or the other")
    if missing:
        raise SpielError(f"{' and '.join(missing)} missing: {', '.join(given)} belong together")
    host, _, port = str(coordinator).rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise SpielError(f"--coordinator={coordinator}: expected host:port")
    if num_processes is None or num_processes < 1:
        raise SpielError(f"--num_processes={num_processes}: expected at least 1")
    if process_id is None or not 0 <= process_id < num_processes:
        raise SpielError(f"--process_id={process_id}: expected 0 to {num_processes - 1}")
    _connect(
        f"the {num_processes} processes do not find each other at {coordinator}",
        coordinator_address=coordinator,
        num_processes=num_processes,
        process_id=process_id,
        cluster_detection_method="deactivate",  # it would also choose the devices
    )


def _connect(problem: str, **options: Any) -> None:
    try:
        jax.distributed.initialize(shutdown_timeout_seconds=_PATIENCE, **options)
    except (ValueError, RuntimeError) as error:
        raise ProcessError(f"{problem}: {error}") from error


def is_first() -> bool:
    """Whether this is the process that writes and prints what all of them know."""
    return jax.process_index() == 0


def name() -> str:
    """``process 1 of 4``; empty with one process."""
    count = jax.process_count()
    return f"process {jax.process_index()} of {count}" if count > 1 else ""


@contextmanager
def errors_say_where() -> Iterator[None]:
    """Errors in here say in which process they were raised, where there are several."""
    try:
        yield
    except Exception as error:
        if not name():
            raise
        if isinstance(error, SpielError):
            raise ProcessError(f"in {name()}: {error}") from error
        error.add_note(f"This was in {name()}.")
        raise


def of_first(text: str) -> str:
    """The text of the first process, in all of them; every process calls it."""
    return text if jax.process_count() == 1 else _gathered(text)[0]


def wait_for_all(what: str) -> None:
    """Returns when all processes have come to ``what``."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


def together(function: Callable[[], T]) -> T:
    """What ``function`` returns in this process; where it fails in one, it fails in all.

    Args:
        function: Does nothing that needs another process.

    Raises:
        ProcessError: If it failed in another process, with the message of that.
    """
    if jax.process_count() == 1:
        return function()
    result, error = None, None
    try:
        result = function()
    except Exception as raised:
        error = raised
    messages = _gathered("" if error is None else str(error) or repr(error))
    if error is not None:
        raise error
    for number, message in enumerate(messages):
        if message:
            raise ProcessError(f"process {number} failed: {message}")
    return result  # pyright: ignore[reportReturnType]


def check_same(facts: Mapping[str, Any]) -> None:
    """Makes sure that JSON-like facts are the same in all processes.

    Raises:
        ProcessError: If they are not, in all processes; the keys and values that differ are shown.
    """
    if jax.process_count() == 1:
        return
    first, *others = map(json.loads, _gathered(json.dumps(facts, default=str)))
    for number, other in enumerate(others, start=1):
        if other != first:
            lines = [
                f"  {key}: {first.get(key)!r} in process 0, {other.get(key)!r} in process {number}"
                for key in sorted(first.keys() | other.keys())
                if first.get(key) != other.get(key)
            ]
            raise ProcessError("the processes were started differently:\n" + "\n".join(lines))


def check_devices(mesh: Mesh) -> None:
    """Makes sure that every process has a part in a mesh.

    Raises:
        ProcessError: If one has not.
    """
    used = {device.process_index for device in mesh.devices.flat}
    idle = [number for number in range(jax.process_count()) if number not in used]
    if idle:
        raise ProcessError(
            f"a mesh of {mesh.size} devices leaves process {', '.join(map(str, idle))} of "
            f"{jax.process_count()} without one: use all {jax.device_count()} devices, or fewer processes"
        )


def _gathered(text: str) -> list[str]:
    """The texts of all processes."""
    data = np.frombuffer(text.encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.int32(data.size)).tolist()
    if not any(lengths):
        return [""] * len(lengths)
    padded = multihost_utils.process_allgather(np.pad(data, (0, max(lengths) - data.size)))
    return [bytes(row[:length]).decode() for row, length in zip(padded, lengths, strict=True)]


def stop_agreed(start: int) -> Callable[[], bool]:
    """What all processes ask after every step: whether this is the one after which all of them stop.

    A SIGTERM to one process asks for it. JAX's preemption service listens to it and agrees on the step, with
    no exchange between devices, and with none at all until there is a request.

    Args:
        start: Number of steps done.
    """
    reached = multihost_utils.reached_preemption_sync_point
    steps = itertools.count(start + 1)
    early = reached(1)  # when a request came before the first step: it is due at 1, whatever that step is
    reached(start)
    return lambda: reached(next(steps)) or early
