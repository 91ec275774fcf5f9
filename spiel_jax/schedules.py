"""When entries are reselected, and what share of them is replaced.

The phase of a step is a plain function of its number, so a host knows it without asking the device and
compiles no program for what never runs. Steps are numbered from 1; "step s" is the s-th optimizer step.
"""

import enum
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Rate = Callable[[int, int], float]
"""Share of the entries to replace at (step, total steps), in [0, 1]."""


def linear(initial: float = 0.2) -> Rate:
    """Replacement rate that falls linearly to zero: ``initial * (1 - step / total)`` (paper, section 3.1)."""
    return lambda step, total: initial * (1 - step / total)


def cosine(initial: float = 0.2) -> Rate:
    """Replacement rate along half a cosine: ``initial * (1 + cos(pi * step / total)) / 2`` (RigL)."""
    return lambda step, total: initial * (1 + math.cos(math.pi * step / total)) / 2


def constant(rate: float = 0.2) -> Rate:
    """The same replacement rate at every reselection; 0 with ``first=None`` never replaces an entry."""
    return lambda step, total: rate


_LINEAR = linear()


class Phase(enum.Enum):
    """What a step does for the growth criterion, besides training."""

    PLAIN = "plain"
    PROPOSE = "propose"  # propose candidates and observe them for the first time
    ESTIMATE = "estimate"  # observe the proposed candidates again


@dataclass(frozen=True)
class Reselection:
    """At which steps entries are reselected, and how many are replaced.

    A reselection ends each of the steps A, R + A, 2R + A, ... with R = ``every`` and A = ``accumulation``.
    The A steps up to it form its estimation phase: the first proposes candidates, the others observe them.
    No phase begins that no reselection would use.

    Attributes:
        total_steps: Optimizer steps of the run, T.
        every: Steps between reselections, R.
        accumulation: Steps of an estimation phase, A, with 1 <= A <= R.
        rate: Replacement rate; ``linear``, ``cosine``, ``constant`` or any ``Rate``.
        first: Rate of the first reselection, whatever ``rate`` says; None to leave it to ``rate``. The
            default replaces everything: the initial positions are random.
        long_phases: As the original implementation has it: phases after the first have A + 1 steps (they
            begin one step early, at R, 2R, ...) and begin whether or not a reselection follows.

    Raises:
        ValueError: If a number is out of its range.

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

    def __post_init__(self):
        if self.total_steps < 1:
            raise ValueError(f"total_steps = {self.total_steps}: expected at least 1")
        if not 1 <= self.accumulation <= self.every:
            raise ValueError(f"accumulation = {self.accumulation}: expected 1 to every = {self.every} steps")
        if self.long_phases and self.accumulation > self.every - 2:
            raise ValueError(
                f"accumulation = {self.accumulation}: phases as long as the original's need at most "
                f"every - 2 = {self.every - 2} steps"
            )
        if self.first is not None and not 0 <= self.first <= 1:
            raise ValueError(f"first = {self.first}: expected a share between 0 and 1, or None")
        for step, rate in zip(self.steps, self.rates, strict=True):
            if not 0 <= rate <= 1:
                raise ValueError(f"rate({step}, {self.total_steps}) = {rate}: expected 0 to 1")

    @property
    def steps(self) -> list[int]:
        """Numbers of the steps that end with a reselection."""
        return list(range(self.accumulation, self.total_steps + 1, self.every))

    @property
    def rates(self) -> list[float]:
        """Replacement rate of each reselection."""
        rates = [self.rate(step, self.total_steps) for step in self.steps]
        if rates and self.first is not None:
            rates[0] = self.first
        return rates

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
        return (since >= 0) & (since % self.every == 0) & (step <= self.total_steps)

    def number(self, step: Any) -> Any:
        """Number of the reselection that ends ``step``, from 0; int or integer array."""
        return (step - self.accumulation) // self.every

    def proposes(self, step: Any) -> Any:
        """Whether a step proposes candidates; int or integer array."""
        if self.long_phases:
            return (step == 1) | ((step > 1) & (step % self.every == 0))
        ends = step - 1 + self.accumulation
        return ((step - 1) % self.every == 0) & (ends <= self.total_steps)

    def estimates(self, step: Any) -> Any:
        """Whether a step observes candidates that an earlier step proposed; int or integer array."""
        if self.long_phases:
            into = step % self.every
            return (step > 1) & (into >= 1) & (into <= self.accumulation)
        into = (step - 1) % self.every
        ends = step - 1 - into + self.accumulation
        return (into >= 1) & (into < self.accumulation) & (ends <= self.total_steps)

    def phase(self, step: int) -> Phase:
        """Phase of a step whose number is known to the host."""
        if self.proposes(step):
            return Phase.PROPOSE
        return Phase.ESTIMATE if self.estimates(step) else Phase.PLAIN
