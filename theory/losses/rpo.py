"""DPO with a likelihood term on y+: RPO counts it per sequence, iterative RPO per token."""

from dataclasses import dataclass
from typing import Any

from theory._check import POSITIVE
from theory.losses._base import Loss, Pair, parameter
from theory.losses._combine import negative_log_likelihood
from theory.ops import Ops


@dataclass(frozen=True)
class RPO(Loss):
    """-ln sigmoid(beta m) - eta ln pi(y+), a sum over tokens: r = 1 + eta/(beta sigmoid(-beta m)); never least.

    TRL's `["sigmoid", "sft"]` divides the second term by the tokens of the batch: `SFT(DPO(beta), eta, "batch_token")`.
    """

    beta: float = parameter(0.1, POSITIVE)
    eta: float = parameter(0.005, POSITIVE)

    name = "rpo"
    reference = "Liu et al. 2024 (arXiv 2405.16436); Razin et al. 2024, App. E, eq. 4"

    def formula(self, ops: Ops, y: Pair) -> Any:
        return -ops.log_sigmoid(self.beta * y.m) + self.eta * negative_log_likelihood(ops, y, "sequence")

    @classmethod
    def examples(cls) -> tuple["RPO", ...]:
        return (cls(), cls(beta=0.7, eta=0.3))


@dataclass(frozen=True)
class IRPO(Loss):
    """-ln sigmoid(beta m) - alpha ln pi(y+)/|y+|: r = 1 + alpha/(|y+| beta sigmoid(-beta m)); never least."""

    beta: float = parameter(0.1, POSITIVE)
    alpha: float = parameter(1.0, POSITIVE)

    name = "irpo"
    reference = "Pang et al. 2024 (arXiv 2404.19733), eq. 1"

    def formula(self, ops: Ops, y: Pair) -> Any:
        return -ops.log_sigmoid(self.beta * y.m) + self.alpha * negative_log_likelihood(ops, y, "token")

    @classmethod
    def examples(cls) -> tuple["IRPO", ...]:
        return (cls(), cls(beta=0.7, alpha=0.3))
