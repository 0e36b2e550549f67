"""A preference loss of your own. Edit, then run `displacement check-loss my_loss.py`."""

from dataclasses import dataclass
from typing import Any

from theory.losses import POSITIVE, Claims, MarginLoss, Pair, parameter


# Derive from MarginLoss if the loss sees ln pi(y+) - ln pi(y-) alone (as DPO does), from Loss if it sees the two
# log-probabilities apart (an SFT term, other lengths), from TokenLoss if it looks at single tokens.
@dataclass(frozen=True)
class MyLoss(MarginLoss):
    """What it is in words, and where it is least: (ln(1 + e^-z))^2 with z = beta (u - u_ref); no finite minimiser."""

    # Parameters: a default and the domain it must lie in (POSITIVE, REAL, or an Interval).
    beta: float = parameter(0.1, POSITIVE)

    name = "my_loss"  # how it is called in tables
    reference = "equation and paper, or where it was invented"

    # What is true of it. check_loss tries what you claim and looks for a counter-example to what you deny.
    claims = Claims(
        convex=True,  # in the margin; of a Loss: in (ln pi(y+), ln pi(y-)) together
        decreasing=True,  # never pushes y+ down or y- up
        differentiable=True,  # no kink
        reference_free=False,  # does not look at the reference model
        nonnegative=True,
    )

    def formula(self, ops: Any, y: Pair) -> Any:
        # The loss of one sample, with the functions of `ops` only (theory.ops), so that it runs on numpy, torch and in
        # many digits and prints as LaTeX. y.a, y.b are ln pi(y+), ln pi(y-); y.a_ref, y.b_ref the same of the
        # reference; y.u = y.a - y.b; y.m = y.u - y.u_ref; y.n_w, y.n_l are the lengths.
        return ops.softplus(-self.beta * y.m) ** 2

    # If the loss is least at a finite margin, say where (a Loss: `minimum(self, y)`, a pair):
    # def minimiser(self, u_ref):
    #     return u_ref + 1 / self.beta

    # Instances to check: the default, and one whose parameters are at no special value.
    @classmethod
    def examples(cls) -> tuple["MyLoss", ...]:
        return (cls(), cls(beta=0.7))
