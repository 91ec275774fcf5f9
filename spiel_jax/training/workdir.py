"""The folder of a run: proven usable, held, claimed for one configuration, found by all processes."""

import json
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import tensorstore

from spiel_jax.checkpoint import FOLDER
from spiel_jax.config import Config, ConfigError, flatten
from spiel_jax.places import remembered
from spiel_jax.training.lock import LOCK, locked
from spiel_jax.training.metrics import METRICS, SAMPLES, TIMING

CONFIG = "config.json"

TOLD = ("model.source", "model.tokenizer", "data.sources", "data.heldout", "data.chat_template")
"""Keys that name a place, which may be another when a run is continued: digests tell what lies there."""
PLACES = (*TOLD, "init_from.adapter")
"""All keys that name a place. A continued run does not read the adapter that it began with."""

_FILES = (CONFIG, METRICS, TIMING, SAMPLES, LOCK)
_FOLDERS = (FOLDER, "tensorboard", "profile")
_INTERPRETED = re.compile(r"[*?\[\]\\]")
_PROBE = "probe.orbax-checkpoint-tmp"  # where checkpoints are, Orbax removes what a killed process left
_DEEPEST = f"trainable/ocdbt.process_0/d/{'0' * 60}"
"""As deep and as long a path as a checkpoint has in it."""


def check_usable(workdir: Path) -> None:
    """Refuses what can be no run's folder, without writing anything.

    Raises:
        ConfigError: If the path cannot hold a run, or files and folders in it are in the way of the run's.
    """
    if found := _INTERPRETED.search(str(workdir.absolute())):
        raise ConfigError(
            f"--workdir {workdir}: the storage of checkpoints takes {found[0]} for a part of a pattern, and "
            "could not read them back: choose a path without any of * ? [ ] \\"
        )
    try:
        str(workdir.absolute()).encode()
        _check_kinds(workdir)
    except UnicodeEncodeError as error:
        raise ConfigError(f"--workdir {str(workdir)!a}: expected a path in UTF-8") from error
    except OSError as error:
        raise unusable(workdir, error) from error


def _check_kinds(workdir: Path) -> None:
    for place in (workdir, *workdir.absolute().parents):
        if place.is_symlink() and not place.exists():
            raise ConfigError(
                f"--workdir {workdir}: {place} is a link to {os.readlink(place)}, where nothing is: make "
                "that folder, or choose another"
            )
        if place.exists() and not place.is_dir():
            raise ConfigError(f"--workdir {workdir}: {place} is a file: choose a folder")
    for names, is_right, kind in ((_FILES, Path.is_file, "file"), (_FOLDERS, Path.is_dir, "folder")):
        for place in (workdir / name for name in names):
            if place.is_symlink() and not place.exists():
                raise ConfigError(f"--workdir {workdir}: {place} is a link to nothing: remove it")
            if place.exists() and not is_right(place):
                raise ConfigError(
                    f"--workdir {workdir}: {place} is no {kind}, and a run has one of that name: move it "
                    "away, or choose another --workdir"
                )


