"""How likely a model finds texts, many at once."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from spiel_jax.errors import SpielError
from spiel_jax.inference import steps
from spiel_jax.inference.served import Served, batch_devices, rows_for, slots_for
from spiel_jax.inference.tree import Piece, lay_out
from spiel_jax.models import ModelConfig, bind
from spiel_jax.models.cache import Past, Sight
from spiel_jax.models.storage.packed import runs_on_cpu
from spiel_jax.ops.sharded import constrain

_PIECE = {"cpu": 256, "other": 1024}  # tokens that a device reads at once
_ASKED = 128  # tokens whose logits are formed at once
_STEADY = 8  # pieces for which the cache keeps its size


@dataclass(frozen=True)
class Likelihood:
    """Of a continuation after its context.

    Attributes:
        log_probability: Summed over the continuation's tokens.
        greedy: Whether each of them is the likeliest there.
    """

    log_probability: float
    greedy: bool


def likelihoods(
    served: Served,
    sequences: Sequence[Sequence[int]],
    first: Sequence[int],
    *,
    memory: int | None = None,
    progress: bool = False,
    programs: set[tuple] | None = None,
    done: Callable[[int, Likelihood], None] = lambda number, found: None,
) -> list[Likelihood]:
    """How likely continuations are after their contexts.

    What sequences begin with alike is read once (see ``inference.tree``); logits are formed for the tokens of
    the continuations only, a few at a time. Compiled once for each power of two that the length of the
    longest sequence in sight takes.

    Args:
        served: The model.
        sequences: Token ids of context and continuation together; at least one of each.
        first: Where in each sequence the continuation begins.
        memory: See ``rows_for``.
        progress: Whether to show a progress bar.
        programs: Is given the shapes that were compiled for.
        done: Is told of each sequence, by its number, as soon as it is known.

    Raises:
        SpielError: If a sequence is not allowed, or the model's logits are not finite.

    Example:
        >>> from dataclasses import replace
        >>> from spiel_jax.models import init_params
        >>> config = replace(ModelConfig.smollm2_135m(), num_layers=2, vocab_size=100)
        >>> served = Served(config, init_params(config, jax.random.key(0)))
        >>> [x.greedy for x in likelihoods(served, [[1, 2, 3], [1, 2, 4]], [2, 2])]
        [False, False]
    """
    found: list[Any] = [None] * len(sequences)
    for number, values, greedy in _answers(served, sequences, first, memory, progress, programs):
        found[number] = Likelihood(float(np.sum(values)), bool(np.all(greedy)))
        done(number, found[number])
    return found


def token_likelihoods(
    served: Served,
    sequences: Sequence[Sequence[int]],
    first: Sequence[int],
    *,
    memory: int | None = None,
    progress: bool = False,
    programs: set[tuple] | None = None,
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Of each continuation's tokens the log-probability, float64, and whether it is the likeliest.

    See ``likelihoods``.
    """
    found: list[Any] = [None] * len(sequences)
    for number, values, greedy in _answers(served, sequences, first, memory, progress, programs):
        found[number] = (values, greedy)
    return found


