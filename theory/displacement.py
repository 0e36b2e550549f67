"""Where ln pi(y+) goes along the path: every extremum, how deep, where it returns, who gains (exact_solution E4, E5)."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import logsumexp

from theory.path import Path

Array = NDArray[np.float64]
Status = Literal["none", "transient", "permanent", "stationary"]


@dataclass(frozen=True)
class Point:
    """A point of the path: an extremum, the trough, the return, the end."""

    kind: Literal["start", "peak", "trough", "return", "end"]
    margin: float  # u, nats
    log_time: float  # ln t; -inf at the start, inf where it is only approached
    log_prob: float  # ln pi(y+), nats


@dataclass(frozen=True)
class Gain:
    """A token whose probability rose between the start and some point."""

    token: int
    name: str
    start: float  # probability
    then: float  # probability
    log_change: float  # nats


@dataclass(frozen=True)
class Displacement:
    """What happens to ln pi(y+) under the flow of one loss, from its start to its end.

    status : "none" (never below its start), "transient" (below, and back at the end), "permanent" (below at the end),
        "stationary" (nothing moves).
    initial_rate, initial_curvature : d/dt ln pi(y+) in time t, and d^2/dtau^2 in loss-time, at the start.
    kappa, kappa_star : eta_h / eta_W of this flow, and the ratio above which ln pi(y+) falls at the start (inf: none
        does). With a feature kernel the ratio is trace(Kf)/(d eta_W), and kappa_star scales the given kernel.
    r_max : max over other tokens of <2 W_z - W_+ - W_-, a>/|a|^2 (with a kernel Kf: in its inner product). At most 1:
        no hidden vector and no ratio of rates displaces this pair at the start.
    depth : lowest ln pi(y+) minus its start (nats, <= 0), reached at `trough`.
    largest_drop : largest fall of the probability pi(y+) from any time to any later one (the paper's statistic).
    final_change : ln pi(y+) at the end minus the start (nats; the paper's Definition 1).
    extrema : every interior peak and trough in order; `last_return` is where ln pi(y+) is back at its start for good.
    lower_bound, upper_bound : bounds on the lowest ln pi(y+) from inner products alone.
    gainers_at_trough, gainers_at_end : tokens with the largest rise in probability, largest first.
    """

    status: Status
    initial_rate: float
    initial_curvature: float
    kappa: float
    kappa_star: float
    r_max: float
    start: Point
    end: Point
    trough: Point
    depth: float
    largest_drop: float
    final_change: float
    extrema: tuple[Point, ...]
    last_return: Point | None
    lower_bound: float
    upper_bound: float
    gainers_at_trough: tuple[Gain, ...]
    gainers_at_end: tuple[Gain, ...]

    def to_dict(self) -> dict[str, Any]:
        """Nested plain values, for saving; infinities stay floats."""
        return asdict(self)

    def _rows(self) -> list[tuple[str, str]]:
        who = lambda gains: ", ".join(f"{g.name} {g.start:.3g} -> {g.then:.3g}" for g in gains[:3]) or "nobody"  # noqa: E731
        rows = [
            ("status", self.status),
            ("ln pi(y+) at start", f"{self.start.log_prob:.6g}"),
            ("initial rate", f"{self.initial_rate:.6g}"),
            ("kappa, kappa*", f"{self.kappa:.6g}, {self.kappa_star:.6g}"),
            ("r_max", f"{self.r_max:.6g}"),
            ("depth (nats)", f"{self.depth:.6g} at margin {self.trough.margin:.6g}, ln t = {self.trough.log_time:.6g}"),
            ("largest later drop of pi(y+)", f"{self.largest_drop:.6g}"),
            ("final change (nats)", f"{self.final_change:.6g}"),
            ("gain at the trough", who(self.gainers_at_trough)),
            ("gain at the end", who(self.gainers_at_end)),
        ]
        if self.last_return is not None:
            back = self.last_return
            rows.insert(8, ("back at its start", f"margin {back.margin:.6g}, ln t = {back.log_time:.6g}"))
        return rows

    def __str__(self) -> str:
        return "\n".join(f"{name:30} {value}" for name, value in self._rows())

    def _repr_html_(self) -> str:
        import html

        cells = "".join(f"<tr><td>{a}</td><td>{html.escape(b)}</td></tr>" for a, b in self._rows())
        return f"<table>{cells}</table>"


def feature_alignment(path: Path) -> Array:
    """(V,) <W_z, Kf a0> of the first pair: the speed of every logit with W held fixed."""
    # In either basis: the derivative of <W_z, h> at tau = 0.
    first, second = path._coefficients(np.zeros((1, 1)), order=1)
    return path.first[0] @ first[0, :, 0] + path.second[0] @ second[0, :, 0]


def alignment_ratio(alignment: Array, plus: int, minus: int) -> float:
    """r_max from <W_z, Kf a> (V,): max over z != +,- of <2 W_z - W_+ - W_-, Kf a>/<a, Kf a>; -inf if nothing turns."""
    size = alignment[plus] - alignment[minus]
    others = np.delete(alignment, [plus, minus])
    if not others.size or size <= 0:
        return -np.inf
    return float((2 * others.max() - alignment[plus] - alignment[minus]) / size)


def critical_ratio(path: Path, alignment: Array) -> float:
    """kappa*: the multiple of the kernel behind `alignment` (V,), relative to eta_W, above which ln pi(y+) falls at the
    start; inf if none does.
    """
    p = np.exp(path.log_probs(np.zeros((1, 1)))[0, 0])
    plus, minus = int(path.plus[0]), int(path.minus[0])
    pull = float(p @ (alignment[plus] - alignment))
    # Rounding of the sum must not turn "exactly aligned" into a huge finite ratio.
    if pull >= -4 * np.finfo(float).eps * np.abs(alignment).max():
        return np.inf
    return float((1 - p[plus] + p[minus]) * (path.h0[0].sum(0) ** 2).sum() / -pull)


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
    extra = _stationary(path, np.nonzero(others)[0][np.argsort(odds.max(axis=0))[-2000:]])
    extra = extra[(extra > 0) & (extra < sigma_end)]
    if extra.size and ahead > 0:
        # Each stationary point belongs to one token; the maximum over tokens there can only be sharper.
        best = max(best, max(_log_odds(path, e)[:, others].max() for e in np.array_split(extra, len(extra) // 256 + 1)))
    if np.isneginf(end_log[path.plus[0]]):
        return -np.inf, -np.inf
    best = max(best, float(end_log[others].max()) - float(end_log[path.plus[0]]))
    worst = np.logaddexp(np.logaddexp(0.0, -lowest), np.log(others.sum()) + best)
    return -float(worst), -float(np.logaddexp(0.0, best))


def _log_odds(path: Path, tau: Array) -> Array:
    """(T, V) logit_z - logit_{y+}."""
    logits = path.logits(np.atleast_1d(tau)[None])[0]
    return logits - logits[:, int(path.plus[0])][:, None]


def light_cone_products(path: Path) -> tuple[Array, Array]:
    """alpha, beta (B, V): logit_z - <s, h>/2 = alpha x + beta/x of one-mode paths with w > 0, x = e^{w tau}."""
    motion = path.motion
    ratio = (motion.k / motion.omega)[:, None, 0, None]  # (B, 1, 1)
    B1, B2 = path.first, path.second
    lc = motion.light_cone[:, None, :]
    scale = np.sqrt(8 * motion.eta_W)
    up, down = np.where(lc, B1 / scale, (B1 + ratio * B2) / 2), np.where(lc, B2 / scale, (B1 - ratio * B2) / 2)
    rows = np.arange(len(up))
    mean = lambda x: (x[rows, path.plus] + x[rows, path.minus])[:, None] / 2  # noqa: E731
    return (up - mean(up))[..., 0], (down - mean(down))[..., 0]


def rising_from(path: Path) -> Array:
    """(B,) ln x beyond which every token's log-odds against y+ fall, so that ln pi(y+) rises for good (P > 0, w > 0).

    Fujiwara's bound on the roots of the quartics P x^4 - 4 w alpha x^3 + 4 w beta x + Q of E4.
    """
    motion = path.motion
    w, P, Q = (f[:, 0] for f in (motion.omega, motion.P, motion.Q))
    alpha, beta = (np.abs(x).max(axis=1) for x in light_cone_products(path))
    cubic, linear = 4 * w * alpha / P, 4 * w * beta / P
    return np.log(2 * np.maximum.reduce([cubic, np.cbrt(linear), (Q / (2 * P)) ** 0.25, np.ones_like(w)]))


def _stationary(path: Path, tokens: NDArray[np.intp]) -> Array:
    """Loss-times > 0 where a token's log-odds against y+ are stationary: roots of the quartic of E4."""
    motion = path.motion
    if motion.k.shape[1] > 1 or motion.omega[0, 0] == 0 or not tokens.size:
        return np.empty(0)
    w, P, Q = (float(x[0, 0]) for x in (motion.omega, motion.P, motion.Q))
    if P == 0:
        return np.empty(0)
    alpha, beta = (x[0, tokens] for x in light_cone_products(path))
    # P x^4 - 4 w alpha x^3 + 4 w beta x + Q = 0, by the eigenvalues of its companion matrices.
    companion = np.zeros((len(tokens), 4, 4))
    companion[:, 1, 0] = companion[:, 2, 1] = companion[:, 3, 2] = 1
    companion[:, 0, 3], companion[:, 1, 3], companion[:, 3, 3] = -Q / P, -4 * w * beta / P, 4 * w * alpha / P
    finite = np.isfinite(companion).all(axis=(1, 2))
    roots = np.linalg.eigvals(companion[finite]).ravel()
    real = roots.real[(np.abs(roots.imag) < 1e-6 * np.abs(roots)) & (roots.real > 1)]
    return np.unique(np.log(real) / w)


def horizon(path: Path, sigma_stop: float, ahead: float) -> float:
    """Loss-time beyond which ln pi(y+) is monotone (or the stop, if that comes first)."""
    motion = path.motion
    if np.isfinite(sigma_stop):
        return sigma_stop
    if motion.k.shape[1] == 1 and motion.omega[0, 0] > 0 and ahead > 0 and motion.P[0, 0] > 0:
        return float(rising_from(path)[0] / motion.omega[0, 0])
    return _settling_time(path, ahead)


def _settling_time(path: Path, ahead: float) -> float:
    """Loss-time, by doubling, at which ln pi(y+) has taken its final direction: at 1, or falling with one winner."""
    motion = path.motion
    unit = 1 / (float(motion.K0.sum()) + 2 * float(motion.omega.max()) + float(np.abs(motion.start[0])) + 1e-300)
    sigma = unit * 2.0 ** np.arange(-10, 200)
    for s in sigma:
        log_p, rate = path.preferred(np.array([ahead * s]), 1)
        if not np.isfinite(rate[0]):
            return float(s / 2)
        rate_now = ahead * rate[0]
        gone, sure = log_p[0] < -1e3 and rate_now < 0, log_p[0] > -1e-15
        if gone or sure or (motion.eta_W == 0 and rate_now < 0):
            return float(s)  # with W frozen ln pi(y+) is concave: once falling, it never rises
    return float(sigma[-1])


def _grid(path: Path, sigma_end: float) -> Array:
    """Loss-times to look at first: even over [0, end] and geometric towards 0."""
    even = np.linspace(0.0, 1.0, 257)
    fine = 2.0 ** -np.arange(8, 48, 0.5)
    return sigma_end * np.unique(np.concatenate([even, fine]))


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
        return float(brentq(rate, left, right, xtol=1e-15 * sigma_end + 1e-300, rtol=1e-14))

    sigma, g = sigma[g != 0], g[g != 0]  # underflow where pi(y+) is 1, or an extremum exactly on a node
    return np.array([crossing(sigma[i], sigma[i + 1]) for i in np.nonzero(np.sign(g[:-1]) != np.sign(g[1:]))[0]])


def limit_log_probs(path: Path, stop: float, sigma_stop: float, ahead: float) -> Array:
    """(V,) ln pi of every token as t goes to infinity, exact also where pi(y+) tends to 0 or 1."""
    motion = path.motion
    if ahead == 0:
        return path.log_probs(np.zeros((1, 1)))[0, 0]
    if np.isfinite(sigma_stop):
        return path.log_probs(np.array([[ahead * sigma_stop]]))[0, 0]
    if np.isfinite(stop):  # everything that moves decays: the logits tend to 0
        return np.full(path.V, -np.log(path.V))
    if motion.eta_W > 0:
        winners = np.zeros(path.V, dtype=bool)
        winners[(path.plus if ahead > 0 else path.minus)[0]] = True
    else:
        speed = ahead * feature_alignment(path)
        winners = speed >= speed.max() - 1e-13 * np.abs(speed).max()
    logits = path.logits(np.zeros((1, 1)))[0, 0]
    return np.where(winners, logits - logsumexp(logits[winners]), -np.inf)
