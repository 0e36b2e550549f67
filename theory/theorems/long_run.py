"""What becomes of ln pi(y+): concavity with W frozen, the depth of the trough, and the limits."""

from dataclasses import replace

import numpy as np
from scipy.special import logsumexp

from theory.losses import get
from theory.problem import Problem
from theory.theorems._base import (
    Array,
    Mask,
    Proof,
    Route,
    Sharpness,
    Theorem,
    everywhere,
    excess,
    is_single_token,
    relative,
)
from theory.theorems._flow import FLOW_TOLERANCE, SINGLE_PAIR, UNIT_SLOPE, is_single_margin, moving, start_of, times_for
from theory.theorems._proofs.rates import fixed_features
from theory.theorems._single import Branch, dot


def in_loss_time(problem: Problem, eta_W: float, eta_h: float) -> Problem:
    """The problem with a loss of unit slope and the given rates."""
    return replace(problem, loss=UNIT_SLOPE, lr_unembedding=eta_W, lr_hidden=eta_h)


class ConcaveWithFixedUnembeddings(Theorem):
    """W frozen: in loss-time ln pi(y+) and ln pi(y-) are concave, so a fall once begun never ends."""

    name = "concave_with_fixed_unembeddings"
    statement = (
        r"$\eta_W=0$, one sample of sequences: $\frac{d^2}{d\tau^2}\ln\pi(y^\pm|x)\le0$; only the context where the"
        r" responses part can lower $y^+$"
    )
    source = "this project, E4"
    kind = "inequality"
    settings = ("sequences", "shared_prefix", "single_token")
    routes = ("simulated",)
    knobs = ("curvature",)
    wrong_factors = (-1.0,)
    tolerance = FLOW_TOLERANCE
    sharpness = (
        Sharpness("W frozen", "single_token"),
        Sharpness("one sample", "sequence_data_set"),
    )

    def applies(self, problem: Problem) -> Mask:
        return everywhere(problem, len(problem.samples) == 1 and problem.lr_unembedding == 0)

    def residual(self, problem: Problem, route: Route) -> Array:
        unit = replace(problem, loss=UNIT_SLOPE)
        run = route.flow(unit, times_for(unit, 6))
        error = np.zeros(len(problem))
        for y in unit.pairs[0]:
            rates = np.stack([route.rate(run.at(i, unit), y) for i in range(len(run.times))])
            rises = self.k("curvature") * np.diff(rates, axis=0)
            size = abs(rates).max(0) + unit.rate_scale(y)
            error = np.maximum(error, excess(rises.max(0), np.zeros(len(error)), size))
        return error


class TroughBounds(Theorem):
    """How deep ln pi(y+) goes: between two numbers made of inner products."""

    name = "trough_bounds"
    statement = (
        r"$-\ln(1+e^{-u_0}+(V-2)e^{D^*})\le\min_t\ln\pi_+\le-\ln(1+e^{D^*})$, $D^*=\max_z\max_{x\ge1}D_z(x)$, at roots"
        r" of $Px^4-4\omega\alpha_zx^3+4\omega\beta_zx+Q$"
    )
    source = "this project, E4"
    kind = "inequality"
    routes = ("simulated",)
    knobs = ("rival's alpha", "rival's beta", "growing part", "decaying part")
    tolerance = FLOW_TOLERANCE
    sharpness = (*SINGLE_PAIR, Sharpness("both groups trained", None, "with a group frozen the path has no light cone"))

    def applies(self, problem: Problem) -> Mask:
        return everywhere(problem, is_single_token(problem) and problem.V > 2)

    def measurable(self, problem: Problem) -> Mask:
        return start_of(problem).K0 > 1e-3

    def residual(self, problem: Problem, route: Route) -> Array:
        unit = in_loss_time(problem, 1.0, 2.0)
        s, x = start_of(unit), Branch(unit)
        xs = np.exp(np.linspace(0, 3.5, 36))  # e^{omega tau}: where troughs of moderate models lie
        run = route.flow(unit, np.log(xs) / s.omega)
        lowest = run.log_pi(x.row)[:, :, x.plus].min(0)
        rivals = self._rivals(unit, xs)  # (B, points)
        deepest = rivals.max(1)
        zero = np.zeros(len(deepest))
        low = -logsumexp([zero, -s.u0, np.log(unit.V - 2) + deepest], axis=0)
        high = -np.logaddexp(0, deepest)
        size = 1 + abs(lowest)
        return np.maximum(excess(low, lowest, size), excess(lowest, high, size))

    def _rivals(self, problem: Problem, xs: Array) -> Array:
        """(B, points) the largest log-odds D_z against y+ over other tokens, at the points."""
        s, x = start_of(problem), Branch(problem)
        hs, as_ = np.sqrt(2 * problem.lr_unembedding) * s.h, np.sqrt(problem.lr_hidden) * s.a
        p0, q0 = hs + as_, hs - as_
        centred = problem.W - ((x.W(x.plus) + x.W(x.minus)) / 2)[:, None]
        norm = 2 * np.sqrt(2 * problem.lr_unembedding)
        alpha = self.k("rival's alpha") * np.einsum("bvd,bd->bv", centred, p0)[:, x.others] / norm
        beta = self.k("rival's beta") * np.einsum("bvd,bd->bv", centred, q0)[:, x.others] / norm
        P, Q = (dot(v, v)[:, None, None] for v in (p0, q0))
        u_half = (self.k("growing part") * P * xs**2 - self.k("decaying part") * Q / xs**2) / (8 * s.omega)
        return (alpha[..., None] * xs + beta[..., None] / xs - u_half).max(1)


