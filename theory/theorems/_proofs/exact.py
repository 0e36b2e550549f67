"""The exact solution (E1 to E8) and its identities, proved for every d.

Vectors enter through inner products: a vector is a linear combination of the symbols of a few base vectors, and a
product of two is replaced by an entry of their Gram matrix, which is arbitrary.
"""

from collections.abc import Mapping
from itertools import combinations_with_replacement

import sympy as sp

from theory.theorems._proofs.symbolic import Expr, Factors, Proof, one, weighted

eta_W, eta_h, omega, K, K0, P, Q, x, c, beta = sp.symbols("eta_W eta_h omega K K_0 P Q x c beta", positive=True)
G, u, u0, m, theta, t, lam, step, tau = sp.symbols("G u u_0 m theta t lambda eta tau", real=True)
h, a, s, w = BASE = sp.symbols("h a s w", real=True)  # hidden vector, W_+ - W_-, W_+ + W_-, any other W_z
GRAM = {v * r: sp.Symbol(f"<{v},{r}>", real=True) for v, r in combinations_with_replacement(BASE, 2)}
RATES = {h: eta_h * a, a: 2 * eta_W * h}  # d/dtau, dtau = G dt
roots = {omega: sp.sqrt(2 * eta_W * eta_h)}
p, q = (sp.sqrt(2 * eta_W) * h + sign * sp.sqrt(eta_h) * a for sign in (1, -1))

PAIR = "every d and V, one-token responses, every margin loss"


def dot(v: Expr, r: Expr) -> Expr:
    """<v, r> of two linear combinations of base vectors, in entries of the Gram matrix."""
    product = sp.Poly(sp.expand(v * r), *BASE)
    return sp.Add(*(k * GRAM[sp.Mul(*(b**n for b, n in zip(BASE, e, strict=True)))] for e, k in product.terms()))


def moved(v: Expr, rates: Mapping[Expr, Expr] = RATES) -> Expr:
    """The derivative of a linear combination of base vectors that move at the given rates."""
    return sp.Add(*(sp.diff(v, b) * rate for b, rate in rates.items()))


def zeros(pairs: list[tuple[Expr, dict[str, Expr]]], k: Factors, covers: str) -> Proof:
    """The proof that every left side is the sum of its terms, each times its factor: numerators of the differences."""
    differences = (sp.together(e - weighted(terms, k)) for e, terms in pairs)
    return Proof(tuple(sp.expand(sp.numer(e)) for e in differences), covers)


# ---- the closed system


def _leibniz(e: Expr, rates: Mapping[Expr, Expr]) -> Expr:
    """The derivative of a sum of products of matrices."""
    if isinstance(e, sp.MatAdd):
        return sp.MatAdd(*(_leibniz(part, rates) for part in e.args)).doit()
    if isinstance(e, sp.MatMul):
        k, factors = e.as_coeff_matrices()
        terms = [[*factors[:i], _leibniz(f, rates), *factors[i + 1 :]] for i, f in enumerate(factors)]
        return sp.MatAdd(*(k * sp.MatMul(*f) for f in terms)).doit()
    if isinstance(e, sp.Transpose):
        return sp.Transpose(_leibniz(e.arg, rates)).doit()
    return rates[e]


_V, _n, _d = sp.symbols("V n d", integer=True, positive=True)
W, H, C = sp.MatrixSymbol("W", _V, _d), sp.MatrixSymbol("H", _n, _d), sp.MatrixSymbol("C", _n, _V)
FLOW = {W: eta_W * C.T * H, H: eta_h * C * W}
ANY = "every d, V and number of contexts, every differentiable loss of the logits, token-level ones included"


def _matrix_zeros(pairs: list[tuple[Expr, dict[str, Expr]]], k: Factors, covers: str) -> Proof:
    def difference(e: Expr, terms: dict[str, Expr]) -> Expr:
        right = [sp.nsimplify(k(name), rational=True) * term for name, term in terms.items()]
        left: Expr = sp.expand(sp.MatAdd(e, *(-r for r in right)).doit()).doit()
        return sp.Integer(0) if left.is_ZeroMatrix else left

    return Proof(tuple(difference(e, terms) for e, terms in pairs), covers)


