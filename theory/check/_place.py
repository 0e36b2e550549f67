"""Where a loss stands among all losses: the sign of d ln pi(y+)/dt depends on it through r = d_w/d_l alone."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from theory.check._base import one_thread
from theory.check._pair import SETTINGS, incentives, lattice
from theory.conditions import ratio_kind
from theory.losses import Loss, TokenLoss

MEANING = {
    "margin": "gradient flow of one sample follows the path that all margin losses share; only its speed differs",
    "constant ratio": "a weighted margin; one path for one sample, and displacement depends on r of its lengths",
    "two-likelihood": "the ratio moves with the probabilities, and the path of a sample with it",
    "at rest": "it moves nothing near its reference",
    "token": "it looks at single tokens or at groups of responses, which have no one ratio",
}


@dataclass(frozen=True)
class Place:
    """The class of a loss by its incentive ratio r = d_w/d_l, and what follows from it.

    kind : as `theory.conditions.ratio_kind`, or "token".
    low, high : the range of r over log-probabilities <= 0; None for losses of tokens.
    """

    kind: str
    low: float | None
    high: float | None
    meaning: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        ratio = "" if self.low is None else f", r = d_w/d_l in [{self.low:.4g}, {self.high:.4g}]"
        return f"{self.kind}{ratio}: {self.meaning}"


def place(loss: Loss) -> Place:
    """The incentive-ratio class of a loss; r is looked at within 20 nats of references, where either incentive acts."""
    if isinstance(loss, TokenLoss):
        return Place("token", None, None, MEANING["token"])
    ratios = []
    with np.errstate(all="ignore"), one_thread():
        for setting in SETTINGS:
            a, b = lattice(setting)
            d_w, d_l = incentives(loss, setting, a, b)
            near = (np.abs(a - setting[0]) < 20) & (np.abs(b - setting[1]) < 20)
            acts = near & ((np.abs(d_w) > 1e-200) | (np.abs(d_l) > 1e-200)) & np.isfinite(d_w) & np.isfinite(d_l)
            ratios.append((d_w / d_l)[acts & ~((d_w == 0) & (d_l == 0))])
    r = np.concatenate(ratios)
    low, high = (float(r.min()), float(r.max())) if r.size else (float("nan"),) * 2
    kind = ratio_kind(ratios)
    return Place(kind, low, high, MEANING[kind])
