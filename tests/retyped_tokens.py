"""Token-level losses retyped from their papers as loops over tokens, in mpmath. Nothing here imports `theory`.

A response is a list of `Token`. Every loss takes two copies of the pair: of what stands under a stop-gradient it reads the
second copy, so that a difference quotient in the first is the gradient that training follows.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mpmath
from mpmath import mpf


@dataclass
class Token:
    log_prob: Any  # ln pi(y_t)
    ref: Any  # ln pi_ref(y_t)
    kl: Any  # KL(pi_ref || pi)
    log_sum_sq: Any  # ln sum_v pi(v)^2
    hidden: list[Any]  # of the reference model


def minus_log_sigma(z: Any) -> Any:
    return mpmath.log(1 + mpmath.exp(-z))


def tdpo1(p: Any, w: list[Token], l: list[Token], w0: list[Token], l0: list[Token]) -> Any:
    reward_w = sum(t.log_prob - t.ref for t in w)
    reward_l = sum(t.log_prob - t.ref for t in l)
    divergence = sum(t.kl for t in l) - sum(t.kl for t in w)
    return minus_log_sigma(p.beta * reward_w - p.beta * reward_l - p.beta * divergence)


def tdpo2(p: Any, w: list[Token], l: list[Token], w0: list[Token], l0: list[Token]) -> Any:
    reward_w = sum(t.log_prob - t.ref for t in w)
    reward_l = sum(t.log_prob - t.ref for t in l)
    divergence = sum(t.kl for t in l) - sum(t.kl for t in w0)
    return minus_log_sigma(p.beta * reward_w - p.beta * reward_l - p.alpha * p.beta * divergence)


def ld_dpo(p: Any, w: list[Token], l: list[Token], w0: list[Token], l0: list[Token]) -> Any:
    public = min(len(w), len(l))

    def reward(y: list[Token]) -> Any:
        total = mpf(0)
        for i, t in enumerate(y):
            total += (t.log_prob - t.ref) * (1 if i < public else p.alpha)
        return total

    return minus_log_sigma(p.beta * (reward(w) - reward(l)))


def wpo_weight(y: list[Token]) -> Any:
    """Geometric mean over tokens of pi(y_t) / sum_v pi(v)^2."""
    product = mpf(1)
    for t in y:
        product *= mpmath.exp(t.log_prob) / mpmath.exp(t.log_sum_sq)
    return product ** (mpf(1) / len(y))


def wpo(p: Any, w: list[Token], l: list[Token], w0: list[Token], l0: list[Token]) -> Any:
    margin = sum(t.log_prob - t.ref for t in w) - sum(t.log_prob - t.ref for t in l)
    return wpo_weight(w0) * wpo_weight(l0) * minus_log_sigma(p.beta * margin)


def activation_mask(y: list[Token]) -> list[Any]:
    """Mean over features, z-normalised over the response, then rescaled to [0, 1]: the authors' order."""
    means = [sum(t.hidden) / len(t.hidden) for t in y]
    centre = sum(means) / len(means)
    std = mpmath.sqrt(sum((m - centre) ** 2 for m in means) / (len(means) - 1))
    z = [(m - centre) / std for m in means]
    return [(x - min(z)) / (max(z) - min(z)) for x in z]


def mapo(p: Any, w: list[Token], l: list[Token], w0: list[Token], l0: list[Token]) -> Any:
    def score(y: list[Token], y0: list[Token]) -> Any:
        return sum(m * (t.log_prob - t.ref + t.kl) for m, t in zip(activation_mask(y0), y, strict=True))

    return minus_log_sigma(p.beta * (score(w, w0) - score(l, l0)))


def net(weights: Any, hidden: list[Any]) -> Any:
    """ReLU(v . LayerNorm(h) + c), eps = 1e-5 as in torch."""
    d = len(hidden)
    centre = sum(hidden) / d
    variance = sum((x - centre) ** 2 for x in hidden) / d
    total = mpf(weights.c)
    for v, x in zip(weights.v, hidden, strict=True) if weights.v else ():
        total += v * (x - centre) / mpmath.sqrt(variance + mpf("1e-5"))
    return max(mpf(0), total)


