"""Conversations with a model: prompts by the chat template, replies up to the end of the turn."""

import datetime
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from spiel_jax.data.stops import stop_tokens
from spiel_jax.data.templates import ChatTemplate, TemplateRefusal
from spiel_jax.errors import SpielError
from spiel_jax.inference.sampling import generate
from spiel_jax.models import ModelConfig

__all__ = ["reply", "stop_tokens"]


def reply(
    config: ModelConfig,
    params: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | Sequence[Mapping[str, str]],
    *,
    system: str | None = None,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    date: datetime.datetime | None = None,
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
        date: What a chat template that asks for the date is told: a run's, for its model. Default: now.

    Returns:
        The text up to the end of the turn, without special tokens and surrounding whitespace.

    Raises:
        SpielError: If ``generate`` refuses a setting, the conversation does not fit the model, or the chat
            template refuses it (some know no system message).
    """
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [*map(dict, prompt)]
    if system is not None:
        messages = [{"role": "system", "content": system}, *messages]
    template = ChatTemplate(tokenizer, date)
    try:
        text = template.write(messages, prompt=True)
    except TemplateRefusal as refusal:
        raise SpielError(f"the chat template refuses the conversation: {refusal}") from refusal
    (new,) = generate(
        config,
        params,
        [tokenizer.encode(text, add_special_tokens=False)],  # the template writes its own
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        stop=stop_tokens(tokenizer, template),
    )
    return str(tokenizer.decode(new, skip_special_tokens=True)).strip()
