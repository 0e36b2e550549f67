"""Identities, bounds and second derivatives, proved for every d and V like the rates in `rates`."""

from collections.abc import Callable

import sympy as sp

from theory.theorems._proofs.letters import (
    PREFIXES,
    TOKENS,
    D,
    G,
    X,
    along,
    claim,
    d_l,
    d_w,
    error,
    flow,
    inner,
    joined,
    log_pi,
    log_prob,
    loss,
    mass,
    mean_along,
    minus,
    named,
    other,
    pair_loss,
    plus,
    response_minus,
    response_plus,
    slope,
    tokens_differ,
    x,
    y_minus,
    y_plus,
)
from theory.theorems._proofs.rates import DATA_SETS
from theory.theorems._proofs.symbolic import (
    Expr,
    Factors,
    L,
    M,
    N,
    Proof,
    V,
    delta,
    eta_h,
    eta_W,
    index,
    one,
    pi,
    total,
)

SOFTMAX = "every V, every softmax"
ONE_SAMPLE = PREFIXES + ", every differentiable margin loss, one sample"
ANY_DATA = PREFIXES + ", every differentiable loss of log-probabilities, data sets of every size"
b, y, r, row, column = (index(name) for name in ("c", "y", "r", "v", "j"))


def _descent(objective: Expr, c: Expr, i: Expr) -> Expr:
    """C = -d objective/dL."""
    return -sp.diff(objective, L[c, i])


def _data_set() -> Expr:
    """The mean over samples of an arbitrary loss of two log-probabilities."""
    of_sample = lambda s: pair_loss(d_w(s), d_l(s), log_prob(response_plus(s)), log_prob(response_minus(s)))  # noqa: E731
    return total(of_sample, D, "s") / D


def _token_pairs() -> Expr:
    """The mean over samples of an arbitrary margin loss of one-token responses."""
    return total(lambda s: loss(slope(s), log_pi(s, y_plus(s)) - log_pi(s, y_minus(s))), D, "s") / D


# ---- the flow of the parameters


def parameter_flow(k: Factors = one) -> Proof:
    """-dL/dW = C^T H and -dL/dH = C W for logits H W^T, by the chain rule."""
    W: Expr = sp.IndexedBase("W")
    H: Expr = sp.IndexedBase("H")
    C, d = named("C"), sp.Symbol("d", integer=True, positive=True)
    logit = lambda c, v: total(lambda j: W[v, j] * H[c, j], d, "j")  # noqa: E731
    descended = total(lambda c: total(lambda v: C(c, v) * logit(c, v), V, "v"), X, "c")  # to first order
    of_W = {"C^T H": total(lambda c: C(c, row) * H[c, column], X, "c")}
    of_H = {"C W": total(lambda v: C(b, v) * W[v, column], V, "v")}
    left = sp.diff(descended, W[row, column]), sp.diff(descended, H[b, column])
    covers = "every d, V and number of contexts, every differentiable loss of the logits"
    return joined([claim(e, terms, k, "") for e, terms in zip(left, (of_W, of_H), strict=True)], covers)


def row_sum(k: Factors = one) -> Proof:
    """E3: sum_z C_cz = 0 in every context, as W_z' = eta_W sum_c C_cz h_c."""
    C = _descent(_data_set(), b, row)
    others = total(lambda w: (1 - delta(w, y)) * C.xreplace({row: w}), V, "w")
    return claim(others, {"row of y+": -C.xreplace({row: y})}, k, ANY_DATA)


def constant_rows(k: Factors = one) -> Proof:
    """E3 for one pair: C_- = -C_+ and C_z = 0, so that W_+ + W_- and every other row stay."""
    C = _descent(loss(G, log_pi(x, plus) - log_pi(x, minus)), x, row)
    at_plus, at_minus, at_other = (C.xreplace({row: z}) for z in (plus, minus, other))
    proofs = [claim(at_minus, {"row of y+": -at_plus}, k, "", tokens_differ), claim(at_other, {}, k, "", tokens_differ)]
    return joined(proofs, TOKENS)


def normalisation(k: Factors = one) -> Proof:
    """sum_z pi_z d ln pi_z/dt = 0 in every context."""
    objective = pair_loss(d_w(x), d_l(x), log_prob(plus), log_prob(minus))
    share = lambda z: pi(b, z) * flow(log_pi(b, z), objective)  # noqa: E731
    others = total(lambda z: (1 - delta(z, y)) * share(z), V, "z")
    return claim(others, {"share of y+": -share(y)}, k, PREFIXES + ", every differentiable loss of log-probabilities")


