"""Sequences, shared prefixes and data sets: the general gradient formula, rates by name, combined losses, bad input."""

import dataclasses
from dataclasses import FrozenInstanceError, dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import log_softmax

from sims import Optimizer, gradient_descent, gradient_descent_batch, gradient_flow, gradient_flow_batch
from sims.objective import pick_device
from sims.routes import Autodiff
from theory import Problem, Sample, SolverError, UnconstrainedFeatures, log_prob_rate
from theory.losses import SFT, Pair, PerToken, Sum, TokenLoss, Weighted, get
from theory.model import contexts_of
from theory.theorems import SETTINGS, THEOREMS
from theory.theorems.theorem_6 import alphas

DPO = get("dpo", beta=0.7)


def model_of(samples, seed=0, V=5, d=3, extra=()):
    """A random model of the samples' contexts, and of further (prompt, prefix) contexts."""
    rng = np.random.default_rng(seed)
    contexts = [*contexts_of(samples), *extra]
    hidden = {c: rng.standard_normal(d) for c in contexts}
    return UnconstrainedFeatures.from_samples(rng.standard_normal((V, d)), hidden, samples)


def log_prob_of(W, H, model, response, prompt):
    """ln pi(response | prompt) at other parameters, a loop of its own."""
    total = 0.0
    for k, token in enumerate(response):
        row = model.contexts.index((prompt, tuple(response[:k])))
        total += log_softmax(W @ H[row])[token]
    return total


def gradient(model, response, prompt, e=1e-6):
    """Central differences of ln pi(response | prompt) in every entry of W and H."""
    out = []
    for which in (0, 1):
        x = [model.W.astype(float), model.H.astype(float)]
        g = np.zeros_like(x[which])
        for i in np.ndindex(g.shape):
            ends = []
            for sign in (1, -1):
                y = [v.copy() for v in x]
                y[which][i] += sign * e
                ends.append(log_prob_of(*y, model, response, prompt))
            g[i] = (ends[0] - ends[1]) / (2 * e)
        out.append(g)
    return out


SHARED = (Sample("x", ((0, 1, 2), (0, 1, 3, 3))), Sample("x", ((0, 4), (2,))), Sample("z", ((1,), (1, 1, 0))))


@pytest.mark.parametrize(
    ("v", "w"),
    [
        (((0, 1, 2), "x"), ((0, 1, 3, 3), "x")),  # a shared prefix
        (((0, 1, 2), "x"), ((0, 1, 2), "x")),  # the same response
        (((1, 1, 0), "z"), ((1,), "z")),  # one a prefix of the other
        (((0, 4), "x"), ((1,), "z")),  # other prompts
        (((2,), "x"), ((0, 1, 3, 3), "x")),
    ],
)
def test_inner_products_of_gradients(v, w):
    m = model_of(SHARED)
    p = Problem.of(m, DPO, 0.6, 1.7)
    gv, gw = gradient(m, *v), gradient(m, *w)
    wanted = 0.6 * (gv[0] * gw[0]).sum() + 1.7 * (gv[1] * gw[1]).sum()
    seen = p.inner(p.positions(*v), p.positions(*w))
    assert seen.shape == (1,)
    assert seen[0] == pytest.approx(wanted, rel=1e-7, abs=1e-7)
    parts = p.overlap(p.positions(*v), p.positions(*w))
    assert parts.alpha.shape == parts.hidden.shape == parts.unembedding.shape == (1, len(v[0]), len(w[0]))
    assert abs(parts.alpha).max() <= 2
    same = [[(v[1], v[0][:k]) == (w[1], w[0][:l]) for l in range(len(w[0]))] for k in range(len(v[0]))]
    assert ((parts.unembedding[0] != 0) == np.array(same)).all()


