"""Where ln pi(y+) turns along the path, and bounds on how low it gets (exact_solution E4)."""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq, minimize_scalar

from theory.path import Path

Array = NDArray[np.float64]


def find_extrema(path: Path, sigma_end: float, ahead: float) -> Array:
    """Loss-times (counted forward) of every interior extremum of ln pi(y+) in (0, sigma_end), increasing."""

    def look(sigma: Array) -> tuple[Array, Array, NDArray[np.intp], Array]:
        tau = ahead * sigma
        _, rate, curve = path.preferred(tau, 2)
        top = np.empty(len(sigma), dtype=np.intp)
        for part in np.array_split(np.arange(len(sigma)), max(1, len(sigma) * path.V >> 21)):
            if part.size:
                odds = _log_odds(path, tau[part])
                odds[:, [path.plus[0]]] = -np.inf
                top[part] = odds.argmax(axis=1)
        return ahead * rate, curve, top, tau

    sigma = _grid(path, sigma_end)
    g, dg, top, _ = look(sigma)
    leaders = np.unique(top)
    nodes = _stationary(path, leaders) if ahead > 0 else np.empty(0)
    nodes = nodes[(nodes > 0) & (nodes < sigma_end)]
    tight = 1e-12 * sigma_end
    for _ in range(60):
        if nodes.size:
            g2, dg2, top2, _ = look(nodes)
            sigma, order = np.unique(np.concatenate([sigma, nodes]), return_index=True)
            g, dg, top = (np.concatenate(pair)[order] for pair in ((g, g2), (dg, dg2), (top, top2)))
        gap = np.diff(sigma)
        with np.errstate(invalid="ignore", divide="ignore"):
            # Where both ends have one sign, the tangents of g must not be able to meet on the other side of 0.
            meet = (g[1:] - g[:-1] - dg[1:] * gap) / (dg[:-1] - dg[1:])
            low = g[:-1] + dg[:-1] * meet
            hidden = (g[:-1] * g[1:] > 0) & (meet > 0) & (meet < gap) & (low * g[:-1] < 0)
            # Where the leading token changes, the hand-over must be resolved: it takes about 1/|difference of speeds|.
            swap = (top[1:] != top[:-1]) & (np.abs(g[1:] - g[:-1]) * gap > 0.5)
        suspicious = np.nonzero((hidden | swap) & (gap > tight + 1e-9 * sigma[1:]))[0]
        if not suspicious.size:
            break
        nodes = (sigma[suspicious] + sigma[suspicious + 1]) / 2
    rate: Callable[[float], float] = lambda s: float(ahead * path.preferred(np.array([ahead * s]), 1)[1][0])  # noqa: E731

    def crossing(left: float, right: float) -> float:
        # On a node that is the extremum to rounding, the sign depends on how many points are evaluated at once.
        at_left, at_right = rate(left), rate(right)
        if np.sign(at_left) == np.sign(at_right):
            return left if abs(at_left) < abs(at_right) else right
        return root(rate, left, right)

    sigma, g = sigma[g != 0], g[g != 0]  # underflow where pi(y+) is 1, or an extremum exactly on a node
    return np.array([crossing(sigma[i], sigma[i + 1]) for i in np.nonzero(np.sign(g[:-1]) != np.sign(g[1:]))[0]])


def root(f: Callable[[float], float], left: float, right: float) -> float:
    """The zero of f between two loss-times where its signs differ, to rounding."""
    xtol = 1e-15 * abs(right) + 1e-300
    return float(brentq(f, left, right, xtol=xtol, rtol=4 * np.finfo(float).eps))  # type: ignore[arg-type]


