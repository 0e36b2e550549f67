"""The lowest ln pi(y+) on the whole path u >= u0, as a ball, when both groups are trained.

In `x = e^y`, `y = omega tau >= 0`, the path reads (exact_solution E2)

    u = v+ x^2 - v- / x^2,   v+- = K0/(4 omega) +- u0/2 >= 0,       D_z = alpha_z x + beta_z / x - u/2
    alpha_z, beta_z = (A_z +- rho B_z)/2,   rho = sqrt(eta_h / (2 eta_W)),      S(y) = e^-u + sum_z e^D_z

and ln pi(+) = -ln(1 + S) is lowest where S is largest.

Tail: dD_z/dy = -(v+ x^4 - alpha_z x^3 + beta_z x + v-)/x^2, so S falls from an X on if every such quartic is
positive there. All of them lie above the one with the largest alpha and the least beta; if its Taylor coefficients at X
are >= 0, the first > 0, it is positive on [X, inf).

On [0, ln X] an interval of y is dropped if S is below a value S is known to take, if S' has no zero there (the largest
S is then elsewhere or at y = 0, which is kept apart), or if S'' > 0 (no maximum inside). The survivors shrink by
interval Newton where S'' < 0, by bisection elsewhere. Whatever survives holds every maximiser other than y = 0.
"""

from dataclasses import dataclass

from theory._check import SolverError
from theory.certify.start import Ball, Start, load_flint

_MAX_BOXES = 200_000


@dataclass(frozen=True)
class Lowest:
    """The minimum over u >= u0.

    log_prob : ball around the lowest ln pi(y+). margin : ball around every margin where it may be taken.
    at_start, below_start : proved that it is the start itself, or that it is below the start.
    boxes : intervals looked at.
    """

    log_prob: Ball
    margin: Ball
    at_start: bool
    below_start: bool
    boxes: int


class _Curve:
    """S along the path in y, with two derivatives."""

    def __init__(self, start: Start) -> None:
        k, half = start.K0 / (4 * start.omega2.sqrt()), start.u0 / 2
        self.up, self.down = k + half, k - half
        rho = (start.eta_h / (2 * start.eta_W)).sqrt()
        self.alpha = [(a + rho * b) / 2 for a, b in zip(start.A, start.B, strict=True)]
        self.beta = [(a - rho * b) / 2 for a, b in zip(start.A, start.B, strict=True)]

    def margin(self, y: Ball) -> Ball:
        """u."""
        x2 = (2 * y).exp()
        return self.up * x2 - self.down / x2

    def value(self, y: Ball) -> Ball:
        """S."""
        x, half = y.exp(), self.margin(y) / 2
        z = 1 / x
        odds = (a * x + b * z - half for a, b in zip(self.alpha, self.beta, strict=True))
        return (-2 * half).exp() + sum(D.exp() for D in odds)

    def jet(self, y: Ball) -> tuple[Ball, Ball, Ball]:
        """S, S', S''."""
        x = y.exp()
        z = 1 / x
        grown, decayed = self.up * x * x, self.down * z * z
        u = grown - decayed
        speed = grown + decayed  # u'/2
        S = (-u).exp()
        S1, S2 = -2 * speed * S, 4 * (speed**2 - u) * S
        for a, b in zip(self.alpha, self.beta, strict=True):
            p, q = a * x, b * z
            e = (p + q - u / 2).exp()
            slope = p - q - speed
            S, S1, S2 = S + e, S1 + slope * e, S2 + (slope**2 + p + q - 2 * u) * e
        return S, S1, S2

    def falls_beyond(self, X: Ball) -> bool:
        """Proved: every quartic is positive for x >= X."""
        a, b, v = _max(self.alpha), -_max([-x for x in self.beta]), self.up
        derivatives = (
            v * X**4 - a * X**3 + b * X + self.down,
            4 * v * X**3 - 3 * a * X**2 + b,
            6 * v * X**2 - 3 * a * X,
            4 * v * X - a,
        )
        return bool(v > 0) and bool(derivatives[0] > 0) and all(bool(c >= 0) for c in derivatives[1:])


def _max(balls: list[Ball]) -> Ball:
    top = balls[0]
    for ball in balls[1:]:
        top = top.max(ball)
    return top


def lowest(start: Start) -> Lowest | None:
    """The minimum, or None where this proof does not apply: a group is frozen, P = 0 (the margin never passes 0) or too
    near it for the working precision, or there is no other token (then ln pi(+) = ln sigmoid(u) only rises).

    Raises SolverError if more intervals are needed than `_MAX_BOXES`.
    """
    flint = load_flint()
    if not start.A or not start.omega2 > 0:
        return None
    curve = _Curve(start)
    end = flint.arb(1)
    while not curve.falls_beyond(end.exp()):
        end = 2 * end
        if end > 1 << 20:
            return None
    zero = flint.arb(0)
    at_start = curve.value(zero)
    best = at_start.lower()
    left, kept, boxes = [_between(zero, end)], [], 0
    while left:
        box = left.pop()
        boxes += 1
        if boxes > _MAX_BOXES:
            raise SolverError(f"the minimum of ln pi(y+) is not isolated after {_MAX_BOXES} intervals")
        mid = box.mid()
        S, S1, S2 = curve.jet(box)
        if S < best or S1 > 0 or S1 < 0 or S2 > 0:
            continue
        at_mid = curve.value(mid)
        if mid >= 0:  # rounding may have let the interval reach beyond the start
            best = _larger(best, at_mid.lower())
        S = _common(S, at_mid + S1 * (box - mid))
        if S is None or S < best:
            continue
        if S2 < 0:
            narrow = _common(box, mid - curve.jet(mid)[1] / S2)
            if narrow is None:
                continue
            if narrow.rad() < box.rad() / 2:
                left.append(narrow)
                continue
            box = narrow
        if box.rad() < flint.arb(2) ** (8 - flint.ctx.prec // 2):
            kept.append((box, S))
        else:
            left += [_between(box.lower(), box.mid()), _between(box.mid(), box.upper())]
    return _summary(curve, at_start, [(b, S) for b, S in kept if not S < best], best, boxes)


def _summary(curve: _Curve, at_start: Ball, kept: list[tuple[Ball, Ball]], best: Ball, boxes: int) -> Lowest:
    arb = load_flint().arb
    high = best
    margins = []
    if not at_start < best:
        high = _larger(high, at_start.upper())
        margins.append(curve.margin(arb(0)))
    for box, S in kept:
        high = _larger(high, S.upper())
        margins.append(curve.margin(box))
    where = margins[0]
    for m in margins[1:]:
        where = where.union(m)
    return Lowest(-_between(best, high).log1p(), where, not kept, bool(at_start < best), boxes)


def _between(low: Ball, high: Ball) -> Ball:
    return low.union(high)


def _larger(a: Ball, b: Ball) -> Ball:
    return b if b > a else a


def _common(a: Ball, b: Ball) -> Ball | None:
    """The intersection, None if it is proved empty."""
    if not b.is_finite():
        return a
    return a.intersection(b) if a.overlaps(b) else None