def test_the_alphas_of_theorem_3_are_inner_products_of_errors():
    samples = (Sample("x", ((0, 2), (1, 2, 4))),)
    p = Problem.of([model_of(samples, seed) for seed in (0, 1, 2)], DPO)
    (w, l), (of_minus, of_plus) = p.pairs[0], alphas(p)
    np.testing.assert_allclose(of_minus, p.overlap(w, l).alpha, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(of_plus, p.overlap(w, w).alpha, rtol=1e-12, atol=1e-14)
    assert abs(of_plus).min() > 1e-3


def test_errors_keep_their_digits_at_certainty():
    m = UnconstrainedFeatures.single_token([[40.0, 0], [0, 1], [0, -1]], [1.0, 0.3], 0, 1)
    p = Problem.of(m, DPO)
    E = p.errors(p.pairs[0][0])[0, 0]
    assert E[0] == pytest.approx(np.exp(0.3 - 40) + np.exp(-0.3 - 40), rel=1e-12)
    assert abs(E.sum()) < 1e-15 * E[0]


def test_margins_keep_their_digits_in_shared_contexts():
    m = UnconstrainedFeatures.single_token([[1.0, 0.5], [-1.0, 0.5], [0.3, 0.2]], [1.0, 0.7], 0, 1)
    assert Problem.of(m, DPO).margin[0] == 2.0
    p = Problem.of(model_of(SHARED), DPO)
    for i, s in enumerate(SHARED):
        u = p.model(0).log_prob(s.preferred, s.prompt) - p.model(0).log_prob(s.dispreferred, s.prompt)
        assert p.margins[0, i] == pytest.approx(u, rel=1e-13)


@pytest.mark.parametrize("loss", [DPO, get("ipo", tau=0.3), SFT(DPO, 0.4), Weighted(DPO, 0.5, 1.3)], ids=repr)
@pytest.mark.parametrize(("y", "sample"), [(None, 0), (None, 2), ((0, 1, 3, 3), 0), ((4, 1), 1), ((1, 1, 0), 2)])
def test_rates_against_the_flow(loss, y, sample):
    """The derivative at 0 of a simulated flow, for trained and untrained responses to every prompt."""
    m = model_of(SHARED, extra=[("x", (4,))])
    prompt = SHARED[sample].prompt
    response = SHARED[sample].preferred if y is None else y
    e = 1e-4
    run = gradient_flow(m, loss, [0.0, e, 2 * e], 0.6, 1.7).log_probs(response, prompt)
    rate = log_prob_rate(m, loss, y, sample, lr_unembedding=0.6, lr_hidden=1.7)
    assert rate.total == pytest.approx((4 * run[1] - 3 * run[0] - run[2]) / (2 * e), rel=1e-5, abs=1e-6)
    assert abs(rate.total) > 1e-3
    assert sum(rate.samples) == pytest.approx(rate.total, rel=1e-12)
    assert len(rate.samples) == 3
    assert rate.theorem == "general_rate"


ONE = {
    "theorem_4": ((Sample("x", ((0,), (1,))),), None),
    "theorem_5": ((Sample("x", ((0,), (1,))),), 3),
    "theorem_6": ((Sample("x", ((0, 2), (1, 1, 4))),), None),
    "theorem_7": ((Sample("x", ((0, 2), (1, 1, 4))),), (3, 3)),
    "shared_prefix": ((Sample("x", ((0, 2), (0, 1, 4))),), None),
    "theorem_8": ((Sample("x", ((0,), (1,))), Sample("z", ((1,), (0,)))), None),
    "theorem_9": ((Sample("x", ((0,), (1,))), Sample("z", ((1,), (0,)))), (4,)),
}


@pytest.mark.parametrize("name", ONE)
def test_terms_are_named_by_the_theorem_that_covers_them(name):
    samples, response = ONE[name]
    m = model_of(samples, extra=[("x", (3,))])
    rate = log_prob_rate(m, DPO, response, lr_unembedding=0.6, lr_hidden=1.7)
    assert rate.theorem == name
    assert tuple(rate.terms) == THEOREMS[name].knobs
    p = Problem.of(m, DPO, 0.6, 1.7)
    y = samples[0].preferred if response is None else response
    assert rate.total == pytest.approx(float(p.rate(p.positions(y, "x"))[0]), rel=1e-12)
    assert name in str(rate)
    assert rate.to_dict()["theorem"] == name


@pytest.mark.parametrize(
    ("name", "responses", "probe", "holds"),
    [
        ("theorem_7", ((0, 2), (1, 1, 4)), (3,), True),
        ("theorem_7", ((0, 2), (1, 1, 4)), (0,), False),  # z starts like y+
        ("theorem_7", ((0, 2), (1, 1, 4)), (1,), False),  # z starts like y-
        ("theorem_7", ((0, 2), (0, 1, 4)), (3,), False),  # y+ starts like y-
        ("theorem_8", ((0,), (1,), (2, 3)), (3,), True),  # a third response plays no part
        ("theorem_8", ((0,), (1, 3)), (3,), False),
        ("theorem_9", ((0,), (1,)), (3,), True),
        ("theorem_9", ((0, 2), (1,)), (3,), False),
        ("theorem_9", ((0,), (1,)), (3, 4), False),  # z of two tokens
        ("shared_prefix", ((0, 2), (0, 3), (4, 1)), (3,), True),
        ("shared_prefix", ((1,), (1, 1, 0)), (3,), False),  # y+ is a prefix of y-
    ],
)
def test_hypotheses(name, responses, probe, holds):
    p = Problem.of(model_of([Sample("x", responses)]), DPO, probe=("x", probe))
    assert THEOREMS[name].applies(p).tolist() == [holds]


def test_propositions_name_their_terms():
    m = model_of(ONE["theorem_6"][0])
    sft, weighted = (log_prob_rate(m, loss) for loss in (SFT(DPO, 0.4), Weighted(DPO, 0.5, 1.3)))
    assert (sft.theorem, weighted.theorem) == ("proposition_1", "proposition_2")
    assert sft.terms["SFT term"] > 0
    assert weighted.terms["gamma term"] < 0  # lambda+ < lambda-
    bare = log_prob_rate(m, DPO)
    assert sft.total - sft.terms["SFT term"] == pytest.approx(bare.total, rel=1e-12)


def test_names_of_tokens_in_a_response():
    m = model_of(SHARED)
    named = UnconstrainedFeatures(m.W, m.H, m.samples, m.contexts, tokens=list("abcde"))
    assert log_prob_rate(named, DPO, ("a", "b", "c")).total == log_prob_rate(m, DPO, (0, 1, 2)).total
    assert log_prob_rate(named, DPO, "a").response == "a"
    assert log_prob_rate(named, DPO, ["a", 1]).response == "a+b"
    assert log_prob_rate(m, DPO, np.int64(0)).total == log_prob_rate(m, DPO, (0,)).total


def test_a_large_float32_matrix_gives_the_same_rates():
    rng = np.random.default_rng(3)
    W = rng.standard_normal((9000, 3)).astype(np.float32)
    samples = (Sample("x", ((0, 5000), (1,))), Sample("z", ((2,), (3,))))
    hidden = {c: rng.standard_normal(3) for c in contexts_of(samples)}
    small = UnconstrainedFeatures.from_samples(W, hidden, samples)
    wide = UnconstrainedFeatures.from_samples(W.astype(float), hidden, samples)
    for y in (None, (1,)):
        assert log_prob_rate(small, DPO, y).total == pytest.approx(log_prob_rate(wide, DPO, y).total, rel=1e-12)
    # W^T E = W_y - sum_z pi(z) W_z, alone and in a batch
    other = UnconstrainedFeatures.from_samples(W[::-1].copy(), hidden, samples)
    for models in ([small], [other, small], [other, small, other]):
        p = Problem.of(models, DPO)
        y = p.pairs[0][0]
        seen = p.embeddings(y)
        assert len(seen) == len(models)
        for i, m in enumerate(models):
            wide_W = m.W.astype(float)
            wanted = wide_W[list(y.tokens)] - p.pi[i, y.rows] @ wide_W
            np.testing.assert_allclose(seen[i], wanted, rtol=1e-11, atol=1e-11)


def with_references(samples, seed=4):
    """The samples with references of their own: no two log-probabilities of a sample are equal."""
    rng = np.random.default_rng(seed)
    return tuple(Sample(s.prompt, s.responses, tuple(-rng.uniform(1, 5, 2))) for s in samples)


def test_a_loss_sees_the_lengths_of_every_sample():
    """Weights of 1/length, sample by sample: Proposition 2 for each."""
    m = model_of(with_references(SHARED))
    seen = log_prob_rate(m, PerToken(DPO), (0, 1, 2)).samples
    assert len(seen) == 3
    for share, s in zip(seen, m.samples, strict=True):
        problem = Problem.of(
            UnconstrainedFeatures(m.W, m.H, (s,), m.contexts),
            Weighted(DPO, 1 / len(s.preferred), 1 / len(s.dispreferred)),
        )
        assert share == pytest.approx(problem.rate(problem.positions((0, 1, 2), "x"))[0] / 3, rel=1e-12)


# ---- the scale of residuals


def test_sizes_of_incentives_are_theirs_and_what_rounding_of_the_margin_makes_of_them():
    """|d| + |d'| (|a| + |b| + |a_ref| + |b_ref|), the derivative by hand: G' = -2 for IPO, -beta^2 sigma sigma' for DPO."""
    m = model_of(with_references(SHARED))
    logs = [[m.log_prob(y, s.prompt) for y in s.responses] for s in m.samples]
    size = np.array([sum(map(abs, (*ab, *s.reference))) for ab, s in zip(logs, m.samples, strict=True)])
    mm = np.array([a - b - s.reference_margin for (a, b), s in zip(logs, m.samples, strict=True)])
    ipo, sigma = get("ipo", tau=0.3), 1 / (1 + np.exp(0.7 * mm))
    G = 1 / 0.3 - 2 * mm
    for loss, w, l, steepness in (
        (ipo, G, G, 2.0),
        (SFT(ipo, 0.4), G + 0.4, G, 2.0),
        (DPO, 0.7 * sigma, 0.7 * sigma, 0.49 * sigma * (1 - sigma)),
    ):
        p = Problem.of(m, loss)
        for seen, d in zip(p.incentive_sizes, (w, l), strict=True):
            np.testing.assert_allclose(seen[0], abs(d) + steepness * size, rtol=1e-6)


@pytest.mark.parametrize("z", [((0, 1, 3, 3), "x"), ((2,), "x"), ((1, 1, 0), "z")])
def test_the_scale_of_a_rate_is_the_sum_of_its_absolute_terms(z):
    """Every error e_y - pi written out as V + 1 terms, and every product of two of them counted with its size."""
    p = Problem.of(model_of(with_references(SHARED)), get("ipo", tau=0.3), 0.6, 1.7)
    W, H = p.W[0], p.H[0]

    def parts(y, k):
        row = y.rows[k]
        return [(1.0, y.tokens[k]), *((-q, v) for v, q in enumerate(p.pi[0, row]))], row

    def scale(v, w):
        total = 0.0
        for k in range(len(v.tokens)):
            for l in range(len(w.tokens)):
                (one, i), (other, j) = parts(v, k), parts(w, l)
                for c, s in one:
                    for e, t in other:
                        total += 0.6 * abs(c * e) * (s == t) * abs(H[i]) @ abs(H[j])
                        total += 1.7 * abs(c * e) * (i == j) * np.linalg.norm(W[s]) * np.linalg.norm(W[t])
        return total

    probe, (sizes_w, sizes_l) = p.positions(*z), p.incentive_sizes
    wanted = sum(sizes_w[0, i] * scale(probe, w) + sizes_l[0, i] * scale(probe, l) for i, (w, l) in enumerate(p.pairs))
    assert p.rate_scale(probe) == pytest.approx([wanted / len(p.pairs)], rel=1e-12)
    assert abs(p.rate(probe)[0]) < wanted


# ---- several models at once


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("loss", [DPO, Weighted(DPO, 0.5, 1.3)], ids=repr)
def test_a_batch_of_models_is_its_members(loss, count):
    models = [model_of(SHARED, seed) for seed in range(count)]
    p = Problem.of(models, loss, 0.6, 1.7)
    assert len(p) == count
    z, vectors = p.pairs[0][0], np.random.default_rng(1).standard_normal((count, 3))
    for i, m in enumerate(models):
        one = Problem.of(m, loss, 0.6, 1.7)
        for seen, wanted in (
            (p.W, m.W[None]),
            (p.H, m.H[None]),
            (p.margins, one.margins),
            (p.log_pi, one.log_pi),
            (p.incentives[1], one.incentives[1]),
            (p.errors(z), one.errors(z)),
            (p.rate(z), [log_prob_rate(m, loss, lr_unembedding=0.6, lr_hidden=1.7).total]),
            (p.rate_scale(z), one.rate_scale(z)),
            (p.products(vectors), (m.W @ vectors[i])[None]),
            (p.references, [[s.reference for s in m.samples]]),
        ):
            np.testing.assert_allclose(seen[i], wanted[0], rtol=1e-12, atol=1e-15)
        assert p.model(i).samples == m.samples
        np.testing.assert_array_equal(p.model(i).H, m.H)


def test_one_model_is_not_copied():
    m = model_of(SHARED)
    assert np.shares_memory(Problem.of(m, DPO).W, m.W)
    narrow = UnconstrainedFeatures(m.W, m.H.astype(np.float32), m.samples, m.contexts)
    assert Problem.of(narrow, DPO).H.dtype == np.float64


def test_defaults_of_a_problem():
    """Learning rates of 1, and the first sample's prompt."""
    m = model_of(ONE["theorem_8"][0])
    p = Problem.of(m, DPO)
    assert (p.lr_unembedding, p.lr_hidden) == (1.0, 1.0)
    bare = Problem(p.W, p.H, p.samples, p.contexts, p.references, DPO)
    assert (bare.lr_unembedding, bare.lr_hidden) == (1.0, 1.0)
    assert p.positions(4) == p.positions((4,), "x") != p.positions((4,), "z")
    assert log_prob_rate(m, DPO).total == log_prob_rate(m, DPO, lr_unembedding=1.0, lr_hidden=1.0).total
    assert "_rows" not in repr(p)
    with pytest.raises(FrozenInstanceError):
        p.lr_hidden = 2.0
    assert len({p, p, bare}) == 2, "a problem is itself, whatever its arrays hold"


def test_responses_after_the_second_play_no_part_in_a_loss_of_pairs():
    two, three = Sample("x", ((0, 1), (0, 2))), Sample("x", ((0, 1), (0, 2), (0, 3)))
    p, q = (Problem.of(model_of([s]), DPO) for s in (two, three))
    assert q.references.shape == (1, 1, 2)
    assert q.model(0).samples == q.samples  # but they are kept, for losses of several responses
    assert q.rate(q.pairs[0][0]) == p.rate(p.pairs[0][0])
    assert log_prob_rate(model_of([three]), DPO).terms == log_prob_rate(model_of([two]), DPO).terms


# ---- defined behaviour of odd data


def test_a_sample_twice_is_the_same_as_once():
    """The objective is a mean: a duplicated data set has the rates of the single one."""
    once, twice = model_of(SHARED), model_of(SHARED + SHARED)
    assert once.contexts == twice.contexts
    for y in ((0, 1, 2), (2,)):
        assert log_prob_rate(twice, DPO, y).total == pytest.approx(log_prob_rate(once, DPO, y).total, rel=1e-12)


def test_a_response_that_is_a_prefix_of_the_other():
    """y+ = (1,), y- = (1, 1, 0): the shared token trains nothing, and y+ moves only through hidden vectors and W."""
    m = model_of((SHARED[2],))
    fixed_W = log_prob_rate(m, DPO, lr_unembedding=0.0)
    assert fixed_W.total == 0.0
    moving = log_prob_rate(m, DPO)
    run = gradient_flow(m, DPO, [0.0, 1e-4]).log_probs()
    assert moving.total == pytest.approx((run[1] - run[0]) / 1e-4, rel=1e-2)
    assert moving.total != 0
    swapped = model_of((Sample("z", ((1, 1, 0), (1,))),))
    run = gradient_flow(swapped, DPO, [0.0, 1e-4]).log_probs()
    assert log_prob_rate(swapped, DPO).total == pytest.approx((run[1] - run[0]) / 1e-4, rel=1e-2)


def test_responses_of_any_length_in_one_data_set():
    samples = (Sample("a", ((0,), (1, 2, 3, 4))), Sample("b", ((2, 2, 2), (3,))))
    m = model_of(samples)
    assert len(m.contexts) == 7
    assert np.isfinite(log_prob_rate(m, DPO, (1, 2, 3, 4)).total)


# ---- bad input


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: log_prob_rate(m, DPO, ()), "response must not be empty"),
        (lambda m: log_prob_rate(m, DPO, (0, 9)), r"response must be a token index in \[0, 5\), got 9"),
        (lambda m: log_prob_rate(m, DPO, (0, 5)), r"response must be a token index in \[0, 5\), got 5"),
        (lambda m: log_prob_rate(m, DPO, (3, 1)), r"visits the context \('x', \(3,\)\), which has no hidden vector"),
        (lambda m: log_prob_rate(m, DPO, 0.5), "response must be a token index or name, got 0.5"),
        (lambda m: log_prob_rate(m, DPO, "a"), "response is the name 'a', but tokens was not given"),
        (lambda m: log_prob_rate(m, DPO, sample=3), r"sample must be an index in \[0, 3\) of the model's 3 sample"),
        (lambda m: log_prob_rate(m, DPO, sample=-1), "sample must be an index"),
        (lambda m: log_prob_rate(m, DPO, sample=True), "sample must be an index"),
        (lambda m: log_prob_rate(m, None), "loss must be a theory.losses.Loss instance, got None"),
        (lambda m: log_prob_rate(m, DPO, lr_unembedding=np.nan), "lr_unembedding must be in"),
        (lambda m: Problem.of([], DPO), "models must not be empty"),
        (lambda m: Problem.of([m, model_of(SHARED[:1])], DPO), "model 1 differs from model 0"),
        (lambda m: gradient_flow_batch([], DPO, [0.0]), "models must not be empty"),
        (lambda m: gradient_descent_batch([], DPO, Optimizer("sgd", 0.1), 1), "models must not be empty"),
        (lambda m: gradient_flow_batch([m], DPO, [0.0], device="tpu7"), "device must be one that torch has here, got 'tpu7'"),
        (lambda m: UnconstrainedFeatures.from_samples(m.W, m.H, ()), "samples must not be empty"),
        (lambda m: UnconstrainedFeatures.from_samples(m.W, {}, SHARED), "hidden has no vector for context"),
        (lambda m: UnconstrainedFeatures.from_samples(m.W, m.H[:2], SHARED), "H must have shape"),
        (lambda m: Sample("x", ((), (1,))), r"responses\[0\] must not be empty"),
        (lambda m: Sample("x", ((1, 2), (1, 2))), "must differ"),
        (lambda m: SFT(DPO, 1.0, per="word"), "per must be one of sequence, token, batch_token, got 'word'"),
        (lambda m: SFT(DPO, -1.0), "lam must be in"),
        (lambda m: Weighted(DPO, 0.0, 1.0), "lam_w must be in"),
        (lambda m: Weighted("dpo", 1.0, 1.0), "base must be a loss of the two log-probabilities"),
    ],
)  # fmt: skip
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call(model_of(SHARED))


