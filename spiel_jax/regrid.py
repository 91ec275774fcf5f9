r"""Gives a run another block grid, so that it can be continued on meshes which divide that one.

    python -m spiel_jax.regrid --workdir=runs/x --grid=fsdp=4,tensor=2 --out=runs/y
    python -m spiel_jax.train --config=... --workdir=runs/y --config.mesh.fsdp=4 --config.mesh.tensor=2

The deltas stay what they are, entry by entry, and so does all that the optimizer holds for each. But entries
are not spread evenly over the new blocks: each gets as many slots as the fullest block of its target needs,
and the rest are unused. The next reselections fill these before they replace any entry, so that a method
whose entries evolve ends with more of them; those of a static mask stay as many as they are.
The work is done in the host's memory, and the base model's weights are not read.
"""

from typing import Any

from absl import flags

from spiel_jax import cli


def define_flags(values: flags.FlagValues) -> None:
    """Defines the flags of the command."""
    cli.define_run(values, "workdir", required=True)
    cli.define_sizes(
        values,
        "grid",
        "Blocks of each weight along the mesh axes, such as fsdp=4,tensor=2. The run can then be continued "
        "on every mesh whose sizes of fsdp and tensor divide these. An axis that is left out stays as it is.",
        required=True,
    )
    flags.DEFINE_string(
        "model",
        None,
        "Where the base model is now, if not where it was; only its shape is read. See spiel_jax.generate.",
        flag_values=values,
    )
    flags.DEFINE_string(
        "out", None, "Folder of the new run: not there yet, or empty.", required=True, flag_values=values
    )


def main(options: flags.FlagValues) -> None:
    """Writes the new folder, and prints what became of each target."""
    import jax

    from spiel_jax.training.regridding import regrid, show

    jax.config.update("jax_platforms", "cpu")  # a device's memory may be too small, or in use
    changed = regrid(options.workdir, options.grid, options.out, options.step, model=options.model)
    print(show(changed))
    print(f"to continue the run: python -m spiel_jax.train --workdir={options.out} --config=...")


def __getattr__(name: str) -> Any:
    """The function ``regrid``, which was here before commands and work were apart."""
    if name != "regrid":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from spiel_jax.training.regridding import regrid

    return regrid


if __name__ == "__main__":
    cli.run(main, define_flags)
