"""Binary classifier optimisation: each response against the reference, with and without a shift of the rewards."""

from dataclasses import dataclass
from typing import Any

from theory._check import POSITIVE, REAL
from theory.losses._base import Loss, Pair, parameter
from theory.ops import Ops


@dataclass(frozen=True)
class BCO(Loss):
    """-ln sigmoid(R+ - delta) - ln sigmoid(-(R- - delta)), R = beta times the log-ratio to the reference.

    delta is a running mean of rewards in training, a constant for the gradient. Convex, decreasing, least at R+ -> inf,
    R- -> -inf. A pair is one accepted and one rejected response, and the loss their sum; TRL's trainer returns their
    mean, half of it.
    """

    beta: float = parameter(0.1, POSITIVE)
    delta: float = parameter(0.0, REAL)

    name = "bco"
    reference = "Jung et al. 2024 (arXiv 2404.04656); TRL BCOTrainer (up to 1.13)"

    def formula(self, ops: Ops, y: Pair) -> Any:
        accepted = -ops.log_sigmoid(self.beta * y.da - self.delta)
        return accepted - ops.log_sigmoid(-(self.beta * y.db - self.delta))

    @classmethod
    def examples(cls) -> tuple["BCO", ...]:
        return (cls(), cls(beta=0.7, delta=0.37), cls(delta=-1.3))


@dataclass(frozen=True)
class BCOPair(Loss):
    """-ln sigmoid(R+) - ln sigmoid(-R-): BCO without the shift. Convex, decreasing."""

    beta: float = parameter(0.1, POSITIVE)

    name = "bco_pair"
    reference = "Jung et al. 2024 (arXiv 2404.04656), delta = 0; TRL loss_type bco_pair"

    def formula(self, ops: Ops, y: Pair) -> Any:
        return -ops.log_sigmoid(self.beta * y.da) - ops.log_sigmoid(-self.beta * y.db)

    @classmethod
    def examples(cls) -> tuple["BCOPair", ...]:
        return (cls(), cls(beta=0.7))
