"""The alphas of Theorems 3, 6 and 7, and where they can lie."""

from dataclasses import replace

import numpy as np

from theory.problem import Positions, Problem
from theory.theorems._base import Array, Route, Sharpness, Theorem, excess, relative, widened
from theory.theorems.theorem_6 import alphas


class AlphaBounds(Theorem):
    """|alpha| <= 2 and <= |E||E'|; alpha^+_kk lies in [0, 2]: no token of a response opposes itself."""

    name = "alpha_bounds"
    statement = r"$|\alpha^\pm_{kk'}|\le|e-\pi|\,|e'-\pi'|\le2$ and $\alpha^+_{kk}=1-2\pi(y_k)+|\pi|^2\in[0,2]$"
    source = "Razin et al. 2024, Theorem 6; this project, bound 1"
    kind = "inequality"
    settings = ("sequences", "shared_prefix", "single_token")
    knobs = ("bound of 2", "bound of lengths", "own alpha")
    wrong_factors = (-1.0, 0.0, 0.5)
    sharpness = (
        Sharpness(
            "none",
            None,
            "both bounds are attained as pi concentrates on another token than y_k: the planted large logits come near",
        ),
    )

    def residual(self, problem: Problem, route: Route) -> Array:
        (w, l), B = problem.pairs[0], len(problem)
        plain = replace(problem, lr_unembedding=1.0, lr_hidden=0.0)
        # An extra coordinate 1 of every hidden vector adds alpha itself to the inner product of two gradients.
        zeros, ones = np.zeros((B, problem.V, 1)), np.ones((B, len(problem.contexts), 1))
        wide = widened(plain, zeros, ones)
        error = np.zeros(B)
        for closed, other in zip(alphas(problem), (l, w), strict=True):
            for k in range(len(w.rows)):
                for j in range(len(other.rows)):
                    v, u = (Positions(y.rows[i : i + 1], y.tokens[i : i + 1]) for y, i in ((w, k), (other, j)))
                    alpha = route.inner(wide, v, u) - route.inner(plain, v, u)
                    scale = 4 + abs(problem.overlap(v, u).hidden[:, 0, 0])
                    size = np.sqrt(closed_square(problem, v) * closed_square(problem, u))
                    error = np.maximum(error, relative(alpha - closed[:, k, j], scale))
                    error = np.maximum(error, excess(abs(alpha), self.k("bound of 2") * 2.0, scale))
                    error = np.maximum(error, excess(abs(alpha), self.k("bound of lengths") * size, scale))
                    if other is w and k == j:
                        own = self.k("own alpha") * closed_square(problem, v)
                        error = np.maximum(error, relative(alpha - own, scale))
                        error = np.maximum(error, excess(np.zeros(B), alpha, scale))
        return error


def closed_square(problem: Problem, y: Positions) -> Array:
    """(B,) |e_y - pi|^2 = 1 - 2 pi(y) + |pi|^2 of one position, as a sum of squares: no digits lost as pi(y) -> 1."""
    return (problem.errors(y)[:, 0] ** 2).sum(1)
