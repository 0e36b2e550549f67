"""Theorems 4 and 5 term by term: against autodiff, against finite differences along the flow, and in their signs."""

import dataclasses

import numpy as np
import oracles
import pytest
from scipy.special import softmax

from sims import Optimizer, gradient_descent
from theory import ExactFlow, Sample, UnconstrainedFeatures, log_prob_rate
from theory.losses import get
from theory.rates import Rate

LOSSES = [get("dpo", beta=0.7), get("ipo", tau=0.4), get("slic", delta=6.0)]


def random_model(seed: int, V: int = 6, d: int = 4) -> UnconstrainedFeatures:
    rng = np.random.default_rng(seed)
    return UnconstrainedFeatures.single_token(
        rng.standard_normal((V, d)), rng.standard_normal(d), 2, 4, tokens=list("abcdef")[:V]
    )


def rate_by_autodiff(m, loss, z, eta_W=1.0, eta_h=1.0) -> float:
    """One tiny SGD step gives the velocity of W and h; the chain rule through the softmax is written out here."""
    step = gradient_descent(m, loss, Optimizer("sgd", 1.0), 1, eta_W, eta_h)
    dW, dh = step.W[1] - m.W, (step.H[1] - m.H)[0]
    dlogits = dW @ m.h + m.W @ dh
    return float(dlogits[z] - softmax(m.W @ m.h) @ dlogits)


@pytest.mark.parametrize("rates", [(1.0, 1.0), (0.3, 2.0), (0.0, 1.0), (1.0, 0.0)])
@pytest.mark.parametrize("loss", LOSSES, ids=repr)
def test_every_token_against_autodiff(loss, rates):
    for seed in range(5):
        m = random_model(seed)
        for z in range(m.V):
            rate = log_prob_rate(m, loss, z, lr_unembedding=rates[0], lr_hidden=rates[1])
            size = sum(abs(t) for t in rate.terms.values())
            assert abs(rate.total - rate_by_autodiff(m, loss, z, *rates)) <= 1e-12 * (size + 1e-3)
            assert size > 1e-3


def test_against_the_flow_itself():
    m, loss, e = random_model(3), LOSSES[0], 1e-5
    now, one, two = ExactFlow(m, loss, 0.5, 2.0).log_probs([0.0, e, 2 * e])
    slope = (4 * one - 3 * now - two) / (2 * e)
    for z in range(m.V):
        rate = log_prob_rate(m, loss, z, lr_unembedding=0.5, lr_hidden=2.0).total
        assert rate == pytest.approx(slope[z], rel=1e-6, abs=1e-8)


def test_the_terms_are_theorem_4_as_printed():
    """Each term retyped from the paper: m(t), the alignment of W_+ and W_-, the other tokens."""
    m, loss = random_model(1), LOSSES[0]
    W, h, (w, l) = m.W, m.h, m.single_pair
    p = softmax(W @ h)
    G = float(loss.margin(m.samples[0]).slope(h @ (W[w] - W[l])))
    mass = 1 - p[w] + p[l]
    printed = {
        "norms of W_+ and W_-": (1 - p[w]) * W[w] @ W[w] + p[l] * W[l] @ W[l],
        "alignment of W_+ and W_-": -mass * W[w] @ W[l],
        "other tokens, weighted": -sum(p[z] * W[z] @ (W[w] - W[l]) for z in range(m.V) if z not in (w, l)),
        "hidden norm": mass * h @ h,
    }
    seen = log_prob_rate(m, loss).terms
    assert seen.keys() == printed.keys()
    for name, value in printed.items():
        assert seen[name] == pytest.approx(G * value, rel=1e-12)
        # A dropped or doubled term, or a flipped sign, would show in the total.
        assert abs(seen[name]) > 1e-4


def with_gram_change(m: UnconstrainedFeatures, i: int, j: int, change: float) -> UnconstrainedFeatures:
    """A model in which <W_i, W_j> (i != j) or |W_i|^2 has changed by `change`, every logit and other product alike.

    Two rows are given a component along a fresh direction, orthogonal to everything (h included), and, for i = j, the
    component alone changes the norm.
    """
    extra = np.zeros((m.V, 2))
    if i == j:
        extra[i, 0] = np.sqrt(change)
    else:
        # <x_i, x_j> = change with |x_i|, |x_j| whatever they come to: those norms are corrected by the caller.
        extra[i, 0], extra[j, 0] = 1.0, change
    W = np.concatenate([m.W, extra], axis=1)
    return UnconstrainedFeatures.single_token(W, np.concatenate([m.h, [0.0, 0.0]]), *m.single_pair, tokens=m.tokens)


