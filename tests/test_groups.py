"""GWHES, NTHR and lazy likelihood displacement, and what D2O's anchors do, on models of a few tokens.

The second route is automatic differentiation of the loss value; a third retypes the scores in plain loops.
"""

import json
import math
from typing import Any

import numpy as np
import pytest
import torch

from sims import gradient_descent, gradient_flow
from sims.descent import Optimizer
from sims.objective import few_threads
from theory import ExactFlow, Problem, Sample, UnconstrainedFeatures, contexts_of, log_prob_rate
from theory.groups import GWHES, WeightedGRPO, gwhes, likelihood_change, nthr, preference_weights
from theory.losses import Group, Tokens
from theory.losses.d2o import D2O
from theory.losses.grpo import GRPO

# y+ first, y- second. Prefixes shared by responses on either side; lengths differ.
APART = Sample("x", ((0, 1, 2), (3, 1, 2), (1,), (2, 0), (4, 4)), rewards=(1, 0, 1, 0, 0))
SHARED = Sample("x", ((0, 1, 2), (0, 1, 3), (0, 2), (3, 1)), rewards=(1, 0, 1, 1))
MIXED = Sample("x", ((0, 1), (3, 1, 2), (1,), (2, 0)), rewards=(0.9, -1.0, 0.25, 0.1))
GROUPS = {"apart": APART, "shared prefixes": SHARED, "rewards of any kind": MIXED}
each_group = pytest.mark.parametrize("kind", GROUPS)


def model_of(sample: Sample, seed: int, V: int = 5, d: int = 3, scale: float = 1.0) -> UnconstrainedFeatures:
    rng = np.random.default_rng(seed)
    return UnconstrainedFeatures(
        scale * rng.normal(size=(V, d)), scale * rng.normal(size=(len(contexts_of([sample])), d)), (sample,)
    )


@pytest.fixture(autouse=True)
def one_thread():
    """On so few numbers torch's threads only wait for each other."""
    with few_threads(1):
        yield


# ---- the second route: log-probabilities as torch code, gradients by automatic differentiation


def tokens(W: torch.Tensor, H: torch.Tensor, model: UnconstrainedFeatures) -> list[torch.Tensor]:
    """ln pi of every token of every response of the first sample."""
    log_pi = torch.log_softmax(H @ W.T, dim=-1)
    s = model.samples[0]
    rows = [[model.contexts.index((s.prompt, y[:k])) for k in range(len(y))] for y in s.responses]
    return [log_pi[r, list(y)] for r, y in zip(rows, s.responses, strict=True)]


def loss_value(loss: Any, model: UnconstrainedFeatures, W: torch.Tensor, H: torch.Tensor) -> torch.Tensor:
    """The loss of the first sample at W, H; its reference and old policy is `model`."""
    old = tokens(torch.tensor(model.W), torch.tensor(model.H), model)
    group = zip(tokens(W, H, model), old, strict=True)
    return loss.torch_value(Group(tuple(Tokens(t, r, 0 * r, 0 * r, None) for t, r in group), model.samples[0].rewards))  # type: ignore[arg-type]


def leaves(model: UnconstrainedFeatures) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor(model.W, requires_grad=True), torch.tensor(model.H, requires_grad=True)


def slopes(loss: Any, model: UnconstrainedFeatures) -> tuple[np.ndarray, np.ndarray]:
    """-dL/dW and -dL/dH at the reference."""
    W, H = leaves(model)
    grads = torch.autograd.grad(loss_value(loss, model, W, H), (W, H))
    return -grads[0].numpy(), -grads[1].numpy()


def response_slopes(model: UnconstrainedFeatures) -> list[tuple[np.ndarray, np.ndarray]]:
    """d ln pi(y_i)/dW and /dH of every response."""
    W, H = leaves(model)
    each = [torch.autograd.grad(t.sum(), (W, H), retain_graph=True) for t in tokens(W, H, model)]
    return [(g[0].numpy(), g[1].numpy()) for g in each]


def rates_through_W(loss: Any, model: UnconstrainedFeatures) -> np.ndarray:
    """d/dt ln pi(y_i) of every response when only W moves."""
    velocity, _ = slopes(loss, model)
    return np.array([(g * velocity).sum() for g, _ in response_slopes(model)])


