"""SpIEL in plain NumPy, written from the rules of the algorithm: what the library is compared with.

Dense arrays and masks, one matrix at a time, float64: slow, and easy to check against the rules. It shares
nothing with the library. Positions are flat and row-major; of equals the lowest position comes first,
whether they are dropped, proposed or grown. Steps are numbered from 1.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Rules:
    """One variant of the algorithm. The defaults are the corrected behaviour.

    R = ``every``, A = ``accumulation``, G = the number of micro-batches that make up a step.
    """

    growth: str = "ag"  # "ag": accumulated gradients of candidates; "ma": row and column accumulators
    inner: str = "adam"  # "adam" with an age per entry; "sm3"; "sgd"
    total_steps: int = 10
    every: int = 4
    accumulation: int = 2
    policy: str = "linear"  # "linear", "cosine", "constant"
    initial: float = 0.2  # the policy's replacement rate at step 0
    first: float | None = 1.0  # rate of the first reselection, whatever the policy says
    learning_rate: float | Callable[[Any], Any] = 0.1  # or a function of the steps taken before this one
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-6
    weight_decay: float = 0.0
    ratio: float = 1.0  # candidates per active entry
    seeds: str = "both"  # or "second", "neither": moments that grown entries begin with
    score: str = "product"  # of a row's and a column's accumulator: "product", "minimum"
    clip_norm: float | None = None
    dtype: type = np.float64  # of the arithmetic
    value_dtype: Any = np.float64  # values are rounded to it when they have been updated
    # what the original does and the corrected behaviour does not
    per_micro_batch: bool = False  # candidates observe each micro-batch's gradient of loss / G
    late_age: bool = False  # a grown entry is corrected as one step younger than it is
    propose_active: bool = False  # active entries may be candidates
    long_phases: bool = False  # A + 1 steps, from R, 2R, ..., for every phase after the first
    idle_phases: bool = False  # phases begin though no reselection follows, or one that replaces nothing
    stuck_age: bool = False  # ages are not counted: the original's where the state is not float32
    clip_candidates: bool = True  # clipping scales candidates like active entries

    def reselections(self) -> dict[int, float]:
        """Step that ends with a reselection to the share p that it replaces."""
        shares = {}
        for step in range(self.accumulation, self.total_steps + 1, self.every):
            shares[step] = {
                "linear": self.initial * (1 - step / self.total_steps),
                "cosine": self.initial * (1 + math.cos(math.pi * step / self.total_steps)) / 2,
                "constant": self.initial,
            }[self.policy]
            if self.first is not None and len(shares) == 1:
                shares[step] = self.first
        while shares and not self.idle_phases and not shares[max(shares)]:
            del shares[max(shares)]  # the rate has fallen to 0 for good
        return shares

    def phases(self) -> list[range]:
        """Steps of each estimation phase; the first of them proposes. The last may run out of steps."""
        found, last = [], max(self.reselections(), default=0)
        for number in range(self.total_steps):
            start, end = number * self.every + 1, number * self.every + self.accumulation
            if self.long_phases and number > 0:
                start -= 1
            if start <= self.total_steps and (self.idle_phases or end <= last):
                found.append(range(start, end + 1))
        return found


def best(scores: np.ndarray, allowed: np.ndarray, n: int) -> np.ndarray:
    """Mask of the n allowed entries of largest score; of equals, the lowest position first."""
    positions = np.flatnonzero(allowed)
    order = np.argsort(-scores.flat[positions], kind="stable")
    chosen = np.zeros(scores.shape, bool)
    chosen.flat[positions[order[:n]]] = True
    return chosen


def margin(scores: np.ndarray, chosen: np.ndarray, others: np.ndarray, scale: float) -> float:
    """Smallest difference, other than none at all, between a chosen score and another, relative to scale.

    Below the precision of what is compared, the choice says nothing. Exact ties do: positions decide.
    """
    if not chosen.any() or not others.any() or scale == 0:
        return math.inf
    inside, outside = scores[chosen], scores[others]
    below, above = outside[outside != inside.min()], inside[inside != outside.max()]
    gaps = [inside.min() - below.max(initial=-np.inf), above.min(initial=np.inf) - outside.max()]
    return min(gaps) / scale


class Matrix:
    """The state of one weight, or of one block of it, as dense arrays.

    ``age`` is the number with which the next update corrects the moments; it starts at 1.
    """

    def __init__(self, rules: Rules, shape: tuple[int, int], indices: np.ndarray):
        self.rules = rules
        self.active = np.zeros(shape, bool)
        self.active.flat[indices] = True
        self.k = int(self.active.sum())
        assert self.k == len(indices)
        self.value, self.mu, self.nu = np.zeros((3, *shape), rules.dtype)
        self.age = np.ones(shape, int)
        self.row, self.column = (np.zeros(size, rules.dtype) for size in shape)
        self.moved = 0.0  # largest |value| so far: rounding errors are relative to it
        self.margin = math.inf  # of the step's cuts, the narrowest
        self.clear()

    def clear(self):
        """Forgets the candidates."""
        self.candidates = np.zeros(self.active.shape, bool)
        self.sum, self.square = np.zeros((2, *self.active.shape), self.rules.dtype)
        self.samples = self.steps = 0

    def propose(self, gradient: np.ndarray):
        """Candidates: the entries of largest gradient."""
        self.clear()
        count = min(max(1, round(self.rules.ratio * self.k)), self.active.size)
        allowed = np.ones_like(self.active) if self.rules.propose_active else ~self.active
        self.candidates = best(np.abs(gradient), allowed, count)

    def observe(self, gradients: np.ndarray):
        """Adds one step's gradients [samples, rows, columns] to the candidates' sums."""
        for gradient in gradients:
            self.sum += np.where(self.candidates, gradient, 0)
            self.square += np.where(self.candidates, gradient**2, 0)
            self.samples += 1
        self.steps += 1

    def absorbed(self, decay: float, age: np.ndarray) -> np.ndarray:
        """The weight of the gradients in a moment of this age: 1 - decay^age."""
        return 1 - self.rules.dtype(decay) ** age.astype(self.rules.dtype)

    def update(self, gradient: np.ndarray, rate: float):
        """The inner optimizer's step, then the decay of what it gave."""
        rules, at = self.rules, self.active
        # SM3-II: the moment of an entry is bounded by its row's and its column's accumulator
        bound = np.minimum(self.row[:, None], self.column[None, :]) + gradient**2
        bound = np.where(at, bound, 0)
        self.row, self.column = np.maximum(self.row, bound.max(1)), np.maximum(self.column, bound.max(0))
        self.mu[at] = rules.b1 * self.mu[at] + (1 - rules.b1) * gradient[at]
        self.nu[at] = rules.b2 * self.nu[at] + (1 - rules.b2) * gradient[at] ** 2
        if rules.inner == "adam":
            first, second = self.absorbed(rules.b1, self.age[at]), self.absorbed(rules.b2, self.age[at])
            step = self.mu[at] / ((np.sqrt(self.nu[at]) + rules.eps) * first / np.sqrt(second))
        elif rules.inner == "sm3":
            step = gradient[at] / np.sqrt(bound[at] + rules.eps)
        else:
            step = gradient[at]
        value = self.value[at] - rate * step
        value = value - rate * rules.weight_decay * value
        self.value[at] = value.astype(rules.value_dtype)
        self.age[at] += not rules.stuck_age
        self.moved = max(self.moved, np.abs(self.value).max())

    def scores(self) -> np.ndarray:
        """What growth ranks by."""
        if self.rules.growth == "ag":
            return np.abs(self.sum)
        combine = np.multiply if self.rules.score == "product" else np.minimum
        return combine.outer(self.row, self.column)

    def reselect(self, share: float) -> int:
        """Drops and grows; returns how many entries it swapped."""
        n, growing = int(self.k * share), self.rules.growth == "ag"
        # active candidates cannot become fewer than n unless they are fewer than k to begin with
        if not (growing and self.rules.propose_active):
            n = min(n, int((self.candidates if growing else ~self.active).sum()))
        outgoing = best(-np.abs(self.value), self.active, n)
        remaining = self.active & ~outgoing
        valid = self.candidates & ~remaining if growing else ~self.active
        scores = self.scores()
        incoming = best(scores, valid, n)
        assert incoming.sum() == n
        cut = scores[incoming].min(initial=np.inf) if not growing else scores[valid].max(initial=0)
        self.margin = min(
            margin(-np.abs(self.value), outgoing, remaining, self.moved),
            margin(scores, incoming, valid & ~incoming, cut),
        )

        # an entry both dropped and grown is left entirely alone
        leaving, entering = outgoing & ~incoming, incoming & ~outgoing
        self.active = (self.active & ~leaving) | entering
        for array, fresh in ((self.value, 0), (self.mu, 0), (self.nu, 0), (self.age, 1)):
            array[leaving | entering] = fresh
        if growing:
            self.seed(entering)
            self.clear()
        return int(entering.sum())

    def seed(self, grown: np.ndarray):
        """Moments of grown entries as if their mean gradient had been seen for the phase's steps."""
        if self.rules.inner != "adam" or self.rules.seeds == "neither" or not grown.any():
            return
        mean, square = self.sum[grown] / self.samples, self.square[grown] / self.samples
        if self.rules.seeds == "both":
            self.mu[grown] = mean * self.absorbed(self.rules.b1, np.array(self.steps))
        self.nu[grown] = square * self.absorbed(self.rules.b2, np.array(self.steps))
        self.age[grown] = self.steps if self.rules.late_age else self.steps + 1


