"""Whether the flow of a given loss passes a margin u1.

It does if G = -l' > 0 on [u0, u1], which is proved by evaluating the loss's own formula, with its derivative, on
intervals that cover [u0, u1].
"""

import dataclasses
from typing import Any

from theory.certify.start import Ball, load_flint
from theory.losses import MarginForm, Pair

_MAX_DEPTH = 12


class BallOps:
    """The primitives of a loss on power series `value + slope x` with ball coefficients.

    At a kink inside an interval the slope is the hull of both sides; `detach` keeps the value and drops the slope.
    """

    def __init__(self) -> None:
        flint = load_flint()
        self._arb, self._series = flint.arb, flint.arb_series

    def _of(self, x: Any) -> Any:
        return x if isinstance(x, self._series) else self._series([x], 2)

    def exp(self, x: Any) -> Any:
        return self._of(x).exp()

    def expm1(self, x: Any) -> Any:
        return self.exp(x) - 1

    def log(self, x: Any) -> Any:
        return self._of(x).log()

    def log1p(self, x: Any) -> Any:
        return self.log(1 + self._of(x))

    def sigmoid(self, x: Any) -> Any:
        return 1 / (1 + self.exp(-x))

    def log_sigmoid(self, x: Any) -> Any:
        return -self.softplus(-x)

    def softplus(self, x: Any) -> Any:
        return self.log1p(self.exp(x))

    def relu(self, x: Any) -> Any:
        x = self._of(x)
        zero = self._arb(0)
        if x[0] > 0:
            return x
        if x[0] < 0:
            return self._series([0], 2)
        return self._series([x[0].max(zero), zero.union(x[1])], 2)

    def step(self, x: Any) -> Any:
        at = self._of(x)[0]
        return self._series([1 if at > 0 else 0 if at < 0 else self._arb(0).union(self._arb(1))], 2)

    def clip(self, x: Any, low: Any, high: Any) -> Any:
        return low + self.relu(self._of(x) - low) - self.relu(self._of(x) - high)

    def log1mexp(self, x: Any) -> Any:
        return self.log(-self.expm1(x))

    def sort(self, x: Any) -> Any:
        return x  # a batch of one

    def mean(self, x: Any) -> Any:
        return x

    def detach(self, x: Any) -> Any:
        return self._series([self._of(x)[0]], 2)


def slope_on(form: MarginForm, u: Ball) -> Ball:
    """A ball around G(v) = -l'(v) for every v in u (NaN if none is found), the parameters being exact floats."""
    flint = load_flint()
    arb = flint.arb
    exact = object.__new__(type(form.loss))
    for f in dataclasses.fields(form.loss):  # type: ignore[arg-type]
        object.__setattr__(exact, f.name, arb(getattr(form.loss, f.name)))
    zero = arb(0)
    pair = Pair(flint.arb_series([u, 1], 2), zero, arb(float(form.u_ref)), zero)
    try:
        return -exact.formula(BallOps(), pair)[1]
    except ValueError:  # flint divides by no ball that contains 0: too wide an interval, or a pole
        return arb.nan()


def passes(form: MarginForm, u0: Ball, u1: Ball) -> bool | None:
    """True: G > 0 on [u0, u1] is proved; False: G <= 0 at one of the margins tried is; None: undecided."""
    left = [(u0.union(u1), 0)]
    undecided = False
    while left:
        u, depth = left.pop()
        if slope_on(form, u) > 0:
            continue
        # Only points between the two count against the loss.
        if slope_on(form, u.mid()) <= 0 and u0 <= u.mid() <= u1:
            return False
        if depth == _MAX_DEPTH:
            undecided = True
            continue
        left += [(u.lower().union(u.mid()), depth + 1), (u.mid().union(u.upper()), depth + 1)]
    return None if undecided else True
