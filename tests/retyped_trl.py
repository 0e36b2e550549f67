"""Losses of TRL's trainers as their papers print them, in mpmath; slopes of the margin losses by hand. No `theory`."""

import math
from collections.abc import Callable
from typing import Any

from mpmath import exp, log, mpf


def _s(z: Any) -> Any:
    return 1 / (1 + exp(-z))


def _h(y: Any) -> Any:
    """ln of the ratio of ratios, pi(y+) pi_ref(y-) / (pi(y-) pi_ref(y+))."""
    return y.a + y.b_ref - y.b - y.a_ref


def _robust(p: Any, y: Any) -> Any:
    as_labelled, flipped = (-log(_s(p.beta * sign * _h(y))) for sign in (1, -1))
    return ((1 - p.eps) * as_labelled - p.eps * flipped) / (1 - 2 * p.eps)


def _exo(p: Any, y: Any) -> Any:
    """KL divergence between the policy's choice among the two and the smoothed labels."""
    w, l = p.beta * (y.a - y.a_ref), p.beta * (y.b - y.b_ref)
    chosen = [1 / (1 + exp(l - w)), 1 / (1 + exp(w - l))]
    return sum(f * log(f / r) for f, r in zip(chosen, (1 - p.eps, p.eps), strict=True))


def _discopop(p: Any, y: Any) -> Any:
    """Logistic and exponential loss, modulated."""
    rho = p.beta * _h(y)
    modulation = _s(rho / p.tau)
    return log(1 + exp(-rho)) * (1 - modulation) + exp(-rho) * modulation


def _nca(p: Any, y: Any) -> Any:
    w, l = p.beta * (y.a - y.a_ref), p.beta * (y.b - y.b_ref)
    return -log(_s(w)) - (log(_s(-w)) + log(_s(-l))) / 2


def _bco(p: Any, y: Any, delta: Any = 0) -> Any:
    w, l = p.beta * (y.a - y.a_ref), p.beta * (y.b - y.b_ref)
    return -log(_s(w - delta)) - log(1 - _s(l - delta))


def _squares(y: Any, eta: Any, p_w: Any, p_l: Any) -> Any:
    half = mpf(1) / 2
    return (y.a - y.a_ref - eta * (p_w - half)) ** 2 + (y.b - y.b_ref - eta * (p_l - half)) ** 2


def _smoothed(z: Any, eps: Any) -> Any:
    return -((1 - eps) * log(_s(z)) + eps * log(1 - _s(z)))


def _power(p: Any, y: Any) -> Any:
    """AlphaPO: the reward (1 - pi^(-alpha/|y|))/alpha, ln pi/|y| at alpha = 0."""

    def reward(ln_pi: Any, n: Any) -> Any:
        return (1 - exp(ln_pi) ** (-p.alpha / n)) / p.alpha if p.alpha else ln_pi / n

    return -log(_s(p.beta * reward(y.a, y.n_w) - p.beta * reward(y.b, y.n_l) - p.gamma))


def _odds_ratio(y: Any) -> Any:
    w, l = exp(y.a / y.n_w), exp(y.b / y.n_l)
    return -log(_s(log((w / (1 - w)) / (l / (1 - l)))))


def _kto(p: Any, y: Any, z0: Any = 0) -> Any:
    w, l = y.a - y.a_ref, y.b - y.b_ref
    return p.lam_D * (1 - _s(p.beta * (w - z0))) + p.lam_U * (1 - _s(p.beta * (z0 - l)))


# Coupled losses: a batch of one.
PAPER: dict[str, Callable[[Any, Any], Any]] = {
    "robust": _robust,
    "exo": _exo,
    "discopop": _discopop,
    "nca": _nca,
    "bco": lambda p, y: _bco(p, y, p.delta),
    "bco_pair": _bco,
    "sppo": lambda p, y: _squares(y, p.eta, p.p_w, p.p_l),
    "sppo_hard": lambda p, y: _squares(y, 1 / mpf(p.beta), 1, 0),
    "aot": lambda p, y: _smoothed(p.beta * ((y.a - y.b) - (y.a_ref - y.b_ref)), p.eps),
    "aot_unpaired": lambda p, y: _smoothed(p.beta * ((y.a - y.a_ref) - (y.b - y.b_ref)), p.eps),
    "apo_zero": lambda p, y: (1 - _s(p.beta * (y.a - y.a_ref))) + _s(p.beta * (y.b - y.b_ref)),
    "apo_down": lambda p, y: _s(p.beta * (y.a - y.a_ref)) + (1 - _s(p.beta * _h(y))),
    "nll": lambda p, y: -y.a / (1 if p.per == "sequence" else y.n_w),
    "dpo_norm": lambda p, y: -log(_s(p.beta * (y.a - y.a_ref) / y.n_w - p.beta * (y.b - y.b_ref) / y.n_l)),
    "ipo_norm": lambda p, y: ((y.a - y.a_ref) / y.n_w - (y.b - y.b_ref) / y.n_l - 1 / (2 * p.beta)) ** 2,
    "cpo": lambda p, y: _smoothed(p.beta * (y.a - y.b), p.eps) - p.cpo_alpha * y.a,
    "simpo": lambda p, y: _smoothed(p.beta / y.n_w * y.a - p.beta / y.n_l * y.b - p.gamma, p.eps),
    "alphapo": _power,
    "orpo": lambda p, y: -y.a / y.n_w + p.beta * _odds_ratio(y),
    "orpo_prompt": lambda p, y: (
        -(p.logp_prompt + y.a) / (p.n_prompt + y.n_w - 1)
        + p.beta * _odds_ratio(y)  # n_prompt + n_w tokens, all but one
    ),
    "kto": lambda p, y: _kto(p, y, p.z0),
    "apo_zero_unpaired": _kto,
}


def _expit(z: float) -> float:
    return 1 / (1 + math.exp(-z)) if z >= 0 else math.exp(z) / (1 + math.exp(z))


def _exo_slope(p: Any, u: float, r: float) -> float:
    z = p.beta * (u - r)
    return -p.beta * _expit(z) * _expit(-z) * (z + math.log(p.eps) - math.log(1 - p.eps))


def _discopop_slope(p: Any, u: float, r: float) -> float:
    """The product rule on (1-g) L + E, E = g e^-x, with g' = g (1-g)/tau and L' = -sigmoid(-x)."""
    x = p.beta * (u - r)
    g, off = _expit(x / p.tau), _expit(-x / p.tau)
    L = max(-x, 0.0) + math.log1p(math.exp(-abs(x)))
    E = g * math.exp(-x) if x > 0 else off * math.exp(x / p.tau - x)
    return p.beta * (g * off / p.tau * L + off * _expit(-x) - off / p.tau * E + E)


SLOPE: dict[str, Callable[[Any, float, float], float]] = {
    "robust": lambda p, u, r: (
        p.beta * ((1 - p.eps) * _expit(p.beta * (r - u)) + p.eps * _expit(p.beta * (u - r))) / (1 - 2 * p.eps)
    ),
    "exo": _exo_slope,
    "discopop": _discopop_slope,
}
