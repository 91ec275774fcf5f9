"""A process of the step benchmark: one of our own methods."""

import os
import time
from collections.abc import Callable
from typing import Any

from experiments.bench.serve import serve


def prepare(job: dict[str, Any]) -> tuple[dict[str, Any], Callable[[str], float]]:
    """Facts of a method, and the function that runs and times a step of a kind."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    import jax
    import jax.numpy as jnp

    from experiments.bench.methods import kinds_of_step, random_batch
    from spiel_jax.config import LINEAR_LAYERS, default_config
    from spiel_jax.methods.method import compiled_step, compiler_options
    from spiel_jax.methods.registry import build
    from spiel_jax.models import ModelConfig, open_model
    from spiel_jax.models.storage import storage_for
    from spiel_jax.optim.criteria.criterion import CRITERIA
    from spiel_jax.sparse.targets import Rule

    config = default_config()
    config.method = job["method"]
    config.model.source = job["source"]
    if hasattr(ModelConfig, job["source"]):
        config.model.source, config.model.preset = "random", job["source"]
    config.model.dtype = job["dtype"]
    config.model.remat = job["remat"]
    config.spiel.every, config.spiel.accumulation = job["every"], job["accumulation"]
    for key, value in job["options"].items():
        *parents, last = key.split(".")
        section = config
        for parent in parents:
            section = section[parent]
        kind = type(section[last]) if section[last] is not None else float
        section[last] = kind(value) if kind is not bool else value == "True"

    source = open_model(config.model.source, preset=config.model.preset)
    if job["method"] in CRITERIA:
        config.targets.rules = tuple(Rule(pattern, job["share"]) for pattern in LINEAR_LAYERS)
    total = 10 * job["every"]
    training = build(config, source.config, total)
    dtype = jnp.dtype(job["dtype"])
    storage = storage_for("none", dtype) if training.keeps_base else None
    params = source.load(dtype, storage=storage, progress=False)
    state = jax.jit(training.init, donate_argnums=0, compiler_options=compiler_options())(params)
    del params

    batch = random_batch(source.config.vocab_size, job["batch"], job["length"])
    step = compiled_step(training, jax.tree.map(lambda x: x.sharding, state))
    kinds = kinds_of_step(training)
    began = time.perf_counter()
    programs = {
        kind: step.lower(state, batch, phase=phase, reselect=reselect).compile()
        for kind, (phase, reselect) in kinds.items()
    }
    compile_seconds = time.perf_counter() - began
    held = {"state": state}

    def run(kind: str) -> float:
        began = time.perf_counter()
        held["state"], metrics = programs[kind](held["state"], batch)
        jax.block_until_ready((held["state"], metrics))
        return time.perf_counter() - began

    for kind in kinds:
        run(kind)
    own = (state.trainable, state.opt_state, state.base)
    facts = {
        "kinds": list(kinds),
        "compile_seconds": compile_seconds,
        "state_bytes": sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(own)),
        "tunable": training.tunable(state),
        "temporaries_mib": programs["ordinary"].memory_analysis().temp_size_in_bytes / 2**20,
    }
    return facts, run


if __name__ == "__main__":
    serve(prepare)