class Transience(Theorem):
    """Both groups trained, no finite minimiser: however deep the fall, pi(y+) tends to 1."""

    name = "transience"
    statement = (
        r"Both groups trained, $P>0$, no finite minimiser: $\mathrm{logit}_\pm\sim\pm u/2$, every other logit is"
        r" $O(\sqrt u)$, so $\pi_+\to1$"
    )
    source = "this project, E5"
    kind = "limit"
    routes = ("simulated",)
    knobs = ("half of the margin",)
    tolerance = 1e-3  # at a margin of some thousand the rest is of order 1/sqrt(u)
    sharpness = (
        Sharpness("both groups trained", "fixed_unembeddings"),
        Sharpness("one-token responses", None, "no counterexample known"),
    )

    def applies(self, problem: Problem) -> Mask:
        both = problem.lr_unembedding > 0 and problem.lr_hidden > 0
        return everywhere(problem, is_single_token(problem) and both) & (self._P(problem) > 0)

    def measurable(self, problem: Problem) -> Mask:
        return (self._P(problem) > 0.3) | (problem.lr_unembedding == 0) | (problem.lr_hidden == 0)

    def _P(self, problem: Problem) -> Array:
        s = start_of(problem)
        p = np.sqrt(2 * problem.lr_unembedding) * s.h + np.sqrt(problem.lr_hidden) * s.a
        return dot(p, p)

    def residual(self, problem: Problem, route: Route) -> Array:
        eta_W, eta_h = problem.lr_unembedding, problem.lr_hidden
        unit = replace(problem, loss=UNIT_SLOPE)
        s, x = start_of(unit), Branch(unit)
        omega = max(s.omega, 1e-3 * (eta_W + eta_h))
        run = route.flow(unit, np.array([9.0 / omega]) if s.omega else np.array([5.0 / omega]))
        logits = run.logits(x.row)[0]
        u = logits[:, x.plus] - logits[:, x.minus]
        ratio = relative(logits[:, x.plus] - self.k("half of the margin") * u / 2, abs(u))
        return np.maximum(ratio, -run.log_pi(x.row)[0, :, x.plus] if s.omega else ratio)


