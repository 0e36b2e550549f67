"""Generalised preference optimisation: f(beta (u - u_ref)) for six convex or margin-based f."""

from dataclasses import dataclass
from math import log
from typing import Any, Self

from theory._check import POSITIVE
from theory.losses._base import Claims, MarginLoss, Pair, parameter
from theory.losses._laws import ConstantSlope, ExponentialSlope, Law, LinearSlope, LogisticSlope
from theory.ops import Ops

_REFERENCE = "Tang et al. 2024 (arXiv 2402.05749), "


@dataclass(frozen=True)
class _GPO(MarginLoss):
    """Shared by the family: the argument z = beta (u - u_ref) and its parameter."""

    beta: float = parameter(0.1, POSITIVE)

    def _z(self, y: Pair) -> Any:
        return self.beta * y.m

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        return (cls(), cls(beta=0.7))


@dataclass(frozen=True)
class GPOLogistic(_GPO):
    """ln(1 + e^-z): DPO in GPO's notation."""

    name = "gpo_logistic"
    reference = _REFERENCE + "logistic"

    def formula(self, ops: Ops, y: Pair) -> Any:
        return ops.softplus(-self._z(y))

    def closed_slope(self, ops: Ops, y: Pair) -> Any:
        return self.beta * ops.sigmoid(-self._z(y))

    def closed_log_slope(self, ops: Ops, y: Pair) -> Any:
        return ops.log(self.beta) + ops.log_sigmoid(-self._z(y))

    def law(self, u_ref: Any) -> Law:
        return LogisticSlope(self.beta, u_ref)


@dataclass(frozen=True)
class GPOExponential(_GPO):
    """e^-z."""

    name = "gpo_exponential"
    reference = _REFERENCE + "exponential"

    def formula(self, ops: Ops, y: Pair) -> Any:
        return ops.exp(-self._z(y))

    def closed_slope(self, ops: Ops, y: Pair) -> Any:
        return self.beta * ops.exp(-self._z(y))

    def closed_log_slope(self, ops: Ops, y: Pair) -> Any:
        return ops.log(self.beta) - self._z(y)

    def law(self, u_ref: Any) -> Law:
        return ExponentialSlope(self.beta, u_ref)


@dataclass(frozen=True)
class GPOSquared(_GPO):
    """(1 - z)^2: IPO with tau = beta/2, times beta^2."""

    name = "gpo_squared"
    reference = _REFERENCE + "squared"
    claims = Claims(decreasing=False)

    def formula(self, ops: Ops, y: Pair) -> Any:
        return (1 - self._z(y)) ** 2

    def closed_slope(self, ops: Ops, y: Pair) -> Any:
        return 2 * self.beta * (1 - self._z(y))

    def minimiser(self, u_ref: Any) -> Any:
        return u_ref + 1 / self.beta

    def law(self, u_ref: Any) -> Law:
        return LinearSlope(2 * self.beta**2, self.minimiser(u_ref))


@dataclass(frozen=True)
class GPOHinge(_GPO):
    """max(0, 1 - z)."""

    name = "gpo_hinge"
    reference = _REFERENCE + "hinge"
    claims = Claims(differentiable=False)

    def formula(self, ops: Ops, y: Pair) -> Any:
        return ops.relu(1 - self._z(y))

    def closed_slope(self, ops: Ops, y: Pair) -> Any:
        return self.beta * ops.step(1 - self._z(y))

    def minimiser(self, u_ref: Any) -> Any:
        return u_ref + 1 / self.beta

    def kinks(self, u_ref: Any) -> tuple[Any, ...]:
        return (self.minimiser(u_ref),)

    def law(self, u_ref: Any) -> Law:
        return ConstantSlope(self.beta, self.minimiser(u_ref))


@dataclass(frozen=True)
class GPOTruncatedQuadratic(_GPO):
    """max(0, 1 - z)^2: the squared loss without its rising branch; the curvature jumps at z = 1."""

    name = "gpo_truncated_quadratic"
    reference = _REFERENCE + "truncated quadratic"

    def formula(self, ops: Ops, y: Pair) -> Any:
        return ops.relu(1 - self._z(y)) ** 2

    def closed_slope(self, ops: Ops, y: Pair) -> Any:
        return 2 * self.beta * ops.relu(1 - self._z(y))

    def minimiser(self, u_ref: Any) -> Any:
        return u_ref + 1 / self.beta

    def kinks(self, u_ref: Any) -> tuple[Any, ...]:
        return (self.minimiser(u_ref),)

    def law(self, u_ref: Any) -> Law:
        return LinearSlope(2 * self.beta**2, self.minimiser(u_ref))


@dataclass(frozen=True)
class GPOSavage(_GPO):
    """1/(1 + e^z)^2: decreasing and bounded, convex only for z > -ln 2."""

    name = "gpo_savage"
    reference = _REFERENCE + "Savage"
    claims = Claims(convex=False)

    def formula(self, ops: Ops, y: Pair) -> Any:
        return ops.sigmoid(-self._z(y)) ** 2

    def closed_slope(self, ops: Ops, y: Pair) -> Any:
        z = self._z(y)
        return 2 * self.beta * ops.sigmoid(-z) ** 2 * ops.sigmoid(z)

    def closed_log_slope(self, ops: Ops, y: Pair) -> Any:
        z = self._z(y)
        return log(2) + ops.log(self.beta) + 2 * ops.log_sigmoid(-z) + ops.log_sigmoid(z)
