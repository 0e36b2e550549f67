"""CHES and the alphas: against float64, against the other form of each formula, and against states that break others."""

import builtins
from dataclasses import FrozenInstanceError

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from theory import Sample, UnconstrainedFeatures, ches
from theory.ches import (
    ches_score,
    ches_scores,
    edit_similarity,
    last_hidden_inner_product,
    sample_terms,
    sequence_terms,
)
from theory.model import contexts_of

NUMBERS = st.floats(-4, 4, allow_subnormal=False).map(lambda x: 0.0 if abs(x) < 1e-6 else x)


@st.composite
def pairs(draw, longest=6, widest=5):
    d = draw(st.integers(1, widest))
    return tuple(draw(hnp.arrays(np.float64, (draw(st.integers(1, longest)), d), elements=NUMBERS)) for _ in "+-")


def definition(plus, minus, normalize=False):
    """Definitions 2 and 3 as printed, in float64."""
    S_plus, S_minus = (np.asarray(x, dtype=np.float64).sum(0) / (len(x) if normalize else 1) for x in (plus, minus))
    return S_plus @ S_minus - S_plus @ S_plus


def size(plus, minus):
    """N+ (N+ + N-), the scale of the stated error; N the sum of the norms."""
    N_plus, N_minus = (np.linalg.norm(np.asarray(x, dtype=np.float64), axis=1).sum() for x in (plus, minus))
    return N_plus * (N_plus + N_minus)


# ---- the score


@given(pairs(), st.booleans())
def test_is_the_definition(pair, normalize):
    assert ches_score(*pair, normalize) == pytest.approx(definition(*pair, normalize), abs=1e-13 * (1 + size(*pair)))


@given(pairs(), st.randoms())
def test_the_order_of_positions_does_not_matter(pair, random):
    shuffled = [x[random.sample(range(len(x)), len(x))] for x in pair]
    assert ches_score(*shuffled) == pytest.approx(ches_score(*pair), abs=1e-13 * (1 + size(*pair)))


@given(pairs(), st.sampled_from([-2.0, 0.25, 8.0]), st.booleans())
def test_scales_with_the_square(pair, c, normalize):
    assert ches_score(*(c * x for x in pair), normalize) == pytest.approx(
        c**2 * ches_score(*pair, normalize), rel=1e-12
    )


@given(pairs())
def test_of_a_response_with_itself_is_zero(pair):
    assert ches_score(pair[0], pair[0]) == 0
    assert ches_score(pair[0], pair[0], length_normalize=True) == 0


@given(pairs())
def test_of_a_prefix_is_the_product_with_the_rest(pair):
    short, rest = pair
    long, tolerance = np.concatenate(pair), 1e-12 * (1 + size(*pair))
    assert ches_score(short, long) == pytest.approx(short.sum(0) @ rest.sum(0), abs=tolerance)
    assert ches_score(long, short) == pytest.approx(-long.sum(0) @ rest.sum(0), abs=tolerance)


def test_single_tokens_of_one_prompt_score_zero():
    h = np.random.default_rng(0).normal(size=(1, 5))
    assert ches_score(h, h.copy()) == 0


