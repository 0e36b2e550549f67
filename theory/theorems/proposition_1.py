"""Proposition 1: a margin loss plus an SFT term."""

from theory.losses import SFT, MarginForm, MarginLoss
from theory.problem import Positions, Problem
from theory.theorems._base import Array, Mask, RateTheorem, Sharpness, everywhere


class Proposition1(RateTheorem):
    """The SFT term adds lambda |grad ln pi(y+)|^2 >= 0 to the speed of the unregularised loss."""

    name = "proposition_1"
    statement = (
        r"$\ell(u) - \lambda\ln\pi(y^+|x)$: $\frac{d}{dt}\ln\pi(y^+|x) = E + \lambda|\nabla\ln\pi(y^+|x)|^2$,"
        r" $E = -\ell'(u)\langle\nabla\ln\pi(y^+),\nabla\ln\pi(y^+)-\nabla\ln\pi(y^-)\rangle$"
    )
    source = "Razin et al. 2024, App. E, Proposition 1"
    settings = ("sft_regularised",)
    knobs = ("own gradient", "common gradient", "SFT term")
    sharpness = (Sharpness("one sample", "sft_data_set"),)

    def applies(self, problem: Problem) -> Mask:
        loss = problem.loss
        form_4 = isinstance(loss, SFT) and loss.per == "sequence" and isinstance(loss.base, MarginLoss)
        return everywhere(problem, form_4 and len(problem.samples) == 1)

    def terms(self, problem: Problem, z: Positions) -> dict[str, Array]:
        loss, (w, l) = problem.loss, problem.pairs[0]
        assert isinstance(loss, SFT)
        assert isinstance(loss.base, MarginLoss)
        G = MarginForm(loss.base, problem.reference_margin).slope(problem.margin)
        return {
            "own gradient": G * problem.inner(w, w),
            "common gradient": -G * problem.inner(w, l),
            "SFT term": loss.lam * problem.inner(w, w),
        }
