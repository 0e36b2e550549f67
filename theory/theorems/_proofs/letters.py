"""The letters that theorems on rates are proved in: an arbitrary loss, the flow, and the paper's inner products."""

from collections.abc import Callable, Iterable

import sympy as sp

from theory.theorems._proofs.symbolic import (
    Expr,
    Factors,
    Facts,
    L,
    Letter,
    M,
    N,
    Proof,
    V,
    delta,
    eta_h,
    eta_W,
    index,
    pi,
    reduce,
    total,
    weighted,
)

G, lam, lam_w, lam_l, mu = sp.symbols("G lambda lambda_w lambda_l mu")
X, D = (sp.Symbol(s, integer=True, positive=True) for s in ("X", "D"))  # contexts and samples
x, plus, minus, other, another = (index(s) for s in ("x", "y_+", "y_-", "z", "z~"))


def named(name: str) -> Expr:
    """A function of whatever it is called with, for instance of the sample."""
    return sp.Function(name)


slope, d_w, d_l, n = (named(s) for s in ("G", "d_w", "d_l", "n"))
response_plus, response_minus, y_plus, y_minus = (named(s) for s in ("plus", "minus", "y_+", "y_-"))  # of a sample

TOKENS = "every d and V, every differentiable margin loss, one-token responses"
SEQUENCES = "every d and V, every differentiable margin loss, responses of every length"
PREFIXES = "every d and V, responses of every length that share any prefix"


class loss(Letter):
    """An arbitrary differentiable l(u), the last argument; the first names -l'(u)."""

    nargs = 2

    def fdiff(self, argindex: int = 1) -> Expr:
        slope: Expr = self.args[0]
        return -slope


class pair_loss(Letter):
    """An arbitrary differentiable L(a, b), the last two arguments; the first two name -dL/da and dL/db."""

    nargs = 4

    def fdiff(self, argindex: int = 1) -> Expr:
        names: Expr = self.args
        return -names[0] if argindex == 3 else names[1]


class token(Letter):
    """The k-th token of response v."""

    nargs = 2


class place(Letter):
    """The context that the k-th token of response v is predicted from."""

    nargs = 2


class context(Letter):
    """The same for responses to one prompt x, from which their first tokens are predicted."""

    nargs = 2

    @classmethod
    def eval(cls, v: Expr, k: Expr) -> Expr | None:
        return x if k == 1 else None


def tokens_differ(v: Expr, w: Expr) -> Expr | None:
    """y+ and y- (of one sample) are two tokens, and z, z~ are others."""
    of_one_sample = {v.func, w.func} == {y_plus, y_minus} and v.args == w.args
    return sp.Integer(0) if of_one_sample or {v, w} <= {plus, minus, other, another} else None


def first_tokens_differ(v: Expr, w: Expr) -> Expr | None:
    """The responses differ at the first token, so that all their other contexts differ."""
    if isinstance(v, token) and isinstance(w, token) and v.args[1] == w.args[1] == 1:
        return sp.Integer(0)
    if isinstance(v, context) and isinstance(w, context):
        (r, k), (s, l) = v.args, w.args
        return delta(k, l) if r == s else delta(k, 1) * delta(l, 1)
    for a, b in ((v, w), (w, v)):
        if isinstance(a, context) and b == x:
            return delta(a.args[1], 1)
    return None


# ---- the flow


def log_pi(c: Expr, i: Expr) -> Expr:
    """ln softmax(L[c])_i."""
    return L[c, i] - sp.log(total(lambda j: sp.exp(L[c, j]), V, "j"))


def log_prob(v: Expr, where: type[Letter] = place) -> Expr:
    """ln pi of response v, of length n(v)."""
    return total(lambda k: log_pi(where(v, k), token(v, k)), n(v), "k")


def flow(quantity: Expr, objective: Expr) -> Expr:
    """d/dt of a function of the logits under gradient flow of the objective, in inner products."""
    c, i, w = (sp.Dummy(s, integer=True) for s in "ciw")
    C = -sp.diff(objective, L[c, w])
    gradient = sp.diff(quantity, L[c, i])

    def speed(b: Expr, j: Expr) -> Expr:  # L' = eta_h C M + eta_W N C
        through_h = total(lambda v: C.xreplace({c: b, w: v}) * M(v, j), V, "v")
        through_W = total(lambda a: N(b, a) * C.xreplace({c: a, w: j}), X, "a")
        return eta_h * through_h + eta_W * through_W

    return total(lambda b: total(lambda j: gradient.xreplace({c: b, i: j}) * speed(b, j), V), X, "b")


