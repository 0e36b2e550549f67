"""Gradient flow of any loss in arc length of parameter space, so that losses whose scales differ by 1e6 cost the same.

With one coordinate per parameter scaled by the root of its rate, x' = -g/|g| and dt = ds/|g|: the curve of the flow in
time, walked at unit speed. Gradients come from the objective by automatic differentiation. Where a kink, a minimum or
a valley holds the solver, implicit steps of bounded length take over: first order, but neither stiff nor stopped by
kinks (along one they move to and fro by up to their length).
"""

from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.integrate import DOP853
from scipy.interpolate import CubicSpline
from scipy.optimize import brentq
from scipy.special import log_softmax, logsumexp

from sims.objective import Objective
from theory._check import SolverError
from theory.losses import Loss
from theory.model import UnconstrainedFeatures
from theory.problem import Problem

Array = NDArray[np.float64]
End = Literal["margin", "stationary", "budget", "float"]

RTOL, ATOL = 1e-9, 1e-10
PER_STEP = 12  # points kept of every step of the solver
FLOOR = 1e-290  # |g| below this has lost its direction to underflow
FADED = 1e-100  # of the largest |g| so far: what vanishes from below this has underflowed, not come to rest
SHORT = 1e-6  # a step of the solver below this: held at a kink or a minimum
MAX_GRADIENTS = 450  # of the solver; smooth curves take 100 to 250
STRIDES = 150  # implicit steps that the margin asked for is cut into; no ln pi moves further than that in one
MAX_STEPS = 250
TINY = float(np.finfo(float).tiny)


def length(g: Array) -> Array:
    """Norms along the last axis without squares that underflow."""
    largest = np.abs(g).max(-1, keepdims=True)
    return largest[..., 0] * np.linalg.norm(g / np.where(largest > 0, largest, 1.0), axis=-1)


@dataclass(frozen=True, eq=False)
class Landscape:
    """A model, a loss and the rates as a function of one vector x: the displacement of all parameters, each divided by
    the root of its rate."""

    model: UnconstrainedFeatures
    objective: Objective
    scale: tuple[float, float]  # roots of the rates of W and H

    @classmethod
    def of(cls, model: UnconstrainedFeatures, loss: Loss, eta_W: float = 1.0, eta_h: float = 1.0) -> "Landscape":
        return cls(model, Objective.of_problem(Problem.of([model], loss, eta_W, eta_h)), (eta_W**0.5, eta_h**0.5))

    @property
    def size(self) -> int:
        return self.model.W.size + self.model.H.size

    @property
    def start(self) -> Array:
        """(1, size) zeros."""
        return np.zeros((1, self.size))

    def parameters(self, x: Array) -> tuple[Array, Array]:
        """W (B, V, d), H (B, n, d) at x (B, size)."""
        dW, dH = np.split(x, [self.model.W.size], axis=-1)
        W = self.model.W + self.scale[0] * dW.reshape(-1, *self.model.W.shape)
        return W, self.model.H + self.scale[1] * dH.reshape(-1, *self.model.H.shape)

    def _scaled(self, grads: Any, B: int) -> Array:
        parts = [c * g.numpy().reshape(B, -1) for c, g in zip(self.scale, grads, strict=True)]
        return np.concatenate(parts, axis=1)

    def gradient(self, x: Array) -> Array:
        """(B, size) of the objective at x (B, size)."""
        W, H = (torch.from_numpy(p).requires_grad_() for p in self.parameters(x))
        value = self.objective(W, H).sum()
        return self._scaled(torch.autograd.grad(value, (W, H), materialize_grads=True), len(x))

    def speed(self, x: Array) -> Array:
        """(B,) |g|."""
        return length(self.gradient(x))

    def pair_gradients(self, x: Array) -> Array:
        """(2, S, size) of ln pi(y+) and of ln pi(y-) of every sample at x (size,)."""
        groups = self.objective.groups
        B = 2 * len(groups)
        W, H = (torch.from_numpy(np.repeat(p, B, axis=0)).requires_grad_() for p in self.parameters(x[None]))
        log_pi = torch.log_softmax(H @ W.transpose(1, 2), dim=-1)
        responses = [group[i] for i in (0, 1) for group in groups]
        total = sum(log_pi[i, list(rows), list(y)].sum() for i, (rows, y) in enumerate(responses))
        return self._scaled(torch.autograd.grad(total, (W, H)), B).reshape(2, len(groups), -1)  # type: ignore[arg-type]

    def log_pi(self, x: Array) -> Array:
        """(B, n, V) ln pi(. | context)."""
        W, H = self.parameters(x)
        return log_softmax(H @ W.transpose(0, 2, 1), axis=-1)

    def pair(self, x: Array) -> Array:
        """(2, B, S) ln pi(y+) and ln pi(y-), nats."""
        log_pi = self.log_pi(x)
        each = [[log_pi[:, list(g[i][0]), list(g[i][1])].sum(-1) for g in self.objective.groups] for i in (0, 1)]
        return np.array(each).transpose(0, 2, 1)

    def change(self, x: Array) -> tuple[Array, Array]:
        """(B,) each: margin gained and change of ln pi(y+) since the start, means over the samples, nats."""
        a, b = self.pair(np.concatenate([self.start, x])).mean(-1)
        return (a - b)[1:] - (a - b)[0], a[1:] - a[0]

    def with_loss(self, loss: Loss) -> "Landscape":
        """The same model and references under another loss of pairs."""
        return replace(self, objective=replace(self.objective, loss=loss))


