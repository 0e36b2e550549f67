"""How far a logged quantity has moved, with an interval that covers the noise of the batches.

Evaluations measure the same pairs each time: the change is exact for these pairs, and only turning back and forth
between evaluations counts as noise. Training values are means over different pairs: the end is the mean of the last
sqrt(n) of n, its noise is read from differences of neighbours (von Neumann), which a slow trend does not inflate.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t as student

Array = NDArray[np.float64]

CONFIDENCE = 0.95  # two-sided, of the end level
MINIMUM = 6  # training points below which nothing is said
JITTER = 3.0  # standard deviations of the turns of evaluations
TURN = 2 / 3 * 1.1730  # mean square of `_turns` of independent standard Gaussians: order statistics of three


@dataclass(frozen=True)
class Change:
    """The change of one quantity against its start; negative: it fell.

    end, low, high : at the end, with its interval. lowest, lowest_step : the deepest window on the way and where its
        middle is. lowest_high : upper end of its interval, corrected for the search. points : how many values.
    steps, values : (T,) what was measured, relative to the start.
    """

    end: float
    low: float
    high: float
    lowest: float
    lowest_high: float
    lowest_step: float
    points: int
    window: int
    steps: tuple[float, ...]
    values: tuple[float, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        return amount(self.end) + ("" if self.low == self.high else f" [{amount(self.low)}, {amount(self.high)}]")


def amount(x: float) -> str:
    """A change with its sign, to three digits and no more than a thousandth."""
    return f"{x:+.3f}" if abs(x) < 1 else f"{x:+.3g}"


def measure(steps: Array, values: Array, fixed: bool, start: float | None = 0.0, floor: float = 0.0) -> Change | None:
    """The change of a series of values, finite, ordered by step; None with too few of them.

    fixed : the values are of the same pairs each time (an evaluation set). start : what the first model has, 0 for a
        reward against a reference; None: unknown, the first values stand for it. floor : nats by which a value may be
        off for other reasons (a reference in another precision), added to the interval.
    """
    n = len(values)
    own = start is None  # the first values are used up
    if n < (1 + own if fixed else MINIMUM):
        return None
    m = max(1, math.isqrt(n) // 2) if fixed else max(3, math.isqrt(n))
    if own:
        start = float(values[:1].mean() if fixed else values[:m].mean())
    x = values - (start or 0.0)
    windows = np.convolve(x, np.ones(m) / m, mode="valid")
    path = x if own else np.concatenate([[0.0], x])
    tail_noise = _turns(path, m) if fixed else _noise(x[-max(2 * m, MINIMUM) :], m)
    whole_noise = tail_noise if fixed else _noise(x, m, looks=n - m + 1)
    factor = np.sqrt(2.0) if own and not fixed else 1.0  # the start is as uncertain as the end
    half, half_low = (factor * z + floor for z in (tail_noise, max(tail_noise, whole_noise)))
    i = int(windows.argmin())
    return Change(
        end=float(windows[-1]),
        low=float(windows[-1] - half),
        high=float(windows[-1] + half),
        lowest=float(windows[i]),
        lowest_high=float(windows[i] + half_low),
        lowest_step=float(steps[i : i + m].mean()),
        points=n,
        window=m,
        steps=tuple(float(s) for s in steps),
        values=tuple(float(v) for v in x),
    )


def _turns(x: Array, m: int) -> float:
    """Half the width of the interval of a mean of m evaluations: how far others than the extremes stick out."""
    if len(x) < 3:
        return 0.0
    a, b = x[1:-1] - x[:-2], x[1:-1] - x[2:]
    turns = np.where(a * b > 0, np.minimum(np.abs(a), np.abs(b)), 0.0)
    extreme = np.isin(np.arange(1, len(x) - 1), (x.argmin(), x.argmax()))  # a fall and its return are no noise
    return JITTER * float(np.sqrt((turns[~extreme] ** 2).sum() / len(turns) / TURN / m))


def _noise(x: Array, m: int, looks: int = 1) -> float:
    """Half the width of the interval of a mean over m training entries, Bonferroni over the looks."""
    first = np.diff(x)
    sigma = float(np.sqrt((first**2).mean() / 2))
    freedom = len(first) / 1.5  # of the mean square of differences of neighbours of independent Gaussians
    return float(student.isf((1 - CONFIDENCE) / 2 / looks, freedom)) * sigma / float(np.sqrt(m))
