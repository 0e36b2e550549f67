"""Cal-DPO: DPO whose log-ratios are also held to the size of the rewards they stand for."""

from dataclasses import dataclass
from typing import Any

from scipy.optimize import brentq
from scipy.special import expit

from theory._check import POSITIVE
from theory.losses._base import Claims, Loss, Pair, parameter
from theory.ops import Ops


@dataclass(frozen=True)
class CalDPO(Loss):
    """-ln sigmoid(m) + ((da - 1/(2 beta))^2 + (db + 1/(2 beta))^2)/2, as its code has it: no beta in the first term.

    Strictly convex, least at da = -db = x with x = 1/(2 beta) + sigmoid(-2x); past it both responses are pushed back.
    The authors' recipe has beta = 0.001 to 0.002, a target of 500 to 250 nats.
    """

    beta: float = parameter(0.1, POSITIVE)

    name = "cal_dpo"
    reference = "Xiao et al. 2024 (arXiv 2412.14516); its code, dpo_trainer.py"
    claims = Claims(decreasing=False)

    def formula(self, ops: Ops, y: Pair) -> Any:
        target = 1 / (2 * self.beta)
        return -ops.log_sigmoid(y.m) + ((y.da - target) ** 2 + (y.db + target) ** 2) / 2

    def minimum(self, y: Pair) -> tuple[Any, Any]:
        target = 1 / (2 * self.beta)
        x = brentq(lambda x: x - target - expit(-2 * x), target, target + 0.5, xtol=1e-15)
        return y.a_ref + x, y.b_ref - x

    @classmethod
    def examples(cls) -> tuple["CalDPO", ...]:
        return (cls(), cls(beta=0.43))
