"""Theorem 2: who gains."""

import numpy as np

from theory.problem import Positions, Problem
from theory.theorems._base import Array, Mask, Route, Sharpness, Theorem, everywhere, is_single_token, relative
from theory.theorems._single import Branch


class Theorem2(Theorem):
    """Of any two tokens other than y+ and y-, the one better aligned with W_+ - W_- gains on the other."""

    name = "theorem_2"
    statement = (
        r"$\frac{d}{dt}\ln\frac{\pi_z}{\pi_{z'}} = G\,\langle W_z-W_{z'},W_+-W_-\rangle$ for $z,z'\neq y^+,y^-$:"
        r" for $G>0$ the tokens that gain most are those aligned with $W_+-W_-$"
    )
    source = "Razin et al. 2024, Theorem 2"
    routes = ("autodiff", "integrated")
    knobs = ("alignment",)
    sharpness = (
        Sharpness("one sample", "data_set"),
        Sharpness("one-token responses", "sequences"),
    )

    def applies(self, problem: Problem) -> Mask:
        return everywhere(problem, is_single_token(problem) and problem.has_margin_loss and problem.V > 3)

    def residual(self, problem: Problem, route: Route) -> Array:
        x = Branch(problem)
        # Where the hypothesis is dropped, every token there is.
        others = np.nonzero(x.others)[0] if problem.V > 3 else np.arange(problem.V)
        v, w = (Positions((x.row,), (int(t),)) for t in others[[0, -1]])
        change = x.G * problem.lr_hidden * (x.along[:, v.tokens[0]] - x.along[:, w.tokens[0]])
        seen = route.rate(problem, v) - route.rate(problem, w)
        scale = problem.rate_scale(v) + problem.rate_scale(w)
        return relative(self.k("alignment") * change - seen, scale)
