"""A gate on the push against y-: it closes as y- becomes improbable."""

from dataclasses import dataclass
from typing import Any

from theory._check import POSITIVE, Interval, check_number
from theory.losses._base import Loss, Pair
from theory.losses._combine import Combined, _check_base
from theory.ops import Ops

PROBABILITY = Interval(0.0, 1.0, open_low=False, open_high=False, typical=(0.01, 0.5))


def gated(ops: Ops, y: Pair, alpha: Any, tau: Any) -> Pair:
    """The pair with the gradient of ln pi(y-), not its value, multiplied by g = sigmoid(alpha (p - tau)).

    p = pi(y-)^(1/|y-|), the geometric mean of its tokens' probabilities, is a constant for the gradient.
    """
    b = ops.detach(y.b)
    gate = ops.sigmoid(alpha * (ops.exp(b / y.n_l) - tau))
    return y._replace(b=b + gate * (y.b - b))


@dataclass(frozen=True)
class Gated(Combined):
    """`base` with d_l multiplied by g = sigmoid(alpha (p - tau)), p the mean token probability of y-: r -> r/g.

    The value stays that of `base`, so it is no longer the potential of the flow.
    """

    base: Loss
    alpha: float
    tau: float

    name = "gated"
    reference = "Gate-DPO, 2026 (arXiv 2605.02626)"

    def __post_init__(self) -> None:
        _check_base(self.base)
        object.__setattr__(self, "alpha", check_number(self.alpha, "alpha", POSITIVE))
        object.__setattr__(self, "tau", check_number(self.tau, "tau", PROBABILITY))

    def formula(self, ops: Ops, y: Pair) -> Any:
        return self.base.formula(ops, gated(ops, y, self.alpha, self.tau))

    def minimum(self, y: Pair) -> tuple[Any, Any] | None:
        return self.base.minimum(y)
