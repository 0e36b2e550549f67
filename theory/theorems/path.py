"""The path of a single-token pair: algebraic in the margin, the same for every margin loss, and its clock."""

from dataclasses import replace

import numpy as np

from theory.exact import ExactFlow
from theory.losses import MarginLoss, get
from theory.problem import Problem
from theory.theorems._base import Array, Mask, Route, Sharpness, Theorem, everywhere, relative
from theory.theorems._flow import (
    FLOW_TOLERANCE,
    SINGLE_PAIR,
    is_single_margin,
    moving,
    smooth,
    start_of,
    tame,
    times_for,
    worst,
)
from theory.theorems._single import Branch


class PathFormula(Theorem):
    """At margin u every parameter is known: two inner products per token give the whole distribution."""

    name = "path_formula"
    statement = (
        r"$h=\frac{h_0+\eta_h\theta a_0}{\sqrt{1-\omega^2\theta^2}}$, $a=\frac{a_0+2\eta_W\theta h_0}"
        r"{\sqrt{1-\omega^2\theta^2}}$, $\theta=\frac{2(u-u_0)}{K_0+K(u)}$, $K(u)=\sqrt{PQ+4\omega^2u^2}$;"
        r" $W_++W_-$ and every other row are constant"
    )
    source = "this project, E1, E2"
    routes = ("simulated",)
    knobs = ("theta", "growth of h", "growth of a")
    tolerance = FLOW_TOLERANCE
    sharpness = SINGLE_PAIR

    def applies(self, problem: Problem) -> Mask:
        return is_single_margin(problem)

    def measurable(self, problem: Problem) -> Mask:
        return tame(problem)

    def residual(self, problem: Problem, route: Route) -> Array:
        run, s, x = route.flow(problem, times_for(problem)), start_of(problem), Branch(problem)
        h, a, u = moving(problem, run)
        # P Q = K0^2 - 4 omega^2 u0^2 and K(u)^2 = P Q + 4 omega^2 u^2
        K = np.sqrt(np.maximum(s.K0**2 + 4 * s.omega**2 * (u**2 - s.u0**2), 0.0))
        total = s.K0 + K
        theta = self.k("theta") * 2 * (u - s.u0) / np.where(total == 0, 1.0, total)
        # cosh(omega tau); a wrong theta may leave the light cone, where the formula has no value
        grow = (1 / np.sqrt(np.maximum(1 - (s.omega * theta) ** 2, 1e-12)))[..., None]
        h_closed = grow * (s.h + self.k("growth of h") * problem.lr_hidden * theta[..., None] * s.a)
        a_closed = grow * (s.a + self.k("growth of a") * 2 * problem.lr_unembedding * theta[..., None] * s.h)
        size = 1e-3 + abs(problem.W).max((1, 2)) + abs(h).max((0, 2)) + abs(a).max((0, 2))
        still = run.W - problem.W
        still[:, :, [x.plus, x.minus]] = (still[:, :, x.plus] + still[:, :, x.minus])[:, :, None]
        errors = [worst(h - h_closed, size), worst(a - a_closed, size), worst(still, size)]
        return np.max(errors, axis=0)


class PathUniversality(Theorem):
    """Two losses move the parameters in one direction: they walk one curve, at different speeds."""

    name = "path_universality"
    statement = (
        r"One sample: every margin loss walks the integral curve of $\nabla u$,"
        r" $\dot\theta_1/G_1=\dot\theta_2/G_2=\nabla u$: at equal margins two losses have equal $\pi$"
    )
    source = "this project, E2"
    settings = ("single_token", "sequences", "shared_prefix")
    routes = ("autodiff",)
    knobs = ("slope of the other loss",)
    sharpness = (
        Sharpness("one sample", "sequence_data_set"),
        Sharpness("a loss of the margin alone", "weighted"),
    )

    def applies(self, problem: Problem) -> Mask:
        return everywhere(problem, len(problem.samples) == 1 and problem.has_margin_loss)

    def residual(self, problem: Problem, route: Route) -> Array:
        other = replace(problem, loss=get("gpo_savage", beta=0.8))
        slopes = [x.incentives[0][:, 0][:, None, None] for x in (problem, other)]
        sizes = [sum(size[:, 0] for size in x.incentive_sizes) for x in (problem, other)]
        k, error = self.k(self.knobs[0]), np.zeros(len(problem))
        # The parameters of the other group are what the gradient of u is made of.
        made_of = problem.lr_unembedding * abs(problem.H).max((1, 2)), problem.lr_hidden * abs(problem.W).max((1, 2))
        for v, w, size in zip(route.velocity(problem), route.velocity(other), made_of, strict=True):
            gap = abs(v * k * slopes[1] - w * slopes[0]).max((1, 2))
            error = np.maximum(error, relative(gap, sizes[0] * sizes[1] * size))
        return error


