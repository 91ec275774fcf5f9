"""Inside the sandbox: reads a program from standard input, gives up what it may not have, and runs it.

It is run as a file, by ``evaluation.sandbox``, and imports nothing but the standard library.
"""

import json
import os
import resource
import sys
from typing import Any

_PATHS = {
    "open": 1,
    "os.chdir": 1,
    "os.chmod": 1,
    "os.chown": 1,
    "os.link": 2,
    "os.listdir": 1,
    "os.mkdir": 1,
    "os.remove": 1,
    "os.rename": 2,
    "os.rmdir": 1,
    "os.scandir": 1,
    "os.symlink": 2,
    "os.truncate": 1,
    "os.utime": 1,
}
"""Audit events whose first arguments are paths, and how many of them."""

_READS = ("open", "os.listdir", "os.scandir")
_REFUSED = (
    "ctypes.",
    "fcntl.",
    "mmap.",
    "os.add_dll_directory",
    "os.exec",
    "os.fork",
    "os.forkpty",
    "os.getxattr",
    "os.kill",
    "os.killpg",
    "os.listxattr",
    "os.posix_spawn",
    "os.putenv",
    "os.removexattr",
    "os.setxattr",
    "os.spawn",
    "os.startfile",
    "os.system",
    "pty.",
    "resource.",
    "signal.pthread_kill",
    "socket.",
    "subprocess.",
    "syslog.",
    "urllib.",
    "webbrowser.",
)
"""Beginnings of the names of audit events that are refused."""
_MODULES = {"_ctypes", "_multiprocessing", "_posixsubprocess", "_socket", "_posixshmem", "ctypes", "gc"}
"""Modules that could go round the audit events."""


def guard(folder: str, readable: list[str]) -> Any:
    """The audit hook of a program that may write in ``folder``, and read there and in ``readable``."""
    folders = [os.path.realpath(place) + os.sep for place in (folder, *readable)]
    realpath, fspath, fsdecode = os.path.realpath, os.fspath, os.fsdecode

    def within(place: Any, reads: bool) -> bool:
        if place is None:  # the current folder
            return True
        if isinstance(place, int):  # one that is open already
            return place > 2
        real = realpath(fsdecode(fspath(place))) + os.sep
        return any(real.startswith(one) for one in (folders if reads else folders[:1]))

    def hook(event: str, arguments: tuple) -> None:
        if event == "import" and arguments[0] in _MODULES:
            raise PermissionError(f"import {arguments[0]}")
        if event.startswith(_REFUSED):
            raise PermissionError(event)
        if event in _PATHS:
            reads = event in _READS
            if event == "open":
                mode, flags = arguments[1], arguments[2]
                written = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
                reads = not (flags & written) and not (mode and set(mode) & set("wax+"))
            for place in arguments[: _PATHS[event]]:
                if not within(place, reads):
                    raise PermissionError(f"{event}: {place}")

    return hook


def main() -> None:
    """Runs the program; says the word that it was told if the program came to its end."""
    asked = json.load(sys.stdin)
    out = os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    limit = resource.setrlimit
    for kind, most in (
        (resource.RLIMIT_CPU, asked["seconds"]),
        (resource.RLIMIT_AS, asked["memory"]),
        (resource.RLIMIT_FSIZE, asked["file_size"]),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_NPROC, 0),
    ):
        hard = resource.getrlimit(kind)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        limit(kind, (most, most))
    program, word, write = compile(asked["program"], "program", "exec"), asked["word"].encode(), os.write
    library = [os.path.dirname(os.__file__), *[path for path in sys.path if path]]
    sys.addaudithook(guard(os.getcwd(), library))
    exec(program, {"__name__": "__main__"})
    write(out, word)
    os._exit(0)


if __name__ == "__main__":
    main()
