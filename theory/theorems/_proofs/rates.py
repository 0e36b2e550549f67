"""Theorems 1 to 9, Propositions 1 and 2 and the general formula, proved for every d, V, length and data set.

One route for all: an objective of log-softmaxes of the logits L[c, i], whose loss is an arbitrary function (only its
slopes have names); C = -d objective / dL by sympy's differentiation; the closed system of inner products
(`theory.theorems._proofs.exact.closed_system`); the chain rule, again sympy's. The printed theorem is subtracted.
"""

from collections.abc import Callable

import sympy as sp

from theory.theorems._proofs.letters import (
    PREFIXES,
    SEQUENCES,
    TOKENS,
    D,
    G,
    S,
    X,
    along,
    another,
    claim,
    context,
    d_l,
    d_w,
    embeddings,
    first_tokens_differ,
    flow,
    hidden,
    inner,
    joined,
    lam,
    lam_l,
    lam_w,
    log_pi,
    log_prob,
    loss,
    mass,
    mean_along,
    minus,
    mu,
    n,
    norms,
    other,
    others_along,
    pair_loss,
    place,
    plus,
    response_minus,
    response_plus,
    slope,
    token,
    tokens_differ,
    unembedding,
    x,
    y_minus,
    y_plus,
)
from theory.theorems._proofs.symbolic import Expr, Factors, M, N, Proof, V, delta, eta_h, eta_W, one, pi, total

# ---- one sample, one token


def _token_flow(z: Expr) -> Expr:
    return flow(log_pi(x, z), loss(G, log_pi(x, plus) - log_pi(x, minus)))


def theorem_4(k: Factors = one) -> Proof:
    terms = {
        "norms of W_+ and W_-": G * eta_h * norms(x, plus, minus),
        "alignment of W_+ and W_-": -G * eta_h * mass(x, plus, minus) * M(plus, minus),
        "other tokens, weighted": -G * eta_h * others_along(x, plus, minus),
        "hidden norm": G * eta_W * mass(x, plus, minus) * N(x, x),
    }
    return claim(_token_flow(plus), terms, k, TOKENS, tokens_differ)


def theorem_5(k: Factors = one) -> Proof:
    terms = {
        "alignment with W_+ - W_-": G * eta_h * along(plus, minus, other),
        "mean alignment": -G * eta_h * mean_along(x, plus, minus),
        "hidden norm": G * eta_W * (pi(x, minus) - pi(x, plus)) * N(x, x),
    }
    return claim(_token_flow(other), terms, k, TOKENS + "; every third token", tokens_differ)


def theorem_1(k: Factors = one) -> Proof:
    """The rate less what depends on probabilities, norms and |h|^2 alone."""
    rest = G * (eta_h * norms(x, plus, minus) + eta_W * mass(x, plus, minus) * N(x, x))
    terms = {
        "alignment of W_+ and W_-": -G * eta_h * mass(x, plus, minus) * M(plus, minus),
        "other tokens, weighted": -G * eta_h * others_along(x, plus, minus),
    }
    return claim(_token_flow(plus) - rest, terms, k, TOKENS, tokens_differ)


def theorem_2(k: Factors = one) -> Proof:
    terms = {"alignment": G * eta_h * (along(plus, minus, other) - along(plus, minus, another))}
    return claim(_token_flow(other) - _token_flow(another), terms, k, TOKENS, tokens_differ)


def critical_ratio(k: Factors = one) -> Proof:
    """E4: the rate is G [eta_h <W_+ - Wbar, a> + eta_W (1 - pi_+ + pi_-) |h|^2], which is 0 at kappa*."""
    terms = {
        "alignment": G * eta_h * (along(plus, minus, plus) - mean_along(x, plus, minus)),
        "hidden norm": G * eta_W * mass(x, plus, minus) * N(x, x),
    }
    return claim(_token_flow(plus), terms, k, TOKENS, tokens_differ)


def kernel_rate(k: Factors = one) -> Proof:
    """E8: W enters the rate only as it moves h, by <W_v, Kf W_w>: that is what M means here, with eta_h = 1."""
    terms = [
        {
            "alignment of y+": G * (along(plus, minus, plus) - mean_along(x, plus, minus)),
            "hidden norm, y+": G * eta_W * mass(x, plus, minus) * N(x, x),
        },
        {
            "alignment of z": G * (along(plus, minus, other) - mean_along(x, plus, minus)),
            "hidden norm, z": G * eta_W * (pi(x, minus) - pi(x, plus)) * N(x, x),
        },
    ]
    rates = (_token_flow(z).xreplace({eta_h: sp.Integer(1)}) for z in (plus, other))
    proofs = (claim(rate, part, k, "", tokens_differ) for rate, part in zip(rates, terms, strict=True))
    return joined(proofs, TOKENS + ", every feature kernel")


