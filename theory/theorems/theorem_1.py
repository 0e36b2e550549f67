"""Theorem 1: the inner products that make the preferred token's probability fall."""

import numpy as np

from theory.problem import Problem
from theory.theorems._base import (
    Array,
    Mask,
    Route,
    Sharpness,
    Theorem,
    everywhere,
    is_single_token,
    relative,
    widened,
)
from theory.theorems._single import Branch


class Theorem1(Theorem):
    """Two models that differ in <W_+, W_-> and <W_z, W_+ - W_-> alone: the rate falls by G times the change of the sum.

    The inner products are changed along directions orthogonal to every hidden vector, so that all probabilities and the
    norms of W_+ and W_- stay.
    """

    name = "theorem_1"
    statement = (
        r"At fixed probabilities and norms, $G>0$: $\frac{d}{dt}\ln\pi_+$ is the more negative the larger"
        r" $(1-\pi_++\pi_-)\langle W_+,W_-\rangle + \sum_{z\neq\pm}\pi_z\langle W_z,W_+-W_-\rangle$"
    )
    source = "Razin et al. 2024, Theorem 1"
    routes = ("autodiff", "integrated")
    knobs = ("alignment of W_+ and W_-", "other tokens, weighted")
    sharpness = (Sharpness("one sample of one-token responses", "sequences"),)

    def applies(self, problem: Problem) -> Mask:
        return everywhere(problem, is_single_token(problem) and problem.has_margin_loss)

    def residual(self, problem: Problem, route: Route) -> Array:
        x, B = Branch(problem), len(problem)
        # cos of the new angle between W_+ and W_- and the other tokens' new coordinates: fixed, spread over instances
        cosine, shift = np.cos(np.linspace(0.3, 2.8, B)), np.linspace(-1, 1, problem.V)
        plain, turned = np.zeros((2, B, problem.V, 2))
        plain[:, x.plus] = turned[:, x.plus] = (1, 0)
        plain[:, x.minus] = (0, 1)
        turned[:, x.minus] = np.stack([cosine, np.sqrt(1 - cosine**2)], axis=1)
        turned[:, x.others, 0] = shift[x.others]
        H = np.zeros((B, len(problem.contexts), 2))
        before, after = widened(problem, plain, H), widened(problem, turned, H)
        z = problem.pairs[0][0]
        aligned = x.mass * cosine
        others = (x.p[:, x.others] @ shift[x.others]) * (1 - cosine)
        change = -x.G * problem.lr_hidden * (self.k(self.knobs[0]) * aligned + self.k(self.knobs[1]) * others)
        return relative(route.rate(after, z) - route.rate(before, z) - change, after.rate_scale(z))
