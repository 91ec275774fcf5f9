"""Continuations of many texts at once: a row that has ended makes room for the next text.

The host decides which text is in which row; the device reads prompts in pieces and makes tokens for all rows
in blocks. What a prompt begins with and some row holds already is copied from there, not read again.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from tqdm import tqdm

from spiel_jax.errors import SpielError
from spiel_jax.inference import steps
from spiel_jax.inference.choosing import NOT_FINITE, Choice, Way
from spiel_jax.inference.requests import Request
from spiel_jax.inference.served import Served, batch_devices, rows_for, slots_for
from spiel_jax.models.storage.packed import runs_on_cpu

BLOCK = 8
"""Tokens that are made for every row before the host looks at them."""

_PIECES = {"cpu": (64, 128, 256), "other": (256, 1024)}
"""Tokens of prompts that a device reads at once."""

_ENDS = 16  # prompts that end in them, at most

_WORTH = 32  # tokens from which on a beginning is copied
_MOST_ROWS = 64


def continuations(
    served: Served,
    requests: Sequence[Request],
    *,
    memory: int | None = None,
    most_rows: int = _MOST_ROWS,
    progress: bool = False,
    programs: set[tuple] | None = None,
    done: Callable[[int, list[int]], None] = lambda number, new: None,
) -> list[list[int]]:
    """Continues texts.

    As many texts run together as the cache's memory allows, long ones first. Compiled for each power of two
    that the longest row reaches, and for the numbers of rows: the most, and a quarter and a sixteenth of it
    when few are left.

    Args:
        served: The model.
        requests: What to continue, and how.
        memory: Bytes of the cache, see ``rows_for``.
        most_rows: At most so many texts at once.
        progress: Whether to show a progress bar.
        programs: Is given the shapes that were compiled for.
        done: Is told of each text, by its number, as soon as it has ended.

    Returns:
        The new tokens of each text, up to its stop token, which is left out. Where ``ended`` said so there
        can be a few more than it needed.

    Raises:
        SpielError: If a request is not allowed, one row does not fit into the memory, or the model's logits
            are not finite.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from dataclasses import replace
        >>> from spiel_jax.models import ModelConfig, init_params
        >>> config = replace(ModelConfig.smollm2_135m(), num_layers=2, vocab_size=100)
        >>> served = Served(config, init_params(config, jax.random.key(0), jnp.bfloat16))
        >>> requests = [Request(tokens=[1, 2], max_new_tokens=n) for n in (3, 5)]
        >>> [len(new) for new in continuations(served, requests)]
        [3, 5]
    """
    for number, request in enumerate(requests):
        request.check(served.config, number)
    served = served.by_layer()
    most = min(most_rows, 1 << max(len(requests) - 1, 0).bit_length())
    groups: dict[int, list[int]] = {}
    for number, request in enumerate(requests):
        rows = rows_for(served, request.length, memory, max(most, batch_devices()))
        groups.setdefault(rows, []).append(number)
    results: list[list[int]] = [[] for _ in requests]

    def order(number: int) -> tuple[int, list[int]]:  # neighbours are of a length, and begin alike
        return -slots_for(requests[number].length), list(requests[number].tokens)

    with tqdm(total=len(requests), unit="text", disable=not progress) as bar:
        for rows, numbers in sorted(groups.items()):
            numbers.sort(key=order)
            batch = _Batch(served, requests, numbers, rows, set() if programs is None else programs)
            for number, new in batch.run():
                results[number] = new
                done(number, new)
                bar.update()
    return results


@dataclass
class _Row:
    """A row of the batch: the text in it, and what of it is in the cache."""

    number: int | None = None  # of the request; None: free
    held: list[int] = field(default_factory=list)  # tokens in the cache
    new: list[int] = field(default_factory=list)


class _Batch:
    """The rows of one cache, and the texts that wait for a place."""

    def __init__(
        self,
        served: Served,
        requests: Sequence[Request],
        waiting: list[int],
        rows: int,
        programs: set[tuple],
    ):
        self.served, self.requests, self.programs = served, requests, programs
        self.waiting = waiting[::-1]
        self.rows = [_Row() for _ in range(rows)]
        self.past = served.past(rows, 1)
        self.nothing = self.past.map(lambda x: x[:, :, :0])
        own = [requests[number] for number in waiting]
        self.way: Way = "greedy"
        if not all(request.greedy for request in own):
            filters = any(not r.greedy and (r.top_k or r.top_p < 1) for r in own)
            self.way = "filtered" if filters else "drawn"
        self.stops = 1 << (max(len(request.stop) for request in own) - 1).bit_length()
        self.finished: list[tuple[int, list[int]]] = []
        self.arguments = (served.config, dict(served.params))

    def run(self) -> Iterator[tuple[int, list[int]]]:
        """The new tokens of every request, as they end."""
        while self.waiting or any(row.number is not None for row in self.rows):
            self._refill()
            self._compact()
            if self._live():
                self._decode()
            yield from self.finished
            self.finished.clear()

    def _live(self) -> list[int]:
        """Rows that make tokens."""
        return [place for place, row in enumerate(self.rows) if row.number is not None and row.new]

    def _unread(self) -> list[int]:
        """Rows whose prompts are not read to the end."""
        return [place for place, row in enumerate(self.rows) if row.number is not None and not row.new]

    def _fit(self, length: int) -> None:
        """Makes sure of so many slots; gives back those that are not needed."""
        slots = slots_for(length)
        if slots != self.past.slots:
            self._move(range(len(self.rows)), slots)

    def _move(self, places: Sequence[int], slots: int) -> None:
        self._used("move", len(places))
        self.past = steps.moved(self.past, np.array(places, np.int32), slots)
        for row in self.rows:
            del row.held[slots:]
        self.rows = [self.rows[place] for place in places]

    def _compact(self) -> None:
        """A quarter of the rows, when no more are needed for what is left."""
        live = self._live() + self._unread()
        few = len(self.rows) // 4
        if self.waiting or not live or few < batch_devices() or len(live) > few or few % batch_devices():
            return
        free = [place for place in range(len(self.rows)) if place not in live]
        self._move((live + free)[:few], self.past.slots)

    def _used(self, what: str, *more: Any) -> None:
        self.programs.add((what, len(self.rows), self.past.slots, *more))

    def _refill(self) -> None:
        """Gives the free rows to texts that wait, and reads these."""
        free = [place for place, row in enumerate(self.rows) if row.number is None]
        reading = self._unread()
        while free and self.waiting:
            number = self.waiting[-1]
            tokens = list(self.requests[number].tokens)
            shared = [_common(row.held, tokens[:-1]) for row in self.rows]
            asked = [_common(self._prompt(place), tokens[:-1]) for place in reading]
            best = int(np.argmax(shared))
            if max(asked, default=0) >= max(shared[best], _WORTH - 1) + 1:
                self._read(reading, whole=True)  # one of these will hold what this one begins with
                reading = []
                continue
            self.waiting.pop()
            place = best if best in free else min(free, key=lambda place: shared[place])
            free.remove(place)
            if shared[place] < shared[best] and shared[best] >= _WORTH:
                self._used("copy")
                self.past = steps.copied(self.past, np.array([best], np.int32), np.array([place], np.int32))
                self.rows[place].held = list(self.rows[best].held[: shared[best]])
            row = self.rows[place]
            start = _common(row.held, tokens[:-1])
            self.rows[place] = _Row(number, row.held[:start])
            reading.append(place)
        self._read(reading, whole=False)

    def _number(self, place: int) -> int:
        number = self.rows[place].number
        assert number is not None
        return number

    def _prompt(self, place: int) -> list[int]:
        return list(self.requests[self._number(place)].tokens)

    def _read(self, todo: list[int], *, whole: bool) -> None:
        """Reads what is missing of the rows' prompts, and chooses their first tokens.

        Unless the ``whole`` is wanted, a rest that fills less than half a piece is left for the next time:
        a call costs what it takes to read the weights, however few its tokens are.
        """
        if not todo:
            return
        self._fit(max(self.past.slots, *(len(self._prompt(place)) for place in todo)))
        sizes = _PIECES["cpu" if runs_on_cpu() else "other"]
        while todo:
            left = sum(len(self._prompt(place)) - len(self.rows[place].held) for place in todo)
            full = left // batch_devices()
            if not whole and 2 * full < sizes[0] and self._live():
                return
            size = max((size for size in sizes if 3 * size <= 4 * full), default=sizes[0])
            self._read_pieces(todo, size)
            begun = [place for place in todo if self.rows[place].number is not None]
            todo = [place for place in begun if len(self.rows[place].held) < len(self._prompt(place))]

    def _read_pieces(self, todo: list[int], size: int) -> None:
        """Reads as much as one call can, in streams of this size."""
        streams, ended = self._lay_out(todo, size)
        requests = {end: self.requests[self._number(place)] for place, end in ended.items()}
        usual = self.requests[self._number(todo[0])]
        choice = _choice([requests.get(end, usual) for end in range(streams.ends.size)])
        past = self.past if streams.reach.any() else self.nothing  # texts that begin look at no past
        self.programs.add(("read", len(self.rows), past.slots, size, self.way))
        new, chosen = steps.read(*self.arguments, past, streams, choice, way=self.way)
        self.past = steps.keep(self.past, new, streams.rows, streams.slots)
        if ended:
            tokens = np.asarray(chosen)
            for place, end in ended.items():
                self._take(place, [int(tokens[end])])

    def _lay_out(self, todo: list[int], size: int) -> tuple[steps.Streams, dict[int, int]]:
        """Streams of what is next in the rows, which then hold it, and which of their ends is a row's.

        A stream looks at one row for what is held already: its pieces are of texts that begin as that does.
        """
        streams, ended = _no_streams(batch_devices(), size, self.past.slots), {}
        left = sorted(todo, key=lambda place: -len(self.rows[place].held))
        held = {place: self.rows[place].held for place in left}
        for stream in range(batch_devices()):
            source = streams.source[stream] = left[0] if left else 0
            used, ends = 0, 0
            for place in list(left):
                begun, prompt = len(held[place]), self._prompt(place)
                if used == size or ends == _ENDS or _common(held[source], held[place]) < begun:
                    continue
                piece = prompt[begun : begun + size - used]
                here, used = (stream, slice(used, used + len(piece))), used + len(piece)
                streams.tokens[here], streams.rows[here] = piece, place
                streams.positions[here] = streams.slots[here] = begun + np.arange(len(piece))
                streams.reach[here], streams.until[here] = begun, used
                self.rows[place].held = held[place] + piece
                left.remove(place)
                if begun + len(piece) == len(prompt):
                    streams.ends[stream, ends] = used - 1
                    ended[place] = stream * _ENDS + ends
                    ends += 1
        return streams, ended

    def _decode(self) -> None:
        live = self._live()
        longest = max(len(self.rows[place].held) for place in live) + BLOCK
        self._fit(max(longest, *(len(self._prompt(place)) for place in self._unread()), 0))
        ended = len(self.rows) - len(live)
        enough = len(self.rows)
        if self.waiting or self._unread():  # do not stop for each row by itself
            enough = min(ended + max(len(self.rows) // 8, 1), enough)
        self._used("decode", self.stops, self.way)
        self.past, tokens, made = steps.decode(
            *self.arguments, self.past, self._state(), np.int32(enough), steps=BLOCK, way=self.way
        )
        tokens, made = np.asarray(tokens), np.asarray(made)
        for place in live:
            row, new = self.rows[place], tokens[place, : made[place]].tolist()
            row.held += [row.new[-1], *new[:-1]]
            self._take(place, new)

    def _take(self, place: int, new: list[int]) -> None:
        """Further tokens of a row, which may end it."""
        row = self.rows[place]
        assert row.number is not None
        request = self.requests[row.number]
        if NOT_FINITE in new:
            raise SpielError(f"the model's logits are not finite for prompt {row.number}: are its weights?")
        row.new += new
        stopped = row.new[-1] in request.stop
        if stopped:
            row.new.pop()
        full = len(row.new) >= request.max_new_tokens
        if stopped or full or (request.ended is not None and request.ended(row.new)):
            self.finished.append((row.number, row.new))
            row.number = None

    def _state(self) -> steps.Rows:
        """The rows as the device wants them."""
        anyone = self.requests[self._number(self._live()[0])]
        live = set(self._live())
        asked = [anyone if row.number is None else self.requests[row.number] for row in self.rows]
        stop = np.full((len(asked), self.stops), -2, np.int32)
        for slot, request in enumerate(asked):
            stop[slot, : len(request.stop)] = sorted(request.stop)

        def numbers(of: Any) -> np.ndarray:
            return np.array([of(row) for row in self.rows], np.int32)

        def of_live(of: Any) -> np.ndarray:
            return np.array([of(row) if at in live else 0 for at, row in enumerate(self.rows)], np.int32)

        return steps.Rows(
            last=of_live(lambda row: row.new[-1]),
            length=of_live(lambda row: len(row.held)),
            made=numbers(lambda row: len(row.new)),
            limit=np.array([request.max_new_tokens for request in asked], np.int32),
            ended=np.array([place not in live for place in range(len(self.rows))]),
            stop=stop,
            choice=_choice(asked),
        )


def _no_streams(count: int, size: int, slots: int) -> steps.Streams:
    """Nothing but padding."""
    padding = np.zeros((count, size), np.int32)
    return steps.Streams(
        tokens=padding,
        positions=padding.copy(),
        reach=padding.copy(),
        until=padding + np.arange(1, size + 1, dtype=np.int32),
        rows=padding.copy(),
        slots=padding + slots,
        source=np.zeros(count, np.int32),
        ends=np.zeros((count, _ENDS), np.int32),
    )


def _choice(requests: Sequence[Request]) -> Choice:
    def each(name: str, dtype: Any) -> np.ndarray:
        return np.array([getattr(request, name) for request in requests], dtype)

    return Choice(
        seed=each("seed", np.uint32),
        draw=each("draw", np.uint32),
        temperature=each("temperature", np.float32),
        top_k=each("top_k", np.int32),
        top_p=each("top_p", np.float32),
        min_p=each("min_p", np.float32),
    )


def _common(one: list[int], other: list[int]) -> int:
    """How many tokens two lists begin with alike."""
    low, high = 0, min(len(one), len(other))
    while low < high:  # slices are compared faster than elements
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