def closed_system(k: Factors = one) -> Proof:
    """E3: L' = eta_h C M + eta_W N C, M' = eta_W (C^T L + L^T C), N' = eta_h (C L^T + L C^T)."""
    logits: Expr = H * W.T
    M, N = W * W.T, H * H.T
    pairs = [
        (logits, {"through h": eta_h * C * M, "through W": eta_W * N * C}),
        (M, {"unembeddings": eta_W * (C.T * logits + logits.T * C)}),
        (N, {"hidden vectors": eta_h * (C * logits.T + logits * C.T)}),
    ]
    return _matrix_zeros([(_leibniz(e, FLOW), terms) for e, terms in pairs], k, ANY)


def balancedness(k: Factors = one) -> Proof:
    """E3: eta_h W^T W - eta_W H^T H does not move."""
    of_W, of_H = (_leibniz(e.T * e, FLOW) for e in (W, H))
    terms = {"unembeddings": eta_h * of_W, "hidden vectors": -eta_W * of_H}
    return _matrix_zeros([(sp.ZeroMatrix(_d, _d), terms)], k, ANY)


# ---- coordinates and path


def hyperbolic(k: Factors = one) -> Proof:
    """E1: p' = omega p, q' = -omega q; I = eta_h |a|^2 - 2 eta_W |h|^2 = -<p, q> stays (E3)."""
    w0 = roots[omega]
    pairs = [
        (moved(p), {"growth": w0 * p}),
        (moved(q), {"decay": -w0 * q}),
        (eta_h * dot(a, a) - 2 * eta_W * dot(h, h) + dot(p, q), {}),
        (eta_h * dot(a, moved(a)) - 2 * eta_W * dot(h, moved(h)), {}),
    ]
    return zeros(pairs, k, PAIR)


def margin_speed(k: Factors = one) -> Proof:
    """E1: K = du/dtau = 2 eta_W |h|^2 + eta_h |a|^2, and K^2 = P Q + 4 omega^2 u^2 (so K >= 2 omega |u|)."""
    speed = dot(moved(a), h) + dot(a, moved(h))
    root_form = {"invariant": dot(p, p) * dot(q, q), "margin": 4 * roots[omega] ** 2 * dot(a, h) ** 2}
    pairs = [
        (speed, {"unembedding": 2 * eta_W * dot(h, h), "hidden": eta_h * dot(a, a)}),
        (speed**2, root_form),
    ]
    return zeros(pairs, k, PAIR)


def margin_bounds(k: Factors = one) -> Proof:
    """pi_+ = sigmoid(u) (pi_+ + pi_-), and the sum is at most 1."""
    first, second, rest = sp.symbols("e_+ e_- R", positive=True)  # exp of logits; R: all others together
    whole = first + second + rest
    sigmoid = 1 / (1 + sp.exp(-(sp.log(first) - sp.log(second))))
    pairs = [
        (first / whole, {"sigmoid": sigmoid * (first + second) / whole}),
        (1 - (first + second) / whole - rest / whole, {}),
    ]
    return zeros(pairs, k, "every V, one-token responses")


def path_formula(k: Factors = one) -> Proof:
    """E2: the path in theta = tanh(omega tau)/omega has velocity (eta_h a, 2 eta_W h) in tau, whatever the loss, and
    theta = 2 m / (K0 + K(u)) is where its margin is u0 + m."""
    growth_h, growth_a = weighted({"growth of h": theta}, k), weighted({"growth of a": theta}, k)
    square, put = omega**2 * theta**2, {omega: roots[omega]}
    ht, at = h + eta_h * growth_h * a, a + 2 * eta_W * growth_a * h  # times sqrt(1 - omega^2 theta^2)
    by_tau = lambda e: (sp.diff(e / sp.sqrt(1 - square), theta) * (1 - square)).subs(put)  # noqa: E731
    margin = u0 * (1 + square) + K0 * theta
    start = {K0: 2 * eta_W * dot(h, h) + eta_h * dot(a, a), u0: dot(a, h)}
    # K^2 - K0^2 = 4 omega^2 (u^2 - u0^2) by E1, as P Q is the same at the start.
    initial = sp.sqrt(K**2 - 4 * omega**2 * m * (m + 2 * u0))
    printed = weighted({"theta": 2 * m / (K0 + K)}, k)
    differences = [
        by_tau(ht) - (eta_h * at / sp.sqrt(1 - square)).subs(put),
        by_tau(at) - (2 * eta_W * ht / sp.sqrt(1 - square)).subs(put),
        dot(at, ht) - margin.subs(put).subs(start),
        (margin - (u0 + m) * (1 - square)).subs(theta, printed).subs(K0, initial),
        sp.diff(sp.tanh(omega * tau) / omega, tau) - 1 + sp.tanh(omega * tau) ** 2,
    ]
    return zeros([(e, {}) for e in differences], k, PAIR + ", all four regimes of the rates, K0 + K > 0")


