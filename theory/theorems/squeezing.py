"""The squeezing effect of pushing one token down with fixed features, and its cancellation in a pair."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy.special import logsumexp

from theory.losses import Loss, Pair
from theory.ops import Ops
from theory.problem import Problem
from theory.theorems._base import Array, Mask, Route, Sharpness, Theorem, everywhere, is_single_token, relative
from theory.theorems._flow import is_single_margin
from theory.theorems._single import Branch


@dataclass(frozen=True)
class PushDown(Loss):
    """ln pi(y-): the negative gradient alone."""

    name = "push_down"
    reference = "Ren & Sutherland 2024 (arXiv 2407.10490)"

    def formula(self, ops: Ops, y: Pair) -> Any:
        return y.b


class Squeezing(Theorem):
    """One step down on y- with fixed features: y- falls, the largest other token rises, most others fall."""

    name = "squeezing"
    statement = (
        r"One descent step on $\ln\pi_-$, $\eta'=\eta\eta_W|h|^2$: $\frac{\pi'_i}{\pi_i}\propto"
        r" e^{\eta'(\pi_i-1[i=y^-])}$, so $y^-$ falls and the largest other token rises; to first order $i\neq y^-$"
        r" gains iff $\pi_i>|\pi|^2-\pi_-$"
    )
    source = "Ren & Sutherland 2024 (arXiv 2407.10490)"
    routes = ("simulated",)
    knobs = ("own probability", "the token pushed")
    sharpness = (
        Sharpness("fixed features", None, "with h trained the step is Theorem 5's; the setting has eta_h = 0"),
        Sharpness("one context", "sequences"),
    )

    def applies(self, problem: Problem) -> Mask:
        return everywhere(problem, is_single_token(problem))

    def residual(self, problem: Problem, route: Route) -> Array:
        pushed = replace(problem, loss=PushDown(), lr_unembedding=1.0, lr_hidden=0.0)
        x, eta = Branch(pushed), 0.4
        run = route.descent(pushed, eta, 1)
        after = run.log_pi(x.row)[1]
        push = self.k("own probability") * x.p
        push[:, x.minus] -= self.k("the token pushed")
        tilted = pushed.log_pi[:, x.row] + eta * x.hh[:, None] * push
        closed = tilted - logsumexp(tilted, axis=1, keepdims=True)
        error = abs(after - closed).max(1) / (1 + abs(after).max(1))
        moved = x.hh > 1e-6
        largest = np.where(np.arange(problem.V) == x.minus, -1.0, x.p).argmax(1)
        rows = np.arange(len(problem))
        gain = after - pushed.log_pi[:, x.row]
        wrong = moved & ((gain[:, x.minus] > 1e-12) | (gain[rows, largest] < -1e-12))
        return np.where(wrong, 1.0, error)


class PairCancelsSqueezing(Theorem):
    """In one context the probabilities of a pair's two terms cancel: logits move along e_+ - e_- alone."""

    name = "pair_cancels_squeezing"
    statement = (
        r"One single-token pair, fixed features: a step moves the logits by $\eta'G(e_+-e_-)$, so"
        r" $\ln\pi_+$ rises for $G>0$, to first order by $\eta'G(1-\pi_++\pi_-)$: squeezing alone does not displace"
    )
    source = "Ren & Sutherland 2024 (arXiv 2407.10490); the cancellation is this project's"
    routes = ("simulated",)
    knobs = ("y+", "y-")
    sharpness = (
        Sharpness("a pair with equal weights", "weighted"),
        Sharpness("one-token responses", "sequences"),
    )

    def applies(self, problem: Problem) -> Mask:
        return is_single_margin(problem)

    def residual(self, problem: Problem, route: Route) -> Array:
        fixed = replace(problem, lr_unembedding=1.0, lr_hidden=0.0)
        x, eta = Branch(fixed), 0.1
        run = route.descent(fixed, eta, 1)
        logits = run.logits(x.row)
        moved = logits[1] - logits[0]
        closed = np.zeros_like(moved)
        closed[:, x.plus] = self.k("y+") * eta * x.G * x.hh
        closed[:, x.minus] = -self.k("y-") * eta * x.G * x.hh
        size = abs(logits).max((0, 2)) + eta * fixed.incentive_sizes[0][:, 0] * x.hh
        return relative(abs(moved - closed).max(1), size + 1e-300)
