"""The ratio of incentives, and the smallest SFT weight that keeps y+ from falling."""

from dataclasses import replace

import numpy as np

from theory.losses import SFT, MarginForm, MarginLoss, Pair, PerToken, Weighted
from theory.losses._combine import weighted_pair
from theory.problem import Problem
from theory.theorems._base import Array, Mask, Route, Sharpness, Theorem, everywhere, probe_of, relative


class IncentiveRatio(Theorem):
    """A margin loss, weighted, per token or with an SFT term, acts through its ratio r and one common factor."""

    name = "incentive_ratio"
    statement = (
        r"One sample, any $\ell$ of a margin, any response $z$:"
        r" $\frac{d}{dt}\ln\pi(z)=d_l\,(r\langle g_z,g_+\rangle-\langle g_z,g_-\rangle)$, $r=\lambda^+/\lambda^-$ for"
        r" weights, $|y^-|/|y^+|$ per token, $1+\lambda/G$ with an SFT term"
    )
    source = "Razin et al. 2024, App. E; arXiv 2604.18239 (the ratio); one formula for all is this project's"
    settings = ("weighted", "sft_regularised", "sequences", "shared_prefix")
    routes = ("autodiff", "integrated")
    knobs = ("ratio", "push on y-")
    sharpness = (Sharpness("one sample", "weighted_data_set"),)

    def applies(self, problem: Problem) -> Mask:
        base = problem.loss.base if isinstance(problem.loss, SFT | Weighted) else problem.loss
        if len(problem.samples) > 1 or not isinstance(base, MarginLoss):
            return everywhere(problem, False)
        return self._law(problem)[2] != 0

    def _law(self, problem: Problem) -> tuple[Problem, Array, Array]:
        """The problem (a plain margin loss is counted per token), r and d_l in closed form."""
        loss, (w, l) = problem.loss, problem.pairs[0]
        y = Pair(problem.log_prob(w), problem.log_prob(l), *problem.references[:, 0].T)

        def slope(base: MarginLoss, lam_w: float, lam_l: float) -> Array:
            seen = weighted_pair(y, lam_w, lam_l)
            return MarginForm(base, np.asarray(seen.u_ref)).slope(seen.u)

        if isinstance(loss, SFT):
            assert isinstance(loss.base, MarginLoss)
            G = slope(loss.base, 1.0, 1.0)
            with np.errstate(divide="ignore"):
                return problem, 1 + loss.lam / G, G
        if isinstance(loss, Weighted):
            assert isinstance(loss.base, MarginLoss)
            ratio = np.full(len(problem), loss.lam_w / loss.lam_l)
            return problem, ratio, loss.lam_l * slope(loss.base, loss.lam_w, loss.lam_l)
        assert isinstance(loss, MarginLoss)
        n_w, n_l = len(w.tokens), len(l.tokens)
        counted = replace(problem, loss=PerToken(loss))
        return counted, np.full(len(problem), n_l / n_w), slope(loss, 1 / n_w, 1 / n_l) / n_l

    def residual(self, problem: Problem, route: Route) -> Array:
        problem, r, d_l = self._law(problem)
        z, (w, l) = probe_of(problem), problem.pairs[0]
        up, down = self.k("ratio") * r * problem.inner(z, w), self.k("push on y-") * problem.inner(z, l)
        return relative(d_l * (up - down) - route.rate(problem, z), problem.rate_scale(z))


class SFTThreshold(Theorem):
    """The SFT weight at which ln pi(y+) stands still: below it falls, above it rises."""

    name = "sft_threshold"
    statement = (
        r"One sample, $\ell(u)-\lambda\ln\pi(y^+)$: $\frac{d}{dt}\ln\pi(y^+)\ge0$ iff"
        r" $\lambda\ge\lambda^*=-\ell'(u)\,(\rho r^*-1)$, $\rho=\cos(g_+,g_-)$, $r^*=|g_-|/|g_+|$"
    )
    source = "this project, from Razin et al. 2024, Proposition 1"
    settings = ("sequences", "shared_prefix", "one_edit")
    routes = ("autodiff", "integrated")
    knobs = ("angle and lengths", "one")
    sharpness = (Sharpness("one sample", "sequence_data_set"),)

    def applies(self, problem: Problem) -> Mask:
        margin = len(problem.samples) == 1 and problem.has_margin_loss
        w = problem.pairs[0][0]
        return everywhere(problem, margin) & (problem.inner(w, w) > 0)

    def residual(self, problem: Problem, route: Route) -> Array:
        w, l = problem.pairs[0]
        own_w, own_l, common = problem.inner(w, w), problem.inner(l, l), problem.inner(w, l)
        lengths = np.sqrt(own_w * own_l)
        rho = np.where(lengths > 0, common / np.where(lengths > 0, lengths, 1.0), 0.0)
        edge = rho * np.sqrt(own_l / np.where(own_w > 0, own_w, 1.0))
        G = problem.incentives[0][:, 0]
        least = G * (self.k("angle and lengths") * edge - self.k("one"))
        # Rates are linear in lambda: measured without the term and at lambda = 1, put together at lambda*.
        without, with_one = (route.rate(p, w) for p in (problem, replace(problem, loss=SFT(problem.loss, 1.0))))
        size = problem.rate_scale(w) * (1 + abs(edge)) + abs(least) * own_w
        return relative(without + least * (with_one - without), size)