def trough_bounds(k: Factors = one) -> Proof:
    """E2, E4: D_z = logit_z - logit_+ in x = e^{omega tau}; its stationary points and where it is positive; and
    1/pi_+ = 1 + e^{-u} + sum_z e^{D_z}, between 1 + e^{D*} and 1 + e^{-u0} + (V - 2) e^{D*} where D_z is largest."""
    px, qx, w0 = x * p, q / x, roots[omega]
    hx, ax = (px + qx) / (2 * sp.sqrt(2 * eta_W)), (px - qx) / (2 * sp.sqrt(eta_h))
    inner_p, inner_q = (dot(w - s / 2, v) / (2 * sp.sqrt(2 * eta_W)) for v in (p, q))

    def rival(alpha: Expr, beta: Expr, P: Expr, Q: Expr, omega: Expr) -> dict[str, Expr]:
        growing, falling = -P * x**2 / (8 * omega), Q / x**2 / (8 * omega)
        return {
            "rival's alpha": alpha * x,
            "rival's beta": beta / x,
            "growing part": growing,
            "decaying part": falling,
        }

    al, be = sp.symbols("alpha_z beta_z", real=True)
    D = weighted(rival(al, be, P, Q, omega), k)
    first, second, rest = sp.symbols("e_+ e_- R", positive=True)
    pairs = [
        (dot(w, hx) - dot(s + ax, hx) / 2, rival(inner_p, inner_q, dot(p, p), dot(q, q), w0)),
        (-4 * omega * x**3 * sp.diff(D, x) - (P * x**4 - 4 * omega * al * x**3 + 4 * omega * be * x + Q), {}),
        (-8 * omega * x**2 * D - (P * x**4 - 8 * omega * al * x**3 - 8 * omega * be * x - Q), {}),
        ((first + second + rest) / first - (1 + second / first + rest / first), {}),
    ]
    return zeros(pairs, k, PAIR + ", omega > 0; the bounds are the first and the last identity at the largest D_z")


def light_cone(k: Factors = one) -> Proof:
    """E2: u and K in x = e^{omega tau}, and x^2 = (K + 2 omega u)/P = Q/(K - 2 omega u)."""
    px, qx, w0 = x * p, q / x, roots[omega]
    hx, ax = (px + qx) / (2 * sp.sqrt(2 * eta_W)), (px - qx) / (2 * sp.sqrt(eta_h))
    grown, decayed = dot(p, p) * x**2, dot(q, q) / x**2
    speed, margin = 2 * eta_W * dot(hx, hx) + eta_h * dot(ax, ax), dot(ax, hx)
    pairs = [
        (4 * w0 * margin, {"P": grown, "Q": -decayed}),
        (2 * speed, {"P,": grown, "Q,": decayed}),
        (grown, {"K": speed, "u": 2 * w0 * margin}),
        (decayed, {"K,": speed, "u,": -2 * w0 * margin}),
    ]
    return zeros(pairs, k, PAIR + ", omega > 0")


# ---- clocks


def quadratic_losses_in_time(k: Factors = one) -> Proof:
    """E5: for a quadratic loss, y = x^2 solves dy/dt = 2 omega G y from y(0) = 1; one group frozen: an exponential."""
    end, E, stop = sp.symbols("y_* E u_*", positive=True)
    G_at = lambda v: -sp.diff(c * (u - stop) ** 2 / 2, u).subs(u, v)  # noqa: E731
    margin = lambda y: (P * y - Q / y) / (4 * omega)  # noqa: E731
    rate, of_P, of_Q = (weighted({name: sp.Integer(1)}, k) for name in ("rate", "offset of P", "offset of Q"))
    y = (E * (P * end + Q) - of_Q * Q * (1 - 1 / end)) / (of_P * P * (end - 1) + E * (P + Q / end))
    by_time = sp.diff(y, E) * rate * E * c * (P * end + Q / end) / 2  # E = e^{c K(u*) t}
    frozen = stop + of_P * (u0 - stop) * sp.exp(-rate * c * K0 * t)
    differences = [
        by_time - 2 * omega * y * G_at(margin(y)).subs(stop, margin(end)),
        y.subs(E, 1) - 1,
        sp.diff(frozen, t) - G_at(frozen) * K0,
        frozen.subs(t, 0) - u0,
    ]
    return zeros([(e, {}) for e in differences], k, PAIR.replace("every margin loss", "quadratic losses (IPO, REBEL)"))