def test_theorems_1_and_2_as_monotonicity():
    """The rate falls with <W_+, W_-> and with every <W_z, W_+ - W_->; ln pi(z) rises with its own alignment."""
    for seed in range(6):
        m, loss = random_model(seed), LOSSES[0]
        w, l = m.single_pair
        base = log_prob_rate(m, loss)
        assert base.sensitivity["<W_+, W_->"] < 0
        assert base.sensitivity["|W_+|^2"] > 0
        assert base.sensitivity["|W_-|^2"] > 0
        assert base.sensitivity["|h|^2"] > 0
        # The numbers themselves: each term is its sensitivity times its inner product.
        W_plus, W_minus = m.W[w], m.W[l]
        norms = base.sensitivity["|W_+|^2"] * W_plus @ W_plus + base.sensitivity["|W_-|^2"] * W_minus @ W_minus
        assert norms == pytest.approx(base.terms["norms of W_+ and W_-"], rel=1e-12)
        assert base.sensitivity["|h|^2"] * m.h @ m.h == pytest.approx(base.terms["hidden norm"], rel=1e-12)
        other = log_prob_rate(m, loss, next(z for z in range(m.V) if z not in (w, l)))
        assert other.sensitivity["|h|^2"] * m.h @ m.h == pytest.approx(other.terms["hidden norm"], rel=1e-12)
        taller = log_prob_rate(with_gram_change(m, w, w, 0.01), loss).total
        assert (taller - base.total) / 0.01 == pytest.approx(base.sensitivity["|W_+|^2"], rel=1e-9)
        e = 1e-3
        # <W_+, W_-> moves by e; |W_+|^2 by 1 and |W_-|^2 by e^2 as side effects, which their sensitivities undo.
        moved = log_prob_rate(with_gram_change(m, w, l, e), loss).total
        still = log_prob_rate(with_gram_change(m, w, l, 0.0), loss).total
        slope = (moved - still - e**2 * base.sensitivity["|W_-|^2"]) / e
        assert slope == pytest.approx(base.sensitivity["<W_+, W_->"], rel=1e-6)
        for z in set(range(m.V)) - {w, l}:
            name = m.name(z)
            assert base.sensitivity[f"<W_{name}, W_+ - W_->"] < 0
            own = log_prob_rate(m, loss, z).sensitivity[f"<W_{name}, W_+ - W_->"]
            assert own > 0
            up = with_gram_change(m, w, z, e)  # <W_z, W_+> and so <W_z, W_+ - W_-> up by e, |W_+|^2 by 1
            none = with_gram_change(m, w, z, 0.0)
            change = log_prob_rate(up, loss).total - log_prob_rate(none, loss).total
            assert change / e == pytest.approx(base.sensitivity[f"<W_{name}, W_+ - W_->"], rel=1e-6)
            gain = log_prob_rate(up, loss, z).total - log_prob_rate(none, loss, z).total
            assert gain / e == pytest.approx(own, rel=1e-6)


def test_probabilities_stay_normalised():
    m = random_model(2)
    p = softmax(m.W @ m.h)
    total = sum(p[z] * log_prob_rate(m, LOSSES[0], z).total for z in range(m.V))
    assert abs(total) < 1e-13


def test_names_and_printing():
    rate = log_prob_rate(random_model(0), LOSSES[0], "b")
    assert isinstance(rate, Rate)
    assert "ln pi(b)" in str(rate)
    assert rate.to_dict()["total"] == rate.total


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: log_prob_rate(m, LOSSES[0], "q"), "response: unknown token 'q'"),
        (lambda m: log_prob_rate(m, LOSSES[0], 17), r"response must be a token index in \[0, 6\), got 17"),
        (lambda m: log_prob_rate(m, LOSSES[0], sample=1), r"sample must be an index in \[0, 1\)"),
        (lambda m: log_prob_rate(m, LOSSES[0], lr_hidden=-1.0), r"lr_hidden must be in \[0, inf\), got -1"),
        (lambda m: log_prob_rate(m, "dpo"), "loss must be a theory.losses.Loss instance, got 'dpo'"),
    ],
)
def test_bad_calls(call, message):
    with pytest.raises(ValueError, match=message):
        call(random_model(0))


