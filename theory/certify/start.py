"""Inner products of a single-token pair, and ln pi(y+) along its path, as balls that contain the true value.

Floats are exact rationals, so the start of a path is exact. With `s = W_+ + W_-`, `a = W_+ - W_-` and, for every other
token, `A_z = <W_z - s/2, h>`, `B_z = <W_z - s/2, a>`, the path is algebraic in the margin u (exact_solution E2):

    K0 = 2 eta_W |h|^2 + eta_h |a|^2,    K(u)^2 = K0^2 + 8 eta_W eta_h (u^2 - u0^2),    theta = 2 (u - u0)/(K0 + K)
    c = cosh(omega tau) = sqrt((K0 + K) / (2 (K0 + 4 eta_W eta_h u0 theta)))
    D_z = ln pi(z) - ln pi(+) = c (A_z + eta_h theta B_z) - u/2,     ln pi(+) = -ln(1 + e^-u + sum_z e^D_z)

The same formula holds with either group frozen. (This c is (1 - omega^2 theta^2)^(-1/2) without its cancellation.)
"""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from theory._check import FloatArray
from theory.model import UnconstrainedFeatures

Ball = Any  # flint.arb, which has no type stubs
_BLOCK = 1 << 21  # numbers of W turned into balls at a time: a few hundred MB


def load_flint() -> Any:
    """The python-flint module, or an error that names the extra."""
    try:
        import flint  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ImportError("certificates need python-flint: pip install 'likelihood-displacement[certify]'") from None
    return flint


@dataclass(frozen=True)
class Turn:
    """Where the path has margin u: h = c h0 + g a0 with c = cosh(omega tau), g = eta_h sinh(omega tau)/omega."""

    c: Ball
    g: Ball
    # Derivatives with respect to K0 and to the start margin u0, at fixed u.
    c_K: Ball
    g_K: Ball
    c_u: Ball
    g_u: Ball


@dataclass(frozen=True)
class Start:
    """Balls for one start (or, widened, for every start in a box). Tokens other than y+, y- in the order of `others`.

    eta_W, eta_h : rates. H2 = |h|^2, A2 = |a|^2, u0 = <a, h>. A, B : A_z and B_z of every other token.
    """

    eta_W: Ball
    eta_h: Ball
    H2: Ball
    A2: Ball
    u0: Ball
    A: list[Ball]
    B: list[Ball]
    others: NDArray[np.intp]

    @classmethod
    def of(cls, model: UnconstrainedFeatures, eta_W: float, eta_h: float) -> "Start":
        """From the exact values of the floats in W and h, at flint's working precision."""
        flint = load_flint()
        plus, minus = model.single_pair
        row = lambda x: flint.arb_mat([np.asarray(x, dtype=np.float64).tolist()])  # noqa: E731
        h, up, down = row(model.h), row(model.W[plus]), row(model.W[minus])
        a, s = up - down, up + down
        vectors = flint.arb_mat([h.entries(), a.entries()]).transpose()  # (d, 2)
        s_h, s_a = (s * vectors).entries()
        a_h, a_a = (a * vectors).entries()
        others = np.delete(np.arange(model.V), [plus, minus])
        A, B = [], []
        for products in _products(flint, model.W, others, vectors):
            A += [x - s_h / 2 for x in products[::2]]
            B += [x - s_a / 2 for x in products[1::2]]
        arb = flint.arb
        return cls(arb(eta_W), arb(eta_h), (h * h.transpose())[0, 0], a_a, a_h, A, B, others)

    @property
    def K0(self) -> Ball:
        """du/dtau at the start."""
        return 2 * self.eta_W * self.H2 + self.eta_h * self.A2

    @property
    def omega2(self) -> Ball:
        """omega^2 = 2 eta_W eta_h; 0 when a group is frozen."""
        return 2 * self.eta_W * self.eta_h

    def reaches(self, u: Ball) -> bool:
        """Proved: u > u0, and K is bounded below by a positive number between, so that the path gets to u."""
        PQ = self.K0**2 - 4 * self.omega2 * self.u0**2
        return bool(u > self.u0) and bool(self.K0 > 0) and bool(PQ > 0 or self.u0 > 0 or (PQ >= 0 and u < 0))

    def turn(self, u: Ball) -> Turn:
        """The path at margin u, with derivatives."""
        K0, u0, w2 = self.K0, self.u0, self.omega2
        K = (K0**2 + 4 * w2 * (u**2 - u0**2)).sqrt()
        theta = 2 * (u - u0) / (K0 + K)
        c = ((K0 + K) / (2 * (K0 + 2 * w2 * u0 * theta))).sqrt()
        # dK = (K0 dK0 - 4 w2 u0 du0)/K gives theta_K and theta_u; then dc = c^3 w2 theta dtheta, dg = eta_h c^3 dtheta.
        theta_K = -theta / K
        theta_u = (4 * w2 * u0 * theta - 2 * K) / (K * (K0 + K))
        c3 = c**3
        return Turn(
            c,
            c * self.eta_h * theta,
            c3 * w2 * theta * theta_K,
            c3 * self.eta_h * theta_K,
            c3 * w2 * theta * theta_u,
            c3 * self.eta_h * theta_u,
        )

    @cached_property
    def start_odds(self) -> list[Ball]:
        """D_z at the start."""
        return [a - self.u0 / 2 for a in self.A]

    def odds(self, u: Ball) -> list[Ball]:
        """D_z of every other token where the margin is u."""
        t, half = self.turn(u), u / 2
        return [t.c * a + t.g * b - half for a, b in zip(self.A, self.B, strict=True)]

    def widened(self, eps: float, lengths: "Lengths") -> "Start":
        """Balls for every start whose entries of W and h differ from this one's by at most eps.

        Then |delta a_j| <= 2 eps and |delta (W_z - s/2)_j| <= 2 eps, which bounds every inner product.
        """
        arb = load_flint().arb
        e, d = arb(eps), lengths.d
        ball = lambda x, r: x + arb(0, arb(r).upper())  # noqa: E731
        h, a = arb(lengths.h), arb(lengths.a)
        in_A, in_B = 2 * e * h + 2 * d * e**2, 2 * e * a + 4 * d * e**2
        return replace(
            self,
            H2=ball(self.H2, 2 * e * h + d * e**2),
            A2=ball(self.A2, 4 * e * a + 4 * d * e**2),
            u0=ball(self.u0, e * a + 2 * e * h + 2 * d * e**2),
            A=[ball(x, e * n + in_A) for x, n in zip(self.A, lengths.rows.tolist(), strict=True)],
            B=[ball(x, 2 * e * n + in_B) for x, n in zip(self.B, lengths.rows.tolist(), strict=True)],
        )


