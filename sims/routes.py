"""Routes that measure a problem without knowing a theorem: automatic differentiation, integration, training.

They share the formula of the loss with `theory`, and nothing else (`tests/test_layers.py` reads the imports).
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import mpmath
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sims.descent import Optimizer, train
from sims.flow import integrate
from sims.objective import Objective
from theory.losses import Pair, TokenLoss
from theory.ops import MPMATH
from theory.problem import Positions, Problem
from theory.theorems import Run

Array = NDArray[np.float64]


class Autodiff:
    """Automatic differentiation of the loss value and of ln pi, batched, float64."""

    name = "autodiff"
    tolerance = 1e-12

    def __init__(self) -> None:
        self._velocity: WeakKeyDictionary[Problem, tuple[Tensor, Tensor]] = WeakKeyDictionary()

    def velocity(self, problem: Problem) -> tuple[Array, Array]:
        """dW/dt (B, V, d) and dH/dt (B, n, d) of gradient flow."""
        dW, dH = self._velocities(problem)
        return dW.numpy(), dH.numpy()

    def _velocities(self, problem: Problem) -> tuple[Tensor, Tensor]:
        if problem not in self._velocity:
            W, H = leaves(problem)
            grad = torch.autograd.grad(Objective.of_problem(problem)(W, H).sum(), (W, H))
            self._velocity[problem] = -problem.lr_unembedding * grad[0], -problem.lr_hidden * grad[1]
        return self._velocity[problem]

    def gradient(self, problem: Problem, z: Positions) -> tuple[Tensor, Tensor]:
        """Gradients of ln pi(z) in W (B, V, d) and H (B, n, d)."""
        W, H = leaves(problem)
        log_pi = torch.log_softmax(H @ W.transpose(1, 2), dim=-1)
        in_W, in_H = torch.autograd.grad(log_pi[:, z.rows, z.tokens].sum(), (W, H))
        return in_W, in_H

    def rate(self, problem: Problem, z: Positions) -> Array:
        """(B,) d/dt ln pi(z): the chain rule through the velocity of the parameters."""
        pairs = zip(self.gradient(problem, z), self._velocities(problem), strict=True)
        return sum((g * v).sum((1, 2)) for g, v in pairs).numpy()  # type: ignore[union-attr]

    def inner(self, problem: Problem, v: Positions, w: Positions) -> Array:
        """(B,) <grad ln pi(v), grad ln pi(w)> in the metric of the rates."""
        rates = problem.lr_unembedding, problem.lr_hidden
        pairs = zip(rates, self.gradient(problem, v), self.gradient(problem, w), strict=True)
        return sum(r * (g * f).sum((1, 2)) for r, g, f in pairs).numpy()  # type: ignore[union-attr]


def leaves(problem: Problem) -> tuple[Tensor, Tensor]:
    """W and H as float64 tensors that record gradients."""
    W = torch.tensor(problem.W, dtype=torch.float64, requires_grad=True)
    H = torch.tensor(problem.H, dtype=torch.float64, requires_grad=True)
    return W, H


class Integrated:
    """Finite differences along an actually integrated flow, in 50 digits: no derivative formula at all.

    The gradient is a central difference of the loss value, the flow a Runge-Kutta step of order 4 each way, the rate a
    central difference of ln pi along it. Relative errors about 1e-20; a second or so per instance.
    """

    name = "integrated"
    tolerance = 1e-12
    digits = 50
    step, bump = mpmath.mpf(10) ** -11, mpmath.mpf(10) ** -16

    def __init__(self) -> None:
        self._ends: WeakKeyDictionary[Problem, list[tuple[list, list]]] = WeakKeyDictionary()

    def rate(self, problem: Problem, z: Positions) -> Array:
        """(B,) d/dt ln pi(z), one instance after the other."""
        loss = problem.loss
        if isinstance(loss, TokenLoss) or loss.uses_norms or (loss.coupled and len(problem.samples) > 1):
            raise ValueError(f"the route in 50 digits takes losses of one pair of log-probabilities, got {loss!r}")
        with mpmath.workdps(self.digits):
            if problem not in self._ends:
                self._ends[problem] = [self._one(problem, i) for i in range(len(problem))]
            size = problem.W[0].size, problem.W.shape[2]
            out = []
            for back, ahead in self._ends[problem]:
                change = _log_prob(ahead, *size, z) - _log_prob(back, *size, z)
                out.append(float(change / (2 * self.step)))
        return np.array(out)

    def _one(self, problem: Problem, i: int) -> tuple[list, list]:
        """Parameters one step before and one step after the i-th instance's."""
        loss, d, size = problem.loss, problem.W.shape[2], problem.W[0].size
        start = [mpmath.mpf(float(x)) for x in np.concatenate([problem.W[i].ravel(), problem.H[i].ravel()])]
        refs = [[mpmath.mpf(float(x)) for x in r] for r in problem.references[i]]

        def objective(x: list) -> Any:
            total = mpmath.mpf(0)
            for (w, l), r in zip(problem.pairs, refs, strict=True):
                a, b = _log_prob(x, size, d, w), _log_prob(x, size, d, l)
                total += loss.formula(MPMATH, Pair(a, b, r[0], r[1], len(w.tokens), len(l.tokens)))
            return total / len(refs)

        def velocity(x: list) -> list:
            out = []
            for j in range(len(x)):
                rate = problem.lr_unembedding if j < size else problem.lr_hidden
                up, down = [*x[:j], x[j] + self.bump, *x[j + 1 :]], [*x[:j], x[j] - self.bump, *x[j + 1 :]]
                out.append(-rate * (objective(up) - objective(down)) / (2 * self.bump) if rate else mpmath.mpf(0))
            return out

        return _runge_kutta(velocity, start, -self.step), _runge_kutta(velocity, start, self.step)


