"""Gate-DPO: DPO with the push against an improbable y- turned down."""

from dataclasses import dataclass
from typing import Any

from theory._check import POSITIVE
from theory.losses._base import Loss, Pair, parameter
from theory.losses._gate import PROBABILITY, gated
from theory.ops import Ops


@dataclass(frozen=True)
class GateDPO(Loss):
    """DPO's value; d_l times g = sigmoid(alpha (p - tau)), p = pi(y-)^(1/|y-|) held constant: r = 1/g > 1.

    `Gated(base, alpha, tau)` does the same to any loss. The defaults are this project's: the paper's were not at hand.
    """

    beta: float = parameter(0.1, POSITIVE)
    alpha: float = parameter(20.0, POSITIVE)
    tau: float = parameter(0.1, PROBABILITY)

    name = "gate_dpo"
    reference = "Gate-DPO, 2026 (arXiv 2605.02626)"

    def formula(self, ops: Ops, y: Pair) -> Any:
        return -ops.log_sigmoid(self.beta * gated(ops, y, self.alpha, self.tau).m)

    @classmethod
    def examples(cls) -> tuple["GateDPO", ...]:
        return (cls(), cls(beta=0.7, alpha=3.0, tau=0.3))
