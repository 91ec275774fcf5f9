r"""What the library does on the accelerator that is at hand: checks, then steps of models of three sizes.

    python -m experiments.bench.device

Runs the tests that are marked for devices and the golden trajectories, then steps of SpIEL-AG (with cuDNN's
attention on an NVIDIA GPU, and with XLA's), SpIEL-MA, LoRA of rank 64, and Hugging Face PEFT's LoRA of rank
64 where it is installed. Ends in --seconds, compiling included: each part is a process of its own with a
share of the time that is left, and what it found until it is stopped is kept. What cannot be imported costs
the part that needs it, no other. Prints tables and writes DEVICE_DATE.json into --out, anew with every
finding. On a CPU the models are tiny.

This module itself needs nothing but Python.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
MODELS = {"llama3_2_1b": 1.5, "llama2_7b": 2.0, "smollm2_135m": 1.0}
"""Preset to the share of the time that each of its parts has, of one share of the least."""
METHODS: dict[str, dict[str, Any]] = {
    "spiel_ag": {"method": "spiel_ag"},
    "peft_lora_64": {"part": "torch", "rank": 64},
    "spiel_ag_xla": {"method": "spiel_ag", "attention": "xla"},
    "lora_64": {"method": "lora", "rank": 64},
    "spiel_ma": {"method": "spiel_ma"},
}
CHECKS = ["test_attention", "test_selection", "test_entries", "test_steps", "test_resume", "test_golden"]
"""Modules of tests/device."""
TINY = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 16,
    "max_positions": 256,
    "tie_embeddings": True,
}
"""The model in the place of the others where there is only a CPU."""
SLACK = 3.0
"""How many times its share of the time that is left a part may take; see ``allowance``."""
LEAST = 5.0
"""Seconds under which no process is started."""


def jobs(wanted: Sequence[str], tiny: bool) -> dict[str, tuple[float, dict[str, Any]]]:
    """Name of each part to its share of the time and what its process is told.

    Args:
        wanted: Names of parts, of models or of methods; empty: all parts.
        tiny: Whether to try all with one tiny model.
    """
    sizes = {"rows": 2, "length": 64, "shape": TINY} if tiny else {"rows": 8, "length": 2048, "shape": None}
    rules = [r".*\.(q|down)_proj\.weight" if tiny else r"model\.layers\..*_proj\.weight"]
    usual = {"part": "steps", "rank": 64, "attention": "cudnn", "rules": rules, "skip": 0, **sizes}
    modules = ["test_entries"] if tiny else CHECKS  # a CPU has the whole of the tests, and is slow at them
    parts: dict[str, tuple[float, dict[str, Any]]] = {"checks": (3.0, {"part": "checks", "modules": modules})}
    for model, share in ({"tiny": 1.0} if tiny else MODELS).items():
        for method, told in METHODS.items():
            parts[f"{model}/{method}"] = share, {**usual, "model": model, **told}

    def chosen(name: str) -> bool:
        return not wanted or any(one in (name, *name.split("/")) for one in wanted)

    return {name: part for name, part in parts.items() if chosen(name)}


def allowance(left: float, share: float, shares: float) -> float:
    """Seconds that a part may take: its share of what is left and some slack, but no more than half of it.

    >>> allowance(100.0, 1.0, 8.0), allowance(100.0, 1.0, 3.0), allowance(100.0, 3.0, 4.0)
    (37.5, 50.0, 75.0)

    Args:
        left: Seconds until the end of all parts.
        share: Of this part.
        shares: Of this part and those that come after it.
    """
    fair = share / shares
    return left * max(fair, min(SLACK * fair, 0.5))


def merge(found: dict[str, Any], more: Mapping[str, Any]) -> None:
    """Adds findings to others; a dict inside goes on in the one that is there."""
    for key, value in more.items():
        if isinstance(value, dict) and isinstance(found.get(key), dict):
            merge(found[key], value)
        else:
            found[key] = value


def environment(job: Mapping[str, Any], cache: str) -> dict[str, str]:
    """Environment of a part's process."""
    own = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.9", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    if job["part"] == "checks":  # most of it is compiling, and trying products out most of that
        own["XLA_FLAGS"] = "--xla_gpu_autotune_level=0"
        own["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # several processes share the memory
    if job["part"] == "steps":
        # methods share programs, and what was tried out for products of the same shapes
        own["JAX_COMPILATION_CACHE_DIR"] = cache
    if job["tiny"]:  # compiling is most of a trial
        own["XLA_FLAGS"] = "--xla_backend_optimization_level=1"
    own |= os.environ
    if job["part"] == "torch":
        own["JAX_PLATFORMS"] = "cpu"  # or JAX would take the memory
    return own


def run_part(
    job: Mapping[str, Any], limit: float, cache: str, keep: Callable[[dict[str, Any]], None]
) -> str | None:
    """Runs a part in a process of its own and kills it when its time is over.

    Args:
        job: What it is told.
        limit: Seconds.
        cache: Folder of compiled programs.
        keep: Gets each finding as it comes.

    Returns:
        Why it did not end well; None if it did.
    """
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(
            [sys.executable, "-m", "experiments.bench.device_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            cwd=ROOT,
            env=environment(job, cache),
            start_new_session=True,
        ) as process,
    ):
        assert process.stdin is not None
        assert process.stdout is not None
        stopped = threading.Event()

        def stop() -> None:
            stopped.set()
            os.killpg(process.pid, signal.SIGKILL)

        timer = threading.Timer(limit, stop)
        timer.start()
        try:
            with contextlib.suppress(BrokenPipeError), process.stdin as told:
                told.write(json.dumps(job) + "\n")
            for line in process.stdout:
                if line.endswith("\n"):  # the last one may be cut where it was killed
                    keep(json.loads(line))
            process.wait()
        finally:
            timer.cancel()
            if process.poll() is None:
                stop()
        if stopped.is_set():
            return f"stopped after {limit:.0f} s"
        if process.returncode:
            errors.seek(0)
            last = errors.read().strip().splitlines()[-12:]
            return "\n".join(last)[-2000:] or f"exit status {process.returncode}"
    return None


class Record:
    """All findings, kept in a file.

    Args:
        folder: Of the file, whose name has the device once that is known.
        settings: Of this run.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]):
        self._folder, self._began = folder, datetime.now()
        self.found: dict[str, Any] = {
            "date": self._began.isoformat(timespec="seconds"),
            "settings": dict(settings),
            "parts": {},
        }
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def machine(self) -> dict[str, Any]:
        """What is known of the machine."""
        return self.found["parts"].get("machine", {})

    @property
    def path(self) -> Path:
        """The file."""
        device = "".join(c if c.isalnum() else "_" for c in self.machine.get("device", "unknown"))
        return self._folder / f"{device}_{self._began:%Y-%m-%d_%H%M%S}.json"

    def add(self, part: str, more: Mapping[str, Any]) -> None:
        """Adds findings of a part."""
        before = self.path
        merge(self.found["parts"].setdefault(part, {}), more)
        if before != self.path and before.exists():
            before.rename(self.path)
        whole = self.path.with_suffix(".partial")
        whole.write_text(json.dumps(self.found, indent=1) + "\n")
        whole.replace(self.path)


def run_all(wanted: Sequence[str], seconds: float, tiny: bool, record: Record) -> None:
    """Runs the parts one after the other, each while there is time."""
    end = time.monotonic() + seconds
    with tempfile.TemporaryDirectory(prefix="programs_") as cache:

        def run(name: str, job: dict[str, Any], share: float, shares: float) -> None:
            began = time.monotonic()
            limit = allowance(end - began, share, shares)
            problem = run_settings(name, job, limit, cache, record)
            record.add(name, {"wall_seconds": round(time.monotonic() - began, 1)})
            if problem:
                record.add(name, {"problem": problem})
            text = problem.splitlines()[-1] if problem else "done"
            now = time.monotonic()
            print(f"{name}: {text} ({now - began:.0f} s, {end - now:.0f} s left)", flush=True)

        run("machine", {"part": "machine", "tiny": tiny}, 1.0, 8.0)
        platform = record.machine.get("platform", "cpu")
        tiny = tiny or platform == "cpu"
        todo = jobs(wanted, tiny)
        shares = sum(share for share, _ in todo.values())
        for name, (share, job) in todo.items():
            run(name, {**job, "tiny": tiny, "platform": platform}, share, shares)
            shares -= share


def run_settings(name: str, job: dict[str, Any], limit: float, cache: str, record: Record) -> str | None:
    """Runs a part, again with its next setting as long as one turns out not to fit.

    Returns:
        What ``run_part`` does.
    """
    end = time.monotonic() + limit
    while (left := end - time.monotonic()) > LEAST:
        again: list[int] = []

        def keep(more: dict[str, Any], again: list[int] = again) -> None:
            if "again" in more:
                again.append(more.pop("again"))
            record.add(name, more)

        problem = run_part(job, left, cache, keep)
        if problem or not again:
            return problem
        job = {**job, "skip": again[0]}
    return "no time left"


def grid(rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns, the first row being their heads."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def show(found: Mapping[str, Any]) -> str:
    """Tables of all findings."""
    parts = found["parts"]
    machine = parts.get("machine", {})
    versions = ", ".join(f"{name} {one}" for name, one in machine.get("versions", {}).items() if one)
    lines = [
        f"{machine.get('device', 'no device')}, {found['date']}, {machine.get('cpu')}, "
        f"{machine.get('cores')} cores",
        f"python {machine.get('python')}, {versions}",
        f"{machine.get('runtime', '')} {machine.get('driver', '')}",
    ]
    if "copied_bytes" in machine:
        peak = machine["peak_flops"]
        lines.append(
            f"bf16 products {machine['product_flops'] / 1e12:.4g} TFLOP/s"
            + (f" of {peak / 1e12:.4g}" if peak else ", of an unknown peak")
            + f", copies {machine['copied_bytes'] / 1e9:.4g} GB/s read and written"
        )
    verdicts = parts.get("checks", {}).get("verdicts", {})
    passed = sum(verdict == "passed" for verdict in verdicts.values())
    lines += ["", f"checks: {passed} of {len(verdicts)} passed"] if verdicts else []
    lines += [f"  {name}: {verdict}" for name, verdict in verdicts.items() if verdict != "passed"]
    measured = {name: part for name, part in parts.items() if "/" in name}
    if measured:
        lines += ["", grid(_speeds(measured, machine))]
        lines += ["", "share of an ordinary step's time by scope", grid(_scopes(measured))]
    problems = {name: part["problem"] for name, part in parts.items() if "problem" in part}
    missing = [f"{name}: {problem.splitlines()[-1]}" for name, problem in problems.items()]
    return "\n".join([*lines, "", *missing])


def _speeds(measured: Mapping[str, Any], machine: Mapping[str, Any]) -> list[list[str]]:
    """What a step costs, a row for each part; "-" where it is not known."""
    heads = ["part", "setting", "tuned", "ordinary s", "amortised s", "tokens/s"]
    rows = [[*heads, "of peak", "done", "peak GiB", "compiled s"]]
    peak = machine.get("peak_flops") or machine.get("product_flops")
    for name, part in measured.items():
        rate = part.get("tokens_per_second")
        # torch's arithmetic is not counted: its LoRA has that of ours
        counts = measured.get(name.replace("/peft_", "/"), {})
        done = part.get("flops_done_per_token")

        def share(flops: float | None, rate: float | None = rate) -> str:
            return "-" if not (flops and rate and peak) else f"{flops * rate / peak:.1%}"

        ordinary = part.get("seconds", {}).get("ordinary")
        rows.append(
            [
                name,
                ", ".join(
                    [
                        f"{part.get('rows', '-')} x {part.get('length', '-')}",
                        *(part[key] for key in ("remat", "attention") if key in part),
                    ]
                ),
                number(part.get("tunable"), ",d"),
                number(ordinary, ".4f"),
                number(part.get("amortised"), ".4f"),
                number(rate, ",.0f"),
                share(counts.get("flops_per_token")),
                share(done),
                number(part.get("peak_gib"), ".2f"),
                number(part.get("seconds_to_compile"), ".0f"),
            ]
        )
    return rows


def number(value: float | None, form: str) -> str:
    """A number as text; "-" where it is not known."""
    return "-" if value is None else format(value, form)


def _scopes(measured: Mapping[str, Any]) -> list[list[str]]:
    """Share of the time by scope, a row for each part that was traced."""
    traced = {name: part["trace"] for name, part in measured.items() if "scopes" in part.get("trace", {})}
    scopes = _in_order(scope for trace in traced.values() for scope in trace["scopes"])
    rows = [["part", *scopes, "(not named)"]]
    for name, trace in traced.items():
        shown = [trace["scopes"].get(scope) for scope in scopes]
        rows.append([name, *(number(one, ".1%") for one in [*shown, trace["unknown"]])])
    return rows


def _in_order(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seconds", type=float, default=480, help="for everything")
    parser.add_argument("--out", default=str(ROOT / "runs" / "device"), help="folder of the JSON file")
    parser.add_argument("--tiny", action="store_true", help="a tiny model in the place of all, as on a CPU")
    parser.add_argument(
        "--parts", default="", help="only these, separated by commas: checks, a model, a method, model/method"
    )
    given = parser.parse_args()
    wanted = [part for part in given.parts.split(",") if part]
    record = Record(Path(given.out), {"seconds": given.seconds, "tiny": given.tiny, "parts": wanted})
    run_all(wanted, given.seconds, given.tiny, record)
    print("\n" + show(record.found), flush=True)
    print(f"\n{record.path}")


if __name__ == "__main__":
    main()
