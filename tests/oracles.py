"""Second routes for the tests: formulas retyped from the papers and plain loops over the parameters.

Nothing here imports `theory`. A loss instance is only read for its parameters (beta, tau, ...).
"""

import importlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mpmath
import numpy as np
import pytest
from mpmath import mpf
from scipy.integrate import solve_ivp

# ---- losses, retyped from the papers; `y` holds mpmath numbers a, b, a_ref, b_ref (log-probabilities)


def _margin(y: Any) -> Any:
    return (y.a - y.b) - (y.a_ref - y.b_ref)


def _sigma(z: Any) -> Any:
    return 1 / (1 + mpmath.exp(-z))


PAPER: dict[str, Callable[[Any, Any], Any]] = {
    # Rafailov et al. 2023, eq. 7
    "dpo": lambda p, y: -mpmath.log(_sigma(p.beta * (y.a - y.a_ref) - p.beta * (y.b - y.b_ref))),
    # Mitchell 2023, eq. 3
    "cdpo": lambda p, y: (
        -(1 - p.eps) * mpmath.log(_sigma(p.beta * _margin(y))) - p.eps * mpmath.log(_sigma(-p.beta * _margin(y)))
    ),
    # Azar et al. 2023, eq. 17
    "ipo": lambda p, y: (_margin(y) - 1 / (2 * p.tau)) ** 2,
    # Zhao et al. 2023 as in Razin et al. 2024, App. B: no reference model
    "slic": lambda p, y: max(mpf(0), p.delta - (y.a - y.b)),
    # Gao et al. 2024, eq. 1
    "rebel": lambda p, y: (_margin(y) / p.eta - p.reward_gap) ** 2,
    # Tang et al. 2024, table 1: f(beta m)
    "gpo_logistic": lambda p, y: mpmath.log(1 + mpmath.exp(-p.beta * _margin(y))),
    "gpo_exponential": lambda p, y: mpmath.exp(-p.beta * _margin(y)),
    "gpo_squared": lambda p, y: (p.beta * _margin(y) - 1) ** 2,
    "gpo_hinge": lambda p, y: max(mpf(0), 1 - p.beta * _margin(y)),
    "gpo_truncated_quadratic": lambda p, y: max(mpf(0), 1 - p.beta * _margin(y)) ** 2,
    "gpo_savage": lambda p, y: 1 / (1 + mpmath.exp(p.beta * _margin(y))) ** 2,
}


def _expit(z: float) -> float:
    return 1 / (1 + math.exp(-z)) if z >= 0 else math.exp(z) / (1 + math.exp(z))


# G(u) = -l'(u), differentiated by hand; (loss, u, u_ref) -> float. Kinks: the slope to the right.
SLOPE: dict[str, Callable[[Any, float, float], float]] = {
    "dpo": lambda p, u, r: p.beta * _expit(p.beta * (r - u)),
    "cdpo": lambda p, u, r: p.beta * ((1 - p.eps) * _expit(-p.beta * (u - r)) - p.eps * _expit(p.beta * (u - r))),
    "ipo": lambda p, u, r: 1 / p.tau - 2 * (u - r),
    "slic": lambda p, u, r: 1.0 if u < p.delta else 0.0,
    "rebel": lambda p, u, r: -2 * ((u - r) / p.eta - p.reward_gap) / p.eta,
    "gpo_logistic": lambda p, u, r: p.beta / (1 + math.exp(p.beta * (u - r))),
    "gpo_exponential": lambda p, u, r: p.beta * math.exp(-p.beta * (u - r)),
    "gpo_squared": lambda p, u, r: 2 * p.beta - 2 * p.beta**2 * (u - r),
    "gpo_hinge": lambda p, u, r: p.beta if p.beta * (u - r) < 1 else 0.0,
    "gpo_truncated_quadratic": lambda p, u, r: 2 * p.beta * max(0.0, 1 - p.beta * (u - r)),
    "gpo_savage": lambda p, u, r: 2 * p.beta * math.exp(p.beta * (u - r)) / (1 + math.exp(p.beta * (u - r))) ** 3,
}


