"""Distributional dispreference optimisation: one dispreferred response against samples of the model itself."""

from dataclasses import dataclass
from typing import Any

from theory._check import POSITIVE
from theory.losses._base import Claims, Group, MarginForm, TokenLoss, parameter
from theory.losses.dpo import DPO
from theory.model import Sample
from theory.ops import Ops


@dataclass(frozen=True)
class D2O(TokenLoss):
    """-ln sigmoid of beta times the mean log-ratio of the anchors minus alpha times that of y-.

    Anchors are the responses of positive reward: y_1 ... y_K drawn once from the reference model (the paper: K = 11).
    y- is the sample's second response; other responses of reward 0 or less take no part. Both of the paper's references
    are the reference model, as in its experiments. Convex and decreasing, no finite minimiser. At the reference model
    the anchors' mean gradient vanishes as 1/sqrt(K): there the loss is a pure push against y-.
    """

    alpha: float = parameter(0.1, POSITIVE)
    beta: float = parameter(0.1, POSITIVE)

    name = "d2o"
    reference = "Duan et al. 2024 (arXiv 2403.03419), eq. 4"
    claims = Claims()
    tex = (
        r"-\ln\sigma\left(\frac{\beta}{K}\sum_{i=1}^{K}\ln\frac{\pi(y_i)}{\pi_{\mathrm{ref}}(y_i)}"
        r"-\alpha\ln\frac{\pi(y^-)}{\pi_{\mathrm{ref}}(y^-)}\right)"
    )

    def formula(self, ops: Ops, y: Group) -> Any:  # type: ignore[override]
        anchors = [z for z, reward in zip(y.responses, y.rewards, strict=True) if reward > 0]
        if not anchors or y.rewards[1] > 0:
            raise ValueError(f"rewards must be positive for some response, not for the second (y-), got {y.rewards}")
        first, *rest = (z.log_ratio.sum(-1) for z in anchors)
        mean = sum(rest, start=first) / len(anchors)
        return -ops.log_sigmoid(self.beta * mean - self.alpha * y.responses[1].log_ratio.sum(-1))

    def margin(self, sample: Sample) -> MarginForm | None:
        alone = sample.rewards is not None and sample.rewards[0] > 0 and max(sample.rewards[1:]) <= 0
        return MarginForm(DPO(self.beta), sample.reference_margin) if alone and self.alpha == self.beta else None

    @classmethod
    def examples(cls) -> tuple["D2O", ...]:
        return (cls(), cls(alpha=0.4, beta=0.7))
