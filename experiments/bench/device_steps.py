"""Steps of one of our methods on one model: facts, times, memory, and where the time goes."""

import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp

from experiments.bench.hardware import settings_that_fit
from experiments.bench.methods import (
    ACCUMULATION,
    EVERY,
    amortised,
    build_method,
    kinds_of_step,
    linear_weights,
    random_batch,
    random_params,
)
from experiments.bench.scopes import traced_shares
from spiel_jax.losses.next_token import Objective
from spiel_jax.methods.method import compiled_step, compiler_options
from spiel_jax.models import ModelConfig, abstract_params
from spiel_jax.planning.hlo import product_flops

GIB = 2**30
SHARE = 0.0247
"""Tuned entries of a sparse method as a share of the linear weights: LoRA's of rank 64 at 7B."""

Findings = Iterator[dict[str, Any]]


def shape_of(job: dict[str, Any]) -> ModelConfig:
    """The model of a job: a preset, or the tiny one of a trial."""
    return ModelConfig(**job["shape"]) if job["shape"] else getattr(ModelConfig, job["model"])()


def steps(job: dict[str, Any]) -> Findings:
    """Measures with the first setting that fits, from number ``job["skip"]`` on.

    A setting that turns out too large ends this: in a new process memory is whole, and its peak another.

    Args:
        job: ``model`` or ``shape``, ``method``, ``attention`` (of an NVIDIA GPU), ``rank``, ``rows`` at most,
            ``length``, ``skip``.
    """
    model, device = shape_of(job), jax.devices()[0]
    weights = sum(spec.size for spec in abstract_params(model).values())
    entries = round(SHARE * linear_weights(model, job["rules"]))
    usable = (device.memory_stats() or {}).get("bytes_limit", 4 * GIB)
    held = 2 * weights + 34 * entries  # the most that any of the methods holds an entry
    attention = job["attention"] if "cuda" in device.client.platform_version else "xla"
    scores = attention == "xla"
    settings = list(settings_that_fit(model, held, usable, job["length"], job["rows"], scores=scores))
    settings = settings[job["skip"] :]
    rows, remat = settings[0]
    facts = {"parameters": weights, "rows": rows, "length": job["length"], "remat": remat}
    yield {**facts, "attention": attention}
    try:
        yield from Measurement({**job, "attention": attention}, model, entries, rows, remat).findings()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error) or len(settings) == 1:
            raise
        yield {"did_not_fit": {f"{rows} sequences, {remat}": str(error)[:300]}, "again": job["skip"] + 1}


