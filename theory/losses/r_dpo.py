"""R-DPO: DPO that asks less of a pair whose preferred response is the longer one."""

from dataclasses import dataclass
from typing import Any

from theory._check import POSITIVE, Interval
from theory.losses._base import Loss, MarginForm, Pair, parameter
from theory.losses.dpo import DPO
from theory.model import Sample
from theory.ops import Ops


@dataclass(frozen=True)
class RDPO(Loss):
    """-ln sigmoid(beta m + alpha (|y+| - |y-|)): per sample DPO with its reference margin moved; r = 1, never least."""

    beta: float = parameter(0.1, POSITIVE)
    alpha: float = parameter(0.05, Interval(0.0, open_low=False, typical=(0.01, 1.0)))

    name = "r_dpo"
    reference = "Park et al. 2024 (arXiv 2403.19159), R-DPO"

    def formula(self, ops: Ops, y: Pair) -> Any:
        return -ops.log_sigmoid(self.beta * y.m + self.alpha * (y.n_w - y.n_l))

    def margin(self, sample: Sample) -> MarginForm:
        surplus = len(sample.preferred) - len(sample.dispreferred)
        return MarginForm(DPO(self.beta), sample.reference_margin - self.alpha * surplus / self.beta)

    @classmethod
    def examples(cls) -> tuple["RDPO", ...]:
        return (cls(), cls(beta=0.6, alpha=0.23), cls(alpha=0.0))