def dpo_clock(k: Factors = one) -> Proof:
    """E1: where K is constant, z + expm1(z) = beta^2 K0 t for z = beta (u - u0) if u_ref = u0; in general
    u = u_ref + ln(v)/beta with v + ln v = beta^2 K0 t + beta (u0 - u_ref) + exp(beta (u0 - u_ref))."""
    z, u_ref, v = sp.Symbol("z", real=True), sp.Symbol("u_ref", real=True), sp.Symbol("v", positive=True)
    speed = -sp.diff(sp.log(1 + sp.exp(-beta * (u - u_ref))), u) * K0  # du/dt = G K0
    at = lambda e: sp.expand(speed.subs(u, e), power_exp=True)  # noqa: E731
    clock, wright = z + sp.exp(z) - 1, v + sp.log(v)
    v0 = sp.exp(beta * (u0 - u_ref))
    pairs = [
        (sp.diff(clock, z) * beta * at(u_ref + z / beta), {"clock": beta**2 * K0}),
        (clock.subs(z, 0), {}),
        (sp.diff(wright, v) * beta * v * at(u_ref + sp.log(v) / beta) - beta**2 * K0, {}),
        (wright.subs(v, v0) - beta * (u0 - u_ref) - v0, {}),
    ]
    return zeros(pairs, k, "every d and V, one-token responses, DPO, one group frozen")


def margin_logarithmic(k: Factors = one) -> Proof:
    """Bound 5: beta/2 - G has the sign of m, and d/dt e^{beta m} = beta^2 K - beta K G <= beta^2 Kmax."""
    G_at = -sp.diff(sp.log(1 + sp.exp(-beta * m)), m)
    tanh = (sp.exp(beta * m) - 1) / (sp.exp(beta * m) + 1)  # of beta m/2
    pairs = [
        (G_at + beta / 2 * tanh, {"slope bound": beta / 2}),
        (sp.diff(sp.exp(beta * m), m) * G_at * K + beta * K * G_at, {"logarithm": beta**2 * K}),
    ]
    return zeros(pairs, k, "every d and V, one-token responses, DPO from its reference")


def weight_decay(k: Factors = one) -> Proof:
    """E5: with decay lambda on everything p' = (omega G - lambda) p, so it rests where G = lambda/omega, and there
    pi_+ = 1/(1 + e^{-u} + (V-2) e^{-u/2}) as q, s and the other rows have decayed."""
    rates = {h: eta_h * G * a - lam * h, a: 2 * eta_W * G * h - lam * a, s: -lam * s, w: -lam * w}
    w0, number = roots[omega], sp.Symbol("V", positive=True)
    e = sp.Symbol("e", positive=True)  # e^{u/2}; logits u/2, -u/2, 0, ..., 0
    pairs = [
        (moved(p, rates) + lam * p, {"growth rate": w0 * G * p}),
        (moved(q, rates) + (w0 * G + lam) * q, {}),
        (moved(p, rates).subs(G, lam / w0), {}),
        ((e + 1 / e + number - 2) / e - 1 - 1 / e**2, {"others": (number - 2) / e}),  # 1/pi_+
    ]
    return zeros(pairs, k, "every d and V, one-token responses, every margin loss, equal weight decay, P > 0")


# ---- discrete steps, kernels


def gradient_descent_recursion(k: Factors = one) -> Proof:
    """E6: one step is p <- (1 + eta omega G) p, q <- (1 - eta omega G) q, I <- (1 - omega^2 eta^2 G^2) I."""
    after = {v: v + step * G * rate for v, rate in RATES.items()}
    put = lambda e: e.subs(after, simultaneous=True)  # noqa: E731
    by = step * roots[omega] * G
    before, later = (eta_h * dot(v, v) - 2 * eta_W * dot(r, r) for v, r in ((a, h), (put(a), put(h))))
    pairs = [
        (put(p) - p, {"growth": by * p}),
        (put(q) - q, {"decay": -by * q}),
        (later - before, {"drift": -(by**2) * before}),
    ]
    return zeros(pairs, k, PAIR + ", every step size")


def frozen_group_recursion(k: Factors = one) -> Proof:
    """E6: one group frozen, a step is u <- u + eta K0 G."""
    only_a = dot(a + step * G * RATES[a], h) - dot(a, h)
    only_h = dot(a, h + step * G * RATES[h]) - dot(a, h)
    pairs = [
        (only_a, {"speed": step * G * 2 * eta_W * dot(h, h)}),
        (only_h, {"speed": step * G * eta_h * dot(a, a)}),
    ]
    return zeros(pairs, k, PAIR + ", every step size")


