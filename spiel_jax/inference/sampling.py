"""Generation of tokens: one compiled program for the prompts and the loop over new tokens.

Prompts are padded on the left, so that every row fills the same slots of the key-value cache and a sliding
window, which counts slots, covers the right tokens.
"""

from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from spiel_jax.errors import SpielError
from spiel_jax.models import KVCache, ModelConfig, bind, init_cache

PAD_TO = 64
"""Prompt lengths and numbers of new tokens are rounded up to multiples of this: one program serves many."""

_NOT_FINITE = -1  # in place of a token that could not be chosen


def generate(
    config: ModelConfig,
    params: Mapping[str, Any],
    tokens: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    stop: Collection[int] = (),
) -> list[list[int]]:
    """Continues prompts, all of them in one batch.

    Compiled once for a number of prompts, the longest prompt rounded up to a multiple of ``PAD_TO``, and
    ``max_new_tokens`` rounded up likewise; other parameters of the same shapes, another temperature or
    another seed do not compile again.

    Args:
        config: The model's shape.
        params: Its parameters.
        tokens: Token ids of each prompt; the lengths may differ.
        max_new_tokens: New tokens per prompt, at most.
        temperature: 0 takes the likeliest token; otherwise tokens are drawn with the probabilities of
            the logits divided by it.
        top_p: Draw among the likeliest tokens that together have this probability (nucleus sampling,
            arXiv 1904.09751); 1 for all tokens.
        seed: Of the draws. What is drawn for a prompt depends on its place in the batch, not on the other
            prompts.
        stop: Tokens that end a continuation; the loop ends when every row has ended.

    Returns:
        The new tokens of each prompt, up to its stop token, which is left out.

    Raises:
        SpielError: If a setting or prompt is not allowed, if a prompt and its new tokens do not fit
            ``config.max_positions``, or if the model's logits are not finite.

    Example:
        >>> from dataclasses import replace
        >>> from spiel_jax.models import init_params
        >>> config = replace(ModelConfig.smollm2_135m(), num_layers=2, vocab_size=100)
        >>> params = init_params(config, jax.random.key(0), jnp.bfloat16)
        >>> new = generate(config, params, [[1, 2, 3], [4]], max_new_tokens=5)
        >>> [len(row) for row in new]
        [5, 5]
    """
    _check_settings(max_new_tokens, temperature, top_p)
    _check_prompts(config, tokens, max_new_tokens)
    if not tokens:
        return []
    prompts, segment_ids = _pad_left(tokens)
    chosen = _decode(
        config,
        dict(params),
        prompts,
        segment_ids,
        np.array(sorted(stop), np.int32),
        np.int32(max_new_tokens),
        jax.random.key(seed),
        None if temperature == 0 else np.float32(temperature),
        None if top_p == 1 else np.float32(top_p),
        new_slots=_rounded(max_new_tokens),
    )
    new = [_before_stop(row, stop) for row in np.asarray(chosen)[:, :max_new_tokens].tolist()]
    if failed := [number for number, row in enumerate(new) if _NOT_FINITE in row]:
        raise SpielError(f"the model's logits are not finite for prompt {failed[0]}: are its weights?")
    return new


def _check_settings(max_new_tokens: int, temperature: float, top_p: float) -> None:
    if max_new_tokens < 1:
        raise SpielError(f"max_new_tokens = {max_new_tokens}: expected at least 1")
    if not 0 <= temperature < float("inf"):
        raise SpielError(f"temperature = {temperature}: expected 0 or more")
    if not 0 < top_p <= 1:
        raise SpielError(f"top_p = {top_p}: expected more than 0 and at most 1")