def test_a_flow_that_cannot_get_on_gives_up(monkeypatch):
    """Two hinges that pull one margin to and fro across a kink: no smooth flow, and no endless integration."""
    monkeypatch.setattr("sims.flow.MAX_EVALUATIONS", 300)
    m = model_of(SHARED)
    with pytest.raises(SolverError, match="stuck at t ="):
        gradient_flow(m, get("slic", delta=1e6), [200.0])


# ---- combined losses


@given(st.floats(-5, 5), st.floats(-5, 5), st.floats(0.1, 3))
def test_combined_losses_reduce(a, b, lam):
    y = Pair(np.float64(a), np.float64(b), 0.3, -0.2)
    assert Weighted(DPO, 1.0, 1.0).value(y) == pytest.approx(DPO.value(y), rel=1e-12)
    assert SFT(DPO, lam).value(y) == pytest.approx(DPO.value(y) - lam * a, rel=1e-12, abs=1e-12)
    d_w, d_l = SFT(DPO, lam).incentives(y)
    assert d_w - d_l == pytest.approx(lam, rel=1e-9)
    seen = Weighted(DPO, lam, 2.0)
    by_hand = np.logaddexp(0, -0.7 * (lam * (a - 0.3) - 2.0 * (b + 0.2)))
    assert seen.value(y) == pytest.approx(by_hand, rel=1e-12)
    w, l = seen.incentives(y)
    assert w * 2.0 == pytest.approx(l * lam, rel=1e-9)
    assert SFT(DPO, lam).margin(Sample("x", ((0,), (1,)), (0.0, 0.0))) is None


