"""What a run of a study costs on texts that it was not about, beside its base.

    python -m experiments.quality.elsewhere --workdir=runs/chitchat/lora-0.003-0 --texts=data,wikipedia.jsonl

Leaves ``elsewhere.json`` in the run's folder: losses of both, divergence and agreement, see
``spiel_jax.evaluation.forgetting``, on the texts of each place.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from experiments.trials import ROOT
from spiel_jax import cli
from spiel_jax.adapters.load import load_run
from spiel_jax.errors import SpielError
from spiel_jax.evaluation.forgetting import default_texts, forgetting, texts_of
from spiel_jax.inference.served import Served

FILE = "elsewhere.json"
PLACES = (
    "Texts: files with text in each row, or of paragraphs; folders of benchmarks, of which HumanEval's "
    "problems and GSM8K's questions are taken."
)


def define_flags(values: flags.FlagValues) -> None:
    """Defines the flags of the command."""
    flags.DEFINE_string("workdir", None, "Folder of the run.", required=True, flag_values=values)
    flags.DEFINE_list("texts", None, PLACES, required=True, flag_values=values)


def main(options: flags.FlagValues) -> None:
    """Compares a run with its base, on the texts of the places that are not known."""
    found = known(Path(options.workdir))
    texts = {
        name: default_texts(place) if place.is_dir() else texts_of(place)
        for name, place in named(options.texts).items()
        if name not in found
    }
    run = load_run(options.workdir, keep_base=True)
    assert run.base is not None
    models = Served(run.config, run.base), Served(run.config, run.tuned)
    for name, those in texts.items():
        found[name] = forgetting(*models, [run.tokenizer.encode(text) for text in those])._asdict()
        Path(options.workdir, FILE).write_text(json.dumps(found) + "\n")


def named(places: Sequence[str]) -> dict[str, Path]:
    """Name of each place, without its suffix, to where it is.

    Raises:
        SpielError: If two have the same name.
    """
    found: dict[str, Path] = {}
    for place in (Path(place).absolute() for place in places):
        if place.stem in found:
            raise SpielError(f"{found[place.stem]} and {place} have the same name: give one of them another")
        found[place.stem] = place
    return found


def known(folder: Path) -> dict[str, dict[str, Any]]:
    """Name of a place to what a run in a folder is known to cost there."""
    return json.loads((folder / FILE).read_text()) if (folder / FILE).is_file() else {}


def elsewhere(folder: Path, places: Sequence[str]) -> dict[str, dict[str, Any]]:
    """What a run in a folder costs on the texts of places; what is not known is found now, if it is there.

    Raises:
        SpielError: If it cannot be found.
    """
    wanted = named(places)
    missing = wanted.keys() - known(folder).keys()
    if missing and (folder / "checkpoints").is_dir():  # else it was done elsewhere
        texts = ",".join(map(str, wanted.values()))
        words = ["-m", "experiments.quality.elsewhere", f"--workdir={folder.absolute()}", f"--texts={texts}"]
        ended = subprocess.run(
            [sys.executable, *words],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        if ended.returncode:
            raise SpielError(f"{folder.name}: {ended.stderr[-3000:]}")
    return known(folder)


if __name__ == "__main__":
    cli.run(main, define_flags)
