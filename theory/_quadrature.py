"""Integrals of positive functions whose logarithm is known, over many intervals at once.

scipy's vectorised rule (tanhsinh) does the same job at several times the cost on smooth panels, which decides the
speed of a batch of thousands of flows; this one bisects Gauss-Kronrod panels in the log domain instead.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from theory._check import SolverError

Array = NDArray[np.float64]

# Kronrod's 15 points on [-1, 1] (positive half, from the end inwards) and the weights of the 15- and 7-point rules.
_X = [0.9914553711208126, 0.9491079123427585, 0.8648644233597691, 0.7415311855993945]
_X += [0.5860872354676911, 0.4058451513773972, 0.2077849550078985, 0.0]
_WK = [0.0229353220105292, 0.0630920926299786, 0.1047900103222502, 0.1406532597155259]
_WK += [0.1690047266392679, 0.1903505780647854, 0.2044329400752989, 0.2094821410847278]
_WG = [0.0, 0.1294849661688697, 0.0, 0.2797053914892767, 0.0, 0.3818300505051189, 0.0, 0.4179591836734694]
NODES = np.array([-x for x in _X[:-1]] + _X[::-1])  # (15,) increasing
KRONROD = np.array(_WK[:-1] + _WK[::-1])
GAUSS = np.array(_WG[:-1] + _WG[::-1])

# From values at the nodes to those of their polynomial at both ends of the panel.
TO_ENDS = np.array([[np.prod([(e - y) / (x - y) for y in NODES if y != x]) for x in NODES] for e in (-1.0, 1.0)])

# |K15 - G7| overstates the error of K15 by about its own square root: 1e-9 leaves rounding as the error.
TOLERANCE = 1e-9


def log_integrals(
    log_f: Callable[[NDArray[np.intp], Array], tuple[Array, Array]], lo: Array, hi: Array, max_depth: int = 1100
) -> Array:
    """ln of the integral of f over each [lo, hi] (N,), to about 1e-13 relative.

    `log_f(owner, x)` takes the interval's number (n,) and points (n, 15) and returns ln f and the size of ln f's own
    rounding error, both (n, 15). Panels that matter are bisected; panels far below their interval's total are not, so
    an integrand that grows by e^(1e6) costs a few dozen panels. Intervals of zero width give -inf.
    """
    n = len(lo)
    owner = np.nonzero(hi > lo)[0]
    left, right = lo[owner], hi[owner]
    settled = np.full(n, -np.inf)
    for _ in range(max_depth):
        if not owner.size:
            return settled
        half = (right - left) / 2
        values, noise = log_f(owner, ((left + right) / 2)[:, None] + half[:, None] * NODES)
        top = values.max(axis=1)
        if np.isnan(top).any():
            raise SolverError("the slope of the loss is NaN along the path")
        shift = np.where(np.isfinite(top), top, 0.0)
        with np.errstate(divide="ignore", invalid="ignore"):
            scaled = np.exp(values - shift[:, None])
            fine, coarse = scaled @ KRONROD, scaled @ GAUSS
            log_scale = shift + np.log(half)
            log_fine = np.where(top == np.inf, np.inf, np.log(fine) + log_scale)
            total = _scatter_logsumexp(settled, owner, log_fine)[owner]
            log_error = np.log(np.abs(fine - coarse)) + log_scale
            allowed = total + np.log(TOLERANCE)
            # An error made of the integrand's own rounding cannot be bisected away.
            allowed = np.maximum(allowed, log_fine + np.log(4 * noise.max(axis=1)))
        mid = (left + right) / 2
        split = ~(log_error <= allowed)
        ends = np.nonzero(~split & ((left == lo[owner]) | (right == hi[owner])))[0]
        at_ends = log_f(owner[ends], np.stack([left[ends], right[ends]], axis=1))[0]
        split[ends] = _hidden_mass(at_ends, scaled[ends], shift[ends], half[ends]) > allowed[ends]
        split &= (mid > left) & (mid < right) & (total < np.inf)
        settled = _scatter_logsumexp(settled, owner[~split], log_fine[~split])
        owner = np.concatenate([owner[split], owner[split]])
        left, right = np.concatenate([left[split], mid[split]]), np.concatenate([mid[split], right[split]])
    raise SolverError(f"quadrature of the clock did not settle in {max_depth} bisections")


def _hidden_mass(at_ends: Array, scaled: Array, shift: Array, half: Array) -> Array:
    """(n,) ln of what the nodes of a panel miss at its ends, from ln f there (n, 2) and f/e^shift at the nodes (n, 15).

    A slope that collapses within the last half per cent of a panel (beta K times its width above 1e2) is seen by no
    node, and nearly all of the time may lie there. An infinite end is a singularity that the nodes do see.
    """
    with np.errstate(over="ignore", divide="ignore"):
        beyond = np.abs(np.exp(at_ends - shift[:, None]) - scaled @ TO_ENDS.T).max(axis=1)
        missed = np.where(np.isinf(at_ends).any(axis=1), -np.inf, np.log(beyond) + shift)
        far = at_ends.max(axis=1) - shift > 700  # beyond float range
    return np.where(far & np.isfinite(at_ends).all(axis=1), at_ends.max(axis=1), missed) + np.log((1 + NODES[0]) * half)


def _scatter_logsumexp(base: Array, index: NDArray[Any], values: Array) -> Array:
    """ln(e^base[i] + sum of e^values with index i), for every i."""
    top = base.copy()
    np.maximum.at(top, index, values)
    shift = np.where(np.isfinite(top), top, 0.0)
    total = np.exp(base - shift)
    np.add.at(total, index, np.exp(values - shift[index]))
    with np.errstate(divide="ignore"):
        return np.where(top == np.inf, np.inf, shift + np.log(total))
