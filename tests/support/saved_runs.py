"""Runs that were not trained: their checkpoint holds random changes of a model."""

import jax
import jax.numpy as jnp
import numpy as np

from spiel_jax.checkpoint import Checkpoints
from spiel_jax.config import default_config, flatten
from spiel_jax.methods.registry import build
from spiel_jax.models import open_model
from spiel_jax.models.io.fingerprint import fingerprint
from spiel_jax.models.storage import kind_named


def save_run(folder, model, method="spiel_ma", quantization="none", *, scale=0.3):
    """The folder of a run with a checkpoint of step 3."""
    config = default_config()
    config.model.source, config.model.dtype = str(model), "float32"
    config.model.quantization, config.method = quantization, method
    config.targets.num_tunable = None if method in ("lora", "ia3") else 1000
    source = open_model(str(model))
    base = source.load("float32", storage=kind_named(quantization), progress=False)
    trained_by = build(config, source.config, 10)
    state, rng = trained_by.init(base), np.random.default_rng(0)
    changed = jax.tree.map(lambda x: x + jnp.array(rng.normal(0, scale, x.shape), x.dtype), state.trainable)
    state = trained_by.attach(base, changed, state.opt_state)
    with Checkpoints(folder) as checkpoints:
        metadata = {"config": flatten(config), "fingerprint": fingerprint(base), "data": {}}
        checkpoints.save(3, state, trained_by, metadata)
        checkpoints.wait()
    return folder
