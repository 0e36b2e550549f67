"""SLiC-HF: the hinge of SLiC with a likelihood term that holds the model to good responses."""

from dataclasses import dataclass
from typing import Any

from theory._check import POSITIVE
from theory.losses._base import Claims, Loss, Pair, parameter
from theory.ops import Ops


@dataclass(frozen=True)
class SLiCHF(Loss):
    """max(0, delta - u) - lam ln pi(y+): convex, decreasing; from u = delta on only the likelihood term is left.

    The paper's likelihood term is on a target y_ref of the sample, here its preferred response (one of its choices).
    """

    delta: float = parameter(1.0, POSITIVE)
    lam: float = parameter(0.5, POSITIVE)

    name = "slic_hf"
    reference = "Zhao et al. 2023 (arXiv 2305.10425), eq. 2; Razin et al. 2024, App. B"
    claims = Claims(differentiable=False, reference_free=True)

    def formula(self, ops: Ops, y: Pair) -> Any:
        return ops.relu(self.delta - y.u) - self.lam * y.a

    @classmethod
    def examples(cls) -> tuple["SLiCHF", ...]:
        return (cls(), cls(delta=2.3, lam=0.3))
