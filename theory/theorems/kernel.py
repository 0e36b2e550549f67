"""Beyond unconstrained features: a constant feature kernel."""

import numpy as np

from theory.exact import ExactFlow
from theory.problem import Problem
from theory.theorems._base import Array, Mask, Route, Sharpness, Theorem, everywhere, is_single_token
from theory.theorems._flow import FLOW_TOLERANCE, form_of, is_single_margin, moving, smooth, start_of, tame, times_for
from theory.theorems.long_run import in_loss_time


def features(d: int) -> Array:
    """J (d, max(1, d - 1)): a fixed map of parameters to hidden vectors, of rank below d where d > 1."""
    r = max(1, d - 1)
    return np.cos(np.arange(1.0, d * r + 1)).reshape(d, r)


class KernelPath(Theorem):
    """A body of constant kernel: in the kernel's eigenbasis every mode is a cosh and a sinh of loss-time."""

    name = "kernel_path"
    statement = (
        r"$\dot h=G\,K_fa$ with $K_f$ constant, eigenvalues $k_i$, $\omega_i=\sqrt{2\eta_Wk_i}$:"
        r" $a_i=a_{0i}\cosh\omega_i\tau+2\eta_Wh_{0i}\frac{\sinh\omega_i\tau}{\omega_i}$,"
        r" $h_i=h_{0i}\cosh\omega_i\tau+k_ia_{0i}\frac{\sinh\omega_i\tau}{\omega_i}$; $k_ia_i^2-2\eta_Wh_i^2$ stays"
    )
    source = "this project, E8"
    routes = ("simulated",)
    knobs = ("frequency", "into a", "into h", "invariant")
    harmless = (("frequency", -1.0),)  # cosh(w tau) and sinh(w tau)/w are even in w
    tolerance = FLOW_TOLERANCE
    sharpness = (
        Sharpness("one-token responses", "sequences"),
        Sharpness("a constant kernel", None, "a network's kernel moves: measured on the language model, not here"),
    )

    def applies(self, problem: Problem) -> Mask:
        return everywhere(problem, is_single_token(problem))

    def residual(self, problem: Problem, route: Route) -> Array:
        unit = in_loss_time(problem, 0.6, 1.0)
        J = features(problem.W.shape[2])
        k, Q = np.linalg.eigh(J @ J.T)
        k = np.where(k < 1e-12 * k.max(), 0.0, k)
        times = np.array([0.3, 0.8])
        h, a, _ = moving(unit, route.flow(unit, times, features=J))
        w = self.k("frequency") * np.sqrt(2 * unit.lr_unembedding * k)
        start = start_of(unit)
        h0, a0 = start.h @ Q, start.a @ Q
        y = times[:, None, None] * w
        S = np.where(w == 0, times[:, None, None], np.sinh(y) / np.where(w == 0, 1.0, w))
        a_closed = a0 * np.cosh(y) + self.k("into a") * 2 * unit.lr_unembedding * h0 * S
        h_closed = h0 * np.cosh(y) + self.k("into h") * k * a0 * S
        h_seen, a_seen = h @ Q, a @ Q
        kept = k * a_seen**2 - self.k("invariant") * 2 * unit.lr_unembedding * h_seen**2
        lost = kept - (k * a0**2 - self.k("invariant") * 2 * unit.lr_unembedding * h0**2)
        size = 1 + abs(h).max((0, 2)) + abs(a).max((0, 2))
        gaps = [abs(h_seen - h_closed) / size[:, None], abs(a_seen - a_closed) / size[:, None]]
        return np.max([g.max((0, 2)) for g in [*gaps, abs(lost) / (size**2)[:, None]]], axis=0)


class KernelClock(Theorem):
    """With a kernel the loss still sets only the clock: `ExactFlow` with a matrix for lr_hidden is the flow in time."""

    name = "kernel_clock"
    statement = (
        r"$\frac{du}{dt}=G(u)\sum_i(2\eta_Wh_i^2+k_ia_i^2)$ along the path of `kernel_path`, for every margin loss"
    )
    source = "this project, E8"
    routes = ("simulated",)
    knobs = ("kernel",)
    wrong_factors = (0.0, 2.0)  # a kernel is positive semidefinite
    tolerance = FLOW_TOLERANCE
    sharpness = (Sharpness("one sample", "data_set"),)

    def applies(self, problem: Problem) -> Mask:
        moves = problem.incentives[0][:, 0] != 0
        return is_single_margin(problem) & moves

    def measurable(self, problem: Problem) -> Mask:
        return tame(problem) & smooth(problem)

    def residual(self, problem: Problem, route: Route) -> Array:
        J = features(problem.W.shape[2])
        times = times_for(problem, 2) / 3
        run = route.flow(problem, times, features=J)
        w, l = (y.tokens[0] for y in problem.pairs[0])
        out = np.zeros(len(problem))
        kernel = self.k("kernel") * problem.lr_hidden * J @ J.T
        for i in range(len(problem)):
            one = problem.model(i)
            reference = float(form_of(problem, i).u_ref), 0.0
            h = problem.H[i, problem.pairs[0][0].rows[0]]
            one = type(one).single_token(problem.W[i], h, w, l, reference=reference)
            closed = ExactFlow(one, problem.loss, problem.lr_unembedding, kernel).log_probs(times)
            out[i] = abs(np.exp(closed) - np.exp(run.log_pi(problem.pairs[0][0].rows[0])[:, i])).max()
        return out
