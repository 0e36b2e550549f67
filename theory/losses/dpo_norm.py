"""DPO and IPO of log-ratios per token, as TRL's trainer has them."""

from dataclasses import dataclass
from typing import Any, Self

from theory._check import POSITIVE
from theory.losses._base import Claims, Loss, MarginForm, Pair, parameter
from theory.losses._combine import scaled_margin
from theory.losses.dpo import DPO
from theory.losses.ipo import IPO
from theory.model import Sample
from theory.ops import Ops


@dataclass(frozen=True)
class _PerToken(Loss):
    """A loss of d = da/|y+| - db/|y-|: r = d_w/d_l = |y-|/|y+|, a margin loss where the lengths are equal."""

    beta: float = parameter(0.1, POSITIVE)

    def _d(self, y: Pair) -> Any:
        return y.da / y.n_w - y.db / y.n_l

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        return (cls(), cls(beta=0.7))


def _equal_lengths(base: Any, sample: Sample) -> MarginForm | None:
    n_w, n_l = len(sample.preferred), len(sample.dispreferred)
    return scaled_margin(base, sample, 1 / n_w) if n_w == n_l else None


@dataclass(frozen=True)
class DPONorm(_PerToken):
    """-ln sigmoid(beta (da/|y+| - db/|y-|)): convex, decreasing."""

    name = "dpo_norm"
    reference = "TRL loss_type sigmoid_norm; Meng et al. 2024 (arXiv 2405.14734), length-normalised DPO"

    def formula(self, ops: Ops, y: Pair) -> Any:
        return -ops.log_sigmoid(self.beta * self._d(y))

    def margin(self, sample: Sample) -> MarginForm | None:
        return _equal_lengths(DPO(self.beta), sample)


@dataclass(frozen=True)
class IPONorm(_PerToken):
    """(da/|y+| - db/|y-| - 1/(2 beta))^2: TRL's `ipo`, where IPO's paper has summed log-ratios and calls beta tau.

    Convex; least on the line where the difference is 1/(2 beta).
    """

    name = "ipo_norm"
    reference = "TRL loss_type ipo; Azar et al. 2023 (arXiv 2310.12036), eq. 17, per token"
    claims = Claims(decreasing=False)

    def formula(self, ops: Ops, y: Pair) -> Any:
        return (self._d(y) - 1 / (2 * self.beta)) ** 2

    def margin(self, sample: Sample) -> MarginForm | None:
        return _equal_lengths(IPO(self.beta), sample)
