"""Conservative DPO: labels that are wrong with probability eps."""

from dataclasses import dataclass
from math import log
from typing import Any

from theory._check import POSITIVE, Interval
from theory.losses._base import Claims, MarginLoss, Pair, parameter
from theory.losses._laws import Law, LogisticSlope
from theory.losses._logistic import smoothed
from theory.ops import Ops


@dataclass(frozen=True)
class CDPO(MarginLoss):
    """-(1-eps) ln sigmoid(beta m) - eps ln sigmoid(-beta m): least at m = ln((1-eps)/eps)/beta; DPO at eps = 0."""

    beta: float = parameter(0.1, POSITIVE)
    eps: float = parameter(0.1, Interval(0.0, 0.5, open_low=False, typical=(0.05, 0.4)))

    name = "cdpo"
    reference = "Mitchell 2023, A note on DPO with noisy preferences & IPO"

    @property
    def claims(self) -> Claims:  # type: ignore[override]
        return Claims(decreasing=self.eps == 0)

    def formula(self, ops: Ops, y: Pair) -> Any:
        return smoothed(ops, self.beta * y.m, self.eps)

    def closed_slope(self, ops: Ops, y: Pair) -> Any:
        return self.beta * (ops.sigmoid(-self.beta * y.m) - self.eps)

    def closed_log_slope(self, ops: Ops, y: Pair) -> Any:
        # sigmoid(-z) - eps = (1-eps) sigmoid(-z) (1 - e^(z - z*)), z* the minimiser: no cancellation near z*, and
        # no underflow at eps = 0, where the last factor is 1.
        z = self.beta * y.m
        tail = ops.log(1 - self.eps) + ops.log_sigmoid(-z)
        if self.eps > 0:
            gap = z - log((1 - self.eps) / self.eps)
            # ln|1 - e^gap| = max(gap, 0) + ln(-expm1(-|gap|))
            tail = tail + ops.relu(gap) + ops.log(-ops.expm1(-(ops.relu(gap) + ops.relu(-gap))))
        return ops.log(self.beta) + tail

    def minimiser(self, u_ref: Any) -> Any:
        return None if self.eps == 0 else u_ref + log((1 - self.eps) / self.eps) / self.beta

    def law(self, u_ref: Any) -> Law | None:
        return LogisticSlope(self.beta, u_ref) if self.eps == 0 else None

    @classmethod
    def examples(cls) -> tuple["CDPO", ...]:
        return (cls(), cls(beta=0.6, eps=0.27), cls(eps=0.0))
