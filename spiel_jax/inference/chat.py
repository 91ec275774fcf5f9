"""Conversations with a model: prompts by the chat template, replies up to the end of the turn."""

from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from spiel_jax.data import chat_template
from spiel_jax.errors import SpielError
from spiel_jax.inference.sampling import generate
from spiel_jax.models import ModelConfig

_MARK = "\ufdd0"  # a noncharacter: no template writes it of its own accord


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
        SpielError: If ``generate`` refuses a setting, the conversation does not fit the model, or the chat
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
        raise SpielError(f"the chat template refuses the conversation: {error}") from error
    assert isinstance(text, str)
    return text
