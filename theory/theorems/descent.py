"""Discrete training of a single-token pair: exact recursions, their invariants, and the order of the method."""

import numpy as np

from theory.problem import Problem
from theory.theorems._base import Array, Mask, Route, Sharpness, Theorem, everywhere, raises_margin
from theory.theorems._flow import (
    SINGLE_PAIR,
    form_of,
    is_single_margin,
    moving,
    smooth,
    speed_of,
    start_of,
    tame,
    times_for,
    worst,
)

_STEPS = 12


def step_for(problem: Problem) -> float:
    """A step far from a flow at which the fastest instance stays in float range (curvature included)."""
    slopes = (problem.incentive_sizes[0] / np.maximum(abs(problem.incentives[0]), 1e-300)).max(1)
    return 0.5 / max(float((speed_of(problem) * np.minimum(slopes, 50.0)).max()), 1e-6)


class GradientDescentRecursion(Theorem):
    """Gradient descent with any step: two vectors that scale replace all parameters; the flow's invariant drifts."""

    name = "gradient_descent_recursion"
    statement = (
        r"$p\leftarrow(1+\eta\omega G)p$, $q\leftarrow(1-\eta\omega G)q$ with $p,q=\sqrt{2\eta_W}h\pm\sqrt{\eta_h}a$;"
        r" $I_{k+1}=(1-\omega^2\eta^2G_k^2)I_k$ for $I=\eta_h|a|^2-2\eta_W|h|^2$"
    )
    source = "this project, E6"
    routes = ("simulated",)
    knobs = ("growth", "decay", "drift")
    tolerance = 1e-10  # float64 over a dozen steps, each of a size that a bad start may square
    sharpness = SINGLE_PAIR

    def applies(self, problem: Problem) -> Mask:
        both = problem.lr_unembedding > 0 and problem.lr_hidden > 0
        return is_single_margin(problem) & everywhere(problem, both)

    def measurable(self, problem: Problem) -> Mask:
        return tame(problem)

    def residual(self, problem: Problem, route: Route) -> Array:
        eta = step_for(problem)
        run, s = route.descent(problem, eta, _STEPS), start_of(problem)
        h, a, u = moving(problem, run)
        hs, as_ = np.sqrt(2 * problem.lr_unembedding) * h, np.sqrt(problem.lr_hidden) * a
        p, q = hs + as_, hs - as_
        G = np.stack([form_of(problem, i).slope(u[:, i]) for i in range(len(problem))], axis=1)
        by = (eta * s.omega * G[:-1])[..., None]
        size = 1 + abs(p).max((0, 2)) + abs(q).max((0, 2))
        invariant = (as_**2).sum(-1) - (hs**2).sum(-1)
        drift = invariant[1:] - (1 - self.k("drift") * by[..., 0] ** 2) * invariant[:-1]
        errors = [
            worst(p[1:] - (1 + self.k("growth") * by) * p[:-1], size),
            worst(q[1:] - (1 - self.k("decay") * by) * q[:-1], size),
            worst(drift, size**2),
        ]
        return np.max(errors, axis=0)


class FrozenGroupRecursion(Theorem):
    """One group frozen: the margin alone is iterated."""

    name = "frozen_group_recursion"
    statement = r"$\eta_W=0$ or $\eta_h=0$: gradient descent is $u\leftarrow u+\eta K_0G(u)$"
    source = "this project, E6"
    settings = ("fixed_unembeddings", "single_token")
    routes = ("simulated",)
    knobs = ("speed",)
    tolerance = 1e-10
    sharpness = (*SINGLE_PAIR, Sharpness("one group frozen", "single_token"))

    def applies(self, problem: Problem) -> Mask:
        frozen = problem.lr_unembedding == 0 or problem.lr_hidden == 0
        return is_single_margin(problem) & everywhere(problem, frozen)

    def measurable(self, problem: Problem) -> Mask:
        return tame(problem)

    def residual(self, problem: Problem, route: Route) -> Array:
        eta = step_for(problem)
        u = moving(problem, route.descent(problem, eta, _STEPS))[2]
        G = np.stack([form_of(problem, i).slope(u[:, i]) for i in range(len(problem))], axis=1)
        change = u[1:] - u[:-1] - self.k("speed") * eta * start_of(problem).K0 * G[:-1]
        return worst(change, 1 + abs(u).max(0))


