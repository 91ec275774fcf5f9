"""The folder of a run: claimed for one configuration, found by all processes."""

import json
import time
from pathlib import Path
from typing import Any

from spiel_jax.checkpoint import FOLDER, CheckpointError
from spiel_jax.config import (
    Config,
    ConfigError,
    differences,
    flatten,
)


def stored_config(workdir: Path) -> dict[str, Any] | None:
    """The flat config of the run whose checkpoints a folder holds; None if it holds none.

    Raises:
        ConfigError: If there are checkpoints, but nothing that tells of which run.
    """
    if not any(child.name.isdigit() for child in workdir.glob(f"{FOLDER}/*")):
        return None
    try:
        return json.loads((workdir / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{workdir} holds checkpoints, but its config.json cannot be read ({error}): put it back, or "
            "choose another --workdir"
        ) from error


def check_workdir(workdir: Path, config: Config, resume: bool) -> None:
    """Claims a folder for a run of this config, or makes sure that it is one.

    A run without a checkpoint has nothing to lose: another may take its folder.

    Raises:
        ConfigError: If the folder is of a run with another config (the differences are shown), or of one
            whose config is lost.
        CheckpointError: If ``resume`` is asked for and there is nothing to continue.
    """
    if (stored := stored_config(workdir)) is not None:
        changed = differences(stored, json.loads(json.dumps(flatten(config))))
        if changed:
            lines = [f"  {key}: {old!r} there, {new!r} now" for key, (old, new) in changed.items()]
            raise ConfigError(
                f"{workdir} holds a run of another configuration:\n" + "\n".join(lines) + "\n"
                "Choose another --workdir, or set these keys as they are there."
            )
    elif resume:
        raise CheckpointError(f"--resume: {workdir} holds no run to continue")
    workdir.mkdir(parents=True, exist_ok=True)
    path = workdir / "config.json"
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(flatten(config), indent=1))
    temporary.replace(path)


def find_workdir(workdir: Path, config: Config) -> None:
    """Makes sure that this process sees the folder that the first one has claimed."""
    path, wanted = workdir / "config.json", json.loads(json.dumps(flatten(config)))
    for _ in range(60):  # a network file system may show it late
        if path.exists() and json.loads(path.read_text()) == wanted:
            return
        time.sleep(1)
    raise ConfigError(f"{workdir} is not what process 0 has written there: all processes must see one folder")
