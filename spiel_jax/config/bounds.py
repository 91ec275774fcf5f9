"""What the keys of the configuration may be: a line a key, its type and range.

Of a single key alone; what two keys cannot be together is in ``config.py`` and with the methods.
"""

import ast
import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, get_args

import numpy as np

from spiel_jax.methods.entry_gradients import ProposeFrom
from spiel_jax.methods.registry import method_names
from spiel_jax.models.decoder import Remat
from spiel_jax.models.fused_attention import AttentionKind
from spiel_jax.models.storage import KINDS
from spiel_jax.optim.criteria.accumulated_gradients import Seeds
from spiel_jax.optim.criteria.criterion import CRITERIA
from spiel_jax.optim.criteria.moment_approximation import Score
from spiel_jax.optim.parity import Parity
from spiel_jax.optim.spiel import DropBy

_LARGEST = 2**31 - 1
"""Counts and sizes are int32 on the device."""


class Kind:
    """A type of values, and which of them a key may have.

    Attributes:
        repeated: Whether a flag of it may be given several times, for the parts of one value.
        boolean: Whether a flag of it needs no value.
    """

    repeated: ClassVar[bool] = False
    boolean: ClassVar[bool] = False

    def read(self, text: str) -> Any:
        """What a text of the command line stands for; the text itself where that is nothing of this type."""
        return text

    def expected(self, value: Any) -> str | None:
        """What is expected in the place of a value; None if the key may have it."""
        raise NotImplementedError


@dataclass(frozen=True)
class Whole(Kind):
    """An int from ``low`` to ``high``.

    >>> Whole(1).expected(0), Whole(1).read("2_000"), Whole(1).expected(True)
    ('at least 1', 2000, 'a whole number, at least 1')
    """

    low: int = 0
    high: int = _LARGEST

    def read(self, text: str) -> Any:
        """See ``Kind``; hexadecimal too."""
        try:
            return int(text, 16 if text[:2].lower() == "0x" else 10)
        except ValueError:
            return text

    def expected(self, value: Any) -> str | None:
        """See ``Kind``."""
        if not isinstance(value, int) or isinstance(value, bool):
            return f"a whole number, {self._range(0)}"
        return None if self.low <= value <= self.high else self._range(value)

    def _range(self, value: int) -> str:
        if value > self.high:
            return f"{self.low} to {self.high}"
        return "0 or more" if self.low == 0 else f"at least {self.low}"


@dataclass(frozen=True)
class Number(Kind):
    """A float (or an int) between bounds, as it is and as the float32 that it is used as.

    Attributes:
        low: May be this or more.
        above: Must be more than this.
        high: May be this or less.
        below: Must be less than this.

    >>> Number(0, below=1).expected(1.0)
    '0 or more and less than 1'
    >>> Number(0, below=1).expected(1 - 1e-9)
    '0 or more and less than 1, also as float32: that is 1.0'
    """

    low: float | None = None
    high: float | None = None
    above: float | None = None
    below: float | None = None

    def read(self, text: str) -> Any:
        """See ``Kind``."""
        try:
            return float(text)
        except ValueError:
            return text

    def expected(self, value: Any) -> str | None:
        """See ``Kind``."""
        if not isinstance(value, int | float) or isinstance(value, bool):
            return f"a number, {self._range()}"
        if not self._within(value):
            return self._range()
        single = _as_float32(value)
        return None if self._within(single) else f"{self._range()}, also as float32: that is {single}"

    def _within(self, value: float) -> bool:
        return (
            (isinstance(value, int) or math.isfinite(value))
            and (self.low is None or value >= self.low)
            and (self.above is None or value > self.above)
            and (self.high is None or value <= self.high)
            and (self.below is None or value < self.below)
        )

    def _range(self) -> str:
        if self.low is not None and self.high is not None:
            return f"{self.low} to {self.high}"
        parts = [
            *([f"{self.low} or more"] if self.low is not None else []),
            *([f"more than {self.above}"] if self.above is not None else []),
            *([f"at most {self.high}"] if self.high is not None else []),
            *([f"less than {self.below}"] if self.below is not None else []),
        ]
        return " and ".join(parts)


def _as_float32(value: float) -> float:
    """The value as the device has it, where what is smaller than the smallest normal number is 0."""
    try:
        with np.errstate(over="ignore", under="ignore"):
            single = float(np.float32(value))
    except OverflowError:  # an int beyond all floats
        return math.inf
    return 0.0 if abs(single) < np.finfo(np.float32).tiny else single


@dataclass(frozen=True)
class Switch(Kind):
    """True or False.

    >>> Switch().read("Yes"), Switch().read("0"), Switch().read("maybe")
    (True, False, 'maybe')
    """

    boolean = True

    def read(self, text: str) -> Any:
        """See ``Kind``."""
        known = {"true": True, "t": True, "yes": True, "y": True, "on": True, "1": True}
        known |= {"false": False, "f": False, "no": False, "n": False, "off": False, "0": False}
        return known.get(text.lower(), text)

    def expected(self, value: Any) -> str | None:
        """See ``Kind``."""
        return None if isinstance(value, bool) else "True or False"


