r"""A study: methods × budgets × learning rates × seeds, each method at the best of its rates.

    python -m experiments.quality --study=experiments/quality/studies/chitchat.py --out=runs/chitchat

A study file has ``get_study()``, which returns a ``Study``. Each run is a process of its own, one at a time
or several (``--jobs``, ``--gpus``). Those that are done are not done again, and one that was interrupted
goes on: the same command continues. Prints a table, and writes it, plots, and what every run came to with
its command (results.json) into --out. With ``--elsewhere`` it also says what the runs at the best rates cost
on other texts.
"""

import json
from pathlib import Path
from typing import Any

from absl import flags

from experiments.quality.elsewhere import PLACES, elsewhere, named
from experiments.quality.study import done, read, trial
from experiments.quality.tables import Result, at_best, grouped, label, markdown, plots, validation
from spiel_jax import cli
from spiel_jax.errors import SpielError


def define_flags(values: flags.FlagValues) -> None:
    """Defines the flags of the command."""
    flags.DEFINE_string("study", None, "A file with get_study().", required=True, flag_values=values)
    flags.DEFINE_string("out", None, "Folder of the runs and the results.", required=True, flag_values=values)
    flags.DEFINE_string("known", None, "A results.json: runs in it are not done again.", flag_values=values)
    flags.DEFINE_integer("jobs", 1, "Runs at a time.", lower_bound=1, flag_values=values)
    flags.DEFINE_integer(
        "beyond",
        0,
        "So many more rates are tried beyond the best one of a method, while that is its lowest or highest.",
        lower_bound=0,
        flag_values=values,
    )
    flags.DEFINE_float(
        "close",
        0.0,
        "Rates at which validation is no further than this above a method's best are run with all seeds; the "
        "lowest mean is taken.",
        lower_bound=0.0,
        flag_values=values,
    )
    flags.DEFINE_list("gpus", [], "Numbers of NVIDIA GPUs: on each one run at a time.", flag_values=values)
    flags.DEFINE_list(
        "elsewhere",
        [],
        f"What the runs at the best rates cost on texts that they were not about. {PLACES}",
        flag_values=values,
    )


def main(options: flags.FlagValues) -> None:
    """Does the runs that are not done, and prints the table."""
    study, out = read(options.study), Path(options.out)
    for place in named(options.elsewhere).values():
        if not place.exists():
            raise SpielError(f"--elsewhere: there is no {place}")
    out.mkdir(parents=True, exist_ok=True)
    about: dict[str, Any] = {"command": command(options), "against": study.against}
    places = [{"CUDA_VISIBLE_DEVICES": gpu} for gpu in options.gpus] or [{}] * options.jobs
    results: list[Result] = []

    def write() -> None:
        (out / "results.json").write_text(json.dumps(about | {"runs": results}, indent=1) + "\n")

    for result in done(study, out, places, known(options.known), options.beyond, options.close):
        results.append(result)
        print(f"{label(result)}: validation {validation(result):.4f}", flush=True)
        write()
    if options.elsewhere:
        for result in (run for runs in grouped(results).values() for run in at_best(runs)):
            one = trial(study, *(result[key] for key in ("method", "budget", "rate", "seed")))
            if found := elsewhere(out / one.name, options.elsewhere):
                result["elsewhere"] = result.get("elsewhere", {}) | found
                told = ", ".join(f"{name} {it['tuned'] - it['base']:+.4f}" for name, it in found.items())
                print(f"{label(result)}: {told}", flush=True)
                write()
    text = markdown(results, study.against)
    (out / "table.md").write_text(text + "\n")
    plots(results, out)
    print(text)


def command(options: flags.FlagValues) -> str:
    """What does the study again: what tells which runs it has, not where they ran."""
    keys = ("study", "out", "known", "beyond", "close", "elsewhere")
    values = [(key, options[key].value) for key in keys if options[key].value]
    given = [f"--{key}={','.join(value) if isinstance(value, list) else value}" for key, value in values]
    return " ".join(["python -m experiments.quality", *given])


def known(path: str | None) -> dict[str, Result]:
    """Command to what it came to, of a results.json.

    Raises:
        SpielError: If it is not one.
    """
    if path is None:
        return {}
    try:
        return {run["command"]: run for run in json.loads(Path(path).read_text())["runs"]}
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise SpielError(f"--known={path} is no results.json of a study: {error}") from error


if __name__ == "__main__":
    cli.run(main, define_flags)