def horizon(path: Path, sigma_stop: float, ahead: float) -> float:
    """Loss-time beyond which ln pi(y+) is monotone (or the stop, if that comes first)."""
    motion = path.motion
    if np.isfinite(sigma_stop):
        return sigma_stop
    unit = 1 / (float(motion.K0.sum()) + 2 * float(motion.omega.max()) + float(np.abs(motion.start[0])) + 1e-300)
    if motion.eta_W == 0:
        return _first_fall(path, ahead, unit)
    outward = motion.P[0] if ahead > 0 else motion.Q[0]
    if (outward[motion.omega[0] > 0] > 0).any():
        # A slow mode's bound may lie where a fast one has long left float range, and decided everything.
        return min(max(float(rising_from(path, ahead)[0]), unit), float(path.float_range(np.array([ahead]))[0]))
    moving = motion.omega[0][(motion.omega[0] > 0) & (motion.K0[0] > 0)]
    # Nothing grows: either only W moves, and ln pi(y+) is monotone, or everything decays as e^(-w tau).
    return 40 / float(moving.min()) if moving.size else unit


def _first_fall(path: Path, ahead: float, unit: float) -> float:
    """With W frozen ln pi(y+) is concave in tau: a loss-time at which it falls, or `unit` if it never does."""
    speed = ahead * path.logits(np.zeros((1, 1)), 1)[0, 0]
    if speed[int(path.plus[0])] >= speed.max():
        return unit
    for s in unit * 2.0 ** np.arange(-10, 900):
        if ahead * path.preferred(np.array([ahead * s]), 1)[1][0] < 0:
            return float(s)
    return float(s)


def _grid(path: Path, sigma_end: float) -> Array:
    """Loss-times to look at first: even over [0, end] and geometric towards 0."""
    even = np.linspace(0.0, 1.0, 257)
    fine = 2.0 ** -np.arange(8, 48, 0.5)
    return sigma_end * np.unique(np.concatenate([even, fine]))


def trough_bounds(path: Path, sigma_end: float, ahead: float, stop: float, end_log: Array) -> tuple[float, float]:
    """(lower, upper) bounds on the lowest ln pi(y+) from D*, the largest log-odds of any other token against y+.

    `stop` is the margin and `end_log` (V,) is ln pi at the end of the flow.
    """
    others = np.ones(path.V, dtype=bool)
    others[[path.plus[0], path.minus[0]]] = False
    lowest = min(float(path.motion.start[0]), stop)  # the margin is monotone along the path
    if not others.any():
        return -float(np.logaddexp(0.0, -lowest)), -float(np.logaddexp(0.0, -lowest))
    sigma = _grid(path, sigma_end)
    odds = np.concatenate([_log_odds(path, ahead * s)[:, others] for s in np.array_split(sigma, 16) if s.size])
    best = odds.max()
    for top, i, z in _peaks(sigma, odds):  # sharpen the grid's maxima, one token at a time
        if top <= best:
            break
        around = sigma[max(i - 1, 0)], sigma[min(i + 1, len(sigma) - 1)]
        token = np.nonzero(others)[0][z]
        peak: Any = minimize_scalar(
            lambda s, z=token: -_log_odds(path, ahead * s)[0, z], bounds=around, options={"xatol": 1e-9 * around[1]}
        )
        best = max(best, -float(peak.fun))
    if np.isneginf(end_log[path.plus[0]]):
        return -np.inf, -np.inf
    best = max(best, float(end_log[others].max()) - float(end_log[path.plus[0]]))
    worst = np.logaddexp(np.logaddexp(0.0, -lowest), np.log(others.sum()) + best)
    return -float(worst), -float(np.logaddexp(0.0, best))


def _peaks(sigma: Array, odds: Array) -> list[tuple[float, int, int]]:
    """(bound, row, column) of the local maxima of odds (S, N) on the grid sigma (S,), the highest bound first.

    A function that is concave around its maximum stays below the lines through a grid point and its neighbours.
    """
    before, after = np.vstack([odds[:1], odds[:-1]]), np.vstack([odds[1:], odds[-1:]])
    flat = np.maximum(before, odds) - np.minimum(odds, after) < 1e-12  # a tie with y+ all along
    i, z = np.nonzero((odds >= before) & (odds >= after) & ~flat & (odds >= odds.max() - 1.0))
    left, right = sigma[i] - sigma[np.maximum(i - 1, 0)], sigma[np.minimum(i + 1, len(sigma) - 1)] - sigma[i]
    falls_left, falls_right = odds[i, z] - before[i, z], odds[i, z] - after[i, z]
    with np.errstate(divide="ignore", invalid="ignore"):
        rise = np.maximum(
            np.where(right > 0, falls_right / right * left, falls_left),
            np.where(left > 0, falls_left / left * right, falls_right),
        )
    bound = odds[i, z] + rise
    order = np.argsort(-bound, kind="stable")
    return [(float(bound[k]), int(i[k]), int(z[k])) for k in order]


