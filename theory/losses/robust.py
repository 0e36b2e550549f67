"""Robust DPO: an unbiased estimate of the DPO loss from labels that are wrong with probability eps."""

from dataclasses import dataclass
from typing import Any

from theory._check import POSITIVE, Interval
from theory.losses._base import Claims, MarginLoss, Pair, parameter
from theory.losses._laws import Law, LogisticSlope
from theory.ops import Ops


@dataclass(frozen=True)
class Robust(MarginLoss):
    """[-(1-eps) ln sigmoid(z) + eps ln sigmoid(-z)]/(1-2 eps), z = beta m: DPO minus eps/(1-2 eps) z.

    Convex and strictly decreasing; unbounded below for eps > 0, where the slope never falls under
    beta eps/(1-2 eps). DPO at eps = 0.
    """

    beta: float = parameter(0.1, POSITIVE)
    eps: float = parameter(0.1, Interval(0.0, 0.5, open_low=False, typical=(0.05, 0.4)))

    name = "robust"
    reference = "Chowdhury et al. 2024 (arXiv 2403.00409); TRL loss_type robust"

    @property
    def claims(self) -> Claims:  # type: ignore[override]
        return Claims(nonnegative=self.eps == 0)

    def formula(self, ops: Ops, y: Pair) -> Any:
        z = self.beta * y.m
        return (-(1 - self.eps) * ops.log_sigmoid(z) + self.eps * ops.log_sigmoid(-z)) / (1 - 2 * self.eps)

    def closed_slope(self, ops: Ops, y: Pair) -> Any:
        return self.beta * (ops.sigmoid(-self.beta * y.m) + self.eps / (1 - 2 * self.eps))

    def closed_log_slope(self, ops: Ops, y: Pair) -> Any:
        if self.eps == 0:  # sigmoid(-z) underflows, its logarithm does not
            return ops.log(self.beta) + ops.log_sigmoid(-self.beta * y.m)
        return ops.log(self.closed_slope(ops, y))

    def law(self, u_ref: Any) -> Law | None:
        return LogisticSlope(self.beta, u_ref) if self.eps == 0 else None

    @classmethod
    def examples(cls) -> tuple["Robust", ...]:
        return (cls(), cls(beta=0.6, eps=0.27), cls(eps=0.0))
