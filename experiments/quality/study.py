"""What is compared, and in which order it is run: methods × budgets × learning rates × seeds.

Every method of a budget is run with each of its rates and the first seed; the rate of lowest validation loss
is that of the other seeds. Where rates come close to each other, all of these can be given the other seeds.
"""

import fnmatch
import math
import runpy
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from experiments.quality.tables import Result, contenders, validation
from experiments.trials import Trial, outcome
from spiel_jax.config import default_config
from spiel_jax.errors import SpielError
from spiel_jax.methods.registry import method_class


@dataclass(frozen=True)
class Candidate:
    """A method of a study.

    Attributes:
        settings: Key to value, ``method`` among them.
        rates: Learning rates, of which the best is taken.
        multiples: Key of another rate to what it is as a multiple of the learning rate.
    """

    settings: Mapping[str, Any]
    rates: Sequence[float]
    multiples: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Study:
    """What is compared.

    Attributes:
        config: A configuration's file, relative to the repository.
        settings: Key to value, for every run.
        candidates: Name to method.
        budgets: Name to settings. Of these a method is given what it knows: ``targets.num_tunable`` is
            nothing to LoRA, nor ``lora.rank`` to the others.
        seeds: Of the runs at the best rate; the first is that of the choice.
        against: The method that the others are compared to, seed by seed.
    """

    config: str
    settings: Mapping[str, Any]
    candidates: Mapping[str, Candidate]
    budgets: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: {"": {}})
    seeds: Sequence[int] = (0, 1, 2)
    against: str | None = None


def read(path: str) -> Study:
    """The study of a file.

    Raises:
        SpielError: If there is none in it.
    """
    if not Path(path).is_file():
        raise SpielError(f"--study={path}: there is no such file")
    study = runpy.run_path(path)["get_study"]()
    if not isinstance(study, Study):
        raise SpielError(f"{path}: get_study() returns {study!r}: expected a Study")
    return study


def done(
    study: Study,
    out: Path,
    places: Sequence[Mapping[str, str]] = ({},),
    known: Mapping[str, Result] | None = None,
    beyond: int = 0,
    close: float = 0.0,
) -> Iterator[Result]:
    """What every run came to, those that are not done being done now: all rates first, then all seeds.

    Args:
        study: What is compared.
        out: Folder of the runs' folders.
        places: So many runs are done at a time; the environment variables of the process in each place.
        known: Command to what it came to elsewhere, which is not done again.
        beyond: So many more rates are tried while the best one of a method is its lowest or highest.
        close: By how much validation at a rate may be above the best for the rate to be run with all seeds.
    """
    free: SimpleQueue[Mapping[str, str]] = SimpleQueue()
    for place in places:
        free.put(place)
    failures: list[Exception] = []

    def run(name: str, budget: str, rate: float, seed: int) -> Result:
        place = free.get()
        try:
            if failures:  # of another run; no more are begun
                raise failures[0]
            one = trial(study, name, budget, rate, seed)
            told = (known or {}).get(one.told()) or outcome(one, out, place)
        except Exception as failure:
            failures.append(failure)
            raise
        finally:
            free.put(place)
        return told | {"method": name, "budget": budget, "rate": rate, "seed": seed}

    first, *others = study.seeds
    pool = ThreadPoolExecutor(len(places))
    try:
        rates = [
            (*which, rate, first) for which in runs_of(study) for rate in study.candidates[which[0]].rates
        ]
        found: dict[tuple[str, str], list[Result]] = {}
        for further in range(beyond + 1):
            if further:
                rates = [(*which, r, first) for which, runs in found.items() if (r := next_rate(runs))]
            for result in pool.map(lambda which: run(*which), rates):
                found.setdefault((result["method"], result["budget"]), []).append(result)
                yield result
        best = [(*which, rate) for which, runs in found.items() for rate in contenders(runs, close)]
        seeds = [(*which, seed) for seed in others for which in best]
        yield from pool.map(lambda which: run(*which), seeds)
    finally:
        pool.shutdown(cancel_futures=True)  # those that have begun go on to their end


def next_rate(runs: Sequence[Result]) -> float | None:
    """The rate to try beyond the best of them, as far from it as the next; None if that is between others.

    >>> next_rate([{"rate": rate, "heldout": [[1, 3 + rate]]} for rate in (1e-3, 2e-3)])
    0.0005
    """
    losses = {run["rate"]: validation(run) for run in runs}
    rates, best = sorted(losses), min(losses, key=losses.__getitem__)
    if len(rates) == 1 or best not in (rates[0], rates[-1]) or math.isinf(losses[best]):
        return None
    neighbour = rates[1] if best == rates[0] else rates[-2]
    return float(f"{best * best / neighbour:.6g}")


def runs_of(study: Study) -> Iterator[tuple[str, str]]:
    """Methods and budgets."""
    for budget in study.budgets:
        for name in study.candidates:
            yield name, budget


def trial(study: Study, name: str, budget: str, rate: float, seed: int) -> Trial:
    """One run of a study."""
    candidate = study.candidates[name]
    settings, others = candidate.settings, candidate.multiples.items()
    kind = method_class(settings["method"])

    config = default_config()
    config.update_from_flattened_dict(dict(settings))
    patterns = tuple(kind.unused(config))
    known = {
        key: value
        for key, value in {**study.settings, **study.budgets[budget]}.items()
        if not any(fnmatch.fnmatch(key, pattern) for pattern in patterns)
    }
    parts = [name, budget, f"{rate:g}", str(seed)]
    return Trial(
        "-".join(part.replace(" ", "_") for part in parts if part),
        study.config,
        {
            **known,
            **settings,
            "optimizer.learning_rate": rate,
            **{key: float(f"{factor * rate:.6g}") for key, factor in others},
            "seed": seed,
        },
        "experiments.quality.trial",
    )
