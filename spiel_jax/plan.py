r"""Plan before you rent: does a run fit on hardware that is not here, and what does a step of it do there?

    python -m spiel_jax.plan --config=configs/llama2_7b.py --topology=v5e:4x4 --mesh=fsdp=16

Compiles the training step itself, every kind of step that such a run has, with the compiler of that hardware.
Nothing is allocated, no weights and no data are read. Shows what lies on each device, what the step needs
beside it, what the devices exchange, and whether it fits; where it does not, the nearest setting that does,
found by compiling. Keys of the config are set as for ``spiel_jax.train``.

Exit status: 0 if it fits, 3 if it does not, another one if that could not be found out (130 after Ctrl-C).
"""

import json
import math
import sys
from pathlib import Path

from absl import app, flags

from spiel_jax import cli
from spiel_jax.planning.topology import EXAMPLES


def define_flags(values: flags.FlagValues) -> None:
    """Defines the flags of the command."""
    cli.define_config(values)
    flags.DEFINE_string(
        "topology",
        None,
        f"Hardware to compile for: {EXAMPLES}.",
        required=True,
        flag_values=values,
    )
    cli.define_sizes(values, "mesh", "Sizes of mesh axes in the place of config.mesh's: fsdp=8,tensor=2.")
    flags.DEFINE_list(
        "steps",
        [],
        "Kinds of step to compile, such as ordinary; default: all of the run's.",
        flag_values=values,
    )
    flags.DEFINE_float(
        "memory", None, "Usable GiB of each device; default: what is known of it.", flag_values=values
    )
    flags.DEFINE_string(
        "json",
        None,
        "File to write all that was found to; sizes are bytes on one device.",
        flag_values=values,
    )
    flags.DEFINE_bool(
        "search", True, "Look for another setting where the run does not fit.", flag_values=values
    )
    flags.DEFINE_integer(
        "trials",
        6,
        "Other settings to compile at most, looking for one that fits.",
        lower_bound=0,
        flag_values=values,
    )


def main(options: flags.FlagValues) -> None:
    """Prints the plan, and exits with its verdict."""
    file = Path(options.json).expanduser().absolute() if options.json else None
    if file and not file.parent.is_dir():
        raise app.UsageError(f"--json={options.json}: there is no such folder")
    if options.memory is not None and not 0 < options.memory < math.inf:
        raise app.UsageError(f"--memory={options.memory}: expected more than 0")
    config = cli.read_config(options)
    import jax

    from spiel_jax.planning.summary import plan, show

    jax.config.update("jax_platforms", "cpu")  # what is here is not looked at
    jax.config.update("jax_enable_compilation_cache", False)  # a program from it comes without a report
    found = plan(
        config,
        options.topology,
        mesh=options.mesh,
        kinds=options.steps,
        memory=options.memory,
        trials=options.trials if options.search else 0,
    )
    print(show(found), flush=True)
    if file:
        file.write_text(json.dumps(found, indent=1))
    sys.exit(0 if found["fits"] else 3)


if __name__ == "__main__":
    cli.run(main, define_flags, failure=2)
