"""Files that hold a model together: ``model-00001-of-00003.gguf`` and its like. A part is not the whole."""

import re
from collections.abc import Iterable
from pathlib import Path

from spiel_jax.errors import NotFoundError, SpielError
from spiel_jax.models.io.messages import listed

_NUMBERED = re.compile(r"(.+)-(\d{5})-of-(\d{5})(\.\w+)")


def parts_of(path: Path) -> list[Path]:
    """All the files that a file is one of, in their order; itself alone if its name has no number.

    >>> [part.name for part in parts_of(Path("model.gguf"))]
    ['model.gguf']

    Raises:
        NotFoundError: If one of them is not there; the first missing ones are named.
        SpielError: If the name contradicts itself.
    """
    match = _NUMBERED.fullmatch(path.name)
    if match is None:
        return [path]
    stem, number, count, suffix = match.groups()
    if not 1 <= int(number) <= int(count):
        raise SpielError(f"{path} says that it is part {int(number)} of {int(count)}, which cannot be")
    parts = [path.with_name(f"{stem}-{n:05d}-of-{count}{suffix}") for n in range(1, int(count) + 1)]
    if missing := [part.name for part in parts if not part.is_file()]:
        raise NotFoundError(
            f"{path} is one of {len(parts)} parts, and {listed(missing)} not beside it: put all parts into "
            "one folder"
        )
    return parts


def first_parts(files: Iterable[Path]) -> list[Path]:
    """One file of each model among these, the first of those that are numbered alike."""
    models: dict[tuple[str, ...], Path] = {}
    for file in sorted(files):
        match = _NUMBERED.fullmatch(file.name)
        models.setdefault(match.group(1, 3, 4) if match else (file.name,), file)
    return list(models.values())


def first_name(path: str | Path) -> str:
    """The name of the first of the files that a file is one of; its own if that has no number.

    >>> first_name("m-00002-of-00003.gguf")
    'm-00001-of-00003.gguf'
    """
    name = Path(path).name
    match = _NUMBERED.fullmatch(name)
    return name if match is None else f"{match[1]}-00001-of-{match[3]}{match[4]}"
