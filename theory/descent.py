"""Discrete training of a single-token pair, exactly (exact_solution E6).

Gradient descent keeps h and a = W_+ - W_- in the span of their starts, so two scalars per mode replace all parameters,
and four with momentum: `h = C h0 + k S a0`, `a = C a0 + 2 eta_W S h0`. Sign descent moves every coordinate by itself.
"""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import log_softmax

from theory._check import POSITIVE, Interval, SolverError, check_count, check_number
from theory.exact import margin_form
from theory.losses import Loss, MarginForm
from theory.model import UnconstrainedFeatures, inner_products
from theory.path import RATE, feature_modes

Array = NDArray[np.float64]
Method = Literal["gradient", "heavy_ball", "nesterov", "sign"]


@dataclass(frozen=True, eq=False)
class ExactDescent:
    """`steps` updates of a discrete optimiser on one single-token pair, without the parameters.

    Parameters
    ----------
    model, loss : as in `ExactFlow`.
    step : learning rate; W moves with step * lr_unembedding, h with step * lr_hidden.
    steps : number of updates.
    method : "gradient", "heavy_ball", "nesterov" (torch's conventions: the buffer starts as the first gradient, no
        dampening) or "sign".
    momentum : for heavy_ball and nesterov, in [0, 1).
    lr_unembedding, lr_hidden : rates per group; lr_hidden may be a feature kernel except for "sign".

    Raises
    ------
    ValueError : unknown method, bad step, momentum without a method that uses it.
    SolverError : the iteration diverges beyond float range.
    """

    model: UnconstrainedFeatures
    loss: Loss
    step: float
    steps: int
    method: Method = "gradient"
    momentum: float = 0.0
    lr_unembedding: float = 1.0
    lr_hidden: Any = 1.0
    form: MarginForm = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.method not in ("gradient", "heavy_ball", "nesterov", "sign"):
            raise ValueError(f"method must be gradient, heavy_ball, nesterov or sign, got {self.method!r}")
        check_number(self.step, "step", POSITIVE)
        check_count(self.steps, "steps", low=0)
        check_number(self.momentum, "momentum", Interval(0.0, 1.0, open_low=False))
        check_number(self.lr_unembedding, "lr_unembedding", RATE)
        if self.momentum and self.method not in ("heavy_ball", "nesterov"):
            raise ValueError(
                f"momentum is for heavy_ball and nesterov, got momentum={self.momentum} with {self.method}"
            )
        if self.method == "sign" and np.ndim(self.lr_hidden):
            raise ValueError("lr_hidden must be a number for method 'sign': the sign is taken per coordinate")
        _ = self.model.single_pair
        object.__setattr__(self, "form", margin_form(self.model, self.loss))

    @cached_property
    def _start(self) -> tuple[Array, Array, Array]:
        """Kernel eigenvalues (m,) and the components (m, d) of h0 and a0."""
        k, projectors = feature_modes(self.lr_hidden, self.model.d)
        plus, minus = self.model.single_pair
        h = self.model.h.astype(np.float64)
        a = self.model.W[plus].astype(np.float64) - self.model.W[minus].astype(np.float64)
        if projectors is None:
            return k, h[None], a[None]
        return k, projectors @ h, projectors @ a

    @cached_property
    @np.errstate(over="ignore", invalid="ignore")  # divergence is looked for after each step
    def _states(self) -> tuple[Array, Array]:
        """C and S (steps + 1, m): h = sum C h0 + k S a0, a = sum C a0 + 2 eta_W S h0 over modes."""
        k, h0, a0 = self._start
        w2 = 2 * self.lr_unembedding * k
        u0, K0 = (h0 * a0).sum(-1), 2 * self.lr_unembedding * (h0**2).sum(-1) + k * (a0**2).sum(-1)
        C, S = np.ones_like(k), np.zeros_like(k)
        v_C, v_S = np.zeros_like(k), np.zeros_like(k)  # velocity: v_h = v_C a0 + 2 eta_W v_S h0 and likewise for a
        out = np.empty((2, self.steps + 1, len(k)))
        out[:, 0] = C, S
        lookahead = self.momentum if self.method == "nesterov" else 0.0
        u = float(u0.sum())
        for i in range(1, self.steps + 1):
            G = float(self.form.slope(u))
            v_C, v_S = self.momentum * v_C + G * C, self.momentum * v_S + G * S
            if lookahead:
                push_C, push_S = G * C + lookahead * v_C, G * S + lookahead * v_S
            else:
                push_C, push_S = v_C, v_S
            C, S = C + self.step * w2 * push_S, S + self.step * push_C
            u = float(((C**2 + w2 * S**2) * u0 + C * S * K0).sum())
            if not (np.isfinite(C).all() and np.isfinite(S).all() and np.isfinite(u)):
                raise SolverError(
                    f"{self.method} diverges: parameters leave float range at step {i} (step={self.step:g})"
                )
            out[:, i] = C, S
        return out[0], out[1]

    @cached_property
    def _vectors(self) -> tuple[Array, Array]:
        """h and a after every step, (steps + 1, d) each."""
        if self.method == "sign":
            return self._sign_vectors()
        k, h0, a0 = self._start
        C, S = self._states
        return C @ h0 + (k * S) @ a0, C @ a0 + (2 * self.lr_unembedding * S) @ h0

    def _sign_vectors(self) -> tuple[Array, Array]:
        _, h0, a0 = self._start
        rate_a, rate_h = 2 * self.step * self.lr_unembedding, self.step * float(self.lr_hidden)
        n = np.arange(self.steps + 1)[:, None]
        h, a = sign_positions(h0[0], a0[0], rate_h, rate_a, n)
        G = self.form.sign((h * a).sum(-1))
        if (G[:-1] > 0).all():
            return h, a
        # The slope vanishes or changes sign on the way (a finite minimiser): then steps depend on it, one by one.
        h, a = np.repeat(h[:1], self.steps + 1, axis=0), np.repeat(a[:1], self.steps + 1, axis=0)
        for i in range(self.steps):
            g = float(self.form.sign(float(h[i] @ a[i])))
            h[i + 1], a[i + 1] = h[i] + rate_h * g * np.sign(a[i]), a[i] + rate_a * g * np.sign(h[i])
        return h, a

    def margin(self) -> Array:
        """(steps + 1,) margin after every step, the start included."""
        h, a = self._vectors
        return np.einsum("td,td->t", h, a)

    def log_probs(self, at: ArrayLike | None = None) -> Array:
        """(T, V) ln pi of every token after the given steps (default: all steps + 1 of them)."""
        at = np.arange(self.steps + 1) if at is None else np.atleast_1d(np.asarray(at))
        if at.dtype.kind not in "iu" or at.size == 0 or at.min() < 0 or at.max() > self.steps:
            raise ValueError(f"at must hold step numbers in [0, {self.steps}], got {at!r}")
        h, a = (x[at] for x in self._vectors)
        plus, minus = self.model.single_pair
        logits = inner_products(self.model.W, h.T).T
        total, u = logits[:, plus] + logits[:, minus], np.einsum("td,td->t", h, a)
        logits[:, plus], logits[:, minus] = (total + u) / 2, (total - u) / 2
        return log_softmax(logits, axis=-1)


