"""FocalPO: DPO that turns away from pairs it ranks wrongly."""

from dataclasses import dataclass
from math import expm1, log
from typing import Any

from theory._check import POSITIVE, Interval
from theory.losses._base import Claims, MarginLoss, Pair, parameter
from theory.ops import Ops


@dataclass(frozen=True)
class FocalPO(MarginLoss):
    """-p^gamma ln p, p = sigmoid(beta m): rises to 1/(e gamma) at p = e^(-1/gamma), falls from there on.

    Checked by derivation: G = beta (1-p) p^gamma (1 + gamma ln p), which is negative for p < e^(-1/gamma): there the
    loss pushes the margin down. It starts (p = 1/2) on the right side if gamma < 1/ln 2 = 1.443. DPO at gamma = 0.
    """

    beta: float = parameter(0.1, POSITIVE)
    gamma: float = parameter(0.05, Interval(0.0, open_low=False, typical=(0.05, 2.0)))

    name = "focal_po"
    reference = "Liu et al. 2025 (arXiv 2501.06645)"

    @property
    def claims(self) -> Claims:  # type: ignore[override]
        return Claims(convex=self.gamma == 0, decreasing=self.gamma == 0)

    def formula(self, ops: Ops, y: Pair) -> Any:
        log_p = ops.log_sigmoid(self.beta * y.m)
        return -ops.exp(self.gamma * log_p) * log_p

    def closed_slope(self, ops: Ops, y: Pair) -> Any:
        z = self.beta * y.m
        log_p = ops.log_sigmoid(z)
        return self.beta * ops.sigmoid(-z) * ops.exp(self.gamma * log_p) * (1 + self.gamma * log_p)

    def closed_log_slope(self, ops: Ops, y: Pair) -> Any:
        z = self.beta * y.m
        log_p = ops.log_sigmoid(z)
        factor = 1 + self.gamma * log_p
        size = ops.log(ops.relu(factor) + ops.relu(-factor))
        return ops.log(self.beta) + ops.log_sigmoid(-z) + self.gamma * log_p + size

    def zeros(self, u_ref: Any) -> tuple[Any, ...]:
        if self.gamma == 0:
            return ()
        log_p = -1 / self.gamma
        return (u_ref + (log_p - log(-expm1(log_p))) / self.beta,)

    @classmethod
    def examples(cls) -> tuple["FocalPO", ...]:
        return (cls(), cls(beta=0.7, gamma=1.3), cls(gamma=0.0))