def fixed_features(k: Factors = one) -> Proof:
    """Only W trained: the rate has one term, and 1 - pi_+ + pi_- is a sum of probabilities."""
    rate = _token_flow(plus).xreplace({eta_h: sp.Integer(0)})
    others = total(lambda z: (1 - delta(z, plus)) * pi(x, z), V, "z")
    terms = {"hidden norm": G * eta_W * mass(x, plus, minus) * N(x, x)}
    positive = claim(mass(x, plus, minus) - others - pi(x, minus), {}, k, "")
    return joined([claim(rate, terms, k, "", tokens_differ), positive], TOKENS)


def clock(k: Factors = one) -> Proof:
    """E1: du/dt = G K with K = 2 eta_W |h|^2 + eta_h |W_+ - W_-|^2."""
    a_squared = along(plus, minus, plus) - along(plus, minus, minus)
    terms = {"speed": G * (2 * eta_W * N(x, x) + eta_h * a_squared)}
    return claim(_token_flow(plus) - _token_flow(minus), terms, k, TOKENS, tokens_differ)


# ---- one sample, sequences


def _sequence_flow(v: Expr) -> Expr:
    return flow(log_prob(v, context), loss(G, log_prob(plus, context) - log_prob(minus, context)))


def _after_the_first(v: Expr) -> Expr:
    """sum over k >= 2 of |W_{v_k} - Wbar|^2."""
    return total(lambda k: (1 - delta(k, 1)) * embeddings(v, k, v, k, context), n(v), "k")


def theorem_3(k: Factors = one) -> Proof:
    """What hidden vectors contribute to the rate is all that comes from moving W."""
    rate = flow(log_prob(plus), loss(G, log_prob(plus) - log_prob(minus))).xreplace({eta_h: sp.Integer(0)})
    terms = {
        "hidden vectors of y-": -G * eta_W * hidden(plus, minus),
        "hidden vectors of y+": G * eta_W * hidden(plus, plus),
    }
    return claim(rate, terms, k, SEQUENCES + " that share any prefix")


def theorem_6(k: Factors = one) -> Proof:
    v, w = token(plus, 1), token(minus, 1)
    terms = {
        "norms of the first tokens": G * eta_h * norms(x, v, w),
        "later tokens of y+": G * eta_h * _after_the_first(plus),
        "alignment of the first tokens": -G * eta_h * mass(x, v, w) * M(v, w),
        "other first tokens, weighted": -G * eta_h * others_along(x, v, w),
        "hidden vectors of y-": -G * eta_W * hidden(plus, minus, context, context),
        "hidden vectors of y+": G * eta_W * hidden(plus, plus, context, context),
    }
    return claim(_sequence_flow(plus), terms, k, SEQUENCES + ", first tokens apart", first_tokens_differ)


def theorem_7(k: Factors = one) -> Proof:
    v, w = token(plus, 1), token(minus, 1)
    terms = {
        "alignment of the first token": G * eta_h * along(v, w, token(other, 1)),
        "mean alignment": -G * eta_h * mean_along(x, v, w),
        "hidden vectors of y-": -G * eta_W * hidden(other, minus, context, context),
        "hidden vectors of y+": G * eta_W * hidden(other, plus, context, context),
    }
    return claim(_sequence_flow(other), terms, k, SEQUENCES + ", first tokens apart", first_tokens_differ)


def shared_prefix(k: Factors = one) -> Proof:
    """Here plus and minus are what follows the common prefix, a response of its own; x is where they part."""
    prefix = other

    def facts(v: Expr, w: Expr) -> Expr | None:
        if any(isinstance(e, place | token) and e.args[0] == prefix for e in (v, w)):
            before = {type(v), type(w)} == {place, context} or x in (v, w)  # contexts of the prefix come before x
            return sp.Integer(0) if before else None
        return first_tokens_differ(v, w)

    v, w = token(plus, 1), token(minus, 1)
    against = lambda y: hidden(plus, y, context, context) + hidden(prefix, y, place, context)  # noqa: E731
    terms = {
        "branching": G * eta_h * (along(v, w, v) - mean_along(x, v, w)),
        "later tokens of y+": G * eta_h * _after_the_first(plus),
        "hidden vectors of y-": -G * eta_W * against(minus),
        "hidden vectors of y+": G * eta_W * against(plus),
    }
    whole = [log_prob(prefix) + log_prob(v, context) for v in (plus, minus)]
    covers = SEQUENCES + ", common prefixes of every length, neither a prefix of the other"
    return claim(flow(whole[0], loss(G, whole[0] - whole[1])), terms, k, covers, facts)


