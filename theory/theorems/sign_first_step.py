"""The first step of sign descent, which that of Adam or RMSprop is, up to a factor."""

import numpy as np

from theory.problem import Problem
from theory.theorems._base import Array, Mask, Route, Run, Sharpness, Theorem, raises_margin, relative
from theory.theorems._flow import SINGLE_PAIR, is_single_margin
from theory.theorems._single import Branch, dot


class SignFirstStep(Theorem):
    """Under sign descent |h|_1 takes the place of |h|^2 and the signs of W_+ - W_- that of the vector."""

    name = "sign_first_step"
    statement = (
        r"One single-token pair, $G>0$, a step $-\eta\,\mathrm{sgn}\nabla L$: to first order"
        r" $\Delta\ln\pi_+=\eta[\eta_W(1-\pi_++\pi_-)|h|_1+\eta_h\langle W_+-\bar W,\mathrm{sgn}(W_+-W_-)\rangle]$, so"
        r" $y^+$ falls iff $\kappa\langle\bar W-W_+,\mathrm{sgn}(W_+-W_-)\rangle>(1-\pi_++\pi_-)|h|_1$"
    )
    source = "this project, E6"
    routes = ("simulated",)
    knobs = ("length of h", "alignment")
    tolerance = 1e-9  # a difference of order 4 along the step
    sharpness = (*SINGLE_PAIR, Sharpness("a loss with G > 0", "past_the_minimiser"))

    def applies(self, problem: Problem) -> Mask:
        return is_single_margin(problem) & raises_margin(problem)

    def measurable(self, problem: Problem) -> Mask:
        # Rounding may leave a coordinate on either side of an exact zero: there the sign is anyone's.
        x = Branch(problem)
        return np.all((abs(x.h) > 1e-9) & (abs(x.a) > 1e-9), axis=1)

    def residual(self, problem: Problem, route: Route) -> Array:
        x, z = Branch(problem), problem.pairs[0][0]
        signs, eta_W, eta_h = np.sign(x.a), problem.lr_unembedding, problem.lr_hidden
        along = np.einsum("bvd,bd->bv", problem.W, signs)
        through_W = eta_W * x.mass * abs(x.h).sum(1)
        through_h = eta_h * (along[:, x.plus] - dot(x.p, along))
        closed = self.k("length of h") * through_W + self.k("alignment") * through_h
        eta = 1e-3
        step = route.descent(problem, eta, 1, "sign")
        W, H = step.W[1] - step.W[0], step.H[1] - step.H[0]
        # ln pi(y+) on the line through the step, one and two fifths of it ahead and behind.
        at = 0.2 * np.array([-2, -1, 1, 2])[:, None, None, None]
        values = Run(at[:, 0, 0, 0], problem.W + at * W, problem.H + at * H).log_prob(z)
        measured = (values[0] - 8 * values[1] + 8 * values[2] - values[3]) / (12 * 0.2 * eta)
        size = eta_W * abs(x.h).sum(1) + eta_h * abs(problem.W).sum(2).max(1)
        return relative(measured - closed, size * (1 + size**4))