def sign_positions(h0: Array, a0: Array, rate_h: float, rate_a: float, n: NDArray[np.int_]) -> tuple[Array, Array]:
    """h and a (len(n), d) after n sign steps of a decreasing loss, coordinate by coordinate, in closed form.

    h += rate_h sgn(a), a += rate_a sgn(h), both at once, with sgn(0) = 0. Where the signs agree both run away; where
    they differ both approach 0, and the first to cross (or to land on 0) decides; if both cross in the same step they
    swap sides for ever.
    """
    s_h, s_a = np.sign(h0), np.sign(a0)
    with np.errstate(divide="ignore", invalid="ignore"):
        # Steps until |h| (|a|) is spent, while the other sign opposes it.
        spent_h = np.where((s_h * s_a < 0) & (rate_h > 0), np.abs(h0) / rate_h, np.inf)
        spent_a = np.where((s_h * s_a < 0) & (rate_a > 0), np.abs(a0) / rate_a, np.inf)
    turn = np.minimum(np.ceil(spent_h), np.ceil(spent_a))  # both still move with their first signs up to here
    turn = np.where(s_h * s_a == 0, 0.0, turn)
    first = np.minimum(n, turn)
    h, a = h0 + rate_h * s_a * first, a0 + rate_a * s_h * first
    # A zero coordinate starts to move one step after the other did: step it once, then treat it like the rest.
    rest = n - first
    g_h, g_a = np.sign(h), np.sign(a)
    one = np.where(g_h * g_a == 0, np.minimum(rest, 1), 0)
    h, a, rest = h + rate_h * g_a * one, a + rate_a * g_h * one, rest - one
    g_h, g_a = np.sign(h), np.sign(a)
    opposed = g_h * g_a < 0
    odd = np.where(opposed, rest % 2, rest)  # opposed again: there and back with period two
    return h + rate_h * g_a * odd, a + rate_a * g_h * odd
