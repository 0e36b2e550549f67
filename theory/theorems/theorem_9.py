"""Theorem 9: a data set of single-token pairs, each prompt once, the rate of any token."""

import numpy as np

from theory.problem import Positions, Problem
from theory.theorems._base import Array, Mask, RateTheorem, Sharpness, everywhere, probe_of
from theory.theorems._single import Branch, dot
from theory.theorems.theorem_8 import is_token_data_set


class Theorem9(RateTheorem):
    """The sample's own alignment, and every sample that names the token, through <h_x, h_x~>."""

    name = "theorem_9"
    statement = (
        r"$\frac{d}{dt}\ln\pi(z|x) = \frac{G_x}{|D|}[\langle W_z,W_{y^+}-W_{y^-}\rangle - \sum_{z'}\pi(z'|x)\langle"
        r" W_{z'},W_{y^+}-W_{y^-}\rangle] + \sum_{\tilde x}\frac{G_{\tilde x}}{|D|}(1[z=\tilde y^+]-1[z=\tilde y^-]"
        r" + \pi(\tilde y^-|x)-\pi(\tilde y^+|x))\langle h_x,h_{\tilde x}\rangle$"
    )
    source = "Razin et al. 2024, Theorem 9"
    settings = ("data_set", "single_token")
    knobs = ("alignment with W_+ - W_-", "mean alignment", "samples that name it", "mean over samples")
    sharpness = (
        Sharpness("one-token responses and each prompt once", "sequence_data_set"),
        Sharpness("a loss of the margin alone", "sft_regularised"),
    )

    def applies(self, problem: Problem) -> Mask:
        one = problem.probe is not None and len(problem.probe[1]) == 1
        return everywhere(problem, one and is_token_data_set(problem) and problem.has_margin_loss)

    def response(self, problem: Problem) -> Positions:
        return probe_of(problem)

    def terms(self, problem: Problem, z: Positions) -> dict[str, Array]:
        prompt = problem.contexts[z.rows[0]][0]
        own = [s.prompt for s in problem.samples].index(prompt)
        x, share, token = Branch(problem, own), 1 / len(problem.samples), z.tokens[0]
        body = x.G * problem.lr_hidden * share
        named, mean = np.zeros(len(problem)), np.zeros(len(problem))
        for i in range(len(problem.samples)):
            y = Branch(problem, i)
            through = y.G * problem.lr_unembedding * share * dot(x.h, y.h)
            named += through * (float(token == y.plus) - float(token == y.minus))
            mean += through * (x.p[:, y.minus] - x.p[:, y.plus])
        return {
            "alignment with W_+ - W_-": body * x.along[:, token],
            "mean alignment": -body * x.mean_along,
            "samples that name it": named,
            "mean over samples": mean,
        }
