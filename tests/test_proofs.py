"""Symbolic proofs: exact zeros, no size that is a number, wrong copies that do not vanish, and symbols that mean the code's."""

import inspect
from functools import cache
from itertools import product

import numpy as np
import pytest
import sympy as sp

from theory.losses import MarginForm
from theory.problem import Positions
from theory.theorems import SETTINGS, THEOREMS
from theory.theorems._proofs import conditions, exact, identities, letters, rates
from theory.theorems._proofs.symbolic import L, M, N, V, delta, index, pi, reduce, total
from theory.theorems.shared_prefix import common_prefix


def _proofs():
    for module in (rates, identities, exact, conditions):
        for name, f in vars(module).items():
            if (
                inspect.isfunction(f)
                and f.__module__ == module.__name__
                and list(inspect.signature(f).parameters) == ["k"]
            ):
                yield name, f


PROOFS = dict(_proofs())
FACTORS = (-1.0, 0.0, 2.0)


def one(_):
    return 1.0


def zero(_):
    return 0.0


def only(knob):
    return lambda name: float(name == knob)


@cache
def with_factors(name):
    """(knobs, expressions): the ingredients a proof asks factors for, and its expressions with a symbol for each."""
    knobs = {}
    expressions = PROOFS[name](lambda knob: knobs.setdefault(knob, sp.Symbol(f"factor {knob}"))).expressions
    return list(knobs), expressions


# ---- evaluation at numbers, without sympy's help


class World:
    """Numbers for symbols and functions by name; indices run from 1."""

    def __init__(self, symbols, functions):
        self.symbols, self.functions = symbols, functions

    def value(self, e):
        if isinstance(e, int | float):
            return e
        if e.is_Rational:
            return int(e) if e.is_Integer else float(e)
        if isinstance(e, sp.Symbol):
            return self.symbols[e] if e in self.symbols else self.symbols[e.name]
        if isinstance(e, sp.MatrixSymbol):
            return self.functions[f"matrix {e.name}"]()
        if isinstance(e, sp.Transpose):
            return self.value(e.arg).T
        if isinstance(e, sp.MatMul):
            number, matrices = e.as_coeff_matrices()
            return self.value(number) * np.linalg.multi_dot([*map(self.value, matrices)])
        if isinstance(e, sp.Add | sp.MatAdd):
            return sum(self.value(part) for part in e.args)
        if isinstance(e, sp.Mul):
            out = 1
            for part in e.args:
                out *= self.value(part)
                if out == 0:
                    return 0
            return out
        if isinstance(e, sp.Pow):
            return self.value(e.base) ** self.value(e.exp)
        if isinstance(e, sp.Sum):
            *inner, (i, first, last) = e.limits
            body = sp.Sum(e.function, *inner) if inner else e.function
            out = 0
            for n in range(self.value(first), self.value(last) + 1):
                self.symbols[i] = n
                out += self.value(body)
            return out
        if isinstance(e, delta):
            return int(self.value(e.args[0]) == self.value(e.args[1]))
        if isinstance(e, sp.exp | sp.log | sp.tanh):
            return getattr(np, e.func.__name__)(self.value(e.args[0]))
        if isinstance(e, sp.Indexed):
            return self.functions[str(e.base)](*(self.value(i) for i in e.indices))
        return self.functions[e.func.__name__](*(self.value(x) for x in e.args))


def world_of(problem, x, labels, tokens=None, letters=None):
    """The first model of a problem in the proofs' letters: labels name responses, or tokens are named themselves."""
    W, H = problem.W[0], problem.H[0]
    responses = {100 + i: y for i, y in enumerate(labels.values())}
    d_w, d_l = (d[0] for d in problem.incentives)
    symbols = {
        "V": problem.V, "X": len(H), "D": len(problem.samples), "x": x + 1, "G": d_w[0],
        "eta_W": problem.lr_unembedding, "eta_h": problem.lr_hidden, **(letters or {}),
    }  # fmt: skip
    symbols |= dict(zip(labels, responses, strict=True)) | {name: t + 1 for name, t in (tokens or {}).items()}
    for side, name in enumerate(("plus", "minus")):
        responses |= {(name, s + 1): pair[side] for s, pair in enumerate(problem.pairs)}

    def row(v, k):
        return responses[v].rows[k - 1] + 1

    def of_sample(side):
        return lambda s: problem.pairs[s - 1][side].tokens[0] + 1

    functions = {
        "M": lambda v, w: W[v - 1] @ W[w - 1], "N": lambda c, b: H[c - 1] @ H[b - 1],
        "L": lambda c, i: H[c - 1] @ W[i - 1], "pi": lambda c, i: problem.pi[0, c - 1, i - 1],
        "token": lambda v, k: responses[v].tokens[k - 1] + 1, "place": row, "context": row,
        "n": lambda v: len(responses[v].rows), "plus": lambda s: ("plus", s), "minus": lambda s: ("minus", s),
        "y_+": of_sample(0), "y_-": of_sample(1), "G": lambda s: d_w[s - 1],
        "d_w": lambda s: d_w[s - 1], "d_l": lambda s: d_l[s - 1],
    }  # fmt: skip
    return World(symbols, functions)