@dataclass(frozen=True)
class Text(Kind):
    """A text; ``what`` says of what."""

    what: str = "a text"
    empty: bool = False

    def expected(self, value: Any) -> str | None:
        """See ``Kind``."""
        if not isinstance(value, str) or not (value or self.empty):
            return self.what
        # of arguments that are not UTF-8 Python makes text that cannot be written
        return None if value.isascii() or _is_unicode(value) else f"{self.what} in UTF-8"


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


@dataclass(frozen=True)
class OneOf(Kind):
    """One of some names, which ``names()`` tells: what is registered later counts."""

    names: Callable[[], Collection[str]]

    def expected(self, value: Any) -> str | None:
        """See ``Kind``."""
        names = self.names()
        return None if isinstance(value, str) and value in names else "one of " + ", ".join(names)


def _one_of(*names: str) -> OneOf:
    return OneOf(lambda: names)


@dataclass(frozen=True)
class OrNone(Kind):
    """Another kind, or None.

    >>> OrNone(Whole(1)).read("None"), OrNone(Whole(1)).expected(0)
    (None, 'at least 1, or None')
    """

    kind: Kind

    def read(self, text: str) -> Any:
        """See ``Kind``; in any case of letters, but for texts, where ``none`` is one."""
        none = text == "None" or (text.lower() == "none" and not isinstance(self.kind, Text))
        return None if none else self.kind.read(text)

    def expected(self, value: Any) -> str | None:
        """See ``Kind``."""
        expected = None if value is None else self.kind.expected(value)
        return expected and f"{expected}, or None"


