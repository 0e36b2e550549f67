"""What gradient flow conserves for every loss, data set and context, and the closed system of inner products."""

import numpy as np

from theory.problem import Problem
from theory.theorems._base import Array, Mask, Route, Sharpness, Theorem, everywhere, relative
from theory.theorems._flow import FLOW_TOLERANCE, tame, times_for

_ALL = ("single_token", "sequences", "sequence_data_set", "sft_data_set", "weighted_data_set")


class Balancedness(Theorem):
    """W^T W / eta_W - H^T H / eta_h does not move: balancedness, as in deep linear networks."""

    name = "balancedness"
    statement = r"$\frac{d}{dt}\left(\eta_h W^\top W - \eta_W H^\top H\right) = 0$ for every loss, data set and context"
    source = "this project, E3; balancedness of deep linear networks (Arora et al. 2018)"
    settings = _ALL
    routes = ("autodiff", "simulated")
    knobs = ("unembeddings", "hidden vectors")
    sharpness = (
        Sharpness("unconstrained features", None, "a body that ties hidden vectors replaces eta_h by its kernel"),
    )

    def applies(self, problem: Problem) -> Mask:
        both = problem.lr_unembedding > 0 and problem.lr_hidden > 0
        return everywhere(problem, both)

    def measurable(self, problem: Problem) -> Mask:
        return tame(problem)

    def residual(self, problem: Problem, route: Route) -> Array:
        w, h = (self.k(name) for name in self.knobs)
        W, H = problem.W, problem.H

        def balance(W1: Array, W2: Array, H1: Array, H2: Array) -> Array:
            left = problem.lr_hidden * np.swapaxes(W1, -1, -2) @ W2
            return w * left - h * problem.lr_unembedding * np.swapaxes(H1, -1, -2) @ H2

        if route.name == "autodiff":
            dW, dH = route.velocity(problem)
            change = balance(dW, W, dH, H)
            sizes = abs(problem.lr_hidden * np.swapaxes(abs(dW), 1, 2) @ abs(W))
            return relative(abs(change + np.swapaxes(change, 1, 2)).max((1, 2)), sizes.max((1, 2)) + 1e-30)
        run = route.flow(problem, times_for(problem))
        change = balance(run.W, run.W, run.H, run.H) - balance(W, W, H, H)
        sizes = problem.lr_hidden * (run.W**2).sum((-1, -2)) + problem.lr_unembedding * (run.H**2).sum((-1, -2))
        return (abs(change).max((-1, -2)) / sizes).max(0) * (self.tolerance / FLOW_TOLERANCE)


class RowSum(Theorem):
    """The sum of all unembeddings stays where it is."""

    name = "row_sum"
    statement = r"$\frac{d}{dt}\sum_z W_z = 0$ for every loss, data set and context"
    source = "this project, E3"
    settings = _ALL
    routes = ("autodiff", "simulated")
    knobs = ("row of y+",)
    sharpness = (Sharpness("none", None, "an identity of softmax: it holds for every loss, data set and context"),)

    def measurable(self, problem: Problem) -> Mask:
        return tame(problem)

    def residual(self, problem: Problem, route: Route) -> Array:
        weights = np.ones(problem.V)
        weights[problem.samples[0].preferred[0]] = self.k("row of y+")
        if route.name == "autodiff":
            dW, _ = route.velocity(problem)
            return relative(abs(weights @ dW).max(1), abs(dW).sum((1, 2)))
        run = route.flow(problem, times_for(problem))
        change = weights @ (run.W - problem.W)
        return (abs(change).max(-1) / abs(problem.W).sum((1, 2))).max(0) * (self.tolerance / FLOW_TOLERANCE)


class ClosedSystem(Theorem):
    """L = H W^T, M = W W^T and N = H H^T close without d: what happens depends on inner products alone."""

    name = "closed_system"
    statement = (
        r"With $C=-\partial L/\partial\mathrm{logits}$: $\dot L=\eta_hCM+\eta_WNC$,"
        r" $\dot M=\eta_W(C^\top L+L^\top C)$, $\dot N=\eta_h(CL^\top+LC^\top)$"
    )
    source = "this project, E3"
    settings = _ALL
    routes = ("autodiff",)
    knobs = ("through h", "through W", "unembeddings", "hidden vectors")
    sharpness = (Sharpness("unconstrained features", None, "a feature kernel enters N', so N no longer closes it"),)

    def residual(self, problem: Problem, route: Route) -> Array:
        W, H, (dW, dH) = problem.W, problem.H, route.velocity(problem)
        t = lambda x: np.swapaxes(x, 1, 2)  # noqa: E731
        C = np.zeros((len(problem), len(problem.contexts), problem.V))
        for i, pair in enumerate(problem.pairs):
            for sign, d, y in zip((1, -1), problem.incentives, pair, strict=True):
                E = problem.errors(y) * (sign * d[:, i] / len(problem.pairs))[:, None, None]
                for k, row in enumerate(y.rows):
                    C[:, row] += E[:, k]
        L, M, N = H @ t(W), W @ t(W), H @ t(H)
        eta_W, eta_h = problem.lr_unembedding, problem.lr_hidden
        through_h, through_W, rows, hidden = (self.k(name) for name in self.knobs)
        sides = [
            (dH @ t(W) + H @ t(dW), through_h * eta_h * C @ M + through_W * eta_W * N @ C),
            (dW @ t(W) + W @ t(dW), rows * eta_W * (t(C) @ L + t(L) @ C)),
            (dH @ t(H) + H @ t(dH), hidden * eta_h * (C @ t(L) + L @ t(C))),
        ]
        # C by differentiation of the loss: sizes as in Problem.rate_scale, by the incentives' own terms.
        sizes = sum(s.sum(1) for s in problem.incentive_sizes)
        size = sizes * (eta_W + eta_h) * ((W**2).sum((1, 2)) + (H**2).sum((1, 2)))
        return np.max([relative(abs(x - y).max((1, 2)), size) for x, y in sides], axis=0)
