"""The motion of the margin: everything that moves in the single-token model, as scalars (exact_solution E1, E2, E8).

In the loss's own time tau (d tau = G dt) the flow of a single-token pair is linear and does not depend on the loss.
With `a = W_+ - W_-` and a feature kernel Kf (`eta_h I` for unconstrained features), every eigenvalue k of Kf is a mode:

    h(tau) = h0 cosh(w tau) + k a0 sinh(w tau)/w,   a(tau) = a0 cosh(w tau) + 2 eta_W h0 sinh(w tau)/w,
    w = sqrt(2 eta_W k),    u = <a, h> = (P e^{2 w tau} - Q e^{-2 w tau}) / (4 w),    du/dtau = K,

where P, Q = |sqrt(2 eta_W) h0 +- sqrt(k) a0|^2. With w = 0 (one group frozen) sinh(w tau)/w is tau. Several modes add.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from theory._check import SolverError

Array = NDArray[np.float64]

_SMALL = 1.0  # |2 w tau| below which the cosh/sinh form keeps more digits than the light-cone form
_LIGHT_CONE = 1e-2  # P or Q below this share of K0: the basis (p, q) keeps more digits than (h, a)


@dataclass(frozen=True)
class Motion:
    """A batch of B single-token pairs, each with m modes. All fields (B, m) except `eta_W` (scalar)."""

    eta_W: float
    k: Array  # eigenvalues of the feature kernel
    P: Array
    Q: Array
    u0: Array  # <a0, h0> within each mode
    K0: Array  # du/dtau at tau = 0

    @classmethod
    def of_vectors(cls, eta_W: float, k: Array, h0: Array, a0: Array) -> "Motion":
        """From h0, a0 (B, m, d): the components of h and a in each mode's eigenspace."""
        hs, as_ = np.sqrt(2 * eta_W) * h0, np.sqrt(k)[..., None] * a0
        # As squared norms: K0 +- 2 w u0 would cancel where p or q is small.
        P, Q = ((hs + as_) ** 2).sum(-1), ((hs - as_) ** 2).sum(-1)
        K0 = (hs**2).sum(-1) + (as_**2).sum(-1)
        return cls(eta_W, k, P, Q, (h0 * a0).sum(-1), K0)

    @property
    def omega(self) -> Array:
        """(B, m) growth rates w = sqrt(2 eta_W k)."""
        return np.sqrt(2 * self.eta_W * self.k)

    @property
    def start(self) -> Array:
        """(B,) margin at tau = 0."""
        return self.u0.sum(-1)

    @property
    def light_cone(self) -> NDArray[np.bool_]:
        """(B, m) whether h and a nearly align, so that (p, q) is the better basis."""
        return (np.minimum(self.P, self.Q) < _LIGHT_CONE * self.K0) & (self.omega > 0)

    @property
    def frozen(self) -> Array:
        """(B,) whether du/dtau is constant (W or h does not move)."""
        return (self.omega == 0).all(-1)

    def take(self, rows: Any) -> "Motion":
        """The given rows of the batch."""
        return Motion(self.eta_W, self.k[rows], self.P[rows], self.Q[rows], self.u0[rows], self.K0[rows])

    def _grown(self, tau: Array) -> tuple[Array, Array, Array, Array]:
        """y = 2 w |tau| (B, m, T), e^y - 1, and the invariants (P, Q) as (growing, decaying) for the sign of tau."""
        with np.errstate(invalid="ignore", over="ignore"):
            y = 2 * self.omega[..., None] * np.abs(tau)[:, None, :]
            if not self.omega.all():
                y = np.where(self.omega[..., None] == 0, 0.0, y)  # 0 * inf
            P, Q = self.P[..., None], self.Q[..., None]
            back = (tau < 0)[:, None, :]
            grows, decays = (np.where(back, Q, P), np.where(back, P, Q)) if back.any() else (P, Q)
            return y, np.expm1(y), grows, decays

    def margin(self, tau: Array) -> Array:
        """(B, T) margin u at loss-times tau (B, T)."""
        y, growth, grows, decays = self._grown(tau)
        x = growth + 1
        w4 = 4 * np.where(self.omega == 0, 1.0, self.omega)[..., None]
        small = y < _SMALL
        with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
            decays = decays / x
            # u - u0 as a sum of terms of one sign: nothing cancels near the start.
            near = np.where(y == 0, 1.0, growth / y) * tau[:, None, :] * (grows + decays) / 2 + self.u0[..., None]
            if small.all():
                return near.sum(1)
            # A direction that is exactly absent stays absent, however far its factor grows.
            far = np.sign(tau)[:, None, :] * (np.where(grows == 0, 0.0, grows * x) - decays) / w4
            return np.where(small, near, far).sum(1)

    def speed(self, tau: Array) -> Array:
        """(B, T) du/dtau = K, never negative."""
        _, growth, grows, decays = self._grown(tau)
        x = growth + 1
        with np.errstate(over="ignore", invalid="ignore"):
            return ((np.where(grows == 0, 0.0, grows * x) + decays / x) / 2).sum(1)

    def reach(self, direction: Array) -> Array:
        """(B,) margin approached as tau goes to +inf or -inf (the sign of `direction`); the start if nothing moves."""
        outward = np.where(direction[:, None] > 0, self.P, self.Q)
        unbounded = ((self.omega > 0) & (outward > 0) | (self.omega == 0) & (self.K0 > 0)).any(-1)
        settled = np.where(self.omega > 0, 0.0, self.u0).sum(-1)
        return np.where(unbounded, np.copysign(np.inf, direction), settled)

    def tau_at_margin(self, u: Array) -> Array:
        """(B, T) loss-time at which the margin is u (B, T); +-inf where it is only approached."""
        return self._tau_closed(u) if self.k.shape[1] == 1 else self._tau_newton(u)

    def _tau_closed(self, u: Array) -> Array:
        w, u0, K0, P, Q = self.omega, self.u0, self.K0, self.P, self.Q  # (B, 1) each
        K = np.hypot(np.sqrt(P) * np.sqrt(Q), 2 * w * u)
        K = np.where(w == 0, K0, K)
        with np.errstate(divide="ignore", invalid="ignore"):
            theta = np.where(K0 + K > 0, 2 * (u - u0) / (K0 + K), 0.0)
            t = w * theta  # tanh(w tau)
            near = np.abs(t) < 0.5
            ts = np.where(near, t, 0.0)
            small = theta * np.where(ts == 0, 1.0, np.arctanh(ts) / np.where(ts == 0, 1.0, ts))
            outward = (u > 0) | (u == 0) & (P > 0)  # with P = 0 the margin 0 is approached from below
            grown = np.where(outward, (K + 2 * w * u) / P, Q / (K - 2 * w * u))  # e^(2 w tau)
            return np.where(near, small, np.log(grown) / (2 * np.where(w == 0, 1.0, w)))

    def _tau_newton(self, u: Array, steps: int = 200) -> Array:
        """Bracketed Newton on the monotone u(tau); brackets grow geometrically from the natural time 1/K."""
        lo, hi = np.zeros_like(u), np.zeros_like(u)
        unit = 1 / (np.abs(self.start)[:, None] + self.K0.sum(-1)[:, None] + 2 * self.omega.max(-1)[:, None] + 1e-300)
        sign = np.sign(u - self.start[:, None])
        reach = unit * sign
        for _ in range(steps):
            here = self.margin(reach)
            short = sign * (u - here) > 0
            if not short.any():
                break
            lo = np.where(short, reach, lo)
            reach = np.where(short, 2 * reach, reach)
        hi = reach
        end = np.where(sign > 0, self.reach(sign[:, 0] * 0 + 1)[:, None], self.reach(sign[:, 0] * 0 - 1)[:, None])
        tau, done = np.where(sign == 0, 0.0, (lo + hi) / 2), sign == 0
        for _ in range(steps):
            miss = u - self.margin(tau)
            lo = np.where(sign * miss > 0, tau, lo)
            hi = np.where(sign * miss < 0, tau, hi)
            with np.errstate(divide="ignore", invalid="ignore"):
                step = tau + miss / self.speed(tau)
            inside = (np.minimum(lo, hi) < step) & (step < np.maximum(lo, hi))
            new = np.where(inside, step, (lo + hi) / 2)
            done = (np.abs(new - tau) <= 4e-16 * np.abs(tau)) | (miss == 0) | (sign == 0)
            tau = np.where(done, tau, new)
            if done.all():
                return np.where(u == end, np.copysign(np.inf, sign), tau)
        raise SolverError(f"no loss-time found for margin {u[~done][0]!r} in {steps} steps")
