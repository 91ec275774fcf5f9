"""When entries are reselected, and what share of them is replaced.

The phase of a step is a plain function of its number, so a host knows it without asking the device and
compiles no program for what never runs. Steps are numbered from 1; "step s" is the s-th optimizer step.
"""

import enum
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from spiel_jax.errors import SpielError

Rate = Callable[[int, int], float]
"""Share of the entries to replace at (step, total steps), in [0, 1]."""


def _linear(initial: float, step: int, total: int) -> float:
    return initial * (1 - step / total)


def linear(initial: float = 0.2) -> Rate:
    r"""Replacement rate that falls linearly to zero (SpIEL, section 3.1).

    $$
    p(t) = p_0 \left(1 - \frac{t}{T}\right)
    $$

    Example:
        >>> linear(0.2)(25, 100)
        0.15000000000000002
    """
    return functools.partial(_linear, initial)


def cosine(initial: float = 0.2) -> Rate:
    r"""Replacement rate along half a cosine (RigL, arXiv 1911.11134, section 3).

    $$
    p(t) = \frac{p_0}{2} \left(1 + \cos \frac{\pi t}{T}\right)
    $$

    Example:
        >>> round(cosine(0.2)(50, 100), 3)
        0.1
    """
    return lambda step, total: initial * (1 + math.cos(math.pi * step / total)) / 2


def constant(rate: float = 0.2) -> Rate:
    """The same replacement rate at every reselection; 0 with ``first=None`` is a static mask.

    Example:
        >>> Reselection(100, rate=constant(0.0), first=None).steps
        []
    """
    return lambda step, total: rate


_LINEAR = linear()


class Phase(enum.Enum):
    """What a step does for the growth criterion, besides training.

    Attributes:
        PLAIN: Nothing.
        PROPOSE: Candidates are proposed, and observed for the first time.
        ESTIMATE: The proposed candidates are observed again.

    Example:
        >>> [Reselection(100, every=20, accumulation=3).phase(step).name for step in (20, 21, 22, 23, 24)]
        ['PLAIN', 'PROPOSE', 'ESTIMATE', 'ESTIMATE', 'PLAIN']
    """

    PLAIN = "plain"
    PROPOSE = "propose"  # propose candidates and observe them for the first time
    ESTIMATE = "estimate"  # observe the proposed candidates again


def require_static(**numbers: float | None) -> None:
    """Refuses numbers that are arrays or traced: what they decide is compiled into the program.

    Raises:
        TypeError: Naming the argument.
    """
    for name, number in numbers.items():
        if not (number is None or isinstance(number, int | float | np.number)):
            raise TypeError(
                f"{name} must be static, a Python number, and is a {type(number).__name__}: with "
                f"optax.inject_hyperparams, name it in static_args"
            )