def path_universality(k: Factors = one) -> Proof:
    """E2: the C of two margin losses are parallel at every point, and so are the velocities they are linear in."""
    u, slopes = log_prob(plus) - log_prob(minus), sp.symbols("G_1 G_2")
    first, second = (_descent(loss(g, u), b, y) for g in slopes)
    return claim(slopes[0] * second, {"slope of the other loss": slopes[1] * first}, k, ONE_SAMPLE)


def margin_rises(k: Factors = one) -> Proof:
    """du/dt = G |grad u|^2."""
    u = log_prob(plus) - log_prob(minus)
    terms = {
        "gradients of y+": G * inner(plus, plus),
        "common gradient": -2 * G * inner(plus, minus),
        "gradients of y-": G * inner(minus, minus),
    }
    return claim(flow(u, loss(G, u)), terms, k, ONE_SAMPLE)


def cauchy_schwarz(k: Factors = one) -> Proof:
    """Bound 2, squared: rate = G <v, w> with v = grad ln pi(z), w = grad u, and Lagrange's identity in coordinates."""
    v, w, size = named("grad_z"), named("grad_u"), sp.Symbol("size", integer=True, positive=True)
    product = lambda f, g: total(lambda i: f(i) * g(i), size)  # noqa: E731
    cross = total(lambda i: total(lambda j: (v(i) * w(j) - v(j) * w(i)) ** 2, size, "j"), size)
    rest = (G * product(v, w)) ** 2 + G**2 * cross / 2
    return claim(rest, {"bound": G**2 * product(v, v) * product(w, w)}, k, "every number of parameters and model")


def swap(k: Factors = one) -> Proof:
    """Swapping + and - keeps K."""
    margins = [log_pi(x, v) - log_pi(x, w) for v, w in ((plus, minus), (minus, plus))]
    one_way, other_way = (flow(u, loss(G, u)) for u in margins)
    return claim(one_way, {"swapped": other_way}, k, TOKENS, tokens_differ)


def margins_need_no_softmax(k: Factors = one) -> Proof:
    """E7: C W and C^T H (in inner products with any other row) have no probability in them."""
    C = _descent(_token_pairs(), b, y)
    of_H = total(lambda v: C.xreplace({b: x, y: v}) * M(v, r), V, "v")
    of_W = total(lambda c: C.xreplace({b: c}) * N(c, r), D, "c")
    named_by = lambda s: delta(y, y_plus(s)) - delta(y, y_minus(s))  # noqa: E731
    proofs = [
        claim(of_H, {"hidden vectors": slope(x) * along(y_plus(x), y_minus(x), r) / D}, k, ""),
        claim(of_W, {"unembeddings": total(lambda s: slope(s) * named_by(s) * N(s, r), D, "s") / D}, k, ""),
    ]
    return joined(proofs, DATA_SETS)


def prompts_decouple(k: Factors = one) -> Proof:
    """E7, W frozen: the C of a prompt is that of its own sample over |D| (with W trained: `disjoint_pairs`)."""
    own = loss(slope(x), log_pi(x, y_plus(x)) - log_pi(x, y_minus(x)))
    return claim(_descent(_token_pairs(), x, y), {"speed": _descent(own, x, y) / D}, k, DATA_SETS + ", W frozen")


def disjoint_pairs(k: Factors = one) -> Proof:
    """E7: if no two pairs share a token, W_+ - W_- of a prompt moves along its own h only, at 2 eta_W G/|D|."""

    def disjoint(v: Expr, w: Expr) -> Expr | None:
        if {v.func, w.func} == {y_plus, y_minus}:
            return sp.Integer(0)
        return delta(v.args[0], w.args[0]) if v.func == w.func in (y_plus, y_minus) else None

    C = _descent(_token_pairs(), b, y)
    difference = lambda c: C.xreplace({b: c, y: y_plus(x)}) - C.xreplace({b: c, y: y_minus(x)})  # noqa: E731
    left = eta_W * total(lambda c: difference(c) * N(c, r), D, "c")
    return claim(left, {"own h": 2 * eta_W * slope(x) * N(x, r) / D}, k, DATA_SETS + ", disjoint pairs", disjoint)


# ---- which pairs displace, entanglement, squeezing


