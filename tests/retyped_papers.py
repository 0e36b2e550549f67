"""Losses of papers outside TRL, retyped in mpmath, and slopes of the margin losses by hand. Nothing imports `theory`.

`p` is read for its parameters, `y` holds mpmath numbers a, b, a_ref, b_ref, n_w, n_l.
"""

import math
from collections.abc import Callable
from typing import Any

import mpmath
from mpmath import mpf


def softplus(x: Any) -> Any:
    """ln(1 + e^x); beyond 1e6 it is max(0, x) to more digits than anyone carries."""
    return max(mpf(0), x) if abs(x) > 1e6 else mpmath.log(1 + mpmath.exp(x))


def ratio_w(y: Any) -> Any:
    """pi(y+)/pi_ref(y+)."""
    return mpmath.exp(y.a) / mpmath.exp(y.a_ref)


def ratio_l(y: Any) -> Any:
    return mpmath.exp(y.b) / mpmath.exp(y.b_ref)


def f_dpo(derivative: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """-ln sigma(beta f'(ratio of y+) - beta f'(ratio of y-)), f' as a function of the ratio itself."""
    return lambda p, y: softplus(-p.beta * (derivative(p, ratio_w(y)) - derivative(p, ratio_l(y))))


def dpop(p: Any, y: Any) -> Any:
    penalty = max(mpf(0), mpmath.log(mpmath.exp(y.a_ref) / mpmath.exp(y.a)))
    return softplus(-p.beta * ((y.a - y.a_ref) - (y.b - y.b_ref) - p.lam * penalty))


def beta_dpo(p: Any, y: Any) -> Any:
    """A batch of one: its mean margin is its margin."""
    margin = (y.a - y.a_ref) - (y.b - y.b_ref)
    return softplus(-max(mpf("0.001"), p.beta * (1 + p.alpha * (margin - p.m0))) * margin)


def chi_po(p: Any, y: Any) -> Any:
    link_w, link_l = (z + mpmath.log(z) for z in (ratio_w(y), ratio_l(y)))
    return softplus(-min(max(p.beta * link_w - p.beta * link_l, mpf(-2 * p.r_max)), mpf(2 * p.r_max)))


def focal_po(p: Any, y: Any) -> Any:
    x = p.beta * ((y.a - y.b) - (y.a_ref - y.b_ref))
    return mpmath.exp(-p.gamma * softplus(-x)) * softplus(-x)


def ddro(p: Any, y: Any) -> Any:
    rest = 2 - ratio_l(y)
    return mpmath.inf if rest <= 0 else -mpmath.log(ratio_w(y)) - mpmath.log(rest)


PAPER: dict[str, Callable[[Any, Any], Any]] = {
    # Pal et al. 2024, eq. 3
    "dpop": dpop,
    # Liu et al. 2024: DPO plus eta times the negative log-likelihood of y+
    "rpo": lambda p, y: softplus(-p.beta * (y.a - y.a_ref) + p.beta * (y.b - y.b_ref)) - p.eta * y.a,
    # Pang et al. 2024, eq. 1
    "irpo": lambda p, y: softplus(-p.beta * (y.a - y.a_ref) + p.beta * (y.b - y.b_ref)) - p.alpha * y.a / y.n_w,
    # Gui et al. 2024
    "bonbon": lambda p, y: (
        p.alpha * -y.a + (1 - p.alpha) * ((y.a - y.b) - (y.a_ref - y.b_ref) - 1 / (2 * mpf(p.beta))) ** 2
    ),
    # Yang et al. 2025: a factor on the reward of y-
    "dpo_shift": lambda p, y: softplus(-p.beta * mpmath.log(ratio_w(y)) + p.lam * p.beta * mpmath.log(ratio_l(y))),
    # Park et al. 2024
    "r_dpo": lambda p, y: softplus(
        -p.beta * mpmath.log(ratio_w(y)) + p.beta * mpmath.log(ratio_l(y)) - (p.alpha * y.n_w - p.alpha * y.n_l)
    ),
    "beta_dpo": beta_dpo,
    # Xiao et al. 2024, as coded
    "cal_dpo": lambda p, y: (
        softplus(-(y.a - y.a_ref) + (y.b - y.b_ref))
        + mpf(1) / 2 * (y.a - y.a_ref - mpf(1) / 2 / p.beta) ** 2
        + mpf(1) / 2 * (y.b - y.b_ref + mpf(1) / 2 / p.beta) ** 2
    ),
    # Zhao et al. 2023, eq. 2
    "slic_hf": lambda p, y: max(mpf(0), p.delta - y.a + y.b) - p.lam * y.a,
    # Wang et al. 2023, table 1: f' of forward KL (-ln z), Jensen-Shannon and alpha, up to constants
    "f_dpo_forward_kl": f_dpo(lambda p, z: -1 / z),
    "f_dpo_js": f_dpo(lambda p, z: mpmath.log(2 * z / (1 + z))),
    "f_dpo_alpha": f_dpo(lambda p, z: (1 - z ** (mpf(p.alpha) - 1)) / (1 - mpf(p.alpha))),
    # Huang et al. 2024, algorithm 1
    "chi_po": chi_po,
    # Pipano et al. 2026: f = (ln z)^2 / 2
    "squared_po": f_dpo(lambda p, z: mpmath.log(z) / z),
    # Liu et al. 2025
    "focal_po": focal_po,
    "lsif": lambda p, y: -ratio_w(y) + ratio_l(y) ** 2 / 2,
    "ukl": lambda p, y: -y.a + ratio_l(y),
    "ddro": ddro,
    # 2605.02626: the gate acts on gradients alone
    "gate_dpo": lambda p, y: softplus(-p.beta * ((y.a - y.a_ref) - (y.b - y.b_ref))),
}


def _focal_slope(p: Any, u: float, r: float) -> float:
    x = p.beta * (u - r)
    log_p = -math.log1p(math.exp(-x)) if x > 0 else x - math.log1p(math.exp(x))
    miss = -math.expm1(log_p) if x < 30 else math.exp(-x)  # 1 - p
    return p.beta * miss * math.exp(p.gamma * log_p) * (1 + p.gamma * log_p)


SLOPE: dict[str, Callable[[Any, float, float], float]] = {"focal_po": _focal_slope}
