"""The band of incentive ratios in which y+ does not fall and y- does not rise, and calibration to its centre."""

from dataclasses import replace
from typing import NamedTuple

import numpy as np

from theory.losses import Calibrated
from theory.problem import Problem
from theory.theorems._base import Array, Mask, Route, Sharpness, Theorem, everywhere, relative


class Gram(NamedTuple):
    """|g+|, |g-|, their cosine, and the incentives, (B,) each."""

    w: Array
    l: Array
    rho: Array
    d_w: Array
    d_l: Array


def gram(problem: Problem) -> Gram:
    """Of the first sample; the cosine is 0 where a gradient vanishes."""
    w, l = problem.pairs[0]
    norms = np.sqrt(problem.inner(w, w)), np.sqrt(problem.inner(l, l))
    size = norms[0] * norms[1]
    rho = np.where(size > 0, problem.inner(w, l) / np.where(size > 0, size, 1.0), 0.0)
    return Gram(*norms, rho, *(d[:, 0] for d in problem.incentives))


def _worse(problem: Problem, route: Route, plus: Array, minus: Array) -> Array:
    """The worse of two predicted rates, of y+ and y-."""
    pairs = zip((plus, minus), problem.pairs[0], strict=True)
    return np.maximum(*(relative(x - route.rate(problem, z), problem.rate_scale(z)) for x, z in pairs))


class DisentanglementBand(Theorem):
    """Rates are distances of r from the edges of the band; those of incentives in it have the wanted signs."""

    name = "disentanglement_band"
    statement = (
        r"One sample, $r=d_w/d_l$, $r^*=|g_-|/|g_+|$, $\rho=\cos(g_+,g_-)$:"
        r" $\frac{d}{dt}\ln\pi(y^+)=d_l|g_+|^2(r-\rho r^*)$, $\frac{d}{dt}\ln\pi(y^-)=d_l|g_-|^2(\rho r/r^*-1)$; for"
        r" $d_l>0$, $\rho>0$ both have the wanted sign iff $\rho r^*\le r\le r^*/\rho$"
    )
    source = "arXiv 2604.18239 (the band); the rates are this project's"
    settings = ("sequences", "shared_prefix", "one_edit", "weighted", "sft_regularised")
    routes = ("autodiff", "integrated")
    knobs = ("ratio, y+", "lower edge", "ratio, y-", "upper edge")
    sharpness = (Sharpness("one sample", "sequence_data_set"),)

    def applies(self, problem: Problem) -> Mask:
        g = gram(problem)
        return everywhere(problem, len(problem.samples) == 1) & (g.d_l != 0) & (g.w > 0) & (g.l > 0)

    def residual(self, problem: Problem, route: Route) -> Array:
        g = gram(problem)
        r, r_star = g.d_w / np.where(g.d_l == 0, 1.0, g.d_l), g.l / np.where(g.w > 0, g.w, 1.0)
        plus = g.d_l * g.w**2 * (self.k("ratio, y+") * r - self.k("lower edge") * g.rho * r_star)
        above = g.rho * r / np.where(r_star > 0, r_star, 1.0)
        minus = g.d_l * g.l**2 * (self.k("ratio, y-") * above - self.k("upper edge"))
        return _worse(problem, route, plus, minus)


class RewardCalibration(Theorem):
    """At the centre of the band y+ and y- move apart, whatever the gradients."""

    name = "reward_calibration"
    statement = (
        r"One sample, $d_w,d_l>0$, incentives $c\,d_w$ and $d_l/c$ with $c=\sqrt{r^*/r}$:"
        r" $\frac{d}{dt}\ln\pi(y^+)=\sqrt{d_wd_l}\,|g_+|^{3/2}|g_-|^{1/2}(1-\rho)\ge0$,"
        r" $\frac{d}{dt}\ln\pi(y^-)=-\sqrt{d_wd_l}\,|g_+|^{1/2}|g_-|^{3/2}(1-\rho)\le0$"
    )
    source = "arXiv 2604.18239 (the calibration); the rates are this project's"
    settings = ("sequences", "shared_prefix", "one_edit", "weighted", "sft_regularised")
    knobs = ("rise of y+", "fall of y-", "angle")
    sharpness = (
        Sharpness("one sample", "sequence_data_set"),
        Sharpness("positive incentives", None, "where one is not, there is no ratio to calibrate and c = 1"),
    )

    def applies(self, problem: Problem) -> Mask:
        g = gram(problem)
        positive = (g.d_w > 0) & (g.d_l > 0) & (g.w > 0) & (g.l > 0)
        return everywhere(problem, len(problem.samples) == 1) & positive

    def residual(self, problem: Problem, route: Route) -> Array:
        g = gram(problem)
        push = np.sqrt(np.maximum(g.d_w * g.d_l, 0.0)) * (1 - self.k("angle") * g.rho)
        plus = self.k("rise of y+") * push * g.w**1.5 * np.sqrt(g.l)
        minus = -self.k("fall of y-") * push * np.sqrt(g.w) * g.l**1.5
        return _worse(replace(problem, loss=Calibrated(problem.loss)), route, plus, minus)
