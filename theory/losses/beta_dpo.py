"""beta-DPO: beta follows the mean margin of the batch, and pairs with outlying margins are sampled away."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from theory._check import POSITIVE, REAL, Interval, check_array, check_number
from theory.losses._base import Claims, Loss, Pair, parameter
from theory.ops import Ops

_LEAST = 1e-3  # of the batch's beta


@dataclass(frozen=True)
class BetaDPO(Loss):
    """-ln sigmoid(b m), b = max(0.001, beta (1 + alpha (mean m - m0))) of the batch, a constant for the gradient.

    r = 1, never least. The batch is what is left of it after the filter (`keep_probabilities`); m0 is the trainer's
    running mean of m (EMA, 0.9). DPO at alpha = 0. As a function of the margin it is not convex: b grows with m.
    """

    beta: float = parameter(0.1, POSITIVE)
    alpha: float = parameter(0.6, Interval(0.0, open_low=False, typical=(0.1, 2.0)))
    m0: float = parameter(0.0, REAL)

    name = "beta_dpo"
    reference = "Wu et al. 2024 (arXiv 2407.08639); its code, trainers.py"
    coupled = True

    @property
    def claims(self) -> Claims:  # type: ignore[override]
        return Claims(convex=self.alpha == 0)

    def formula(self, ops: Ops, y: Pair) -> Any:
        batch = self.beta * (1 + self.alpha * (ops.mean(y.m) - self.m0))
        return -ops.log_sigmoid(ops.detach(_LEAST + ops.relu(batch - _LEAST)) * y.m)

    @classmethod
    def examples(cls) -> tuple["BetaDPO", ...]:
        return (cls(), cls(beta=0.3, alpha=0.23, m0=0.7), cls(alpha=0.0))


def keep_probabilities(margins: ArrayLike, m0: float, sd: float) -> NDArray[np.float64]:
    """(n,) probabilities with which the filter draws the pairs it keeps (without replacement), by their margins m.

    margins (n,) nats; m0, sd: running mean and standard deviation of m (sd > 0). Normal weights about m0, normalised:
    they sum to 1 however far out the margins are.
    """
    margins = check_array(margins, "margins", (None,)).astype(np.float64)
    z = (margins - check_number(m0, "m0")) / check_number(sd, "sd", POSITIVE)
    log_weights = -(z**2) / 2
    weights = np.exp(log_weights - log_weights.max())
    return weights / weights.sum()
