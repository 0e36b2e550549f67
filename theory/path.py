"""The path: log-probabilities of every token as functions of loss-time, whatever the loss (exact_solution E2, E8).

Along the path every logit is a sum over modes of two scalar functions of loss-time times two inner products, so a model
of any dimension reduces to (V, m) numbers twice; only y+ and y- need the margin as well, since their own rows move:

    logit_z = <W_z, h(tau)>  (z != y+, y-),      logit_{y+,y-} = (<W_+ + W_-, h(tau)> +- u(tau)) / 2.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from theory._check import FloatArray, check_number
from theory.losses import Interval
from theory.model import inner_products
from theory.motion import Motion

Array = NDArray[np.float64]

RATE = Interval(low=0.0, open_low=False)
_IN_CACHE = 1 << 16  # numbers (512 KiB) that stay in the fast cache of a core from one operation to the next


def feature_modes(lr_hidden: float | ArrayLike, d: int) -> tuple[Array, Array | None]:
    """Eigenvalues (m,) of the feature kernel, distinct, and the (m, d, d) projectors on their eigenspaces.

    A number eta_h means eta_h times the identity: one mode, no projector. A matrix must be (d, d), symmetric and
    positive semidefinite.
    """
    if np.ndim(lr_hidden) == 0:
        return np.array([check_number(lr_hidden, "lr_hidden", RATE)]), None
    kernel = np.asarray(lr_hidden, dtype=np.float64)
    if kernel.shape != (d, d):
        raise ValueError(f"lr_hidden must be a number or have shape ({d}, {d}), got shape {kernel.shape}")
    if not np.isfinite(kernel).all():
        raise ValueError("lr_hidden must be finite, got NaN or inf in the matrix")
    size = float(np.abs(kernel).max())
    if not np.allclose(kernel, kernel.T, rtol=0, atol=1e-12 * size):
        raise ValueError(f"lr_hidden must be symmetric, largest asymmetry is {np.abs(kernel - kernel.T).max():g}")
    values, vectors = np.linalg.eigh((kernel + kernel.T) / 2)
    if values[0] < -1e-10 * size:
        raise ValueError(f"lr_hidden must be positive semidefinite, smallest eigenvalue is {values[0]:g}")
    values = np.where(values < 1e-14 * d * max(size, 1e-300), 0.0, values)
    # Equal eigenvalues share one mode; a multiple of the identity is the scalar case again.
    new = np.concatenate([[True], np.diff(values) > 1e-13 * values[-1]])
    groups = np.split(np.arange(d), np.nonzero(new)[0][1:])
    projectors = np.stack([vectors[:, g] @ vectors[:, g].T for g in groups])
    return np.array([values[g].mean() for g in groups]), projectors


def log_softmax_(logits: Array, out: Array, scratch: Array) -> None:
    """ln softmax over the last axis into `out`; overwrites `logits` and as many numbers of `scratch`."""
    best = logits.argmax(axis=-1, keepdims=True)  # several times faster than max over a short axis
    top = np.take_along_axis(logits, best, axis=-1)
    logits -= np.where(np.isfinite(top), top, 0.0)
    work = np.exp(logits, out=scratch[: logits.size].reshape(logits.shape))
    with np.errstate(divide="ignore"):
        np.subtract(logits, np.log(work @ np.ones(work.shape[-1]))[..., None], out=out)


@dataclass(frozen=True)
class Path:
    """Paths of a batch of B single-token pairs over V tokens with m modes."""

    motion: Motion
    first: Array  # (B, V, m) inner products with h0 (or p0 in the light-cone basis)
    second: Array  # (B, V, m) inner products with a0 (or q0)
    plus: NDArray[np.intp]  # (B,) y+
    minus: NDArray[np.intp]  # (B,) y-
    h0: Array  # (B, m, d)
    a0: Array  # (B, m, d)

    @classmethod
    def build(
        cls,
        W: FloatArray,
        h: FloatArray,
        plus: ArrayLike,
        minus: ArrayLike,
        lr_unembedding: float = 1.0,
        lr_hidden: float | ArrayLike = 1.0,
    ) -> "Path":
        """From W (B, V, d), h (B, d), plus and minus (B,)."""
        eta_W = check_number(lr_unembedding, "lr_unembedding", RATE)
        B, _, d = W.shape
        k, projectors = feature_modes(lr_hidden, d)
        plus, minus = np.asarray(plus), np.asarray(minus)
        rows = np.arange(B)
        h = h.astype(np.float64)
        a = W[rows, plus].astype(np.float64) - W[rows, minus].astype(np.float64)
        if projectors is None:
            h0, a0 = h[:, None], a[:, None]
        else:
            h0, a0 = (np.einsum("mij,bj->bmi", projectors, v) for v in (h, a))
        with np.errstate(over="ignore", invalid="ignore"):
            motion = Motion.of_vectors(eta_W, np.broadcast_to(k, (B, len(k))), h0, a0)
        if not (np.isfinite(motion.P).all() and np.isfinite(motion.Q).all() and np.isfinite(motion.u0).all()):
            raise ValueError("W, h and the rates must keep |h|^2, |a|^2 and <a, h> in float range, got an overflow")
        lc = motion.light_cone[..., None]
        hs, as_ = np.sqrt(2 * eta_W) * h0, np.sqrt(k)[:, None] * a0
        basis = np.where(lc, hs + as_, h0), np.where(lc, hs - as_, a0)
        m = len(k)
        if B == 1:
            products = inner_products(W[0], np.concatenate([basis[0][0], basis[1][0]]).T)[None]
        else:
            products = W.astype(np.float64, copy=False) @ np.concatenate(basis, axis=1).transpose(0, 2, 1)
        return cls(motion, products[..., :m], products[..., m:], plus, minus, h0, a0)

    @property
    def V(self) -> int:
        return self.first.shape[1]

    def _coefficients(self, tau: Array, order: int = 0) -> tuple[Array, Array]:
        """(B, m, T) weights of `first` and `second` in the logits, or their derivative of the given order."""
        motion = self.motion
        w, k = motion.omega[..., None], motion.k[..., None]
        y = np.where(w == 0, 0.0, w * tau[:, None, :])
        with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
            S = np.where(w == 0, tau[:, None, :], np.sinh(y) / np.where(w == 0, 1.0, w))
            C = np.cosh(y)
            if order == 1:
                C, S = w**2 * S, C
            elif order == 2:
                C, S = w**2 * C, w**2 * S
            scale = np.sqrt(8 * motion.eta_W) if motion.eta_W > 0 else 1.0
            x = w**order * np.exp(y) / scale, (-w) ** order * np.exp(-y) / scale
            # A direction that is exactly absent stays absent, however far its factor grows.
            up = np.where(motion.P[..., None] == 0, 0.0, x[0])
            down = np.where(motion.Q[..., None] == 0, 0.0, x[1])
        lc = motion.light_cone[..., None]
        empty = (motion.K0[..., None] == 0) & (w > 0)  # nothing there to grow
        with np.errstate(over="ignore", invalid="ignore"):
            return np.where(empty, 0.0, np.where(lc, up, C)), np.where(empty, 0.0, np.where(lc, down, k * S))

    def float_range(self, ahead: Array) -> Array:
        """(B,) loss-time, counted in the direction `ahead` (B,), up to which squares of logits stay in float range."""
        motion = self.motion
        outward = np.where(ahead[:, None] > 0, motion.P, motion.Q)
        grows = (outward > 0) & (motion.omega > 0)
        w, size = np.where(grows, motion.omega, 1.0), np.where(grows, outward, 1.0)
        return np.where(grows, (300 - np.log(size / w)) / (2 * w), 1e300).min(axis=1)

    def logits(self, tau: Array, order: int = 0) -> Array:
        """(B, T, V) logits at loss-times tau (B, T), or their derivative of order 1 or 2 in tau."""
        first, second = self._coefficients(tau, order)
        weights = np.concatenate([first, second], axis=1).transpose(0, 2, 1)  # (B, T, 2m)
        products = np.concatenate([self.first, self.second], axis=2).transpose(0, 2, 1)  # (B, 2m, V)
        with np.errstate(over="ignore", invalid="ignore"):
            out = weights @ products
        motion = self.motion
        if order == 0:
            along = motion.margin(tau)
        elif order == 1:
            along = motion.speed(tau)
        else:  # d^2 u / d tau^2 = sum of 4 w^2 u over modes
            along = _sum_of_modes(motion, tau)
        rows = np.arange(len(out))
        total = out[rows, :, self.plus] + out[rows, :, self.minus]
        out[rows, :, self.plus] = (total + along) / 2
        out[rows, :, self.minus] = (total - along) / 2
        return out

    def take(self, rows: slice) -> "Path":
        """The given rows of the batch, as views."""
        vectors = self.first[rows], self.second[rows], self.plus[rows], self.minus[rows]
        return Path(self.motion.take(rows), *vectors, self.h0[rows], self.a0[rows])

    def log_probs(self, tau: Array) -> Array:
        """(B, T, V) ln pi of every token."""
        B, T = tau.shape
        out = np.empty((B, T, self.V))
        scratch = np.empty(max(_IN_CACHE, self.V))
        # Blocks that stay in cache from the logits to the last subtraction: the sweep is bound by memory otherwise.
        pairs, points = max(1, _IN_CACHE // (T * self.V)), max(1, min(T, _IN_CACHE // self.V))
        for i in range(0, B, pairs):
            part = self.take(slice(i, i + pairs)) if pairs < B else self
            for j in range(0, T, points):
                block = out[i : i + pairs, j : j + points]
                log_softmax_(part.logits(tau[i : i + pairs, j : j + points]), block, scratch)
        return out

    def pair_log_probs(self, tau: Array) -> Array:
        """(T, 2) ln pi of y+ and y- of the first pair at loss-times tau (T,), without the (T, V) table.

        From log-odds against y+ (exact_solution E4), a block of tokens at a time: ln pi(+) = -ln(1 + e^-u + sum e^D_z).
        """
        plus, minus = int(self.plus[0]), int(self.minus[0])
        weights = np.concatenate([w[0] for w in self._coefficients(tau[None])])  # (2m, T)
        m = len(weights) // 2
        first, second = self.first[0], self.second[0]
        shared = first[[plus, minus]].sum(0) @ weights[:m] + second[[plus, minus]].sum(0) @ weights[m:]
        u = self.motion.margin(tau[None])[0]
        weights = np.concatenate([weights, -(shared + u)[None] / 2])  # the last row takes the logit of y+ away
        size = max(1, min(self.V, _IN_CACHE // len(tau)))
        products, odds = np.ones((size, 2 * m + 1)), np.empty((size, len(tau)))
        others = np.zeros(len(tau))
        with np.errstate(over="ignore", invalid="ignore"):
            for i in range(0, self.V, size):
                n = min(size, self.V - i)
                products[:n, :m], products[:n, m:-1] = first[i : i + n], second[i : i + n]
                block = np.matmul(products[:n], weights, out=odds[:n])
                block[[z - i for z in (plus, minus) if i <= z < i + n]] = -np.inf
                others += np.exp(block, out=block).sum(axis=0)
            log_plus = -np.logaddexp(np.logaddexp(0.0, -u), np.log(others))
        out = np.stack([log_plus, log_plus - u], axis=1)
        for t in np.nonzero(~np.isfinite(others))[0]:  # beyond e^709: by the slower way, which shifts first
            out[t] = self.log_probs(tau[None, [t]])[0, 0, [plus, minus]]
        return out

    def preferred(self, tau: Array, order: int = 0, chunk: int = 1 << 21) -> tuple[Array, ...]:
        """ln pi(y+) (T,) along the first pair's path and its derivatives in tau up to `order`, in bounded memory."""
        parts = []
        size = max(1, chunk // self.V)
        for i in range(0, len(tau), size):
            parts.append(self._preferred(tau[None, i : i + size], order))
        return tuple(np.concatenate(column) for column in zip(*parts, strict=True))

    def _preferred(self, tau: Array, order: int) -> tuple[Array, ...]:
        log_p = self.log_probs(tau)[0]  # (T, V)
        y = int(self.plus[0])
        if order == 0:
            return (log_p[:, y],)
        p = np.exp(log_p)
        # Against y+, not against the mean: then nothing cancels as pi(y+) -> 1.
        L1 = self.logits(tau, 1)[0]
        L1 -= L1[:, [y]]
        mean = np.einsum("tv,tv->t", p, L1)
        if order == 1:
            return log_p[:, y], -mean
        L2 = self.logits(tau, 2)[0]
        L2 -= L2[:, [y]]
        return log_p[:, y], -mean, mean**2 - np.einsum("tv,tv->t", p, L2 + L1**2)

    def vectors(self, tau: float) -> tuple[Array, Array]:
        """(h, a), each (d,), of the first pair at loss-time tau."""
        w, k = self.motion.omega[0], self.motion.k[0]
        y = w * tau if np.isfinite(tau) else np.where(w == 0, 0.0, np.inf)
        C, S = np.cosh(y), np.where(w == 0, tau, np.sinh(y) / np.where(w == 0, 1.0, w))
        h = (C[:, None] * self.h0[0] + (k * S)[:, None] * self.a0[0]).sum(0)
        a = (C[:, None] * self.a0[0] + (2 * self.motion.eta_W * S)[:, None] * self.h0[0]).sum(0)
        return h, a


def _sum_of_modes(motion: Motion, tau: Array) -> Array:
    """(B, T) d^2 u / d tau^2 = sum over modes of 4 w^2 u_mode."""
    single: list[Any] = []
    for g in range(motion.k.shape[1]):
        one = Motion(motion.eta_W, *(f[:, g : g + 1] for f in (motion.k, motion.P, motion.Q, motion.u0, motion.K0)))
        single.append(4 * one.omega**2 * one.margin(tau))
    return np.sum(single, axis=0)
