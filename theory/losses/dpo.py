"""Direct preference optimisation."""

from dataclasses import dataclass
from typing import Any

from theory._check import POSITIVE
from theory.losses._base import Claims, MarginLoss, Pair, parameter
from theory.losses._laws import Law, LogisticSlope
from theory.ops import Ops


@dataclass(frozen=True)
class DPO(MarginLoss):
    """-ln sigmoid(beta (u - u_ref)): convex, strictly decreasing, no finite minimiser."""

    beta: float = parameter(0.1, POSITIVE)

    name = "dpo"
    reference = "Rafailov et al. 2023 (arXiv 2305.18290), eq. 7; Razin et al. 2024, App. B"
    claims = Claims()

    def formula(self, ops: Ops, y: Pair) -> Any:
        return -ops.log_sigmoid(self.beta * y.m)

    def closed_slope(self, ops: Ops, y: Pair) -> Any:
        return self.beta * ops.sigmoid(-self.beta * y.m)

    def closed_log_slope(self, ops: Ops, y: Pair) -> Any:
        return ops.log(self.beta) + ops.log_sigmoid(-self.beta * y.m)

    def law(self, u_ref: Any) -> Law:
        return LogisticSlope(self.beta, u_ref)

    @classmethod
    def examples(cls) -> tuple["DPO", ...]:
        return (cls(), cls(beta=0.7))
