"""What a run's folder holds, read for a report: whatever cannot be read is told and left out."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from spiel_jax.checkpoint import FOLDER, CheckpointError, newest_metadata
from spiel_jax.errors import NotFoundError, SpielError
from spiel_jax.places import local_path
from spiel_jax.reporting.changes import Changes, read_changes
from spiel_jax.reporting.lines import EMPTY, Series, read_lines, series
from spiel_jax.training.metrics import METRICS, SAMPLES, TIMING
from spiel_jax.training.workdir import CONFIG


@dataclass(frozen=True)
class Reply:
    """What the model said to a prompt after so many steps; 0 is the base model."""

    step: int
    prompt: str
    text: str


@dataclass(frozen=True)
class Run:
    """A run as its folder tells it.

    Attributes:
        name: What the report calls it.
        config: Dotted key to value; empty where it cannot be read.
        metrics: What the seed determines, by name.
        timing: What depends on the machine, by name.
        replies: To prompts.
        changes: What was trained; None without a checkpoint.
        notes: What could not be read, and what is left out for it.
    """

    name: str
    config: Mapping[str, Any]
    metrics: Mapping[str, Series]
    timing: Mapping[str, Series]
    replies: Sequence[Reply]
    changes: Changes | None
    notes: Sequence[str]

    def metric(self, name: str) -> Series:
        """A series of ``metrics``, empty if there is none."""
        return self.metrics.get(name, EMPTY)

    @property
    def steps(self) -> int:
        """The last step that was recorded."""
        recorded = [int(one.steps[-1]) for one in (*self.metrics.values(), *self.timing.values())]
        return max([*recorded, self.changes.step if self.changes else 0])

    @property
    def seconds(self) -> float:
        """Of all its training steps together; NaN where they are not recorded."""
        per_step = self.timing.get("seconds_per_step", EMPTY)
        return float(np.sum(np.diff(per_step.steps, prepend=0) * per_step.values)) or math.nan

    @property
    def method(self) -> str:
        """As the configuration names it."""
        return str(self.config.get("method", "unknown method"))

    @property
    def cohorts(self) -> dict[int, Series]:
        """The step with which entries came to the share of all that they were after each reselection."""
        names = {name: name.removeprefix("since/") for name in self.metrics if name.startswith("since/")}
        found = {int(first): self.metrics[name] for name, first in names.items() if first.isdecimal()}
        return dict(sorted(found.items()))


def read_runs(places: Sequence[str | Path], weights: Sequence[str] = ()) -> list[Run]:
    """The runs in some folders.

    Args:
        places: Their folders.
        weights: Names of weights to map, see ``read_changes``.

    Raises:
        NotFoundError: If a folder is not there, or holds no run.
        SpielError: If no run has a weight of that name.
    """
    folders = [local_path(place, "RUN") for place in places]
    runs = [_read(folder, name, list(weights)) for folder, name in zip(folders, _names(folders), strict=True)]
    for name in weights:
        sparse = [run.changes for run in runs if run.changes and run.changes.kind == "sparse"]
        if not any(f".{one.weight.name}".endswith(f".{name}") for found in sparse for one in found.maps):
            there = [weight.name for found in sparse for weight in found.weights]
            known = f"there are {there[0]} to {there[-1]}" if there else "no run has sparse deltas"
            raise SpielError(f"--weight={name}: no run has changed a weight of that name: {known}")
    return runs


def _names(folders: Sequence[Path]) -> list[str]:
    """As short as tells them apart."""
    full = [folder.absolute() for folder in folders]
    names = [path.name or str(path) for path in full]
    if len(set(names)) < len(names):
        names = [f"{path.parent.name}/{path.name}" for path in full]
    return [name if names.count(name) == 1 else f"{name} ({names[: i + 1].count(name)})"
            for i, name in enumerate(names)]  # fmt: skip


def _read(folder: Path, name: str, weights: list[str]) -> Run:
    _check_is_run(folder)
    notes: list[str] = []
    lines = {}
    for file in (METRICS, TIMING, SAMPLES):
        lines[file], told = read_lines(folder / file)
        notes += told
    metrics = series(lines[METRICS])
    if not metrics:
        notes.append(f"{METRICS} holds no numbers: without them there are no curves")
    changes, config = None, _config(folder, notes)
    try:
        if newest_metadata(folder) is None:
            notes.append("no checkpoint yet: where the deltas are cannot be shown")
        else:
            changes = read_changes(folder, weights)
    except (CheckpointError, OSError) as error:
        notes.append(f"{error}: where the deltas are cannot be shown")
    return Run(name, config, metrics, series(lines[TIMING]), _replies(lines[SAMPLES]), changes, notes)


def _check_is_run(folder: Path) -> None:
    try:
        there = folder.is_dir()
        holds = there and any((folder / name).exists() for name in (CONFIG, METRICS, FOLDER))
    except OSError as error:
        raise NotFoundError(f"{folder}: {error.strerror or error}") from error
    if not there:
        raise NotFoundError(f"{folder}: there is no such folder: expected the --workdir of spiel_jax.train")
    if not holds:
        raise NotFoundError(
            f"{folder} is no folder of a run: it has no {CONFIG}, no {METRICS} and no {FOLDER} in it"
        )


def _config(folder: Path, notes: list[str]) -> dict[str, Any]:
    try:
        found = json.loads((folder / CONFIG).read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        notes.append(f"{CONFIG} cannot be read: {' '.join(str(error).split())[:200]}")
        return {}
    if isinstance(found, dict):
        return found
    notes.append(f"{CONFIG} holds no settings")
    return {}


def _replies(lines: Sequence[Mapping[str, Any]]) -> list[Reply]:
    found = {
        (line["step"], prompt): text
        for line in lines
        for prompt, text in line.items()
        if prompt != "step" and isinstance(text, str)
    }
    replies = [Reply(step, prompt, text) for (step, prompt), text in found.items()]
    return sorted(replies, key=lambda reply: reply.step)
