"""Efficient exact optimisation, pairwise: the reverse KL divergence from smoothed labels."""

from dataclasses import dataclass
from math import log
from typing import Any

from theory._check import POSITIVE, Interval
from theory.losses._base import Claims, MarginLoss, Pair, parameter
from theory.ops import Ops


@dataclass(frozen=True)
class EXO(MarginLoss):
    """q ln(q/(1-eps)) + (1-q) ln((1-q)/eps), q = sigmoid(beta m): 0 at m = ln((1-eps)/eps)/beta, its only minimum.

    Not convex: the slope beta q (1-q) (z* - beta m) dies off on both sides; a pair that starts far below moves slowly.
    """

    beta: float = parameter(0.1, POSITIVE)
    eps: float = parameter(1e-3, Interval(0.0, 0.5, typical=(0.001, 0.4)))

    name = "exo"
    reference = "Ji et al. 2024 (arXiv 2402.00856), eq. 16; TRL loss_type exo_pair"
    claims = Claims(convex=False, decreasing=False)

    def formula(self, ops: Ops, y: Pair) -> Any:
        z = self.beta * y.m
        win = ops.sigmoid(z) * (ops.log_sigmoid(z) - ops.log(1 - self.eps))
        lose = ops.sigmoid(-z) * (ops.log_sigmoid(-z) - ops.log(self.eps))
        return win + lose

    def closed_slope(self, ops: Ops, y: Pair) -> Any:
        z = self.beta * y.m
        return self.beta * ops.sigmoid(z) * ops.sigmoid(-z) * (self._z_least - z)

    def closed_log_slope(self, ops: Ops, y: Pair) -> Any:
        z = self.beta * y.m
        gap = self._z_least - z
        return ops.log(self.beta) + ops.log_sigmoid(z) + ops.log_sigmoid(-z) + ops.log(ops.relu(gap) + ops.relu(-gap))

    @property
    def _z_least(self) -> float:
        return log((1 - self.eps) / self.eps)

    def minimiser(self, u_ref: Any) -> Any:
        return u_ref + self._z_least / self.beta

    @classmethod
    def examples(cls) -> tuple["EXO", ...]:
        return (cls(), cls(beta=0.6, eps=0.27))