def _runge_kutta(velocity: Callable[[list], list], x: list, e: Any) -> list:
    """One classical step of order 4."""
    k1 = velocity(x)
    k2 = velocity([a + e / 2 * k for a, k in zip(x, k1, strict=True)])
    k3 = velocity([a + e / 2 * k for a, k in zip(x, k2, strict=True)])
    k4 = velocity([a + e * k for a, k in zip(x, k3, strict=True)])
    slopes = zip(x, k1, k2, k3, k4, strict=True)
    return [a + e / 6 * (p + 2 * q + 2 * r + s) for a, p, q, r, s in slopes]


def _log_prob(x: list, size: int, d: int, y: Positions) -> Any:
    """ln pi(y) of parameters in one list, W's rows first."""
    total = mpmath.mpf(0)
    for row, token in zip(y.rows, y.tokens, strict=True):
        h = x[size + row * d : size + (row + 1) * d]
        logits = [mpmath.fdot(x[v : v + d], h) for v in range(0, size, d)]
        top = max(logits)
        total += logits[token] - top - mpmath.log(mpmath.fsum(mpmath.exp(v - top) for v in logits))
    return total


class Simulated(Autodiff):
    """Parameters along gradient flow (DOP853 over the autodiff gradient) and along discrete training (torch)."""

    name = "simulated"
    tolerance = 1e-8  # what an integration at rtol 1e-11 keeps over the times used here, with a margin

    def flow(self, problem: Problem, times: Array, features: Array | None = None) -> Run:
        """Gradient flow of every instance; times (T,) non-decreasing. With `features` J (d, r) the parameters are W and
        theta, H = H0 + theta J^T: a body whose constant feature kernel is lr_hidden J J^T."""
        objective, (W, H) = Objective.of_problem(problem), (x.detach() for x in leaves(problem))
        rates = problem.lr_unembedding, problem.lr_hidden
        if features is None:
            return Run(*integrate(objective, W, H, times, *rates))
        J = torch.tensor(features)
        tied = replace(objective, hidden=lambda theta: H + theta @ J.T)
        grid, W_run, theta = integrate(tied, W, H.new_zeros(*H.shape[:2], J.shape[1]), times, *rates)
        return Run(grid, W_run, problem.H + theta @ features.T)

    def descent(self, problem: Problem, step: float, steps: int, method: str = "gradient") -> Run:
        """Training with learning rates step * (eta_W, eta_h): "gradient", "heavy_ball" or "nesterov" (0.9), "sign"."""
        optimizer = OPTIMIZERS[method](step)
        W, H = (x.detach() for x in leaves(problem))
        rates = problem.lr_unembedding, problem.lr_hidden
        return Run(*train(Objective.of_problem(problem), W, H, optimizer, steps, *rates))


OPTIMIZERS: dict[str, Callable[[float], Optimizer]] = {
    "gradient": lambda lr: Optimizer("sgd", lr),
    "heavy_ball": lambda lr: Optimizer("sgd", lr, momentum=0.9),
    "nesterov": lambda lr: Optimizer("sgd", lr, momentum=0.9, nesterov=True),
    "sign": lambda lr: Optimizer("sign", lr),
}
