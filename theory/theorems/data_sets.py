"""Several prompts: margins without softmax, modes under constant slopes, and when prompts decouple."""

from dataclasses import replace

import numpy as np

from theory.model import Sample
from theory.problem import Problem
from theory.theorems._base import Array, Mask, Route, Sharpness, Theorem, everywhere, relative
from theory.theorems._flow import FLOW_TOLERANCE, UNIT_SLOPE, tame, times_for
from theory.theorems.theorem_8 import is_token_data_set


def incidence(problem: Problem) -> Array:
    """B (prompts, V): +1 at y+ and -1 at y- of each sample, over the number of samples."""
    out = np.zeros((len(problem.samples), problem.V))
    for i, s in enumerate(problem.samples):
        out[i, s.preferred[0]] += 1
        out[i, s.dispreferred[0]] -= 1
    return out / len(problem.samples)


def _rows(problem: Problem) -> list[int]:
    return [w.rows[0] for w, _ in problem.pairs]


class MarginsNeedNoSoftmax(Theorem):
    """Losses of margins see differences of unembeddings only: the softmax cancels."""

    name = "margins_need_no_softmax"
    statement = (
        r"Single-token pairs, each prompt once: $\dot H=\eta_h\,\mathrm{diag}(G)\,BW$,"
        r" $\dot W=\eta_WB^\top\mathrm{diag}(G)H$, $B$ the signed incidence matrix of prompts and tokens over $|D|$"
    )
    source = "this project, E7"
    settings = ("data_set", "single_token")
    knobs = ("hidden vectors", "unembeddings")
    sharpness = (
        Sharpness("one-token responses and each prompt once", "sequence_data_set"),
        Sharpness("a loss of the margin alone", "sft_data_set"),
    )

    def applies(self, problem: Problem) -> Mask:
        return everywhere(problem, is_token_data_set(problem) and problem.has_margin_loss)

    def residual(self, problem: Problem, route: Route) -> Array:
        dW, dH = route.velocity(problem)
        B, rows = incidence(problem), _rows(problem)
        G = problem.incentives[0][..., None]  # (B, S, 1)
        H = problem.H[:, rows]
        closed_H = self.k("hidden vectors") * problem.lr_hidden * G * (B @ problem.W)
        closed_W = self.k("unembeddings") * problem.lr_unembedding * B.T @ (G * H)
        sizes = problem.incentive_sizes[0].sum(1)
        size_H = sizes * problem.lr_hidden * abs(problem.W).max((1, 2)) + 1e-300
        size_W = sizes * problem.lr_unembedding * abs(H).max((1, 2)) + 1e-300
        errors = [
            relative(abs(dH[:, rows] - closed_H).max((1, 2)), size_H),
            relative(abs(dW - closed_W).max((1, 2)), size_W),
        ]
        return np.max(errors, axis=0)


class ConstantSlopeModes(Theorem):
    """Constant slopes (SLiC until it stops, DPO to first order): each singular value of B is a mode."""

    name = "constant_slope_modes"
    statement = (
        r"$G$ constant, $B=\sum_i\sigma_iu_iv_i^\top$, $\omega_i=\sigma_iG\sqrt{\eta_W\eta_h}$:"
        r" $u_i^\top H=\cosh(\omega_it)\,u_i^\top H_0+\sqrt{\eta_h/\eta_W}\sinh(\omega_it)\,v_i^\top W_0$, so for $W$"
    )
    source = "this project, E7"
    settings = ("data_set", "single_token")
    routes = ("simulated",)
    knobs = ("frequency", "exchange")
    tolerance = FLOW_TOLERANCE
    sharpness = (Sharpness("each prompt once", "sequence_data_set"),)

    def applies(self, problem: Problem) -> Mask:
        return everywhere(problem, is_token_data_set(problem))

    def residual(self, problem: Problem, route: Route) -> Array:
        unit = replace(problem, loss=UNIT_SLOPE, lr_unembedding=0.7, lr_hidden=1.3)
        times = np.array([0.5, 1.0, 2.0])
        run, rows = route.flow(unit, times), _rows(unit)
        U, sigma, Vt = np.linalg.svd(incidence(unit), full_matrices=False)
        w = self.k("frequency") * sigma * np.sqrt(unit.lr_unembedding * unit.lr_hidden)
        H0, W0 = U.T @ unit.H[:, rows], Vt @ unit.W
        ratio = np.sqrt(unit.lr_hidden / unit.lr_unembedding)
        error, size = np.zeros(len(unit)), 1 + abs(unit.W).max((1, 2)) + abs(unit.H).max((1, 2))
        for i, t in enumerate(times):
            C, S = np.cosh(w * t)[:, None], self.k("exchange") * np.sinh(w * t)[:, None]
            gaps = [U.T @ run.H[i][:, rows] - C * H0 - ratio * S * W0, Vt @ run.W[i] - C * W0 - S * H0 / ratio]
            error = np.maximum(error, np.max([abs(g).max((1, 2)) for g in gaps], axis=0))
        return error / size


class PromptsDecouple(Theorem):
    """W frozen and each prompt once: every prompt moves as if it were alone, at its own clock."""

    name = "prompts_decouple"
    statement = (
        r"$\eta_W=0$, each prompt once: the flow of each prompt is that of its own sample, at $1/|D|$ of the speed"
    )
    source = "this project, E7"
    settings = ("data_set",)
    routes = ("simulated",)
    knobs = ("speed",)
    wrong_factors = (0.0, 2.0)  # a flow does not run backwards
    tolerance = FLOW_TOLERANCE
    sharpness = (
        Sharpness("W frozen", "data_set"),
        Sharpness("each prompt once", "sequence_data_set"),
    )

    def applies(self, problem: Problem) -> Mask:
        once = len({s.prompt for s in problem.samples}) == len(problem.samples)
        return everywhere(problem, once and problem.lr_unembedding == 0)

    def measurable(self, problem: Problem) -> Mask:
        return tame(problem)

    def residual(self, problem: Problem, route: Route) -> Array:
        times = times_for(problem)
        together = route.flow(problem, times)
        error = np.zeros(len(problem))
        for i, sample in enumerate(problem.samples):
            alone = replace(
                problem,
                samples=(Sample(sample.prompt, sample.responses[:2]),),
                references=problem.references[:, i : i + 1],
            )
            run = route.flow(alone, self.k("speed") * times / len(problem.samples))
            rows = [row for y in problem.pairs[i] for row in y.rows]
            gap = abs(run.H[:, :, rows] - together.H[:, :, rows]).max((0, 2, 3))
            error = np.maximum(error, gap / (1 + abs(together.H).max((0, 2, 3))))
        return error
