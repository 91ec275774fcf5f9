"""What a user can mend: the errors that the command line shows without a traceback."""

import importlib
from typing import Any


class SpielError(ValueError):
    """Something that a user can mend: a flag, a key of the config, a file, an installation.

    The message says what is wrong and what would do, and needs no traceback beside it: commands print it
    alone. Every other error is a bug, here or in the caller's program.

    Attributes:
        at_once: Whether a command that it ends does not wait for its threads.

    Example:
        >>> try:
        ...     raise NotFoundError("no model at 'nowhere': expected a folder")
        ... except SpielError as error:
        ...     print(error)
        no model at 'nowhere': expected a folder
    """

    at_once: bool = False


class NotFoundError(SpielError, FileNotFoundError):
    """There is nothing in the place that was named."""


class MissingExtra(SpielError, ImportError):
    """A package is not installed that only a part of the library needs; the message names the extra."""


def extra(module: str, name: str) -> Any:
    """An optional package, where it is needed.

    Args:
        module: What to import, such as ``"matplotlib.pyplot"``.
        name: The extra of ``spiel_jax`` that installs it, such as ``"report"``.

    Returns:
        The module.

    Raises:
        MissingExtra: If the package is not installed.
    """
    package = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != package:  # it is there, and lacks something itself
            raise
        raise MissingExtra(
            f'this needs {package}, which is not installed: pip install "spiel_jax[{name}]"'
        ) from error