class SignDescentDecouples(Theorem):
    """Sign descent moves every coordinate by itself, along the same path for every loss that decreases."""

    name = "sign_descent_decouples"
    statement = (
        r"Sign descent on a loss with $G>0$: $a_i\leftarrow a_i+2\eta\eta_W\,\mathrm{sgn}\,h_i$,"
        r" $h_i\leftarrow h_i+\eta\eta_h\,\mathrm{sgn}\,a_i$, whatever the loss"
    )
    source = "this project, E6"
    routes = ("simulated",)
    knobs = ("unembeddings", "hidden vector")
    tolerance = 1e-10
    sharpness = (*SINGLE_PAIR, Sharpness("a loss with G > 0", "past_the_minimiser"))

    def applies(self, problem: Problem) -> Mask:
        return is_single_margin(problem) & raises_margin(problem)

    def residual(self, problem: Problem, route: Route) -> Array:
        eta = 0.05
        h, a, u = moving(problem, route.descent(problem, eta, _STEPS, "sign"))
        # Rounding may leave a coordinate on either side of an exact zero: there the sign is anyone's.
        clear = (abs(h[:-1]) > 1e-9) & (abs(a[:-1]) > 1e-9)
        if problem.has_margin_loss:
            # The claim is about steps taken while the loss still pushes the margin up.
            G = np.stack([form_of(problem, i).slope(u[:-1, i]) for i in range(len(problem))], axis=1)
            clear &= ((G > 1e-9) | (G[0] <= 0))[..., None]
        moved_a = a[1:] - a[:-1] - self.k("unembeddings") * 2 * eta * problem.lr_unembedding * np.sign(h[:-1])
        moved_h = h[1:] - h[:-1] - self.k("hidden vector") * eta * problem.lr_hidden * np.sign(a[:-1])
        size = 1 + abs(a).max((0, 2)) + abs(h).max((0, 2))
        return worst(np.where(clear, abs(moved_a) + abs(moved_h), 0.0), size)


class OrderOfDescent(Theorem):
    """Gradient descent tends to the flow like its step: half of the step halves the error."""

    name = "order_of_descent"
    statement = r"$|\theta_{T/\eta}-\theta(T)|=C\eta+O(\eta^2)$"
    source = "this project, bound 6"
    kind = "limit"
    settings = ("single_token", "sequences", "data_set")
    routes = ("simulated",)
    knobs = ("half",)
    tolerance = 0.1  # of the ratio, at steps of 1/400 and 1/800 of the time
    sharpness = (Sharpness("a continuous slope", None, "past a kink the error is O(step) still, but need not halve"),)

    def applies(self, problem: Problem) -> Mask:
        return everywhere(problem, smooth(problem))

    def measurable(self, problem: Problem) -> Mask:
        return tame(problem)

    def residual(self, problem: Problem, route: Route) -> Array:
        end = times_for(problem)[-1] / 4
        exact = route.flow(problem, np.array([end]))
        gaps = []
        for steps in (400, 800):
            run = route.descent(problem, end / steps, steps)
            flat = [(x - y).reshape(len(problem), -1) for x, y in ((run.H[-1], exact.H[0]), (run.W[-1], exact.W[0]))]
            gaps.append(np.concatenate(flat, axis=1))
        size = (gaps[0] ** 2).sum(1)
        half = (gaps[0] * gaps[1]).sum(1) / np.where(size == 0, 1.0, size)
        seen = np.sqrt(size) > 1e-7 * (1 + abs(problem.H).max((1, 2)))
        return np.where(seen, abs(half - self.k("half") / 2), 0.0)
