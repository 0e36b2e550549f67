"""Theorem 7: one sample of sequences, the rate of any response that starts differently from both."""

from theory.problem import Positions, Problem
from theory.theorems._base import Array, Mask, RateTheorem, Sharpness, everywhere, first_tokens, probe_of
from theory.theorems._single import Branch


class Theorem7(RateTheorem):
    """The first token's alignment with W_{y+_1} - W_{y-_1}, and hidden vectors against those of y+ and y-."""

    name = "theorem_7"
    statement = (
        r"$\frac{d}{dt}\ln\pi(z|x) = G\,[\langle W_{z_1},W_{y^+_1}-W_{y^-_1}\rangle"
        r" - \sum_{v}\pi(v|x)\langle W_v,W_{y^+_1}-W_{y^-_1}\rangle"
        r" - \sum_{k,k'}\beta^-_{kk'}\langle h_{z_{<k}},h_{y^-_{<k'}}\rangle"
        r" + \sum_{k,k'}\beta^+_{kk'}\langle h_{z_{<k}},h_{y^+_{<k'}}\rangle]$ if $y^+_1\neq y^-_1$, $z_1\neq y^\pm_1$"
    )
    source = "Razin et al. 2024, Theorem 7"
    settings = ("sequences", "single_token")
    knobs = ("alignment of the first token", "mean alignment", "hidden vectors of y-", "hidden vectors of y+")
    sharpness = (
        Sharpness("y+, y- and z differ at the first token", "shared_prefix"),
        Sharpness("one sample", "sequence_data_set"),
        Sharpness("a loss of the margin alone", "weighted"),
    )

    def applies(self, problem: Problem) -> Mask:
        plus, minus = first_tokens(problem)
        apart = plus != minus and probe_of(problem).tokens[0] not in (plus, minus)
        return everywhere(problem, len(problem.samples) == 1 and apart and problem.has_margin_loss)

    def response(self, problem: Problem) -> Positions:
        return probe_of(problem)

    def terms(self, problem: Problem, z: Positions) -> dict[str, Array]:
        x = Branch(problem)
        (w, l), body, head = problem.pairs[0], x.G * problem.lr_hidden, x.G * problem.lr_unembedding
        return {
            "alignment of the first token": body * x.along[:, z.tokens[0]],
            "mean alignment": -body * x.mean_along,
            "hidden vectors of y-": -head * problem.overlap(z, l).through_W(1.0),
            "hidden vectors of y+": head * problem.overlap(z, w).through_W(1.0),
        }
