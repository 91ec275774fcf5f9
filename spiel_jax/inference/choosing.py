"""The next token of each row of a batch, chosen as the row asks: the likeliest, or drawn."""

from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

Way = Literal["greedy", "drawn", "filtered"]
"""What a batch needs: no draws, draws among all tokens, or top-k and top-p too, which have to sort."""

NOT_FINITE = -1
"""In place of a token that could not be chosen."""


class Choice(NamedTuple):
    """How rows choose; arrays [B].

    Attributes:
        seed: uint32.
        draw: uint32, which of the continuations that are drawn with this seed.
        temperature: float32; 0: the likeliest token.
        top_k: int32, among how many of the likeliest; 0: all.
        top_p: float32, among the likeliest of this total probability, after ``top_k``.
        min_p: float32, among those at least so many times as likely as the likeliest.
    """

    seed: Any
    draw: Any
    temperature: Any
    top_k: Any
    top_p: Any
    min_p: Any


def choose(logits: jax.Array, choice: Choice, made: jax.Array, way: Way) -> jax.Array:
    """A token for each row, [B] int32; ``NOT_FINITE`` where the logits are not. Ties go to the lowest id.

    What is drawn depends on the row's seed, draw and number of tokens so far, and on nothing else in the
    batch.

    Args:
        logits: [B, V] float32.
        choice: See ``Choice``.
        made: [B] int32, tokens chosen so far.
        way: What the batch needs at most; static.
    """
    tokens = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    if way != "greedy":
        drawn = jax.vmap(partial(_draw, filtered=way == "filtered"))(logits, choice, made)
        tokens = jnp.where(choice.temperature > 0, drawn, tokens)
    return jnp.where(jnp.isfinite(jnp.max(logits, axis=-1)), tokens, NOT_FINITE)


def _draw(logits: jax.Array, choice: Choice, made: jax.Array, filtered: bool) -> jax.Array:
    """A token drawn from logits [V]."""
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(choice.seed), choice.draw), made)
    temperature = jnp.where(choice.temperature > 0, choice.temperature, 1)
    logits = (logits - jnp.max(logits)) / temperature  # 0 for the likeliest, which is always kept
    least = jnp.where(choice.min_p > 0, jnp.log(choice.min_p), -jnp.inf)
    if filtered:
        ranked = -jnp.sort(-logits)
        rank = jnp.arange(ranked.size)
        among = jnp.where((choice.top_k == 0) | (rank < choice.top_k), ranked, -jnp.inf)
        probabilities = jax.nn.softmax(among)
        likelier = jnp.cumsum(probabilities) - probabilities
        inside = (likelier < choice.top_p) & jnp.isfinite(among)
        among = jnp.where(inside, ranked, jnp.inf)
        kept = jnp.where((choice.top_k > 0) | (choice.top_p < 1), jnp.min(among), -jnp.inf)
        least = jnp.maximum(least, kept)
    return jax.random.categorical(key, jnp.where(logits >= least, logits, -jnp.inf)).astype(jnp.int32)
