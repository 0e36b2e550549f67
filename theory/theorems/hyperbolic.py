"""The two directions in which a single-token pair moves, and its clock where the speed is constant."""

from dataclasses import replace

import numpy as np

from theory.losses import get
from theory.problem import Problem
from theory.theorems._base import Array, Mask, Route, Sharpness, Theorem, everywhere, relative
from theory.theorems._flow import FLOW_TOLERANCE, SINGLE_PAIR, is_single_margin, moving, start_of
from theory.theorems._single import Branch


class Hyperbolic(Theorem):
    """One direction grows, one decays: that is the whole dynamics of a pair in loss-time."""

    name = "hyperbolic"
    statement = (
        r"With $p,q=\sqrt{2\eta_W}h\pm\sqrt{\eta_h}(W_+-W_-)$ and $\omega=\sqrt{2\eta_W\eta_h}$:"
        r" $\dot p=\omega G\,p$, $\dot q=-\omega G\,q$"
    )
    source = "this project, E1"
    knobs = ("growth", "decay")
    sharpness = SINGLE_PAIR

    def applies(self, problem: Problem) -> Mask:
        both = problem.lr_unembedding > 0 and problem.lr_hidden > 0
        return is_single_margin(problem) & everywhere(problem, both)

    def residual(self, problem: Problem, route: Route) -> Array:
        (dW, dH), x, s = route.velocity(problem), Branch(problem), start_of(problem)
        eta_W, eta_h = problem.lr_unembedding, problem.lr_hidden
        hs, as_ = np.sqrt(2 * eta_W) * s.h, np.sqrt(eta_h) * s.a
        dh, da = np.sqrt(2 * eta_W) * dH[:, x.row], np.sqrt(eta_h) * (dW[:, x.plus] - dW[:, x.minus])
        by = (s.omega * x.G)[:, None]
        grows = dh + da - self.k("growth") * by * (hs + as_)
        decays = dh - da + self.k("decay") * by * (hs - as_)
        size = s.omega * problem.incentive_sizes[0][:, 0] * (abs(hs) + abs(as_)).max(1)
        return relative(np.maximum(abs(grows), abs(decays)).max(1), size)


class DPOClock(Theorem):
    """DPO with one group frozen: the margin as an elementary function of time, up to Wright's omega."""

    name = "dpo_clock"
    statement = (
        r"DPO, one group frozen, start at the reference: $z+e^z-1=\beta^2K_0t$ for $z=\beta(u-u_0)$,"
        r" so the margin grows like $\frac1\beta\ln t$"
    )
    source = "this project, E1"
    settings = ("fixed_unembeddings", "two_tokens")
    routes = ("simulated",)
    knobs = ("clock",)
    tolerance = FLOW_TOLERANCE
    sharpness = (Sharpness("one sample", "data_set"), Sharpness("one group frozen", "single_token"))

    def applies(self, problem: Problem) -> Mask:
        frozen = problem.lr_unembedding == 0 or problem.lr_hidden == 0
        return is_single_margin(problem) & everywhere(problem, frozen)

    def residual(self, problem: Problem, route: Route) -> Array:
        beta = 0.7
        references = np.zeros_like(problem.references)
        references[:, 0, 0] = problem.margin
        dpo = replace(problem, loss=get("dpo", beta=beta), references=references)
        s = start_of(dpo)
        times = np.array([0.3, 3.0, 30.0]) / max(float(np.median(s.K0)), 1e-6)
        z = beta * (moving(dpo, route.flow(dpo, times))[2] - s.u0)
        clock = self.k("clock") * beta**2 * s.K0 * times[:, None]
        return (abs(z + np.expm1(z) - clock) / (1 + clock)).max(0)


class WeightDecay(Theorem):
    """Equal weight decay ends the growth: where the flow rests, and how likely y+ is there."""

    name = "weight_decay"
    statement = (
        r"Weight decay $\lambda<\omega G(0)$ on everything, one pair: where $G=\lambda/\omega$, $q=0$ and every row"
        r" but $W_\pm=\pm a/2$ is 0 the flow rests, and $\pi_+=1/(1+e^{-u}+(V-2)e^{-u/2})$"
    )
    source = "this project, E5"
    knobs = ("growth rate", "others")
    sharpness = (
        *SINGLE_PAIR[:1],
        Sharpness("equal decay of both groups", None, "the balance of p and q depends on it"),
    )

    def applies(self, problem: Problem) -> Mask:
        both = problem.lr_unembedding > 0 and problem.lr_hidden > 0
        return is_single_margin(problem) & everywhere(problem, both and problem.V > 2)

    def residual(self, problem: Problem, route: Route) -> Array:
        # The state of rest along the direction of h with margin u: |h|^2 = u sqrt(eta_h / (2 eta_W)), a in step.
        x, (w, l) = Branch(problem), problem.pairs[0]
        ratio = np.sqrt(2 * problem.lr_unembedding / problem.lr_hidden)  # a = ratio h where q = 0
        u = np.linspace(0.3, 4.0, len(problem))
        unit = np.zeros_like(x.h)
        unit[:, 0] = np.sqrt(u / ratio)
        W, H = np.zeros_like(problem.W), problem.H.copy()
        W[:, x.plus], W[:, x.minus] = ratio * unit / 2, -ratio * unit / 2
        H[:, x.row] = unit
        rest = replace(problem, W=W, H=H, loss=get("dpo", beta=0.7))
        omega = np.sqrt(2 * problem.lr_unembedding * problem.lr_hidden)
        decay = self.k("growth rate") * (omega * rest.incentives[0][:, 0])[:, None, None]
        dW, dH = route.velocity(rest)
        rows = [*w.rows, *l.rows]
        error = np.maximum(abs(dW - decay * W).max((1, 2)), abs(dH - decay * H)[:, rows].max((1, 2)))
        closed = 1 / (1 + np.exp(-u) + self.k("others") * (problem.V - 2) * np.exp(-u / 2))
        seen = np.exp(rest.log_prob(w))
        size = omega * rest.incentive_sizes[0][:, 0] * (1 + ratio) * abs(unit).max(1)
        return np.maximum(relative(error, size), abs(seen - closed))
