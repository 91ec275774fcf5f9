"""Runs as a page to look at, alone or beside each other.

    python -m spiel_jax.report runs/smollm2 --out=report.html
    python -m spiel_jax.report runs/spiel runs/lora --out=report.html --png=pictures

Takes the folders of runs (the --workdir of spiel_jax.train), finished or not, of any method. The page is one
file, needs no network, and has a light and a dark theme. Nothing in the folders is changed.
"""

from absl import app, flags

from spiel_jax import cli


def define_flags(values: flags.FlagValues) -> None:
    """Defines the flags of the command."""
    flags.DEFINE_string("out", "report.html", "File to write.", flag_values=values)
    flags.DEFINE_string(
        "png", None, "Folder to write the charts to as pictures; needs spiel_jax[report].", flag_values=values
    )
    flags.DEFINE_multi_string(
        "weight",
        [],
        "Name of a weight, or the end of one (3.mlp.up_proj.weight), whose rows and columns are shown; may "
        "be repeated. Default: of each kind of weight the one that changed most.",
        flag_values=values,
    )


def main(options: flags.FlagValues, arguments: list[str]) -> None:
    """Writes the report and says what is in it."""
    if not arguments:
        raise app.UsageError("name the folders of one or more runs: spiel_jax.report RUN [RUN ...]")
    from spiel_jax.errors import extra
    from spiel_jax.reporting.pictures import write_pictures
    from spiel_jax.reporting.runs import read_runs
    from spiel_jax.reporting.writing import write_page

    if options.png is not None:
        extra("matplotlib", "report")  # missed now rather than at the end
    runs = read_runs(arguments, options.weight)
    out = write_page(runs, options.out)
    for run in runs:
        for note in run.notes:
            print(f"{run.name}: {note}")
    print(f"{out}: {', '.join(run.name for run in runs)}; {out.stat().st_size:,} bytes")
    if options.png is not None:
        pictures = write_pictures(runs, options.png)
        print(f"{options.png}: {len(pictures)} pictures")


if __name__ == "__main__":
    cli.run(main, define_flags, arguments=True)
