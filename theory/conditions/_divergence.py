"""f-divergences in the place of DPO's KL: the argmin criterion of arXiv 2602.06788, and what no constant can change."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mpmath
import numpy as np
from scipy.optimize import brentq

from theory._check import POSITIVE, check_number
from theory.conditions._record import Array, Record
from theory.ops import DUAL, NUMPY, Dual

_T = np.linspace(-40.0, 40.0, 8001)  # ln of the probability ratio


@dataclass(frozen=True)
class Resistance(Record):
    """A link phi(t) = f'(e^t), by the criterion for displacement-resistant f and by what can be tested.

    argmin : where f as normalised by this phi is least (the first of several; 0 or inf if at an end).
    meets_criterion : argmin >= 1, the necessary condition of arXiv 2602.06788, Lemma 2.
    movable : the loss sees differences of phi only, so f + c (t - 1) is the same loss for every c, and its argmin can
        be put anywhere in this interval by a choice of c: the criterion says something of one normalisation, and where
        1 lies inside, nothing of the loss.
    inducing : f'(0+) = -inf, without which the optimum may give probability 0 (DPO-inducing).
    da, db (K,), ratio (K,) : r = phi'(da)/phi'(db) at log-ratios to the reference: y+ is not suppressed iff
        r |g+|^2 >= <g+, g->. push_down (K,) : d_l of the logistic loss there, at this beta, nats per nat: how fast the
        push on y- saturates.
    """

    argmin: float
    meets_criterion: bool
    movable: tuple[float, float]
    inducing: bool
    da: Array
    db: Array
    ratio: Array
    push_down: Array

    def __str__(self) -> str:
        free = f"{self.movable[0]:.3g} to {self.movable[1]:.3g} by a constant in f' that the loss does not see"
        return (
            f"argmin f = {self.argmin:.4g} ({'meets' if self.meets_criterion else 'fails'} argmin >= 1; {free}),"
            f" r = {', '.join(f'{r:.3g}' for r in self.ratio)} at db = {', '.join(f'{b:g}' for b in self.db)}"
        )


def divergence_resistance(
    link: Any, beta: float = 0.1, da: float = 0.0, db: tuple[float, ...] = (-1.0, -2.0, -3.0, -4.0)
) -> Resistance:
    """The criteria for one link: phi(ops, t), or an object that has it as `phi` (`theory.losses._links`)."""
    phi: Callable[[Any, Any], Any] = getattr(link, "phi", link)
    if not callable(phi):
        raise ValueError(f"link must be phi(ops, t) or have such a method, got {link!r}")
    beta = check_number(beta, "beta", POSITIVE)
    values = np.asarray(phi(NUMPY, _T), dtype=np.float64)
    up = np.nonzero((values[:-1] < 0) & (values[1:] >= 0))[0]
    if up.size:
        root: Any = brentq(lambda t: float(phi(NUMPY, np.float64(t))), _T[up[0]], _T[up[0] + 1], xtol=1e-14)
        argmin = float(np.exp(root))
    else:
        argmin = np.inf if values[-1] < 0 else 0.0
    rises = np.nonzero(np.diff(values) > 0)[0]
    low, high = (float(_T[rises[0]]), float(_T[rises[-1] + 1])) if rises.size else (np.nan, np.nan)
    movable = 0.0 if low == _T[0] else np.exp(low), np.inf if high == _T[-1] else np.exp(high)
    far = [float(phi(NUMPY, np.float64(t))) for t in (-300.0, -600.0)]
    at_da, slope_da = _with_slope(phi, da)
    below = [_with_slope(phi, b) for b in db]
    ratio = np.array([slope_da / s for _, s in below])
    weight = [float(NUMPY.sigmoid(-beta * (at_da - v))) * beta * s for v, s in below]
    return Resistance(
        argmin,
        argmin >= 1 - 1e-12,
        (float(movable[0]), float(movable[1])),
        far[1] < far[0] - 1,
        np.full(len(db), float(da)),
        np.array(db, dtype=np.float64),
        ratio,
        np.array(weight),
    )


def _with_slope(phi: Callable[[Any, Any], Any], t: float) -> tuple[float, float]:
    """phi(t) and phi'(t), by forward differentiation in 30 digits."""
    with mpmath.workdps(30):
        out = Dual.of(phi(DUAL, Dual(t, 1)))
        return float(out.x), float(out.dx)
