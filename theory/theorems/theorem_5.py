"""Theorem 5: one sample, single-token responses, the rate of any other token."""

from theory.problem import Positions, Problem
from theory.theorems._base import Array, Mask, RateTheorem, Sharpness, everywhere, is_single_token, probe_of
from theory.theorems._single import Branch


class Theorem5(RateTheorem):
    """Every other token gains by its alignment with W_+ - W_-, up to a shared constant (y- moves itself, too)."""

    name = "theorem_5"
    statement = (
        r"$\frac{d}{dt}\ln\pi_z = G\,[\langle W_z,W_+-W_-\rangle + (\pi_--\pi_+-1[z=y^-])|h|^2"
        r" - \sum_{z'}\pi_{z'}\langle W_{z'},W_+-W_-\rangle]$ for $z\neq y^+$"
    )
    source = "Razin et al. 2024, Theorem 5; z = y- is added here"
    knobs = ("alignment with W_+ - W_-", "mean alignment", "hidden norm")
    sharpness = (
        Sharpness("one sample", "data_set"),
        Sharpness("one-token responses", "sequences"),
        Sharpness("a loss of the margin alone", "sft_regularised"),
    )

    def applies(self, problem: Problem) -> Mask:
        z = probe_of(problem).tokens
        single = is_single_token(problem) and problem.has_margin_loss
        return everywhere(problem, single and len(z) == 1 and z[0] != Branch(problem).plus)

    def response(self, problem: Problem) -> Positions:
        return probe_of(problem)

    def terms(self, problem: Problem, z: Positions) -> dict[str, Array]:
        x, token = Branch(problem), z.tokens[0]
        body, head = x.G * problem.lr_hidden, x.G * problem.lr_unembedding
        own = float(token == x.minus)  # y- has a row of its own that moves
        return {
            "alignment with W_+ - W_-": body * x.along[:, token],
            "mean alignment": -body * x.mean_along,
            "hidden norm": head * (x.p[:, x.minus] - x.p[:, x.plus] - own) * x.hh,
        }