def claim(left: Expr, terms: dict[str, Expr], k: Factors, covers: str, facts: Facts | None = None) -> Proof:
    """The proof that `left` is the sum of the terms (each times its factor): their difference in normal form."""
    return Proof((reduce(left - weighted(terms, k), facts),), covers)


def joined(proofs: Iterable[Proof], covers: str) -> Proof:
    """Several identities as one claim."""
    return Proof(tuple(e for proof in proofs for e in proof.expressions), covers)


# ---- what the theorems are written in


def error(c: Expr, y: Expr, i: Expr) -> Expr:
    """The i-th entry of e_y - pi(.|c)."""
    return delta(y, i) - pi(c, i)


def along(v: Expr, w: Expr, z: Expr) -> Expr:
    """<W_z, W_v - W_w>."""
    return M(z, v) - M(z, w)


def mean_along(c: Expr, v: Expr, w: Expr) -> Expr:
    """sum_z pi(z|c) <W_z, W_v - W_w>."""
    return total(lambda z: pi(c, z) * along(v, w, z), V, "z")


def mass(c: Expr, v: Expr, w: Expr) -> Expr:
    """1 - pi(v|c) + pi(w|c)."""
    return 1 - pi(c, v) + pi(c, w)


def norms(c: Expr, v: Expr, w: Expr) -> Expr:
    """(1 - pi(v)) |W_v|^2 + pi(w) |W_w|^2."""
    return (1 - pi(c, v)) * M(v, v) + pi(c, w) * M(w, w)


def others_along(c: Expr, v: Expr, w: Expr) -> Expr:
    """sum over z other than v, w of pi(z|c) <W_z, W_v - W_w>."""
    return total(lambda z: (1 - delta(z, v)) * (1 - delta(z, w)) * pi(c, z) * along(v, w, z), V, "z")


def S(c: Expr, v: Expr, w: Expr) -> Expr:
    """The paper's eq. 3."""
    return -mass(c, v, w) * M(v, w) - others_along(c, v, w)


def positions(v: Expr, w: Expr, f: Callable[[Expr, Expr], Expr]) -> Expr:
    """sum over positions k of v and l of w."""
    return total(lambda k: total(lambda l: f(k, l), n(w), "l"), n(v), "k")


def hidden(v: Expr, w: Expr, of_v: type[Letter] = place, of_w: type[Letter] = place) -> Expr:
    """sum_{k,l} <e_{v_k} - pi(.|v_<k), e_{w_l} - pi(.|w_<l)> <h_{v_<k}, h_{w_<l}>: alphas and hidden vectors."""

    def term(k: Expr, l: Expr) -> Expr:
        c, b = of_v(v, k), of_w(w, l)
        return N(c, b) * total(lambda i: error(c, token(v, k), i) * error(b, token(w, l), i), V)

    return positions(v, w, term)


def embeddings(v: Expr, k: Expr, w: Expr, l: Expr, where: type[Letter] = place) -> Expr:
    """<W_{v_k} - Wbar_{v_<k}, W_{w_l} - Wbar_{w_<l}>."""
    c, b = where(v, k), where(w, l)
    product = lambda i, j: error(c, token(v, k), i) * error(b, token(w, l), j) * M(i, j)  # noqa: E731
    return total(lambda i: total(lambda j: product(i, j), V, "j"), V)


def unembedding(v: Expr, w: Expr) -> Expr:
    """sum over positions in one and the same context of <W_{v_k} - Wbar, W_{w_l} - Wbar>."""
    return positions(v, w, lambda k, l: delta(place(v, k), place(w, l)) * embeddings(v, k, w, l))


def inner(v: Expr, w: Expr) -> Expr:
    """<grad ln pi(v), grad ln pi(w)> in the metric of the rates."""
    return eta_W * hidden(v, w) + eta_h * unembedding(v, w)
