"""One process to a run's folder: a lock that tells who holds it."""

import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from spiel_jax.errors import SpielError

LOCK = "lock.json"
"""Name of the lock in a run's folder."""


class InUse(SpielError):
    """Another process trains in the run's folder."""


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds a run's folder, which is there, against other processes.

    The file names host and process. The system lets go of a lock (``flock``) when its process ends, however
    it ends; then the next process on this host takes it over. Where a file system has no such locks, whether
    that process still lives decides. What another host left cannot be told from what it holds.

    Args:
        folder: The run's folder.

    Raises:
        InUse: If another process has it, or one on another host may have it.
        OSError: If the folder cannot be written.
    """
    path = folder / LOCK
    file = _acquired(path)
    try:
        yield
    finally:
        with suppress(OSError):  # the folder may be gone
            if _is_at(file, path) and _holder(file) == _this_process():
                path.unlink()
        os.close(file)


def _acquired(path: Path) -> int:
    """The lock's file, open and held."""
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            free = _flock(file)
            if not _is_at(file, path):  # whoever held it has just removed it
                os.close(file)
                continue
            _check_free(path, _holder(file), free)
            os.ftruncate(file, 0)
            os.pwrite(file, json.dumps(_this_process()).encode(), 0)
            return file
        except BaseException:
            os.close(file)
            raise


def _flock(file: int) -> bool | None:
    """Whether the system gives the lock; None where it has none for such files."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _check_free(path: Path, holder: dict[str, Any] | None, free: bool | None) -> None:
    if holder is None:
        if free is False:
            raise InUse(
                f"{path.parent} is in use by another process: wait for it, or choose another --workdir"
            )
        return  # a process ended before it had written who it is
    host, pid = holder["host"], holder["pid"]
    if host == socket.gethostname():
        if free is False or _alive(holder):
            raise InUse(
                f"{path.parent} is in use: process {pid} on this host trains in it. Wait for it, stop it, or "
                "choose another --workdir"
            )
    else:
        raise InUse(
            f"{path.parent} is in use, or was left by a process that was killed: process {pid} on the host "
            f"{host!r} holds it, and whether that still runs cannot be told from here. If it does not, "
            f"remove {path} and run the same command"
        )


def _is_at(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), os.stat(path))
    except FileNotFoundError:
        return False


def _holder(file: int) -> dict[str, Any] | None:
    """Who has written the lock; None if it does not say."""
    try:
        holder = json.loads(os.pread(file, 4096, 0))
        sound = isinstance(holder["host"], str) and type(holder["pid"]) is int and 0 < holder["pid"] < 2**31
    except (ValueError, TypeError, KeyError):
        return None
    return holder if sound else None


def _this_process() -> dict[str, Any]:
    return {"host": socket.gethostname(), "pid": os.getpid(), "began": _began(os.getpid())}


def _alive(holder: dict[str, Any]) -> bool:
    """Whether a process of this host runs, and is not a later one of the same number."""
    try:
        os.kill(holder["pid"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # somebody else's
    return holder.get("began") == _began(holder["pid"])


def _began(pid: int) -> str | None:
    """When a process began, in ticks since the system did; None if it has ended or cannot be told."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError):
        return None
    return None if state in "ZX" else fields[18]
