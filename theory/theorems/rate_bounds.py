"""Bounds on rates that hold for every response."""

import numpy as np

from theory.problem import Positions, Problem
from theory.theorems._base import (
    Array,
    Mask,
    Route,
    Sharpness,
    Theorem,
    everywhere,
    excess,
    probe_of,
    relative,
)


class CauchySchwarz(Theorem):
    """No response moves faster than the lengths of its own gradient and of the margin's allow."""

    name = "cauchy_schwarz"
    statement = r"One sample: $|\frac{d}{dt}\ln\pi(z)| \le |G|\,|\nabla\ln\pi(z)|\,|\nabla u|$"
    source = "this project, bound 2"
    kind = "inequality"
    settings = ("two_tokens", "single_token", "sequences", "shared_prefix")
    routes = ("autodiff", "integrated")
    knobs = ("bound",)
    wrong_factors = (-1.0, 0.0, 0.5)
    sharpness = (
        Sharpness("one sample", "sequence_data_set"),
        Sharpness("a loss of the margin alone", "sft_regularised"),
    )

    def applies(self, problem: Problem) -> Mask:
        return everywhere(problem, len(problem.samples) == 1 and problem.has_margin_loss)

    def residual(self, problem: Problem, route: Route) -> Array:
        z, (w, l) = probe_of(problem), problem.pairs[0]
        of_margin = problem.inner(w, w) - 2 * problem.inner(w, l) + problem.inner(l, l)
        squares = np.maximum(of_margin, 0.0) * np.maximum(problem.inner(z, z), 0.0)
        bound = abs(problem.incentives[0][:, 0]) * np.sqrt(squares)
        return excess(abs(route.rate(problem, z)), self.k("bound") * bound, problem.rate_scale(z))


class Normalisation(Theorem):
    """Probability is only moved about."""

    name = "normalisation"
    statement = r"$\sum_z \pi(z|x)\,\frac{d}{dt}\ln\pi(z|x) = 0$ in every context"
    source = "this project, bound 2"
    settings = ("single_token", "data_set", "sequence_data_set")
    routes = ("autodiff", "integrated")
    knobs = ("share of y+",)
    sharpness = (Sharpness("none", None, "an identity of softmax: it holds for every loss, data set and context"),)

    def residual(self, problem: Problem, route: Route) -> Array:
        error = np.zeros(len(problem))
        for row in range(len(problem.contexts)):
            total, scale = np.zeros((2, len(problem)))
            for token in range(problem.V):
                z = Positions((row,), (token,))
                knob = self.k("share of y+") if token == problem.pairs[0][0].tokens[0] else 1.0
                p = problem.pi[:, row, token]
                total += knob * p * route.rate(problem, z)
                scale += p * problem.rate_scale(z)
            error = np.maximum(error, relative(total, scale))
        return error