def test_the_terms_of_other_tokens_are_theorem_5_as_printed():
    """<W_z, W_+ - W_-> + (pi- - pi+)|h|^2 - sum over every token; for y- itself its own row moves as well."""
    for seed in range(4):
        m, loss = random_model(seed), LOSSES[1]
        W, h, (w, l) = m.W, m.h, m.single_pair
        p, a = softmax(W @ h), W[w] - W[l]
        G = float(oracles.slope_of(loss, m.samples[0].reference_margin)(a @ h))
        for z in set(range(m.V)) - {w}:
            printed = {
                "alignment with W_+ - W_-": 1.7 * W[z] @ a,
                "mean alignment": -1.7 * sum(p[v] * W[v] @ a for v in range(m.V)),
                "hidden norm": 0.6 * (p[l] - p[w] - (z == l)) * h @ h,
            }
            seen = log_prob_rate(m, loss, z, lr_unembedding=0.6, lr_hidden=1.7).terms
            assert seen.keys() == printed.keys()
            for name, value in printed.items():
                assert seen[name] == pytest.approx(G * value, rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("rates", [(1.0, 1.0), (0.3, 2.0), (0.0, 1.0), (1.0, 0.0)])
def test_against_integrated_parameters(rates):
    """The derivative at 0 of a run of scipy on W and h, for every token."""
    m, loss, e = random_model(4), LOSSES[0], 1e-4
    slope = oracles.slope_of(loss, m.samples[0].reference_margin)
    run = oracles.integrated_log_probs(m.W, m.h, *m.single_pair, slope, np.array([0.0, e, 2 * e]), *rates)
    for z in range(m.V):
        rate = log_prob_rate(m, loss, z, lr_unembedding=rates[0], lr_hidden=rates[1]).total
        assert rate == pytest.approx((4 * run[1, z] - 3 * run[0, z] - run[2, z]) / (2 * e), rel=1e-5, abs=1e-7)
        assert abs(rate) > 1e-6


def test_sensitivities_to_norms_by_a_change_of_geometry():
    """|W_+|^2, |W_-|^2 and |h|^2 are lengthened along a direction of their own: every logit and other product stays."""
    e = 1e-2
    for seed in range(4):
        m, loss = random_model(seed), LOSSES[0]
        w, l = m.single_pair
        base = log_prob_rate(m, loss, lr_unembedding=0.6, lr_hidden=1.7)
        for name, row in (("|W_+|^2", w), ("|W_-|^2", l)):
            longer = log_prob_rate(with_gram_change(m, row, row, e), loss, lr_unembedding=0.6, lr_hidden=1.7)
            assert (longer.total - base.total) / e == pytest.approx(base.sensitivity[name], rel=1e-9)
        W = np.concatenate([m.W, np.zeros((m.V, 1))], axis=1)
        longer_h = UnconstrainedFeatures.single_token(W, np.append(m.h, np.sqrt(e)), w, l)
        for z in range(m.V):
            before, after = (log_prob_rate(x, loss, z, lr_unembedding=0.6, lr_hidden=1.7) for x in (m, longer_h))
            assert (after.total - before.total) / e == pytest.approx(before.sensitivity["|h|^2"], rel=1e-9)


def test_a_rate_at_the_minimiser_is_zero_and_beyond_it_changes_sign():
    for gap, sign in ((-0.5, 1), (0.0, 0), (0.5, -1)):
        # u = 2 exactly, IPO's minimiser at u_ref + 1/(2 tau) = 2 - gap
        W, h = np.array([[1.0, 0.5], [-1.0, 0.5], [0.3, 0.2]]), np.array([1.0, 0.7])
        m = UnconstrainedFeatures.single_token(W, h, 0, 1, reference=(1.0 - gap, 0.0))
        rate = log_prob_rate(m, get("ipo", tau=0.5))
        assert np.sign(rate.total) == sign


def test_the_twenty_likeliest_other_tokens_have_a_sensitivity():
    rng = np.random.default_rng(6)
    m = UnconstrainedFeatures.single_token(rng.standard_normal((30, 4)), rng.standard_normal(4), 7, 11)
    p = softmax(m.W @ m.h)
    likeliest = sorted(set(range(30)) - {7, 11}, key=lambda z: -p[z])[:20]
    seen = log_prob_rate(m, LOSSES[0]).sensitivity
    names = [f"<W_{m.name(z)}, W_+ - W_->" for z in likeliest]
    assert list(seen) == ["<W_+, W_->", "|W_+|^2", "|W_-|^2", "|h|^2", *names]
    for z, name in zip(likeliest, names, strict=True):
        assert seen[name] / seen["|W_-|^2"] == pytest.approx(-p[z] / p[11], rel=1e-12)


def test_shares_of_samples_are_rates_of_smaller_data_sets():
    """The objective is a mean: a sample contributes its own rate, divided by their number."""
    rng = np.random.default_rng(9)
    samples = Sample("x", ((0,), (1,))), Sample("x", ((1,), (3,))), Sample("x", ((2, 3), (2, 0)))
    W, H, contexts = rng.standard_normal((5, 3)), rng.standard_normal((2, 3)), (("x", ()), ("x", (2,)))
    alone = [log_prob_rate(UnconstrainedFeatures(W, H, (s,), contexts), LOSSES[0], 4).total for s in samples]
    assert min(map(abs, alone)) > 1e-3
    for count in (1, 2, 3):
        rate = log_prob_rate(UnconstrainedFeatures(W, H, samples[:count], contexts), LOSSES[0], 4)
        assert rate.samples == pytest.approx([a / count for a in alone[:count]], rel=1e-12)


def test_a_rate_of_one_sample_is_that_samples():
    m = random_model(0)
    for z in range(m.V):
        rate = log_prob_rate(m, LOSSES[0], z)
        assert rate.samples == (rate.total,)  # to the last digit
    with pytest.raises(dataclasses.FrozenInstanceError):
        rate.theorem = "theorem_1"
