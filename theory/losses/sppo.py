"""Self-play preference optimisation: each log-ratio is regressed on how often its response wins."""

from dataclasses import dataclass
from typing import Any

from theory._check import POSITIVE, Interval
from theory.losses._base import Claims, Loss, Pair, parameter
from theory.ops import Ops

_CHANCE = Interval(0.0, 1.0, open_low=False, open_high=False, typical=(0.1, 0.9))
_REFERENCE = "Wu et al. 2024 (arXiv 2405.00675), eq. 4.7"


@dataclass(frozen=True)
class SPPO(Loss):
    """(da - eta (p_w - 1/2))^2 + (db - eta (p_l - 1/2))^2, p_w and p_l the chances that y+ and y- win.

    Strictly convex, least at log-ratios eta (p_w - 1/2) and eta (p_l - 1/2). The defaults are SPPOHard's.
    """

    eta: float = parameter(10.0, POSITIVE)
    p_w: float = parameter(1.0, _CHANCE)
    p_l: float = parameter(0.0, _CHANCE)

    name = "sppo"
    reference = _REFERENCE
    claims = Claims(decreasing=False)

    def formula(self, ops: Ops, y: Pair) -> Any:
        # 2 p - 1 over 2, not p - 1/2: LaTeX then prints no decimal.
        return (y.da - self.eta * (2 * self.p_w - 1) / 2) ** 2 + (y.db - self.eta * (2 * self.p_l - 1) / 2) ** 2

    def minimum(self, y: Pair) -> tuple[Any, Any]:
        return y.a_ref + self.eta * (self.p_w - 0.5), y.b_ref + self.eta * (self.p_l - 0.5)

    @classmethod
    def examples(cls) -> tuple["SPPO", ...]:
        return (cls(), cls(eta=2.3, p_w=0.83, p_l=0.24))


@dataclass(frozen=True)
class SPPOHard(Loss):
    """(da - 1/(2 beta))^2 + (db + 1/(2 beta))^2: y+ always wins, y- never, eta = 1/beta."""

    beta: float = parameter(0.1, POSITIVE)

    name = "sppo_hard"
    reference = _REFERENCE + " with chances 1 and 0; TRL loss_type sppo_hard"
    claims = Claims(decreasing=False)

    def formula(self, ops: Ops, y: Pair) -> Any:
        return (y.da - 1 / (2 * self.beta)) ** 2 + (y.db + 1 / (2 * self.beta)) ** 2

    def minimum(self, y: Pair) -> tuple[Any, Any]:
        return y.a_ref + 1 / (2 * self.beta), y.b_ref - 1 / (2 * self.beta)

    @classmethod
    def examples(cls) -> tuple["SPPOHard", ...]:
        return (cls(), cls(beta=0.7))