# ---- data sets


def _data_set_flow(z: Expr) -> Expr:
    margin = lambda s: log_pi(s, y_plus(s)) - log_pi(s, y_minus(s))  # noqa: E731
    objective = total(lambda s: loss(slope(s), margin(s)), D, "s") / D
    return flow(log_pi(x, z), objective).xreplace({X: D})  # the contexts are the prompts, one a sample


DATA_SETS = TOKENS + ", data sets of every size, each prompt once"


def theorem_8(k: Factors = one) -> Proof:
    v, w = y_plus(x), y_minus(x)

    def cross(s: Expr) -> Expr:
        a = delta(v, y_plus(s)) - delta(v, y_minus(s)) + pi(x, y_minus(s)) - pi(x, y_plus(s))
        return (1 - delta(s, x)) * slope(s) * a * N(x, s)

    terms = {
        "norms of W_+ and W_-": slope(x) / D * eta_h * norms(x, v, w),
        "hidden norm": slope(x) / D * eta_W * mass(x, v, w) * N(x, x),
        "S of eq. 3": slope(x) / D * eta_h * S(x, v, w),
        "other samples": eta_W * total(cross, D, "s") / D,
    }
    return claim(_data_set_flow(v), terms, k, DATA_SETS, tokens_differ)


def theorem_9(k: Factors = one) -> Proof:
    v, w = y_plus(x), y_minus(x)
    naming = lambda s: slope(s) * (delta(other, y_plus(s)) - delta(other, y_minus(s))) * N(x, s)  # noqa: E731
    mean = lambda s: slope(s) * (pi(x, y_minus(s)) - pi(x, y_plus(s))) * N(x, s)  # noqa: E731
    terms = {
        "alignment with W_+ - W_-": slope(x) / D * eta_h * along(v, w, other),
        "mean alignment": -slope(x) / D * eta_h * mean_along(x, v, w),
        "samples that name it": eta_W * total(naming, D, "s") / D,
        "mean over samples": eta_W * total(mean, D, "s") / D,
    }
    return claim(_data_set_flow(other), terms, k, DATA_SETS + "; every token", tokens_differ)


def general_rate(k: Factors = one) -> Proof:
    def objective(s: Expr) -> Expr:
        return pair_loss(d_w(s), d_l(s), log_prob(response_plus(s)), log_prob(response_minus(s)))

    def mean(f: Callable[..., Expr]) -> Expr:
        return total(f, D, "s") / D

    terms = {
        "unembedding, with y+": eta_h * mean(lambda s: d_w(s) * unembedding(other, response_plus(s))),
        "unembedding, with y-": -eta_h * mean(lambda s: d_l(s) * unembedding(other, response_minus(s))),
        "hidden, with y+": eta_W * mean(lambda s: d_w(s) * hidden(other, response_plus(s))),
        "hidden, with y-": -eta_W * mean(lambda s: d_l(s) * hidden(other, response_minus(s))),
    }
    covers = PREFIXES + ", every differentiable loss of log-probabilities, data sets of every size, every response"
    return claim(flow(log_prob(other), mean(objective)), terms, k, covers)


# ---- regularised and weighted losses


def proposition_1(k: Factors = one) -> Proof:
    a, b = log_prob(plus), log_prob(minus)
    terms = {
        "own gradient": G * inner(plus, plus),
        "common gradient": -G * inner(plus, minus),
        "SFT term": lam * inner(plus, plus),
    }
    return claim(flow(a, loss(G, a - b) - lam * a), terms, k, PREFIXES + ", every differentiable l, one sample")


def proposition_2(k: Factors = one) -> Proof:
    a, b = log_prob(plus), log_prob(minus)
    rho, gamma = lam_l * mu / G, (lam_w - lam_l) * mu
    terms = {
        "rho E, own gradient": rho * G * inner(plus, plus),
        "rho E, common gradient": -rho * G * inner(plus, minus),
        "gamma term": gamma * inner(plus, plus),
    }
    objective = loss(mu, lam_w * a - lam_l * b)
    return claim(flow(a, objective), terms, k, PREFIXES + ", every differentiable l with l'(u) != 0, one sample")
