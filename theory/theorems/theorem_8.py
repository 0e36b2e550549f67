"""Theorem 8: a data set of single-token pairs, each prompt once, the rate of a preferred token."""

import numpy as np

from theory.problem import Positions, Problem
from theory.theorems._base import Array, Mask, RateTheorem, Sharpness, everywhere
from theory.theorems._single import Branch, dot


class Theorem8(RateTheorem):
    """Theorem 4 for the sample itself, and every other sample through alpha_{x,x~} <h_x, h_x~>."""

    name = "theorem_8"
    statement = (
        r"$\frac{d}{dt}\ln\pi(y^+|x) = \frac{G_x}{|D|}[m + S_{y^+,y^-}]"
        r" + \sum_{\tilde x\neq x}\frac{G_{\tilde x}}{|D|}\alpha_{x,\tilde x}\langle h_x,h_{\tilde x}\rangle$,"
        r" $\alpha_{x,\tilde x} = 1[y^+=\tilde y^+] - 1[y^+=\tilde y^-] + \pi(\tilde y^-|x) - \pi(\tilde y^+|x)$"
    )
    source = "Razin et al. 2024, Theorem 8"
    settings = ("data_set", "single_token")
    knobs = ("norms of W_+ and W_-", "hidden norm", "S of eq. 3", "other samples")
    sharpness = (
        Sharpness("one-token responses and each prompt once", "sequence_data_set"),
        Sharpness("a loss of the margin alone", "sft_regularised"),
    )

    def applies(self, problem: Problem) -> Mask:
        return everywhere(problem, is_token_data_set(problem) and problem.has_margin_loss)

    def terms(self, problem: Problem, z: Positions) -> dict[str, Array]:
        own = problem.pairs.index(next(pair for pair in problem.pairs if pair[0] == z))
        x, share = Branch(problem, own), 1 / len(problem.samples)
        body, head = x.G * problem.lr_hidden * share, x.G * problem.lr_unembedding * share
        others = np.zeros(len(problem))
        for i in range(len(problem.samples)):
            if i != own:
                y = Branch(problem, i)
                alpha = float(x.plus == y.plus) - float(x.plus == y.minus) + x.p[:, y.minus] - x.p[:, y.plus]
                others += y.G * problem.lr_unembedding * share * alpha * dot(x.h, y.h)
        return {
            "norms of W_+ and W_-": body * x.norms,
            "hidden norm": head * x.mass * x.hh,
            "S of eq. 3": body * x.S,
            "other samples": others,
        }


def is_token_data_set(problem: Problem) -> bool:
    """One-token responses, each prompt once."""
    prompts = [s.prompt for s in problem.samples]
    short = all(len(y) == 1 for s in problem.samples for y in s.responses[:2])
    return short and len(set(prompts)) == len(prompts)
