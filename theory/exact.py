"""Gradient flow of a single-token preference pair in closed form (exact_solution E1-E8).

Parameters are never integrated. The path is algebraic in the margin and the same for every margin loss; a loss sets
only when each point is reached and where the flow stops.
"""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from theory._check import check_array, check_count, check_times
from theory.clock import Clock
from theory.displacement import (
    Displacement,
    alignment_ratio,
    critical_ratio,
    feature_alignment,
    limit_log_probs,
    summarise,
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
        return sweep(self.path, self.clock, self._sigma(times, log_times))[0]

    def pair_log_probs(self, times: ArrayLike | None = None, *, log_times: ArrayLike | None = None) -> Array:
        """(T, 2) ln pi of y+ and y- at times, as `log_probs` gives them, without holding the (T, V) table.

        For a language model's vocabulary: a block of tokens at a time, at a few times the cost of reading W once.
        """
        sigma = self._sigma(times, log_times)[0]
        ended = sigma > self.path.float_range(self.clock.direction)[0]
        out = self.path.pair_log_probs(self.direction * np.where(ended, 0.0, sigma))
        if ended.any():
            out[ended] = self.limit_log_probs()[list(self.model.single_pair)]
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

    # ---- margins

    def log_probs_at_margin(self, u: ArrayLike) -> Array:
        """(T, V) ln pi of every token where the margin is u (any order); the loss plays no part.

        Raises ValueError for a margin the path never reaches.
        """
        u = self._reachable(u)
        tau = self.path.motion.tau_at_margin(np.where(np.isfinite(u), u, self.start_margin)[None])
        inside = np.isfinite(u) & np.isfinite(tau[0])
        out = self.path.log_probs(np.where(inside, tau, 0.0))[0]
        for side in (-1.0, 1.0):  # the two ends of the path, which are only approached
            there = ~inside & (side * (u - self.start_margin) > 0)
            if there.any():
                end = float(self.path.motion.reach(np.array([side]))[0])
                out[there] = limit_log_probs(self.path, end, np.inf, side)
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
        return self._mean_rate / self.lr_unembedding

    @property
    def _mean_rate(self) -> float:
        """eta_h, or the mean eigenvalue of the feature kernel."""
        return float(np.trace(self.lr_hidden)) / self.model.d if np.ndim(self.lr_hidden) else float(self.lr_hidden)

    @cached_property
    def kappa_star(self) -> float:
        """The ratio kappa above which ln pi(y+) falls at the start; inf if no ratio does that."""
        return critical_ratio(self.path, self.alignment)

    @cached_property
    def r_max(self) -> float:
        """max over other tokens of <2 W_z - W_+ - W_-, a>/|a|^2: at most 1, this pair cannot displace at the start."""
        squares, k = (self.path.a0[0] ** 2).sum(-1), self.path.motion.k[0]  # by modes of the kernel
        weights = k / self._mean_rate if np.ndim(self.lr_hidden) and k.any() else np.ones_like(k)
        return alignment_ratio(self.alignment, float(weights @ squares), *self.model.single_pair)

    @cached_property
    def alignment(self) -> Array:
        """(V,) <W_z, a> with a = W_+ - W_-: who gains (Theorem 2); <W_z, Kf a> with Kf scaled to mean eigenvalue 1."""
        if np.ndim(self.lr_hidden) and self.path.motion.k.any():
            return feature_alignment(self.path) / self._mean_rate
        if self.path.motion.light_cone.any() or not self.path.motion.k.any():
            return inner_products(self.model.W, self.path.a0[0, :1].T)[:, 0]
        return self.path.second[0, :, 0]

    def displacement(self, top: int = 5) -> Displacement:
        """Status, every extremum, depth, return, who gains (`top` tokens each): see `Displacement`."""
        return summarise(
            self.path,
            self.clock,
            self.model.name,
            kappa=self.kappa,
            kappa_star=self.kappa_star,
            r_max=self.r_max,
            top=check_count(top, "top"),
        )


def sweep(path: Path, clock: Clock, sigma: Array) -> Array:
    """(B, T, V) ln pi of every token at loss-times sigma (B, T), and its limit where the logits leave float range."""
    ended = sigma > path.float_range(clock.direction)[:, None]
    out = path.log_probs(clock.direction[:, None] * np.where(ended, 0.0, sigma))
    for i in np.nonzero(ended.any(axis=1))[0]:
        one, stop = path.take(slice(i, i + 1)), float(clock.stop[i])
        out[i, ended[i]] = limit_log_probs(one, stop, float(clock.sigma_stop[i, 0]), float(clock.direction[i]))
    return out


def batch_log_probs(
    W: ArrayLike,
    h: ArrayLike,
    preferred: ArrayLike,
    dispreferred: ArrayLike,
    loss: Loss,
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
    form = margin_form(UnconstrainedFeatures.single_token(W[0], h[0], int(plus[0]), int(minus[0])), loss)
    clock = Clock(path.motion, MarginForm(form.loss, path.motion.start))
    with np.errstate(divide="ignore"):
        log_t = np.log(check_times(times, "times"))
    sigma = clock.sigma_at(np.broadcast_to(log_t, (B, len(log_t))))
    return sweep(path, clock, sigma)