@dataclass(frozen=True)
class Reselection:
    """At which steps entries are reselected, and how many are replaced.

    A reselection ends each of the steps A, R + A, 2R + A, ... with R = ``every`` and A = ``accumulation``.
    The A steps up to it form its estimation phase: the first proposes candidates, the others observe them.
    No phase begins that no reselection would use, and none ends where the rate has fallen to 0 for good: with
    ``rate=constant(0), first=None`` nothing is ever reselected, and no program for it compiled.

    Attributes:
        total_steps: Optimizer steps of the run, T. All numbers here are static.
        every: Steps between reselections, R.
        accumulation: Steps of an estimation phase, A, with 1 <= A <= R.
        rate: Replacement rate; ``linear``, ``cosine``, ``constant`` or any ``Rate``.
        first: Rate of the first reselection, whatever ``rate`` says; None to leave it to ``rate``. The
            default replaces everything: the initial positions are random. The original implementation does
            so under "linear" only; ``original`` follows it.
        long_phases: As the original implementation has it: phases after the first begin one step early, at
            R, 2R, ..., and so have A + 1 steps. A = R - 1 leaves such a phase no gap (the original then
            divides by zero), and A >= R never reselects.
        idle_phases: As the original implementation has it: phases begin whether or not a reselection
            follows, and a reselection is counted where its rate is 0.

    Raises:
        SpielError: If a number is out of its range.
        TypeError: If a number is not static.

    Example:
        >>> schedule = Reselection(total_steps=100, every=20, accumulation=5)
        >>> [s for s in range(1, 101) if schedule.reselects(s)]
        [5, 25, 45, 65, 85]
        >>> [schedule.phase(s).value for s in (20, 21, 22, 25, 26)]
        ['plain', 'propose', 'estimate', 'estimate', 'plain']
    """

    total_steps: int
    every: int = 20
    accumulation: int = 5
    rate: Rate = _LINEAR
    first: float | None = 1.0
    long_phases: bool = False
    idle_phases: bool = False

    def __post_init__(self):
        require_static(
            total_steps=self.total_steps, every=self.every, accumulation=self.accumulation, first=self.first
        )
        if self.total_steps < 1:
            raise SpielError(f"total_steps = {self.total_steps}: expected at least 1")
        if self.every < 1:
            raise SpielError(f"every = {self.every}: expected at least 1 step")
        if self.accumulation < 1 or (self.accumulation > self.every and not self.long_phases):
            raise SpielError(f"accumulation = {self.accumulation}: expected 1 to every = {self.every} steps")
        if self.first is not None and not 0 <= self.first <= 1:
            raise SpielError(f"first = {self.first}: expected a share between 0 and 1, or None")
        for step, rate in self._planned.items():
            if not 0 <= rate <= 1:
                raise SpielError(f"rate({step}, {self.total_steps}) = {rate}: expected 0 to 1")

    def original(self) -> "Reselection":
        """The same plan with the original implementation's quirks, for ``parity="reference"``."""
        is_linear = getattr(self.rate, "func", None) is _linear
        return replace(self, first=1.0 if is_linear else None, long_phases=True, idle_phases=True)

    @functools.cached_property
    def _planned(self) -> dict[int, float]:
        """Rate of every step that could end with a reselection, 0 or not."""
        if self.accumulation >= self.every and self.long_phases:
            return {}
        steps = range(self.accumulation, self.total_steps + 1, self.every)
        rates = {step: self.rate(step, self.total_steps) for step in steps}
        if rates and self.first is not None:
            rates[self.accumulation] = self.first
        return rates

    @functools.cached_property
    def last(self) -> int:
        """Number of the last step that ends with a reselection; 0 if none does."""
        used = [step for step, rate in self._planned.items() if rate > 0 or self.idle_phases]
        return max(used, default=0)

    @property
    def steps(self) -> list[int]:
        """Numbers of the steps that end with a reselection."""
        return [step for step in self._planned if step <= self.last]

    @property
    def rates(self) -> list[float]:
        """Replacement rate of each reselection."""
        return [rate for step, rate in self._planned.items() if step <= self.last]

    def counts(self, entries: Sequence[int]) -> np.ndarray:
        """How many entries each reselection replaces, int32 [reselections, targets].

        Rounded down from float64 on the host: float32 gives other counts.

        Args:
            entries: Entries per matrix (or block) of each target.
        """
        counts = [[int(k * rate) for k in entries] for rate in self.rates]
        return np.array(counts, np.int32).reshape(len(self.steps), len(entries))

    def reselects(self, step: Any) -> Any:
        """Whether a step ends with a reselection; ``step`` may be an int or an integer array."""
        since = step - self.accumulation
        return (since >= 0) & (since % self.every == 0) & (step <= self.last)

    def number(self, step: Any) -> Any:
        """Number of the reselection that ends ``step``, from 0; int or integer array."""
        return (step - self.accumulation) // self.every

    def _phase(self, step: Any) -> tuple[Any, Any, Any]:
        """First and last step of the phase that a step could be in, and whether it takes place."""
        if self.long_phases:
            start = step - step % self.every
            start = start + (start == 0)  # the first phase has no step 0
            end = start + self.accumulation - (start == 1)
        else:
            start = step - (step - 1) % self.every
            end = start + self.accumulation - 1
        return start, end, (end <= self.last) | self.idle_phases

    def proposes(self, step: Any) -> Any:
        """Whether a step proposes candidates; int or integer array."""
        start, _, used = self._phase(step)
        return (step == start) & used

    def estimates(self, step: Any) -> Any:
        """Whether a step observes candidates that an earlier step proposed; int or integer array."""
        start, end, used = self._phase(step)
        return (step > start) & (step <= end) & used

    def phase(self, step: int) -> Phase:
        """Phase of a step whose number is known to the host."""
        if self.proposes(step):
            return Phase.PROPOSE
        return Phase.ESTIMATE if self.estimates(step) else Phase.PLAIN
