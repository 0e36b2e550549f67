"""DPO-Shift: the log-ratio of y- counts less than that of y+."""

from dataclasses import dataclass
from typing import Any

from theory._check import POSITIVE, Interval
from theory.losses._base import Loss, MarginForm, Pair, parameter
from theory.losses.dpo import DPO
from theory.model import Sample
from theory.ops import Ops


@dataclass(frozen=True)
class DPOShift(Loss):
    """-ln sigmoid(beta (da - lam db)): convex, decreasing, never least, r = 1/lam throughout; DPO at lam = 1.

    The paper also lets lam rise linearly with the step: each step is then one of these losses. Defaults: the authors'
    recipe.
    """

    beta: float = parameter(0.01, POSITIVE)
    lam: float = parameter(0.7, Interval(0.0, 1.0, open_high=False, typical=(0.3, 0.95)))

    name = "dpo_shift"
    reference = "Yang et al. 2025 (arXiv 2502.07599)"

    def formula(self, ops: Ops, y: Pair) -> Any:
        return -ops.log_sigmoid(self.beta * (y.da - self.lam * y.db))

    def margin(self, sample: Sample) -> MarginForm | None:
        return DPO(self.beta).margin(sample) if self.lam == 1 else None

    @classmethod
    def examples(cls) -> tuple["DPOShift", ...]:
        return (cls(), cls(beta=0.6, lam=0.43), cls(lam=1.0))