class Measurement:
    """One method with one setting.

    Args:
        job: See ``steps``.
        model: Its shape.
        entries: Tuned ones, of a sparse method.
        rows: Sequences of a step.
        remat: What is stored for the backward pass.
    """

    def __init__(self, job: dict[str, Any], model: ModelConfig, entries: int, rows: int, remat: str):
        self.job, self.model, self.entries, self.remat = job, model, entries, remat
        self.method = self._method(remat, job["attention"])
        self.kinds = kinds_of_step(self.method)
        self.batch = jax.device_put(random_batch(model.vocab_size, rows, job["length"]))
        self.tokens = rows * job["length"]
        self.state: Any = None
        self.programs: dict[str, Any] = {}
        self.seconds: dict[str, float] = {}
        self.losses: list[float] = []
        self.compile_seconds = 0.0

    def _method(self, remat: Any, attention: Any = "xla") -> Any:
        objective = Objective(self.model, remat, attention=attention)
        job, rules = self.job, tuple(self.job["rules"])
        return build_method(job["method"], objective, entries=self.entries, rank=job["rank"], rules=rules)

    def findings(self) -> Findings:
        """All there is to find, the most important first."""
        began = time.perf_counter()
        params = random_params(self.method, jnp.bfloat16)
        start = jax.jit(self.method.init, donate_argnums=0, compiler_options=compiler_options())
        self.state = jax.block_until_ready(start(params))
        del params
        yield {
            "tunable": self.method.tunable(self.state),
            "held_gib": sum(leaf.nbytes for leaf in jax.tree.leaves(self.state)) / GIB,
            "seconds_to_start": time.perf_counter() - began,
        }
        steps = self.traced()
        needed, done = (
            product_flops(self._trace(self._method(remat), "ordinary").jaxpr)
            for remat in ("none", self.remat)
        )
        yield {  # counted with XLA's attention, whose products can be seen
            # what is stored for the backward pass changes nothing but what is computed again
            "flops_per_token": needed / self.tokens,
            "flops_done_per_token": done / self.tokens,
        }
        # ordinary ones are nearly all of a run: if the time is over after them, they are what is wanted
        ordinary = {"ordinary": steps.pop("ordinary")}
        yield from self.compiled(ordinary)
        yield from self.timed(ordinary)
        yield from self.profiled()
        yield from self.compiled(steps)
        yield from self.timed(steps)

    def _trace(self, method: Any, kind: str) -> Any:
        phase, reselect = self.kinds[kind]
        step: Any = compiled_step(method, jax.tree.map(lambda leaf: leaf.sharding, self.state))
        return step.trace(self.state, self.batch, phase=phase, reselect=reselect)

    def traced(self) -> dict[str, Any]:
        """The programs before they are compiled, in the order of an interval."""
        return {kind: self._trace(self.method, kind) for kind in self.kinds}

    def compiled(self, steps: dict[str, Any]) -> Findings:
        """Compiles kinds of steps, all at a time."""
        began = time.perf_counter()
        lowered: dict[str, Any] = {kind: (step.lower(), None) for kind, step in steps.items()}
        if "ordinary" in steps and jax.default_backend() == "gpu":
            # Kernels that are launched as a graph do not say in a trace what they are of.
            apart = {"xla_gpu_enable_command_buffer": ""}
            lowered["profiled"] = steps["ordinary"].lower(), apart
        with ThreadPoolExecutor() as pool:
            compiling = {
                kind: pool.submit(one.compile, compiler_options=options)
                for kind, (one, options) in lowered.items()
            }
        for kind, future in compiling.items():
            self.programs[kind] = future.result()
        if steps:
            temporaries = {
                kind: self.programs[kind].memory_analysis().temp_size_in_bytes / GIB for kind in steps
            }
            self.compile_seconds += time.perf_counter() - began
            yield {"temporaries_gib": temporaries, "seconds_to_compile": self.compile_seconds}

    def run(self, kind: str, times: int = 1) -> float:
        """Seconds of one step, of several that do not wait for each other."""
        began = time.perf_counter()
        metrics: Any = None
        for _ in range(times):
            self.state, metrics = self.programs[kind](self.state, self.batch)
        jax.block_until_ready((self.state, metrics))
        seconds = (time.perf_counter() - began) / times
        self.losses.append(float(metrics["loss"]))
        return seconds

    def timed(self, steps: Iterable[str]) -> Findings:
        """Seconds of kinds of steps; ordinary ones many at a time, as a run does them."""
        steps = list(steps)
        for kind in steps:
            self.run(kind)
        together = max(1, min(20, round(1 / self.run("ordinary"))))
        seconds: dict[str, list[float]] = {kind: [] for kind in steps}
        for _ in range(3):
            for kind in steps:
                seconds[kind].append(self.run(kind, together if kind == "ordinary" else 1))
        self.seconds |= {kind: median(times) for kind, times in seconds.items()}
        peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
        yield {
            "seconds": self.seconds,
            "all_seconds": seconds,
            "tokens_per_second": self.tokens / self.seconds["ordinary"],
            "losses": [self.losses[0], self.losses[-1]],
            "peak_gib": None if peak is None else peak / GIB,
        }
        if self.seconds.keys() == self.kinds.keys():
            yield {"amortised": amortised(self.seconds, EVERY, ACCUMULATION)}

    def profiled(self) -> Findings:
        """Share of an ordinary step's time by scope."""
        kind = "profiled" if "profiled" in self.programs else "ordinary"
        self.run(kind)
        try:
            with tempfile.TemporaryDirectory() as folder:
                program = self.programs[kind].as_text()
                yield {"trace": traced_shares(lambda: self.run(kind, 2), program, Path(folder))}
        except Exception as error:  # whatever a profiler cannot do here, the rest stands
            yield {"trace": {"missing": f"{type(error).__name__}: {error}"[:500]}}