def alignment_ratio(k: Factors = one) -> Proof:
    """E4: <W_+ - Wbar, a> = pi_- |a|^2 + sum_{z != +-} pi_z (1 - r_z) |a|^2 / 2, so >= 0 if every r_z <= 1."""
    ends = along(plus, minus, plus), along(plus, minus, minus)
    squared = ends[0] - ends[1]
    ratio = lambda z: 2 * along(plus, minus, z) - ends[0] - ends[1]  # r_z |a|^2  # noqa: E731
    rest = lambda z: (1 - delta(z, plus)) * (1 - delta(z, minus)) * pi(x, z)  # noqa: E731
    without = pi(x, minus) * squared + total(lambda z: rest(z) * squared, V, "z") / 2
    left = ends[0] - mean_along(x, plus, minus) - without
    terms = {"ratio": -total(lambda z: rest(z) * ratio(z), V, "z") / 2}
    return claim(left, terms, k, "every d, V, h and W: no displacement at the start for r_max <= 1", tokens_differ)


def gradient_entanglement(k: Factors = one) -> Proof:
    """theory C1: the rates of both log-probabilities, from which the conditions follow."""
    up, down = sp.symbols("d_w d_l")
    responses = [log_prob(plus), log_prob(minus)]
    objective = pair_loss(up, down, *responses)
    common = inner(plus, minus)
    rates = [
        {"own gradient of y+": up * inner(plus, plus), "common gradient, y+": -down * common},
        {"common gradient, y-": up * common, "own gradient of y-": -down * inner(minus, minus)},
    ]
    proofs = [claim(flow(v, objective), terms, k, "") for v, terms in zip(responses, rates, strict=True)]
    return joined(proofs, PREFIXES + ", every differentiable loss of two log-probabilities, one sample")


def _along_direction(z: Expr, ascended: Expr) -> Expr:
    """The derivative of ln pi(z|x) along the gradient of `ascended` with respect to the logits of x."""
    return total(lambda w: sp.diff(log_pi(x, z), L[x, w]) * sp.diff(ascended, L[x, w]), V, "w")


def squeezing(k: Factors = one) -> Proof:
    """theory C4: ascent on -ln pi(y) moves the logits by pi - e_y, and ln pi(z), to first order, by
    pi_z - 1[z=y] - |pi|^2 + pi_y."""
    pushed = -log_pi(x, y)
    squared = total(lambda i: pi(x, i) ** 2, V)
    proofs = [
        claim(sp.diff(pushed, L[x, r]), {"own probability": pi(x, r), "the token pushed": -delta(r, y)}, k, ""),
        claim(_along_direction(r, pushed) - (pi(x, r) - delta(r, y) - squared + pi(x, y)), {}, k, ""),
    ]
    return joined(proofs, SOFTMAX + ", every token, to first order in the step")


def pair_cancels_squeezing(k: Factors = one) -> Proof:
    """theory C4: ascent on a margin in one context moves the logits by e_+ - e_-, and ln pi_+ by 1 - pi_+ + pi_-."""
    margin = log_pi(x, plus) - log_pi(x, minus)
    proofs = [
        claim(sp.diff(margin, L[x, r]), {"y+": delta(r, plus), "y-": -delta(r, minus)}, k, ""),
        claim(_along_direction(plus, margin) - mass(x, plus, minus), {}, k, "", tokens_differ),
    ]
    return joined(proofs, SOFTMAX)


def alpha_bounds(k: Factors = one) -> Proof:
    """Bounds 1, as identities with a sum of squares (or of products of probabilities) left over:
    |E|^2 = 1 - 2 pi + |pi|^2 = 2 (1 - pi)^2 - sum_{i != j} pi_i pi_j, over tokens other than y, and Lagrange's
    <E, F>^2 = |E|^2 |F|^2 - sum_{ij} (E_i F_j - E_j F_i)^2 / 2."""
    E, F = (lambda i: error(x, y, i)), (lambda i: error(b, r, i))
    product = lambda f, g: total(lambda i: f(i) * g(i), V)  # noqa: E731
    rest = lambda i: (1 - delta(i, y)) * pi(x, i)  # noqa: E731
    pairs = total(lambda i: total(lambda j: (1 - delta(i, j)) * rest(i) * rest(j), V, "j"), V)
    cross = total(lambda i: total(lambda j: (E(i) * F(j) - E(j) * F(i)) ** 2, V, "j"), V)
    own = 1 - 2 * pi(x, y) + total(lambda i: pi(x, i) ** 2, V)
    proofs = [
        claim(product(E, E), {"own alpha": own}, k, ""),
        claim(product(E, E) + pairs, {"bound of 2": 2 * (1 - pi(x, y)) ** 2}, k, ""),
        claim(product(E, F) ** 2 + cross / 2, {"bound of lengths": product(E, E) * product(F, F)}, k, ""),
    ]
    return joined(proofs, SOFTMAX + ", every two tokens and contexts")


