"""Small runs of the trainer, and runs that are stopped on the way."""

import contextlib
import json
from unittest.mock import patch

import jax
import numpy as np

from spiel_jax.config import default_config, flatten
from spiel_jax.methods import method as methods
from spiel_jax.methods.registry import build
from spiel_jax.training import run as training
from spiel_jax.training.metrics import read_metrics

WORDS = ["red", "green", "blue", "one", "two", "three", "cat", "dog", "sun", "moon", "tea"]


def chat_file(folder):
    rng = np.random.default_rng(0)
    path = folder / "chat.jsonl"
    rows = []
    for _ in range(80):
        word = str(rng.choice(WORDS))
        turns = [
            {"role": "user", "content": f"say {word}"},
            {"role": "assistant", "content": f"{word} {word}"},
        ]
        rows.append({"messages": turns})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def tiny_config(model, data, method="spiel_ag"):
    """Six steps, of which every other one ends with a reselection; few programs to compile."""
    config = default_config()
    config.method = method
    config.mesh.data = 1
    config.model.source = str(model)
    config.model.dtype = "float32"
    config.data.sources = (str(data),)
    config.data.heldout = 8
    config.data.sequence_length = 64
    config.targets.num_tunable = 1000
    both, one = r".*\.(o|up)_proj\.weight", r".*\.up_proj\.weight"
    config.targets.rules = (one if method == "lora" else both,)
    config.spiel.every = 2
    config.spiel.accumulation = 2
    config.spiel.schedule = "constant"
    config.optimizer.learning_rate = 1e-2
    config.batch_size = 4
    config.steps = 6
    config.eval_batches = 0
    config.checkpoint_every = 0
    return config


class Shared:
    """What runs of the same settings trace and compile, wherever their files are: kept from run to run."""

    def __init__(self):
        self.methods, self.compiled = {}, {}

    def build(self, config, model, steps, targets=None):
        settings = {key: value for key, value in flatten(config).items() if not key.startswith(ELSEWHERE)}
        built = build(config, model, steps, targets)  # each time: it may refuse
        return self.methods.setdefault((repr(settings), model, steps, repr(built.targets)), built)

    def once(self, make):
        def made(method, *shardings):
            key = make.__name__, id(method), tuple(jax.tree.leaves(shardings))
            if key not in self.compiled:
                self.compiled[key] = method, make(method, *shardings)  # the method: its id is not given again
            return self.compiled[key][1]

        return made

    @contextlib.contextmanager
    def used(self):
        with contextlib.ExitStack() as stack:
            stack.enter_context(patch("spiel_jax.training.run.build", self.build))
            for where, make in (
                ("run", methods.compiled_start),
                ("loop", methods.compiled_step),
                ("loop", methods.compiled_evaluation),
            ):
                stack.enter_context(patch(f"spiel_jax.training.{where}.{make.__name__}", self.once(make)))
            yield


# Keys that say nothing of what is compiled.
ELSEWHERE = ("data.", "model.source", "model.tokenizer", "checkpoint_", "eval_", "sample.", "on_record")
SHARED = Shared()


def run(config, workdir, *, until=None, extend=False, accept_new_data=False, resume_from=None, **mesh):
    """Trains on a mesh of these sizes, as if a signal came during the ``until``-th step of this call."""
    config = config.copy_and_resolve_references()
    config.mesh.update(mesh)
    calls = []

    @contextlib.contextmanager
    def stop_on_signal(several):
        yield lambda: calls.append(0) or len(calls) == until

    original = training.stop_on_signal
    training.stop_on_signal = stop_on_signal
    try:
        options = {"extend": extend, "accept_new_data": accept_new_data, "resume_from": resume_from}
        with SHARED.used():
            return training.run(config, workdir, progress=False, **options)
    finally:
        training.stop_on_signal = original


def losses(workdir):
    """Step to loss."""
    return {line["step"]: line["loss"] for line in read_metrics(workdir) if "loss" in line}
