"""Look into sparse adapters and reckon with them.

    python -m spiel_jax.adapters --do=info --adapter=a
    python -m spiel_jax.adapters --do=overlap --adapter=a --adapter=b
    python -m spiel_jax.adapters --do=sum --adapter=a --adapter=b --weights=0.7,-0.3 --out=c
    python -m spiel_jax.adapters --do=ties --adapter=a --adapter=b --density=0.001 --out=d

Time and memory are of their entries; no weights of the base model are read.
"""

from pathlib import Path
from typing import Any

from absl import app, flags

from spiel_jax import cli

TAKES = {
    "info": (1, None, ()),
    "overlap": (2, None, ()),
    "sum": (1, None, ("weights",)),
    "subtract": (2, 2, ()),
    "ties": (2, None, ("weights", "density")),
    "intersect": (2, None, ()),
    "union": (2, None, ()),
    "prune": (1, 1, ("density",)),
}
"""What is done to how many adapters, at least and at most, and which flags it reads beside."""


def define_flags(values: flags.FlagValues) -> None:
    """Defines the flags of the command."""
    flags.DEFINE_enum(
        "do",
        None,
        list(TAKES),
        "sum: all, each times its weight; ties: by the sign that they elect; intersect: entries of the first "
        "where all have any; union: of the first that has one; prune: the largest.",
        required=True,
        flag_values=values,
    )
    flags.DEFINE_multi_string(
        "adapter", None, "Folder of an adapter; may be repeated.", required=True, flag_values=values
    )
    flags.DEFINE_list("weights", None, "Of sum and ties: 0.5,0.5. Default: 1 each.", flag_values=values)
    flags.DEFINE_float("density", None, "What prune leaves; ties, of each weight.", flag_values=values)
    flags.DEFINE_string("out", None, "Folder to write the result to.", flag_values=values)
    flags.DEFINE_string("format", "native", "Of the result; see spiel_jax.export.", flag_values=values)
    flags.DEFINE_bool("overwrite", False, "Replace whatever --out holds.", flag_values=values)
    flags.DEFINE_string(
        "model",
        None,
        "The base model, for the shapes that adapters of other programs do not tell.",
        flag_values=values,
    )
    flags.DEFINE_bool(
        "any_base", False, "Take adapters even if they are of different base models.", flag_values=values
    )


def _check(options: flags.FlagValues) -> None:
    least, most, reads = TAKES[options.do]
    number = len(options.adapter)
    if number < least or (most is not None and number > most):
        wanted = f"{least}" if least == most else f"{least} or more"
        raise app.UsageError(f"--do={options.do} takes {wanted} adapters, got {number}")
    for name in ("weights", "density"):
        if options[name].value is not None and name not in reads:
            raise app.UsageError(f"--{name} means nothing to --do={options.do}")
    if options.do == "prune" and options.density is None:
        raise app.UsageError("--do=prune needs --density: the share of the weights' entries that is left")
    if (options.do in ("info", "overlap")) != (options.out is None):
        needs = "takes no" if options.out is not None else "needs"
        raise app.UsageError(f"--do={options.do} {needs} --out")


def _weights(options: flags.FlagValues) -> list[float] | None:
    try:
        return None if options.weights is None else [float(text) for text in options.weights]
    except ValueError as error:
        raise app.UsageError(f"--weights: {error}: expected numbers, such as 0.5,-1") from error


def _result(options: flags.FlagValues, given: list[Any]) -> Any:
    from spiel_jax.adapters import algebra

    force = {"any_base": options.any_base}
    match options.do:
        case "sum":
            return algebra.weighted_sum(given, _weights(options), **force)
        case "ties":
            return algebra.ties(given, _weights(options), density=options.density, **force)
        case "prune":
            return algebra.prune(given[0], options.density)
        case other:
            return getattr(algebra, other)(*given, **force)


def main(options: flags.FlagValues) -> None:
    """Prints what was asked for, or writes the result and says what is in it."""
    _check(options)
    from spiel_jax.adapters import algebra, read_adapter, write_adapter
    from spiel_jax.adapters.tables import info_table, overlap_table
    from spiel_jax.models.io.loading import model_shape

    shape = None if options.model is None else model_shape(options.model)
    given = [read_adapter(path, shape) for path in options.adapter]
    if options.do == "info":
        print("\n\n".join(info_table(path, one) for path, one in zip(options.adapter, given, strict=True)))
    elif options.do == "overlap":
        print(overlap_table(options.adapter, algebra.overlap(given, any_base=options.any_base)))
    else:
        result = _result(options, given)
        keep = [Path(path) for path in options.adapter]
        out = write_adapter(result, options.out, options.format, overwrite=options.overwrite, keep=keep)
        share = f"{100 * result.density:.4g}% of {len(result.entries)} weights"
        print(f"{out}: {result.count:,} entries, {share}")


if __name__ == "__main__":
    cli.run(main, define_flags)
