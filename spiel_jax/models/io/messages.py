"""What messages show of files that can hold anything: one line, of bounded length, that can be printed."""

from collections.abc import Sequence
from pathlib import Path

_LENGTH, _LINES = 500, 20


def told(what: object) -> str:
    r"""An error or a name as a line; an error without a message is told by its type.

    >>> told("one\n  two"), told(RecursionError())
    ('one two', 'RecursionError')
    """
    text = " ".join(str(what).split()) or type(what).__name__
    text = text if len(text) <= _LENGTH else f"{text[:_LENGTH]} ..."
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def bullets(problems: Sequence[str]) -> str:
    r"""A list below a line, its first entries at least.

    >>> bullets(["missing: a", "unknown: b"])
    '\n  missing: a\n  unknown: b'
    """
    more = [f"and {len(problems) - _LINES} more"] if len(problems) > _LINES else []
    return "".join(f"\n  {told(problem)}" for problem in [*problems[:_LINES], *more])


def listed(names: Sequence[str]) -> str:
    """Some names, how many more there are, and the verb.

    >>> listed(["a", "b"])
    'a, b are'
    """
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"{', '.join(map(told, names[:5]))}{more} {'is' if len(names) == 1 else 'are'}"


def pointer_hint(path: Path) -> str:
    """What to do where a file is not what its name says, but the pointer that git has in the place of it."""
    try:
        with path.open("rb") as file:
            is_pointer = file.read(40).startswith(b"version https://git-lfs.github.com/")
    except OSError:
        return ""
    return ": it is a pointer of Git LFS, not the file; get that by git lfs pull" if is_pointer else ""
