"""What the commands have in common: how they start, how errors are shown, and the flags that several have.

A command is a module with ``define_flags(values)`` and ``main(options)`` that ends with

    if __name__ == "__main__":
        cli.run(main, define_flags)

It imports the room that does its work inside ``main``: ``--help`` and a mistyped flag need not wait for that,
and what is not installed can be named.
"""

import difflib
import importlib.util
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from absl import app, flags, logging

from spiel_jax.errors import SpielError

flags.disclaim_key_flags()  # what is defined here is the command's own, for --help


def run(
    main: Callable[[flags.FlagValues], None],
    define_flags: Callable[[flags.FlagValues], None],
    *,
    failure: int = 1,
) -> None:
    """Runs a command and exits.

    Args:
        main: Does its work, given the values of the flags.
        define_flags: Defines its flags.
        failure: Exit status after an error that is shown plainly.
    """
    logging.set_verbosity(logging.WARNING)  # Orbax tells of every file at INFO
    options = flags.FLAGS
    flags.DEFINE_bool("traceback", False, "Show of every error where it was raised.", flag_values=options)

    def checked(argv: list[str]) -> None:
        if len(argv) > 1:
            raise app.UsageError(
                f"unexpected arguments: {' '.join(argv[1:])} (flags begin with --, and a value with spaces "
                "takes quotes)"
            )
        with shown_plainly(options, failure):
            main(options)

    with shown_plainly(options, failure):
        define_flags(options)
    app.run(checked)


@contextmanager
def shown_plainly(options: flags.FlagValues, failure: int = 1) -> Iterator[None]:
    """Ends the program after a ``SpielError`` with no more than its message; other errors pass.

    A package that is missing although it comes with the plain installation (``pip install --no-deps``) is
    named in the same way.

    Args:
        options: With ``--traceback``, the traceback comes before the message.
        failure: Exit status.
    """
    try:
        yield
    except (SpielError, ModuleNotFoundError) as error:
        message = str(error)
        if isinstance(error, ModuleNotFoundError):
            package = str(error.name).partition(".")[0]
            if importlib.util.find_spec(package) is not None:
                raise
            message = f"this needs {package}, which is not installed: pip install spiel_jax"
        if options["traceback"].value:
            traceback.print_exc()
        print(f"error: {message}", file=sys.stderr)
        sys.exit(failure)


def define_config(values: flags.FlagValues) -> None:
    """Defines ``--config``, and with it ``--config.KEY`` for all keys of that file."""
    from ml_collections import config_flags

    what = "A file with get_config(), such as configs/*.py."
    config_flags.DEFINE_config_file("config", None, what, flag_values=values)
    values["config"].parser = _ConfigFile(values["config"].parser)
    flags.mark_flag_as_required("config", values)


class _ConfigFile(flags.ArgumentParser):
    """Refuses what is no file, and keys on the command line that the config does not have."""

    def __init__(self, parser: flags.ArgumentParser):
        self._parser = parser

    def parse(self, argument: str) -> Any:
        if not Path(argument.partition(":")[0]).is_file():
            raise ValueError("there is no such file")
        config: Any = self._parser.parse(argument)
        from spiel_jax.config import flatten  # the file has imported it

        known = flatten(config)
        for key in re.findall(r"^--?(?:no)?config\.([\w.]+)", "\n".join(sys.argv), re.MULTILINE):
            if not any(f"{one}.".startswith(f"{key}.") for one in known):
                near = difflib.get_close_matches(key, known, n=3, cutoff=0.0)
                raise ValueError(f"config.{key} is no key; near: {', '.join(near)}")
        return config


def define_run(values: flags.FlagValues, name: str, *, required: bool = False) -> None:
    """Defines a flag for the folder of a run, and ``--step`` for one of its checkpoints."""
    what = "Folder of a run (the --workdir of spiel_jax.train)."
    flags.DEFINE_string(name, None, what, required=required, flag_values=values)
    what = "Which of its checkpoints, or best: that of the lowest held-out loss; default: the newest."
    flags.DEFINE(_Step(), "step", None, what, values)


class _Step(flags.ArgumentParser):
    """The number of a checkpoint, or ``best``.

    >>> _Step().parse("20"), _Step().parse("best")
    (20, 'best')
    """

    syntactic_help = "the number of a checkpoint, or best"

    def parse(self, argument: str) -> int | str:
        if argument == "best":
            return argument
        if not str(argument).isdecimal():
            raise ValueError("expected the number of a checkpoint, or best")
        return int(argument)

    def flag_type(self) -> str:
        return "step"


def define_sizes(values: flags.FlagValues, name: str, what: str, *, required: bool = False) -> None:
    """Defines a flag such as ``--mesh=fsdp=4,tensor=2``, whose value is a dict."""
    flags.DEFINE(_Sizes(), name, None, what, values, required=required)


class _Sizes(flags.ArgumentParser):
    """Sizes of mesh axes.

    >>> _Sizes().parse("fsdp=4,tensor=2")
    {'fsdp': 4, 'tensor': 2}
    """

    syntactic_help = "sizes of mesh axes: fsdp=4,tensor=2"

    def parse(self, argument: str) -> dict[str, int]:
        sizes: dict[str, int] = {}
        for part in argument.split(","):
            found = re.fullmatch(r"(\w+)=(-?\d+)", part)
            if not found or found[1] in sizes:
                raise ValueError("expected sizes of mesh axes, each once, such as fsdp=4,tensor=2")
            sizes[found[1]] = int(found[2])
        return sizes

    def flag_type(self) -> str:
        return "sizes"