def step(loss: Any, model: UnconstrainedFeatures, eta: float, steps: int = 1) -> UnconstrainedFeatures:
    """Gradient descent of W and H."""
    W, H = leaves(model)
    for _ in range(steps):
        grads = torch.autograd.grad(loss_value(loss, model, W, H), (W, H))
        W, H = (x.detach().sub(eta * g).requires_grad_() for x, g in zip((W, H), grads, strict=True))
    return model.with_parameters(W.detach().numpy(), H.detach().numpy())


# ---- the third: scores in plain loops


def loops(model: UnconstrainedFeatures, i: int, j: int) -> list[list[float]]:
    """alpha_{k,l} <h_k, h_l> of responses i and j, position by position."""
    s = model.samples[0]

    def position(y: tuple[int, ...], k: int) -> tuple[list[float], np.ndarray]:
        h = model.H[model.contexts.index((s.prompt, y[:k]))]
        weights = [math.exp(float(w @ h)) for w in model.W]
        return [(1.0 if z == y[k] else 0.0) - e / sum(weights) for z, e in enumerate(weights)], h

    v, w = s.responses[i], s.responses[j]
    out = []
    for k in range(len(v)):
        e, h = position(v, k)
        out.append(
            [
                sum(a * b for a, b in zip(e, f, strict=True)) * float(h @ g)
                for f, g in (position(w, l) for l in range(len(w)))
            ]
        )
    return out


def total(rows: list[list[float]]) -> float:
    return math.fsum(x for row in rows for x in row)


# ---- GWHES


@each_group
@pytest.mark.parametrize("seed", range(5))
def test_gwhes_is_the_rate_through_W_of_one_grpo_step(kind, seed):
    """d/dt ln pi(y+_i) = -GWHES_i / G; the wrong sign of either part is told."""
    model = model_of(GROUPS[kind], seed)
    got, rates = gwhes(model), rates_through_W(GRPO(length_power=0.0), model)
    G, correct = len(rates), list(got.correct)
    size = np.array(got.positive) + np.abs(got.negative)
    np.testing.assert_allclose(-np.array(got.scores) / G, rates[correct], atol=1e-13 * size.max())
    for n, p in ((1, 1), (-1, -1)):  # both parts on one side
        wrong = -(n * np.array(got.negative) + p * np.array(got.positive)) / G
        assert np.abs(wrong - rates[correct]).max() > 1e-2
    assert np.abs(rates).max() > 1e-2


@each_group
def test_gwhes_is_the_papers_double_sum(kind):
    model = model_of(GROUPS[kind], 11)
    rewards = np.array(model.samples[0].rewards)
    A = (rewards - rewards.mean()) / rewards.std()
    got = gwhes(model)
    assert got.correct == tuple(np.nonzero(A > 0)[0])
    for i, negative, positive, score in zip(got.correct, got.negative, got.positive, got.scores, strict=True):
        wrong = sum(-A[j] * total(loops(model, i, j)) for j in np.nonzero(A < 0)[0])
        right = sum(A[j] * total(loops(model, i, j)) for j in np.nonzero(A > 0)[0])
        assert (negative, positive, score) == pytest.approx((wrong, right, wrong - right), rel=1e-12)


def test_gwhes_agrees_with_the_problems_rate_of_a_token_loss():
    """And with both rates on, the rest of the rate is that of contexts shared with y+_i."""
    model = model_of(SHARED, 4)
    got, responses = gwhes(model), model.samples[0].responses
    frozen, moving = (Problem.of(model, GRPO(length_power=0.0), 0.7, eta_h) for eta_h in (0.0, 1.3))
    velocity = slopes(GRPO(length_power=0.0), model)
    for i, score in zip(got.correct, got.scores, strict=True):
        z = frozen.positions(responses[i])
        assert frozen.rate(z)[0] == pytest.approx(-0.7 * score / 4, rel=1e-12)
        through_h = 1.3 * float((response_slopes(model)[i][1] * velocity[1]).sum())
        assert moving.rate(z)[0] == pytest.approx(-0.7 * score / 4 + through_h, rel=1e-12)
        assert abs(through_h) > 1e-3


def test_weights_of_a_binary_group_are_lemma_4_2s():
    for p in (0.1, 0.5, 3 / 7):
        up, down = preference_weights(p)
        assert (up, down) == pytest.approx(((1 - p) / math.sqrt(p * (1 - p)), p / math.sqrt(p * (1 - p))), rel=1e-14)
    model = model_of(APART, 2)
    up, down = preference_weights(2 / 5)
    got = gwhes(model)
    assert got.negative[0] == pytest.approx(down * sum(total(loops(model, 0, j)) for j in (1, 3, 4)), rel=1e-12)
    assert got.positive[1] == pytest.approx(up * sum(total(loops(model, 2, j)) for j in (0, 2)), rel=1e-12)
    for p in (0.0, 1.0, math.nan):
        with pytest.raises(ValueError, match=r"p must be in \(0, 1\)"):
            preference_weights(p)


