"""Kahneman-Tversky optimisation: desirable and undesirable responses on an S-shaped value, against a common zero."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from theory._check import POSITIVE, Interval, check_array
from theory.losses._base import Claims, Loss, Pair, parameter
from theory.ops import Ops

_TRL = "TRL KTOTrainer, loss_type "


@dataclass(frozen=True)
class KTO(Loss):
    """lam_D [1 - sigmoid(beta (da - z0))] + lam_U [1 - sigmoid(beta (z0 - db))]: bounded, not convex, decreasing.

    y+ is the desirable, y- the undesirable example, and the loss their sum; TRL's trainer returns the mean over
    examples, half of it. z0 >= 0 estimates the KL divergence from the reference (`kto_z0`) and is a constant for the
    gradient.
    """

    beta: float = parameter(0.1, POSITIVE)
    lam_D: float = parameter(1.0, POSITIVE)
    lam_U: float = parameter(1.0, POSITIVE)
    z0: float = parameter(0.0, Interval(0.0, open_low=False))

    name = "kto"
    reference = "Ethayarajh et al. 2024 (arXiv 2402.01306), eq. 7; " + _TRL + "kto"
    claims = Claims(convex=False)

    def formula(self, ops: Ops, y: Pair) -> Any:
        desirable = self.lam_D * ops.sigmoid(-self.beta * (y.da - self.z0))
        return desirable + self.lam_U * ops.sigmoid(-self.beta * (self.z0 - y.db))

    @classmethod
    def examples(cls) -> tuple["KTO", ...]:
        return (cls(), cls(beta=0.7, lam_D=1.33, lam_U=0.8, z0=0.6))


@dataclass(frozen=True)
class APOZeroUnpaired(Loss):
    """lam_D [1 - sigmoid(beta da)] + lam_U sigmoid(beta db): KTO with z0 = 0; APO-zero at weights 1."""

    beta: float = parameter(0.1, POSITIVE)
    lam_D: float = parameter(1.0, POSITIVE)
    lam_U: float = parameter(1.0, POSITIVE)

    name = "apo_zero_unpaired"
    reference = "D'Oosterlinck et al. 2024 (arXiv 2408.06266), eq. 7, unpaired; " + _TRL + "apo_zero_unpaired"
    claims = Claims(convex=False)

    def formula(self, ops: Ops, y: Pair) -> Any:
        return self.lam_D * ops.sigmoid(-self.beta * y.da) + self.lam_U * ops.sigmoid(self.beta * y.db)

    @classmethod
    def examples(cls) -> tuple["APOZeroUnpaired", ...]:
        return (cls(), cls(beta=0.7, lam_D=1.33, lam_U=0.8))


def kto_z0(log_ratios: ArrayLike) -> float:
    """KTO's zero, an estimate of KL(pi || pi_ref) in nats: max(0, mean of log_ratios).

    log_ratios (n,): ln pi(y'|x) - ln pi_ref(y'|x) of prompts x with responses y' to other prompts (nats). ValueError
    unless it is one-dimensional, finite and not empty. Source: Ethayarajh et al. 2024, below eq. 7; TRL's KTOTrainer.
    """
    return max(0.0, float(np.mean(check_array(log_ratios, "log_ratios", (None,)))))
