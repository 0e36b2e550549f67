"""Identity preference optimisation."""

from dataclasses import dataclass
from typing import Any

from theory._check import POSITIVE
from theory.losses._base import Claims, MarginLoss, Pair, parameter
from theory.losses._laws import Law, LinearSlope
from theory.ops import Ops


@dataclass(frozen=True)
class IPO(MarginLoss):
    """(u - u_ref - 1/(2 tau))^2, on summed log-probabilities: convex, least at u_ref + 1/(2 tau)."""

    tau: float = parameter(0.1, POSITIVE)

    name = "ipo"
    reference = "Azar et al. 2023 (arXiv 2310.12036), eq. 17; Razin et al. 2024, App. B"
    claims = Claims(decreasing=False)

    def formula(self, ops: Ops, y: Pair) -> Any:
        return (y.m - 1 / (2 * self.tau)) ** 2

    def closed_slope(self, ops: Ops, y: Pair) -> Any:
        return 2 * (1 / (2 * self.tau) - y.m)

    def minimiser(self, u_ref: Any) -> Any:
        return u_ref + 1 / (2 * self.tau)

    def law(self, u_ref: Any) -> Law:
        return LinearSlope(2.0, self.minimiser(u_ref))

    @classmethod
    def examples(cls) -> tuple["IPO", ...]:
        return (cls(), cls(tau=0.83))
