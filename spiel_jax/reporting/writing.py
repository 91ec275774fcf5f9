"""A report written to a file, where nothing else may be lost."""

from collections.abc import Sequence
from pathlib import Path

from spiel_jax.errors import SpielError
from spiel_jax.places import local_path
from spiel_jax.reporting.page import MARK, page
from spiel_jax.reporting.runs import Run


def write_page(runs: Sequence[Run], out: str | Path) -> Path:
    """Writes a report.

    Args:
        runs: What it is on.
        out: Its file; a report that is there already is replaced.

    Raises:
        SpielError: If something else is there, or it cannot be written.
    """
    path = local_path(out, "--out")
    content = page(runs)
    try:
        if path.is_dir():
            raise SpielError(f"--out={out} is a folder: expected a file, such as report.html")
        if path.exists() and not path.read_bytes().startswith(MARK.encode()):
            raise SpielError(f"--out={out} is there already, and is no report: choose another file")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
    except OSError as error:
        raise SpielError(f"--out={out} cannot be written: {error.strerror or error}") from error
    return path
