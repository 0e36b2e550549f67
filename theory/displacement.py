"""Where ln pi(y+) goes along the path: every extremum, its depth, its return, who gains (exact_solution E4, E5)."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.special import logsumexp

from theory.clock import Clock
from theory.extrema import find_extrema, horizon, root, trough_bounds
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


@dataclass(frozen=True, repr=False)
class Displacement:
    """What happens to ln pi(y+) under the flow of one loss, from its start to its end.

    status : "none" (never below its start by more than rounding), "transient" (below, and back at the end),
        "permanent" (below at the end), "stationary" (nothing moves).
    initial_rate, initial_curvature : d/dt ln pi(y+) in time t, and d^2/dtau^2 in loss-time, at the start.
    kappa, kappa_star : eta_h / eta_W of this flow, and the ratio above which ln pi(y+) falls at the start (inf: none
        does) if the loss raises the margin there. With a feature kernel the ratio is trace(Kf)/(d eta_W), and
        kappa_star scales the given kernel.
    r_max : max over other tokens of <2 W_z - W_+ - W_-, a>/|a|^2 (with a kernel Kf: in its inner product). At most 1:
        no hidden vector and no ratio of rates displaces this pair at the start (a loss that raises the margin).
    depth : lowest ln pi(y+) minus its start (nats, <= 0), reached at `trough`.
    largest_drop : largest fall of the probability pi(y+) from any time to any later one (the paper's statistic).
    final_change : ln pi(y+) at the end minus the start (nats; the paper's Definition 1).
    extrema : every interior peak and trough in order; `last_return` is where ln pi(y+) is back at its start for good.
    lower_bound, upper_bound : bounds on the lowest ln pi(y+) from the largest log-odds of another token (E4).
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

    def __repr__(self) -> str:
        return str(self)  # a notebook or a prompt shows the table

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


def alignment_ratio(alignment: Array, size: float, plus: int, minus: int) -> float:
    """r_max from <W_z, Kf a> (V,) and <a, Kf a>: max over z != +,- of <2 W_z - W_+ - W_-, Kf a>/<a, Kf a>.

    -inf if nothing turns. `size` comes separately: alignment[+] - alignment[-] loses it where W_+ and W_- nearly agree.
    """
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
    lead = alignment[plus] - alignment
    pull = float(p @ lead)
    # Rounding of the sum must not turn "exactly aligned" into a huge finite ratio.
    if pull >= -8 * np.finfo(float).eps * float(p @ np.abs(lead)):
        return np.inf
    mass = float(np.delete(p, plus).sum() + p[minus])  # 1 - pi+ + pi-, with its digits as pi+ -> 1
    return mass * float((path.h0[0].sum(0) ** 2).sum()) / -pull


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


def summarise(
    path: Path,
    clock: Clock,
    name: Callable[[int], str],
    *,
    kappa: float,
    kappa_star: float,
    r_max: float,
    top: int = 5,
) -> Displacement:
    """The record of one flow (a batch of one): its path, its clock, and names of tokens."""
    ahead, plus = float(clock.direction[0]), int(path.plus[0])
    sigma_stop, stop = float(clock.sigma_stop[0, 0]), float(clock.stop[0])
    start_log = path.log_probs(np.zeros((1, 1)))[0, 0]
    end_log = limit_log_probs(path, stop, sigma_stop, ahead)
    f0, f_end = float(start_log[plus]), float(end_log[plus])
    _, rate, curvature = (float(x[0]) for x in path.preferred(np.zeros(1), 2))

    sigma_end = horizon(path, sigma_stop, ahead) if ahead else 0.0
    sigma = find_extrema(path, sigma_end, ahead) if ahead else np.empty(0)
    f = path.preferred(ahead * sigma)[0] if sigma.size else np.empty(0)
    values = np.array([f0, *f, f_end])

    start = Point("start", float(path.motion.start[0]), -np.inf, f0)
    end = Point("end", stop, _stop_log_time(clock), f_end)
    extrema = tuple(
        _point("trough" if v <= min(before, after) else "peak", clock, s, v)
        for s, before, v, after in zip(sigma, values[:-2], values[1:-1], values[2:], strict=True)
    )
    trough = min([start, *extrema, end], key=lambda p: p.log_prob)
    tolerance = 1e-12 * (1 + abs(f0))
    status = _status(ahead, trough.log_prob - f0, f_end - f0, tolerance)
    back = _last_return(path, clock, sigma, f, sigma_end, f0 - tolerance) if status == "transient" else None
    if trough in extrema:
        trough_log = path.log_probs(np.array([[ahead * sigma[extrema.index(trough)]]]))[0, 0]
    else:
        trough_log = start_log if trough is start else end_log
    peaks = np.maximum.accumulate(np.exp(values))
    lower, upper = trough_bounds(path, sigma_end, ahead, stop, end_log) if ahead else (f0, f0)
    return Displacement(
        status=status,
        initial_rate=float(clock.form.slope(start.margin)) * rate if ahead and rate else 0.0,  # G may be inf
        initial_curvature=curvature,
        kappa=kappa,
        kappa_star=kappa_star,
        r_max=r_max,
        start=start,
        end=end,
        trough=trough,
        depth=min(0.0, trough.log_prob - f0),
        largest_drop=float((peaks - np.exp(values)).max()),
        final_change=f_end - f0,
        extrema=extrema,
        last_return=back,
        lower_bound=lower,
        upper_bound=upper,
        gainers_at_trough=_gainers(start_log, trough_log, name, top),
        gainers_at_end=_gainers(start_log, end_log, name, top),
    )


def _point(kind: Literal["peak", "trough", "return"], clock: Clock, sigma: float, log_prob: float) -> Point:
    at = np.array([[sigma]])
    return Point(kind, float(clock.margin(at)[0, 0]), float(clock.log_time(at)[0, 0]), float(log_prob))


def _stop_log_time(clock: Clock) -> float:
    """ln of the time at which the flow stops: finite where a kink or a slow zero of G ends it, inf for a limit."""
    if clock.direction[0] == 0:
        return -np.inf
    return float(clock.log_time(clock.sigma_stop)[0, 0]) if clock.stop_is_reached[0, 0] else np.inf


def _status(ahead: float, depth: float, final: float, tolerance: float) -> Status:
    if ahead == 0:
        return "stationary"
    if depth >= -tolerance:
        return "none"
    return "permanent" if final < -tolerance else "transient"


def _last_return(path: Path, clock: Clock, sigma: Array, f: Array, sigma_end: float, level: float) -> Point | None:
    """The last crossing of `level` from below: between the last extremum below it and what follows."""
    low = np.nonzero(f < level)[0]
    if not low.size:
        return None
    ahead = float(clock.direction[0])
    above = lambda s: float(path.preferred(np.array([ahead * s]))[0][0]) - level  # noqa: E731
    left = float(sigma[low[-1]])
    right = float(sigma[low[-1] + 1]) if low[-1] + 1 < len(sigma) else sigma_end
    while above(right) < 0:  # monotone from here on, so the return may lie beyond the horizon
        right *= 2
    return _point("return", clock, root(above, left, right), level)


def _gainers(start: Array, then: Array, name: Callable[[int], str], top: int) -> tuple[Gain, ...]:
    rise = np.exp(then) - np.exp(start)
    return tuple(
        Gain(int(z), name(int(z)), float(np.exp(start[z])), float(np.exp(then[z])), float(then[z] - start[z]))
        for z in np.argsort(-rise, kind="stable")[:top]
        if rise[z] > 0
    )
