"""Reward calibration: any loss, its two gradients rescaled to the incentive ratio that the model asks for."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from theory.losses._base import Loss, Pair
from theory.losses._combine import Combined, _check_base
from theory.ops import Ops


@dataclass(frozen=True)
class Calibrated(Combined):
    """`base` with incentives c d_w and d_l/c, c = sqrt(r*/r), so that the ratio r = d_w/d_l becomes r* = |g-|/|g+|.

    The value is that of `base`; only its gradient differs (c is held fixed in it), so that digits and LaTeX are the
    base's. r* is `Pair.norm_ratio`. c = 1 where r or r* is not positive and finite: a loss that pulls y+ down, pushes
    y- up or has come to rest has no ratio to calibrate.
    """

    base: Loss

    name = "calibrated"
    reference = "reward calibration, arXiv 2604.18239"

    @property
    def uses_norms(self) -> bool:  # type: ignore[override]
        return True

    def __post_init__(self) -> None:
        _check_base(self.base)

    def formula(self, ops: Ops, y: Pair) -> Any:
        # Without gradients, the value is all there is.
        if getattr(y.a, "requires_grad", False) or getattr(y.b, "requires_grad", False):
            c = y.a.new_tensor(calibration(*self.base.incentives(_detached(y)), _plain(y.norm_ratio)))
            fixed_a, fixed_b = ops.detach(y.a), ops.detach(y.b)
            y = y._replace(a=fixed_a + c * (y.a - fixed_a), b=fixed_b + (y.b - fixed_b) / c)
        return self.base.formula(ops, y)

    def latex(self) -> str:
        return rf"{self.base.latex()} \quad\text{{(gradients calibrated)}}"


def calibration(d_w: Any, d_l: Any, r_star: Any) -> Any:
    """c = exp((ln r* - ln r)/2) for r = d_w/d_l, and 1 where r or r* is not positive and finite."""
    with np.errstate(all="ignore"):
        squared = np.asarray(r_star * (d_l / d_w), dtype=np.float64)
        ok = (d_w > 0) & (d_l > 0) & np.isfinite(squared) & (squared > 0)
    return np.sqrt(np.where(ok, squared, 1.0))


def _plain(x: Any) -> Any:
    return x.detach().cpu().numpy() if hasattr(x, "detach") else x


def _detached(y: Pair) -> Pair:
    return Pair(*map(_plain, y))