def test_the_sign_of_gwhes_says_whether_a_small_step_raises_the_response():
    """With W alone moving it is exact; both signs occur."""
    signs = []
    for seed in range(40):
        model = model_of(APART, seed)
        velocity, _ = slopes(GRPO(length_power=0.0), model)
        after = model.with_parameters(model.W + 1e-6 * velocity, model.H)
        change = likelihood_change(model, after).changes
        signs += [(s > 0, c < 0) for s, c in zip(gwhes(model).scores, change, strict=True) if abs(s) > 1e-4]
    assert all(lazy == fell for lazy, fell in signs)
    assert {lazy for lazy, _ in signs} == {True, False}


# ---- NTHR


@each_group
def test_nthr_is_the_papers_sum(kind):
    model = model_of(GROUPS[kind], 7)
    rewards = np.array(model.samples[0].rewards)
    correct, wrong = np.nonzero(rewards > rewards.mean())[0], np.nonzero(rewards < rewards.mean())[0]
    got = nthr(model, beta_n=0.7)
    assert got.wrong == tuple(wrong)

    def scores(j: int) -> list[float]:
        rows = [row for i in correct for row in loops(model, i, j)]
        return [math.fsum(column) for column in zip(*rows, strict=True)]

    for j, seen in zip(wrong, got.scores, strict=True):
        np.testing.assert_allclose(seen, scores(j), rtol=1e-11)
    assert got.anchors == pytest.approx([np.mean(scores(i)) for i in correct], rel=1e-12)
    assert got.threshold == pytest.approx(0.7 * min(got.anchors), rel=1e-14)
    assert got.lengths == tuple(map(len, model.samples[0].responses))


def test_scores_of_wrong_tokens_sum_to_the_negative_parts_of_gwhes():
    for seed in range(5):
        model = model_of(APART, seed)
        _, down = preference_weights(2 / 5)
        assert down * sum(s.sum() for s in nthr(model).scores) == pytest.approx(sum(gwhes(model).negative), rel=1e-12)


def nearly_correct() -> UnconstrainedFeatures:
    """A wrong response that repeats the token the correct ones end in, every hidden vector near one direction."""
    rng = np.random.default_rng(1)
    sample = Sample("x", ((0, 1), (3, 1, 1, 1, 4), (2, 1)), rewards=(1, 0, 1))
    H = rng.normal(size=4) + 0.1 * rng.normal(size=(len(contexts_of([sample])), 4))
    return UnconstrainedFeatures(0.3 * rng.normal(size=(6, 4)), H, (sample,))


SUMS = GRPO(length_power=0.0)


def test_easing_a_token_raises_the_correct_responses_by_its_score():
    """To first order and through W, in sum, by (1 - eta) p- s / G per token: exactly what the scores promise."""
    model = nearly_correct()
    scores, (_, down) = nthr(model), preference_weights(2 / 3)
    before = rates_through_W(SUMS, model)[[0, 2]].sum()
    flagged = sum(float(s[f].sum()) for s, f in zip(scores.scores, scores.flagged, strict=True))
    for eta in (0.0, 0.4, 1.0):
        after = rates_through_W(scores.loss(SUMS, eta), model)[[0, 2]].sum()
        assert after - before == pytest.approx((1 - eta) * down * flagged / 3, rel=1e-11, abs=1e-13)
    assert flagged > 1e-2


def test_nthr_lessens_the_fall_that_grpo_causes():
    """Ten steps of gradient descent on everything, with the paper's beta_n = 1 and eta = 0. It is the flagged tokens
    that matter: easing the others in their place makes the fall deeper."""
    model = nearly_correct()
    scores = nthr(model)
    assert scores.flagged[0].tolist() == [False, True, True, True, False]
    instead = WeightedGRPO(
        SUMS, tuple(row if i != 1 else (0.0, 1.0, 1.0, 1.0, 0.0) for i, row in enumerate(scores.weights()))
    )
    trained = [step(loss, model, 0.02, 10) for loss in (SUMS, scores.loss(SUMS), instead)]
    plain, eased, others = (likelihood_change(model, after) for after in trained)
    assert any(plain.lazy)
    assert plain.mean < -5e-3
    assert eased.mean > 0.01
    assert not any(eased.lazy)
    assert others.mean < plain.mean