def _products(flint: Any, W: FloatArray, rows: NDArray[np.intp], vectors: Any) -> Any:
    """Blocks of [<W_z, h>, <W_z, a>, ...] as balls, for z in `rows`."""
    size = max(1, _BLOCK // W.shape[1])
    for i in range(0, len(rows), size):
        block = W[rows[i : i + size]].astype(np.float64).tolist()
        yield (flint.arb_mat(block) * vectors).entries()


def odds_against(u: Ball, odds: list[Ball]) -> Ball:
    """S = e^-u + sum_z e^D_z = 1/pi(+) - 1."""
    return (-u).exp() + sum((D.exp() for D in odds), 0 * u)


def log_change(S0: Ball, S1: Ball) -> Ball:
    """ln pi(+) with odds S1 minus ln pi(+) with odds S0; keeps the sign where both are tiny or huge."""
    return -((S1 - S0) / (1 + S0)).log1p() if S1 > S0 else ((S0 - S1) / (1 + S1)).log1p()


@dataclass(frozen=True)
class Lengths:
    """Upper bounds on the L1 norms |h|, |a| and |W_z - s/2| (V - 2,); slack bounds the rounding of s/2 and of W_z - s/2
    in float64; d is the dimension."""

    d: int
    h: float
    a: float
    rows: NDArray[np.float64]
    slack: float

    @classmethod
    def of(cls, model: UnconstrainedFeatures, others: NDArray[np.intp]) -> "Lengths":
        plus, minus = model.single_pair
        up, down = model.W[plus].astype(np.float64), model.W[minus].astype(np.float64)
        more = 1 + (model.d + 8) * 2.0**-52  # sums of d terms >= 0, each rounded at most three times
        norm = lambda x: float(np.abs(x).sum()) * more  # noqa: E731
        slack = 2.0**-51 * (norm(up) + norm(down))
        rows = np.empty(len(others))
        size = max(1, _BLOCK // model.d)
        for i in range(0, len(others), size):
            block = model.W[others[i : i + size]].astype(np.float64)
            rows[i : i + size] = np.abs(block - (up + down) / 2).sum(1) * more + slack
        return cls(model.d, norm(model.h.astype(np.float64)), norm(up - down), rows, slack)
