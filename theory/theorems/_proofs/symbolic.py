"""Exact reduction of expressions with indexed sums of symbolic length, for proofs that hold for every size.

A proof is written in inner products, M(v, w) = <W_v, W_w> and N(c, c~) = <h_c, h_c~>, so the dimension d never occurs;
sums over the vocabulary, over positions, contexts and samples run to symbolic lengths, so those are arbitrary, too.
sympy differentiates such sums, but has no normal form for them. `reduce` brings one about:

    distribute products over sums, sum_i delta_{i,w} f(i) = f(w) (every index named lies in its range),
    sum_i pi(i|c) = 1, and rename what is left of the bound indices in one canonical order.

Only indices of one kind are ever equated. Two expressions whose difference reduces to 0 are equal; the converse need
not hold (no other identity is known here).
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import sympy as sp


@dataclass(frozen=True)
class Proof:
    """Expressions that must reduce to exact zeros. `covers`: for which sizes and losses they prove the claim."""

    expressions: tuple[Any, ...]
    covers: str

    @property
    def holds(self) -> bool:
        """Whether every expression is the number 0."""
        return all(e == 0 for e in self.expressions)


Expr = Any  # sympy's own types tell a checker little
Facts = Callable[[Expr, Expr], Expr | None]
Factors = Callable[[str], float]

V = sp.Symbol("V", integer=True, positive=True)
eta_W, eta_h = sp.symbols("eta_W eta_h", nonnegative=True)
L: Expr = sp.IndexedBase("L")  # logits, context by token
delta: Expr = sp.KroneckerDelta


class Letter(sp.Function):
    """A function with a name and a fixed number of arguments."""

    def __new__(cls, *arguments: Expr) -> Expr:
        return super().__new__(cls, *arguments)


class pi(Letter):
    """pi(i|c), the probability of token i in context c."""

    nargs = 2


class Z(Letter):
    """The normaliser of context c, sum_i exp L[c, i]."""

    nargs = 1


class Symmetric(Letter):
    """A function of two arguments in any order."""

    nargs = 2

    @classmethod
    def eval(cls, x: Expr, y: Expr) -> Expr | None:
        return cls(y, x) if sp.default_sort_key(x) > sp.default_sort_key(y) else None


class M(Symmetric):
    """<W_v, W_w>."""


class N(Symmetric):
    """<h_c, h_c~>."""


def index(name: str) -> Expr:
    """An index of a sum, or a fixed token, context, position or sample."""
    return sp.Symbol(name, integer=True)


def total(f: Callable[[Expr], Expr], length: Expr, name: str = "i") -> Expr:
    """sum_{i=1}^{length} f(i), unevaluated, with an index of its own."""
    i = sp.Dummy(name, integer=True)
    return sp.Sum(f(i), (i, 1, length))


def one(_: str) -> float:
    """Every ingredient as it is (see `Theorem.k`)."""
    return 1.0


def weighted(terms: dict[str, Expr], k: Factors) -> Expr:
    """The sum of the terms, each times the (exact) factor of its name."""
    return sp.Add(*(sp.nsimplify(k(name), rational=True) * term for name, term in terms.items()))


class Term(NamedTuple):
    """coefficient * product of factors, summed over the binders (index -> length)."""

    coefficient: Expr
    factors: tuple[Expr, ...]
    binders: dict[sp.Symbol, Expr]


def reduce(expression: Expr, facts: Facts | None = None) -> Expr:
    """The normal form of a polynomial in pi, M, N, delta, symbols and sums of these.

    facts : what is known of a delta(x, y) that no sum resolves (an expression, or None), e.g. that two tokens differ.
    """
    expression = probabilities(expression)
    out: dict[Any, Expr] = {}
    for term in _terms(expression):
        for t in _contracted(term, facts):
            key, monomial = _canonical(t)
            coefficient, _ = out.get(key, (sp.Integer(0), None))
            out[key] = coefficient + t.coefficient, monomial
    return sp.Add(*(sp.cancel(c) * monomial for c, monomial in out.values()))


def probabilities(expression: Expr) -> Expr:
    """exp L[c, i] = Z(c) pi(i|c), the definition of pi."""
    is_weight = lambda e: isinstance(e, sp.exp) and isinstance(e.args[0], sp.Indexed)  # noqa: E731
    return expression.replace(is_weight, lambda e: Z(e.args[0].indices[0]) * pi(*e.args[0].indices))


def _terms(e: Expr) -> Iterator[Term]:
    """The expression with all products distributed and all sums opened, their indices renamed apart."""
    if isinstance(e, sp.Add):
        for part in e.args:
            yield from _terms(part)
    elif isinstance(e, sp.Mul):
        for parts in itertools.product(*(list(_terms(part)) for part in e.args)):
            yield _product(parts)
    elif isinstance(e, sp.Pow) and e.exp.is_Integer and e.exp > 0 and not e.base.is_Atom:
        for parts in itertools.product(*(list(_terms(e.base)) for _ in range(int(e.exp)))):
            yield _product(parts)
    elif isinstance(e, sp.Pow) and e.has(sp.Sum):  # 1 / sum_i exp L[c, i]
        base = reduce(e.base)
        if base.has(sp.Sum) or not isinstance(base, Z):
            raise ValueError(f"expression must divide by a normaliser only, got 1/({base})")
        yield Term(sp.Integer(1), (base**e.exp,), {})
    elif isinstance(e, sp.Sum):
        *inner, (i, first, length) = e.limits  # the last is the outermost
        if first != 1:
            raise ValueError(f"expression must have sums from 1, got {e}")
        fresh = sp.Dummy(i.name, integer=True)
        body = sp.Sum(e.function, *inner) if inner else e.function
        for t in _terms(body.xreplace({i: fresh})):
            yield Term(t.coefficient, t.factors, {fresh: length, **t.binders})
    elif e.is_Rational:
        yield Term(e, (), {})
    else:
        yield Term(sp.Integer(1), (e,), {})


def _product(parts: tuple[Term, ...]) -> Term:
    """The product of terms; opening a sum twice must give two indices, so bound ones are renamed."""
    binders: dict[sp.Symbol, Expr] = {}
    factors: list[Expr] = []
    for part in parts:
        fresh = {i: sp.Dummy(i.name, integer=True) for i in part.binders}
        binders.update({fresh[i]: sp.sympify(n).xreplace(fresh) for i, n in part.binders.items()})
        factors += [f.xreplace(fresh) for f in part.factors]
    return Term(sp.Mul(*(p.coefficient for p in parts)), tuple(factors), binders)


def _contracted(term: Term, facts: Facts | None) -> Iterator[Term]:
    """Deltas summed away or replaced by what is known of them, and probabilities that sum to one."""
    if 0 in term.factors:
        return
    for f in term.factors:
        if not isinstance(f, delta):
            continue
        x, y = f.args
        for bound, value in ((x, y), (y, x)):
            if bound in term.binders and not value.has(bound):
                put = {bound: value}
                binders = {i: sp.sympify(n).xreplace(put) for i, n in term.binders.items() if i != bound}
                rest = list(term.factors)
                rest.remove(f)
                factors = _split(g.xreplace(put) for g in rest)
                yield from _contracted(Term(term.coefficient, factors, binders), facts)
                return
        known = facts(x, y) if facts else None
        if known is not None:
            rest = list(term.factors)
            rest.remove(f)
            for part in _terms(known):
                yield from _contracted(_joined(term, rest, part), facts)
            return
    for f in term.factors:
        if isinstance(f, pi) and f.args[1] in term.binders:
            i, rest = f.args[1], list(term.factors)
            rest.remove(f)
            if not any(g.has(i) for g in rest) and not f.args[0].has(i):
                binders = {j: n for j, n in term.binders.items() if j != i}
                yield from _contracted(Term(term.coefficient, tuple(rest), binders), facts)
                return
    yield term


def _joined(term: Term, rest: list[Expr], part: Term) -> Term:
    return Term(term.coefficient * part.coefficient, _split((*rest, *part.factors)), {**term.binders, **part.binders})


def _split(factors: Any) -> tuple[Expr, ...]:
    """Factors one by one (a substitution may turn a delta into 1)."""
    return tuple(g for f in factors for g in sp.Mul.make_args(f) if g != 1)


def _canonical(term: Term) -> tuple[Any, Expr]:
    """A key equal for terms that differ in the names of bound indices only, and the sum it stands for."""
    bound = list(term.binders)
    free = [f for f in term.factors if not f.has(*bound)] if bound else list(term.factors)
    inside = [f for f in term.factors if bound and f.has(*bound)]
    best: Any = None
    for order in itertools.permutations(range(len(bound))):
        names = {b: sp.Symbol(f"_{n}", integer=True) for b, n in zip(bound, order, strict=True)}
        product = sp.Mul(*(f.xreplace(names) for f in inside))
        limits = tuple(sorted((names[b].name, str(sp.sympify(n).xreplace(names))) for b, n in term.binders.items()))
        key = (limits, sp.srepr(product))
        if best is None or key < best[0]:
            ranges = [(names[b], 1, sp.sympify(n).xreplace(names)) for b, n in term.binders.items()]
            ranges.sort(key=lambda r: (not r[2].has(*names.values()), r[0].name))  # inner sums first
            best = key, sp.Sum(product, *ranges) if ranges else product
    outside = sp.Mul(*free)
    return (*best[0], outside), outside * best[1]