@dataclass(frozen=True)
class Several(Kind):
    """A tuple of texts, or of what is written like a Python literal.

    >>> Several("paths").read("('a.jsonl', 'b.jsonl')"), Several("paths").read("a.jsonl")
    (('a.jsonl', 'b.jsonl'), ('a.jsonl',))
    """

    what: str
    repeated = True

    def read(self, text: str) -> Any:
        """See ``Kind``; what is no literal is one text."""
        try:
            found = ast.literal_eval(text.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return text if self._is_cut(text) else (text,)
        if isinstance(found, tuple | list):
            return tuple(found)
        return (found if isinstance(found, str | dict) else text,)

    def _is_cut(self, text: str) -> bool:
        """Whether it begins like a tuple of texts or dicts, and so was meant to be one."""
        return re.match(r"\s*[(\[]?\s*(['\"]|\{\s*['\"])", text) is not None

    def expected(self, value: Any) -> str | None:
        """See ``Kind``."""
        if not isinstance(value, tuple | list) or not value:
            return f"a tuple of {self.what}: \"('a', 'b')\" on the command line"
        return next(filter(None, map(self._expected_part, value)), None)

    def _expected_part(self, part: Any) -> str | None:
        raise NotImplementedError


class Texts(Several):
    """Texts, or none.

    >>> Texts("names").expected(()) is None, Texts("names").expected(("a", 1)) is None
    (True, False)
    """

    def expected(self, value: Any) -> str | None:
        """See ``Kind``."""
        return None if isinstance(value, tuple | list) and not value else super().expected(value)

    def _expected_part(self, part: Any) -> str | None:
        fine = isinstance(part, str) and _is_unicode(part)
        return None if fine else f"a tuple of {self.what}: \"('a', 'b')\" on the command line"


class Rules(Several):
    """Regular expressions."""

    def _expected_part(self, part: Any) -> str | None:
        if not isinstance(part, str) or not part:
            return f"{self.what}, and not {part!r}"
        try:
            re.compile(part)
        except (re.error, OverflowError, RecursionError) as error:
            return f"{self.what}, and {part!r} is none: {error}"
        return None


class Sources(Several):
    """Paths, or dicts of the fields of ``SourceSpec``, which checks them itself."""

    def _expected_part(self, part: Any) -> str | None:
        if isinstance(part, Mapping):
            return None
        expected = Text().expected(part)
        return expected and f"{self.what}, and not {part!r}"


class HeldOut(Sources):
    """A share, a number, or sources; ``DataConfig`` knows the bounds."""

    def read(self, text: str) -> Any:
        """See ``Kind``."""
        for kind in (Whole(), Number()):
            if not isinstance(found := kind.read(text), str):
                return found
        return super().read(text)

    def expected(self, value: Any) -> str | None:
        """See ``Kind``."""
        if isinstance(value, float) and value.is_integer():
            value = int(value)  # 64.0: the share that an earlier version made of a number
        if isinstance(value, tuple | list) and value:
            return super().expected(value)
        kind = Number(above=0, below=1) if isinstance(value, float) else Whole()
        return kind.expected(value) and f"a share between 0 and 1, a number of examples, or {self.what}"


_SCHEDULE = _one_of("linear", "cosine", "constant")
_SOURCES = "paths, or dicts with a path"

KEYS: dict[str, Kind] = {
    "seed": Whole(0, 2**63 - 1),
    "method": OneOf(method_names),
    "model.source": Text("a model"),
    "model.preset": OrNone(Text("the name of a shape")),
    "model.tokenizer": OrNone(Text("a model")),
    "model.dtype": _one_of("bfloat16", "float32"),
    "model.quantization": OneOf(lambda: KINDS),
    "model.requantize": Switch(),
    "model.remat": OneOf(lambda: get_args(Remat)),
    "model.attention": OneOf(lambda: get_args(AttentionKind)),
    "model.loss_chunk": Whole(1),
    "targets.rules": Rules("regular expressions"),
    "targets.density": OrNone(Number(above=0, high=1)),
    "targets.spare": Number(0, high=1e6),
    "targets.num_tunable": OrNone(Whole(1, 2**63 - 1)),
    "targets.grid.fsdp": OrNone(Whole(1)),
    "targets.grid.tensor": OrNone(Whole(1)),
    "targets.balance.rows": OrNone(Whole(1)),
    "targets.balance.columns": OrNone(Whole(1)),
    "mesh.data": Whole(-1),
    "mesh.fsdp": Whole(-1),
    "mesh.tensor": Whole(-1),
    "spiel.every": Whole(1),
    "spiel.accumulation": Whole(1),
    "spiel.schedule": _SCHEDULE,
    "spiel.rate": OrNone(Number(0, 1)),
    "spiel.first": OrNone(Number(high=1)),
    "spiel.candidate_ratio": Number(above=0),
    "spiel.candidates": OneOf(lambda: get_args(ProposeFrom)),
    "spiel.seeds": OrNone(OneOf(lambda: get_args(Seeds))),
    "spiel.drop_by": OneOf(lambda: get_args(DropBy)),
    "spiel.score": OneOf(lambda: get_args(Score)),
    "spiel.magnitude": _one_of("largest", "smallest"),
    "spiel.tile.rows": OrNone(Whole(1)),
    "spiel.tile.columns": OrNone(Whole(1)),
    "spiel.tile.by": _one_of("random", "weights"),
    "spiel.filter_rank": Whole(1, 2**16),
    "spiel.keep_zeros": Switch(),
    "spiel.merge": _one_of("resident", "per_use"),
    "spiel.delta_dtype": _one_of("float32", "bfloat16"),
    "spiel.parity": OneOf(lambda: get_args(Parity)),
    "init_from.adapter": OrNone(Text("the folder of an adapter")),
    "init_from.what": _one_of("entries", "positions"),
    "init_from.any_base": Switch(),
    "lora.rank": Whole(1, 2**16),
    "lora.alpha": Number(above=0),
    "lora.dropout": Number(0, below=1),
    "lora.rslora": Switch(),
    "optimizer.learning_rate": Number(above=0),
    "optimizer.schedule": _SCHEDULE,
    "optimizer.warmup": Number(0, 1),
    "optimizer.weight_decay": Number(0),
    "optimizer.b1": Number(0, below=1),
    "optimizer.b2": Number(0, below=1),
    "optimizer.eps": OrNone(Number(above=0)),
    "optimizer.clip_norm": OrNone(Number(above=0)),
    "rosa.entries": OneOf(lambda: CRITERIA),
    "rosa.warmup": Whole(),
    "rosa.learning_rate": OrNone(Number(above=0)),
    "data.sources": Sources(_SOURCES),
    "data.heldout": HeldOut(_SOURCES),
    "data.sequence_length": Whole(1),
    "data.packing": Switch(),
    "data.truncate": _one_of("end", "skip"),
    "data.on_malformed": _one_of("error", "skip"),
    "data.chat_template": OrNone(Text("a file")),
    "data.on_mismatch": _one_of("warn", "error"),
    "data.style": _one_of("chat", "plain", "auto"),
    "batch_size": Whole(1),
    "micro_batch_size": OrNone(Whole(1)),
    "epochs": Whole(1),
    "steps": OrNone(Whole(1)),
    "eval_every": Whole(),
    "eval_batches": OrNone(Whole()),
    "log_every": Whole(1),
    "checkpoint_every": Whole(),
    "checkpoint_keep": Whole(1),
    "checkpoint_keep_best": Switch(),
    "profile": Whole(),
    "on_nonfinite": _one_of("stop", "skip"),
    "on_record_failure": _one_of("continue", "stop"),
    "skip_limit": Whole(1),
    "sample.prompt": OrNone(Text(empty=True)),
    "sample.max_new_tokens": Whole(1),
    "sample.prompts": Texts("prompts"),
    "eval_tasks.names": Texts("names of tasks"),
    "eval_tasks.every": Whole(),
    "eval_tasks.limit": Whole(1),
    "eval_tasks.data_dir": OrNone(Text("a folder")),
    "eval_tasks.max_new_tokens": OrNone(Whole(1)),
}
"""Every key of ``default_config`` to what it may be."""
