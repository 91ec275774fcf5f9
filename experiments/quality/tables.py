"""What a study shows: a table of each method at its best rate, and plots of rates and of training."""

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, median, quantiles, stdev
from typing import Any

Result = dict[str, Any]
"""What a run came to (see ``trials.outcome``), and its method, budget, rate and seed."""


def validation(result: Result) -> float:
    """Loss by which rates are chosen: that of the last evaluation; infinite if the run diverged."""
    loss = result["heldout"][-1][1] if "heldout" in result else math.inf
    return loss if math.isfinite(loss) else math.inf


def label(result: Result) -> str:
    """What a run is called in print."""
    return f"{_of(result)}, {result['rate']:g}, seed {result['seed']}"


def _of(result: Result) -> str:
    return " ".join(filter(None, (result["method"], result["budget"])))


def grouped(results: Sequence[Result]) -> dict[tuple[str, str], list[Result]]:
    """Method and budget to its runs."""
    groups: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        groups.setdefault((result["method"], result["budget"]), []).append(result)
    return groups


def contenders(runs: Sequence[Result], close: float = 0.0) -> list[float]:
    """Rates whose validation is so close to the lowest, the best one first; runs of one seed."""
    losses = {run["rate"]: validation(run) for run in runs}
    lowest = min(losses.values())
    if math.isinf(lowest) or not close:
        return [min(losses, key=losses.__getitem__)]
    return sorted((rate for rate in losses if losses[rate] <= lowest + close), key=losses.__getitem__)


def at_best(runs: Sequence[Result]) -> list[Result]:
    """Those at the best rate, seed by seed.

    The rate of lowest validation with the first seed; of those that were run with as many seeds, the one of
    lowest mean. Seeds that it has beyond these do not count. The first seed is that of the first run.
    """
    rates: dict[float, dict[int, float]] = {}
    for run in runs:
        rates.setdefault(run["rate"], {})[run["seed"]] = validation(run)
    first, *_ = contenders([run for run in runs if run["seed"] == runs[0]["seed"]])
    seeds = rates[first].keys()
    whole = [rate for rate, losses in rates.items() if losses.keys() >= seeds]
    best = min(whole, key=lambda rate: mean(rates[rate][seed] for seed in seeds))
    return [run for run in runs if run["rate"] == best]


def beside(runs: Sequence[Result], reference: Sequence[Result]) -> list[float]:
    """What tests of runs are above those of others with the same seed, seed by seed.

    >>> beside([{"seed": 0, "test": 3.5}, {"seed": 1, "test": 3.0}], [{"seed": 0, "test": 3.25}])
    [0.25]
    """
    theirs = {run["seed"]: run["test"] for run in reference if "test" in run}
    return [run["test"] - theirs[run["seed"]] for run in runs if "test" in run and run["seed"] in theirs]


def markdown(results: Sequence[Result], against: str | None = None) -> str:
    """The table: mean ± standard error over seeds. Of other texts what the loss there has risen by."""
    compared = [] if against is None else [f"beside {against}"]
    places = list(dict.fromkeys(place for result in results for place in result.get("elsewhere", ())))
    other = [head for place in places for head in (place, "KL there")]
    head = ["method", "rates tried", "best", "seeds", "validation", "test", *compared, *other]
    head += ["s a step", "GiB"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    groups = grouped(results)
    for (_, budget), runs in groups.items():
        chosen = at_best(runs)
        rates = sorted({run["rate"] for run in runs})
        end = " (an end)" if len(rates) > 1 and chosen[0]["rate"] in (rates[0], rates[-1]) else ""
        whole = [run for run in chosen if "test" in run]
        cells = [
            _of(runs[0]),
            ", ".join(f"{rate:g}" for rate in rates),
            f"{chosen[0]['rate']:g}{end}",
            str(len(chosen)),
            _spread([validation(run) for run in chosen]),
            _spread([run["test"] for run in whole]),
        ]
        if against is not None:
            reference = at_best(groups[against, budget]) if (against, budget) in groups else []
            cells.append(_spread(beside(whole, reference), "+"))
        for place in places:
            found = [run["elsewhere"][place] for run in chosen if place in run.get("elsewhere", ())]
            cells.append(_spread([one["tuned"] - one["base"] for one in found], "+"))
            cells.append(_spread([one["divergence"] for one in found]))
        cells += [_seconds(whole, results), _peak(whole)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def seconds(runs: Sequence[Result]) -> float:
    """Of an ordinary step: the lower quartile, since the machine may be busy otherwise."""
    return median(quantiles(run["seconds_per_step"], method="inclusive")[0] for run in runs)


def _seconds(runs: Sequence[Result], results: Sequence[Result]) -> str:
    """Nothing to compare by if the study was not run on one kind of processor and device, each run alone."""
    kinds = {(result["processor"], result.get("device")) for result in results}
    alone = runs and all("seconds_per_step" in run for run in runs)
    return f"{seconds(runs):.1f}" if alone and len(kinds) == 1 else "-"


def _peak(runs: Sequence[Result]) -> str:
    found = [run["peak_gib"] for run in runs if "peak_gib" in run]  # not of a process that did several
    return f"{median(found):.1f}" if found else "-"


def standard_error(numbers: Sequence[float]) -> float:
    """Of the mean of two or more."""
    return stdev(numbers) / math.sqrt(len(numbers))


def _spread(numbers: Sequence[float], sign: str = "") -> str:
    """Mean ± standard error."""
    if not numbers:
        return "-"
    error = f" ± {standard_error(numbers):.4f}" if len(numbers) > 1 else ""
    return f"{mean(numbers):{sign}.4f}{error}"


def plots(results: Sequence[Result], out: Path) -> None:
    """Writes rates.png, validation loss by learning rate, and training.png, loss of the steps."""
    from matplotlib.figure import Figure

    by_rate, training = Figure(figsize=(7, 4.5)), Figure(figsize=(7, 4.5))
    left, right = by_rate.subplots(), training.subplots()
    for runs in grouped(results).values():
        first = sorted((run for run in runs if run["seed"] == runs[0]["seed"]), key=lambda r: r["rate"])
        whole = [run for run in first if math.isfinite(validation(run))]
        left.plot([r["rate"] for r in whole], [validation(r) for r in whole], "o-", label=_of(runs[0]))
        losses = [_smooth(run["losses"]) for run in at_best(runs) if "losses" in run]
        if losses:
            means = [mean(step) for step in zip(*losses, strict=False)]
            right.plot(range(1, len(means) + 1), means, label=_of(runs[0]))
    left.set(xscale="log", xlabel="learning rate", ylabel="validation loss")
    right.set(xlabel="step", ylabel="training loss, mean of ten steps")
    for figure, axes, name in ((by_rate, left, "rates"), (training, right, "training")):
        axes.legend(fontsize="small")
        figure.savefig(out / f"{name}.png", dpi=120, bbox_inches="tight")


def _smooth(losses: Sequence[float], width: int = 10) -> list[float]:
    return [mean(losses[max(0, end - width) : end]) for end in range(1, len(losses) + 1)]
