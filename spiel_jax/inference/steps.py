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


@partial(jax.jit, static_argnames=("config", "way"), donate_argnames="past")
def fill(
    config: ModelConfig,
    params: Any,
    past: Past,
    places: jax.Array,
    tokens: jax.Array,
    start: jax.Array,
    count: jax.Array,
    choice: Choice,
    *,
    way: Way,
) -> tuple[Past, jax.Array]:
    """Reads a piece of a few rows' prompts, and chooses for each the token that follows it.

    Args:
        config: The model's shape.
        params: Its parameters.
        past: Of all rows.
        places: [R] int32, which rows these are; B or more: none.
        tokens: [R, C] int32.
        start: [R] int32, tokens of the row that are in the past.
        count: [R] int32, tokens of the piece; the rest is padding.
        choice: Of these rows.
        way: See ``choose``.
    """
    places_read = jnp.minimum(places, past.rows - 1)
    own = past.map(lambda x: x[places_read])
    steps = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    positions = start[:, None] + steps
    sight = Sight(jnp.broadcast_to(start[:, None], tokens.shape), jnp.full_like(tokens, tokens.shape[1]))
    model = bind(config, params)
    hidden, new = model.following(own, tokens, sight, positions=positions)
    slots = jnp.where(steps < count[:, None], positions, past.slots)

    past = past.with_tokens(new, jnp.broadcast_to(places[:, None], slots.shape), slots)
    last = jnp.take_along_axis(hidden, jnp.maximum(count - 1, 0)[:, None, None], axis=1)[:, 0]
    chosen = choose(model.logits(last), choice, jnp.zeros_like(count), way)
    return past, constrain(chosen, None)


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
