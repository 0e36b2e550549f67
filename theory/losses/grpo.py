"""Group relative policy optimisation: one step on a fixed group of responses."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from theory._check import Interval
from theory.losses._base import Claims, Group, TokenLoss, parameter
from theory.ops import Ops

_FROM_ZERO = Interval(low=0.0, open_low=False)
_UNIT_CLOSED = Interval(low=0.0, high=1.0, open_low=False, open_high=False, typical=(0.0, 1.0))


def advantages(rewards: Sequence[float]) -> tuple[float, ...]:
    """(reward - mean) / standard deviation (of the population) per response; all 0 if the rewards are equal.

    Equal rewards are told by themselves, not by their deviation: of 0.1, 0.1, 0.1 it rounds to 1e-17, and the quotient
    to -1.
    """
    if max(rewards) == min(rewards):
        return (0.0,) * len(rewards)
    mean = math.fsum(rewards) / len(rewards)
    deviation = math.sqrt(math.fsum((r - mean) ** 2 for r in rewards) / len(rewards))
    return tuple((r - mean) / deviation for r in rewards)


@dataclass(frozen=True)
class GRPO(TokenLoss):
    """Minus the mean over responses of sum_t min(rho_t A, clip(rho_t, 1 - eps, 1 + eps) A) / |y|, plus beta KL.

    rho_t = pi(y_t) / pi_ref(y_t): the old policy, from which the group was drawn, is the reference model. A is the
    response's advantage, so a group of equal rewards has loss 0 and no gradient (but for the KL term). The KL term is
    the estimator pi_ref/pi - ln(pi_ref/pi) - 1 per token (the paper: beta = 0.04; common trainers: 0).
    `length_power`: a response's sum is divided by |y|^length_power; 1 is the original, 0 leaves a plain sum (as in the
    paper of GWHES and, but for the scale of A, in Dr. GRPO). With length_power 1 the loss is 0 at the reference model
    and at least -eps mean |A|, which without KL and for eps <= 1 it reaches once all ratios are past their clip.

    Where a clip holds a response against the pull of another, gradient flow slides along the kink and a general solver
    sticks: train by steps, or without the clip, which eps = 1e6 is.
    """

    eps: float = parameter(0.2, Interval(low=0.0, typical=(0.05, 0.5)))
    beta: float = parameter(0.0, _FROM_ZERO)
    length_power: float = parameter(1.0, _UNIT_CLOSED)

    name = "grpo"
    reference = "Shao et al. 2024 (arXiv 2402.03300), eq. 3 and 4"
    tex = (
        r"-\frac{1}{G}\sum_{i=1}^{G}\frac{1}{|y_i|}\sum_{t}\left[\min\left(\rho_{i,t}A_i,"
        r"\operatorname{clip}(\rho_{i,t},1-\varepsilon,1+\varepsilon)A_i\right)"
        r"-\beta\left(\rho_{i,t}^{-1}+\ln\rho_{i,t}-1\right)\right]"
    )

    @property
    def claims(self) -> Claims:  # type: ignore[override]
        # The KL term pulls a likely y+ back.
        return Claims(convex=False, decreasing=self.beta == 0, differentiable=False, nonnegative=False)

    def formula(self, ops: Ops, y: Group) -> Any:  # type: ignore[override]
        return self.weighted(ops, y, [()] * len(y.responses))

    def weighted(self, ops: Ops, y: Group, weights: Sequence[Sequence[float]]) -> Any:
        """The loss with the advantage of token k of response i times `weights[i][k]`; () for none of a response."""
        total: Any = 0.0
        for A, z, factors in zip(advantages(y.rewards), y.responses, weights, strict=True):
            if factors:
                gains = (f * self._gain(ops, A, z.log_ratio[..., k]) for k, f in enumerate(factors) if f)
                summed = sum(gains, start=0.0)
            else:
                summed = self._gain(ops, A, z.log_ratio).sum(-1)
            if self.beta:
                summed = summed - self.beta * (ops.expm1(-z.log_ratio) + z.log_ratio).sum(-1)
            total = total - summed / z.n**self.length_power
        return total / len(y.responses)

    def _gain(self, ops: Ops, A: float, log_ratio: Any) -> Any:
        """min(rho A, clip(rho) A), which is A times rho clipped on one side: clipped before exp can overflow."""
        least = math.log1p(-self.eps) if self.eps < 1 else -math.inf
        low, high = (-math.inf, math.log1p(self.eps)) if A >= 0 else (least, math.inf)
        return A * ops.exp(ops.clip(log_ratio, low, high))

    @classmethod
    def examples(cls) -> tuple["GRPO", ...]:
        return (cls(), cls(eps=0.35, beta=0.04, length_power=0.7), cls(length_power=0.0))
