r"""Plan before you rent: does a run fit on hardware that is not here, and what does a step of it do there?

    python -m spiel_jax.plan --config=configs/llama2_7b.py --topology=v5e:4x4 --mesh=fsdp=16

Compiles the training step itself, every kind of step that such a run has, with the compiler of that hardware.
Nothing is allocated, no weights and no data are read. Shows what lies on each device, what the step needs
beside it, what the devices exchange, and whether it fits; where it does not, the nearest setting that does,
found by compiling. Keys of the config are set as for ``spiel_jax.train``.

Exit status: 0 if it fits, 3 if it does not, another one if that could not be found out.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from absl import app, flags
from ml_collections import config_flags

from spiel_jax.config import ConfigError
from spiel_jax.distributed.mesh import MESH_AXES
from spiel_jax.planning.summary import plan, show
from spiel_jax.planning.topology import EXAMPLES, MissingCompilerError


def define_flags() -> None:
    """The flags of the command line. Not defined on import: other commands have flags of the same names."""
    config_flags.DEFINE_config_file("config", None, "A file with get_config(), such as configs/*.py.")
    flags.DEFINE_string("topology", None, f"Hardware to compile for: {EXAMPLES}.")
    flags.DEFINE_list("mesh", [], "Sizes of mesh axes in the place of config.mesh's: fsdp=8,tensor=2.")
    flags.DEFINE_list("steps", [], "Kinds of step to compile, such as ordinary; default: all of the run's.")
    flags.DEFINE_float("memory", None, "Usable GiB of each device; default: what is known of it.")
    flags.DEFINE_string("json", None, "File to write all that was found to; sizes are bytes on one device.")
    flags.DEFINE_bool("no-search", False, "Look for no other setting where the run does not fit.")
    flags.DEFINE_integer("trials", 6, "Other settings to compile at most, looking for one that fits.")
    flags.mark_flags_as_required(["config", "topology"])


def _sizes(texts: Sequence[str]) -> dict[str, int]:
    sizes = {}
    for text in texts:
        axis, _, size = text.partition("=")
        if axis not in MESH_AXES or not size.removeprefix("-").isdecimal():
            raise ConfigError(f"--mesh={text}: expected sizes of {', '.join(MESH_AXES)}: fsdp=8,tensor=2")
        sizes[axis] = int(size)
    return sizes


def main(argv: list[str]) -> None:
    """Entry point of ``python -m spiel_jax.plan``."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    asked: Any = flags.FLAGS
    if asked.json and not Path(asked.json).expanduser().absolute().parent.is_dir():
        raise app.UsageError(f"--json={asked.json}: there is no such folder")
    jax.config.update("jax_platforms", "cpu")  # what is here is not looked at
    jax.config.update("jax_enable_compilation_cache", False)  # a program from it comes without a report
    try:
        found = plan(
            asked.config,
            asked.topology,
            mesh=_sizes(asked.mesh),
            kinds=asked.steps,
            memory=asked.memory,
            trials=0 if asked["no-search"].value else asked.trials,
        )
    except (MissingCompilerError, FileNotFoundError, ValueError, jax.errors.JaxRuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(show(found), flush=True)
    if asked.json:
        Path(asked.json).expanduser().write_text(json.dumps(found, indent=1))
    sys.exit(0 if found["fits"] else 3)


if __name__ == "__main__":
    define_flags()
    app.run(main)
