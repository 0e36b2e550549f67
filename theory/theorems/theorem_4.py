"""Theorem 4: one sample, single-token responses, the rate of the preferred one."""

from theory.problem import Positions, Problem
from theory.theorems._base import Array, Mask, RateTheorem, Sharpness, everywhere, is_single_token
from theory.theorems._single import Branch


class Theorem4(RateTheorem):
    """The preferred token's rate; the loss enters only through G > 0, so its sign is the same for every margin loss."""

    name = "theorem_4"
    statement = (
        r"$\frac{d}{dt}\ln\pi_+ = G\,[(1-\pi_+)|W_+|^2 + \pi_-|W_-|^2 + (1-\pi_++\pi_-)|h|^2"
        r" - (1-\pi_++\pi_-)\langle W_+,W_-\rangle - \sum_{z\neq\pm}\pi_z\langle W_z,W_+-W_-\rangle]$"
    )
    source = "Razin et al. 2024, Theorem 4"
    knobs = ("norms of W_+ and W_-", "alignment of W_+ and W_-", "other tokens, weighted", "hidden norm")
    sharpness = (
        Sharpness("one sample", "data_set"),
        Sharpness("one-token responses", "sequences"),
        Sharpness("a loss of the margin alone", "sft_regularised"),
    )

    def applies(self, problem: Problem) -> Mask:
        return everywhere(problem, is_single_token(problem) and problem.has_margin_loss)

    def terms(self, problem: Problem, z: Positions) -> dict[str, Array]:
        x = Branch(problem)
        body, head = x.G * problem.lr_hidden, x.G * problem.lr_unembedding
        return {
            "norms of W_+ and W_-": body * x.norms,
            "alignment of W_+ and W_-": -body * x.mass * x.WW(x.plus, x.minus),
            "other tokens, weighted": -body * x.weighted_others,
            "hidden norm": head * x.mass * x.hh,
        }