def unusable(workdir: Path, error: Exception) -> ConfigError:
    """What to say of a run's folder that cannot be written."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return ConfigError(
        f"--workdir {workdir} cannot be used: {reason}. Choose a folder that can be written, on a file "
        "system that renames folders"
    )


@contextmanager
def held(workdir: Path) -> Iterator[None]:
    """Makes a run's folder, proves that it can be written as a run does, and keeps others out of it.

    Raises:
        ConfigError: If it cannot be written.
        InUse: If another process trains in it.
    """
    with ExitStack() as stack:
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(workdir))
            _prove(workdir)
        except (OSError, RuntimeError) as error:
            raise unusable(workdir, error) from error
        yield


def _prove(workdir: Path) -> None:
    """Writes, renames and reads as a run does, and removes what it wrote."""
    for name in _FILES:
        if (workdir / name).exists():
            (workdir / name).open("r+").close()
    for folder in (workdir, *(workdir / name for name in _FOLDERS)):
        if folder.is_dir():
            _prove_folder(folder / _PROBE)


def _prove_folder(probe: Path) -> None:
    if probe.exists():  # of a process that was killed
        shutil.rmtree(probe)
    try:
        before, after = probe / "123456789.tmp", probe / "123456789"
        (before / _DEEPEST).parent.mkdir(parents=True)
        written = before / _DEEPEST
        store = tensorstore.KvStore.open({"driver": "file", "path": f"{written.parent.absolute()}/"}).result()
        store[written.name] = b"probe"
        before.rename(after)
        if (after / _DEEPEST).read_bytes() != b"probe":
            raise OSError("what was written there is not what is read")
    finally:
        if probe.exists():
            shutil.rmtree(probe)


def stored_config(workdir: Path) -> dict[str, Any] | None:
    """The flat config of the run whose checkpoints a folder holds; None if it holds none.

    Raises:
        ConfigError: If there are checkpoints, but nothing that tells of which run.
    """
    if not any(child.name.isdigit() for child in workdir.glob(f"{FOLDER}/*")):
        return None
    try:
        return json.loads((workdir / CONFIG).read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{workdir} holds checkpoints, but its config.json cannot be read ({error}): put it back, or "
            "choose another --workdir"
        ) from error


def settings(config: Config) -> dict[str, Any]:
    """The flat config as a run stores it, JSON-like: its places can be found from every working directory."""
    flat = json.loads(json.dumps(flatten(config)))
    return flat | {key: _remembered(flat[key]) for key in PLACES}


def as_given(config: Config) -> dict[str, Any]:
    """The places that a config names, as it names them."""
    flat = json.loads(json.dumps(flatten(config)))
    return {key: flat[key] for key in PLACES}


def with_known_places(config: Config, known: Mapping[str, Any] | None) -> Config:
    """The config, with the places of the run that is continued where it names the same ones from elsewhere.

    A relative path means nothing in another working directory; what it meant when the run began is stored.

    Args:
        config: As it is now.
        known: The checkpoint's metadata; None for a new run.
    """
    if known is None:
        return config
    given, meant = as_given(config), settings(config)
    then = known.get("places", {})  # earlier versions stored none
    config = config.copy_and_resolve_references()
    with config.ignore_type():
        for key in then.keys() & set(PLACES):
            if then[key] == given[key] == meant[key]:
                value = known["config"][key]
                config.update_from_flattened_dict({key: tuple(value) if isinstance(value, list) else value})
    return config


def _remembered(value: Any) -> Any:
    """A place or places, absolute."""
    if isinstance(value, str):
        return remembered(value)
    if isinstance(value, list):
        return [_remembered(one) for one in value]
    if isinstance(value, dict) and "path" in value:
        return value | {"path": _remembered(value["path"])}
    return value


def write_config(workdir: Path, config: Config) -> None:
    """Claims a folder for a run of this config. Without a checkpoint there is nothing to lose in it.

    Raises:
        ConfigError: If it cannot be written; the one of before is whole.
    """
    path = workdir / CONFIG
    temporary = path.with_suffix(".tmp")
    try:
        temporary.write_text(json.dumps(settings(config), indent=1))
        temporary.replace(path)
    except OSError as error:
        raise unusable(workdir, error) from error


def find_workdir(workdir: Path, config: Config) -> None:
    """Makes sure that this process sees the folder that the first one has claimed."""

    def told(flat: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in flat.items() if key not in PLACES}

    path, wanted = workdir / CONFIG, told(settings(config))
    for _ in range(60):  # a network file system may show it late
        if path.exists() and told(json.loads(path.read_text())) == wanted:
            return
        time.sleep(1)
    raise ConfigError(f"{workdir} is not what process 0 has written there: all processes must see one folder")
