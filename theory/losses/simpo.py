"""SimPO and AlphaPO: a target margin between the two responses' mean log-probabilities, or powers of them."""

from dataclasses import dataclass
from typing import Any

from theory._check import POSITIVE, REAL, Interval
from theory.losses._base import Claims, Loss, MarginForm, Pair, parameter
from theory.losses._combine import scaled_margin
from theory.losses._links import Alpha, difference
from theory.losses._logistic import smoothed
from theory.losses.cdpo import CDPO
from theory.model import Sample
from theory.ops import Ops

_NOT_NEGATIVE = Interval(0.0, open_low=False)


@dataclass(frozen=True)
class SimPO(Loss):
    """-ln sigmoid(z), z = beta (a/|y+| - b/|y-|) - gamma: convex, decreasing, r = d_w/d_l = |y-|/|y+|.

    eps smooths the label as in cDPO (TRL's label_smoothing; 0 in the paper). For equal lengths n a margin loss, whose
    reference margin is gamma n/beta. TRL's CPOConfig(loss_type="simpo") adds the likelihood of y+ unless cpo_alpha = 0.
    """

    beta: float = parameter(2.0, POSITIVE)
    gamma: float = parameter(0.5, _NOT_NEGATIVE)
    eps: float = parameter(0.0, Interval(0.0, 0.5, open_low=False, typical=(0.05, 0.4)))

    name = "simpo"
    reference = "Meng et al. 2024 (arXiv 2405.14734), eq. 6; TRL CPOTrainer, loss_type simpo"

    @property
    def claims(self) -> Claims:  # type: ignore[override]
        return Claims(decreasing=self.eps == 0, reference_free=True)

    def formula(self, ops: Ops, y: Pair) -> Any:
        return smoothed(ops, self.beta * (y.a / y.n_w - y.b / y.n_l) - self.gamma, self.eps)

    def margin(self, sample: Sample) -> MarginForm | None:
        n_w, n_l = len(sample.preferred), len(sample.dispreferred)
        if n_w != n_l:
            return None
        return scaled_margin(CDPO(self.beta, self.eps), sample, 1 / n_w, u_ref=self.gamma * n_w / self.beta)

    @classmethod
    def examples(cls) -> tuple["SimPO", ...]:
        return (cls(), cls(beta=2.3, gamma=1.1, eps=0.12))


@dataclass(frozen=True)
class AlphaPO(Loss):
    """-ln sigmoid((beta/alpha) (p_l^-alpha - p_w^-alpha) - gamma), p = pi(y)^(1/|y|): SimPO at alpha = 0.

    Decreasing, not convex; r = (|y-|/|y+|) (p_w/p_l)^-alpha: for alpha > 0 y+ is pushed the less, the likelier it is.
    """

    beta: float = parameter(2.0, POSITIVE)
    gamma: float = parameter(0.5, _NOT_NEGATIVE)
    alpha: float = parameter(0.25, REAL)

    name = "alphapo"
    reference = "Gupta et al. 2025 (arXiv 2501.03884); TRL CPOTrainer, loss_type simpo with alpha"

    @property
    def claims(self) -> Claims:  # type: ignore[override]
        return Claims(convex=self.alpha == 0, reference_free=True)

    def formula(self, ops: Ops, y: Pair) -> Any:
        # The reward (1 - p^-alpha)/alpha is the link of the divergence 1 - alpha, of a log-probability per token.
        gap = difference(ops, Alpha(1 - self.alpha), y.a / y.n_w, y.b / y.n_l)
        return -ops.log_sigmoid(self.beta * gap - self.gamma)

    def margin(self, sample: Sample) -> MarginForm | None:
        return SimPO(self.beta, self.gamma).margin(sample) if self.alpha == 0 else None

    @classmethod
    def examples(cls) -> tuple["AlphaPO", ...]:
        return (cls(), cls(beta=2.3, gamma=1.1, alpha=-0.6), cls(alpha=0.0))
