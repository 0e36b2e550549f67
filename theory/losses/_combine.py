"""Losses made of a margin loss: plus an SFT term, or with weighted log-probabilities (Razin et al., App. E)."""

from dataclasses import dataclass
from typing import Any

from theory._check import POSITIVE, check_number
from theory.losses._base import Loss, MarginLoss, Pair
from theory.ops import Ops


@dataclass(frozen=True)
class SFT(Loss):
    """`base - lam ln pi(y+)`: a margin loss plus lam times the negative log-likelihood of y+, summed over its tokens.

    The paper's form (4), which covers CPO, RPO and BoNBoN.
    """

    base: MarginLoss
    lam: float

    name = "sft"
    reference = "Razin et al. 2024 (arXiv 2410.08847), App. E, eq. 4"

    def __post_init__(self) -> None:
        _check_base(self.base)
        object.__setattr__(self, "lam", check_number(self.lam, "lam", POSITIVE))

    def formula(self, ops: Ops, y: Pair) -> Any:
        return self.base.formula(ops, y) - self.lam * y.a


@dataclass(frozen=True)
class Weighted(Loss):
    """`base` of the margin `lam_w ln pi(y+) - lam_l ln pi(y-)`, and of the references weighted alike.

    The paper's form (5), which covers SimPO (weights 1/length) and DPOP (an extra factor on y+).
    """

    base: MarginLoss
    lam_w: float
    lam_l: float

    name = "weighted"
    reference = "Razin et al. 2024 (arXiv 2410.08847), App. E, eq. 5"

    def __post_init__(self) -> None:
        _check_base(self.base)
        for name in ("lam_w", "lam_l"):
            object.__setattr__(self, name, check_number(getattr(self, name), name, POSITIVE))

    def pair(self, y: Pair) -> Pair:
        """The weighted log-probabilities that `base` sees."""
        w, l = self.lam_w, self.lam_l
        return y._replace(a=w * y.a, b=l * y.b, a_ref=w * y.a_ref, b_ref=l * y.b_ref)

    def formula(self, ops: Ops, y: Pair) -> Any:
        return self.base.formula(ops, self.pair(y))


def _check_base(base: Any) -> None:
    if not isinstance(base, MarginLoss):
        raise ValueError(f"base must be a loss of the margin (MarginLoss), got {base!r}")