class OnlyHiddenTrained(Theorem):
    """W frozen, no finite minimiser: the token best aligned with W_+ - W_- takes everything."""

    name = "only_hidden_trained"
    statement = (
        r"$\eta_W=0$, $a_0\neq0$, no finite minimiser: $\pi\to$ the tokens of largest $\langle W_z,a\rangle$, in the"
        r" proportions $e^{\langle W_z,h_0\rangle}$; $\pi_+\to0$ if $y^+$ is not among them"
    )
    source = "this project, E5"
    kind = "limit"
    settings = ("fixed_unembeddings",)
    routes = ("simulated",)
    knobs = ("alignment", "start")
    harmless = (("alignment", 2.0),)  # has the same winner
    tolerance = 1e-6
    sharpness = (Sharpness("W frozen", "single_token"),)

    def applies(self, problem: Problem) -> Mask:
        return everywhere(problem, is_single_token(problem) and problem.lr_unembedding == 0)

    def measurable(self, problem: Problem) -> Mask:
        return self._clear(problem)

    def _clear(self, problem: Problem) -> Mask:
        """The winner leads by enough, or ties exactly, so that a finite time shows the limit."""
        x = Branch(problem)
        gaps = x.along.max(1, keepdims=True) - x.along
        return ((gaps < 1e-12) | (gaps > 0.05)).all(1) & (dot(x.a, x.a) > 0.01)

    def residual(self, problem: Problem, route: Route) -> Array:
        unit = replace(problem, loss=UNIT_SLOPE, lr_hidden=1.0)
        x = Branch(unit)
        run = route.flow(unit, np.array([600.0]))
        along = self.k("alignment") * x.along
        ties = along > along.max(1, keepdims=True) - 1e-12
        start = np.where(ties, self.k("start") * unit.products(x.h), -np.inf)
        limit = np.exp(start - logsumexp(start, axis=1, keepdims=True))
        return abs(np.exp(run.log_pi(x.row)[0]) - limit).max(1)


class QuadraticLossesInTime(Theorem):
    """Losses of linear slope are explicit in time."""

    name = "quadratic_losses_in_time"
    statement = (
        r"$G=c(u^*-u)$: with $y^*=x^2(u^*)$, $E=e^{cK(u^*)t}$,"
        r" $x^2=\frac{E(Py^*+Q)-Q(1-1/y^*)}{P(y^*-1)+E(P+Q/y^*)}$; one group frozen: $u=u^*+(u_0-u^*)e^{-cK_0t}$"
    )
    source = "this project, E5"
    routes = ("simulated",)
    settings = ("single_token", "two_tokens", "fixed_unembeddings")
    knobs = ("rate", "offset of P", "offset of Q")
    tolerance = FLOW_TOLERANCE
    sharpness = SINGLE_PAIR

    def applies(self, problem: Problem) -> Mask:
        return is_single_margin(problem)

    def measurable(self, problem: Problem) -> Mask:
        s = start_of(problem)
        return (s.K0**2 - 4 * s.omega**2 * s.u0**2 > 1e-4 * s.K0**2) & (s.K0 > 1e-2)  # away from P = 0 and Q = 0

    def residual(self, problem: Problem, route: Route) -> Array:
        tau = 0.3
        ipo = replace(problem, loss=get("ipo", tau=tau))
        s, x, c = start_of(ipo), Branch(ipo), 2.0
        target = ipo.reference_margin + 1 / (2 * tau)
        times = np.array([0.3, 1.0, 3.0]) / (c * max(float(np.median(s.K0)), 1e-6))
        run = route.flow(ipo, times)
        u = run.logits(x.row)[:, :, x.plus] - run.logits(x.row)[:, :, x.minus]
        if s.omega == 0:
            closed = target + self.k("offset of P") * (s.u0 - target) * np.exp(
                -self.k("rate") * c * s.K0 * times[:, None]
            )
            return (abs(u - closed) / (1 + abs(u) + abs(target))).max(0)
        hs, as_ = np.sqrt(2 * ipo.lr_unembedding) * s.h, np.sqrt(ipo.lr_hidden) * s.a
        P, Q = dot(hs + as_, hs + as_), dot(hs - as_, hs - as_)
        K = np.sqrt(P * Q + 4 * s.omega**2 * target**2)
        y = np.where(target >= 0, (K + 2 * s.omega * target) / P, Q / (K - 2 * s.omega * target))
        decay = np.exp(np.minimum(-self.k("rate") * c * K * times[:, None], 300.0))  # 1/E
        top = P * y + Q - self.k("offset of Q") * decay * Q * (1 - 1 / y)
        x2 = top / (self.k("offset of P") * decay * P * (y - 1) + P + Q / y)
        closed = (P * x2 - Q / np.where(x2 == 0, 1.0, x2)) / (4 * s.omega)
        return (abs(u - closed) / (1 + abs(u) + abs(target))).max(0)