class Oracle:
    """All matrices of a run, step by step."""

    def __init__(self, rules: Rules, matrices: list[Matrix]):
        self.rules, self.matrices = rules, matrices
        self.step_number = 0
        self.replaced = 0.0  # share of all entries that the last step swapped

    @property
    def margin(self) -> float:
        """The narrowest cut of the last step."""
        return min(matrix.margin for matrix in self.matrices)

    def step(self, gradients: list[np.ndarray]):
        """One step; for each matrix the gradients [G, rows, columns] of its micro-batches' own losses."""
        rules, number = self.rules, self.step_number
        self.step_number = step = number + 1
        means = [gradient.mean(0) for gradient in gradients]
        factor = 1.0
        if rules.clip_norm is not None:
            pairs = zip(self.matrices, means, strict=True)
            norm = math.sqrt(sum((mean[matrix.active] ** 2).sum() for matrix, mean in pairs))
            factor = min(1.0, rules.clip_norm / norm) if norm > 0 else 1.0
        rate = rules.learning_rate(number) if callable(rules.learning_rate) else rules.learning_rate
        phase = next((phase for phase in rules.phases() if step in phase), None)
        share = rules.reselections().get(step)

        swapped = 0
        for matrix, gradient, mean in zip(self.matrices, gradients, means, strict=True):
            matrix.margin = math.inf
            if rules.growth == "ag" and phase is not None:
                if step == phase.start:
                    matrix.propose(gradient[0])
                samples = gradient / len(gradient) if rules.per_micro_batch else mean[None]
                matrix.observe(samples * (factor if rules.clip_candidates else 1.0))
            matrix.update(mean * factor, float(rate))
            if share is not None:
                swapped += matrix.reselect(share)
        self.replaced = swapped / sum(matrix.k for matrix in self.matrices)