@dataclass(frozen=True, eq=False)
class Walk:
    """A walked curve: points x (K, size), ln t there (K,; -inf at the start), why it ended, and how it was walked."""

    x: Array
    log_times: Array
    end: End
    implicit: int  # how many of the points are ends of implicit steps


def walk(land: Landscape, margin: float, per_step: int = PER_STEP) -> Walk:
    """From the start until the mean margin has changed by `margin`, or nothing moves."""
    g = land.gradient(land.start)[0]
    if not np.isfinite(g).all():
        raise SolverError(f"the gradient of {land.objective.loss!r} is not finite at the start")
    if not g.any():
        return Walk(land.start, np.array([-np.inf]), "stationary", 0)
    s, x, end, fastest = _by_solver(land, margin, per_step)
    log_times = _clock(s, land.speed(x))
    if end is not None:
        return Walk(x, log_times, end, 0)
    more, tau, end = _by_steps(land, x[-1], margin, fastest)
    times = np.logaddexp.accumulate(np.append(log_times[-1], np.log(tau)))
    return Walk(np.concatenate([x, more]), np.concatenate([log_times[:-1], times]), end, len(more))


def _vanished(speed: float, fastest: float) -> End:
    """Why a gradient that was last seen at this speed is gone."""
    return "float" if speed <= FADED * fastest else "stationary"


def _clock(s: Array, speed: Array) -> Array:
    """(K,) ln of the integral of ds/|g|."""
    if len(s) < 2:
        return np.full(len(s), -np.inf)
    slowness = CubicSpline(s, -np.log(np.maximum(speed, TINY)))
    nodes, weights = np.polynomial.legendre.leggauss(4)
    width = np.diff(s)[:, None]
    pieces = logsumexp(slowness(s[:-1, None] + width * (nodes + 1) / 2), b=weights * width / 2, axis=1)
    return np.concatenate([[-np.inf], np.logaddexp.accumulate(pieces)])