class NeverFallsWithFixedFeatures(Theorem):
    """Only W trained: along the whole flow ln pi(y+) never decreases."""

    name = "never_falls_with_fixed_features"
    statement = r"$\eta_h=0$, one single-token pair, $G\ge0$: $\ln\pi_+(t)$ is non-decreasing"
    source = "this project, E5"
    kind = "inequality"
    routes = ("simulated",)
    knobs = ("direction",)
    wrong_factors = (-1.0,)
    tolerance = FLOW_TOLERANCE
    sharpness = SINGLE_PAIR[1:]

    def applies(self, problem: Problem) -> Mask:
        return everywhere(problem, is_single_token(problem))

    def residual(self, problem: Problem, route: Route) -> Array:
        unit = replace(problem, loss=UNIT_SLOPE, lr_unembedding=1.0, lr_hidden=0.0)
        run = route.flow(unit, np.linspace(0, 2, 5) / max(float(np.median(start_of(unit).K0)), 1e-6))
        falls = self.k("direction") * -np.diff(run.log_prob(unit.pairs[0][0]), axis=0)
        return np.maximum(falls, 0.0).max(0)

    def proof(self) -> Proof:
        return fixed_features()  # the rate itself is >= 0 wherever the flow comes


class LargeRatio(Theorem):
    """Hidden vectors much faster than unembeddings: how deep the fall is, and at which margin it ends."""

    name = "large_ratio"
    statement = (
        r"$\kappa\to\infty$, $r=r_{\max}>1$, $n=|a_0|^2$, $c=(r+\sqrt{r^2+8})/4$: the trough of $\ln\pi_+$ is"
        r" $\sim-n\sqrt{\kappa/8}\sqrt{c^2-1}(r-c)$, the recovery margin $\sim n\sqrt{\kappa/2}\,r\sqrt{r^2-1}$"
    )
    source = "this project, E4"
    kind = "limit"
    routes = ("simulated",)
    knobs = ("depth", "recovery")
    tolerance = 1e-2  # relative, at kappa = 1e12, for r_max above 1.2
    sharpness = (Sharpness("kappa large", None, "at moderate kappa the start's logits count as well"),)

    def applies(self, problem: Problem) -> Mask:
        single = is_single_margin(problem) & everywhere(problem, problem.V > 2)
        return single & (self._ratio(problem) > 1) if single.any() else single

    def measurable(self, problem: Problem) -> Mask:
        x = Branch(problem)
        return (self._ratio(problem) > 1.2) & (dot(x.a, x.a) > 0.05) & (abs(x.h).max(1) < 3)

    def _ratio(self, problem: Problem) -> Array:
        x = Branch(problem)
        s = x.W(x.plus) + x.W(x.minus)
        return (2 * x.along[:, x.others].max(1) - dot(s, x.a)) / np.maximum(dot(x.a, x.a), 1e-300)

    def residual(self, problem: Problem, route: Route) -> Array:
        kappa = 1e12
        unit, x = in_loss_time(problem, 1.0, kappa), Branch(problem)
        r, n, omega = np.maximum(self._ratio(problem), 1.0), dot(x.a, x.a), np.sqrt(2 * kappa)
        c = (r + np.sqrt(r**2 + 8)) / 4
        # cosh(omega tau) is c at the trough and r at the return; each instance has its own times.
        times = np.arccosh(np.concatenate([c, r])) / omega
        order = np.argsort(times, kind="stable")
        run = route.flow(unit, times[order])
        at = np.empty(len(times), dtype=int)
        at[order] = np.arange(len(times))
        rows, B = np.arange(len(problem)), len(problem)
        log_pi, u = run.log_pi(x.row)[:, :, x.plus], moving(unit, run)[2]
        depth = n * np.sqrt(kappa / 8) * np.sqrt(c**2 - 1) * (r - c)
        margin = n * np.sqrt(kappa / 2) * r * np.sqrt(r**2 - 1)
        deep = relative(log_pi[at[:B], rows] + self.k("depth") * depth, depth)
        back = relative(u[at[B:], rows] - self.k("recovery") * margin, margin)
        return np.max([deep, back, abs(log_pi[at[B:], rows]) / depth], axis=0)
