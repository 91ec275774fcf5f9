r"""Selection, scatter and gather against ``lax.top_k`` and dense versions, over size and density.

    python -m experiments.bench.operations --shapes=576x1536,4096x11008 --densities=0.001,0.024,0.1

Versions of one operation are timed in turn, so that noise hits all alike. Prints a table of medians and
writes operations.json and operations.png into --out.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax import lax
from tqdm import tqdm

from spiel_jax import cli
from spiel_jax.errors import extra
from spiel_jax.ops.selection import drop, replace_dropped, top_magnitudes, top_products
from spiel_jax.sparse.delta import SparseDelta, gather, set_entries
from spiel_jax.training.metrics import table

Operation = Callable[..., Any]


def operations(rows: int, columns: int, k: int) -> dict[str, dict[str, tuple[Operation, tuple]]]:
    """Operation to version to (function, arguments); the first version of each is ours."""
    rng = np.random.default_rng(0)
    size = rows * columns
    dense = jnp.array(rng.standard_normal((rows, columns)), jnp.float32)
    row, column = (jnp.array(np.abs(rng.standard_normal(n)), jnp.float32) for n in (rows, columns))
    active = jnp.array(rng.permutation(size)[:k].astype(np.int32))
    values = jnp.array(rng.standard_normal(k), jnp.float32)
    delta = SparseDelta(active, values, (rows, columns))
    n = max(k // 10, 1)
    incoming = jnp.where(jnp.arange(k) < n, (active + 1) % size, size)

    def without_active(scores: jax.Array) -> jax.Array:
        return scores.reshape(-1).at[active].set(-1.0)

    def dense_mask_set(weight: jax.Array, values: jax.Array) -> jax.Array:
        mask = jnp.zeros((size,), bool).at[active].set(True).reshape(rows, columns)
        spread = jnp.zeros((size,), jnp.float32).at[active].set(values).reshape(rows, columns)
        return jnp.where(mask, spread, weight)

    return {
        "propose: largest |gradient|, not active": {
            "spiel_jax": (lambda d: top_magnitudes(d, k, active), (dense,)),
            "lax.top_k": (lambda d: lax.top_k(without_active(jnp.abs(d)), k)[1], (dense,)),
            "lax.approx_max_k": (lambda d: lax.approx_max_k(without_active(jnp.abs(d)), k)[1], (dense,)),
        },
        "grow by row x column, not active": {
            "spiel_jax": (lambda r, c: top_products(r, c, n, k, active), (row, column)),
            "outer and lax.top_k": (
                lambda r, c: lax.top_k(without_active(r[:, None] * c), n)[1],
                (row, column),
            ),
        },
        "drop: smallest |value|": {
            "spiel_jax": (lambda v: drop(v, active, n, size), (values,)),
            "lax.top_k": (lambda v: lax.top_k(-jnp.abs(v), n)[1], (values,)),
        },
        "replace": {
            "spiel_jax": (
                lambda v: replace_dropped(active, drop(v, active, n, size), incoming, size),
                (values,),
            ),
        },
        "gather": {
            "spiel_jax": (lambda d: gather(d, delta), (dense,)),
            "flat take": (lambda d: jnp.take(d.reshape(-1), active), (dense,)),
        },
        "set": {
            "spiel_jax": (lambda d, v: set_entries(d, delta, v), (dense, values)),
            "dense mask": (dense_mask_set, (dense, values)),
        },
    }


def timed(versions: dict[str, tuple[Operation, tuple]], rounds: int) -> dict[str, tuple[float, float]]:
    """Version to (median milliseconds, MiB of temporaries)."""
    programs, seconds = {}, {name: [] for name in versions}
    for name, (function, arguments) in versions.items():
        programs[name] = jax.jit(function).lower(*arguments).compile()
        jax.block_until_ready(programs[name](*arguments))
    for _ in range(rounds):
        for name, (_, arguments) in versions.items():
            began = time.perf_counter()
            jax.block_until_ready(programs[name](*arguments))
            seconds[name].append(time.perf_counter() - began)
    return {
        name: (1e3 * median(seconds[name]), programs[name].memory_analysis().temp_size_in_bytes / 2**20)
        for name in versions
    }


def define_flags(values: flags.FlagValues) -> None:
    """Defines the flags of the command."""
    flags.DEFINE_list(
        "shapes",
        ["576x576", "576x1536", "2048x8192"],
        "Matrices, rows x columns.",
        flag_values=values,
    )
    flags.DEFINE_list(
        "densities", ["0.001", "0.01", "0.024", "0.1"], "Active entries, shares.", flag_values=values
    )
    flags.DEFINE_integer("rounds", 7, "Times each operation is run.", lower_bound=1, flag_values=values)
    flags.DEFINE_string("out", "runs/bench", "Folder of the results.", flag_values=values)


def main(options: flags.FlagValues) -> None:
    """Times the operations and draws the figures."""
    extra("matplotlib", "report")  # missed now rather than at the end
    results = []
    cases = [(shape, float(density)) for shape in options.shapes for density in options.densities]
    for shape, density in tqdm(cases, desc="shapes and densities"):
        rows, columns = map(int, shape.split("x"))
        k = max(int(density * rows * columns), 1)
        for operation, versions in operations(rows, columns, k).items():
            for version, (milliseconds, mib) in timed(versions, options.rounds).items():
                results.append(
                    {
                        "shape": shape,
                        "density": density,
                        "operation": operation,
                        "version": version,
                        "milliseconds": milliseconds,
                        "temporaries_mib": mib,
                    }
                )
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "operations.json").write_text(json.dumps(results, indent=1))
    for shape, density in cases:
        chosen = [r for r in results if (r["shape"], r["density"]) == (shape, density)]
        rows = [
            (
                r["operation"] if r["version"] == "spiel_jax" else "",
                f"{r['version']:20} {r['milliseconds']:9.2f} ms {r['temporaries_mib']:8.1f} MiB",
            )
            for r in chosen
        ]
        print(table(rows, f"{shape}, density {density}"))
    draw(results, out / "operations.png")


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """Time over density, a panel per operation and shape."""
    extra("matplotlib", "report").use("Agg")
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(r["operation"] for r in results))
    shapes = list(dict.fromkeys(r["shape"] for r in results))
    figure, axes = plt.subplots(
        len(shapes), len(names), figsize=(3 * len(names), 2.6 * len(shapes)), squeeze=False, sharex=True
    )
    for i, shape in enumerate(shapes):
        for j, name in enumerate(names):
            chosen = [r for r in results if (r["shape"], r["operation"]) == (shape, name)]
            for version in dict.fromkeys(r["version"] for r in chosen):
                points = [r for r in chosen if r["version"] == version]
                axes[i][j].loglog(
                    [r["density"] for r in points],
                    [r["milliseconds"] for r in points],
                    marker="o",
                    label=version,
                )
            axes[i][j].set_title(f"{name}\n{shape}", fontsize="small")
            axes[i][j].legend(fontsize="x-small")
        axes[i][0].set_ylabel("ms")
    for axis in axes[-1]:
        axis.set_xlabel("density")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    cli.run(main, define_flags)
