"""The compiled programs of generation. What rows are is known to the host; on the device is their past."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from spiel_jax.inference.choosing import Choice, Way, choose
from spiel_jax.models import ModelConfig, bind
from spiel_jax.models.cache import Past, Sight
from spiel_jax.ops.sharded import constrain


class Rows(NamedTuple):
    """The rows of a batch; arrays [B].

    Attributes:
        last: int32, the token chosen last, which is not yet in the past.
        length: int32, tokens in the past.
        made: int32, tokens chosen so far.
        limit: int32, how many there may be.
        ended: bool, whether the row is to be left alone.
        stop: [B, N] int32, tokens that end it; filled up with -2.
        choice: How it chooses.
    """

    last: Any
    length: Any
    made: Any
    limit: Any
    ended: Any
    stop: Any
    choice: Choice


class Streams(NamedTuple):
    """Pieces of prompts, one after the other; arrays [R, S].

    Attributes:
        tokens: int32.
        positions: int32, in their texts.
        reach: int32, how many tokens of the row ``source`` a token's text begins with.
        until: int32, where its piece ends.
        rows: int32, whose it is.
        slots: int32, its slot there; as many as there are slots or more: it is padding.
        source: [R] int32, a row that holds the beginnings of all texts in the stream.
        ends: [R, N] int32, tokens that are the last of their prompts.
    """

    tokens: Any
    positions: Any
    reach: Any
    until: Any
    rows: Any
    slots: Any
    source: Any
    ends: Any


@partial(jax.jit, static_argnames=("config", "way"))
def read(
    config: ModelConfig, params: Any, past: Past, streams: Streams, choice: Choice, *, way: Way
) -> tuple[Past, jax.Array]:
    """Reads pieces of prompts, and chooses the tokens that follow the last of them.

    Args:
        config: The model's shape.
        params: Its parameters.
        past: Of all rows; no slots will do where every piece is the beginning of its text.
        streams: The pieces.
        choice: Of the rows that ``ends`` belong to, [R * N].
        way: See ``choose``.

    Returns:
        What ``keep`` takes, and the tokens [R * N].
    """
    model = bind(config, params)
    own = past.map(lambda x: x[streams.source])
    sight = Sight(streams.reach, streams.until)
    hidden, new = model.following(own, streams.tokens, sight, positions=streams.positions)
    last = jnp.take_along_axis(hidden, streams.ends[:, :, None], axis=1)
    last = last.reshape(-1, last.shape[-1])
    chosen = choose(model.logits(last), choice, jnp.zeros(last.shape[0], jnp.int32), way)
    return new, constrain(chosen, None)


@partial(jax.jit, donate_argnames="past")
def keep(past: Past, new: Past, rows: jax.Array, slots: jax.Array) -> Past:
    """The past with what was read: see ``Past.with_tokens``.

    A program of its own, because one that also reads the past would copy it before it is written.
    """
    return past.with_tokens(new, rows, slots)


@partial(jax.jit, static_argnames=("config", "steps", "way"), donate_argnames="past")
def decode(
    config: ModelConfig,
    params: Any,
    past: Past,
    rows: Rows,
    enough: jax.Array,
    *,
    steps: int,
    way: Way,
) -> tuple[Past, jax.Array, jax.Array]:
    """Up to ``steps`` more tokens of every row that has not ended.

    Args:
        config: The model's shape.
        params: Its parameters.
        past: Of all rows; the longest has slots for so many more.
        rows: Where they are.
        enough: [] int32: how many rows have ended when it stops before.
        steps: At most.
        way: See ``choose``.

    Returns:
        The past, the tokens [B, steps], and how many of them there are [B]: a stop token counts.
    """
    model = bind(config, params)

    def more(state: tuple) -> jax.Array:
        step, rows = state[:2]
        return (step < steps) & (jnp.sum(rows.ended) < enough)

    def one(state: tuple) -> tuple:
        step, rows, past, tokens = state
        slots = jnp.where(rows.ended, past.slots, rows.length)
        hidden, past = model.extending(
            past, rows.last[:, None], positions=rows.length[:, None], slots=slots[:, None]
        )
        chosen = choose(model.logits(hidden[:, 0]), rows.choice, rows.made, way)
        last = constrain(jnp.where(rows.ended, rows.last, chosen), None)
        lives = jnp.where(rows.ended, 0, 1)
        made = rows.made + lives
        ended = rows.ended | (made >= rows.limit) | jnp.any(last[:, None] == rows.stop, axis=-1) | (last < 0)
        tokens = lax.dynamic_update_slice_in_dim(tokens, last[:, None], step, axis=1)
        rows = rows._replace(last=last, length=rows.length + lives, made=made, ended=ended)
        return step + 1, rows, past, tokens

    before = rows.made
    tokens = jnp.zeros((rows.last.shape[0], steps), jnp.int32)
    begin = (jnp.zeros((), jnp.int32), rows, past, tokens)
    _, rows, past, tokens = lax.while_loop(more, one, begin)
    return past, constrain(tokens, None, None), constrain(rows.made - before, None)


@partial(jax.jit, donate_argnames="past")
def copied(past: Past, source: jax.Array, target: jax.Array) -> Past:
    """With rows ``target`` [R] as rows ``source`` [R] are; a target of B or more is none."""
    return past.map(lambda x: x.at[target].set(x[source], mode="drop"))


@partial(jax.jit, static_argnames="slots")
def moved(past: Past, rows: jax.Array, slots: int) -> Past:
    """These rows [R] alone, with another number of slots; what does not fit is lost."""
    more = max(slots - past.slots, 0)

    return past.map(lambda x: jnp.pad(x[rows, :, :slots], [(0, 0)] * 2 + [(0, more), (0, 0)]))
