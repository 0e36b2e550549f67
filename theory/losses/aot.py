"""Alignment by optimal transport: the distribution of margins over a batch, not each margin, must beat a reference."""

from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from theory._check import POSITIVE, Interval
from theory.losses._base import Claims, Loss, MarginForm, Pair, parameter
from theory.losses._logistic import smoothed
from theory.losses.cdpo import CDPO
from theory.model import Sample
from theory.ops import Ops

_REFERENCE = "Melnyk et al. 2024 (arXiv 2406.05882)"


@dataclass(frozen=True)
class _AOT(Loss):
    """-(1-eps) ln sigmoid(beta d_i) - eps ln sigmoid(-beta d_i), d_i a difference of the i-th smallest of two batches.

    The values come in that order, not the samples': their mean is the loss of the batch. One pair alone is cDPO (DPO
    at eps = 0), so convex, and decreasing at eps = 0.
    """

    beta: float = parameter(0.1, POSITIVE)
    eps: float = parameter(0.0, Interval(0.0, 0.5, open_low=False, typical=(0.05, 0.4)))

    coupled = True

    @property
    def claims(self) -> Claims:  # type: ignore[override]
        return Claims(decreasing=self.eps == 0)

    def margin(self, sample: Sample) -> MarginForm:
        """The form of a batch of this sample alone: cDPO's."""
        return MarginForm(CDPO(self.beta, self.eps), np.float64(sample.reference_margin))

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        return (cls(), cls(beta=0.6, eps=0.27))


@dataclass(frozen=True)
class AOT(_AOT):
    """Sorted margins of the model against sorted margins of the reference, by the logistic loss."""

    name = "aot"
    reference = _REFERENCE + ", paired; TRL loss_type aot"

    def formula(self, ops: Ops, y: Pair) -> Any:
        return smoothed(ops, self.beta * (ops.sort(y.u) - ops.sort(y.u_ref)), self.eps)


@dataclass(frozen=True)
class AOTUnpaired(_AOT):
    """Sorted log-ratios of the preferred responses against those of the dispreferred, by the logistic loss."""

    name = "aot_unpaired"
    reference = _REFERENCE + ", unpaired; TRL loss_type aot_unpaired"

    def formula(self, ops: Ops, y: Pair) -> Any:
        return smoothed(ops, self.beta * (ops.sort(y.da) - ops.sort(y.db)), self.eps)