def sparse_po(p: Any, w: list[Token], l: list[Token], w0: list[Token], l0: list[Token]) -> Any:
    score, l1_u, l1_d = mpf(0), mpf(0), mpf(0)
    for sign, y in ((1, w), (-1, l)):
        for t in y:
            u = net(p.mask_u, t.hidden)
            d = u if p.mask_d is None else net(p.mask_d, t.hidden)
            score += sign * (u * (t.log_prob - t.ref) + d * t.kl)
            l1_u, l1_d = l1_u + u, l1_d + d
    half = mpf(1) / 2 if p.mask_d is None else 1
    return minus_log_sigma(p.beta * score) + half * p.lam_u * l1_u + half * p.lam_d * l1_d


# Called with tokens, as `tests/test_losses_tokens.py` does, not with a pair.
PAPER: dict[str, Callable[..., Any]] = {
    "tdpo1": tdpo1,  # Zeng et al. 2024
    "tdpo2": tdpo2,
    "ld_dpo": ld_dpo,  # Liu et al. 2024
    "wpo": wpo,  # Zhou et al. 2024
    "mapo": mapo,  # Christopoulou et al. 2024
    "sparse_po": sparse_po,
}


# ---- the softmax model, as loops


def distribution(W: Any, h: Any) -> list[Any]:
    """softmax(W h), mpmath."""
    logits = [sum(mpf(float(x)) * mpf(float(y)) for x, y in zip(row, h, strict=True)) for row in W]
    total = sum(mpmath.exp(z) for z in logits)
    return [mpmath.exp(z) / total for z in logits]


def tokens(W: Any, H: dict[Any, Any], W_ref: Any, H_ref: dict[Any, Any], y: tuple[int, ...]) -> list[Token]:
    """A response token by token; H maps prefixes to hidden vectors."""
    out = []
    for k, v in enumerate(y):
        p, q = distribution(W, H[y[:k]]), distribution(W_ref, H_ref[y[:k]])
        kl = sum(b * mpmath.log(b / a) for a, b in zip(p, q, strict=True))
        hidden = [mpf(float(x)) for x in H_ref[y[:k]]]
        out.append(Token(mpmath.log(p[v]), mpmath.log(q[v]), kl, mpmath.log(sum(a**2 for a in p)), hidden))
    return out


def initial_rate(
    W: Any, H: dict[Any, Any], plus: tuple[int, ...], minus: tuple[int, ...], masked: set[int], G: float, eta_h: float
) -> float:
    """d/dt ln pi(y+) at the reference under a logistic loss of slope G that leaves out the positions in `masked`.

    G sum_k (sum_{l not masked} <grad ln pi(y+_k), grad ln pi(y+_l)> - <grad ln pi(y+_k), grad ln pi(y-_l)>): the gradient
    of the KL terms is zero there.
    """

    def error(y: tuple[int, ...], k: int) -> list[float]:
        p = distribution(W, H[y[:k]])
        return [float((v == y[k]) - p[v]) for v in range(len(p))]

    def inner(y: tuple[int, ...], k: int, z: tuple[int, ...], l: int) -> float:
        e, f = error(y, k), error(z, l)
        h, g = H[y[:k]], H[z[:l]]
        total = sum(a * b for a, b in zip(e, f, strict=True)) * sum(a * b for a, b in zip(h, g, strict=True))
        if y[:k] == z[:l]:
            for j in range(len(h)):
                back = [sum(W[v][j] * x[v] for v in range(len(e))) for x in (e, f)]
                total += eta_h * back[0] * back[1]
        return float(total)

    rate = 0.0
    for k in range(len(plus)):
        rate += sum(inner(plus, k, plus, l) for l in range(len(plus)) if l not in masked)
        rate -= sum(inner(plus, k, minus, l) for l in range(len(minus)) if l not in masked)
    return G * rate
