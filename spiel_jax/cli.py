"""What the commands have in common: how they start, how errors are shown, and the flags that several have.

A command is a module with ``define_flags(values)`` and ``main(options)`` that ends with

    if __name__ == "__main__":
        cli.run(main, define_flags)

It imports the room that does its work inside ``main``: ``--help`` and a mistyped flag need not wait for that,
and what is not installed can be named.
"""

import importlib.util
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from absl import app, flags, logging

from spiel_jax.errors import SpielError
from spiel_jax.training.interrupts import ended_by_signals

flags.disclaim_key_flags()  # what is defined here is the command's own, for --help


def run(
    main: Callable[..., None],
    define_flags: Callable[[flags.FlagValues], None],
    *,
    failure: int = 1,
    arguments: bool = False,
) -> None:
    """Runs a command and exits.

    Args:
        main: Does its work, given the values of the flags.
        define_flags: Defines its flags.
        failure: Exit status after an error that is shown plainly. After a signal it is 128 + its number.
        arguments: Whether it takes some that are no flags, before or behind them, as a second argument.
    """
    logging.set_verbosity(logging.WARNING)  # Orbax tells of every file at INFO
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that there is no PyTorch is no news
    sys.unraisablehook = _unraisable
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)  # of a failed save
    options = flags.FLAGS
    flags.DEFINE_bool("traceback", False, "Show of every error where it was raised.", flag_values=options)

    def checked(argv: list[str]) -> None:
        if arguments:
            main(options, argv[1:])
            return
        if len(argv) > 1:
            raise app.UsageError(
                f"unexpected arguments: {' '.join(argv[1:])} (flags begin with --, a value with spaces takes "
                "quotes, and that of a switch an =)"
            )
        main(options)

    with ended_by_signals(), shown_plainly(options, failure):
        define_flags(options)
        options.set_gnu_getopt(arguments)
        app.run(checked, flags_parser=partial(parse, options))


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
        print(f"error: {message}", file=sys.stderr, flush=True)
        if isinstance(error, SpielError) and error.at_once:
            sys.stdout.flush()
            os._exit(failure)
        sys.exit(failure)


def define_config(values: flags.FlagValues) -> None:
    """Defines ``--config``. ``parse`` knows ``--config.KEY`` then; ``read_config`` reads what they say."""
    what = "A file with get_config(), such as configs/*.py. --config.KEY=VALUE sets one of its keys."
    flags.DEFINE_string("config", None, what, required=True, flag_values=values)


def read_config(options: flags.FlagValues) -> Any:
    """The config that ``--config`` and ``--config.KEY`` describe, checked.

    Raises:
        ConfigError: See ``config.file.load``.
    """
    from spiel_jax.config.file import load

    names = [name for name in options if name.startswith("config.") and options[name].present]
    return load(options.config, {name.removeprefix("config."): options[name].value or [] for name in names})


def _define_keys(values: flags.FlagValues) -> None:
    from spiel_jax.config.bounds import KEYS

    parser, serializer = flags.ArgumentParser(), flags.ArgumentSerializer()
    for key, kind in KEYS.items():
        flag = flags.MultiFlag(parser, serializer, f"config.{key}", None, "A key of --config.")
        flag.boolean = kind.boolean
        flags.DEFINE_flag(flag, values)


def _unraisable(unraisable: Any) -> None:
    """Python's own hook, but for what TensorStore says when the save that it was asked for has failed."""
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


def parse(options: flags.FlagValues, argv: Sequence[str]) -> list[str]:
    """Reads the flags of a command line into ``options``.

    Keys of the config, where there is one, are flags too; and a flag that is on is switched off by
    ``--no-NAME``, as elsewhere, beside absl's ``--noNAME``.

    Args:
        options: The flags that are defined.
        argv: The program's name and its arguments.

    Returns:
        The name, and the arguments that are no flags.

    Raises:
        SpielError: If a flag is not known, has a value that it cannot have, or is missing.
    """
    try:
        arguments = options.read_flags_from_files(list(argv), force_gnu=False)
        if "config" in options and any(re.match(r"--?(no-?)?config\.", one) for one in arguments):
            _define_keys(options)
        return options([re.sub(r"^--no-(?=\w)", "--no", one) for one in arguments])
    except flags.UnrecognizedFlagError as error:
        raise SpielError(_unknown(error, options)) from error
    except (flags.Error, ValueError) as error:
        raise SpielError(_plainly(str(error))) from error


_PLAINLY = (
    (r"flag --(\S+)=None: .*", r"--\1 is missing: give --\1=..."),
    (r"(flag --\S+): \('Non-boolean argument to boolean flag', .*", r"\1: expected true or false"),
    (r"(flag --\S+): invalid literal for int\(\) .*", r"\1: expected a whole number"),
    (r"(flag --\S+): could not convert string to float: .*", r"\1: expected a number"),
)
"""What absl says of a flag, and what is meant."""


def _plainly(message: str) -> str:
    for said, meant in _PLAINLY:
        if found := re.fullmatch(said, message, re.DOTALL):
            return found.expand(meant)
    return message


def _unknown(error: flags.UnrecognizedFlagError, options: flags.FlagValues) -> str:
    """What to say of a flag that there is not."""
    key = re.fullmatch(r"(no)?config\.(.+)", error.flagname)
    if "config" not in options:
        return str(error)
    if key is None:
        return f"{error}{_near_keys(error.flagname)}"
    from spiel_jax.config.checks import no_key

    if key[1] and f"config.{key[2]}" in options:
        return f"--{error.flagname}: config.{key[2]} is no switch (=None unsets what can be unset)"
    return no_key(key[2])


def _near_keys(name: str) -> str:
    """Which keys of the config a flag may have been meant for: ``--steps``, ``--cofnig.steps``."""
    from spiel_jax.config.bounds import KEYS

    near = [key for key in KEYS if f".{key}".endswith(f".{name}") or name.endswith(f".{key}")]
    return f". Did you mean: {', '.join(f'config.{key}' for key in near)}" if near else ""


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


def define_processes(values: flags.FlagValues) -> None:
    """Defines the flags that say which of several processes this is; see ``connect``."""
    flags.DEFINE_bool(
        "distributed", False, "One of several processes; JAX detects which.", flag_values=values
    )
    flags.DEFINE_string(
        "coordinator", None, "host:port of process 0, in all of several processes.", flag_values=values
    )
    flags.DEFINE_integer(
        "num_processes", None, "With --coordinator: how many processes there are.", flag_values=values
    )
    flags.DEFINE_integer(
        "process_id", None, "With --coordinator: which of these this is, from 0.", flag_values=values
    )


def connect(options: flags.FlagValues) -> None:
    """Connects the processes that the flags of ``define_processes`` speak of, before JAX looks for devices.

    Raises:
        SpielError: See ``distributed.processes.initialise``.
    """
    from spiel_jax.distributed import processes

    processes.initialise(
        options.coordinator, options.num_processes, options.process_id, detect=options.distributed
    )


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
