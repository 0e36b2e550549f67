"""With fixed hidden embeddings one single-token pair cannot be displaced."""

from dataclasses import replace

import numpy as np

from theory.problem import Problem
from theory.theorems._base import (
    Array,
    Mask,
    Route,
    Sharpness,
    Theorem,
    everywhere,
    excess,
    is_single_token,
    raises_margin,
    relative,
)
from theory.theorems._single import Branch


class FixedFeatures(Theorem):
    """Only W trained: ln pi(y+) never falls, so squeezing alone does not explain displacement of one pair."""

    name = "fixed_features"
    statement = (
        r"$\eta_h=0$, one single-token pair, $G\ge0$: $\frac{d}{dt}\ln\pi_+ ="
        r" G\,\eta_W(1-\pi_++\pi_-)|h|^2 \ge 0$"
    )
    source = "this project; the single-sample case of the proposition added in version 4 of Razin et al."
    kind = "inequality"
    settings = ("single_token", "two_tokens")
    routes = ("autodiff", "integrated")
    knobs = ("hidden norm",)
    sharpness = (
        Sharpness("one sample", "data_set"),
        Sharpness("one-token responses", "sequences"),
    )

    def applies(self, problem: Problem) -> Mask:
        holds = is_single_token(problem) and problem.has_margin_loss
        return everywhere(problem, holds) & raises_margin(problem)

    def residual(self, problem: Problem, route: Route) -> Array:
        frozen = replace(problem, lr_hidden=0.0)
        x, z = Branch(frozen), frozen.pairs[0][0]
        rate, scale = route.rate(frozen, z), frozen.rate_scale(z)
        identity = self.k("hidden norm") * x.G * frozen.lr_unembedding * x.mass * x.hh
        return np.maximum(relative(rate - identity, scale), excess(np.zeros(len(rate)), rate, scale))