def test_weights_of_tokens():
    model = nearly_correct()
    scores = nthr(model)
    assert scores.weights() == ((1.0, 1.0), (1.0, 0.0, 0.0, 0.0, 1.0), (1.0, 1.0))
    assert scores.weights(0.3)[1] == (1.0, 0.3, 0.3, 0.3, 1.0)
    assert scores.loss() == WeightedGRPO(GRPO(), scores.weights())
    assert not nthr(model, beta_n=1e9).flagged[0].any()  # the anchors are positive here
    for bad in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=r"eta must be in \[0, 1\]"):
            scores.weights(bad)
    with pytest.raises(ValueError, match="beta_n must be in"):
        nthr(model, beta_n=-1.0)


def test_a_neutral_response_takes_no_side():
    sample = Sample("x", ((0, 1), (2,), (3, 1)), rewards=(1, 0, 0.5))
    model = model_of(sample, 3)
    assert gwhes(model).correct == (0,)
    assert nthr(model).wrong == (1,)
    assert nthr(model).weights()[2] == (1.0, 1.0)


# ---- lazy likelihood displacement


def test_likelihood_change_is_definition_4_1():
    before = model_of(APART, 1)
    rng = np.random.default_rng(0)
    after = before.with_parameters(before.W + 0.3 * rng.normal(size=before.W.shape), before.H)
    y = before.samples[0].responses
    expected = [after.log_prob(y[i]) - before.log_prob(y[i]) for i in (0, 2)]
    got = likelihood_change(before, after)
    assert (got.correct, got.changes) == ((0, 2), tuple(expected))
    assert got.mean == pytest.approx(sum(expected) / 2)
    assert got.lazy == tuple(c < 0 for c in expected)
    low, high = sorted(map(abs, expected))
    assert 0 < low < high
    assert likelihood_change(after, before, eps=2 * high).lazy == (True, True)
    still = likelihood_change(before, before)
    assert (still.changes, still.lazy) == ((0.0, 0.0), (False, False))  # strictly below
    assert likelihood_change(before, before, eps=1e-9).lazy == (True, True)


@pytest.mark.parametrize(
    "score", [gwhes, nthr, lambda m, s=0: likelihood_change(m, m, s)], ids=["gwhes", "nthr", "change"]
)
def test_errors(score):
    same = model_of(Sample("x", ((0, 1), (2,), (1,)), rewards=(0.1, 0.1, 0.1)), 0)
    with pytest.raises(ValueError, match=r"rewards of sample 0 must not all be equal, got \(0.1, 0.1, 0.1\)"):
        score(same)
    for index in (1, -1):
        with pytest.raises(ValueError, match=rf"sample must be in \[0, 1\), got {index}"):
            score(model_of(APART, 0), index)


def test_change_wants_the_same_responses():
    with pytest.raises(ValueError, match="after must hold the same responses as before in sample 0"):
        likelihood_change(model_of(APART, 0), model_of(SHARED, 0))
    one, apart = model_of(APART, 0), Sample("y", APART.responses, rewards=APART.rewards)
    hidden = np.concatenate([one.H, one.H])
    both = UnconstrainedFeatures(one.W, hidden, (APART, apart), contexts_of([APART, apart]))
    assert likelihood_change(both, both, 1).changes == (0.0, 0.0)
    with pytest.raises(ValueError, match="after must hold the same responses as before in sample 1, got None"):
        likelihood_change(both, one, 1)
    with pytest.raises(ValueError, match="eps must be in"):
        likelihood_change(model_of(APART, 0), model_of(APART, 0), eps=-1.0)


def test_records_can_be_read_and_saved():
    model = model_of(APART, 0)
    scores, tokens_, change = gwhes(model), nthr(model), likelihood_change(model, step(GRPO(), model, 0.1))
    for record in (scores, tokens_, change):
        assert json.loads(json.dumps(record.to_dict()))
        with pytest.raises(AttributeError, match="cannot assign"):
            record.correct = ()  # type: ignore[misc]
    assert isinstance(scores, GWHES)
    assert f"response 0: {scores.scores[0]:+.6g} = {scores.negative[0]:+.6g} (wrong)" in repr(scores)
    assert f"threshold {tokens_.threshold:+.6g}" in str(tokens_)
    assert str(tokens_).count("*") == 1 + sum(int(f.sum()) for f in tokens_.flagged)
    assert str(change).count("lazy") == sum(change.lazy)


