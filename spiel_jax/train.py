r"""Sparse fine-tuning from the command line.

    python -m spiel_jax.train --config=configs/smollm2_135m.py --workdir=runs/smollm2 \
        --config.method=spiel_ma --config.optimizer.learning_rate=1e-3

A folder that already holds checkpoints of the same configuration is continued from the newest.

On several hosts the same command runs once per host, or once per device, with ``--distributed`` where JAX can
tell from the environment how many there are (Slurm, Open MPI, Kubernetes, a TPU pod); elsewhere with
``--coordinator=host:port --num_processes=N --process_id=I``. The run's folder must be one that all see.

Ctrl-C or SIGTERM stops a run after the step that it is in, and saves; a second one ends it at once.

Exit status: 0 if the run is finished; 75 if it was stopped and saved, so that the same command continues it;
130 or 143 if SIGINT or SIGTERM ended it otherwise, while it loaded or by a second signal: the same command
begins, or continues from the last checkpoint; 1 if it failed.
"""

import logging
import sys
from pathlib import Path

from absl import flags

from spiel_jax import cli
from spiel_jax.training.interrupts import STOPPED


def define_flags(values: flags.FlagValues) -> None:
    """Defines the flags of the command."""
    cli.define_config(values)
    flags.DEFINE_string(
        "workdir",
        None,
        "Folder of the run; default: runs/ and the name of the config file.",
        flag_values=values,
    )
    flags.DEFINE_bool(
        "resume", False, "Continue the run in --workdir; refuse to start a new one.", flag_values=values
    )
    flags.DEFINE_integer(
        "resume_from",
        None,
        "Continue from the checkpoint of this step instead of the newest; later ones are moved to the folder "
        "set_aside of --workdir.",
        lower_bound=1,
        flag_values=values,
    )
    flags.DEFINE_bool(
        "extend",
        False,
        "Train the run in --workdir further: config.steps or config.epochs may be raised, and the learning "
        "rate and the replacement rate be others.",
        flag_values=values,
    )
    flags.DEFINE_bool(
        "accept_new_data",
        False,
        "Continue although data, tokenizer or chat template are not those the run was trained with.",
        flag_values=values,
    )
    cli.define_processes(values)


def main(options: flags.FlagValues) -> None:
    """Trains as the flags say."""
    config = cli.read_config(options)
    from spiel_jax.distributed import processes
    from spiel_jax.training.run import run

    cli.connect(options)
    # what is worth saying, the first process says; errors are raised
    logging.getLogger("spiel_jax").setLevel(logging.INFO if processes.is_first() else logging.ERROR)
    name = Path(options.config.partition(":")[0]).stem
    with processes.errors_say_where():
        summary = run(
            config,
            options.workdir or Path("runs", name),
            resume=options.resume,
            resume_from=options.resume_from,
            extend=options.extend,
            accept_new_data=options.accept_new_data,
        )
    if not summary.finished:
        sys.exit(STOPPED)


if __name__ == "__main__":
    cli.run(main, define_flags)
