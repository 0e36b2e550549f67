"""Every geometry near a given one: bounds on how far ln pi can change over a box, by gradients.

For a function F of the entries of (W, h) and a centre, every point within eps of it (entry by entry) has
`|F - F(centre)| <= integral_0^eps N(r) dr`, N(r) an upper bound on the L1 norm of grad F over the box of radius r (mean
value theorem along the segment). N grows with r, so a sum over steps with N at the end of each is a bound too.

First F = D_z, which is c A_z + g B_z - u/2 at a fixed margin u and A_z - u0/2 at each geometry's own start:

    dD_z/dh   = c (W_z - s/2) + 4 eta_W D_K h + D_u a                   D_K, D_u = A_z (c_K, c_u) + B_z (g_K, g_u)
    dD_z/dW_z = c h + g a
    dD_z/dW+- = +-(2 eta_h D_K a + D_u h + g (W_z - s/2)) - (c h + g a)/2

Then `ln Z = ln(1 + e^-u + sum_z e^D_z) = -ln pi(+)`: its gradient is the mean of those of the exponents (0, -u, D_z),
weighted with the probabilities of y+, y- and z. Whatever the box, these sum to 1 and lie between bounds that follow
from those on the exponents, so the largest mean norm is a fractional knapsack. For a token g, grad (D_g - ln Z) is the
mean of grad (D_g - D_z), in which what all logits share has gone. The change of such a mean from the start to u1 is the
mean of the changes plus the start's gradients times the changes of the weights; D_z(u1) - D_z(u0) has the form above.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from theory.certify.start import Ball, Lengths, Start, load_flint, log_change, odds_against
from theory.model import UnconstrainedFeatures

Array = NDArray[np.float64]
_BLOCK = 1 << 20


@dataclass(frozen=True)
class Reach:
    """How far the box got: its radius, and by how much exponents and the F may differ from the centre there."""

    radius: float
    off0: Array  # (V,) at the start, in the order of `Box.before`
    off1: Array  # (V,) at u1
    change: list[Ball]


class Box:
    """The box question for one start, a margin u1 and a token that is claimed to gain.

    token : its place in `start.others`, -1 for y-, None for no claim. The claims are that every F in `values` is
    negative: the change of ln pi(+) from the start to u1, and minus that of ln pi(token).
    """

    def __init__(self, model: UnconstrainedFeatures, start: Start, u1: float, token: int | None) -> None:
        self.model, self.start = model, start
        self.claimed = token is not None
        self.place = token if token is not None and token >= 0 else None  # in `start.others`
        self.u1 = load_flint().arb(u1)
        self.lengths = Lengths.of(model, start.others)
        n, zero = len(start.others), load_flint().arb(0)
        odds0, odds1 = start.start_odds, start.odds(self.u1)
        self.values = self._values(start.u0, odds0, odds1)
        # The exponents of every z, y- and y+; at u1 relative to the token's, with which they move together.
        self.before = [*odds0, -start.u0, zero]
        self.after = [*odds1, -self.u1, zero]
        if self.place is not None:
            self.after = [x - odds1[self.place] for x in self.after]
        self.centre = Reach(0.0, np.zeros(n + 2), np.zeros(n + 2), [zero for _ in self.values])
        # Sums of n or d numbers >= 0 and a few products are rounded up by this factor.
        self.up = 1 + (n + model.d + 64) * 2.0**-51

    def _values(self, u0: Ball, before: list[Ball], after: list[Ball]) -> list[Ball]:
        falls = log_change(odds_against(u0, before), odds_against(self.u1, after))
        if not self.claimed:
            return [falls]
        return [falls, -falls + (self.u1 - u0 if self.place is None else before[self.place] - after[self.place])]

    def plainly(self, eps: float) -> bool:
        """Certified by one ball evaluation, which forgets that an entry occurs in several inner products."""
        wide = self.start.widened(eps, self.lengths)
        return wide.reaches(self.u1) and all(
            bool(F < 0) for F in self._values(wide.u0, wide.start_odds, wide.odds(self.u1))
        )

    def certified(self, eps: float, attempts: tuple[int, ...] = (1, 6, 36)) -> bool:
        """Proved for every geometry within eps, in as many steps as one of the attempts says."""
        if eps > self._most():
            return False
        grids = ([eps * k / steps for k in range(1, steps)] + [eps] for steps in attempts)
        return any(self._march(self.centre, grid).radius == eps for grid in grids)

    def largest(self, steps: int = 64) -> float:
        """The largest radius certified in about this many steps, to three digits (rounded down); 0 if none is."""
        most = self._most()
        reach = self._march(self.centre, [most * k / steps for k in range(1, steps + 1)]) if most else self.centre
        for k in range(1, 7):
            reach = self._march(reach, [reach.radius + most / steps / 2**k])
        return _down(reach.radius)

    def _most(self) -> float:
        """A radius beyond which there is no hope, since N grows; 0 if the centre itself is not certified."""
        slopes = self._slopes(self.centre, 0.0)
        if slopes is None or not all(bool(F < 0) for F in self.values):
            return 0.0
        return min(float((-F).upper()) / max(s, 1e-300) for F, s in zip(self.values, slopes[2], strict=True))

    def _march(self, reach: Reach, radii: list[float]) -> Reach:
        """The furthest of the radii up to which every F stays negative."""
        for radius in radii:
            slopes = self._slopes(reach, radius)
            if slopes is None:
                break
            odds0, odds1, norms = slopes
            step = load_flint().arb(radius) - load_flint().arb(reach.radius)
            change = [x + step * N for x, N in zip(reach.change, norms, strict=True)]
            if not all(bool(F + x < 0) for F, x in zip(self.values, change, strict=True)):
                break
            reach = Reach(radius, odds0, odds1, change)
        return reach

    @np.errstate(over="ignore", invalid="ignore")  # what overflows certifies nothing
    def _slopes(self, reach: Reach, radius: float) -> tuple[Array, Array, list[float]] | None:
        """How far exponents may be off within the radius, and N(radius) of each F; None if a path may miss u1."""
        wide = self.start.widened(radius, self.lengths)
        if not wide.reaches(self.u1):
            return None
        t = wide.turn(self.u1)
        one, zero, n = load_flint().arb(1), load_flint().arb(0), len(self.start.others)
        D_K = [a * t.c_K + b * t.g_K for a, b in zip(wide.A, wide.B, strict=True)]
        D_u = [a * t.c_u + b * t.g_u for a, b in zip(wide.A, wide.B, strict=True)]
        in_u0 = (self.lengths.a + 2 * self.lengths.h + 4 * radius * self.model.d) * self.up
        half = one / 2
        own0, rel0 = self._exponents(one, zero, [zero] * n, [-half] * n, radius, in_u0)
        own1, rel1 = self._exponents(t.c, t.g, D_K, D_u, radius, 0.0)
        own, rel = self._exponents(t.c - 1, t.g, D_K, [x + half for x in D_u], radius, in_u0)  # u1 less start
        step = (radius - reach.radius) * self.up
        off0 = (reach.off0 + step * own0) * self.up
        off1 = (reach.off1 + step * (own1 if self.place is None else rel1)) * self.up
        if not (np.isfinite(off0).all() and np.isfinite(off1).all()):
            return None
        (low0, high0), (low1, high1) = self._weights(self.before, off0), self._weights(self.after, off1)
        shift = np.maximum(np.maximum(high0 - low1, high1 - low0), 0.0)

        def mean(at_start: Array, at_u1: Array, both: Array) -> float:
            """Norm of the change of a weighted mean of gradients: end by end, or as one change, whichever is less."""
            apart = self._heaviest(low0, high0, at_start) + self._heaviest(low1, high1, at_u1)
            together = self._heaviest(low1, high1, both) + float(shift @ at_start) * self.up
            return min(apart, together) * self.up

        norms = [mean(own0, own1, own)]
        if self.place is not None:
            norms.append(mean(rel0, rel1, rel))
        elif self.claimed:  # y-: minus the change of ln pi(-) is u1 - u0 less that of ln pi(+)
            norms.append((norms[0] + in_u0) * self.up)
        return off0, off1, norms

    def _exponents(
        self, c: Ball, g: Ball, D_K: list[Ball], D_u: list[Ball], eps: float, in_u: float
    ) -> tuple[Array, Array]:
        """(V,) bounds on the norms of the gradients of every exponent, and of their differences to the token's.

        in_u : the same for the exponent -u of y-.
        """
        own = self._norms(c, g, D_K, D_u, eps, None)
        if self.place is None:
            return np.append(own, [in_u, 0.0]), np.empty(0)
        k = self.place
        rel = self._norms(c, g, [x - D_K[k] for x in D_K], [x - D_u[k] for x in D_u], eps, k)
        rel[k] = 0.0
        return np.append(own, [in_u, 0.0]), np.append(rel, [own[k] + in_u, own[k]])

    def _norms(self, c: Ball, g: Ball, D_K: list[Ball], D_u: list[Ball], eps: float, less: int | None) -> Array:
        """(V - 2,) upper bounds on the L1 norm of grad D_z over the box, or of grad (D_z - D_less).

        c, g, and (V - 2,) D_K, D_u of D_z or of the difference, are balls over the box.
        """
        model, L, d, others = self.model, self.lengths, self.model.d, self.start.others
        plus, minus = model.single_pair
        h, up, down = (x.astype(np.float64) for x in (model.h, model.W[plus], model.W[minus]))
        a, base, rows = up - down, (up + down) / 2, L.rows
        if less is not None:
            base, rows = model.W[others[less]].astype(np.float64), rows + rows[less]
        (c_m, c_p, c_r), (g_m, g_p, g_r) = _split([c]), _split([g])
        (K_m, K_p, K_r), (u_m, u_p, u_r) = _split(D_K), _split(D_u)
        four, two = 4 * float(self.start.eta_W), 2 * float(self.start.eta_h)
        own = c_m * h + g_m * a  # (d,): in the row of z, and halved in those of y+ and y- or whole in that of `less`
        half = np.abs(own) / 2 if less is None else np.zeros(d)
        centre = np.empty(len(others))
        size = max(1, _BLOCK // d)
        for i in range(0, len(others), size):
            part = slice(i, i + size)
            rest = model.W[others[part]].astype(np.float64) - base
            K, u = K_m[part, None], u_m[part, None]
            in_h = np.abs(c_m * rest + four * K * h + u * a).sum(1)
            centre[part] = in_h + 2 * np.maximum(np.abs(two * K * a + u * h + g_m * rest), half).sum(1)
        centre += np.abs(own).sum() * (1 if less is None else 2)
        # What the radii of c, ... and the box add. The box moves h by `e` and a, W_z - base by up to twice as much (L1
        # norms); the rounding of base and of W_z - base comes on top.
        e, rest_e = eps * d, 2 * eps * d + L.slack
        in_h = c_r * rows + c_p * rest_e + four * (K_r * L.h + K_p * e) + u_r * L.a + u_p * 2 * e
        in_own = c_r * L.h + c_p * e + g_r * L.a + g_p * 2 * e
        in_pair = two * (K_r * L.a + K_p * 2 * e) + u_r * L.h + u_p * e + g_r * rows + g_p * rest_e
        return (centre + in_h + 2 * in_own + 2 * in_pair) * self.up

    def _weights(self, exponents: list[Ball], off: Array) -> tuple[Array, Array]:
        """(V,) bounds below and above on the softmax of exponents that are within `off` of these."""
        arb = load_flint().arb
        terms = [(x + arb(0, r)).exp() for x, r in zip(exponents, off.tolist(), strict=True)]
        low, high = [x.lower() for x in terms], [x.upper() for x in terms]
        least, most = sum(low), sum(high)
        below = [float((x / (x + (most - y))).lower()) for x, y in zip(low, high, strict=True)]
        above = [float((y / (y + (least - x))).upper()) for x, y in zip(low, high, strict=True)]
        margin = self.up - 1  # for the rounding to float64, here and in `_heaviest`
        return np.maximum(np.array(below) - margin, 0.0), np.minimum(np.array(above) + margin, 1.0)

    def _heaviest(self, below: Array, above: Array, slopes: Array) -> float:
        """The largest sum of w_z slopes_z with w between its bounds and sum w = 1 (a little more is let through)."""
        order = np.argsort(-slopes, kind="stable")
        room = (above - below)[order]
        left = 1.0 + 2 * (self.up - 1) - below.sum()
        taken = np.clip(left - np.concatenate([[0.0], np.cumsum(room)[:-1]]), 0.0, room)
        return float((below[order] + taken + (self.up - 1)) @ slopes[order]) * self.up


def _split(balls: list[Ball]) -> tuple[Array, Array, Array]:
    """Midpoints, bounds on the magnitude, and radii in float64, the radii with room for the rounding of products."""
    mid = np.array([float(x.mid()) for x in balls])
    rad = np.array([float(x.rad()) for x in balls]) + 2.0**-45 * np.abs(mid) + 1e-300
    return mid, np.abs(mid) + rad, rad * (1 + 2.0**-45)


def _down(x: float) -> float:
    """x to three digits, rounded down."""
    near = float(f"{x:.2e}")
    return near if near <= x else float(f"{x - 10.0 ** (np.floor(np.log10(x)) - 2):.2e}")
