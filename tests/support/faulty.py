"""Runs the training command, and kills it or fails its file-system calls on the way.

    python -m support.faulty FAULT train-arguments ...

FAULT is ``none``, ``kill:N`` (SIGKILL at the N-th call that touches the folder), ``kill:N:S`` (S seconds
after it), ``error:N:ERRNO`` (that call fails), or ``size:BYTES`` (no file may grow beyond it: a full disk).
How many such calls there were goes to the file that CALLS names in the environment.
"""

import atexit
import os
import resource
import runpy
import signal
import sys
import threading
from pathlib import Path

WRITES = (
    "os.mkdir",
    "os.rename",
    "os.remove",
    "os.rmdir",
    "os.truncate",
    "os.chmod",
    "os.utime",
    "shutil.rmtree",
)


def is_of(folder, event, arguments):
    """Whether an audited call changes something in a folder."""
    if event == "open":
        path, _, flags = arguments
        if isinstance(flags, int) and not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return False
        return isinstance(path, str | bytes | os.PathLike) and os.fsdecode(path).startswith(folder)
    if event not in WRITES:
        return False
    paths = (path for path in arguments if isinstance(path, str | bytes | os.PathLike))
    return any(os.fsdecode(path).startswith(folder) for path in paths)


def main(fault, folder, arguments):
    kind, *numbers = fault.split(":")
    calls = 0

    def die():
        os.kill(os.getpid(), signal.SIGKILL)

    def hook(event, details):
        nonlocal calls
        if not is_of(folder, event, details):
            return
        calls += 1
        if kind in ("kill", "error") and calls == int(numbers[0]):
            if kind == "error":
                raise OSError(int(numbers[1]), os.strerror(int(numbers[1])))
            if len(numbers) == 1:
                die()
            threading.Timer(float(numbers[1]), die).start()

    if kind == "size":
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(
            resource.RLIMIT_FSIZE, (int(numbers[0]), resource.getrlimit(resource.RLIMIT_FSIZE)[1])
        )
    if counted := os.environ.get("CALLS"):
        atexit.register(lambda: Path(counted).write_text(str(calls)))
    sys.addaudithook(hook)
    sys.argv = ["train", f"--workdir={folder}", *arguments]
    runpy.run_module("spiel_jax.train", run_name="__main__", alter_sys=False)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
