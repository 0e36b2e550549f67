"""Weighted preference optimisation: DPO on samples weighted by how much they look like the model's own."""

from dataclasses import dataclass
from typing import Any

from theory._check import POSITIVE
from theory.losses._base import Claims, Group, TokenLoss, parameter
from theory.losses._tokenwise import WPOWeighted
from theory.losses.dpo import DPO
from theory.ops import Ops


@dataclass(frozen=True)
class WPO(TokenLoss):
    """sg[w(y+) w(y-)] (-ln sigmoid(beta m)): DPO's direction on each sample, w times as fast. No finite minimiser."""

    beta: float = parameter(0.1, POSITIVE)

    name = "wpo"
    reference = "Zhou et al. 2024 (arXiv 2406.11827), weights by sampled alignment"
    claims = Claims(convex=False)

    def formula(self, ops: Ops, y: Group) -> Any:  # type: ignore[override]
        return WPOWeighted(DPO(self.beta)).formula(ops, y)

    def latex(self) -> str:
        return WPOWeighted(DPO()).latex()

    @classmethod
    def examples(cls) -> tuple["WPO", ...]:
        return (cls(), cls(beta=0.7))
