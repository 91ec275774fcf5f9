"""Small runs of the training command with faults, and what is left of them."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np

from spiel_jax.checkpoint import FOLDER, read_metadata
from spiel_jax.checkpoint.arrays import load_arrays, stored_arrays
from spiel_jax.config import flatten
from support.run_cases import chat_file, tiny_config

ROOT = Path(__file__).parents[2]
SECONDS = 120  # in which every process ends; each takes about ten


@dataclass(frozen=True)
class Command:
    """The training command with a configuration of its own."""

    config: Path

    @classmethod
    def of(cls, config, folder):
        """Writes the file that ``config`` is read from."""
        path = folder / f"{config.method}.py"
        lines = [
            "from spiel_jax.config import default_config",
            "",
            "",
            "def get_config():",
            "    config = default_config()",
            *(f"    config.{key} = {value!r}" for key, value in flatten(config).items()),
            "    return config",
        ]
        path.write_text("\n".join(lines) + "\n")
        return cls(path)

    def run(self, workdir, fault="none", **environment):
        """Runs it to its end, or to that of the fault."""
        return subprocess.run(
            [sys.executable, "-m", "support.faulty", fault, str(workdir), f"--config={self.config}"],
            env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"} | environment,
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )


def uninterrupted(method, folder, model, every):
    """The command of a small run, how many calls touch its folder, and what it comes to without a fault.

    Args:
        method: Its method.
        folder: For its data, its configuration, and a run of it.
        model: Folder of the base model.
        every: Steps between checkpoints.
    """
    config = tiny_config(model, chat_file(folder), method)
    config.checkpoint_every = every
    config.eval_every, config.eval_batches = 2, None
    command, counted = Command.of(config, folder), folder / "calls"
    assert command.run(folder / "whole", CALLS=str(counted)).returncode == 0
    return command, int(counted.read_text()), end_of(folder / "whole")


def end_of(workdir):
    """Everything that a run has come to: step, arrays and metrics."""
    metadata = read_metadata(workdir)
    folder, step = Path(workdir) / FOLDER, metadata["step"]
    arrays = jax.device_get(load_arrays(folder, step, stored_arrays(folder, step)))
    told = ("step", "data", "targets", "digests", "heldout_loss", "identity", "fingerprint")
    metrics = Path(workdir) / "metrics.jsonl"  # which a run that could not write it has not
    return {key: metadata.get(key) for key in told}, arrays, metrics.read_bytes() if metrics.exists() else b""


def assert_same_end(found, expected, *, metrics=True):
    """That two runs have come to the same, bit for bit."""
    assert json.dumps(found[0], sort_keys=True) == json.dumps(expected[0], sort_keys=True)
    jax.tree.map(np.testing.assert_array_equal, found[1], expected[1])
    if metrics:
        assert found[2] == expected[2]
