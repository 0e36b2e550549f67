"""Theorem 3: the hidden embeddings that make the preferred response's probability fall (CHES sets its alphas to 1)."""

import numpy as np

from theory.problem import Problem
from theory.theorems._base import (
    Array,
    Mask,
    Route,
    Sharpness,
    Theorem,
    everywhere,
    relative,
    widened,
)
from theory.theorems.theorem_6 import alphas


class Theorem3(Theorem):
    """Two models that differ in inner products of hidden vectors alone: the rate falls by G times the weighted change.

    Hidden vectors get coordinates orthogonal to every unembedding, so that all probabilities stay.
    """

    name = "theorem_3"
    statement = (
        r"At fixed probabilities and unembeddings, $G>0$: $\frac{d}{dt}\ln\pi(y^+|x)$ is the more negative the larger"
        r" $\sum_{k,k'}\alpha^-_{kk'}\langle h_{y^+_{<k}},h_{y^-_{<k'}}\rangle"
        r" - \sum_{k,k'}\alpha^+_{kk'}\langle h_{y^+_{<k}},h_{y^+_{<k'}}\rangle$"
    )
    source = "Razin et al. 2024, Theorem 3"
    settings = ("sequences", "shared_prefix", "single_token")
    routes = ("autodiff", "integrated")
    knobs = ("hidden vectors of y-", "hidden vectors of y+")
    sharpness = (
        Sharpness("one sample", "sequence_data_set"),
        Sharpness("a loss of the margin alone", "weighted"),
    )

    def applies(self, problem: Problem) -> Mask:
        return everywhere(problem, len(problem.samples) == 1 and problem.has_margin_loss)

    def residual(self, problem: Problem, route: Route) -> Array:
        (w, l), B = problem.pairs[0], len(problem)
        n = len(problem.contexts)
        # Coordinates of the contexts in the new dimensions: fixed, different for every context and instance.
        new = np.sin(np.arange(1, 2 * B * n + 1)).reshape(B, n, 2)
        after = widened(problem, np.zeros((B, problem.V, 2)), new)
        minus, plus = alphas(problem)
        h_w, h_l = new[:, w.rows], new[:, l.rows]
        against = np.einsum("bkl,bkd,bld->b", minus, h_w, h_l)
        own = np.einsum("bkl,bkd,bld->b", plus, h_w, h_w)
        G = problem.incentives[0][:, 0] * problem.lr_unembedding
        change = -G * (self.k("hidden vectors of y-") * against - self.k("hidden vectors of y+") * own)
        return relative(route.rate(after, w) - route.rate(problem, w) - change, after.rate_scale(w))
