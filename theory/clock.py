"""When the path is walked: t(tau) = integral of d tau / G(u(tau)), and its inverse (exact_solution E1, E5).

Times run over hundreds of thousands of e-folds, so everything here speaks ln t. Where the slope G has an elementary
form the clock is closed; otherwise it is one quadrature along the margin, never an ODE.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.polynomial import Chebyshev, Polynomial
from numpy.typing import NDArray
from scipy.special import wrightomega

from theory._check import SolverError
from theory._quadrature import log_integrals
from theory.losses import MarginForm
from theory.losses._laws import ConstantSlope, ExponentialSlope, LinearSlope, LogisticSlope
from theory.motion import Motion

Array = NDArray[np.float64]

_EPS = float(np.finfo(float).eps)
# Zero and infinite times, slopes and loss-times are legitimate values here; NaN is caught where it would matter.
_infinities = np.errstate(over="ignore", divide="ignore", invalid="ignore")
_FAR = 1e300  # loss-times are capped here: nothing in range depends on a longer one


# Panels of the inverse: nodes on 0 <= z <= 1 (Chebyshev's), the matrix from values at the nodes to Chebyshev
# coefficients, and the one from there to the powers of z in the running mean (1/z) int_0^z.
_ORDER = 16
_ANGLES = np.pi * (np.arange(_ORDER)[::-1] + 0.5) / _ORDER
_NODES = (1 + np.cos(_ANGLES)) / 2
_TO_SERIES = np.cos(np.outer(_ANGLES, np.arange(_ORDER))) * np.where(np.arange(_ORDER) == 0, 1, 2) / _ORDER
_TO_MEAN = np.zeros((_ORDER, _ORDER))
for _k in range(_ORDER):
    _powers = np.asarray(Chebyshev.basis(_k, domain=[0, 1]).convert(kind=Polynomial).coef, dtype=np.float64)
    _TO_MEAN[_k, : _k + 1] = _powers / np.arange(1.0, _k + 2)
_LAST_GAP = (_NODES[-1] - _NODES[-2]) / (_NODES[-1] - _NODES[0])
_SPAN = 3.0  # growth of ln f over the first panel


def _solve_panels(mean: Array, row: NDArray[np.intp], part: Array, steps: int = 8, block: int = 4096) -> Array:
    """z in [0, 1] with z * mean_row(z) = part, for rows of coefficients `mean`; NaN where Newton does not settle."""
    out = np.empty(len(row))
    powers, mean = np.arange(1.0, mean.shape[1] + 1), np.ascontiguousarray(mean.T)
    for i in range(0, len(row), block):  # blocks that stay in cache
        coef, goal = mean.take(row[i : i + block], axis=1), part[i : i + block]
        # First guess: an exponential with the slopes of both ends.
        bend = np.log(np.maximum(powers @ coef, 1e-300) / coef[0])
        bend = np.where(np.abs(bend) < 1e-3, 1e-3, bend)
        z = np.log1p(np.minimum(goal / coef.sum(axis=0), 1.0) * np.expm1(bend)) / bend
        settled = np.zeros(len(z), dtype=bool)
        for _ in range(steps):
            value, slope = coef[-1].copy(), np.zeros_like(z)
            for c in coef[-2::-1]:
                slope *= z
                slope += value
                value *= z
                value += c
            move = (goal - z * value) / (value + z * slope)
            z += move
            settled = np.abs(move) <= 1e-7 * z  # Newton squares the error: what is left is rounding
            if settled.all():
                break
        out[i : i + block] = np.where(settled, z, np.nan)
    return out


def _invert_by_panels(
    log_f: Callable[[NDArray[np.intp], Array], tuple[Array, Array]],
    log_t: Array,
    width: Array,
    end: Array,
    most: int = 48,
) -> tuple[Array, NDArray[np.bool_]]:
    """Where the integral of f from 0 reaches e^log_t (B, T; rows non-decreasing), and the rows that were all found.

    `log_f(rows, s)` gives ln f and its rounding error at s (n, points); `width` (B,) is a first guess of the scale on
    which f varies and `end` (B,) where its domain ends. Every row steps forward by panels of its own width on which f
    is a polynomial to rounding. The targets that fall into a panel are then roots of a known polynomial: they cost no
    evaluation of f, and a row takes a few dozen in all, however many targets it has.
    """
    wanted = np.isfinite(log_t)
    sigma = np.where(wanted, np.nan, 0.0)
    last = np.where(wanted, log_t, -np.inf).max(axis=1)
    width, left, log_left = np.minimum(width, end), np.zeros(len(end)), np.full(len(end), -np.inf)
    rows = np.nonzero(last > -np.inf)[0]
    for _ in range(most):
        if not rows.size:
            break
        value, noise = log_f(rows, left[rows, None] + width[rows, None] * _NODES)
        top = value.max(axis=1)
        series = np.exp(value - top[:, None]) @ _TO_SERIES
        tail = np.nan_to_num(np.abs(series[:, -2:]).max(axis=1) / (1e-13 + noise.max(axis=1)), nan=np.inf)
        fits = tail <= 1
        better = np.clip(0.9 * np.maximum(tail, 1e-300) ** (-1 / _ORDER), 0.1, 2.0)
        # A slope that collapses within the last quarter per cent of a panel is seen by no node: look at its end, too.
        ok = np.nonzero(fits)[0]
        at_end = log_f(rows[ok], (left + width)[rows[ok], None])[0][:, 0]
        missed = np.abs(np.exp(at_end - top[ok]) - series[ok].sum(axis=1)) * (1 - _NODES[-1])
        hidden = ok[~(missed <= 1e-13 + noise[ok].max(axis=1))]
        fits[hidden], better[hidden] = False, 0.5
        width[rows[~fits]] *= better[~fits]
        at, value, mean = rows[fits], value[fits], series[fits] @ _TO_MEAN
        scale = top[fits] + np.log(width[at])
        log_right = np.logaddexp(log_left[at], scale + np.log(mean.sum(axis=1)))
        inside = wanted[at] & (log_t[at] > log_left[at, None]) & (log_t[at] <= log_right[:, None])
        row, column = np.nonzero(inside)
        owner, target = at[row], log_t[at][inside]
        part = np.exp(target - scale[row]) * -np.expm1(log_left[owner] - target)
        sigma[owner, column] = left[owner] + width[owner] * _solve_panels(mean, row, part)
        left[at] += width[at]
        log_left[at] = log_right
        # The next panel is as hard as the end of this one.
        rise, last_rise = np.abs(value[:, -1] - value[:, 0]), np.abs(value[:, -1] - value[:, -2])
        ease = np.where(last_rise > 0, rise * _LAST_GAP / last_rise, 1.0)
        width[at] = np.minimum(width[at] * better[fits] * np.clip(ease, 0.3, 1.0), end[at] - left[at])
        rows = rows[(log_left[rows] < last[rows]) & (width[rows] > 0)]
    found = np.asarray(np.isfinite(sigma).all(axis=1))
    return np.maximum.accumulate(sigma, axis=1), found


def _column(x: object, B: int) -> Array:
    """A scalar or (B,) array as (B, 1)."""
    return np.broadcast_to(np.asarray(x, dtype=np.float64), (B,))[:, None]


@_infinities
def log_expm1(x: Array) -> Array:
    """ln(e^x - 1) for x >= 0, without overflow or cancellation."""
    return np.where(x > 30, x + np.log1p(-np.exp(-np.maximum(x, 30.0))), np.log(np.expm1(np.minimum(x, 30.0))))


@dataclass(frozen=True)
class Clock:
    """ln t as a function of loss-time for a batch of B pairs under one loss.

    Loss-time is counted in the direction of walking: `sigma = direction * tau >= 0`, where `direction` (B,) is the
    sign of G at the start (0: nothing moves).
    """

    motion: Motion
    form: MarginForm

    @cached_property
    def direction(self) -> Array:
        """(B,) +1 if the margin rises, -1 if it falls, 0 if nothing moves."""
        start = self.motion.start
        sign = self.form.take(np.arange(len(start))).sign(start[:, None])[:, 0]
        still = (self.motion.K0.sum(-1) == 0) | (self.motion.reach(sign) == start)
        for zero in self.form.zeros:
            still = still | (start == zero)
        return np.where(still, 0.0, sign)

    @cached_property
    def stop(self) -> Array:
        """(B,) margin where the flow ends: the first zero of G ahead, or the end of the path (possibly +-inf)."""
        start, ahead = self.motion.start, self.direction
        end = np.where(ahead == 0, start, self.motion.reach(ahead))
        for zero in self.form.zeros:
            zero = np.broadcast_to(np.asarray(zero, dtype=np.float64), start.shape)
            closer = (ahead * (zero - start) > 0) & (ahead * (end - zero) > 0)
            end = np.where(closer, zero, end)
        return end

    @cached_property
    @_infinities
    def sigma_stop(self) -> Array:
        """(B, 1) loss-time of the stop, possibly inf."""
        tau = self.motion.tau_at_margin(np.where(np.isfinite(self.stop), self.stop, self.motion.start)[:, None])
        sigma = np.abs(tau)
        return np.where(np.isfinite(self.stop)[:, None], sigma, np.inf)

    @cached_property
    @_infinities
    def stop_is_reached(self) -> NDArray[np.bool_]:
        """(B, 1) whether the stop is reached in finite time: G vanishes there slower than linearly."""
        at_zero = np.zeros(len(self.stop), dtype=bool)
        for zero in self.form.zeros:
            at_zero |= self.stop == zero
        form = self.form.take(np.arange(len(self.stop)))
        stop = np.where(at_zero, self.stop, self.motion.start)[:, None]
        if isinstance(self.form.law, ConstantSlope):
            return at_zero[:, None]
        span = np.maximum(np.abs(stop - self.motion.start[:, None]), 1e7 * _EPS * np.abs(stop) + 1e-300)
        near, far = (form.log_slope(stop - self.direction[:, None] * c * span) for c in (1e-6, 1e-3))
        order = (far - near) / np.log(1e3)  # G ~ distance^order
        return (at_zero & (order[:, 0] < 1 - 1e-2))[:, None]

    @_infinities
    def margin(self, sigma: Array) -> Array:
        """(B, T) margin at loss-time sigma, exactly `stop` at the stop."""
        u = self.motion.margin(self.direction[:, None] * np.minimum(sigma, _FAR))
        return np.where(sigma >= self.sigma_stop, self.stop[:, None], u)

    @_infinities
    def sigma_at_margin(self, u: Array) -> Array:
        """(B, T) loss-time at which the margin is u; inf where it is only approached."""
        sigma = np.abs(self.motion.tau_at_margin(u))
        return np.where(u == self.stop[:, None], self.sigma_stop, sigma)

    # ---- ln t(sigma)

    @_infinities
    def log_time(self, sigma: Array) -> Array:
        """(B, T) ln t at loss-times sigma (B, T), each row non-decreasing."""
        closed = self._closed_log_time(sigma)
        out = self._quadrature(np.minimum(sigma, _FAR)) if closed is None else closed
        # At the stop the time is infinite unless G vanishes slowly enough; beyond it there is no time at all.
        out = np.where((sigma >= self.sigma_stop) & ~self.stop_is_reached, np.inf, out)
        return np.where(sigma == 0, -np.inf, out)

    def _closed_log_time(self, sigma: Array) -> Array | None:
        law, motion = self.form.law, self.motion
        B = len(motion.start)
        match law:
            case ConstantSlope(rate, _):
                return np.log(sigma) - np.log(_column(rate, B))
            case LinearSlope(rate, _) if motion.k.shape[1] == 1 and np.isfinite(self.sigma_stop).all():
                w, K, Y, ratio = self._quadratic(_column(rate, B))
                s = self.direction[:, None] * np.minimum(sigma, self.sigma_stop)
                X = np.where(w == 0, s, np.expm1(2 * w * s))
                return np.log(-np.log1p(-X * (1 + ratio) / (Y + X * ratio))) - np.log(K)
            case LogisticSlope(beta, centre) if motion.frozen.all():
                beta, K0 = _column(beta, B), motion.K0.sum(-1)[:, None]
                z0 = beta * (motion.start[:, None] - _column(centre, B))
                rise = beta * K0 * sigma
                return np.logaddexp(np.log(rise), z0 + log_expm1(rise)) - np.log(beta**2 * K0)
            case ExponentialSlope(beta, centre) if motion.frozen.all():
                beta, K0 = _column(beta, B), motion.K0.sum(-1)[:, None]
                z0 = beta * (motion.start[:, None] - _column(centre, B))
                return z0 + log_expm1(beta * K0 * sigma) - np.log(beta**2 * K0)
            case _:
                return None

    def _quadratic(self, rate: Array) -> tuple[Array, Array, Array, Array]:
        """w, c K(u*), Y = e^{2 w tau*} - 1 (or tau* where w = 0) and P Y / (P + Q/(1+Y)) of the explicit solution."""
        motion = self.motion
        w = motion.omega
        tau_stop = self.direction[:, None] * self.sigma_stop
        Y = np.where(w == 0, tau_stop, np.expm1(2 * w * tau_stop))
        ratio = np.where(w == 0, 0.0, motion.P * Y / (motion.P + motion.Q / (1 + Y)))
        return w, rate * motion.speed(tau_stop), Y, ratio

    def _quadrature(self, sigma: Array) -> Array:
        B = len(sigma)
        edges = np.concatenate([np.zeros((B, 1)), np.minimum(sigma, self.sigma_stop)], axis=1)
        edges, back = self._with_kinks(edges)
        n = edges.shape[1] - 1
        rows = np.repeat(np.arange(B), n)

        def log_f(owner: NDArray[np.intp], s: Array) -> tuple[Array, Array]:
            return self._log_integrand(rows[owner], s)

        pieces = log_integrals(log_f, edges[:, :-1].ravel(), edges[:, 1:].ravel()).reshape(B, n)
        return np.take_along_axis(np.logaddexp.accumulate(pieces, axis=1), back, axis=1)

    def _with_kinks(self, edges: Array) -> tuple[Array, NDArray[np.intp]]:
        """The edges with the loss's kinks merged in, and where each target now sits."""
        B, T = edges.shape[0], edges.shape[1] - 1
        targets = np.broadcast_to(np.arange(T), (B, T))
        if not self.form.kinks:
            return edges, targets
        kinks = np.stack([np.broadcast_to(np.asarray(k, float), (B,)) for k in self.form.kinks], axis=1)
        ahead = self.direction[:, None]
        reachable = (ahead * (kinks - self.motion.start[:, None]) > 0) & (ahead * (self.stop[:, None] - kinks) > 0)
        at = np.abs(self.motion.tau_at_margin(np.where(reachable, kinks, self.motion.start[:, None])))
        merged = np.concatenate([edges, np.where(reachable, at, 0.0)], axis=1)
        order = np.argsort(merged, axis=1, kind="stable")
        position = np.argsort(order, axis=1)  # where each original edge went
        return np.take_along_axis(merged, order, axis=1), position[:, 1 : T + 1] - 1

    def _log_integrand(self, rows: NDArray[np.intp], sigma: Array) -> tuple[Array, Array]:
        """-ln |G| at loss-times sigma (n, points) of the given rows, with its rounding error."""
        form, ahead = self.form.take(rows), self.direction[rows][:, None]
        u = self.motion.take(rows).margin(ahead * sigma)
        value = -form.log_slope(u)
        last = u[:, -1:]
        before_stop = ahead * (self.stop[rows][:, None] - last) > 1e-9 * (1 + np.abs(last))
        wrong = before_stop & (form.slope(last) * ahead < 0)
        if wrong.any():
            raise SolverError(
                f"the slope of {self.form.loss!r} changes sign before u = {last[wrong][0]:g}, "
                "but the loss declares no zero there: define zeros(u_ref) or minimiser(u_ref)"
            )
        ends = u[:, [0, -1]]  # u is monotone: it is largest at one of them
        spread = np.abs(ends[:, 1:] - ends[:, :1])
        steepness = np.abs(value[:, -1:] - value[:, :1]) / spread
        size = np.abs(ends).max(axis=1, keepdims=True) + np.abs(np.asarray(form.u_ref))
        return value, np.where(spread > 0, steepness * 4 * _EPS * size, 0.0) + 4 * _EPS

    # ---- sigma(ln t)

    @_infinities
    def sigma_at(self, log_t: Array) -> Array:
        """(B, T) loss-time at ln t (B, T), each row non-decreasing."""
        closed = self._closed_sigma(log_t)
        moves = self.direction != 0
        if closed is not None:
            sigma = closed
        elif moves.all():
            sigma = self._invert(log_t)
        else:
            sigma = np.zeros_like(log_t)
            if moves.any():
                sigma[moves] = self._rows(moves)._invert(log_t[moves])
        sigma = np.where(np.isneginf(log_t) | (self.direction == 0)[:, None], 0.0, sigma)
        return np.where(log_t == np.inf, self.sigma_stop, np.minimum(sigma, self.sigma_stop))

    def _closed_sigma(self, log_t: Array) -> Array | None:
        law, motion = self.form.law, self.motion
        B = len(motion.start)
        match law:
            case ConstantSlope(rate, _):
                return np.exp(log_t) * _column(rate, B)
            case LinearSlope(rate, _) if motion.k.shape[1] == 1 and np.isfinite(self.sigma_stop).all():
                w, K, Y, ratio = self._quadratic(_column(rate, B))
                decay = np.exp(-np.exp(log_t) * K)
                X = -np.expm1(-np.exp(log_t) * K) * Y / (1 + decay * ratio)
                return np.abs(np.where(w == 0, X, np.log1p(X) / np.where(w == 0, 1.0, 2 * w)))
            case LogisticSlope(beta, centre) if motion.frozen.all():
                beta, K0 = _column(beta, B), motion.K0.sum(-1)[:, None]
                z0 = beta * (motion.start[:, None] - _column(centre, B))
                return self._logistic_rise(z0, log_t + np.log(beta**2 * K0)) / (beta * K0)
            case ExponentialSlope(beta, centre) if motion.frozen.all():
                beta, K0 = _column(beta, B), motion.K0.sum(-1)[:, None]
                z0 = beta * (motion.start[:, None] - _column(centre, B))
                return np.logaddexp(0.0, log_t + np.log(beta**2 * K0) - z0) / (beta * K0)
            case _:
                return None

    @staticmethod
    def _logistic_rise(z0: Array, log_T: Array) -> Array:
        """x >= 0 with x + e^{z0} (e^x - 1) = T, from the Wright omega function and two Newton steps on ln T."""
        y = z0 + np.exp(np.minimum(z0, 700.0)) + np.exp(np.minimum(log_T, 700.0))
        omega = np.where(y < -500, y, np.log(wrightomega(np.clip(y, -500.0, 1e300))))  # z + e^z = y
        guess = np.where(np.maximum(log_T, z0) < 700, omega, np.logaddexp(log_T, z0)) - z0
        small = np.exp(np.minimum(log_T - np.logaddexp(0.0, z0), 700.0))  # x = T/(1 + e^z0) to first order
        x = np.where(guess > 1e-3, guess, np.minimum(small, np.where(guess > 0, 2e-3, np.inf)))
        for _ in range(4):
            log_t = np.logaddexp(np.log(x), z0 + log_expm1(x))
            log_rate = np.logaddexp(0.0, z0 + x)
            step = (log_T - log_t) * np.exp(log_t - log_rate)
            x = np.where(np.isfinite(step), np.maximum(x + step, x / 2), x)
        return x

    def _invert(self, log_t: Array) -> Array:
        """(B, T) loss-time at ln t for pairs that move: by panels where the slope is smooth, by Newton for the rest."""
        if self.form.kinks:
            return self._newton(log_t)
        motion = self.motion
        step = 1e-3 / (motion.K0.sum(-1) + 2 * motion.omega.max(-1) + np.abs(motion.start) + 1e-300)
        value = self._log_integrand(np.arange(len(step)), step[:, None] * np.array([0.0, 1.0]))[0]
        width = _SPAN / (np.abs(value[:, 1] - value[:, 0]) / step + motion.omega.max(-1))
        sigma, found = _invert_by_panels(self._log_integrand, log_t, width, np.minimum(self.sigma_stop, _FAR)[:, 0])
        if not found.all():
            sigma[~found] = self._rows(~found)._newton(log_t[~found])
        return sigma

    def _rows(self, rows: NDArray[np.bool_]) -> "Clock":
        u_ref = np.broadcast_to(self.form.u_ref, rows.shape)[rows]
        return Clock(self.motion.take(rows), MarginForm(self.form.loss, u_ref))

    def _newton(self, log_t: Array, steps: int = 60) -> Array:
        """Bracketed third-order Newton on ln t(sigma), all targets at once; every evaluation serves the whole row."""
        B = len(self.motion.start)
        row = np.repeat(np.arange(B), log_t.shape[1]).reshape(log_t.shape)
        first = log_t + self.form.take(np.arange(B)).log_slope(self.motion.start[:, None])  # sigma = t |G(u0)| at first
        early = first < -600  # there sigma may underflow
        log_t = np.where(early, -np.inf, log_t)
        end = np.minimum(self.sigma_stop, _FAR)
        sigma = np.maximum.accumulate(np.minimum(self._guess(log_t), end), axis=1)
        lo, hi = np.zeros_like(sigma), np.broadcast_to(end, sigma.shape).copy()
        miss, done = np.full_like(sigma, np.inf), np.zeros(sigma.shape, dtype=bool)
        for _ in range(steps):
            here = self._quadrature(sigma)
            miss = log_t - here
            lo, hi = np.where(miss > 0, sigma, lo), np.where(miss < 0, sigma, hi)
            lo, hi = np.maximum.accumulate(lo, axis=1), np.minimum.accumulate(hi[:, ::-1], axis=1)[:, ::-1]
            step, floor, flat = self._newton_step(row, sigma, here, miss)
            new = np.where(flat, sigma + step, self._moved(sigma, step))
            bracketed = (new > lo) & (new < hi)
            middle = np.where(lo > 0, np.sqrt(lo) * np.sqrt(hi), hi / 1e3)
            middle = np.where(hi < 2 * lo, (lo + hi) / 2, middle)
            new = np.where(bracketed, new, middle)
            done = (np.abs(step) <= 4 * _EPS * sigma) & (np.abs(miss) < 1)
            done |= (hi - lo <= 4 * _EPS * hi) | (np.abs(miss) <= floor)
            done |= (hi >= end) & (sigma >= end * (1 - 4 * _EPS)) & (miss > 0)
            done |= ~np.isfinite(log_t)
            sigma = np.maximum.accumulate(np.where(done, sigma, new), axis=1)
            if done.all():
                sigma = np.where(early, np.exp(first), sigma)
                return np.where((log_t - here > 1e-6) & (sigma >= end * (1 - 8 * _EPS)), self.sigma_stop, sigma)
        worst = float(np.abs(miss[~done]).max())
        raise SolverError(f"no loss-time found for ln t in {steps} steps (worst miss in ln t {worst:g})")

    def _newton_step(
        self, row: NDArray[np.intp], sigma: Array, log_time: Array, miss: Array
    ) -> tuple[Array, Array, NDArray[np.bool_]]:
        """The step in sigma that gains `miss` in ln t if ln f is linear: t(s + x) = t + f (e^(growth x) - 1)/growth.

        With it, the rounding error of ln t there: a smaller miss means nothing; and whether f is flat, so that the step
        is exact (a slope that has become constant: the margin explodes, loss-time does not).
        """
        nudge = np.maximum(sigma * 1e-5, 1e-300)
        f0, f1 = (
            self._log_integrand(row.ravel(), s.reshape(-1, 1))[0].reshape(sigma.shape) for s in (sigma, sigma + nudge)
        )
        growth = (f1 - f0) / nudge
        log_gain = log_expm1(np.maximum(miss, 0.0)) + log_time - f0  # ln of (t* - t)/f, when positive
        ratio = np.where(miss > 0, np.exp(log_gain), np.expm1(miss) * np.exp(log_time - f0))
        steep = (miss > 0) & (growth > 0)  # then the logarithm is taken of what may exceed float range
        bent = np.where(steep, np.logaddexp(0.0, np.log(growth) + log_gain), np.log1p(growth * ratio)) / growth
        flat = np.abs(growth * ratio) < 1e-12
        step = np.where(flat, ratio, bent)
        # Far beyond the target e^miss is lost, and ln t is nearly linear.
        step = np.where(miss < -30, miss * np.exp(log_time - f0), step)
        tau = self.direction[:, None] * sigma
        u_ref = np.abs(_column(self.form.u_ref, len(tau)))
        steepness = np.abs(growth) / np.maximum(self.motion.speed(tau), 1e-300)  # d ln f / du
        floor = 1e-14 + 4 * _EPS * np.nan_to_num(steepness * (np.abs(self.motion.margin(tau)) + u_ref), posinf=0.0)
        return np.where(np.isfinite(step), step, np.inf), floor, flat

    def _moved(self, sigma: Array, step: Array) -> Array:
        """sigma + step; where the margin grows exponentially in sigma, the step is taken in the margin instead."""
        new = sigma + step
        if self.motion.k.shape[1] > 1:
            return new
        u = self.motion.margin(self.direction[:, None] * sigma)
        speed = self.motion.speed(self.direction[:, None] * sigma)
        along = np.abs(self.motion.tau_at_margin(u + self.direction[:, None] * speed * step))
        return np.where((2 * self.motion.omega * sigma > 1) & np.isfinite(along), along, new)

    def _guess(self, log_t: Array) -> Array:
        """Loss-times near the targets, from a coarse geometric table of ln t."""
        end = np.minimum(self.sigma_stop, _FAR)  # (B, 1)
        unit = 1 / (self.motion.K0.sum(-1) + 2 * self.motion.omega.max(-1) + 1e-300)[:, None]
        j = np.arange(-40.0, 50.0, 0.25)
        free, bounded = unit * 2.0**j, end / (1 + 2.0**-j)
        grid = np.where(np.isfinite(self.sigma_stop) & (end < free[:, -1:]), bounded, np.minimum(free, end))
        rows = np.arange(len(grid))
        f = self._log_integrand(rows, grid)[0]
        f = np.where(np.isnan(f), np.inf, f)
        panels = np.logaddexp(f[:, 1:], f[:, :-1]) - np.log(2) + np.log(np.diff(grid, axis=1))
        first = (f[:, 0] + np.log(grid[:, 0]))[:, None]
        table = np.logaddexp.accumulate(np.concatenate([first, panels], axis=1), axis=1)
        out = np.empty_like(log_t)
        for i in rows:
            finite = np.isfinite(table[i]) & np.isfinite(f[i])
            x = np.interp(log_t[i], table[i][finite], np.log(grid[i][finite]))
            low = log_t[i] < table[i][0]
            out[i] = np.exp(np.where(low, np.log(grid[i][0]) + log_t[i] - table[i][0], x))
        return out
