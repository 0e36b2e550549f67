"""The general formula that Theorems 4 to 9 and Propositions 1 and 2 are cases of."""

import numpy as np

from theory.losses import TokenLoss
from theory.problem import Positions, Problem
from theory.theorems._base import Array, Mask, RateTheorem, Sharpness, everywhere, probe_of


class GeneralRate(RateTheorem):
    """Any loss of log-probabilities, any data set, any response, shared prefixes included."""

    name = "general_rate"
    statement = (
        r"$\frac{d}{dt}\ln\pi(z|x) = \frac1{|D|}\sum_{\tilde x}[d_w\langle\nabla\ln\pi(z|x),\nabla\ln\pi(\tilde y^+|"
        r"\tilde x)\rangle - d_l\langle\nabla\ln\pi(z|x),\nabla\ln\pi(\tilde y^-|\tilde x)\rangle]$,"
        r" $\langle\nabla\ln\pi(v),\nabla\ln\pi(w)\rangle = \eta_W\sum_{k,l}\langle E_{v,k},E_{w,l}\rangle\langle"
        r" h_{v_{<k}},h_{w_{<l}}\rangle + \eta_h\sum_{v_{<k}=w_{<l}}\langle W^{\top}E_{v,k},W^{\top}E_{w,l}\rangle$"
    )
    source = "this project; the extension to shared prefixes that the paper leaves to the reader"
    settings = ("sequence_data_set", "shared_prefix", "sft_data_set", "weighted_data_set", "data_set")
    knobs = ("unembedding, with y+", "unembedding, with y-", "hidden, with y+", "hidden, with y-")
    sharpness = (
        Sharpness("a loss of whole responses", None, "a loss of single tokens has no d_w and d_l: claim token_rate"),
        Sharpness(
            "unconstrained features",
            None,
            "holds for any loss, data and response of the model; a network that ties hidden vectors adds cross blocks "
            "of its kernel (claim kernel_path)",
        ),
    )

    def applies(self, problem: Problem) -> Mask:
        return everywhere(problem, not isinstance(problem.loss, TokenLoss))

    def response(self, problem: Problem) -> Positions:
        return probe_of(problem)

    def terms(self, problem: Problem, z: Positions) -> dict[str, Array]:
        total: dict[str, Array] = {name: np.zeros(len(problem)) for name in self.knobs}
        for i, pair in enumerate(problem.pairs):
            for sign, d, y, side in zip((1, -1), problem.incentives, pair, ("y+", "y-"), strict=True):
                parts, weight = problem.overlap(z, y), sign * d[:, i] / len(problem.pairs)
                total[f"unembedding, with {side}"] += weight * parts.through_h(problem.lr_hidden)
                total[f"hidden, with {side}"] += weight * parts.through_W(problem.lr_unembedding)
        return total
