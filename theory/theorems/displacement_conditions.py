"""When ln pi(y+) of a single-token pair falls at the start, and when it can at all."""

from dataclasses import replace

import numpy as np

from theory.problem import Problem
from theory.theorems._base import Array, Mask, Route, Sharpness, Theorem, everywhere, excess, raises_margin, relative
from theory.theorems._flow import UNIT_SLOPE, is_single_margin
from theory.theorems._single import Branch, dot


class CriticalRatio(Theorem):
    """The ratio of rates at which the preferred token starts to fall: there its rate is zero."""

    name = "critical_ratio"
    statement = (
        r"$G>0$: $\frac{d}{dt}\ln\pi_+<0$ at the start iff $\kappa=\eta_h/\eta_W>\kappa^*"
        r"=\frac{(1-\pi_++\pi_-)|h|^2}{-\langle W_+-\bar W,W_+-W_-\rangle}$ (never if that product is $\ge0$)"
    )
    source = "this project, E4"
    routes = ("autodiff", "integrated")
    knobs = ("hidden norm", "alignment")
    sharpness = (
        Sharpness("one-token responses", "sequences"),
        Sharpness("one sample", "data_set"),
    )

    def applies(self, problem: Problem) -> Mask:
        return is_single_margin(problem) & raises_margin(problem)

    def residual(self, problem: Problem, route: Route) -> Array:
        x, z = Branch(problem), problem.pairs[0][0]
        # Rates are linear in the learning rates: one of each group alone, put together at kappa*.
        only_W, only_h = (replace(problem, lr_unembedding=w, lr_hidden=h) for w, h in ((1.0, 0.0), (0.0, 1.0)))
        through_W, through_h = route.rate(only_W, z), route.rate(only_h, z)
        falls = -(x.along[:, x.plus] - x.mean_along)  # > 0: moving h alone displaces
        scale_W, scale_h = only_W.rate_scale(z), only_h.rate_scale(z)
        norm, alignment = self.k("hidden norm") * x.mass * x.hh, self.k("alignment") * falls
        # At kappa* = norm / alignment the two cancel; multiplied out, since alignment may be as small as it likes.
        error = relative(alignment * through_W + norm * through_h, abs(falls) * scale_W + x.hh * scale_h)
        never = np.where(falls <= 0, excess(np.zeros(len(problem)), through_h, scale_h), 0.0)
        return np.maximum(error, never)


class AlignmentRatio(Theorem):
    """One number per pair of tokens says whether it can be displaced at the start by any prompt and any rates."""

    name = "alignment_ratio"
    statement = (
        r"$G>0$. $r_{\max}=\max_z\langle 2W_z-W_+-W_-,a\rangle/|a|^2\le1$: for no $h$ and no rates does $\ln\pi_+$ fall"
        r" at the start; $r_{\max}>1$: it does for $h=sa$ with $s$ large and $W$ frozen"
    )
    source = "this project, E4"
    kind = "inequality"
    routes = ("autodiff", "integrated")
    knobs = ("ratio",)
    wrong_factors = (-1.0, 0.5, 2.0)
    sharpness = (
        Sharpness("one-token responses", "sequences"),
        Sharpness("one sample", "data_set"),
    )

    def applies(self, problem: Problem) -> Mask:
        return is_single_margin(problem) & raises_margin(problem) & everywhere(problem, problem.V > 2)

    def residual(self, problem: Problem, route: Route) -> Array:
        x, z = Branch(problem), problem.pairs[0][0]
        square = dot(x.a, x.a)
        r_max = self.k("ratio") * (2 * x.along[:, x.others] - (dot(x.W(x.plus) + x.W(x.minus), x.a))[:, None]).max(1)
        can = r_max > square
        rate, scale = route.rate(problem, z), problem.rate_scale(z)
        error = np.where(can, 0.0, excess(np.zeros(len(can)), rate, scale))
        # Along h = s a the softmax tends to the token most aligned with a: y+ falls there just if r_max > 1.
        top = np.sort(x.along, axis=1)
        lead = top[:, -1] - top[:, -2]
        known = (lead > 1e-6 * square) & (square > 1e-6)
        H = problem.H.copy()
        H[:, x.row] = np.where(known, 30.0 / np.where(known, lead, 1.0), 0.0)[:, None] * x.a
        # the sign is the same for every loss that raises the margin; this one does so at any margin
        along_a = replace(problem, H=H, loss=UNIT_SLOPE, lr_unembedding=0.0, lr_hidden=1.0)
        falls = route.rate(along_a, z) < -lead / 2  # it is -lead or less, or e^-30 above zero
        error = np.where(known & (falls != can), 1.0, error)
        return error


