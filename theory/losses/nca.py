"""Noise contrastive alignment, for a preference pair."""

from dataclasses import dataclass
from typing import Any

from theory._check import POSITIVE
from theory.losses._base import Claims, Loss, Pair, parameter
from theory.ops import Ops


@dataclass(frozen=True)
class NCA(Loss):
    """-ln sigmoid(R+) - 1/2 ln sigmoid(-R+) - 1/2 ln sigmoid(-R-), R = beta times the log-ratio to the reference.

    Convex, a sum over the two responses. y+ is held at R+ = ln 2 (sigmoid = 2/3) and pushed down above it; y- is pushed
    down for ever, so there is no point of least loss.
    """

    beta: float = parameter(0.1, POSITIVE)

    name = "nca"
    reference = "Chen et al. 2024 (arXiv 2402.05369); TRL loss_type nca_pair"
    claims = Claims(decreasing=False)

    def formula(self, ops: Ops, y: Pair) -> Any:
        win, lose = self.beta * y.da, self.beta * y.db
        return -ops.log_sigmoid(win) - ops.log_sigmoid(-win) / 2 - ops.log_sigmoid(-lose) / 2

    @classmethod
    def examples(cls) -> tuple["NCA", ...]:
        return (cls(), cls(beta=0.7))
