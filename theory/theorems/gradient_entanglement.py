"""Gradient entanglement: when both probabilities fall, or both rise."""

import numpy as np

from theory.problem import Problem
from theory.theorems._base import Array, Mask, Route, Sharpness, Theorem, everywhere, relative


class GradientEntanglement(Theorem):
    """ln pi(y+) rises iff d_w |g_+|^2 >= d_l <g_+, g_->, ln pi(y-) falls iff d_w <g_+, g_-> <= d_l |g_-|^2."""

    name = "gradient_entanglement"
    statement = (
        r"One sample: $\frac{d}{dt}\ln\pi(y^+) = d_w|g_+|^2 - d_l\langle g_+,g_-\rangle$ and"
        r" $\frac{d}{dt}\ln\pi(y^-) = d_w\langle g_+,g_-\rangle - d_l|g_-|^2$, $g_\pm=\nabla\ln\pi(y^\pm)$"
    )
    source = "Yuan et al. 2024 (arXiv 2410.13828), condition 1, for any loss"
    settings = ("sequences", "shared_prefix", "weighted", "sft_regularised")
    routes = ("autodiff", "integrated")
    knobs = ("own gradient of y+", "common gradient, y+", "common gradient, y-", "own gradient of y-")
    sharpness = (Sharpness("one sample", "sequence_data_set"),)

    def applies(self, problem: Problem) -> Mask:
        return everywhere(problem, len(problem.samples) == 1)

    def residual(self, problem: Problem, route: Route) -> Array:
        w, l = problem.pairs[0]
        d_w, d_l = (d[:, 0] for d in problem.incentives)
        own_w, common, own_l = problem.inner(w, w), problem.inner(w, l), problem.inner(l, l)
        plus = self.k(self.knobs[0]) * d_w * own_w - self.k(self.knobs[1]) * d_l * common
        minus = self.k(self.knobs[2]) * d_w * common - self.k(self.knobs[3]) * d_l * own_l
        errors = [
            relative(predicted - route.rate(problem, z), problem.rate_scale(z))
            for predicted, z in ((plus, w), (minus, l))
        ]
        return np.maximum(*errors)
