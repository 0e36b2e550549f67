"""Gradient flow of a single-token preference pair in closed form (exact_solution E1-E8).

Parameters are never integrated. The path is algebraic in the margin and the same for every margin loss; a loss sets only
when each point is reached and where the flow stops.
"""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import brentq

from theory._check import FloatArray, check_array, check_times
from theory.clock import Clock
from theory.displacement import (
    Displacement,
    Gain,
    Point,
    alignment_ratio,
    critical_ratio,
    feature_alignment,
    find_extrema,
    horizon,
    limit_log_probs,
    trough_bounds,
)
from theory.losses import Loss, MarginForm
from theory.model import UnconstrainedFeatures, inner_products
from theory.path import Path

Array = NDArray[np.float64]


def margin_form(model: UnconstrainedFeatures, loss: Loss) -> MarginForm:
    """The loss's one-dimensional form for the model's only sample, or a ValueError if it has none."""
    if not isinstance(loss, Loss):
        raise ValueError(f"loss must be a theory.losses.Loss instance, got {loss!r}")
    form = loss.margin(model.samples[0])
    if form is None:
        raise ValueError(f"loss {loss!r} is not a function of the margin for this sample: it has no exact flow")
    return form


@dataclass(frozen=True, eq=False)
class ExactFlow:
    """The exact gradient flow dW/dt = -eta_W grad_W L, dh/dt = -eta_h grad_h L of one single-token pair.

    Parameters
    ----------
    model : one sample with two single-token responses (`UnconstrainedFeatures.single_token`).
    loss : any loss with a margin form for that sample.
    lr_unembedding : eta_W >= 0; 0 freezes W.
    lr_hidden : eta_h >= 0 (0 freezes h), or a (d, d) symmetric positive semidefinite feature kernel Kf, for which
        dh/dt = G Kf a (a network whose body moves h).

    Raises
    ------
    ValueError : a model with sequences or several samples, a loss without margin form, rates out of range.
    """

    model: UnconstrainedFeatures
    loss: Loss
    lr_unembedding: float = 1.0
    lr_hidden: Any = 1.0
    path: Path = field(init=False, repr=False)
    clock: Clock = field(init=False, repr=False)

    def __post_init__(self) -> None:
        plus, minus = self.model.single_pair
        form = margin_form(self.model, self.loss)
        W, h = self.model.W[None], self.model.h[None]
        path = Path.build(W, h, [plus], [minus], self.lr_unembedding, self.lr_hidden)
        object.__setattr__(self, "path", path)
        object.__setattr__(self, "clock", Clock(path.motion, form))

    @property
    def start_margin(self) -> float:
        """u at t = 0, nats."""
        return float(self.path.motion.start[0])

    @property
    def stop_margin(self) -> float:
        """u as t goes to infinity (or where the flow stops), nats; possibly +-inf."""
        return float(self.clock.stop[0])

    @property
    def direction(self) -> int:
        """+1 if the margin rises, -1 if it falls (a start beyond the minimiser), 0 if nothing moves."""
        return int(self.clock.direction[0])

    # ---- times

    def margin(self, times: ArrayLike | None = None, *, log_times: ArrayLike | None = None) -> Array:
        """(T,) margin u(t), nats, at times (or at e^log_times, for times beyond float range)."""
        return self.clock.margin(self._sigma(times, log_times))[0]

    def log_probs(self, times: ArrayLike | None = None, *, log_times: ArrayLike | None = None) -> Array:
        """(T, V) ln pi of every token at times (non-decreasing, >= 0) or at e^log_times."""
        sigma = self._sigma(times, log_times)
        out = self.path.log_probs(self._tau(np.minimum(sigma, 1e300)))[0]
        ended = np.isinf(sigma[0]) | (sigma[0] >= 1e300)
        if ended.any():
            out[ended] = self.limit_log_probs()
        return out

    def _sigma(self, times: ArrayLike | None, log_times: ArrayLike | None) -> Array:
        if (times is None) == (log_times is None):
            raise ValueError("give times or log_times, one of the two")
        if log_times is not None:
            grid = check_times(log_times, "log_times", low=-np.inf)
        else:
            with np.errstate(divide="ignore"):
                grid = np.log(check_times(times, "times"))  # type: ignore[arg-type]
        return self.clock.sigma_at(grid[None])

    def _tau(self, sigma: Array) -> Array:
        return self.clock.direction[:, None] * sigma

    # ---- margins

    def log_probs_at_margin(self, u: ArrayLike) -> Array:
        """(T, V) ln pi of every token where the margin is u (any order); the loss plays no part.

        Raises ValueError for a margin the path never reaches.
        """
        u = self._reachable(u)
        tau = self.path.motion.tau_at_margin(u[None])
        out = self.path.log_probs(np.clip(tau, -1e300, 1e300))[0]
        out[np.isposinf(u)] = limit_log_probs(self.path, np.inf, np.inf, 1.0)
        out[np.isneginf(u)] = limit_log_probs(self.path, -np.inf, np.inf, -1.0)
        return out

    def _reachable(self, u: ArrayLike) -> Array:
        u = np.atleast_1d(np.asarray(u, dtype=np.float64))
        if u.ndim != 1 or np.isnan(u).any():
            raise ValueError(f"u must be a one-dimensional array without NaN, got {u!r}")
        motion = self.path.motion
        low, high = (float(motion.reach(np.array([s]))[0]) for s in (-1.0, 1.0))
        bad = (u < low) | (u > high)
        if bad.any():
            raise ValueError(f"u must be a margin the path reaches, in [{low:g}, {high:g}], got {u[bad][0]:g}")
        return u

    def time_at_margin(self, u: ArrayLike) -> Array:
        """(T,) time at which the flow has margin u; inf for a margin it never has, or has only in the limit."""
        with np.errstate(over="ignore"):
            return np.exp(self.log_time_at_margin(u))

    def log_time_at_margin(self, u: ArrayLike) -> Array:
        """(T,) ln of `time_at_margin`: finite where the time itself exceeds float range; -inf at the start."""
        u = self._reachable(u)
        ahead = self.direction
        beyond = ahead * (u - self.stop_margin) > 0
        never = (ahead * (u - self.start_margin) < 0) | beyond if ahead else u != self.start_margin
        inside = np.where(never, self.start_margin, u)
        order = np.argsort(ahead * inside, kind="stable")
        out = np.empty(len(u))
        out[order] = self.clock.log_time(self.clock.sigma_at_margin(inside[None, order]))[0]
        return np.where(never, np.inf, out)

    def model_at_margin(self, u: float) -> UnconstrainedFeatures:
        """The model where the margin is u, references kept: a flow restarted there continues this one."""
        target = self._reachable(u)
        tau = float(self.path.motion.tau_at_margin(target[None])[0, 0])
        h, a = self.path.vectors(tau)
        plus, minus = self.model.single_pair
        W = self.model.W.astype(np.float64)
        s = W[plus] + W[minus]
        W[plus], W[minus] = (s + a) / 2, (s - a) / 2
        return self.model.with_parameters(W, h[None])

    def limit_log_probs(self) -> Array:
        """(V,) ln pi of every token as t goes to infinity; -inf where the probability tends to 0."""
        sigma_stop = float(self.clock.sigma_stop[0, 0])
        return limit_log_probs(self.path, self.stop_margin, sigma_stop, float(self.direction))

    # ---- summary

    @property
    def kappa(self) -> float:
        """eta_h / eta_W; with a feature kernel trace(Kf) / (d eta_W)."""
        if not self.lr_unembedding:
            return np.inf
        mean = float(np.trace(self.lr_hidden)) / self.model.d if np.ndim(self.lr_hidden) else float(self.lr_hidden)
        return mean / self.lr_unembedding

    @cached_property
    def kappa_star(self) -> float:
        """The ratio kappa above which ln pi(y+) falls at the start; inf if no ratio does that."""
        return critical_ratio(self.path, self.alignment)

    @cached_property
    def r_max(self) -> float:
        """max over other tokens of <2 W_z - W_+ - W_-, a>/|a|^2: at most 1 means this pair cannot displace at the start."""
        return alignment_ratio(self.alignment, *self.model.single_pair)

    @cached_property
    def alignment(self) -> Array:
        """(V,) <W_z, a> with a = W_+ - W_-: who gains (Theorem 2); <W_z, Kf a> with Kf scaled to mean eigenvalue 1."""
        if np.ndim(self.lr_hidden) and self.path.motion.k.any():
            return feature_alignment(self.path) / (float(np.trace(self.lr_hidden)) / self.model.d)
        if self.path.motion.light_cone.any() or not self.path.motion.k.any():
            return inner_products(self.model.W, self.path.a0[0, :1].T)[:, 0]
        return self.path.second[0, :, 0]

    def displacement(self, top: int = 5) -> Displacement:
        """Status, every extremum, depth, return, who gains (`top` tokens each): see `Displacement`."""
        ahead, path = float(self.direction), self.path
        start_log = path.log_probs(np.zeros((1, 1)))[0, 0]
        plus = int(path.plus[0])
        f0 = float(start_log[plus])
        G0 = float(self.clock.form.slope(self.start_margin))
        _, rate0, curve0 = (float(x[0]) for x in path.preferred(np.zeros(1), 2))
        end_log = self.limit_log_probs()
        sigma_end = horizon(path, float(self.clock.sigma_stop[0, 0]), ahead) if ahead else 0.0
        sigma = find_extrema(path, sigma_end, ahead) if ahead else np.empty(0)
        f = path.preferred(ahead * sigma)[0] if sigma.size else np.empty(0)
        values = np.concatenate([[f0], f, [end_log[plus]]])
        margins = self.clock.margin(sigma[None])[0] if sigma.size else np.empty(0)
        log_t = self.clock.log_time(sigma[None])[0] if sigma.size else np.empty(0)
        kinds = ["trough" if v <= min(l, r) else "peak" for l, v, r in zip(values, values[1:], values[2:])]  # noqa: B905
        extrema = tuple(Point(k, float(u), float(t), float(v)) for k, u, t, v in zip(kinds, margins, log_t, f))  # noqa: B905
        start = Point("start", self.start_margin, -np.inf, f0)
        end = Point("end", self.stop_margin, self._stop_log_time(), float(end_log[plus]))
        trough = min([start, *extrema, end], key=lambda p: p.log_prob)
        tolerance = 1e-12 * (1 + abs(f0))
        depth = min(0.0, trough.log_prob - f0)
        status = self._status(ahead, depth, end.log_prob - f0, tolerance)
        back = self._last_return(sigma, values, sigma_end, f0, tolerance) if status == "transient" else None
        probs = np.exp(np.maximum.accumulate(values[::1]))
        trough_log = start_log if trough is start else end_log if trough is end else self._at(sigma[f.argmin()], ahead)
        lower, upper = trough_bounds(path, sigma_end, ahead, self.stop_margin, end_log) if ahead else (f0, f0)
        return Displacement(
            status=status,
            initial_rate=G0 * rate0,
            initial_curvature=curve0,
            kappa=self.kappa,
            kappa_star=self.kappa_star,
            r_max=self.r_max,
            start=start,
            end=end,
            trough=trough,
            depth=depth,
            largest_drop=float((probs - np.exp(values)).max()),
            final_change=end.log_prob - f0,
            extrema=extrema,
            last_return=back,
            lower_bound=lower,
            upper_bound=upper,
            gainers_at_trough=self._gainers(start_log, trough_log, top),
            gainers_at_end=self._gainers(start_log, end_log, top),
        )

    def _at(self, sigma: float, ahead: float) -> Array:
        return self.path.log_probs(np.array([[ahead * sigma]]))[0, 0]

    def _stop_log_time(self) -> float:
        if self.direction == 0:
            return -np.inf
        sigma_stop = self.clock.sigma_stop
        return float(self.clock.log_time(sigma_stop)[0, 0]) if self.clock.stop_is_reached[0, 0] else np.inf

    @staticmethod
    def _status(ahead: float, depth: float, final: float, tolerance: float) -> Any:
        if ahead == 0:
            return "stationary"
        if depth >= -tolerance:
            return "none"
        return "permanent" if final < -tolerance else "transient"

    def _last_return(self, sigma: Array, values: Array, sigma_end: float, f0: float, tolerance: float) -> Point | None:
        """The last crossing of the start value from below, between the last low extremum and what follows it."""
        low = np.nonzero(values[1:-1] < f0 - tolerance)[0]
        if not low.size:
            return None
        i = int(low[-1])
        left = float(sigma[i])
        right = float(sigma[i + 1]) if i + 1 < len(sigma) else sigma_end
        ahead = float(self.direction)
        value = lambda s: float(self.path.preferred(np.array([ahead * s]))[0][0]) - f0  # noqa: E731
        while value(right) < 0:  # monotone from here on: the return may lie beyond the horizon
            right *= 2
        at = brentq(value, left, right, xtol=1e-15 * right, rtol=1e-14) if value(right) > 0 else right
        grid = np.array([[at]])
        return Point("return", float(self.clock.margin(grid)[0, 0]), float(self.clock.log_time(grid)[0, 0]), f0)

    def _gainers(self, start: Array, then: Array, top: int) -> tuple[Gain, ...]:
        rise = np.exp(then) - np.exp(start)
        order = np.argsort(-rise, kind="stable")[:top]
        change = np.where(np.isneginf(then), -np.inf, then - np.where(np.isneginf(start), 0.0, start))
        return tuple(
            Gain(int(z), self.model.name(int(z)), float(np.exp(start[z])), float(np.exp(then[z])), float(change[z]))
            for z in order
            if rise[z] > 0
        )


