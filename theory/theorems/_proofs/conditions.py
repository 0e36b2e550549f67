"""Conditions for displacement: the ratio of incentives, and tokens shared after an edit."""

import sympy as sp

from theory.theorems._proofs.letters import (
    PREFIXES,
    G,
    claim,
    error,
    flow,
    inner,
    joined,
    lam,
    lam_l,
    lam_w,
    log_pi,
    log_prob,
    loss,
    minus,
    mu,
    n,
    other,
    plus,
    x,
)
from theory.theorems._proofs.symbolic import Expr, Factors, L, Proof, V, delta, index, one, pi, total

b, y, row = (index(name) for name in ("c", "y", "v"))


def incentive_ratio(k: Factors = one) -> Proof:
    """Weights, lengths and an SFT term: the rate of any response is d_l (r <g_z, g_+> - <g_z, g_->)."""
    up, down = log_prob(plus), log_prob(minus)
    cases = [
        (loss(mu, lam_w * up - lam_l * down), lam_w / lam_l, lam_l * mu),
        (loss(mu, up / n(plus) - down / n(minus)), n(minus) / n(plus), mu / n(minus)),
        (loss(G, up - down) - lam * up, 1 + lam / G, G),
    ]
    proofs = []
    for objective, r, d_l in cases:
        pulls = {"ratio": sp.expand(d_l * r) * inner(other, plus), "push on y-": -d_l * inner(other, minus)}
        proofs.append(claim(flow(log_prob(other), objective), pulls, k, ""))
    return joined(proofs, PREFIXES + ", every differentiable l with l'(u) != 0, every response, one sample")


def suffix_coupling(k: Factors = one) -> Proof:
    """<e_v - pi(.|c+), e_v - pi(.|c-)> is a sum of products of probabilities."""
    alpha = total(lambda i: error(x, y, i) * error(b, y, i), V)
    terms = {
        "own token": (1 - pi(x, y)) * (1 - pi(b, y)),
        "other tokens": total(lambda i: (1 - delta(i, y)) * pi(x, i) * pi(b, i), V),
    }
    return claim(alpha, terms, k, "every V, every two softmaxes and every token")


def suffix_shared_logits(k: Factors = one) -> Proof:
    """Logits added in both contexts of a shared token move by what they do to both."""

    def contexts_differ(v: Expr, w: Expr) -> Expr | None:
        return sp.Integer(0) if {v, w} == {x, b} else None

    objective = loss(G, log_pi(x, y) - log_pi(b, y))  # the other positions do not see these logits
    push = -sp.diff(objective, L[x, row]) - sp.diff(objective, L[b, row])
    terms = {"context of y-": G * pi(b, row), "context of y+": -G * pi(x, row)}
    return claim(push, terms, k, "every V, every differentiable margin loss", contexts_differ)
