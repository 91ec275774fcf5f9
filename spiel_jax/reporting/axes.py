"""Where the ticks of an axis go, and what they say."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Axis:
    """A linear axis.

    Attributes:
        low: Value at its beginning.
        high: Value at its end; not ``low``.
        start: Where it begins on the drawing.
        end: Where it ends.
    """

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        """Where a value is on the drawing."""
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def extent(values: Iterable[np.ndarray], *, zero: bool = False, tails: float = 0.0) -> tuple[float, float]:
    """The range of an axis that shows some values.

    Args:
        values: Arrays of them; what is not finite is not read.
        zero: Whether it begins at 0.
        tails: Share of the values at each end that need not be seen.

    Example:
        >>> extent([np.array([1.0, 3.0])], zero=True), extent([np.array([2.0])])
        ((0.0, 3.0), (1.9, 2.1))
    """
    joined = np.concatenate([np.asarray(one, float) for one in values])
    joined = joined[np.isfinite(joined)]
    if not joined.size:
        return 0.0, 1.0
    low, high = map(float, np.quantile(joined, [tails, 1 - tails]))
    if zero:
        low = min(low, 0.0)
    if low == high:
        space = abs(low) * 0.05 or 1.0
        return (low - space, high + space) if not zero or low else (low, high + space)
    return low, high


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round values between two bounds.

    >>> ticks(0, 60), ticks(3.31, 3.97)
    ([0.0, 20.0, 40.0, 60.0], [3.4, 3.6, 3.8])
    """
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(n * step, 12) for n in range(first, last + 1)]


def labels(values: list[float]) -> list[str]:
    """Ticks as they are written: alike, and short.

    >>> labels([0.0, 0.5, 1.0]), labels([0.0, 20000.0]), labels([0.0, 2e-5])
    (['0', '0.5', '1'], ['0', '20k'], ['0', '2e-5'])
    """
    most = max(map(abs, values), default=0.0)
    for bound, sign in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if most >= bound:
            unit = 1e3 if sign == "k" else bound
            return [f"{value / unit:g}{sign if value else ''}" for value in values]
    if 0 < most < 0.01:
        return [np.format_float_scientific(v, trim="-", exp_digits=1) if v else "0" for v in values]
    return [f"{value:.6g}" for value in values]