@pytest.mark.parametrize("loss", [SFT(DPO, 0.4), Weighted(DPO, 0.5, 1.3)], ids=repr)
def test_combined_losses_are_frozen(loss):
    with pytest.raises(FrozenInstanceError):
        loss.base = get("ipo")


def test_combined_losses_have_latex():
    assert "SFT" in repr(SFT(DPO, 0.5))
    sft = r"- a \lambda - \log{\left(\sigma\left(\beta \left(a - a_{\mathrm{ref}} - b + b_{\mathrm{ref}}\right)\right) \right)}"
    assert SFT(DPO, 0.5).latex() == sft
    assert r"\lambda_{w}" in Weighted(DPO, 0.5, 1.5).latex()


# ---- batches equal their members


@pytest.mark.parametrize("setting", ["single_token", "sequence_data_set", "shared_prefix"])
def test_a_batched_flow_is_its_members(setting):
    p = SETTINGS[setting](np.random.default_rng(2), 3)
    models = [p.model(i) for i in range(3)]
    together = gradient_flow_batch(models, DPO, [0.0, 0.4], 0.6, 1.2, device="cpu")
    steps = gradient_descent_batch(models, DPO, Optimizer("adam", 0.05), 5, 0.6, 1.2)
    for m, run, trained in zip(models, together, steps, strict=True):
        alone = gradient_flow(m, DPO, [0.0, 0.4], 0.6, 1.2)
        np.testing.assert_allclose(run.W, alone.W, rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(run.H, alone.H, rtol=1e-9, atol=1e-9)
        assert abs(alone.W[1] - alone.W[0]).max() > 1e-3
        single = gradient_descent(m, DPO, Optimizer("adam", 0.05), 5, 0.6, 1.2)
        np.testing.assert_array_equal(trained.W, single.W)
        np.testing.assert_array_equal(trained.times, single.times)
    for y, i in ((p.samples[0].preferred, 1), (p.samples[0].dispreferred, 2)):
        one = Problem.of(models[i], p.loss, p.lr_unembedding, p.lr_hidden)
        prompt = p.samples[0].prompt
        z, own = p.positions(y, prompt), one.positions(y, prompt)
        assert p.rate(z)[i] == pytest.approx(one.rate(own)[0], rel=1e-12)
        assert p.take(slice(i, i + 1)).rate(z)[0] == pytest.approx(p.rate(z)[i], rel=1e-12)


def test_the_default_device_is_there():
    assert pick_device(None).type in ("cpu", "cuda")
    assert pick_device("cpu").type == "cpu"


# ---- losses of tokens and of several responses


@dataclass(frozen=True)
class Tokenwise(TokenLoss):
    """Log-ratios, KL with a stopped gradient, sum of squares of a third response: something of everything."""

    name = "tokenwise"
    reference = "tests"
    tex = "L"

    def formula(self, ops, y):
        w, l, *rest = y.responses
        kl = (l.kl * (1 - l.log_ratio)).sum(-1) - ops.detach(w.kl * w.ref).sum(-1)  # position by position
        m = w.log_ratio.sum(-1) - l.log_ratio.sum(-1) - 0.5 * kl
        m = m + 0.1 * (w.hidden.sum(-1) * w.log_prob).sum(-1)
        for r, reward in zip(rest, y.rewards[2:], strict=True):
            m = m + (0.3 + reward) * r.log_sum_sq.sum(-1)
        return -ops.log_sigmoid(0.7 * m)


TOKENWISE = [
    Sample("x", ((0, 1, 2), (0, 2), (3, 1)), rewards=(1, 0, 0.5)),
    Sample("y", ((1,), (2, 0))),
]


def moved_from_reference(rates=(0.7, 1.3)):
    rng = np.random.default_rng(4)
    models = []
    for _ in range(3):
        start = model_of(TOKENWISE, seed=int(rng.integers(1000)))
        W, H = (x + 0.3 * rng.normal(size=x.shape) for x in (start.W, start.H))
        models.append(start.with_parameters(W, H))
    return Problem.of(models, Tokenwise(), *rates)


@pytest.mark.parametrize("rates", [(0.7, 1.3), (0.0, 1.0), (1.0, 0.0)])
def test_rates_of_a_token_loss_are_those_of_autodiff(rates):
    problem = moved_from_reference(rates)
    for sample in problem.groups:
        for z in sample:
            exact = Autodiff().rate(problem, z)
            np.testing.assert_allclose(problem.rate(z), exact, rtol=1e-11, atol=1e-12)
            assert (abs(exact) > 1e-3).any()
            assert (problem.rate_scale(z) >= abs(exact)).all()
    one = problem.take(slice(1, 2))
    np.testing.assert_allclose(one.rate(z), problem.rate(z)[1:2], rtol=1e-12)
    assert log_prob_rate(one.model(0), Tokenwise(), lr_unembedding=rates[0], lr_hidden=rates[1]).total == pytest.approx(
        float(one.rate(one.pairs[0][0])[0]), rel=1e-11
    )


def test_a_response_that_the_loss_does_not_look_at_plays_no_part():
    problem = Problem.of(model_of(TOKENWISE), get("tdpo1"))
    third = problem.groups[0][2].rows[1]  # a context that only the third response visits
    assert (problem.pulls[:, :, third] == 0).all()
    z = problem.pairs[0][0]
    np.testing.assert_allclose(problem.rate(z), Autodiff().rate(problem, z), rtol=1e-11)


def test_a_token_loss_needs_the_reference_model_itself():
    m = model_of(TOKENWISE)
    stated = [dataclasses.replace(s, reference=(-3.0,) * len(s.responses)) for s in TOKENWISE]
    other = UnconstrainedFeatures.from_samples(m.W, m.H, stated)
    for call in (lambda: Problem.of(other, Tokenwise()).pulls, lambda: gradient_flow(other, Tokenwise(), [1.0])):
        with pytest.raises(ValueError, match="compares tokens with the reference model"):
            call()


def test_the_reference_model_stays_where_training_began():
    m = model_of(TOKENWISE)
    end = gradient_flow(m, Tokenwise(), [0.0, 2.0]).at(-1)
    assert abs(end.W - m.W).max() > 1e-3
    np.testing.assert_array_equal(end.origin[0], m.W)
    # A restart midway is one run: the reference is data, not the start of the flow.
    whole = gradient_flow(m, Tokenwise(), [0.0, 2.0, 5.0]).at(-1)
    again = gradient_flow(end, Tokenwise(), [3.0]).at(-1)
    np.testing.assert_allclose(again.W, whole.W, rtol=1e-8, atol=1e-9)
    forgetful = dataclasses.replace(
        end, origin=None, samples=tuple(dataclasses.replace(s, reference=None) for s in m.samples)
    )
    assert abs(gradient_flow(forgetful, Tokenwise(), [3.0]).at(-1).W - whole.W).max() > 1e-3


@pytest.mark.parametrize(
    ("rewards", "message"),
    [((1.0,), "rewards must hold a finite number per response"), ((1.0, np.nan, 0.0), "rewards must hold a finite")],
)
def test_bad_rewards(rewards, message):
    with pytest.raises(ValueError, match=message):
        Sample("x", ((0,), (1,), (2,)), rewards=rewards)


# ---- losses that couple the samples of a batch


@pytest.mark.parametrize(
    "loss",
    [SFT(DPO, 0.4, "batch_token"), SFT(DPO, 0.4, "token"), PerToken(DPO), Sum((DPO, PerToken(DPO)), (0.5, 2.0))],
    ids=repr,
)
def test_rates_of_combined_losses_are_those_of_autodiff(loss):
    samples = [Sample("x", ((0, 1, 2), (0, 2))), Sample("y", ((1,), (2, 0)))]
    problem = Problem.of([model_of(samples, seed=s) for s in (1, 2)], loss, 0.7, 1.3)
    for z in problem.pairs[0]:
        exact = Autodiff().rate(problem, z)
        np.testing.assert_allclose(problem.rate(z), exact, rtol=1e-11, atol=1e-12)
        assert (abs(exact) > 1e-3).any()


def test_normalisations_of_the_sft_term():
    """By hand: y+ of 3 tokens and of 1."""
    y = Pair(np.array([-3.0, -5.0]), np.array([-4.0, -1.0]), n_w=np.array([3, 1]), n_l=np.array([2, 2]))
    base = DPO.value(y)
    for per, term in (("sequence", [3.0, 5.0]), ("token", [1.0, 5.0]), ("batch_token", [1.5, 2.5])):
        np.testing.assert_allclose(SFT(DPO, 0.4, per).value(y) - base, 0.4 * np.array(term), rtol=1e-12)
    assert SFT(DPO, 0.4, "batch_token").coupled
    assert not SFT(DPO, 0.4, "token").coupled


@pytest.mark.parametrize(("lengths", "has"), [(((0, 1), (0, 2)), True), (((0, 1), (2,)), False)])
def test_a_length_normalised_loss_has_a_margin_form_when_lengths_are_equal(lengths, has):
    m = model_of([Sample("x", lengths)])
    form = PerToken(get("cdpo", beta=0.7)).margin(m.samples[0])
    assert (form is not None) == has
    if form is None:
        return
    u = np.linspace(-3, 4, 7)
    y = Pair(u - 2.0, -2.0, *m.samples[0].reference, 2, 2)
    np.testing.assert_allclose(form.value(u), PerToken(get("cdpo", beta=0.7)).value(y), rtol=1e-12)
    np.testing.assert_allclose(form.slope(u), PerToken(get("cdpo", beta=0.7)).incentives(y)[0], rtol=1e-11)
    np.testing.assert_allclose(np.exp(form.log_slope(u)), abs(form.slope(u)), rtol=1e-11)
    least = form.minimiser
    assert form.value(least) < min(form.value(least - 0.01), form.value(least + 0.01))
    assert form.zeros == (least,)


def test_a_model_at_its_reference_is_exactly_there():
    """DPOP has a kink at the reference: which side a start is on must not hang on the order of a sum."""
    sample = [Sample("x", ((0, 1, 2, 3, 1), (0, 4, 2, 2, 1, 3)))]
    differing = 0
    for seed in range(40):
        problem = Problem.of(model_of(sample, seed=seed), get("dpop"))
        w = problem.pairs[0][0]
        differing += float(problem.log_prob(w)[0]) != float(problem.references[0, 0, 0])
        d_w, d_l = problem.incentives
        assert d_w == d_l
        np.testing.assert_allclose(Autodiff().rate(problem, w), problem.rate(w), rtol=1e-9)
    assert differing > 5


def test_a_sum_claims_what_its_weights_leave():
    nll = get("nll")
    turned = Sum((DPO, nll), (-1.0, 1.0)).claims
    assert (turned.convex, turned.decreasing, turned.nonnegative) == (False, False, False)
    assert Sum((DPO, nll), (0.0, 1.0)).claims.reference_free  # DPO takes no part
    assert not Sum((DPO, nll), (1.0, 1.0)).claims.reference_free
    assert Sum((DPO, nll), (1.0, 2.0)).claims.convex