def batch_log_probs(
    W: ArrayLike,
    h: ArrayLike,
    preferred: ArrayLike,
    dispreferred: ArrayLike,
    loss: Any,
    times: ArrayLike,
    lr_unembedding: float = 1.0,
    lr_hidden: float | ArrayLike = 1.0,
) -> Array:
    """(B, T, V) exact ln pi at `times` of B independent single-token models, each starting at its reference.

    W (B, V, d), h (B, d), preferred and dispreferred (B,) token indices, times (T,). The same as B `ExactFlow`s, at a
    few per cent of their cost.
    """
    W = check_array(W, "W", (None, None, None))
    B, V, d = W.shape
    h = check_array(h, "h", (B, d))
    plus, minus = np.asarray(preferred), np.asarray(dispreferred)
    for tokens, name in ((plus, "preferred"), (minus, "dispreferred")):
        if tokens.shape != (B,) or tokens.dtype.kind not in "iu" or (tokens < 0).any() or (tokens >= V).any():
            raise ValueError(f"{name} must hold {B} token indices in [0, {V}), got {tokens!r}")
    if (plus == minus).any():
        raise ValueError(f"preferred and dispreferred must differ, both are {plus[plus == minus][0]}")
    path = Path.build(W, h, plus, minus, lr_unembedding, lr_hidden)
    clock = Clock(path.motion, MarginForm(loss, path.motion.start))
    with np.errstate(divide="ignore"):
        log_t = np.log(check_times(times, "times"))
    sigma = clock.sigma_at(np.broadcast_to(log_t, (B, len(log_t))))
    return path.log_probs(clock.direction[:, None] * sigma)


__all__ = ["ExactFlow", "FloatArray", "batch_log_probs", "margin_form"]