class ClockTheorem(Theorem):
    """One scalar equation: the flow has margin u at the time the integral of 1/(G K) says."""

    name = "clock"
    statement = r"$\frac{du}{dt}=G(u)K(u)$, hence $t(u)=\int_{u_0}^u\frac{dv}{G(v)K(v)}$"
    source = "this project, E1"
    routes = ("simulated",)
    knobs = ("speed",)
    tolerance = FLOW_TOLERANCE
    sharpness = SINGLE_PAIR

    def applies(self, problem: Problem) -> Mask:
        still = problem.incentives[0][:, 0] == 0
        return is_single_margin(problem) & ~still

    def measurable(self, problem: Problem) -> Mask:
        return tame(problem) & smooth(problem)

    def residual(self, problem: Problem, route: Route) -> Array:
        times = times_for(problem)
        run = route.flow(problem, times)
        w, l = problem.pairs[0]
        target = run.log_prob(w) - run.log_prob(l)
        out = np.zeros(len(problem))
        if problem.lr_unembedding == 0 and problem.lr_hidden == 0:
            return out
        for i in range(len(problem)):
            model = problem.model(i)
            if len(model.contexts) > 1:  # where the hypothesis is dropped: the first tokens as a single-token pair
                w, l = (y.tokens[0] for y in problem.pairs[0])
                if w == l:
                    continue
                h = problem.H[i, problem.pairs[0][0].rows[0]]
                model = type(model).single_token(problem.W[i], h, w, l)
                target[:, i] += model.log_prob(w) - model.log_prob(l) - problem.margin[i]
            flow = ExactFlow(model, problem.loss, problem.lr_unembedding, problem.lr_hidden)
            u = (
                flow.margin(self.k("speed") * times)
                if self.k("speed") >= 0
                else 2 * flow.start_margin - flow.margin(times)
            )
            out[i] = abs(u - target[:, i]).max() / (1 + abs(target[:, i]).max())
        return out


class MarginAtMostLogarithmic(Theorem):
    """DPO from the reference: the margin grows at most like the logarithm of time."""

    name = "margin_logarithmic"
    statement = (
        r"DPO from its reference: $0<G\le\beta/2$ and $u(t)-u_0\le\frac1\beta\ln(1+\beta^2K_{\max}t)$,"
        r" $K_{\max}=\max(K_0,K(u(t)))$"
    )
    source = "this project, bounds 3 and 5"
    kind = "inequality"
    routes = ("simulated",)
    knobs = ("slope bound", "logarithm")
    wrong_factors = (-1.0, 0.0, 0.5)
    tolerance = FLOW_TOLERANCE
    sharpness = (Sharpness("the start at the reference", "single_token"),)

    def applies(self, problem: Problem) -> Mask:
        return is_single_margin(problem) & (abs(problem.reference_margin - problem.margin) < 1e-12)

    def measurable(self, problem: Problem) -> Mask:
        return tame(problem)

    def residual(self, problem: Problem, route: Route) -> Array:
        beta = 0.7
        dpo = replace(problem, loss=get("dpo", beta=beta))
        times = np.geomspace(0.1, 10, 5) / max(float(np.median(start_of(dpo).K0)), 1e-6)
        run, s = route.flow(dpo, times), start_of(dpo)
        assert isinstance(dpo.loss, MarginLoss)
        u = moving(dpo, run)[2]
        K = np.sqrt(np.maximum(s.K0**2 + 4 * s.omega**2 * (u**2 - s.u0**2), 0.0))
        bound = np.log1p(beta**2 * np.maximum(s.K0, K) * times[:, None]) / beta
        rise = np.maximum(u - s.u0 - self.k("logarithm") * bound, 0.0) / (1 + abs(u))
        steep = np.maximum(s.G - self.k("slope bound") * beta / 2, 0.0)
        return np.maximum(rise.max(0), relative(steep, np.full(len(steep), beta)))