for _file in sorted(Path(__file__).parent.glob("retyped_*.py")):  # further tables of the same two kinds, by source
    _module = importlib.import_module(_file.stem)
    PAPER |= _module.PAPER
    SLOPE |= getattr(_module, "SLOPE", {})


def _retyped(table: dict[str, Any], name: str) -> Any:
    if name not in table:
        pytest.skip(f"{name} is not retyped from its paper: add it to a table in tests/retyped_*.py")
    return table[name]


def value_of(loss: Any, y: Any) -> Any:
    """The loss of a pair of mpmath numbers, as its paper prints it."""
    return _retyped(PAPER, loss.name)(loss, y)


def slope_of(loss: Any, u_ref: float) -> Callable[[float], float]:
    """G as a function of the margin, from the hand-derived table."""
    slope = _retyped(SLOPE, loss.name)
    return lambda u: slope(loss, float(u), u_ref)


# ---- the softmax model


def log_probs(W: np.ndarray, h: np.ndarray) -> np.ndarray:
    """(V,) ln softmax(W h), by the definition."""
    logits = W @ h
    top = logits.max()
    return logits - top - math.log(sum(math.exp(x - top) for x in logits))


def gradient(W: np.ndarray, h: np.ndarray, plus: int, minus: int) -> tuple[np.ndarray, np.ndarray]:
    """d u / d W (V, d) and d u / d h (d,) of u = ln pi(+) - ln pi(-), by hand."""
    dW = np.zeros_like(W)
    dW[plus], dW[minus] = h, -h
    return dW, W[plus] - W[minus]


def margin(W: np.ndarray, h: np.ndarray, plus: int, minus: int) -> float:
    return float((W[plus] - W[minus]) @ h)


def integrate(
    W: np.ndarray,
    h: np.ndarray,
    plus: int,
    minus: int,
    slope: Callable[[float], float],
    times: np.ndarray,
    eta_W: float = 1.0,
    eta_h: Any = 1.0,
    stop_at: float | None = None,
    rtol: float = 1e-12,
) -> tuple[np.ndarray, np.ndarray]:
    """W (T, V, d) and h (T, d) at `times` of dW = eta_W G du/dW, dh = eta_h G du/dh, all parameters, by DOP853.

    eta_h may be a (d, d) matrix. `stop_at`: a margin where a hinge-like loss turns flat; the parameters stay there.
    """
    V, d = W.shape

    def velocity(t: float, x: np.ndarray) -> np.ndarray:
        W, h = x[: V * d].reshape(V, d), x[V * d :]
        dW, dh = gradient(W, h, plus, minus)
        # Before the stop the slope is that of the left side, also for trial points beyond it.
        u = margin(W, h, plus, minus)
        G = slope(u if stop_at is None else min(u, np.nextafter(stop_at, -np.inf)))
        return np.concatenate([(eta_W * G * dW).ravel(), G * (eta_h @ dh if np.ndim(eta_h) else eta_h * dh)])

    def arrive(t: float, x: np.ndarray) -> float:
        return margin(x[: V * d].reshape(V, d), x[V * d :], plus, minus) - stop_at  # type: ignore[operator]

    arrive.terminal = True  # type: ignore[attr-defined]
    start = np.concatenate([W.ravel(), h]).astype(float)
    times = np.asarray(times, dtype=float)
    solution = solve_ivp(
        velocity,
        (0.0, max(times[-1], 1e-300)),
        start,
        method="DOP853",
        t_eval=times if stop_at is None else None,
        dense_output=stop_at is not None,
        events=None if stop_at is None else arrive,
        rtol=rtol,
        atol=rtol / 10,
    )
    assert solution.success, solution.message
    if stop_at is None:
        states = solution.y.T
    else:
        ended = solution.t_events[0]
        limit = ended[0] if ended.size else np.inf
        states = solution.sol(np.minimum(times, limit)).T
    return states[:, : V * d].reshape(-1, V, d), states[:, V * d :]


def integrated_log_probs(*args: Any, **kwargs: Any) -> np.ndarray:
    """(T, V) ln pi along `integrate`."""
    Ws, hs = integrate(*args, **kwargs)
    return np.array([log_probs(W, h) for W, h in zip(Ws, hs, strict=True)])