class Drawn(dict):
    """Values drawn when first asked for."""

    def __init__(self, draw, known):
        super().__init__(known)
        self.draw = draw

    def __missing__(self, name):
        return self.setdefault(name, self.draw(name))


def random_world(seed=0):
    """Numbers for every letter: 4 tokens, 3 contexts, 2 samples, responses of 2 tokens; the rest drawn when met."""
    rng = np.random.default_rng(seed)

    def number(_):
        return rng.uniform(0.5, 1.5)

    def symmetric(name):
        return lambda v, w: values[name, *sorted((v, w))]

    def context(v, k):
        return 1 + (v + k) % 3

    p, values = rng.dirichlet(np.ones(4), size=3), Drawn(number, {})
    W, H, C = (rng.normal(size=size) for size in ((4, 2), (3, 2), (3, 4)))
    functions = {
        "pi": lambda c, i: p[c - 1, i - 1], "M": symmetric("M"), "N": symmetric("N"), "n": lambda v: 2,
        "place": context, "context": context, "token": lambda v, k: 1 + (3 * v + k) % 4,
        "plus": lambda s: s, "minus": lambda s: s + 2, "y_+": lambda s: 1 + s % 4, "y_-": lambda s: 1 + (s + 2) % 4,
    }  # fmt: skip
    functions |= {"matrix W": lambda: W, "matrix H": lambda: H, "matrix C": lambda: C}
    sizes, fixed = (
        {"V": 4, "X": 3, "D": 2, "d": 2, "size": 3},
        {"x": 1, "j": 1, "v": 2, "z": 3, "z~": 4, "y_+": 1, "y_-": 2},
    )
    symbols = sizes | fixed | {"c": 1 + seed % 3, "r": 1 + seed // 2, "y": 1 + seed % 4}
    return World(Drawn(number, symbols), Drawn(lambda name: lambda *at: values[name, *at], functions))


# ---- the proofs


def test_there_are_proofs_of_many_claims():
    assert len(PROOFS) == sum(1 for _ in _proofs()) >= 40, "or two proofs share a name"
    assert len(set(PROOFS) & set(THEOREMS)) >= 45
    assert THEOREMS["balancedness"].proof() == PROOFS["balancedness"]()


@pytest.mark.parametrize("name", PROOFS)
def test_a_proof_is_an_exact_zero(name):
    proof = PROOFS[name]()
    assert proof.expressions
    assert all(isinstance(e, sp.Integer) and e.is_zero for e in proof.expressions)
    assert "every" in proof.covers


def turned(knob, factor):
    return lambda name: factor if name == knob else 1.0


def expressions_at(name, factors):
    """A proof's expressions with the given factors, which stay symbols where a run for every factor is slow."""
    if PROOFS[name].__module__ == exact.__name__:  # numerators: a factor of 0 may not be put in afterwards
        return PROOFS[name](factors).expressions
    return with_factors(name)[1]


@pytest.mark.parametrize("name", PROOFS)
def test_wrong_copies_do_not_vanish(name):
    """At one of a few random points, with one factor turned at a time."""
    knobs = with_factors(name)[0]
    assert knobs, "a proof names what could be wrong"

    def size(factors):
        expressions, sizes = expressions_at(name, factors), []
        for seed in range(6):
            world = random_world(seed)
            world.symbols.update({f"factor {knob}": factors(knob) for knob in knobs})
            sizes += [np.max(abs(world.value(e))) for e in expressions]
        return max(sizes)

    harmless = getattr(THEOREMS.get(name), "harmless", ())
    assert size(one) < 1e-9
    for knob, factor in product(knobs, FACTORS):
        assert (size(turned(knob, factor)) > 1e-6) == ((knob, factor) not in harmless), f"{knob} times {factor}"


@pytest.mark.parametrize(
    ("name", "knob", "factor"), [("theorem_5", k, f) for k in THEOREMS["theorem_5"].knobs for f in FACTORS]
)
def test_a_wrong_theorem_has_no_proof(name, knob, factor):
    assert THEOREMS[name].proof().holds
    assert not THEOREMS[name].turn(knob, factor).proof().holds


@pytest.mark.parametrize("name", PROOFS)
def test_no_size_is_a_number(name):
    """Sums run to symbols, matrices have symbolic shapes: V, d, lengths and the size of the data are arbitrary."""
    for e in with_factors(name)[1]:
        if isinstance(e, sp.MatrixExpr):
            assert all(isinstance(n, sp.Symbol) for m in e.atoms(sp.MatrixSymbol) for n in m.shape)
        for s in e.atoms(sp.Sum):
            assert all(first == 1 and not last.is_number for _, first, last in s.limits)


@pytest.mark.parametrize("name", sorted(set(PROOFS) & set(THEOREMS)))
def test_factors_are_the_knobs_of_the_claim(name):
    assert set(with_factors(name)[0]) == set(THEOREMS[name].knobs)


# ---- the symbols mean what the code means


def sequences_of(problem, z):
    w, l = problem.pairs[0]
    return world_of(problem, w.rows[0], {"y_+": w, "y_-": l, "z": z}, letters=letters_of(problem))


def letters_of(problem):
    if not problem.has_margin_loss and hasattr(problem.loss, "lam"):  # l(u) - lambda ln pi(y+)
        G = MarginForm(problem.loss.base, problem.reference_margin).slope(problem.margin)
        return {"G": G[0], "lambda": problem.loss.lam}
    if not problem.has_margin_loss:
        mu, G = THEOREMS["proposition_2"]._slopes(problem)
        return {"G": G[0], "mu": mu[0], "lambda_w": problem.loss.lam_w, "lambda_l": problem.loss.lam_l}
    return {}


def tokens_of(problem, z):
    (w, l), x = problem.pairs[0], problem.pairs[0][0].rows[0]
    return world_of(problem, x, {}, {"y_+": w.tokens[0], "y_-": l.tokens[0], "z": z.tokens[0]})


def data_set_of(problem, z):
    assert [w.rows[0] for w, _ in problem.pairs] == list(range(len(problem.samples)))  # context s is prompt s
    return world_of(problem, z.rows[0], {}, {"z": z.tokens[0]})


def parts_of(problem, z):
    w, l = problem.pairs[0]
    b = len(common_prefix(w.tokens, l.tokens))
    head, after_w, after_l = (
        Positions(y.rows[cut], y.tokens[cut]) for y, cut in ((w, slice(b)), (w, slice(b, None)), (l, slice(b, None)))
    )
    return world_of(problem, w.rows[b], {"y_+": after_w, "y_-": after_l, "z": head})


MEANING = [
    ("theorem_4", "single_token", tokens_of),
    ("theorem_5", "single_token", tokens_of),
    ("theorem_6", "sequences", sequences_of),
    ("theorem_7", "sequences", sequences_of),
    ("theorem_8", "data_set", data_set_of),
    ("theorem_9", "data_set", data_set_of),
    ("general_rate", "sequence_data_set", sequences_of),
    ("proposition_1", "sft_regularised", sequences_of),
    ("proposition_2", "weighted", sequences_of),
    ("shared_prefix", "shared_prefix", parts_of),
]


def instance(name, setting, seed):
    """A random problem of the setting in which the theorem applies, with both groups trained."""
    rng = np.random.default_rng(seed)
    while True:
        problem = SETTINGS[setting](rng, 1)
        moving = problem.lr_unembedding > 0 and problem.lr_hidden > 0 and problem.incentives[0].all()
        third = problem.probe[1] != problem.samples[0].dispreferred  # proofs about another token leave y- out
        if moving and third and THEOREMS[name].applies(problem).all():
            return problem


@pytest.mark.parametrize(("name", "setting", "world_for"), MEANING)
def test_symbols_mean_what_the_code_means(name, setting, world_for, monkeypatch):
    """The flow side is the code's rate, and every printed term the code's, before and after reduction."""
    problem, theorem = instance(name, setting, 1), THEOREMS[name]
    z = theorem.response(problem)
    world, rate, scale = world_for(problem, z), problem.rate(z)[0], problem.rate_scale(z)[0]
    assert scale > 0
    flow = PROOFS[name](zero).expressions[0]
    assert abs(world.value(flow) - rate) < 1e-12 * scale
    monkeypatch.setattr(letters, "reduce", lambda e, facts=None: e)
    unreduced = {knob: PROOFS[name](only(knob)).expressions[0] for knob in theorem.knobs}
    flow = world.value(PROOFS[name](zero).expressions[0])
    assert abs(flow - rate) < 1e-12 * scale
    terms = theorem.terms(problem, z)
    for knob, e in unreduced.items():
        assert abs(flow - world.value(e) - terms[knob][0]) < 1e-12 * scale, knob


def test_the_world_tells_a_wrong_symbol(monkeypatch):
    problem = instance("theorem_4", "single_token", 0)
    z = THEOREMS["theorem_4"].response(problem)
    world = tokens_of(problem, z)
    flow = PROOFS["theorem_4"](zero).expressions[0]
    M_there = world.functions["M"]
    world.functions["M"] = lambda v, w: M_there(v, w) + (v == w == world.symbols["y_+"])
    assert abs(world.value(flow) - problem.rate(z)[0]) > 1e-6 * problem.rate_scale(z)[0]


# ---- the reducer


i, j, k, c, b, v, w = (index(name) for name in "ijkcbvw")


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        (total(lambda i: delta(i, v) * M(i, w), V), M(v, w)),
        (total(lambda i: pi(c, i), V), 1),
        (total(lambda i: total(lambda j: pi(c, i) * pi(c, j), V), V), 1),
        (M(v, w) - M(w, v), 0),
        (total(lambda i: pi(c, i) * M(i, v), V) ** 2 - total(lambda j: pi(c, j) * M(v, j), V) ** 2, 0),
        (total(lambda i: total(lambda j: pi(c, i) * pi(b, j) * M(i, j), V), V) - total(lambda i: total(lambda j: pi(b, i) * pi(c, j) * M(j, i), V), V), 0),
        (total(lambda i: sp.exp(L[c, i]) * M(i, v), V) / total(lambda i: sp.exp(L[c, i]), V) - total(lambda i: pi(c, i) * M(i, v), V), 0),
    ],
)  # fmt: skip
def test_reduction_finds_identities(expression, expected):
    assert reduce(expression) == expected


