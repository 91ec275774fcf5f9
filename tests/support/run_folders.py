"""Folders as runs leave them, made without training anything."""

import json
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np

from spiel_jax.checkpoint import Checkpoints
from spiel_jax.config import default_config, flatten
from spiel_jax.sparse.targets import Target

HOSTILE = "<script>alert(1)</script> \"'&\x00\x1b\u202e \ud800 </style><img src=x onerror=alert(2)>"
"""A text that should become nothing but text."""

TARGETS = {
    "model.layers.mlp.up_proj.weight": Target((12, 8), 20, stack=(3,)),
    "model.layers.self_attn.q_proj.weight@0,2": Target((8, 8), 8, (2,), (2, 1), (0, 2)),
    "lm_head.weight": Target((6, 8), 5),
}


def write_lines(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def curves(folder, steps=60, every=10, cohorts=True, rate=0.3):
    """Metrics and timing of a run that reselects at 5, 5 + ``every``, ..., and its cohorts if it has ages."""
    metrics, timing, shares = [{"step": 0, "heldout_loss": 4.0}], [], {}
    for step in range(1, steps + 1):
        line = {"grad_norm": 1.0, "loss": 4.0 - step / steps, "replaced": 0.0, "supervised_tokens": 64.0}
        if step % every == 5:
            line["replaced"] = 1.0 if not shares else rate
            shares = {first: share * (1 - line["replaced"]) for first, share in shares.items()}
            shares[step] = line["replaced"]
            if cohorts:
                line |= {f"since/{first}": share for first, share in shares.items() if share}
        metrics.append({"step": step, **line, "learning_rate": 1e-3 * (1 - step / steps)})
        timing.append({"step": step, "seconds_per_step": 0.5, "tokens_per_second": 128.0 + step})
        if step % 20 == 0:
            metrics.append({"step": step, "heldout_loss": 4.0 - 0.9 * step / steps})
    write_lines(folder / "metrics.jsonl", metrics)
    write_lines(folder / "timing.jsonl", timing)


def config(folder, **keys):
    settings = json.loads(json.dumps(flatten(default_config()))) | {"model.source": "somewhere"} | keys
    (folder / "config.json").write_text(json.dumps(settings))
    return settings


def checkpoint(folder, step, settings, items, targets=()):
    method = SimpleNamespace(items=lambda state: state, targets=dict(targets))
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(step, items, method, {"config": settings})


def sparse_items(seed=0):
    """Deltas at random positions of ``TARGETS``; of each matrix the first is 0, and two slots are unused."""
    rng, found = np.random.default_rng(seed), {}
    for name, target in TARGETS.items():
        order = np.argsort(rng.random((*target.lead, target.block_size)))
        indices = order[..., : target.block_count].astype(np.int32)
        values = rng.normal(0, 0.01, indices.shape).astype(np.float32)
        values[..., 0] = 0
        indices[..., -2:], values[..., -2:] = target.block_size, 0
        found[name] = {"indices": jnp.asarray(indices), "values": jnp.asarray(values)}
    return {"deltas": found, "optimizer": {"count": jnp.zeros((), jnp.int32)}}


def lora_items(seed=0):
    rng = np.random.default_rng(seed)
    parts = {"lora_A": rng.normal(size=(2, 4, 8)), "lora_B": rng.normal(size=(2, 12, 4))}
    adapter = {part: jnp.asarray(array, jnp.float32) for part, array in parts.items()}
    return {"trainable": {"model.layers.mlp.up_proj.weight": adapter}, "optimizer": {"count": jnp.ones(2)}}


def write_run(folder, method="spiel_ag", seed=0, **keys):
    """The folder of a finished run of 60 steps."""
    folder.mkdir(parents=True)
    settings = config(folder, method=method, **keys)
    sparse = method in ("spiel_ag", "spiel_ma")
    curves(folder, cohorts=method == "spiel_ag")
    if sparse:
        checkpoint(folder, 60, settings, sparse_items(seed), TARGETS)
    elif method == "lora":
        checkpoint(folder, 60, settings, lora_items(seed))
    replies = [{"step": 0, "Hi": "Hello."}, {"step": 60, "Hi": f"Hello from {method}."}]
    write_lines(folder / "samples.jsonl", replies)
    return folder
