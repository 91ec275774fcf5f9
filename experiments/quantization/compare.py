r"""The same short runs on a base in bfloat16, int8 and NF4: held-out loss, step time, memory.

    python -m experiments.quantization.compare --out=runs/quantization

SmolLM2-135M on two-person conversations, by SpIEL-AG, SpIEL-MA and LoRA of rank 8, each with as many
trained entries as that LoRA has. A run is a process of its own, seed after seed, so that noise of the machine
hits all alike. Runs that are done are not done again: the same command continues. Prints a table, and
writes it and what every run came to into --out (results.json).
"""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, median, quantiles, stdev
from typing import Any

from absl import flags

from experiments.trials import Trial, outcome
from spiel_jax import cli
from spiel_jax.errors import SpielError

BASES = {"bf16": "none", "int8": "int8", "nf4": "nf4"}
RANK = 8
ENTRIES = 30 * RANK * 10_176  # of that LoRA: 30 layers, rows and columns of a layer's linears
EVOLVING = {"targets.num_tunable": ENTRIES, "spiel.every": 8, "spiel.accumulation": 3}
METHODS = {
    "spiel_ag": {**EVOLVING, "spiel.seeds": "both", "optimizer.learning_rate": 1e-3},
    "spiel_ma": {**EVOLVING, "optimizer.learning_rate": 3e-3},
    "lora": {"targets.num_tunable": None, "lora.rank": RANK, "optimizer.learning_rate": 3e-3},
}
CONFIG = "configs/smollm2_135m.py:random"


def define_flags(values: flags.FlagValues) -> None:
    """Defines the flags of the command."""
    flags.DEFINE_string("out", None, "Folder of the runs and the results.", required=True, flag_values=values)
    flags.DEFINE_integer("steps", 24, "Of a run.", lower_bound=4, flag_values=values)
    flags.DEFINE_list("seeds", ["0", "1", "2"], "One run with each.", flag_values=values)
    flags.DEFINE_list("bases", list(BASES), f"Of {', '.join(BASES)}.", flag_values=values)
    flags.DEFINE_list("methods", list(METHODS), f"Of {', '.join(METHODS)}.", flag_values=values)


def main(options: flags.FlagValues) -> None:
    """Does the runs that are not done, and prints the table."""
    for name, known in (("bases", BASES), ("methods", METHODS)):
        if unknown := set(options[name].value or ()) - known.keys():
            raise SpielError(f"--{name}: {', '.join(sorted(unknown))}: expected some of {', '.join(known)}")
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    results: list[dict[str, Any]] = []
    for seed, method, base in itertools.product(options.seeds, options.methods, options.bases):
        print(f"{method} on {base}, seed {seed}", flush=True)
        results.append(_result(out, method, base, int(seed), options.steps))
        (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    text = markdown(results)
    (out / "table.md").write_text(text + "\n")
    print(text)


def _result(out: Path, method: str, base: str, seed: int, steps: int) -> dict[str, Any]:
    """What a run came to, read if it is done."""
    chosen = settings(method, base, seed, steps)
    done = outcome(Trial(f"{method}-{base}-{seed}-{steps}", CONFIG, chosen), out)
    return {"method": method, "base": base, "seed": seed, "steps": steps, **done}


def settings(method: str, base: str, seed: int, steps: int) -> dict[str, Any]:
    """What is set beside the configuration of SmolLM2."""
    return {
        "method": method,
        "seed": seed,
        "steps": steps,
        "model.dtype": "bfloat16",
        "model.quantization": BASES[base],
        "model.requantize": True,  # the file is in 4 bits: what these stand for is the base in bfloat16
        "batch_size": 1,
        "eval_batches": 16,
        "eval_every": 0,  # at the ends
        "checkpoint_every": 0,
        "sample.prompt": None,
        **METHODS[method],
    }


def markdown(results: Sequence[dict[str, Any]]) -> str:
    """The table: means over seeds, and how far from the runs on bf16 by the same method with the same seeds.

    After ± stand standard deviations over seeds: a seed also draws the texts that are held out, so that
    losses differ more from seed to seed than what two bases come to with one seed.
    """
    lines = [
        "| method | base | held-out loss | after | beside bf16 | step time | peak memory |",
        "|---|---|---|---|---|---|---|",
    ]
    for method in dict.fromkeys(result["method"] for result in results):
        plain = _of(results, method, "bf16")
        for base in dict.fromkeys(result["base"] for result in results):
            found = _of(results, method, base)
            before = mean(result["heldout"][0][1] for result in found)
            after = [result["heldout"][-1][1] for result in found]
            apart = [a - b["heldout"][-1][1] for a, b in zip(after, plain, strict=False)]
            ratios = [_ratio(found, plain, _seconds), _ratio(found, plain, lambda r: r["peak_gib"])]
            shown = f"{mean(apart):+.4f}{_spread(apart)}" if apart else "-"
            lines.append(
                f"| {method} | {base} | {before:.4f} | {mean(after):.4f}{_spread(after)} | {shown} | "
                + " | ".join(ratios)
                + " |"
            )
    return "\n".join(lines)


def _spread(numbers: Sequence[float]) -> str:
    """Their standard deviation, if there are several."""
    return f" ± {stdev(numbers):.4f}" if len(numbers) > 1 else ""


def _of(results: Sequence[dict[str, Any]], method: str, base: str) -> list[dict[str, Any]]:
    return [result for result in results if (result["method"], result["base"]) == (method, base)]


def _seconds(result: dict[str, Any]) -> float:
    """Of an ordinary step: the lower quartile, since the machine may be busy otherwise."""
    return quantiles(result["seconds_per_step"])[0]


def _ratio(found: Sequence[dict[str, Any]], plain: Sequence[dict[str, Any]], of: Any) -> str:
    """The median over seeds, beside the same of the runs on bf16."""
    if not plain:
        return "-"
    ours, theirs = median(map(of, found)), median(map(of, plain))
    return f"{ours / theirs:.2f} ({ours:.2f})"


if __name__ == "__main__":
    cli.run(main, define_flags)
