"""What a run of a study costs on texts that it was not about, beside its base.

    python -m experiments.quality.elsewhere --workdir=runs/chitchat/lora-0.003-0 --data_dir=data

Leaves ``elsewhere.json`` in the run's folder: losses of both, divergence and agreement, see
``spiel_jax.evaluation.forgetting``.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from absl import flags

from experiments.trials import ROOT
from spiel_jax import cli
from spiel_jax.adapters.load import load_run
from spiel_jax.errors import SpielError
from spiel_jax.evaluation.forgetting import default_texts, forgetting
from spiel_jax.inference.served import Served

FILE = "elsewhere.json"


def define_flags(values: flags.FlagValues) -> None:
    """Defines the flags of the command."""
    flags.DEFINE_string("workdir", None, "Folder of the run.", required=True, flag_values=values)
    flags.DEFINE_string("data_dir", None, "Folder of the benchmarks.", required=True, flag_values=values)


def main(options: flags.FlagValues) -> None:
    """Compares a run with its base."""
    run = load_run(options.workdir, keep_base=True)
    assert run.base is not None
    texts = [run.tokenizer.encode(text) for text in default_texts(options.data_dir)]
    found = forgetting(Served(run.config, run.base), Served(run.config, run.tuned), texts)
    Path(options.workdir, FILE).write_text(json.dumps(found._asdict()) + "\n")


def elsewhere(folder: Path, data_dir: Path) -> dict[str, Any] | None:
    """What a run in a folder costs elsewhere: read if it is known, else found now; None without the run.

    Raises:
        SpielError: If it cannot be found.
    """
    if not (folder / "checkpoints").is_dir():  # done elsewhere
        return None
    known = folder / FILE
    if not known.is_file():
        places = [f"--workdir={folder.absolute()}", f"--data_dir={data_dir.absolute()}"]
        words = ["-m", "experiments.quality.elsewhere", *places]
        ended = subprocess.run(
            [sys.executable, *words],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        if ended.returncode:
            raise SpielError(f"{folder.name}: {ended.stderr[-3000:]}")
    return json.loads(known.read_text())


if __name__ == "__main__":
    cli.run(main, define_flags)
