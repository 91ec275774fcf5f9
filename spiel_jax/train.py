r"""Sparse fine-tuning from the command line.

    python -m spiel_jax.train --config=configs/smollm2_135m.py --workdir=runs/smollm2 \
        --config.method=spiel_ma --config.optimizer.learning_rate=1e-3

A folder that already holds checkpoints of the same configuration is continued from the newest.

On several hosts the same command runs once per host, or once per device, with ``--distributed`` where JAX can
tell from the environment how many there are (Slurm, Open MPI, Kubernetes, a TPU pod); elsewhere with
``--coordinator=host:port --num_processes=N --process_id=I``. The run's folder must be one that all see.
"""

import logging
import os
import sys
from pathlib import Path

from absl import app, flags
from absl import logging as absl_logging
from ml_collections import config_flags

from spiel_jax.checkpoint import CheckpointError
from spiel_jax.config import ConfigError
from spiel_jax.data import DataError
from spiel_jax.distributed import processes
from spiel_jax.training.loop import NonFiniteError
from spiel_jax.training.run import run

_log = logging.getLogger("spiel_jax.train")  # as a program, this module has another name

_MENDABLE = (
    ConfigError,
    CheckpointError,
    DataError,
    NonFiniteError,
    processes.ProcessError,
    FileNotFoundError,
    ValueError,
)
"""Errors whose message says what to do: the command line shows no traceback."""


_CONFIG = config_flags.DEFINE_config_file("config", None, "A file with get_config(), such as configs/*.py.")
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of the run; default: runs/ and the name of the config file."
)
_RESUME = flags.DEFINE_bool("resume", False, "Continue the run in --workdir; refuse to start a new one.")
_DISTRIBUTED = flags.DEFINE_bool("distributed", False, "One of several processes; JAX detects which.")
_COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "host:port of process 0, in all of several processes."
)
_PROCESSES = flags.DEFINE_integer("num_processes", None, "With --coordinator: how many processes there are.")
_PROCESS = flags.DEFINE_integer("process_id", None, "With --coordinator: which of these this is, from 0.")


def main(argv: list[str]) -> None:
    """Entry point of ``python -m spiel_jax.train``."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    name = Path(config_flags.get_config_filename(flags.FLAGS["config"])).stem
    workdir = _WORKDIR.value or os.path.join("runs", name)
    where = ""
    try:
        processes.initialise(_COORDINATOR.value, _PROCESSES.value, _PROCESS.value, detect=_DISTRIBUTED.value)
        where = f" in {processes.name()}" if processes.name() else ""
        if not processes.is_first():  # what is worth saying, the first says; errors are raised
            logging.getLogger("spiel_jax").setLevel(logging.ERROR)
        run(_CONFIG.value, workdir, resume=_RESUME.value)
    except _MENDABLE as error:
        _log.debug("", exc_info=True)
        sys.exit(f"error{where}: {error}")
    except Exception as error:
        if where:
            error.add_note(f"This was{where}.")
        raise


if __name__ == "__main__":
    absl_logging.set_verbosity(absl_logging.WARNING)  # Orbax tells of every file at INFO
    logging.getLogger("spiel_jax").setLevel(logging.INFO)
    flags.mark_flag_as_required("config")
    app.run(main)
