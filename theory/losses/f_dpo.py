"""f-DPO: the log-ratio of DPO replaced by phi(t) = f'(e^t) for another divergence f.

All are -ln sigmoid(beta (phi(da) - phi(db))), with r = phi'(da)/phi'(db), and none has a least point.
"""

from dataclasses import dataclass
from typing import Any, Self

from theory._check import POSITIVE, Interval
from theory.losses._base import Claims, Loss, Pair, parameter
from theory.losses._links import Alpha, ChiSquared, ForwardKL, JensenShannon, Link, SquaredLog, difference
from theory.ops import Ops

_REFERENCE = "Wang et al. 2023 (arXiv 2309.16240), eq. 7, "


@dataclass(frozen=True)
class _FDPO(Loss):
    """Shared by the family: beta times the margin of the linked log-ratios."""

    beta: float = parameter(0.1, POSITIVE)

    claims = Claims(convex=False)

    @property
    def link(self) -> Link:
        raise NotImplementedError

    def _z(self, ops: Ops, y: Pair) -> Any:
        return self.beta * difference(ops, self.link, y.da, y.db)

    def formula(self, ops: Ops, y: Pair) -> Any:
        return -ops.log_sigmoid(self._z(ops, y))

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        return (cls(), cls(beta=0.7))


@dataclass(frozen=True)
class FDPOForwardKL(_FDPO):
    """phi(t) = 1 - e^(-t): r = e^(-m), so y- is pushed the harder the lower it is."""

    name = "f_dpo_forward_kl"
    reference = _REFERENCE + "forward KL"

    @property
    def link(self) -> Link:
        return ForwardKL()


@dataclass(frozen=True)
class FDPOJensenShannon(_FDPO):
    """phi(t) = ln(2 sigmoid(t)): r = sigmoid(-da)/sigmoid(-db)."""

    name = "f_dpo_js"
    reference = _REFERENCE + "Jensen-Shannon"

    @property
    def link(self) -> Link:
        return JensenShannon()


@dataclass(frozen=True)
class FDPOAlpha(_FDPO):
    """phi(t) = (e^((alpha-1) t) - 1)/(alpha - 1): r = e^((alpha-1) m); forward KL at alpha = 0, DPO as alpha -> 1."""

    alpha: float = parameter(0.5, Interval(0.0, 1.0, open_low=False, typical=(0.1, 0.9)))

    name = "f_dpo_alpha"
    reference = _REFERENCE + "alpha"

    @property
    def link(self) -> Link:
        return Alpha(self.alpha)

    @classmethod
    def examples(cls) -> tuple["FDPOAlpha", ...]:
        return (cls(), cls(beta=0.7, alpha=0.3))


@dataclass(frozen=True)
class ChiPO(_FDPO):
    """phi(t) = t + e^t, beta times its margin clipped to [-2 r_max, 2 r_max]: r = (1 + e^da)/(1 + e^db) inside.

    Checked by derivation: r >= 1 exactly where m >= 0; outside the clip the loss is flat. r_max bounds the rewards; the
    paper fixes no number, here rewards lie in [0, 1].
    """

    r_max: float = parameter(1.0, POSITIVE)

    name = "chi_po"
    reference = "Huang et al. 2024 (arXiv 2407.13399), algorithm 1"
    claims = Claims(convex=False, differentiable=False)

    @property
    def link(self) -> Link:
        return ChiSquared()

    def _z(self, ops: Ops, y: Pair) -> Any:
        return ops.clip(super()._z(ops, y), -2 * self.r_max, 2 * self.r_max)

    @classmethod
    def examples(cls) -> tuple["ChiPO", ...]:
        return (cls(), cls(beta=0.3, r_max=2.3))


@dataclass(frozen=True)
class SquaredPO(_FDPO):
    """phi(t) = t e^(-t), f(z) = (ln z)^2/2: r = e^(-m) (1-da)/(1-db). Past da = 1 it pushes y+ down again.

    Its score explodes as db falls, the sigmoid saturates, and the force is gone a few nats down: a stopping rule.
    """

    name = "squared_po"
    reference = "Pipano et al. 2026 (arXiv 2602.06788)"
    claims = Claims(convex=False, decreasing=False)

    @property
    def link(self) -> Link:
        return SquaredLog()
