"""What a run says and scores while it trains: replies to fixed prompts, and benchmarks."""

import datetime
from collections.abc import Callable
from typing import Any

from spiel_jax.config import Config
from spiel_jax.errors import extra
from spiel_jax.inference.chat import reply
from spiel_jax.inference.served import Served
from spiel_jax.methods.method import Method, TrainState
from spiel_jax.models import ModelConfig
from spiel_jax.training.metrics import SAMPLES, Recorder

Watch = Callable[[int, TrainState, Recorder, bool], None]
"""Looks at the model after a step, and records what it finds; the last argument is whether it is the last."""


def watch(
    config: Config, model: ModelConfig, method: Method, tokenizer: Any, date: str, source: str | None
) -> Watch:
    """What a run's configuration wants to be watched; all processes do it alike.

    Args:
        config: See ``default_config``.
        model: The model's shape.
        method: Knows the tuned model.
        tokenizer: The run's.
        date: What a chat template that asks for the date is told.
        source: Where the tokenizer can be found, for tasks that measure prompts.

    Raises:
        SpielError: If tasks are named that cannot be evaluated; MissingExtra if lm-eval is not installed.
    """
    names = [name.strip() for text in config.eval_tasks.names for name in text.split(",")]
    told = datetime.datetime.fromisoformat(date)
    wanted: Any = None
    if names:
        extra("lm_eval", "eval")
        from spiel_jax.evaluation import harness
        from spiel_jax.evaluation.lm import SpielLM
        from spiel_jax.evaluation.score_table import numbers

        wanted = harness.Wanted(
            tasks=names,
            data_dir=config.eval_tasks.data_dir,
            limit=config.eval_tasks.limit,
            max_new_tokens=config.eval_tasks.max_new_tokens,
            tokenizer=source,
        )
        harness.check(wanted)

    def look(step: int, state: TrainState, recorder: Recorder, last: bool) -> None:
        every = config.eval_tasks.every
        scoring = wanted and (last or (every and step % every == 0))
        if not (scoring or config.sample.prompts):
            return
        tuned = method.tuned(state)
        if scoring:
            lm = SpielLM(Served(model, tuned), tokenizer, progress=False)
            found = numbers(harness.scores(lm, wanted))
            recorder.write(step, {f"{task}/{metric}": one.value for (task, metric), one in found.items()})
        if config.sample.prompts:
            recorder.write(step, _replies(config, model, tuned, tokenizer, told), SAMPLES)

    return look


def _replies(
    config: Config, model: ModelConfig, params: Any, tokenizer: Any, date: datetime.datetime
) -> dict[str, str]:
    """What the model replies to each prompt."""
    limit = config.sample.max_new_tokens
    return {
        prompt: reply(model, params, tokenizer, prompt, max_new_tokens=limit, date=date)
        for prompt in config.sample.prompts
    }
