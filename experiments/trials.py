"""Trials: runs of the trainer, each a process of its own. One that is done is not done again.

A trial that was interrupted goes on from its newest checkpoint: its folder is the run's.
"""

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spiel_jax.errors import SpielError

ROOT = Path(__file__).parents[1]
STOPPED = 75  # exit status of a run that was asked to stop, and saved


@dataclass(frozen=True)
class Trial:
    """A run to be done.

    Attributes:
        name: Of its folder, beside those of the others.
        config: A configuration's file, relative to the repository.
        settings: Key to value: what is set in it.
        module: What trains; ``spiel_jax.train``, or what takes the same flags.
    """

    name: str
    config: str
    settings: Mapping[str, Any]
    module: str = "spiel_jax.train"

    def command(self, workdir: str) -> list[str]:
        """The words of its command, without the interpreter."""
        flags = [f"--config={self.config}", f"--workdir={workdir}"]
        return ["-m", self.module, *flags, *(f"--config.{key}={v}" for key, v in self.settings.items())]

    def told(self) -> str:
        """The command as a record has it."""
        return shlex.join(["python", *self.command(f"runs/{self.name}")])


def outcome(trial: Trial, out: Path, environment: Mapping[str, str] | None = None) -> dict[str, Any]:
    """What a trial came to: read if it is done, else done now.

    Args:
        trial: The run.
        out: Folder of the trials' folders.
        environment: Variables of its process, beside those of this one.

    Returns:
        ``command``; ``processor``; ``heldout``, [step, loss] of every evaluation; ``losses`` of the steps;
        ``seconds_per_step``; ``peak_gib``, of the process; and what the trial's module has left in the
        folder's ``measured.json``, which is all of a run that says there that it diverged.

    Raises:
        SpielError: If the run failed, or was stopped, or what is done there is of another command.
    """
    folder = out.absolute() / trial.name
    done = folder / "result.json"
    if not done.is_file():
        result = _run(trial, folder, environment or {})
        done.write_text(json.dumps(result) + "\n")
    found = json.loads(done.read_text())
    if found["command"] != trial.told():
        raise SpielError(
            f"{folder} has a run of\n  {found['command']}\nand not of\n  {trial.told()}\n"
            "Take another folder, or remove that one."
        )
    return found


def _run(trial: Trial, folder: Path, environment: Mapping[str, str]) -> dict[str, Any]:
    programs = {  # every one is compiled once
        "JAX_COMPILATION_CACHE_DIR": str(folder.parent / "programs"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "1",
    }
    ended = subprocess.run(
        [sys.executable, *trial.command(str(folder))],
        cwd=ROOT,
        env={**os.environ, **programs, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    told: dict[str, Any] = {"command": trial.told(), "processor": processor()}
    if ended.returncode == STOPPED:
        raise SpielError(f"{trial.name} was stopped: the same command continues it")
    measured = folder / "measured.json"
    told |= json.loads(measured.read_text()) if measured.is_file() else {}
    if ended.returncode and not told.get("diverged"):  # one that was killed at its end is done again
        raise SpielError(f"{trial.name} failed:\n{ended.stderr[-3000:]}")
    return told if ended.returncode else told | _read(folder, ended.stdout)


def _read(folder: Path, printed: str) -> dict[str, Any]:
    """What a run that went well tells of itself."""
    peak = re.search(r"peak memory +([\d.]+) GiB", printed)
    assert peak is not None
    metrics, timing = (json_lines(folder / name) for name in ("metrics.jsonl", "timing.jsonl"))
    return {
        "heldout": [[line["step"], line["heldout_loss"]] for line in metrics if "heldout_loss" in line],
        "losses": [line["loss"] for line in metrics if "loss" in line],
        "seconds_per_step": [line["seconds_per_step"] for line in timing if "seconds_per_step" in line],
        "peak_gib": float(peak[1]),
    }


def json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file that has one a line."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def processor() -> str:
    """What kind of CPU this is, as far as the system tells."""
    found = re.search(r"model name\s*: (.*)", _text(Path("/proc/cpuinfo")))
    return f"{os.cpu_count()} cores, {found[1] if found else 'of an unknown kind'}"


def _text(path: Path) -> str:
    return path.read_text() if path.is_file() else ""
