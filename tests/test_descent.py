"""Exact descent: against plain loops over the parameters, its invariant, its limit, and sign descent by cases."""

import numpy as np
import pytest
from scipy.special import expit, log_softmax

from theory import ExactDescent, ExactFlow, SolverError, UnconstrainedFeatures
from theory.descent import sign_positions
from theory.losses import get


def random_model(seed: int, V: int = 5, d: int = 3, scale: float = 1.0) -> UnconstrainedFeatures:
    rng = np.random.default_rng(seed)
    return UnconstrainedFeatures.single_token(scale * rng.standard_normal((V, d)), scale * rng.standard_normal(d), 0, 1)


def dpo_loop(m, beta, step, steps, update, rate_W=1.0, rate_h=1.0) -> np.ndarray:
    """ln pi after every step of DPO, with gradients written out by hand and `update(gradient, memory)` an optimiser."""
    W, h = m.W.copy(), m.h.copy()
    u0 = (W[0] - W[1]) @ h
    memory: list[np.ndarray] = [np.zeros_like(W), np.zeros_like(h)]
    out = [log_softmax(W @ h)]
    for i in range(steps):
        a = W[0] - W[1]
        G = beta * expit(-beta * (a @ h - u0))
        g_W = np.zeros_like(W)
        g_W[0], g_W[1] = -G * h, G * h
        moves = []
        for k, g in enumerate((g_W, -G * a)):
            move, memory[k] = update(g, memory[k], i)
            moves.append(move)
        W, h = W - step * rate_W * moves[0], h - step * rate_h * moves[1]
        out.append(log_softmax(W @ h))
    return np.array(out)


def heavy_ball(mu):
    def update(g, v, i):
        v = g if i == 0 else mu * v + g
        return v, v

    return update


def nesterov(mu):
    def update(g, v, i):
        v = g if i == 0 else mu * v + g
        return g + mu * v, v

    return update


@pytest.mark.parametrize(
    ("method", "momentum", "update"),
    [
        ("gradient", 0.0, lambda g, v, i: (g, v)),
        ("heavy_ball", 0.8, heavy_ball(0.8)),
        ("nesterov", 0.8, nesterov(0.8)),
        ("sign", 0.0, lambda g, v, i: (np.sign(g), v)),
    ],
)
@pytest.mark.parametrize("rates", [(1.0, 1.0), (0.4, 1.7), (0.0, 1.0), (1.0, 0.0)])
def test_against_a_plain_loop(method, momentum, update, rates):
    for seed in range(4):
        m = random_model(seed)
        exact = ExactDescent(m, get("dpo", beta=0.6), 0.05, 150, method, momentum, *rates).log_probs()
        loop = dpo_loop(m, 0.6, 0.05, 150, update, *rates)
        assert np.abs(exact - loop).max() <= 1e-10
        assert np.abs(loop[-1] - loop[0]).max() > 1e-2
    wrong = ExactDescent(m, get("dpo", beta=0.6), 0.0501, 150, method, momentum, *rates).log_probs()
    assert np.abs(wrong - loop).max() > 1e-6


def test_a_feature_kernel_moves_h_by_it():
    rng = np.random.default_rng(1)
    m, A = random_model(1), rng.standard_normal((3, 3))
    kernel = A @ A.T
    W, h = m.W.copy(), m.h.copy()
    u0 = (W[0] - W[1]) @ h
    exact = ExactDescent(m, get("dpo", beta=0.6), 0.02, 60, lr_hidden=kernel)
    for _ in range(60):
        a = W[0] - W[1]
        G = 0.6 * expit(-0.6 * (a @ h - u0))
        W[0], W[1], h = W[0] + 0.02 * G * h, W[1] - 0.02 * G * h, h + 0.02 * G * kernel @ a
    assert np.abs(exact.log_probs([60])[0] - log_softmax(W @ h)).max() < 1e-11
    scalar = ExactDescent(m, get("dpo"), 0.05, 20, lr_hidden=2.0).log_probs()
    assert np.abs(ExactDescent(m, get("dpo"), 0.05, 20, lr_hidden=2.0 * np.eye(3)).log_probs() - scalar).max() < 1e-13


def test_the_invariant_drifts_exactly_as_stated():
    """E6: eta_h |a|^2 - 2 eta_W |h|^2 is multiplied by 1 - omega^2 eta^2 G^2 in each step."""
    m, loss, eta_W, eta_h, step = random_model(2), get("dpo", beta=2.0), 0.7, 1.9, 0.3
    run = ExactDescent(m, loss, step, 40, lr_unembedding=eta_W, lr_hidden=eta_h)
    h, a = run._vectors
    invariant = eta_h * (a**2).sum(1) - 2 * eta_W * (h**2).sum(1)
    G = run.form.slope(run.margin())
    factor = 1 - 2 * eta_W * eta_h * step**2 * G[:-1] ** 2
    assert np.allclose(invariant[1:], invariant[:-1] * factor, rtol=1e-12)
    assert factor.min() < 0.9


def test_order_one_towards_the_flow():
    m, loss = random_model(3), get("dpo", beta=1.0)
    flow = ExactFlow(m, loss).log_probs([3.0])[0]
    n = np.array([100, 200, 400, 800])
    errors = [np.abs(ExactDescent(m, loss, 3.0 / k, int(k)).log_probs([k])[0] - flow).max() for k in n]
    assert -np.polyfit(np.log(n), np.log(errors), 1)[0] == pytest.approx(1.0, abs=0.05)


def test_zero_steps_and_one_step():
    m = random_model(4)
    assert np.array_equal(ExactDescent(m, get("dpo"), 0.1, 0).log_probs()[0], m.next_token_log_probs())
    one, many = (ExactDescent(m, get("dpo"), 0.1, k).log_probs([1])[0] for k in (1, 9))
    assert np.array_equal(one, many)


def test_divergence_is_an_error():
    with pytest.raises(SolverError, match=r"gradient diverges: parameters leave float range at step .* \(step=100\)"):
        ExactDescent(random_model(5), get("ipo"), 100.0, 400).log_probs()


def sign_loop(h, a, rate_h, rate_a, steps):
    out = [(h.copy(), a.copy())]
    for _ in range(steps):
        h, a = h + rate_h * np.sign(a), a + rate_a * np.sign(h)
        out.append((h, a))
    return (np.array(x) for x in zip(*out, strict=True))


@pytest.mark.parametrize("rates", [(0.25, 0.5), (0.5, 0.25), (0.25, 0.25), (0.0, 0.5), (0.5, 0.0)])
def test_sign_descent_in_every_case_of_signs_zeros_and_ties(rates):
    """All pairs of dyadic starts: agreeing, opposed, zero, landing exactly on zero, crossing in the same step."""
    grid = np.arange(-10, 11) / 8
    h0, a0 = (x.ravel() for x in np.meshgrid(grid, grid))
    h, a = sign_loop(h0, a0, *rates, 30)
    n = np.arange(31)[:, None]
    exact_h, exact_a = sign_positions(h0, a0, *rates, n)
    assert np.array_equal(exact_h, h)
    assert np.array_equal(exact_a, a)


def test_sign_descent_past_a_minimiser_turns_back():
    """IPO's slope changes sign at its minimiser: sign descent then oscillates around it, step by step."""
    m = random_model(6)
    loss = get("ipo", tau=0.25)
    run = ExactDescent(m, loss, 0.05, 200, "sign")
    u = run.margin()
    target = loss.minimiser(float(m.h @ (m.W[0] - m.W[1])))
    assert np.abs(u[-50:] - target).max() < 2.0
    assert (np.diff(np.sign(u[-50:] - target)) != 0).any()
