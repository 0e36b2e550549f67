"""Token-level DPO: DPO's margin with the forward KL of both responses, K(y) = sum_t KL(pi_ref || pi) at position t."""

from dataclasses import dataclass
from typing import Any

from theory._check import POSITIVE, Interval
from theory.losses._base import Group, TokenLoss, parameter
from theory.ops import Ops

_REFERENCE = "Zeng et al. 2024 (arXiv 2404.11999), "
_K = r",\quad K(y) = \sum_t \mathrm{KL}\big(\pi_{\mathrm{ref}} \,\|\, \pi\big)(\cdot \mid y_{<t})"


@dataclass(frozen=True)
class TDPO1(TokenLoss):
    """-ln sigmoid(beta [m - (K(y-) - K(y+))]): what K(y-) costs, K(y+) earns. No finite minimiser."""

    beta: float = parameter(0.1, POSITIVE)

    name = "tdpo1"
    reference = _REFERENCE + "TDPO1"
    tex = r"-\ln\sigma\Big(\beta\big[m - \big(K(y^-) - K(y^+)\big)\big]\Big)" + _K

    def formula(self, ops: Ops, y: Group) -> Any:  # type: ignore[override]
        w, l = y.responses[:2]
        return -ops.log_sigmoid(self.beta * (y.pair.m - (l.kl.sum(-1) - w.kl.sum(-1))))

    @classmethod
    def examples(cls) -> tuple["TDPO1", ...]:
        return (cls(), cls(beta=0.7))


@dataclass(frozen=True)
class TDPO2(TokenLoss):
    """-ln sigmoid(beta [m - alpha (K(y-) - sg K(y+))]): only y- is held near the reference; DPO at alpha = 0."""

    beta: float = parameter(0.1, POSITIVE)
    alpha: float = parameter(0.5, Interval(low=0.0, open_low=False))

    name = "tdpo2"
    reference = _REFERENCE + "TDPO2"
    tex = r"-\ln\sigma\Big(\beta\big[m - \alpha\big(K(y^-) - \mathrm{sg}\,K(y^+)\big)\big]\Big)" + _K

    def formula(self, ops: Ops, y: Group) -> Any:  # type: ignore[override]
        w, l = y.responses[:2]
        return -ops.log_sigmoid(self.beta * (y.pair.m - self.alpha * (l.kl.sum(-1) - ops.detach(w.kl.sum(-1)))))

    @classmethod
    def examples(cls) -> tuple["TDPO2", ...]:
        return (cls(), cls(beta=0.7, alpha=0.3))
