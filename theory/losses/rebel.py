"""REBEL: regression of the margin on a difference of rewards."""

from dataclasses import dataclass
from typing import Any

from theory._check import POSITIVE, REAL
from theory.losses._base import Claims, MarginLoss, Pair, parameter
from theory.losses._laws import Law, LinearSlope
from theory.ops import Ops


@dataclass(frozen=True)
class REBEL(MarginLoss):
    """((u - u_ref)/eta - (r(x, y+) - r(x, y-)))^2: convex, least at u_ref + eta * reward_gap."""

    eta: float = parameter(1.0, POSITIVE)
    reward_gap: float = parameter(1.0, REAL)

    name = "rebel"
    reference = "Gao et al. 2024 (arXiv 2404.16767); Razin et al. 2024, App. B"
    claims = Claims(decreasing=False)

    def formula(self, ops: Ops, y: Pair) -> Any:
        return (y.m / self.eta - self.reward_gap) ** 2

    def closed_slope(self, ops: Ops, y: Pair) -> Any:
        return 2 / self.eta * (self.reward_gap - y.m / self.eta)

    def minimiser(self, u_ref: Any) -> Any:
        return u_ref + self.eta * self.reward_gap

    def law(self, u_ref: Any) -> Law:
        return LinearSlope(2 / self.eta**2, self.minimiser(u_ref))

    @classmethod
    def examples(cls) -> tuple["REBEL", ...]:
        return (cls(), cls(eta=2.3, reward_gap=1.7))
