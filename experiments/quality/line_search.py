r"""How far sets of entries can go in one step: what bounds their learning rate, measured.

    python -m experiments.quality.line_search --config=configs/smollm2_135m.py --config.batch_size=4 \
        --out=runs/line_search.json

Adam's first step is the sign of the gradient times the learning rate. From the gradient of a few batches this
takes that step on sets of equal size, at rates a factor of 2 apart, and measures the loss of held-out text:
the best rate, what is gained there, and the slope, which is what a small step promises. A set takes a dozen
passes forward, where training at each rate takes hundreds of steps.
"""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags
from jax import lax

from experiments.trials import processor
from spiel_jax import cli
from spiel_jax.config import data_config
from spiel_jax.data import load_data
from spiel_jax.losses.next_token import Objective, supervised
from spiel_jax.methods.configured import configured_targets
from spiel_jax.methods.method import compiler_options
from spiel_jax.models.io.loading import open_model
from spiel_jax.ops.selection import top_magnitudes

RANK = 8
BATCHES = 3  # that the gradient is of: the accumulation of the comparison


def normalised(gradient: jax.Array) -> jax.Array:
    """A gradient [rows, columns] without the size of its rows and columns."""
    squares = jnp.square(gradient)
    rows, columns = jnp.mean(squares, 1, keepdims=True), jnp.mean(squares, 0, keepdims=True)
    return gradient * lax.rsqrt(rows * columns + jnp.finfo(gradient.dtype).tiny)


def balanced(gradient: jax.Array, axis: int, share: float) -> jax.Array:
    """The largest entries along an axis, as many everywhere; others are 0."""
    size = gradient.shape[axis]
    kept = max(round(share * size), 1)
    smallest = jnp.sort(jnp.abs(gradient), axis)[
        (slice(None),) * axis + (slice(size - kept, size - kept + 1),)
    ]
    return jnp.where(jnp.abs(gradient) >= smallest, gradient, 0)


def direction(kind: str, gradient: jax.Array, key: jax.Array, count: int) -> jax.Array:
    """What one unit of learning rate changes in a matrix [rows, columns].

    Args:
        kind: One of ``SETS``.
        gradient: Of the matrix.
        key: Of what is random.
        count: Entries of a set.
    """
    if kind == "full":
        return jnp.sign(gradient)
    if kind == "lora":  # B is zero at the start, so that A does not move
        down = jax.random.uniform(key, (RANK, gradient.shape[1]), minval=-1) * gradient.shape[1] ** -0.5
        return 16 / RANK * jnp.sign(gradient @ down.T) @ down
    scores = {
        "random": lambda: jax.random.uniform(key, gradient.shape),
        "gradient": lambda: gradient,
        "normalised": lambda: normalised(gradient),
        "rows": lambda: balanced(gradient, 1, count / gradient.size),
        "columns": lambda: balanced(gradient, 0, count / gradient.size),
    }[kind]()
    chosen = jnp.zeros(gradient.size, bool).at[top_magnitudes(scores, count)].set(True)
    return jnp.where(chosen.reshape(gradient.shape), jnp.sign(gradient), 0)


SETS = {  # to the rate that is tried first
    "random": 5e-3,
    "gradient": 2.5e-4,
    "normalised": 5e-3,
    "rows": 5e-4,
    "columns": 2.5e-3,
    "lora": 4e-3,
    "full": 7.5e-5,
}


def search(loss: Callable[[float], float], rate: float, base: float) -> dict[float, float]:
    """Rate to change of the loss, at powers of two of ``rate`` around the lowest."""
    found: dict[float, float] = {}
    while True:
        for near in (rate / 2, rate, 2 * rate):
            if near not in found:
                found[near] = loss(near) - base
        best = min(found, key=found.__getitem__)
        if best == rate:
            return dict(sorted(found.items()))
        rate = best


def define_flags(values: flags.FlagValues) -> None:
    """Defines the flags of the command."""
    cli.define_config(values)
    flags.DEFINE_string("out", None, "File of the results.", required=True, flag_values=values)
    flags.DEFINE_list("sets", list(SETS), f"Of {', '.join(SETS)}.", flag_values=values)


def main(options: flags.FlagValues) -> None:
    """Measures every set that the file has not yet, and prints what was found."""
    config, out = cli.read_config(options), Path(options.out)
    told = {"command": " ".join(["python -m experiments.quality.line_search", *sys.argv[1:]])}
    done: dict[str, Any] = told | {"processor": processor()}
    if out.is_file():
        done |= json.loads(out.read_text())
    left = [name for name in options.sets if name not in done]
    for name, found in measured(config, left):
        done[name] = found
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(done, indent=1) + "\n")
        print(name, json.dumps(found), flush=True)


def measured(config: Any, names: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """Name of every set and what a step on it comes to."""
    source = open_model(config.model.source, preset=config.model.preset)
    data = load_data(data_config(config), source.tokenizer(), progress=False)
    params = source.load(jnp.dtype(config.model.dtype), progress=False)
    objective, size = Objective.from_config(config, source.config), config.batch_size
    heldout = jax.device_put(data.heldout_batches(size)[0])

    @partial(jax.jit, compiler_options=compiler_options())
    def loss(params: Any, batch: Any) -> jax.Array:
        return objective(params, batch, frozen=True) / supervised(batch)

    targets = configured_targets(config, source.config)
    weights = {name: params.pop(name) for name in targets}

    @partial(jax.jit, donate_argnums=0, compiler_options=compiler_options())
    def add(total: Any, weights: Any, others: Any, batch: Any) -> Any:
        grads = jax.grad(lambda w: objective({**others, **w}, batch) / supervised(batch))(weights)
        return jax.tree.map(jnp.add, total, grads)

    gradient = jax.tree.map(jnp.zeros_like, weights)
    batches = data.train_iterator(size, steps=BATCHES)
    for _ in range(BATCHES):
        gradient = add(gradient, weights, params, jax.device_put(next(batches)))
    base = float(loss({**params, **weights}, heldout))

    for name in names:
        moves = _moves(name, gradient, targets)

        def after(rate: float, moves: Any = moves) -> float:
            return float(loss({**params, **moved(weights, moves, rate)}, heldout))

        changes = search(after, SETS[name], base)
        best = min(changes, key=changes.__getitem__)
        slope = float(sum(jnp.vdot(gradient[n], moves[n]) for n in moves)) / BATCHES
        yield name, {"best": best, "gain": -changes[best], "slope": slope, "changes": changes}


@jax.jit
def moved(weights: Any, moves: Any, rate: Any) -> Any:
    """The weights after a step of this rate."""
    return jax.tree.map(lambda weight, move: weight - rate * move, weights, moves)


def _moves(kind: str, gradient: Any, targets: Any) -> dict[str, jax.Array]:
    """``direction`` of every matrix, by weight."""
    moves = {}
    for number, (name, target) in enumerate(targets.items()):
        keys = jax.random.split(jax.random.key(number), len(gradient[name]))
        one = jax.jit(partial(direction, kind, count=target.block_count))
        moves[name] = lax.map(lambda parts, one=one: one(*parts), (gradient[name], keys))
    return moves


if __name__ == "__main__":
    cli.run(main, define_flags)
