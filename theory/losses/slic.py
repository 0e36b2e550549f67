"""Sequence likelihood calibration (hinge on the margin, no reference model)."""

from dataclasses import dataclass
from typing import Any

from theory._check import POSITIVE
from theory.losses._base import Claims, MarginLoss, Pair, parameter
from theory.losses._laws import ConstantSlope, Law
from theory.ops import Ops


@dataclass(frozen=True)
class SLiC(MarginLoss):
    """max(0, delta - u): slope 1 up to u = delta, 0 from there on."""

    delta: float = parameter(1.0, POSITIVE)

    name = "slic"
    reference = "Zhao et al. 2023 (arXiv 2305.10425); Razin et al. 2024, App. B"
    claims = Claims(differentiable=False, reference_free=True)

    def formula(self, ops: Ops, y: Pair) -> Any:
        return ops.relu(self.delta - y.u)

    def closed_slope(self, ops: Ops, y: Pair) -> Any:
        return ops.step(self.delta - y.u)

    def minimiser(self, u_ref: Any) -> Any:
        return self.delta + 0 * u_ref

    def kinks(self, u_ref: Any) -> tuple[Any, ...]:
        return (self.minimiser(u_ref),)

    def law(self, u_ref: Any) -> Law:
        return ConstantSlope(1.0, self.minimiser(u_ref))

    @classmethod
    def examples(cls) -> tuple["SLiC", ...]:
        return (cls(), cls(delta=6.3))