# ---- second derivatives in the loss's own time, dtau = G dt

tau = sp.Symbol("tau", real=True)
_L, _M, _N = (named(name) for name in ("L_tau", "M_tau", "N_tau"))  # as functions of tau
C = lambda i: delta(i, plus) - delta(i, minus)  # noqa: E731


def _second(quantity: Expr, speed: Callable[[Expr], Expr]) -> Expr:
    """d^2/dtau^2 where the logits move at `speed` and M, N by the closed system; in the letters of the rates."""

    def along_flow(e: Expr) -> Expr:
        def rate(d: sp.Derivative) -> Expr:
            f = d.expr
            if f.func == _L:
                return speed(f.args[0])
            if f.func == _M:  # M' = eta_W (C^T L + L^T C)
                i, j = f.args[:2]
                return eta_W * (C(i) * _L(j, tau) + C(j) * _L(i, tau))
            return 2 * eta_h * (_L(plus, tau) - _L(minus, tau))  # N' = eta_h (C L^T + L C^T)

        return sp.diff(e, tau).replace(lambda d: isinstance(d, sp.Derivative), rate)

    return _letters(along_flow(along_flow(quantity)))


def _letters(e: Expr) -> Expr:
    e = e.replace(_L, lambda i, _: L[x, i])
    return e.replace(_M, lambda i, j, _: M(i, j)).replace(_N, lambda _: N(x, x))


def _log_pi_tau(z: Expr) -> Expr:
    return _L(z, tau) - sp.log(total(lambda j: sp.exp(_L(j, tau)), V, "j"))


def _variance(f: Callable[[Expr], Expr]) -> Expr:
    """Var_pi(f) as a mean of squares less the square of the mean."""
    return total(lambda i: pi(x, i) * f(i) ** 2, V) - total(lambda i: pi(x, i) * f(i), V) ** 2


def start_curvature(k: Factors = one) -> Proof:
    """E4: d^2 ln pi_+/dtau^2 = omega^2 <e_+ - pi, L> + 1.5 omega^2 u (1 - pi_+ + pi_-) - Var_pi(L')."""
    speed = lambda i: eta_h * (_M(i, plus, tau) - _M(i, minus, tau)) + eta_W * _N(tau) * C(i)  # noqa: E731
    omega_2, u = 2 * eta_W * eta_h, L[x, plus] - L[x, minus]
    terms = {
        "logits": omega_2 * (L[x, plus] - total(lambda i: pi(x, i) * L[x, i], V)),
        "margin": sp.Rational(3, 2) * omega_2 * u * mass(x, plus, minus),
        "variance": -_variance(lambda i: _letters(speed(i))),
    }
    return claim(_second(_log_pi_tau(plus), speed), terms, k, TOKENS, tokens_differ)


def concave_with_fixed_unembeddings(k: Factors = one) -> Proof:
    """E4: a position of y+ or y- has d^2 ln pi/dtau^2 = -Var_pi(L') in the context where the responses part, where both
    pull on the logits, and -2 Var_pi(L') in a context of one of them alone; no other context moves."""
    parting = lambda i: eta_h * (M(i, plus) - M(i, minus))  # noqa: E731
    likelihood = lambda v: sp.exp(_L(v, tau)) / total(lambda j: sp.exp(_L(j, tau)), V, "j")  # noqa: E731

    def alone(sign: int) -> Callable[[Expr], Expr]:
        return lambda i: sign * eta_h * total(lambda v: (delta(v, y) - likelihood(v)) * M(v, i), V, "v")

    cases = [(plus, parting, 1), (minus, parting, 1), (y, alone(1), 2), (y, alone(-1), 2)]
    proofs = []
    for z, speed, times in cases:
        terms = {"curvature": -times * _variance(lambda i, speed=speed: _letters(speed(i)))}
        proofs.append(claim(_second(_log_pi_tau(z), speed), terms, k, "", tokens_differ))
    return joined(proofs, "every d and V, every margin loss, one sample, responses of every length")
