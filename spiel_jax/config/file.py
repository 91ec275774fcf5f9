"""The configuration of a command: a Python file, and what the command line sets in it."""

import importlib.util
import sys
import traceback
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict, FrozenConfigDict

from spiel_jax.config.bounds import KEYS
from spiel_jax.config.checks import ConfigError, check_config, no_key, shown, without_effect
from spiel_jax.config.defaults import Config, default_config
from spiel_jax.config.flat import set_key

_MODULE = "spiel_jax_config_file"
"""What the module of a config file is called: classes in it look for it by name."""


def load(file: str, given: Mapping[str, Sequence[str]]) -> Config:
    """The config of a file with keys set on the command line, checked.

    Args:
        file: Its path; ``PATH:ARGUMENT`` calls ``get_config("ARGUMENT")``.
        given: Key to the texts given for it, in order. The last one counts, but for tuples: these are joined.

    Raises:
        ConfigError: If the file cannot be used, a key may not be what it is, or one that was set on the
            command line has no effect; file, line and key are named.
    """
    config = read(file)
    for key, texts in given.items():
        kind = KEYS[key]
        values = [kind.read(text) for text in texts]
        joined = len(values) > 1 and kind.repeated and all(isinstance(value, tuple) for value in values)
        value = sum(values, ()) if joined else values[-1]
        if expected := kind.expected(value):
            raise ConfigError(f"config.{key} = {shown(value)}: expected {expected}", key)
        set_key(config, key, value)
    try:
        check_config(config)
    except ConfigError as error:
        if not error.key or error.key in given:
            raise
        raise ConfigError(f"{error} (in {file})", error.key) from error
    for sentence in without_effect(config, given):
        raise ConfigError(sentence)
    return config


def read(file: str) -> Config:
    """What ``get_config()`` of a file returns; nothing is checked but its type.

    Raises:
        ConfigError: If there is none; file and line are named.
    """
    path, argument = _path(file)
    module = types.ModuleType(_MODULE)
    module.__file__ = str(path)
    sys.modules[_MODULE] = module
    sys.path.append(beside := str(Path(path).resolve().parents[1]))  # configs/a.py may import configs.b
    try:
        exec(compile(_text(path), path, "exec", dont_inherit=True), vars(module))
        if not callable(get_config := vars(module).get("get_config")):
            raise ConfigError(f"{path} defines no function get_config()")
        config = get_config(*argument)
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(f"{path}{_line(error, path)}: {_problem(error, path)}") from error
    finally:
        sys.path.remove(beside)
    if isinstance(config, FrozenConfigDict):
        config = config.as_configdict()
    if not isinstance(config, ConfigDict):
        forgot = " (is `return config` missing?)" if config is None else ""
        raise ConfigError(
            f"{path}: get_config() returns {shown(config)}{forgot}: expected the config that "
            "default_config() makes, with keys set"
        )
    return config


def _path(file: str) -> tuple[str, list[str]]:
    """The path, and what get_config is called with."""
    if not file:
        raise ConfigError("--config= names no file: expected one with get_config()")
    path, colon, argument = (file, "", "") if Path(file).exists() else file.partition(":")
    if Path(path).is_dir():
        raise ConfigError(f"{path} is a folder: expected a file with get_config()")
    if not Path(path).is_file():
        raise ConfigError(f"{path}: there is no such file")
    return path, [argument] if colon else []


def _text(path: str) -> str:
    """The source text of a Python file."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    if b"\0" in data:
        raise ConfigError(f"{path} is no text: expected a Python file with get_config()")
    try:
        return importlib.util.decode_source(data)
    except (SyntaxError, UnicodeDecodeError) as error:  # the former of the first two lines
        raise ConfigError(f"{path}: {_not_utf8(data) or error}") from error


def _not_utf8(data: bytes) -> str | None:
    """Where text is not UTF-8."""
    try:
        data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        return f"{data[error.start : error.start + 1]!r} in line {line} is not UTF-8"
    return None


def _line(error: Exception, path: str) -> str:
    """Where in the file an error came up; the innermost line of it."""
    if isinstance(error, SyntaxError) and error.filename == path and error.lineno:
        return f", line {error.lineno}"
    lines = [line for frame, line in traceback.walk_tb(error.__traceback__) if _file(frame) == path]
    return f", line {lines[-1]}" if lines else ""


def _file(frame: types.FrameType) -> str:
    return frame.f_code.co_filename


def _problem(error: Exception, path: str) -> str:
    """What went wrong; of a key that there is not, or of a value that it may not have, in our words."""
    if isinstance(error, SyntaxError) and error.filename == path:
        return str(error.msg)
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if frame.f_code in _ACCESS:
            section, name = (frame.f_locals[own] for own in frame.f_code.co_varnames[:2])
            if (key := _full_key(section, str(name))) is None:
                break
            if key in KEYS and "value" in frame.f_locals:
                value = frame.f_locals["value"]
                if expected := KEYS[key].expected(value):
                    return f"config.{key} = {shown(value)}: expected {expected}"
            elif key not in KEYS:
                return no_key(key)
            break
    return f"{type(error).__name__}: {error}"


_ACCESS = [
    getattr(ConfigDict, method).__code__
    for method in ("__getattr__", "__setattr__", "__getitem__", "__setitem__")
]
"""Where a ConfigDict comes upon a key that it has not: its methods have the name as second argument."""


def _full_key(section: Any, name: str) -> str | None:
    """The dotted key of a name in a section of the configuration, which is known by what it holds."""

    def search(known: ConfigDict, prefix: str) -> str | None:
        if set(known) == set(section):
            return prefix + name
        parts = [(key, part) for key, part in known.items() if isinstance(part, ConfigDict)]
        return next(filter(None, (search(part, f"{prefix}{key}.") for key, part in parts)), None)

    return search(default_config(), "")