def _log_odds(path: Path, tau: Array) -> Array:
    """(T, V) logit_z - logit_{y+}."""
    logits = path.logits(np.atleast_1d(tau)[None])[0]
    return logits - logits[:, int(path.plus[0])][:, None]


def light_cone_products(path: Path) -> tuple[Array, Array]:
    """alpha, beta (B, V, m): logit_z - <s, h>/2 = sum over modes with w > 0 of alpha x + beta/x, x = e^{w tau}."""
    motion = path.motion
    ratio = (motion.k / np.where(motion.omega == 0, np.inf, motion.omega))[:, None, :]
    B1, B2 = path.first, path.second
    lc = motion.light_cone[:, None, :]
    scale = np.sqrt(8 * motion.eta_W)
    up, down = np.where(lc, B1 / scale, (B1 + ratio * B2) / 2), np.where(lc, B2 / scale, (B1 - ratio * B2) / 2)
    rows = np.arange(len(up))
    mean = lambda x: (x[rows, path.plus] + x[rows, path.minus])[:, None] / 2  # noqa: E731
    return up - mean(up), down - mean(down)


def rising_from(path: Path, ahead: float = 1.0) -> Array:
    """(B,) loss-time beyond which every token's log-odds against y+ fall, so that ln pi(y+) rises for good.

    Fujiwara's bound on the roots of the quartics P x^4 - 4 w alpha x^3 + 4 w beta x + Q of E4, mode by mode: past the
    bounds of all modes that grow, every term of every log-odds falls. Walking backwards, the same for y-: P and Q, and
    alpha and beta, change places.
    """
    motion = path.motion
    alpha, beta = (np.abs(x).max(axis=1) for x in light_cone_products(path))  # (B, m)
    P, Q = motion.P, motion.Q
    if ahead < 0:
        P, Q, alpha, beta = Q, P, beta, alpha
    grows = (P > 0) & (motion.omega > 0)
    w, P = np.where(grows, motion.omega, 1.0), np.where(grows, P, 1.0)
    bound = 2 * np.maximum.reduce(
        [4 * w * alpha / P, np.cbrt(4 * w * beta / P), (Q / (2 * P)) ** 0.25, np.ones_like(w)]
    )
    return np.where(grows, np.log(bound) / w, 0.0).max(axis=1)


def _stationary(path: Path, tokens: NDArray[np.intp]) -> Array:
    """Loss-times > 0 where a token's log-odds against y+ are stationary: roots of the quartic of E4."""
    motion = path.motion
    if motion.k.shape[1] > 1 or motion.omega[0, 0] == 0 or not tokens.size:
        return np.empty(0)
    w, P, Q = (float(x[0, 0]) for x in (motion.omega, motion.P, motion.Q))
    if P == 0:
        return np.empty(0)
    alpha, beta = (x[0, tokens, 0] for x in light_cone_products(path))
    # P x^4 - 4 w alpha x^3 + 4 w beta x + Q = 0, by the eigenvalues of its companion matrices.
    companion = np.zeros((len(tokens), 4, 4))
    companion[:, 1, 0] = companion[:, 2, 1] = companion[:, 3, 2] = 1
    companion[:, 0, 3], companion[:, 1, 3], companion[:, 3, 3] = -Q / P, -4 * w * beta / P, 4 * w * alpha / P
    finite = np.isfinite(companion).all(axis=(1, 2))
    roots = np.linalg.eigvals(companion[finite]).ravel()
    real = roots.real[(np.abs(roots.imag) < 1e-6 * np.abs(roots)) & (roots.real > 1)]
    return np.unique(np.log(real) / w)
