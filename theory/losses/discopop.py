"""DiscoPOP: the logistic and the exponential loss, one gated into the other; found by search over programs."""

from dataclasses import dataclass
from functools import cache
from typing import Any

from scipy.optimize import brentq

from theory._check import POSITIVE, Interval
from theory.losses._base import Claims, MarginLoss, Pair, parameter
from theory.ops import NUMPY, Ops

# Where the two zeros of the slope meet, and are gone for larger tau: tau, and x/tau there.
FOLD, _FOLD_Z = 0.10978038369277424, -0.5559965827
# The loss is convex between these two.
CONVEX = (0.42275073810672875, 0.79755730044431713)


@dataclass(frozen=True)
class DiscoPOP(MarginLoss):
    """(1-g) ln(1+e^-x) + g e^-x with g = sigmoid(x/tau), x = beta m; tends to 0 as m -> inf.

    For tau < 0.10978 it has a local minimum below m = 0 and a local maximum above it or close by (tau = 0.05: x =
    -0.1186 and 0.0720): between them the loss pushes the margin down. At m = 0 it does so for tau < (1 - ln 2)/3.
    tau > 1 is refused: e^-x would outgrow its gate, and the loss rise exponentially towards m = -inf.
    """

    beta: float = parameter(0.1, POSITIVE)
    tau: float = parameter(0.05, Interval(0.0, 1.0, open_high=False, typical=(0.02, 0.09)))

    name = "discopop"
    reference = "Lu et al. 2024 (arXiv 2406.08414), eq. 5 (LRML); TRL loss_type discopop"

    @property
    def claims(self) -> Claims:  # type: ignore[override]
        return Claims(convex=CONVEX[0] <= self.tau <= CONVEX[1], decreasing=self.tau >= FOLD)

    def formula(self, ops: Ops, y: Pair) -> Any:
        x = self.beta * y.m
        # g e^-x in one power: apart, the factors overflow and vanish.
        return ops.sigmoid(-x / self.tau) * ops.softplus(-x) + ops.exp(ops.log_sigmoid(x / self.tau) - x)

    def closed_slope(self, ops: Ops, y: Pair) -> Any:
        logistic, exponential, rest = _slope_terms(ops, self.beta * y.m, self.tau)
        return self.beta * (ops.exp(logistic) + ops.exp(exponential) * rest)

    def closed_log_slope(self, ops: Ops, y: Pair) -> Any:
        logistic, exponential, rest = _slope_terms(ops, self.beta * y.m, self.tau)
        ahead = ops.relu(exponential - logistic)  # the larger of the two powers is taken out
        scaled = ops.exp(-ahead) + ops.exp(-ops.relu(logistic - exponential)) * rest
        return ops.log(self.beta) + logistic + ahead + ops.log(ops.relu(scaled) + ops.relu(-scaled))

    def zeros(self, u_ref: Any) -> tuple[Any, ...]:
        return tuple(u_ref + x / self.beta for x in _zeros(self.tau))

    @classmethod
    def examples(cls) -> tuple["DiscoPOP", ...]:
        return (cls(), cls(beta=0.7, tau=0.08), cls(beta=0.4, tau=0.6))


def _slope_terms(ops: Ops, x: Any, tau: Any) -> tuple[Any, Any, Any]:
    """(p, q, c) of the slope -l'(x) = e^p + e^q c: p = ln((1-g) sigmoid(-x)), q = ln(g e^-x), c the gate's part."""
    held = ops.clip(x, -700.0, 700.0)  # e^x ln(1+e^-x) tends to 1 and 0; its factors overflow
    ratio = ops.exp(held) * ops.softplus(-held)
    rest = 1 - ops.sigmoid(-x / tau) / tau * (1 - ratio)
    return ops.log_sigmoid(-x / tau) + ops.log_sigmoid(-x), ops.log_sigmoid(x / tau) - x, rest


@cache
def _zeros(tau: float) -> tuple[float, ...]:
    """Values of x = beta m at which the slope vanishes: two (a minimum and a maximum of the loss), or none."""
    if tau >= FOLD:
        return ()

    def slope(z: float) -> float:
        p, q, c = _slope_terms(NUMPY, z * tau, tau)
        return float(NUMPY.exp(p) + NUMPY.exp(q) * c)

    # In units of tau the slope is negative at _FOLD_Z for every tau below the fold, and positive far out.
    return tuple(tau * float(brentq(slope, _FOLD_Z, far, xtol=1e-15)) for far in (-800.0, 800.0))  # type: ignore[arg-type]
