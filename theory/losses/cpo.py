"""Contrastive preference optimisation: DPO without a reference model, plus the likelihood of y+."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from theory._check import POSITIVE, Interval
from theory.losses._base import Claims, Loss, MarginForm, Pair, parameter
from theory.losses._logistic import smoothed
from theory.losses.cdpo import CDPO
from theory.model import Sample
from theory.ops import Ops


@dataclass(frozen=True)
class CPO(Loss):
    """-(1-eps) ln sigmoid(beta u) - eps ln sigmoid(-beta u) - cpo_alpha ln pi(y+): convex, decreasing at eps = 0.

    The likelihood is a sum over tokens, as the paper prints it (with cpo_alpha = 1, eps = 0). TRL's CPOTrainer takes
    its mean over the batch's tokens: that is SFT(CPO(beta, cpo_alpha=0, eps=eps), cpo_alpha, per="batch_token").
    """

    beta: float = parameter(0.1, POSITIVE)
    cpo_alpha: float = parameter(1.0, Interval(0.0, open_low=False))
    eps: float = parameter(0.0, Interval(0.0, 0.5, open_low=False, typical=(0.05, 0.4)))

    name = "cpo"
    reference = "Xu et al. 2024 (arXiv 2401.08417); Razin et al. 2024, App. E; TRL CPOTrainer, loss_type sigmoid"

    @property
    def claims(self) -> Claims:  # type: ignore[override]
        return Claims(decreasing=self.eps == 0, reference_free=True)

    def formula(self, ops: Ops, y: Pair) -> Any:
        return smoothed(ops, self.beta * y.u, self.eps) - self.cpo_alpha * y.a

    def margin(self, sample: Sample) -> MarginForm | None:
        return MarginForm(CDPO(self.beta, self.eps), np.float64(0.0)) if self.cpo_alpha == 0 else None

    @classmethod
    def examples(cls) -> tuple["CPO", ...]:
        return (cls(), cls(beta=0.7, cpo_alpha=0.13, eps=0.08), cls(cpo_alpha=0.0))