def _answers(
    served: Served,
    sequences: Sequence[Sequence[int]],
    first: Sequence[int],
    memory: int | None,
    progress: bool,
    programs: set[tuple] | None,
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """The number of a sequence, and what ``token_likelihoods`` says of it; as they become known."""
    _check(served.config, sequences, first)
    if not sequences:
        return
    rows_for(served, max(map(len, sequences)), memory, 1)  # whether one fits
    served = served.by_layer()
    size = _PIECE["cpu" if runs_on_cpu() else "other"]
    streams = [
        (numbers, lay_out([sequences[i] for i in numbers], [first[i] for i in numbers], size))
        for numbers in _parts(sequences, batch_devices())
    ]
    open_answers: list[list[tuple[float, bool]]] = [[] for _ in sequences]
    reader = _Reader(served, len(streams), size, set() if programs is None else programs)
    total = sum(piece.used for _, pieces in streams for piece in pieces)
    with tqdm(total=total, unit="token", disable=not progress) as bar:
        for step in range(max(len(pieces) for _, pieces in streams)):
            if step % _STEADY == 0:
                near = [piece for _, pieces in streams for piece in pieces[step : step + _STEADY]]
                reader.resize(max(piece.depth for piece in near))
            now = [pieces[step] if step < len(pieces) else Piece.empty(size) for _, pieces in streams]
            for row, own, answer in reader.read(now):
                number = streams[row][0][own]
                answers = open_answers[number]
                answers.append(answer)
                if len(answers) == len(sequences[number]) - first[number]:
                    values, greedy = zip(*answers, strict=True)
                    if not np.isfinite(values).all():
                        raise SpielError(
                            f"the model's logits are not finite for text {number}: are its weights?"
                        )
                    yield number, np.array(values), np.array(greedy)
            bar.update(sum(piece.used for piece in now))


def _check(config: ModelConfig, sequences: Sequence[Sequence[int]], first: Sequence[int]) -> None:
    for number, (tokens, start) in enumerate(zip(sequences, first, strict=True)):
        if not 1 <= start < len(tokens):
            raise SpielError(
                f"text {number} of {len(tokens)} tokens, its continuation from token {start}: context and "
                "continuation need at least one each"
            )
        if min(tokens) < 0 or max(tokens) >= config.vocab_size:
            raise SpielError(f"text {number} has a token that is not in 0 to {config.vocab_size - 1}")


def _parts(sequences: Sequence[Sequence[int]], count: int) -> list[list[int]]:
    """The numbers of the sequences in ``count`` parts of about as many tokens, neighbours together."""
    order = sorted(range(len(sequences)), key=lambda number: list(sequences[number]))
    ends = np.cumsum([len(sequences[number]) for number in order])
    part = np.minimum((ends - 1) * count // ends[-1], count - 1)
    return [[number for number, own in zip(order, part, strict=True) if own == p] for p in range(count)]


class _Reader:
    """Reads pieces, a row each, and answers what they ask."""

    def __init__(self, served: Served, rows: int, size: int, programs: set[tuple]):
        self.served, self.rows, self.size, self.programs = served, rows, size, programs
        self.past = served.past(rows, 1)

    def resize(self, depth: int) -> None:
        slots = slots_for(depth)
        if slots != self.past.slots:
            self.past = resized(self.past, slots)

    def read(self, pieces: list[Piece]) -> list[tuple[int, int, tuple[float, bool]]]:
        """Of what is asked the row, its sequence, and the log-probability and whether it is the likeliest."""
        stacked = {
            name: np.stack([getattr(piece, name) for piece in pieces])
            for name in ("tokens", "positions", "reach", "until")
        }
        keep = np.stack([piece.keep for piece in pieces])
        slots = np.where(keep, stacked["positions"], self.past.slots).astype(np.int32)
        served = self.served
        self.programs.add(("read", self.rows, self.size, self.past.slots))
        hidden, new = _read(served.config, dict(served.params), self.past, stacked)
        rows = np.broadcast_to(np.arange(self.rows, dtype=np.int32)[:, None], slots.shape)
        self.past = steps.keep(self.past, new, rows, slots)
        asked = [(row, *one) for row, piece in enumerate(pieces) for one in piece.asked]
        answers = []
        for start in range(0, len(asked), _ASKED):
            some = asked[start : start + _ASKED]
            places, targets = np.zeros((2, _ASKED), np.int32)
            places[: len(some)] = [row * self.size + slot for row, slot, _, _ in some]
            targets[: len(some)] = [target for _, _, target, _ in some]
            self.programs.add(("answer", self.rows * self.size))
            answers.append(_answer(served.config, dict(served.params), hidden, places, targets))
        found = [np.concatenate(part) for part in zip(*jax.device_get(answers), strict=True)] or [[], []]
        return [
            (row, number, (float(value), bool(likeliest)))
            for (row, _, _, number), value, likeliest in zip(asked, *found, strict=False)
        ]


@partial(jax.jit, static_argnames="config")
def _read(
    config: ModelConfig, params: Any, past: Past, pieces: dict[str, jax.Array]
) -> tuple[jax.Array, Past]:
    """Final hidden states [B * S, D], and what ``steps.keep`` takes."""
    sight = Sight(pieces["reach"], pieces["until"])
    hidden, new = bind(config, params).following(past, pieces["tokens"], sight, positions=pieces["positions"])
    return hidden.reshape(-1, hidden.shape[-1]), new


@partial(jax.jit, static_argnames="config")
def _answer(
    config: ModelConfig, params: Any, hidden: jax.Array, places: jax.Array, targets: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Log-probabilities of the targets after the tokens at these places, and whether they are likeliest."""
    logits = bind(config, params).logits(hidden[places])
    chosen = jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    found = chosen - jax.nn.logsumexp(logits, axis=-1), jnp.argmax(logits, axis=-1) == targets
    return jax.tree.map(lambda x: constrain(x, None), found)  # every process reads them


@partial(jax.jit, static_argnames="slots")
def resized(past: Past, slots: int) -> Past:
    """With another number of slots; what does not fit is lost."""
    more = max(slots - past.slots, 0)
    return past.map(lambda x: jnp.pad(x, [(0, 0)] * 2 + [(0, more), (0, 0)])[:, :, :slots])
