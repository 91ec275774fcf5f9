"""A process of the device benchmark: one part of it, whose findings go out as lines of JSON.

What a part needs is imported when it runs, so that what is missing on a machine costs that part only.
"""

import json
import os
import platform
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from importlib import import_module, metadata
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any
from unittest import SkipTest

GIB = 2**30
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "torch", "transformers", "peft")
Findings = Iterator[dict[str, Any]]


def version(package: str) -> str | None:
    """Of an installed package; None where it is not."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def machine(job: dict[str, Any]) -> Findings:
    """What the machine is, and the two rates that nothing on it can pass."""
    cpu = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    yield {
        "cpu": cpu[0].partition(":")[2].strip() if cpu else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "versions": {package: version(package) for package in PACKAGES},
    }
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
        yield {"driver": subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()}
    import jax
    import jax.numpy as jnp

    from experiments.bench.hardware import peak_flops

    device = jax.devices()[0]
    stats = device.memory_stats() or {}
    yield {
        "platform": device.platform,
        "device": device.device_kind,
        "devices": jax.device_count(),
        "runtime": device.client.platform_version,
        "memory_gib": stats["bytes_limit"] / GIB if "bytes_limit" in stats else None,
        "peak_flops": peak_flops(device.device_kind),
    }
    tiny = job["tiny"] or device.platform == "cpu"
    size, length, times = (512, 2**20, 3) if tiny else (8192, 2**30, 20)
    keys = jax.random.split(jax.random.key(0, impl="rbg"))
    a, b = (jax.random.normal(key, (size, size), jnp.bfloat16) for key in keys)
    product = jax.jit(lambda a, b: jax.lax.dot(a, b, preferred_element_type=jnp.bfloat16))
    yield {"product_flops": 2 * size**3 / timed(lambda: product(a, b), times)}
    x, copy = jnp.zeros((length,), jnp.bfloat16), jax.jit(lambda x: x + 1)
    yield {"copied_bytes": 2 * x.nbytes / timed(lambda: copy(x), times)}


def timed(run: Callable[[], Any], times: int) -> float:
    """Seconds of one run, of so many that do not wait for each other; the median of three times that."""
    import jax

    jax.block_until_ready(run())
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        jax.block_until_ready([run() for _ in range(times)][-1])
        seconds.append((time.perf_counter() - began) / times)
    return median(seconds)


def checks(job: dict[str, Any]) -> Findings:
    """The tests that are marked for devices, without pytest; several at a time, since most is compiling.

    On a GPU each in a process of its own: threads must not launch and capture CUDA graphs at the same time.
    A TPU has one process.
    """
    found: list[tuple[str, str]] = []
    for module in job["modules"]:
        try:
            tests = device_tests(module)
        except ImportError as error:
            yield {"verdicts": {module: f"not run: {error}"}}
            continue
        found += [(module, name) for name in tests]
    many, spawn = len(os.sched_getaffinity(0)), get_context("spawn")
    with (
        ProcessPoolExecutor(many, mp_context=spawn, max_tasks_per_child=1)
        if job["platform"] == "gpu"
        else ThreadPoolExecutor(many)
    ) as pool:
        for future in as_completed([pool.submit(verdict, *test) for test in found]):
            yield future.result()


def device_tests(module: str) -> dict[str, Callable[[], None]]:
    """Tests of a module of tests/device by name."""
    if "tests" not in sys.path:
        sys.path.insert(0, "tests")
    import_module("device.reference").use_cpu_too()
    members = vars(import_module(f"device.{module}"))
    return {name: test for name, test in members.items() if name.startswith("test_")}


def verdict(module: str, name: str) -> dict[str, Any]:
    """What became of a test, and its seconds."""
    began, found = time.perf_counter(), "passed"
    try:
        device_tests(module)[name]()
    except (ImportError, SkipTest) as error:
        found = f"not run: {error}"
    except Exception:
        found = f"failed: {traceback.format_exc(limit=-3)[-1500:]}"
    return {"verdicts": {name: found}, "seconds": {name: round(time.perf_counter() - began, 1)}}


def steps(job: dict[str, Any]) -> Findings:
    """See ``device_steps``."""
    yield from import_module("experiments.bench.device_steps").steps(job)


def torch_steps(job: dict[str, Any]) -> Findings:
    """See ``device_torch``."""
    yield from import_module("experiments.bench.device_torch").steps(job)


def main() -> None:
    """Reads a job from standard input and writes its findings to standard output."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints must not end up among the findings
    job = json.loads(sys.stdin.readline())
    parts = {"machine": machine, "checks": checks, "steps": steps, "torch": torch_steps}
    for findings in parts[job["part"]](job):
        print(json.dumps(findings), file=answers, flush=True)


if __name__ == "__main__":
    main()
