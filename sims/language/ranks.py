"""Rank correlations of a score with an outcome, what is left of them beside a third quantity, and their intervals."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]
DRAWS = 400
LEVEL = 0.95


class Estimate(NamedTuple):
    """A statistic averaged over seeds, its bootstrap interval, and its smallest and largest value over the seeds."""

    value: float
    low: float
    high: float
    least: float
    most: float

    def __str__(self) -> str:
        return f"{self.value:+.2f} [{self.low:+.2f}, {self.high:+.2f}]"


def correlations(x: ArrayLike, y: ArrayLike, given: Sequence[ArrayLike] = (), counts: ArrayLike | None = None) -> Array:
    """(D,) Spearman correlations of x (N,) and y (N,) in D samples, partial if something is `given`.

    given : quantities (N,) held fixed: what correlates is what is left of the ranks of x and of y after a linear fit on
        the ranks of each. counts : (D, N) how often each sample holds each of the N; default one sample, each once.
    A constant x or y gives 0: it ranks nothing.
    """
    values = [np.asarray(a, dtype=np.float64) for a in (x, y, *given)]
    c = np.ones((1, len(values[0]))) if counts is None else np.asarray(counts, dtype=np.float64)
    u, v, *others = (_centred_ranks(a, c) for a in values)
    spread = _dot(u, u, c) * _dot(v, v, c)
    for i, g in enumerate(others):  # Gram-Schmidt: each is made orthogonal to those before it
        for before in others[:i]:
            g = _without(g, before, c)
        others[i] = g
        u, v = _without(u, g, c), _without(v, g, c)
    left = _dot(u, u, c) * _dot(v, v, c)
    found = np.zeros(len(c))
    np.divide(_dot(u, v, c), np.sqrt(left), out=found, where=left > 1e-18 * spread)
    return found


def _centred_ranks(x: Array, c: Array) -> Array:
    """(D, N) ranks, mean ones for ties, of x in samples that hold x_i c_i times, less their mean."""
    _, group = np.unique(x, return_inverse=True)
    order = np.argsort(group, kind="stable")
    starts = np.searchsorted(group[order], np.arange(group.max() + 1))
    size = np.add.reduceat(c[:, order], starts, axis=1)  # (D, groups of equal values)
    rank = (size.cumsum(axis=1) - (size - 1) / 2)[:, group]
    return rank - (rank * c).sum(axis=1, keepdims=True) / c.sum(axis=1, keepdims=True)


def _dot(u: Array, v: Array, c: Array) -> Array:
    return np.einsum("dn,dn,dn->d", u, v, c)


def _without(u: Array, g: Array, c: Array) -> Array:
    square = _dot(g, g, c)
    share = np.divide(_dot(u, g, c), square, out=np.zeros(len(c)), where=square > 1e-9)
    return u - share[:, None] * g


def spearman(
    scores: Sequence[ArrayLike],
    outcomes: Sequence[ArrayLike],
    given: Sequence[Sequence[ArrayLike]] = (),
    *,
    draws: int = DRAWS,
    seed: int = 0,
) -> Estimate:
    """Mean over seeds of the correlation of scores with outcomes, each a list of one array (N,) per seed.

    given : quantities held fixed, each again one array per seed.
    The interval resamples the pairs within every seed; what the seeds themselves differ by is in `least` and `most`.
    """
    rng = np.random.default_rng(seed)
    values, boot = [], np.zeros(draws)
    for i, (x, y) in enumerate(zip(scores, outcomes, strict=True)):
        n, fixed = np.size(x), [g[i] for g in given]
        values.append(float(correlations(x, y, fixed)[0]))
        counts = rng.multinomial(n, np.full(n, 1 / n), size=draws)
        boot += correlations(x, y, fixed, counts) / len(scores)
    low, high = np.quantile(boot, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(float(np.mean(values)), float(low), float(high), min(values), max(values))
