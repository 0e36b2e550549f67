"""Losses from density-ratio estimation: each response has its own term in the ratio pi/pi_ref."""

from dataclasses import dataclass
from math import inf, log
from typing import Any

from theory.losses._base import Claims, Loss, Pair
from theory.losses._links import EXPONENTIAL, difference
from theory.ops import Ops

_REFERENCE = "the density-ratio losses of arXiv 2604.18239 (its code, dpo_trainer.py)"


@dataclass(frozen=True)
class LSIF(Loss):
    """-e^da + e^(2 db)/2 (least squares importance fitting): (d_w, d_l) = (e^da, e^(2 db)), r = e^(da - 2 db)."""

    name = "lsif"
    reference = f"Kanamori et al. 2009, JMLR 10; {_REFERENCE}"
    claims = Claims(convex=False, nonnegative=False)

    def formula(self, ops: Ops, y: Pair) -> Any:
        return difference(ops, EXPONENTIAL, 2 * y.db - log(2), y.da)


@dataclass(frozen=True)
class UKL(Loss):
    """-ln pi(y+) + e^db (unnormalised Kullback-Leibler): (d_w, d_l) = (1, e^db), r = e^(-db); convex, never least."""

    name = "ukl"
    reference = f"Nguyen, Wainwright, Jordan 2010, IEEE Trans. Inf. Theory 56; {_REFERENCE}"

    def formula(self, ops: Ops, y: Pair) -> Any:
        return -y.a + ops.exp(y.db)


@dataclass(frozen=True)
class DDRO(Loss):
    """-da - ln(2 - e^db): (d_w, d_l) = (1, e^db/(2 - e^db)), r = (2 - e^db) e^(-db); convex, never least.

    Defined for pi(y-) < 2 pi_ref(y-). From there on the value is +inf, the limit and the convex extension; the slope,
    which no number describes, is given as (1, 0): hence not differentiable there.
    """

    name = "ddro"
    reference = f"Higuchi, Suzuki 2025 (arXiv 2505.07558); {_REFERENCE}"
    claims = Claims(differentiable=False, nonnegative=False)

    def formula(self, ops: Ops, y: Pair) -> Any:
        return -y.da - log(2) - ops.log1mexp(ops.clip(y.db - log(2), -inf, 0.0))