def kernel_path(k: Factors = one) -> Proof:
    """E8: per mode of the kernel a' = 2 eta_W h, h' = k a is solved by cosh and sinh, and k a^2 - 2 eta_W h^2 stays."""
    kappa, a0, h0 = sp.symbols("k a_0 h_0", positive=True)
    of_omega, into_a, into_h, of_invariant = (
        weighted({name: sp.Integer(1)}, k) for name in ("frequency", "into a", "into h", "invariant")
    )
    w0 = of_omega * sp.sqrt(2 * eta_W * kappa)
    ch, sh = sp.cosh(w0 * tau).rewrite(sp.exp), (sp.sinh(w0 * tau).rewrite(sp.exp) / w0 if w0 != 0 else tau)
    at, ht = a0 * ch + into_a * 2 * eta_W * h0 * sh, h0 * ch + into_h * kappa * a0 * sh
    invariant = lambda v, r: kappa * v**2 - of_invariant * 2 * eta_W * r**2  # noqa: E731
    differences = [
        sp.diff(at, tau) - 2 * eta_W * ht,
        sp.diff(ht, tau) - kappa * at,
        invariant(at, ht) - invariant(a0, h0),
    ]
    return zeros([(e, {}) for e in differences], k, PAIR + ", every constant feature kernel")


def kernel_clock(k: Factors = one) -> Proof:
    """E8: a mode adds 2 eta_W h^2 + k a^2 to du/dtau."""
    kappa = sp.Symbol("k", positive=True)
    speed = moved(a * h, {h: kappa * a, a: 2 * eta_W * h})
    terms = {"kernel": kappa * a**2}
    return zeros([(speed - 2 * eta_W * h**2, terms)], k, PAIR + ", every constant feature kernel")


def constant_slope_modes(k: Factors = one) -> Proof:
    """E7: for constant slopes a singular value of B couples one combination of hidden vectors and one of rows."""
    sigma, H0, W0 = sp.symbols("sigma H_0 W_0", positive=True)
    of_omega, exchange = (weighted({name: sp.Integer(1)}, k) for name in ("frequency", "exchange"))
    w0, ratio = of_omega * sigma * sp.sqrt(eta_W * eta_h), sp.sqrt(eta_h / eta_W)
    ch, sh = (f(w0 * t).rewrite(sp.exp) for f in (sp.cosh, sp.sinh))
    Ht, Wt = ch * H0 + exchange * ratio * sh * W0, ch * W0 + exchange * sh * H0 / ratio
    differences = [sp.diff(Ht, t) - eta_h * sigma * Wt, sp.diff(Wt, t) - eta_W * sigma * Ht]
    covers = "every d, V and number of prompts with one-token pairs, constant slopes (in sigma)"
    return zeros([(e, {}) for e in differences], k, covers)


def decoupling(k: Factors = one) -> Proof:
    """E7: for disjoint pairs, the cross products of (a_x, h_x) and (a_y, h_y) obey a linear system, so that those
    that are all zero stay zero and each prompt follows its own path."""
    hx, ax, hy, ay = sp.symbols("h_x a_x h_y a_y", real=True)
    Gx, Gy = sp.symbols("G_x G_y", real=True)
    rates = {hx: eta_h * Gx * ax, ax: 2 * eta_W * Gx * hx, hy: eta_h * Gy * ay, ay: 2 * eta_W * Gy * hy}
    pairs = [
        (moved(hx * hy, rates), {"<a_x, h_y>": eta_h * Gx * ax * hy, "<h_x, a_y>": eta_h * Gy * hx * ay}),
        (moved(hx * ay, rates), {"<a_x, a_y>": eta_h * Gx * ax * ay, "<h_x, h_y>": 2 * eta_W * Gy * hx * hy}),
        (moved(ax * hy, rates), {"<h_x, h_y>": 2 * eta_W * Gx * hx * hy, "<a_x, a_y>": eta_h * Gy * ax * ay}),
        (moved(ax * ay, rates), {"<h_x, a_y>": 2 * eta_W * Gx * hx * ay, "<a_x, h_y>": 2 * eta_W * Gy * ax * hy}),
    ]
    return zeros(pairs, k, "every d and V, every number of prompts with disjoint one-token pairs, every margin loss")