WRONG = {
    "sign flipped": lambda p, m: -definition(p, m),
    "mean in place of sum": lambda p, m: definition(p, m, True),
    "last state dropped": lambda p, m: definition(p[:-1], m[:-1]),
    "y+ and y- exchanged": lambda p, m: definition(m, p),
    "square of S-": lambda p, m: p.sum(0) @ m.sum(0) - m.sum(0) @ m.sum(0),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_scores_are_seen(name):
    rng = np.random.default_rng(1)
    plus, minus = rng.normal(size=(4, 3)), rng.normal(size=(6, 3))
    assert abs(WRONG[name](plus, minus) - definition(plus, minus)) > 1e-3 * size(plus, minus)
    assert ches_score(plus, minus) != pytest.approx(WRONG[name](plus, minus), abs=1e-3 * size(plus, minus))


# ---- precision


def half_precision_states(length, dtype, seed=0, d=4096):
    """Two responses with a common mean vector, cast; and their float64 values after the cast."""
    mean, rng = np.random.default_rng(0).normal(size=d), np.random.default_rng(seed)
    cast = [torch.tensor(mean + rng.normal(size=(length, d))).to(dtype) for _ in "+-"]
    return cast, [x.double().numpy() for x in cast]


def published(plus, minus):
    """The arithmetic of the published code, as described: everything in the dtype of the states, difference last."""
    S_plus, S_minus = plus.sum(0), minus.sum(0)
    return float((S_plus * S_minus).sum() - S_plus.norm() ** 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("length", [50, 1000])
def test_precision(dtype, length):
    for seed in range(2):
        (plus, minus), exact_states = half_precision_states(length, dtype, seed)
        S_plus, S_minus = (x.sum(0) for x in exact_states)
        exact = S_plus @ (S_minus - S_plus)
        scale = np.linalg.norm(S_plus) * np.linalg.norm(S_minus - S_plus)
        assert abs(ches_score(plus, minus) - exact) <= 2e-7 * scale  # the contract allows 1e-5
        assert abs(ches_score(plus, minus, True) - exact / length**2) <= 2e-7 * scale / length**2
        if dtype == torch.float16:
            assert abs(ches_score(plus.numpy(), minus.numpy()) - exact) <= 2e-7 * scale
        if dtype != torch.float32:
            naive = published(plus, minus)
            assert not abs(naive - exact) <= 1e-5 * scale  # it is nan in fp16


def test_the_published_arithmetic_fails_where_this_does_not():
    flipped = 0
    for seed in range(4):
        states, exact = half_precision_states(1000, torch.bfloat16, seed)
        assert np.sign(ches_score(*states)) == np.sign(definition(*exact))
        assert ches_score(*states) == pytest.approx(definition(*exact), rel=1e-4)
        flipped += np.sign(published(*states)) == -np.sign(definition(*exact))
    assert flipped, "some sign is lost in bf16"
    states, exact = half_precision_states(50, torch.float16)
    assert np.isnan(published(*states)), "fp16 overflows"
    assert ches_score(*states) == pytest.approx(definition(*exact), rel=1e-6)


@given(st.integers(0, 2**32 - 1), st.integers(1, 300), st.integers(-3, 3))
def test_float32_keeps_the_stated_bound(seed, length, decades):
    """Common means of many sizes make the sums large and their difference small."""
    rng = np.random.default_rng(seed)
    mean = 10.0**decades * rng.normal(size=7)
    plus, minus = ((mean + rng.normal(size=(length, 7))).astype(np.float32) for _ in "+-")
    assert abs(ches_score(plus, minus) - definition(plus, minus)) <= 8e-6 * size(plus, minus)


def test_sums_beyond_float32_are_taken_in_float64():
    plus, minus = np.full((4, 3), 3e38, dtype=np.float32), np.full((5, 3), 2e38, dtype=np.float32)
    assert ches_score(plus, minus) == pytest.approx(definition(plus, minus), rel=1e-12)
    plus, minus = np.stack([plus / 1e38, plus]), np.stack([minus / 1e38, minus])
    expected = [definition(*pair) for pair in zip(plus, minus, strict=True)]
    np.testing.assert_allclose(on_device([plus, minus], [None, None]), expected, rtol=1e-6)
    minus[1, 0, 2] = np.nan
    with pytest.raises(ValueError, match=r"hidden_dispreferred must be finite .* response 1 has not"):
        on_device([plus, minus], [None, None])


def test_one_sum_beyond_float32_and_one_within():
    """Each is taken its own way, and their signs agree."""
    huge, small = np.full((4, 3), 3e38, dtype=np.float32), np.array([[1e-3, 2.0, 0.5], [0.25, -1.0, 4.0]], np.float32)
    for pair in ((huge, small), (small, huge)):
        assert ches_score(*pair) == pytest.approx(definition(*pair), rel=1e-6)
        assert on_device([x[None] for x in pair], [None, None])[0] == pytest.approx(definition(*pair), rel=1e-6)


def test_what_leaves_float32_may_come_back():
    """The second sum, in float64, starts afresh."""
    plus = np.array([[3e38], [3e38], [-3e38], [-3e38], [0.25]], dtype=np.float32)
    minus = np.array([[2.0]], dtype=np.float32)
    assert ches_score(plus, minus) == 0.25 * (2.0 - 0.25)


# ---- batches


def batch(rng, B=5, T=(7, 9), d=4):
    """Padded states with garbage in the padding, masks, and the pairs without padding."""
    states, masks, plain = [], [], []
    for t in T:
        keep = rng.uniform(size=(B, t)) < 0.6
        keep[0], keep[1], keep[2] = True, np.arange(t) < 3, np.arange(t) >= t - 3  # none, right and left padding
        keep[:, 1 if t == T[0] else -2] = True
        x = rng.normal(size=(B, t, d))
        plain.append([x[b][keep[b]] for b in range(B)])
        x[~keep] = rng.choice([np.nan, np.inf, -np.inf, 1e300], size=((~keep).sum(), d))
        states.append(x)
        masks.append(keep)
    return states, masks, plain


def on_device(states, masks, normalize=False):
    """The accelerator's route, run on the CPU."""
    names = ("preferred", "dispreferred")
    batches = (
        ches._Batch.of(torch.as_tensor(x), m, n, normalize) for x, m, n in zip(states, masks, names, strict=True)
    )
    return ches._scores_on_device(*batches)


class Elsewhere(torch.Tensor):
    """A tensor that says it is on an accelerator."""

    @property
    def device(self):
        return torch.device("cuda:0")


class WithoutDouble(Elsewhere):
    """On an accelerator that has no float64."""

    @property
    def device(self):
        return torch.device("mps:0")

    def double(self):
        raise TypeError("Cannot convert a MPS Tensor to float64 dtype")

    def cpu(self):
        return self.as_subclass(torch.Tensor)


def test_an_accelerator_without_float64():
    states = torch.tensor(np.random.default_rng(8).normal(size=(2, 3, 70, 4))).float()
    expected = [definition(*(x[b].numpy() for x in states)) for b in range(3)]
    got = ches_scores(*(x.as_subclass(WithoutDouble) for x in states))
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * max(map(abs, expected)))
    with pytest.raises(TypeError, match="MPS"):
        states.as_subclass(WithoutDouble).double()


def test_states_on_an_accelerator_are_summed_there(monkeypatch):
    here = [torch.tensor(x) for x in np.random.default_rng(7).normal(size=(2, 3, 5, 4))]
    there = [x.as_subclass(Elsewhere) for x in here]
    with pytest.raises(ValueError, match="both be numpy, or both torch on one device"):
        ches_scores(here[0], there[1])
    expected = [definition(*(x[b].numpy() for x in here)) for b in range(3)]
    with monkeypatch.context() as patch:
        patch.delattr(ches, "_scores_on_device")
        np.testing.assert_allclose(ches_scores(*here), expected, rtol=1e-12)
    monkeypatch.delattr(ches, "_sum")
    np.testing.assert_allclose(ches_scores(*there), expected, rtol=1e-12)


@pytest.mark.parametrize("normalize", [False, True])
@given(seed=st.integers(0, 2**32 - 1))
def test_padding_has_no_effect(normalize, seed):
    states, masks, plain = batch(np.random.default_rng(seed))
    one_by_one = [ches_score(p, m, normalize) for p, m in zip(*plain, strict=True)]
    tensors = [torch.tensor(x) for x in states]
    for got in (
        ches_scores(*states, *masks, normalize),
        ches_scores(*states, *(m.astype(int) for m in masks), length_normalize=normalize),
        ches_scores(*tensors, *(torch.tensor(m) for m in masks), normalize),
        on_device(states, masks, normalize),
    ):
        assert isinstance(got, np.ndarray)
        assert got.dtype == np.float64
        np.testing.assert_allclose(got, one_by_one, rtol=1e-12, atol=1e-12)
    right = [np.concatenate([x, np.full((len(x), 2, x.shape[2]), np.nan)], axis=1) for x in states]
    wide = [np.pad(m, ((0, 0), (0, 2))) for m in masks]
    np.testing.assert_array_equal(ches_scores(*right, *wide, normalize), ches_scores(*states, *masks, normalize))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_long_batches_agree_with_float64_on_both_routes(dtype):
    """Several blocks, scattered positions, half precision."""
    rng = np.random.default_rng(3)
    states = [torch.tensor(3 + rng.normal(size=(3, t, 40))).to(dtype) for t in (150, 70)]
    masks = [rng.uniform(size=x.shape[:2]) < 0.8 for x in states]
    exact = [definition(*(x[b].double().numpy()[m[b]] for x, m in zip(states, masks, strict=True))) for b in range(3)]
    scale = np.abs(exact).max()
    np.testing.assert_allclose(ches_scores(*states, *masks), exact, rtol=0, atol=1e-6 * scale)
    np.testing.assert_allclose(on_device(states, masks), exact, rtol=0, atol=1e-6 * scale)


def test_tensors_that_require_gradients_and_lists_are_read():
    plus, minus = [[1.0, 2.0], [3.0, 4.0]], [[0.5, -1.0]]
    expected = definition(np.array(plus), np.array(minus))
    assert ches_score(plus, minus) == expected
    assert ches_score(torch.tensor(plus, requires_grad=True), torch.tensor(minus)) == expected


def test_a_mask_that_is_ignored_would_be_seen():
    states, masks, _ = batch(np.random.default_rng(5))
    states = [np.where(np.abs(x) < 100, x, 1.0) for x in states]
    masked, whole = ches_scores(*states, *masks), ches_scores(*states)
    assert masked[0] == whole[0]
    assert (masked[1:] != whole[1:]).all()


X = np.ones((2, 3, 4))
BAD = {
    "empty response": (lambda: ches_score(np.ones((0, 4)), np.ones((2, 4))), r"hidden_preferred must have shape"),
    "different d": (lambda: ches_score(np.ones((2, 4)), np.ones((2, 3))), "must agree in batch size and d"),
    "one dimension": (lambda: ches_score(np.ones(4), np.ones((2, 4))), r"hidden_preferred .* got \(4,\)"),
    "integers": (lambda: ches_score(np.ones((2, 4), dtype=int), np.ones((2, 4))), "floating-point"),
    "integer tensor": (lambda: ches_score(torch.ones((2, 4), dtype=int), torch.ones((2, 4))), "floating-point"),
    "nan": (lambda: ches_score(np.ones((2, 4)), np.full((2, 4), np.nan)), "hidden_dispreferred must be finite"),
    "inf in one position": (lambda: ches_scores(X, np.where(np.arange(3)[:, None] == 2, np.inf, X)), "must be finite"),
    "inf, half precision": (lambda: ches_score(torch.full((2, 4), np.inf).half(), torch.ones(2, 4)), "must be finite"),
    "ragged": (lambda: ches_scores([[[1.0], [2.0]], [[1.0]]], X), "ragged list"),
    "mask shape": (lambda: ches_scores(X, X, np.ones((2, 4))), r"mask_preferred must have shape \(2, 3\)"),
    "mask values": (lambda: ches_scores(X, X, np.full((2, 3), 2)), "mask_preferred must hold booleans or 0 and 1"),
    "ragged mask": (lambda: ches_scores(X, X, [[1, 1, 1], [1]]), "mask_preferred"),
    "empty row": (lambda: ches_scores(X, X, None, [[1, 1, 0], [0, 0, 0]]), "mask_dispreferred .* row 1 has none"),
    "batch sizes": (lambda: ches_scores(X, X[:1]), "must agree in batch size"),
    "numpy and torch": (lambda: ches_scores(X, torch.tensor(X)), "both be numpy, or both torch"),
    "last hidden, d": (lambda: last_hidden_inner_product(np.ones(3), np.ones(2)), "must agree in d"),
    "last hidden, shape": (lambda: last_hidden_inner_product(X, X), r"shape \(d,\)"),
    "no tokens": (lambda: edit_similarity([], [1]), "tokens_preferred must be a sequence of tokens, not empty"),
    "text": (lambda: edit_similarity([1], "text"), "tokens_dispreferred"),
    "nested tokens": (lambda: edit_similarity(np.ones((2, 2), dtype=int), [1]), "tokens_preferred"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    call, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        call()


# ---- the alphas


@st.composite
def problems(draw):
    """(hidden+, hidden-, tokens+, tokens-, W), prefixes not shared."""
    plus, minus = draw(pairs(4, 3))
    V = draw(st.integers(2, 5))
    tokens = [draw(st.lists(st.integers(0, V - 1), min_size=len(x), max_size=len(x))) for x in (plus, minus)]
    return plus, minus, *tokens, draw(hnp.arrays(np.float64, (V, plus.shape[1]), elements=NUMBERS))


@given(problems())
def test_alphas_keep_their_bounds(problem):
    plus, minus, y_plus, y_minus, W = problem
    t = sequence_terms(plus, minus, y_plus, y_minus, W=W)
    assert t.alpha_minus.shape == (len(plus), len(minus))
    assert t.largest_alpha <= 2 + 1e-12
    pi = np.exp(plus @ W.T)
    pi /= pi.sum(1, keepdims=True)
    diagonal = 1 - 2 * pi[np.arange(len(plus)), y_plus] + (pi**2).sum(1)
    np.testing.assert_allclose(np.diag(t.alpha_plus), diagonal, atol=1e-12)
    assert (np.diag(t.alpha_plus) >= 0).all()
    assert 0 <= t.share_positive <= 1


@given(problems())
def test_with_every_alpha_one_it_is_ches(problem):
    plus, minus, *tokens, W = problem
    t = sequence_terms(plus, minus, *tokens, W=W)
    ones = ches.SequenceTerms(np.ones_like(t.alpha_minus), np.ones_like(t.alpha_plus), t.inner_minus, t.inner_plus)
    for value in (ones.alpha_weighted, t.ches):
        assert value == pytest.approx(ches_score(plus, minus), abs=1e-12 * (1 + size(plus, minus)))


@given(problems())
def test_alphas_entry_by_entry(problem):
    """1[y = y'] - pi(y') - pi'(y) + <pi, pi'>, by loops."""
    plus, minus, y_plus, y_minus, W = problem
    t = sequence_terms(plus, minus, y_plus, y_minus, W=W)
    pi = [np.exp(x @ W.T) / np.exp(x @ W.T).sum(1, keepdims=True) for x in (plus, minus)]
    total = 0.0
    for tokens, probabilities, alphas, states, sign in (
        (y_minus, pi[1], t.alpha_minus, minus, 1),
        (y_plus, pi[0], t.alpha_plus, plus, -1),
    ):
        for k, y in enumerate(y_plus):
            for l, z in enumerate(tokens):
                p, q = pi[0][k], probabilities[l]
                alpha = (y == z) - p[z] - q[y] + p @ q
                assert alphas[k, l] == pytest.approx(alpha, abs=1e-12)
                total += sign * alpha * (plus[k] @ states[l])
    assert t.alpha_weighted == pytest.approx(total, abs=1e-11 * (1 + size(plus, minus)))


def sequence_model(seed=0, shared=False):
    rng = np.random.default_rng(seed)
    responses = ((0, 1, 2), (0, 3)) if shared else ((0, 1, 2), (3, 4))
    sample = Sample("x", responses)
    return UnconstrainedFeatures.from_samples(
        rng.normal(size=(5, 4)), rng.normal(size=(len(contexts_of([sample])), 4)), [sample]
    )


@pytest.mark.parametrize("shared", [False, True])
def test_is_the_part_of_the_rate_that_moves_through_the_unembeddings(shared):
    """Moving W alone along the gradient of the margin changes ln pi(y+) at -(sum alpha^- <> - sum alpha^+ <>)."""
    model = sequence_model(3, shared)
    s = model.samples[0]
    W = torch.tensor(model.W, requires_grad=True)

    def log_prob(y):
        rows = [model.context_row("x", y[:k]) for k in range(len(y))]
        return torch.log_softmax(torch.tensor(model.H)[rows] @ W.T, -1)[range(len(y)), list(y)].sum()

    plus, minus = (torch.autograd.grad(log_prob(y), W)[0] for y in (s.preferred, s.dispreferred))
    rate = float((plus * (plus - minus)).sum())
    t = sample_terms(model)
    assert -t.alpha_weighted == pytest.approx(rate, rel=1e-12)
    assert t.alpha_weighted != pytest.approx(rate, rel=1e-3), "the sign matters"
    assert t.ches != pytest.approx(t.alpha_weighted, rel=1e-3), "the alphas matter"


def test_shares_count_positive_alphas():
    t = ches.SequenceTerms(
        np.array([[0.5, -1.0, 0.0, 0.2]]), np.array([[0.9]]), np.array([[1.0, 2.0, 3.0, 4.0]]), np.array([[10.0]])
    )
    assert (t.share_positive_minus, t.share_positive_plus, t.share_positive) == (0.5, 1.0, 0.6)
    assert t.largest_alpha == 1.0
    assert t.alpha_weighted == pytest.approx(0.5 - 2 + 0.8 - 9)
    assert t.ches == 0
    below = ches.SequenceTerms(t.alpha_plus, np.array([[0.0]]), t.inner_plus, t.inner_plus)
    assert (below.share_positive_minus, below.share_positive_plus, below.share_positive) == (1.0, 0.0, 0.5)
    lines = str(t).splitlines()
    assert lines[0] == "hidden-vector terms of a pair of lengths 1 and 4"
    assert lines[3].split()[-1] == "+0.6"
    assert repr(t) == str(t)


def test_records_are_frozen_and_compared_by_identity():
    t, other = sample_terms(sequence_model()), sample_terms(sequence_model())
    states = ches._Batch.of(X, None, "preferred", False)
    for record, name in ((t, "alpha_plus"), (states, "keep")):
        with pytest.raises(FrozenInstanceError):
            setattr(record, name, None)
    assert len({t, t, other}) == 2
    assert len({states, ches._Batch.of(X, None, "preferred", False)}) == 2


def test_where_all_contexts_expect_one_other_token_alpha_is_one_plus_equality():
    rng = np.random.default_rng(2)
    log_probs = np.full((3, 6), -60.0)
    log_probs[:, 5] = np.log1p(-5 * np.exp(-60.0))
    t = sequence_terms(
        rng.normal(size=(3, 4)), rng.normal(size=(3, 4)), [0, 1, 2], [3, 1, 4], log_probs=(log_probs, log_probs)
    )
    np.testing.assert_allclose(t.alpha_minus, 1 + np.equal.outer([0, 1, 2], [3, 1, 4]), atol=1e-12)
    assert t.share_positive == 1


def test_a_certain_token_keeps_its_small_error():
    log_probs = np.array([[np.log1p(-1e-18), np.log(1e-18)]])
    t = sequence_terms(np.ones((1, 1)), np.ones((1, 1)), [0], [1], log_probs=(log_probs, log_probs))
    assert t.alpha_plus[0, 0] == pytest.approx(2e-36, rel=1e-9)


def test_log_probs_and_unembeddings_give_the_same():
    model = sequence_model()
    s = model.samples[0]
    hidden = [model.H[[model.context_row("x", y[:k]) for k in range(len(y))]] for y in s.responses]
    log_probs = tuple(np.stack([model.next_token_log_probs("x", y[:k]) for k in range(len(y))]) for y in s.responses)
    given_log_probs = sequence_terms(*hidden, *s.responses, log_probs=log_probs)
    for name, value in sample_terms(model).to_dict().items():
        np.testing.assert_allclose(given_log_probs.to_dict()[name], value, rtol=1e-12)
    assert "share of positive alphas" in str(given_log_probs)


H, Y = np.ones((2, 3)), [0, 1]
BAD_TERMS = {
    "neither": (lambda: sequence_terms(H, H, Y, Y), "W or log_probs must be given"),
    "both": (lambda: sequence_terms(H, H, Y, Y, W=np.ones((4, 3)), log_probs=(H, H)), "and not both"),
    "logits": (lambda: sequence_terms(H, H, Y, Y, log_probs=(H, H)), "log_probs of the preferred response"),
    "sum 1.01": (lambda: sequence_terms(H, H, Y, Y, log_probs=(np.full((2, 2), np.log(0.505)),) * 2), "normalised"),
    "nan": (lambda: sequence_terms(H, H, Y, Y, log_probs=(H * np.nan, H)), "log_probs of the preferred response"),
    "token": (lambda: sequence_terms(H, H, Y, [0, 4], W=np.ones((4, 3))), r"tokens_dispreferred must be in \[0, 4\)"),
    "negative token": (
        lambda: sequence_terms(H, H, [0, -1], Y, W=np.ones((4, 3))),
        "tokens_preferred must be an integer",
    ),
    "count": (
        lambda: sequence_terms(H, H, [0], Y, W=np.ones((4, 3))),
        "a token for each of the 2 hidden vectors, got 1",
    ),
    "V": (
        lambda: sequence_terms(H, H, Y, Y, log_probs=(np.full((2, 2), -np.log(2)), np.full((2, 4), -np.log(4)))),
        "V, got",
    ),
    "d": (lambda: sequence_terms(H, np.ones((2, 4)), Y, Y, W=np.ones((4, 3))), "hidden_dispreferred must have shape"),
    "sample": (lambda: sample_terms(sequence_model(), 1), "sample must be below 1, got 1"),
}


@pytest.mark.parametrize("name", BAD_TERMS)
def test_bad_terms(name):
    call, message = BAD_TERMS[name]
    with pytest.raises(ValueError, match=message):
        call()


# ---- rivals


def levenshtein(a, b):
    """Textbook recursion, row by row."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        row, above = [i], row
        for j, y in enumerate(b, 1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (x != y)))
    return row[-1]


@given(*(st.lists(st.integers(0, 3), min_size=1, max_size=9) for _ in "+-"))
def test_edit_similarity(a, b):
    expected = -levenshtein(a, b) / max(len(a), len(b))
    assert edit_similarity(a, b) == pytest.approx(expected, abs=1e-12)
    assert edit_similarity(np.array(a), tuple(b)) == pytest.approx(expected, abs=1e-12)
    assert edit_similarity(torch.tensor(a), b) == edit_similarity(b, a)
    assert edit_similarity(a, a) == 0


def test_edit_similarity_names_the_extra(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kw):
        if name.startswith("rapidfuzz"):
            raise ImportError(name)
        return real(name, *args, **kw)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"likelihood-displacement\[ches\]"):
        edit_similarity([1], [2])


def test_last_hidden_inner_product():
    rng = np.random.default_rng(4)
    a, b = rng.normal(size=(2, 50))
    assert last_hidden_inner_product(a, b) == pytest.approx(float(a @ b), rel=1e-14)
    x, y = torch.tensor(a).bfloat16(), torch.tensor(b).bfloat16()
    assert last_hidden_inner_product(x, y) == pytest.approx(float(x.double() @ y.double()), rel=1e-14)
