"""BoNBoN: imitate the best of n samples, with IPO between the best and the worst."""

from dataclasses import dataclass
from typing import Any

from theory._check import POSITIVE, Interval, check_count
from theory.losses._base import Claims, Loss, Pair, parameter
from theory.ops import Ops


def best_of_n_beta(n: int) -> float:
    """The beta at which IPO's target 1/(2 beta) is what best-of-n sampling gives: (n-1) (1 + 1/2 + ... + 1/(n-1)).

    Best-of-n tilts the reference by n F^(n-1), F the rank of a response; the ranks of the best and the worst of n are
    the largest and smallest of n uniforms, so the mean of their log-ratio is (n-1) (H_n - 1/n) = (n-1) H_(n-1).
    """
    n = check_count(n, "n", low=2)
    return 1 / (2 * (n - 1) * sum(1 / k for k in range(1, n)))


@dataclass(frozen=True)
class BoNBoN(Loss):
    """-alpha ln pi(y+) + (1-alpha) (m - 1/(2 beta))^2, y+ and y- the best and worst of n: `BoNBoN.best_of(n)`.

    Convex; the likelihood term has no least point, so neither has the sum. Past m = 1/(2 beta) it pushes y- up. The
    default is n = 8.
    """

    alpha: float = parameter(0.005, Interval(0.0, 1.0, typical=(0.01, 0.9)))
    beta: float = parameter(best_of_n_beta(8), POSITIVE)

    name = "bonbon"
    reference = "Gui, Garbacea, Veitch 2024 (arXiv 2406.00832), BoNBoN objective; beta of best-of-n derived"
    claims = Claims(decreasing=False)

    @classmethod
    def best_of(cls, n: int, alpha: float = 0.005) -> "BoNBoN":
        """The loss for the best and worst of n samples."""
        return cls(alpha, best_of_n_beta(n))

    def formula(self, ops: Ops, y: Pair) -> Any:
        return -self.alpha * y.a + (1 - self.alpha) * (y.m - 1 / (2 * self.beta)) ** 2

    @classmethod
    def examples(cls) -> tuple["BoNBoN", ...]:
        return (cls(), cls(alpha=0.3, beta=0.43))
