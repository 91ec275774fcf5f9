"""A run of the trainer, and then its loss on held-out text that nothing was chosen by.

Takes the flags ``--config``, ``--config.KEY`` and ``--workdir`` of ``spiel_jax.train``. The first
``config.eval_batches`` held-out batches are the run's own, by which rates are chosen (validation); the rest
are the test. Leaves ``measured.json`` in the run's folder.
"""

import json
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags

from experiments.trials import STOPPED
from spiel_jax import cli
from spiel_jax.adapters.load import load_run
from spiel_jax.config import data_config, micro_batch_size
from spiel_jax.data import load_data
from spiel_jax.losses.next_token import Objective
from spiel_jax.methods.method import compiler_options
from spiel_jax.training.loop import heldout_loss
from spiel_jax.training.nonfinite import NonFiniteError
from spiel_jax.training.run import run


def define_flags(values: flags.FlagValues) -> None:
    """Defines the flags of the command."""
    cli.define_config(values)
    flags.DEFINE_string("workdir", None, "Folder of the run.", required=True, flag_values=values)


def main(options: flags.FlagValues) -> None:
    """Trains, and measures what came of it."""
    config, workdir = cli.read_config(options), Path(options.workdir)
    measured = workdir / "measured.json"
    try:
        finished = run(config, workdir, progress=False).finished
    except NonFiniteError:
        measured.write_text(json.dumps({"diverged": True}))
        raise
    if not finished:
        sys.exit(STOPPED)
    device = jax.devices()[0]
    told = {} if device.platform == "cpu" else {"device": device.device_kind}
    measured.write_text(json.dumps({"test": test_loss(config, workdir), **told}))


def test_loss(config: Any, workdir: Path) -> float:
    """Loss of what a run has trained on the held-out batches after ``config.eval_batches``."""
    tuned = load_run(workdir)
    data = load_data(
        data_config(config),
        tuned.tokenizer,
        date=tuned.date,
        vocab_size=tuned.config.vocab_size,
        progress=False,
    )
    batches = data.heldout_batches(micro_batch_size(config))[config.eval_batches :]
    objective = Objective.from_config(config, tuned.config)
    evaluate = jax.jit(
        lambda params, batch: (objective(params, batch, frozen=True), jnp.sum(batch["weights"])),
        compiler_options=compiler_options(),
    )
    state: Any = tuned.tuned
    return heldout_loss(evaluate, state, batches)


if __name__ == "__main__":
    cli.run(main, define_flags)
