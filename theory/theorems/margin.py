"""What the margin does: its speed, its direction, and what it bounds."""

import numpy as np
from scipy.special import expit

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
    relative,
)
from theory.theorems._single import Branch, dot


class MarginRises(Theorem):
    """Whatever ln pi(y+) does, the margin of one sample moves as the loss wants it to, at G |grad u|^2."""

    name = "margin_rises"
    statement = r"One sample: $\frac{du}{dt} = G\,|\nabla u|^2$, so $u$ never falls while $G\ge0$"
    source = "Razin et al. 2024, Lemma 2; this project, bound 3"
    settings = ("single_token", "sequences", "shared_prefix")
    routes = ("autodiff", "integrated")
    knobs = ("gradients of y+", "common gradient", "gradients of y-")
    sharpness = (
        Sharpness("one sample", "sequence_data_set"),
        Sharpness("a loss of the margin alone", "weighted"),
    )

    def applies(self, problem: Problem) -> Mask:
        return everywhere(problem, len(problem.samples) == 1 and problem.has_margin_loss)

    def residual(self, problem: Problem, route: Route) -> Array:
        w, l = problem.pairs[0]
        G, scale = problem.incentives[0][:, 0], problem.rate_scale(w) + problem.rate_scale(l)
        square = self.k("gradients of y+") * problem.inner(w, w) + self.k("gradients of y-") * problem.inner(l, l)
        square = square - 2 * self.k("common gradient") * problem.inner(w, l)
        speed = route.rate(problem, w) - route.rate(problem, l)
        wrong_way = excess(-speed * np.sign(G), np.zeros(len(G)), scale)
        return np.maximum(relative(speed - G * square, scale), wrong_way)


class MarginSpeed(Theorem):
    """|grad u|^2 in the metric of the rates is K(u): one number that PQ and the margin determine."""

    name = "margin_speed"
    statement = (
        r"$|\nabla u|^2 = 2\eta_W|h|^2 + \eta_h|W_+-W_-|^2 = \sqrt{PQ + 4\omega^2u^2}$,"
        r" $P,Q=|\sqrt{2\eta_W}h\pm\sqrt{\eta_h}a|^2$, $\omega=\sqrt{2\eta_W\eta_h}$; swapping $+$ and $-$ keeps it"
    )
    source = "this project, E1, bounds 4 and 9"
    knobs = ("unembedding", "hidden", "invariant", "margin")
    sharpness = (Sharpness("one-token responses", "sequences"),)

    def applies(self, problem: Problem) -> Mask:
        return everywhere(problem, is_single_token(problem))

    def residual(self, problem: Problem, route: Route) -> Array:
        (w, l), x = problem.pairs[0], Branch(problem)
        eta_W, eta_h = problem.lr_unembedding, problem.lr_hidden
        parts = [route.inner(problem, *pair) for pair in ((w, w), (w, l), (l, l))]
        measured = parts[0] - 2 * parts[1] + parts[2]
        hs, as_ = np.sqrt(2 * eta_W) * x.h, np.sqrt(eta_h) * x.a
        P, Q = ((hs + s * as_) for s in (1, -1))
        sum_form = self.k("unembedding") * 2 * eta_W * x.hh + self.k("hidden") * eta_h * dot(x.a, x.a)
        omega_u = np.sqrt(2 * eta_W * eta_h) * dot(x.h, x.a)
        root_form = np.sqrt(
            np.maximum(self.k("invariant") * dot(P, P) * dot(Q, Q) + self.k("margin") * 4 * omega_u**2, 0.0)
        )
        # Squares, since a root of a small difference keeps half of the digits only.
        scale = dot(hs, hs) + dot(as_, as_) + parts[0] + 2 * abs(parts[1]) + parts[2]
        error = np.maximum(relative(measured - sum_form, scale), relative(measured**2 - root_form**2, scale**2))
        return np.maximum(error, excess(2 * abs(omega_u), measured, scale))


class MarginBounds(Theorem):
    """However large the margin, pi(+) is at most sigmoid(u): two tokens of many. A fact about the start, not a rate."""

    name = "margin_bounds"
    statement = r"$\pi_+\le\sigma(u)$, with equality iff every other token has probability 0"
    source = "this project, bound 4"
    kind = "inequality"
    settings = ("single_token", "two_tokens")
    knobs = ("sigmoid",)
    wrong_factors = (-1.0, 0.0, 0.5)
    sharpness = (Sharpness("one-token responses", None, "it fails where y- is a prefix of y+"),)

    def applies(self, problem: Problem) -> Mask:
        return everywhere(problem, is_single_token(problem))

    def residual(self, problem: Problem, route: Route) -> Array:
        x = Branch(problem)
        u = dot(x.h, x.a)
        p, bound = x.p[:, x.plus], self.k("sigmoid") * expit(u)
        equal = relative(p - bound, p) if problem.V == 2 else np.zeros(len(p))
        return np.maximum(excess(p, bound, p), equal)
