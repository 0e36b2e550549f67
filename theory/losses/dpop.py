"""DPO-Positive (Smaug): DPO with a penalty while y+ is below its reference."""

from dataclasses import dataclass
from typing import Any

from theory._check import POSITIVE, Interval
from theory.losses._base import Claims, Loss, MarginForm, Pair, parameter
from theory.losses.dpo import DPO
from theory.model import Sample
from theory.ops import Ops


@dataclass(frozen=True)
class DPOP(Loss):
    """-ln sigmoid(beta (m - lam max(0, -da))): DPO while y+ is at or above its reference, r = 1 + lam below it.

    Convex (a decreasing convex function of a concave one), never least. DPO at lam = 0. At da = 0, where training
    starts, the slope is that of the side above (r = 1).
    """

    beta: float = parameter(0.3, POSITIVE)
    lam: float = parameter(50.0, Interval(0.0, open_low=False, typical=(0.1, 50.0)))

    name = "dpop"
    reference = "Pal et al. 2024 (arXiv 2402.13228), eq. 3"

    @property
    def claims(self) -> Claims:  # type: ignore[override]
        return Claims(differentiable=self.lam == 0)

    def formula(self, ops: Ops, y: Pair) -> Any:
        return -ops.log_sigmoid(self.beta * (y.m - self.lam * ops.relu(-y.da)))

    def margin(self, sample: Sample) -> MarginForm | None:
        return DPO(self.beta).margin(sample) if self.lam == 0 else None

    @classmethod
    def examples(cls) -> tuple["DPOP", ...]:
        return (cls(), cls(beta=0.7, lam=2.3), cls(lam=0.0))
