"""Length-desensitised DPO."""

from dataclasses import dataclass
from typing import Any

from theory._check import POSITIVE
from theory.losses._base import Group, MarginForm, TokenLoss, parameter
from theory.losses._tokenwise import FRACTION, LD
from theory.losses.dpo import DPO
from theory.model import Sample
from theory.ops import Ops


@dataclass(frozen=True)
class LDDPO(TokenLoss):
    """DPO whose tokens beyond the shorter response's length weigh alpha: DPO at alpha = 1. No finite minimiser."""

    beta: float = parameter(0.1, POSITIVE)
    alpha: float = parameter(0.5, FRACTION)

    name = "ld_dpo"
    reference = "Liu et al. 2024 (arXiv 2409.06411)"

    def formula(self, ops: Ops, y: Group) -> Any:  # type: ignore[override]
        return LD(DPO(self.beta), self.alpha).formula(ops, y)

    def margin(self, sample: Sample) -> MarginForm | None:
        return LD(DPO(self.beta), self.alpha).margin(sample)

    def latex(self) -> str:
        return LD(DPO(), self.alpha).latex()

    @classmethod
    def examples(cls) -> tuple["LDDPO", ...]:
        return (cls(), cls(beta=0.7, alpha=0.3))