# ---- D2O: what the anchors do


def rational_model(counts: tuple[int, ...], negative: int, copies: int = 1) -> UnconstrainedFeatures:
    """One prompt whose next-token probabilities are counts / sum(counts), and that many anchors of every token."""
    V, d = len(counts), len(counts)
    rng = np.random.default_rng(5)
    h = rng.normal(size=d)
    W = rng.normal(size=(V, d))
    W += np.outer(np.log(counts) - W @ h, h) / (h @ h)  # W h = ln counts
    anchors = [z for z, n in enumerate(counts) for _ in range(copies * n)]
    first = next(z for z in anchors if z != negative)
    anchors.remove(first)
    responses = ((first,), (negative,), *((z,) for z in anchors))
    return UnconstrainedFeatures(W, h[None], (Sample("x", responses, rewards=(1.0, 0.0) + (1.0,) * len(anchors)),))


@pytest.mark.parametrize("counts", [(4, 3, 2, 1), (6, 1, 1), (2, 2, 2, 2, 2)])
def test_anchors_in_proportion_exert_no_force_at_the_reference(counts):
    """The score identity: D2O is then a pure push against y-, weighted alpha/2, whatever beta."""
    negative = len(counts) - 1
    for beta in (0.1, 3.0):
        model = rational_model(counts, negative)
        velocity = slopes(D2O(alpha=0.4, beta=beta), model)
        push = response_slopes(model)[1]
        for seen, g in zip(velocity, push, strict=True):
            np.testing.assert_allclose(seen, -0.2 * g, atol=1e-14)
            assert np.abs(g).max() > 1e-2
    one_more = rational_model((counts[0] + 1, *counts[1:]), negative)
    off = UnconstrainedFeatures(
        rational_model(counts, negative).W, one_more.H, one_more.samples[:1]
    )  # anchors of other odds
    assert np.abs(slopes(D2O(alpha=0.4, beta=3.0), off)[0] + 0.2 * response_slopes(off)[1][0]).max() > 1e-2


def test_at_the_reference_d2o_squeezes_and_off_it_the_anchors_hold():
    """A first step raises the likeliest token alone, ln pi(i) by eta alpha/2 |h|^2 (pi_- + pi_i - |pi|^2 - 1[i = y-])
    when W moves, and lowers the anchors' mean; further out, beta bounds how far the mean falls."""
    counts, alpha = (7, 1, 1, 1), 0.4
    model = rational_model(counts, 3)
    pi = np.array(counts) / 10
    velocity, _ = slopes(D2O(alpha=alpha, beta=1.0), model)
    eta, h = 1e-6, model.H[0]
    moved = model.with_parameters(model.W + eta * velocity, model.H).next_token_log_probs()
    first = (moved - model.next_token_log_probs()) / eta
    expected = alpha / 2 * (h @ h) * (pi[3] + pi - pi @ pi - np.eye(4)[3])
    np.testing.assert_allclose(first, expected, atol=1e-4)
    assert (first > 0).tolist() == [True, False, False, False]

    def anchors_mean(beta: float) -> float:
        trained = step(D2O(alpha=alpha, beta=beta), model, 0.2, 300)
        return float(pi @ (trained.next_token_log_probs() - model.next_token_log_probs()))

    falls = [anchors_mean(beta) for beta in (0.01, 1.0, 10.0)]
    assert falls[0] < falls[1] < falls[2] < 0


def test_the_anchors_force_falls_as_the_root_of_their_number():
    """E |gbar|^2 = E |g|^2 / K for K samples of the model, to sampling error; biased sampling does not fall."""
    model = rational_model((5, 3, 1, 1), 3)
    pi = np.exp(model.next_token_log_probs())
    every = UnconstrainedFeatures(model.W, model.H, (Sample("x", tuple((z,) for z in range(4))),))
    g = np.array([np.concatenate([part.ravel() for part in parts]) for parts in response_slopes(every)])  # (V, params)
    np.testing.assert_allclose(pi @ g, 0, atol=1e-15)
    one = float(pi @ (g * g).sum(1))
    rng = np.random.default_rng(8)
    for K in (1, 11, 121, 1331):
        gbar = rng.multinomial(K, pi, size=2000) / K @ g
        squares = K * (gbar * gbar).sum(1)
        error = squares.std() / math.sqrt(len(squares))
        assert abs(squares.mean() - one) < 4.5 * error
        assert error < 0.06 * one
        biased = rng.multinomial(K, np.full(4, 0.25), size=2000) / K @ g
        if K > 11:
            assert K * (biased * biased).sum(1).mean() > 2 * one


