"""Methods to be measured, their kinds of steps, and data for them; from JAX, Optax and Flax alone."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import spiel_jax as sj
from spiel_jax.losses.next_token import Objective
from spiel_jax.methods.full import FullMethod
from spiel_jax.methods.ia3 import IA3, IA3Method
from spiel_jax.methods.lora import Lora, LoraMethod
from spiel_jax.methods.method import Method
from spiel_jax.methods.parametrization import adapted
from spiel_jax.methods.sparse import SparseMethod
from spiel_jax.models import ModelConfig, abstract_params, init_params, layer_names
from spiel_jax.models.storage import storage_for
from spiel_jax.optim.parity import Parity

LINEAR_LAYERS = (r"model\.layers\.\d+\.(self_attn|mlp)\.[a-z]+_proj\.weight",)
EVERY, ACCUMULATION = 20, 5


def linear_weights(model: ModelConfig, rules: Sequence[str] = LINEAR_LAYERS) -> int:
    """Entries of the linears inside the blocks that the rules match; default: of all of them."""
    return sum(target.total for target in adapted(model, rules).values())


def build_method(
    name: str,
    objective: Objective,
    *,
    entries: int | None = None,
    rank: int = 64,
    learning_rate: Any = 1e-4,
    schedule: sj.Reselection | None = None,
    rules: tuple[str, ...] = LINEAR_LAYERS,
    dtype: Any = jnp.bfloat16,
    parity: Parity = "corrected",
    **options: Any,
) -> Method:
    """A method without a configuration: what a run is made from takes packages that need not be here.

    Args:
        name: One of "spiel_ag", "spiel_ma", "lora", "ia3", "full".
        objective: The loss.
        entries: Tuned ones, of a sparse method.
        rank: Of "lora".
        learning_rate: A number or a schedule.
        schedule: When a sparse method reselects.
        rules: Which linears are adapted.
        dtype: In which "full" runs the model.
        parity: "corrected" or "reference", of a sparse method.
        options: Of the optimizer: ``b1``, ``b2``, ``eps``, ``weight_decay``.

    Raises:
        ValueError: If there is no such method.
    """
    model = objective.config
    if name == "full":
        return FullMethod(objective, optax.adamw(learning_rate, **options), jnp.dtype(dtype))
    if name == "lora":
        kind = Lora(adapted(model, rules), rank)
        return LoraMethod(objective, optax.adamw(learning_rate, **options), kind)
    if name == "ia3":
        return IA3Method(objective, optax.adamw(learning_rate, **options), IA3.matching(model, rules))
    if name not in ("spiel_ag", "spiel_ma"):
        raise ValueError(f"method {name!r}: expected one of spiel_ag, spiel_ma, lora, ia3, full")
    targets = sj.find_targets(
        abstract_params(model),
        num_tunable=entries,
        rules=rules,
        layer_names=lambda name, stack: layer_names(name, stack[0]),
    )
    reference = parity == "reference"
    schedule = schedule or sj.Reselection(10 * EVERY, EVERY, ACCUMULATION)
    if name == "spiel_ma":
        growth = sj.MomentApproximation.of("product", parity)
        inner = sj.sparse_sm3(learning_rate, targets, **options)
    else:
        decays = options.get("b1", 0.9), options.get("b2", 0.999)
        growth = sj.AccumulatedGradients.of(*decays, 1.0, parity)
        inner = sj.aged_adamw(learning_rate, low_precision=reference, **options)
    tx = sj.spiel(inner, targets, growth=growth, schedule=schedule, clip_candidates=not reference)
    return SparseMethod(objective, tx, targets, growth, schedule=schedule)


def kinds_of_step(method: Method) -> dict[str, tuple[sj.Phase, bool]]:
    """Name of each kind of step to its phase and whether it reselects, in the order of an interval."""
    growth = getattr(method, "growth", None)
    ordinary = {"ordinary": (sj.Phase.PLAIN, False)}
    if growth is None or isinstance(growth, sj.NoGrowth):
        return ordinary
    if not growth.uses_candidates:
        return {"reselecting": (sj.Phase.PLAIN, True), **ordinary}
    return {
        "proposing": (sj.Phase.PROPOSE, False),
        "estimating": (sj.Phase.ESTIMATE, False),
        "reselecting": (sj.Phase.ESTIMATE, True),
        **ordinary,
    }


def amortised(seconds: Mapping[str, float], every: int, accumulation: int) -> float:
    """Mean step time over an interval between reselections."""
    plain = seconds["ordinary"]
    if "reselecting" not in seconds:
        return plain
    special = [seconds["reselecting"]]
    if "proposing" in seconds:
        special += [seconds["proposing"]] + [seconds["estimating"]] * (accumulation - 2)
    return (sum(special) + plain * (every - len(special))) / every


def random_params(method: Method, dtype: Any) -> dict[str, Any]:
    """Fresh parameters as a method's run holds them, from a generator whose programs compile quickly."""
    key, storage = jax.random.key(0, impl="rbg"), storage_for("none", dtype) if method.keeps_base else None
    return jax.jit(lambda: init_params(method.objective.config, key, dtype, storage=storage))()


def random_batch(
    vocab_size: int, rows: int, length: int, micro_batches: int = 1, seed: int = 0
) -> Mapping[str, np.ndarray]:
    """Arrays [G, B, S] of random tokens, every one of them supervised, one segment a row."""
    shape = (micro_batches, rows, length)
    tokens = np.random.default_rng(seed).integers(0, vocab_size, (micro_batches, rows, length + 1))
    tokens = tokens.astype(np.int32)
    return {
        "tokens": tokens[..., :-1],
        "labels": tokens[..., 1:],
        "weights": np.ones(shape, np.float32),
        "positions": np.broadcast_to(np.arange(length, dtype=np.int32), shape).copy(),
        "segment_ids": np.ones(shape, np.int32),
    }