def _by_solver(land: Landscape, margin: float, per_step: int) -> tuple[Array, Array, End | None, float]:
    """s (K,), x (K, size), why it ended (None: held), the largest |g|."""

    def field(_: float, x: Array) -> Array:
        g = land.gradient(x[None])[0]
        return -g / max(float(length(g)), TINY)

    gained = lambda x: float(land.change(x[None])[0][0])  # noqa: E731
    solver = DOP853(field, 0.0, land.start[0], np.inf, rtol=RTOL, atol=ATOL)
    speed = fastest = float(land.speed(land.start)[0])
    s, x, end = [0.0], [land.start[0]], None
    while end is None and solver.nfev < MAX_GRADIENTS:
        solver.step()
        if solver.status != "running" or float(solver.step_size or 0.0) < SHORT:
            break
        curve, last = solver.dense_output(), float(solver.t)
        if abs(gained(solver.y)) >= margin:
            end = "margin"
            beyond = lambda s, curve=curve: abs(gained(curve(s))) - margin  # noqa: E731
            last: Any = brentq(beyond, float(solver.t_old), last, xtol=1e-12)  # type: ignore[arg-type]
        at = np.linspace(float(solver.t_old), last, per_step + 1)[1:]  # type: ignore[arg-type]
        s += list(at)
        x += list(curve(at).T)
        before, speed = speed, float(land.speed(solver.y[None])[0])
        fastest = max(fastest, speed)
        if end is None and speed <= FLOOR:
            end = _vanished(speed or before, fastest)
    if end is None:  # a loss that is flat beyond its kink stands still there
        ahead = x[-1] + max(10 * SHORT, 10 * float(solver.step_size or 0.0)) * field(0.0, x[-1])
        if float(land.speed(ahead[None])[0]) <= FLOOR:
            end = _vanished(speed, fastest)
            x.append(_edge(land, x[-1], ahead))
            s.append(s[-1] + float(np.linalg.norm(x[-1] - x[-2])))
    return np.array(s), np.array(x), end, fastest


def _edge(land: Landscape, moving: Array, still: Array) -> Array:
    """Where the gradient vanishes between two points, by bisection; still on the moving side."""
    for _ in range(30):
        middle = (moving + still) / 2
        moving, still = (moving, middle) if float(land.speed(middle[None])[0]) <= FLOOR else (middle, still)
    return moving


def _by_steps(land: Landscape, x: Array, margin: float, fastest: float) -> tuple[Array, Array, End]:
    """Points (K, size), durations (K,) of the steps x <- x - tau (1 + tau Q)^-1 g, and why they ended.

    A step moves no ln pi(y+) or ln pi(y-) by more than margin/STRIDES.

    Q is the loss's curvature in the plane of the gradients of ln pi(y+) and ln pi(y-), where all stiffness is, by
    differences over the length of a step: a kink within that length looks like strong curvature, which stops the step.
    """
    stride = margin / STRIDES
    points, durations, moved, tau, speed = [x], [], [], 0.0, 0.0
    done = lambda end: (np.array(points[1:]).reshape(-1, land.size), np.array(durations), end)  # noqa: E731
    for _ in range(MAX_STEPS):
        J = land.pair_gradients(x).reshape(-1, land.size)
        V = np.linalg.qr(J.T)[0].T  # (2S, size)
        reach = stride / max(float(np.linalg.norm(J, axis=1).max()), TINY) / 2
        g = land.gradient(np.concatenate([x[None], x + reach * V, x - reach * V]))
        if not np.isfinite(g).all():
            return done("float")
        before, speed = speed, float(length(g[0]))
        if speed <= FLOOR:
            return done(_vanished(speed or before, fastest))
        tau = tau or reach / speed
        Q = (g[1 : len(V) + 1] - g[len(V) + 1 :]) @ V.T / (2 * reach)
        values, basis = np.linalg.eigh((Q + Q.T) / 2)
        inside = basis.T @ (V @ g[0])  # the gradient in the plane, in its principal directions
        outside = g[0] - V.T @ (V @ g[0])

        def step(tau: float) -> Array:
            damped = inside / (1 + tau * np.maximum(values, 0))  # noqa: B023
            return -tau * (outside + V.T @ (basis @ damped))  # noqa: B023

        tau *= 2
        while np.abs(J @ step(tau)).max() > stride or np.linalg.norm(step(tau)) > reach * 20:
            tau /= 2
        x = x + step(tau)
        points.append(x)
        durations.append(tau)
        moved.append(land.pair(x[None]))
        if abs(land.change(x[None])[0][0]) >= margin:
            return done("margin")
        if len(moved) > 20 and np.abs(moved[-1] - moved[-21]).max() < 1e-4:
            return done("stationary")
    return done("budget")
