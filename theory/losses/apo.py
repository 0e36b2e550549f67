"""Anchored preference optimisation: which way y+ should move is part of the loss."""

from dataclasses import dataclass
from typing import Any

from theory._check import POSITIVE
from theory.losses._base import Claims, Loss, Pair, parameter
from theory.ops import Ops


@dataclass(frozen=True)
class APOZero(Loss):
    """1 - sigmoid(beta da) + sigmoid(beta db): y+ up and y- down, each anchored at the reference.

    Bounded, not convex, decreasing: the push on either response is largest at its reference probability.
    """

    beta: float = parameter(0.1, POSITIVE)

    name = "apo_zero"
    reference = "D'Oosterlinck et al. 2024 (arXiv 2408.06266), eq. 7; TRL loss_type apo_zero"
    claims = Claims(convex=False)

    def formula(self, ops: Ops, y: Pair) -> Any:
        return ops.sigmoid(-self.beta * y.da) + ops.sigmoid(self.beta * y.db)

    @classmethod
    def examples(cls) -> tuple["APOZero", ...]:
        return (cls(), cls(beta=0.7))


@dataclass(frozen=True)
class APODown(Loss):
    """sigmoid(beta da) + 1 - sigmoid(beta m): y+ down, and y- down further; for models better than their data.

    d_w = beta [s'(beta m) - s'(beta da)] with s' the logistic density: 0 at the reference, negative where |m| > |da|.
    d_l = beta s'(beta m), beta/4 there.
    """

    beta: float = parameter(0.1, POSITIVE)

    name = "apo_down"
    reference = "D'Oosterlinck et al. 2024 (arXiv 2408.06266), eq. 8; TRL loss_type apo_down"
    claims = Claims(convex=False, decreasing=False)

    def formula(self, ops: Ops, y: Pair) -> Any:
        return ops.sigmoid(self.beta * y.da) + ops.sigmoid(-self.beta * y.m)

    @classmethod
    def examples(cls) -> tuple["APODown", ...]:
        return (cls(), cls(beta=0.7))
