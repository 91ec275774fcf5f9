r"""What a checkpoint costs: the step's pause for it, the digests in that, writing, and reading it back.

    python -m experiments.bench.saving --preset=llama3_2_1b --entries=20000000

A state of random numbers of a SpIEL method is saved and read, several times in turn with a copy that has no
digests and no search for what is not finite. No weights of a model are needed, nor made. Medians; the ratios
are of one run.
"""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags

from experiments.trials import processor
from spiel_jax import cli
from spiel_jax.checkpoint import Checkpoints
from spiel_jax.checkpoint.arrays import load_arrays, stored_arrays
from spiel_jax.config import default_config
from spiel_jax.methods.method import Method, TrainState
from spiel_jax.methods.registry import build
from spiel_jax.models.io.loading import model_shape
from spiel_jax.ops.digest import digests
from spiel_jax.sparse.targets import zeros
from spiel_jax.training.metrics import table


def define_flags(values: flags.FlagValues) -> None:
    """Defines the flags of the command."""
    flags.DEFINE_string("preset", "llama3_2_1b", "Shape of the model.", flag_values=values)
    flags.DEFINE_string("method", "spiel_ag", "Of SpIEL.", flag_values=values)
    flags.DEFINE_integer("entries", 20_000_000, "That are trained.", lower_bound=1, flag_values=values)
    flags.DEFINE_integer("rounds", 7, "After one that does not count.", lower_bound=1, flag_values=values)


def main(options: flags.FlagValues) -> None:
    """Prints the table."""
    method, state = random_state(options.method, options.preset, options.entries)
    items = method.items(state)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(items))
    plain = jax.jit(lambda items: jax.tree.map(jnp.copy, items))
    times: dict[str, list[float]] = {}

    def timed(name: str, function: Callable[[], Any]) -> None:
        began = time.perf_counter()
        jax.block_until_ready(function())
        times.setdefault(name, []).append(time.perf_counter() - began)

    with tempfile.TemporaryDirectory() as folder, Checkpoints(folder, keep=1) as checkpoints:
        place = Path(folder, "checkpoints")
        for step in range(options.rounds + 1):
            timed("a copy alone", lambda: plain(items))
            began = time.perf_counter()
            timed("the pause: copy, digests, start", lambda n=step: checkpoints.save(n, state, method, {}))
            checkpoints.wait()
            times.setdefault("the whole save", []).append(time.perf_counter() - began)
            timed("digests, when it is read", lambda: digests(items))
            timed("reading", lambda n=step: load_arrays(place, n, stored_arrays(place, n)))
    seconds = {name: median(several[1:]) for name, several in times.items()}
    rows = [
        (name, f"{s:.3f} s, {s / seconds['the whole save']:.2f} of a save") for name, s in seconds.items()
    ]
    print(table(rows, f"{options.method}, {size / 2**20:,.0f} MiB of state, {processor()}"))


def random_state(name: str, preset: str, entries: int) -> tuple[Method, TrainState]:
    """A method and a state of it whose numbers are random."""
    config = default_config()
    config.method, config.model.source, config.model.preset = name, "random", preset
    config.targets.num_tunable = entries
    method: Any = build(config, model_shape("random", preset), 100)
    draw = iter(jax.random.split(jax.random.key(0), 1000))

    def filled(leaf: jax.Array) -> jax.Array:
        floats = jnp.issubdtype(leaf.dtype, jnp.floating)
        return jax.random.uniform(next(draw), leaf.shape, leaf.dtype) if floats else leaf

    values = zeros(method.targets)
    return method, jax.tree.map(filled, TrainState({}, {}, values, jax.jit(method.tx.init)(values)))


if __name__ == "__main__":
    cli.run(main, define_flags)