def test_the_anchors_mean_rises_iff_their_gradient_outweighs_that_of_the_negative():
    """beta |gbar|^2 >= alpha <gbar, gb>, gbar the mean gradient of the anchors; both answers occur."""
    sample = Sample("x", ((0, 1), (3, 1), (0, 2), (1,)), rewards=(1, 0, 1, 1))
    seen = []
    for seed in range(60):
        model = model_of(sample, seed)
        loss = D2O(alpha=2.0 ** (seed % 5), beta=0.5)
        g = [np.concatenate([part.ravel() for part in parts]) for parts in response_slopes(model)]
        gbar, gb = (g[0] + g[2] + g[3]) / 3, g[1]
        velocity = np.concatenate([part.ravel() for part in slopes(loss, model)])
        condition = loss.beta * (gbar @ gbar) - loss.alpha * (gbar @ gb)
        assert gbar @ velocity == pytest.approx(condition / 2, rel=1e-10)
        after = step(loss, model, 1e-6)
        rise = np.mean([after.log_prob(sample.responses[i]) - model.log_prob(sample.responses[i]) for i in (0, 2, 3)])
        if abs(condition) > 1e-2:
            assert (rise > 0) == (condition > 0)
            seen.append(condition > 0)
    assert 10 < sum(seen) < len(seen) - 10


# ---- end to end


def weighted(model: UnconstrainedFeatures) -> Any:
    return nthr(model).loss(SUMS, 0.3)


@pytest.mark.parametrize("loss", [GRPO(beta=0.04), D2O(alpha=0.4, beta=0.7), weighted], ids=["grpo", "d2o", "nthr"])
def test_training_by_steps_is_that_of_the_loss_written_out(loss):
    model = nearly_correct()
    loss = loss(model) if callable(loss) else loss
    trained = gradient_descent(model, loss, Optimizer("sgd", 0.02), 10).at(-1)
    expected = step(loss, model, 0.02, 10)
    np.testing.assert_allclose(trained.W, expected.W, rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(trained.H, expected.H, rtol=1e-12, atol=1e-13)
    assert np.abs(trained.W - model.W).max() > 1e-3


def test_a_flow_without_the_clip_starts_at_the_rates_that_the_scores_state():
    model = nearly_correct()
    loss, t = GRPO(eps=1e6, length_power=0.0), 1e-5
    end = gradient_flow(model, loss, [0.0, t, 0.3], lr_hidden=0.0)
    for i, score in zip((0, 2), gwhes(model).scores, strict=True):
        y = model.samples[0].responses[i]
        at = end.log_probs(y)
        assert (at[1] - at[0]) / t == pytest.approx(-score / 3, rel=1e-3)
        assert log_prob_rate(model, loss, y, lr_hidden=0.0).total == pytest.approx(-score / 3, rel=1e-12)
        assert at[2] < at[0] - 0.1  # both fall


def test_training_ends_with_every_ratio_at_its_clip():
    """y+ is kept at 1 + eps times its start against the pull of y-, which sinks to 1 - eps; there the loss is least."""
    model, eps = model_of(Sample("x", ((0,), (1,))), 3), 0.2
    ends = [step(GRPO(eps=e), model, 0.002, 800) for e in (eps, 1e6)]
    held, free = ([math.exp(m.log_prob(z) - model.log_prob(z)) for z in (0, 1)] for m in ends)
    assert held == pytest.approx([1 + eps, 1 - eps], abs=0.01)
    assert free[0] > 10
    assert free[1] < 0.1
    least = loss_value(GRPO(eps=eps), model, *(torch.tensor(x) for x in (ends[0].W, ends[0].H)))
    assert float(least) == pytest.approx(-eps, rel=1e-12)


def test_d2o_of_one_anchor_has_the_exact_flow_of_dpo():
    model = model_of(Sample("x", ((0,), (1,))), 2)
    loss, times = D2O(alpha=0.3, beta=0.3), [0.5, 4.0]
    exact = ExactFlow(model, loss).log_probs(times)
    np.testing.assert_allclose(exact, gradient_flow(model, loss, times).next_token_log_probs(), atol=1e-9)
    assert np.abs(np.diff(exact, axis=0)).max() > 1e-2
