"""The general rate for losses of single tokens, and of several responses."""

from theory.losses import TokenLoss
from theory.problem import Positions, Problem
from theory.theorems._base import Array, Mask, RateTheorem, Sharpness, everywhere, probe_of


class TokenRate(RateTheorem):
    """Any loss at all: what it exerts on the logits of every context, carried to a response by the same products."""

    name = "token_rate"
    statement = (
        r"$\frac{d}{dt}\ln\pi(z|x) = \sum_{k,c}\left[\eta_W\langle E_{z,k},C_c\rangle\langle h_{z_{<k}},h_c\rangle +"
        r" \eta_h\,1[z_{<k}=c]\,\langle W^{\top}E_{z,k},W^{\top}C_c\rangle\right]$, $C_c = -\partial L/\partial"
        r"\mathrm{logits}_c$, $c$ over all contexts"
    )
    source = "this project; exact_solution E3"
    settings = ("token_data_set",)
    routes = ("autodiff",)
    knobs = ("hidden", "unembedding")
    sharpness = (
        Sharpness("unconstrained features", None, "holds for any loss; ties between hidden vectors add cross blocks"),
    )

    def applies(self, problem: Problem) -> Mask:
        return everywhere(problem, isinstance(problem.loss, TokenLoss))

    def response(self, problem: Problem) -> Positions:
        return probe_of(problem)

    def terms(self, problem: Problem, z: Positions) -> dict[str, Array]:
        through_W, through_h = problem.through_logits(z)
        return {"hidden": through_W.mean(1), "unembedding": through_h.mean(1)}