@pytest.mark.parametrize(
    "expression",
    [
        total(lambda i: pi(c, i) ** 2, V) - 1,
        total(lambda i: pi(c, i) * M(i, v), V) - M(v, v),
        total(lambda i: pi(c, i), V) - total(lambda i: pi(c, i) * pi(b, i), V),
        total(lambda i: M(i, i), V) - total(lambda i: total(lambda j: M(i, j), V), V),
        total(lambda i: pi(c, i) * M(i, v), V) ** 2 - total(lambda i: pi(c, i) ** 2 * M(i, v) ** 2, V),
        total(lambda i: pi(c, i), V) - total(lambda i: pi(i, c), V),
        delta(v, w),
        N(c, b) - N(c, c),
    ],
)  # fmt: skip
def test_reduction_keeps_what_differs(expression):
    assert reduce(expression) != 0


def test_reduction_refuses_what_it_cannot_read():
    with pytest.raises(ValueError, match="sums from 1"):
        reduce(sp.Sum(pi(c, i), (i, 0, V)))
    with pytest.raises(ValueError, match="divide by a normaliser"):
        reduce(1 / total(lambda i: M(i, v), V))


def test_reduction_uses_facts_for_deltas_only():
    assert reduce(delta(v, w) * M(v, w), lambda x, y: sp.Integer(0)) == 0
    assert reduce(M(v, w), lambda x, y: sp.Integer(0)) == M(v, w)
    assert reduce(total(lambda k: delta(k, 1) * N(k, c), V), lambda x, y: sp.Integer(0)) == N(1, c)