class StartCurvature(Theorem):
    """The second derivative decides where the first vanishes."""

    name = "start_curvature"
    statement = (
        r"$\frac{d^2}{d\tau^2}\ln\pi_+=\omega^2\langle e_+-\pi,L\rangle+\frac32\omega^2u(1-\pi_++\pi_-)"
        r"-\mathrm{Var}_\pi(L')$, $L$ the logits, $L'=\eta_hWa+\eta_W|h|^2(e_+-e_-)$"
    )
    source = "this project, E4"
    knobs = ("logits", "margin", "variance")
    tolerance = 1e-10  # a central difference of order 4, of the rate along the velocity
    sharpness = (
        Sharpness("one-token responses", "sequences"),
        Sharpness("one sample", "data_set"),
    )

    def applies(self, problem: Problem) -> Mask:
        return is_single_margin(problem)

    def residual(self, problem: Problem, route: Route) -> Array:
        x, z = Branch(problem), problem.pairs[0][0]
        eta_W, eta_h = problem.lr_unembedding, problem.lr_hidden
        omega2, u = 2 * eta_W * eta_h, dot(x.h, x.a)
        logits = problem.products(x.h)
        moves = eta_h * x.along
        moves[:, x.plus] += eta_W * x.hh
        moves[:, x.minus] -= eta_W * x.hh
        mean = dot(x.p, moves)
        variance = dot(x.p, (moves - mean[:, None]) ** 2)
        first = omega2 * (logits[:, x.plus] - dot(x.p, logits))
        closed = self.k("logits") * first + self.k("margin") * 1.5 * omega2 * u * x.mass - self.k("variance") * variance
        # Measured: the rate per unit of loss-time, ahead and behind along the velocity.
        unit = replace(problem, loss=UNIT_SLOPE)
        dW, dH = route.velocity(unit)
        speed = np.abs(moves).max(1) + np.sqrt(omega2) + 1e-12
        e = 1e-3 / speed

        def rate(steps: int) -> Array:
            step = (steps * e)[:, None, None]
            return route.rate(replace(unit, W=problem.W + step * dW, H=problem.H + step * dH), z)

        measured = (8 * (rate(1) - rate(-1)) - (rate(2) - rate(-2))) / (12 * e)
        return relative(measured - closed, speed**2 + omega2 * (abs(logits).max(1) + abs(u)))


class KernelRate(Theorem):
    """A body that moves h through a kernel Kf: its inner product takes the place of the plain one."""

    name = "kernel_rate"
    statement = (
        r"$dh=G\,K_f\,a\,dt$: $\frac{d}{dt}\ln\pi_+=G[\langle W_+-\bar W,K_fa\rangle+\eta_W(1-\pi_++\pi_-)|h|^2]$,"
        r" and a token $z\neq\pm$ moves by $G[\langle W_z-\bar W,K_fa\rangle+\eta_W(\pi_--\pi_+)|h|^2]$"
    )
    source = "this project, E8"
    knobs = ("alignment of y+", "hidden norm, y+", "alignment of z", "hidden norm, z")
    sharpness = (
        Sharpness("one-token responses", "sequences"),
        Sharpness("a constant kernel", None, "to first order any body has one; along a path see kernel_path"),
    )

    def applies(self, problem: Problem) -> Mask:
        return is_single_margin(problem) & everywhere(problem, problem.V > 2)

    def residual(self, problem: Problem, route: Route) -> Array:
        # h = J theta with J = diag(1, 2, ..): in the rescaled problem theta is the hidden vector.
        d = problem.W.shape[2]
        J = np.arange(1.0, d + 1)
        tied = replace(problem, W=problem.W * J, H=problem.H / J)
        x, eta_W, eta_h = Branch(problem), problem.lr_unembedding, problem.lr_hidden
        p, zs = x.p, [problem.pairs[0][0]]
        Kf_a = eta_h * J**2 * x.a
        along = np.einsum("bvd,bd->bv", problem.W, Kf_a)
        mean, minus, plus = dot(p, along), p[:, x.minus], p[:, x.plus]
        others = np.nonzero(x.others)[0]
        zs.append(type(zs[0])(zs[0].rows[:1], (int(others[0]) if len(others) else 0,)))
        error = np.zeros(len(problem))
        signs = (x.mass, minus - plus)
        for z, mass, names in zip(zs, signs, (self.knobs[:2], self.knobs[2:]), strict=True):
            closed = x.G * (self.k(names[0]) * (along[:, z.tokens[0]] - mean) + self.k(names[1]) * eta_W * mass * x.hh)
            # W J would move at eta_W J^2: the part through W is measured on the plain problem.
            through_theta = route.rate(replace(tied, lr_unembedding=0.0), z)
            through_W = route.rate(replace(problem, lr_hidden=0.0), z)
            scale = problem.rate_scale(z) * d**2
            error = np.maximum(error, relative(through_theta + through_W - closed, scale))
        return error
