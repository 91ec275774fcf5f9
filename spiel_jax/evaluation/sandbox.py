"""Programs that a model wrote, run where they can do little harm.

Each runs in a Python of its own: without environment, in an empty folder that is deleted afterwards, with
limits of time, memory, size of files and number of processes. What it opens, starts or connects to is asked
for by Python's audit events, and refused outside that folder and the standard library. This holds back what
models write by accident. It is no wall against an attacker: for that, put the whole evaluation into a
container or a virtual machine.
"""

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from spiel_jax.evaluation import sandboxed


@dataclass(frozen=True)
class Limits:
    """What a program may use.

    Attributes:
        seconds: Of processor time; three times as many pass before it is stopped in any case.
        memory: Bytes of address space.
        file_size: Bytes of a file that it writes.
    """

    seconds: int = 5
    memory: int = 1 << 30
    file_size: int = 1 << 20


def passes(program: str, limits: Limits | None = None) -> bool:
    """Whether a program runs to its end, with its assertions, within its limits.

    Example:
        >>> passes("assert 1 + 1 == 2"), passes("assert 1 + 1 == 3"), passes("import os; os._exit(0)")
        (True, False, False)
    """
    limits, word = limits or Limits(), secrets.token_hex(16)
    asked = json.dumps({"program": program, "word": word, **asdict(limits)}).encode()
    with tempfile.TemporaryDirectory(prefix="spiel-sandbox-") as folder:
        with subprocess.Popen(
            [sys.executable, "-I", "-S", sandboxed.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={},
            start_new_session=True,  # what it starts ends with it
        ) as process:
            try:
                said = process.communicate(asked, timeout=3 * limits.seconds)[0]
            except subprocess.TimeoutExpired:
                said = b""
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
        _make_writable(Path(folder))
    return said == word.encode()


def all_pass(programs: list[str], limits: Limits | None = None) -> list[bool]:
    """``passes`` of each, some at a time."""
    with ThreadPoolExecutor(max(os.cpu_count() or 1, 1)) as pool:
        return list(pool.map(lambda program: passes(program, limits), programs))


def _make_writable(folder: Path) -> None:
    """So that it can be deleted."""
    for path in folder.rglob("*"):
        if path.is_dir() and not path.is_symlink():
            path.chmod(0o700)