def _check_prompts(config: ModelConfig, tokens: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    for number, prompt in enumerate(tokens):
        if not prompt:
            raise SpielError(f"prompt {number} has no tokens")
        if unknown := [token for token in prompt if not 0 <= token < config.vocab_size]:
            raise SpielError(f"prompt {number}: token {unknown[0]} is not in 0 to {config.vocab_size - 1}")
        if len(prompt) + max_new_tokens > config.max_positions:
            raise SpielError(
                f"prompt {number} has {len(prompt)} tokens: with max_new_tokens = {max_new_tokens} it does "
                f"not fit the model's {config.max_positions} positions"
            )


def _rounded(length: int) -> int:
    return -(-length // PAD_TO) * PAD_TO


def _pad_left(tokens: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [B, S] and their segment ids: 0 for padding, 1 for the prompt."""
    length = _rounded(max(map(len, tokens)))
    prompts = np.zeros((len(tokens), length), np.int32)
    segment_ids = np.zeros_like(prompts)
    for row, prompt in enumerate(tokens):
        prompts[row, length - len(prompt) :] = prompt
        segment_ids[row, length - len(prompt) :] = 1
    return prompts, segment_ids


def _before_stop(row: list[int], stop: Collection[int]) -> list[int]:
    ends = (number for number, token in enumerate(row) if token in stop)
    return row[: next(ends, len(row))]


class _Generation(NamedTuple):
    """Where the loop over new tokens is.

    Attributes:
        step: [] int32, tokens chosen so far.
        last: [B] int32, those chosen last; not yet in the cache.
        new: [B, new_slots] int32, all of them.
        ended: [B] bool, whether a row has its stop token.
        cache: Keys and values of the tokens before ``last``.
    """

    step: jax.Array
    last: jax.Array
    new: jax.Array
    ended: jax.Array
    cache: KVCache


@partial(jax.jit, static_argnames=("config", "new_slots"))
def _decode(
    config: ModelConfig,
    params: dict[str, Any],
    prompts: jax.Array,
    segment_ids: jax.Array,
    stop: jax.Array,
    limit: jax.Array,
    key: jax.Array,
    temperature: jax.Array | None,
    top_p: jax.Array | None,
    *,
    new_slots: int,
) -> jax.Array:
    """Chosen tokens [B, new_slots]; what follows a row's first stop token, or ``limit``, is undefined.

    Args:
        config: The model's shape.
        params: Its parameters.
        prompts: [B, S] int32, padded on the left.
        segment_ids: [B, S], 0 for padding.
        stop: [N] int32 tokens that end a row.
        limit: [] int32, new tokens per row, at most ``new_slots``.
        key: A random key.
        temperature: [] float32; None: greedy.
        top_p: [] float32; None: all tokens.
        new_slots: Slots of the cache after the prompt.
    """
    batch, length = prompts.shape
    row_keys = jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(batch))
    choose = partial(_choose, temperature=temperature, top_p=top_p)

    def extend(state: _Generation, tokens: jax.Array, segment_ids: jax.Array | None) -> _Generation:
        """Reads tokens [B, S] into the cache and chooses those that follow."""
        model = bind(config, params)
        hidden, cache = model.hidden(tokens, segment_ids=segment_ids, cache=state.cache, remat="none")
        assert cache is not None
        logits = model.logits(hidden[:, -1])  # [B, V]
        keys = jax.vmap(lambda row: jax.random.fold_in(row, state.step))(row_keys)
        finite = jnp.isfinite(jnp.max(logits, axis=-1))
        last = jnp.where(finite, jax.vmap(choose)(logits, keys), _NOT_FINITE)
        return _Generation(
            step=state.step + 1,
            last=last,
            new=lax.dynamic_update_slice_in_dim(state.new, last[:, None], state.step, axis=1),
            ended=state.ended | jnp.isin(last, stop),
            cache=cache,
        )

    begin = _Generation(
        step=jnp.zeros((), jnp.int32),
        last=jnp.zeros((batch,), jnp.int32),
        new=jnp.zeros((batch, new_slots), jnp.int32),
        ended=jnp.zeros((batch,), bool),
        cache=init_cache(config, batch, length + new_slots, bind(config, params).dtype),
    )
    end = lax.while_loop(
        lambda state: (state.step < limit) & ~jnp.all(state.ended),
        lambda state: extend(state, state.last[:, None], None),
        extend(begin, prompts, segment_ids),
    )
    return end.new


def _choose(
    logits: jax.Array, key: jax.Array, temperature: jax.Array | None, top_p: jax.Array | None
) -> jax.Array:
    """A token, [] int32, from logits [V]; ties go to the lowest id."""
    if temperature is None:
        return jnp.argmax(logits).astype(jnp.int32)
    logits = (logits - jnp.max(logits)) / temperature
    if top_p is None:
        return jax.random.categorical(key, logits).astype(jnp.int32)
    order = jnp.argsort(-logits)
    ranked = logits[order]
    probabilities = jax.nn.softmax(ranked)
    likelier = jnp.cumsum(probabilities) - probabilities  # 0 for the first, which is always kept
    nucleus = jnp.where(likelier < top_p, ranked, -jnp.inf)
    return order[jax.random.categorical(key, nucleus)].astype(jnp.int32)
