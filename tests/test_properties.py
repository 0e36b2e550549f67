"""Bounds, invariances and conserved quantities of one flow (exact_solution, "Bounds and properties worth testing").

Numbers in the names of the tests are those of that list. Tolerances are a few hundred units in the last place of the
largest number that enters, unless stated.
"""

import math
from typing import Any

import numpy as np
import oracles
import pytest
from hypothesis import assume, example, given, reject
from hypothesis import strategies as st
from strategies import EXTREMES, REGIMES, entries, extreme_rates, losses, models, random_model, rates, single

from theory import ExactDescent, ExactFlow, SolverError, UnconstrainedFeatures, log_prob_rate
from theory.losses import get

LOG_TIMES = np.array([-np.inf, -20.0, -3.0, -0.5, 0.5, 2.0, 5.0])
DPO, IPO = get("dpo", beta=0.4), get("ipo", tau=0.3)


def every_extreme(test: Any) -> Any:
    """The test also runs on every named extreme, at the rates that make it one, and at kappa = 1e-12 and 1e12."""
    for name, model in EXTREMES.items():
        for pair in {extreme_rates(name), (1.0, 1e-12), (1e-12, 1.0), (0.0, 1.0), (1.0, 0.0)}:
            test = example(model=model, loss=DPO, rates=pair)(test)
        test = example(model=model, loss=IPO, rates=extreme_rates(name))(test)
    return test


def size(model: UnconstrainedFeatures) -> float:
    """The largest product of entries that rounding acts on."""
    return 1 + float(np.abs(model.W).max()) * float(np.abs(model.H).max()) * model.d + float(np.abs(model.W).max()) ** 2


# ---- 1, 2: bounds on rates


@every_extreme
@given(model=models(min_tokens=3), loss=losses(), rates=rates())
def test_2_rates_average_to_zero_and_obey_cauchy_schwarz(model, loss, rates):
    """|d ln pi(z)/dt| <= |G| |grad ln pi(z)| |grad u|, gradients in the norm weighted by the rates."""
    eta_W, eta_h = rates
    W, h, (plus, minus) = model.W, model.h, model.single_pair
    p = np.exp(oracles.log_probs(W, h))
    G = abs(float(loss.margin(model.samples[0]).slope(oracles.margin(W, h, plus, minus))))
    totals = []
    du = math.sqrt(eta_W * 2 * h @ h + eta_h * (W[plus] - W[minus]) @ (W[plus] - W[minus]))
    for z in range(model.V):
        rate = log_prob_rate(model, loss, z, lr_unembedding=eta_W, lr_hidden=eta_h).total
        e_p = np.eye(model.V)[z] - p
        own = math.sqrt(eta_W * (e_p @ e_p) * (h @ h) + eta_h * np.sum((W[z] - p @ W) ** 2))
        # Where G itself is a difference that cancels (at a minimiser) only its rounding is left.
        assert abs(rate) <= G * own * du * (1 + 1e-12) + 1e-13 * (1 + G) * size(model)
        totals.append(rate)
    scale = G * (eta_h * np.abs(W).max() ** 2 * model.d + eta_W * (h @ h)) + 1e-300
    assert abs(p @ totals) <= 1e-13 * (scale + size(model)) * model.V


@given(model=models(min_tokens=3), loss=losses(), rates=rates())
def test_1_alphas_lie_between_minus_two_and_two(model, loss, rates):
    """alpha = <e_k - pi, e_l - pi>, here along the whole path; on the diagonal 1 - 2 pi_k + |pi|^2 in [0, 2]."""
    for log_p in ExactFlow(model, loss, *rates).log_probs(log_times=LOG_TIMES):
        p = np.exp(log_p)
        E = np.eye(model.V) - p
        alpha = E @ E.T
        norms = np.linalg.norm(E, axis=1)
        assert (np.abs(alpha) <= 2 + 1e-12).all()
        assert (np.diag(alpha) >= -1e-15).all()
        np.testing.assert_allclose(np.diag(alpha), 1 - 2 * p + p @ p, atol=1e-14)
        assert (np.abs(alpha) <= np.outer(norms, norms) + 1e-14).all()


# ---- 3, 4, 5: the margin


@every_extreme
@given(model=models(), loss=losses(), rates=rates())
def test_3_the_margin_is_monotone_and_the_loss_never_rises(model, loss, rates):
    flow = ExactFlow(model, loss, *rates)
    u = flow.margin(log_times=np.append(LOG_TIMES, np.inf))
    inner = u[np.isfinite(u)]
    rounding = 4e-16 * np.abs(inner).max()
    G0 = float(loss.margin(model.samples[0]).slope(flow.start_margin))
    assert (math.copysign(1, G0) * np.diff(inner) >= -rounding).all() or flow.direction == 0
    value = loss.margin(model.samples[0]).value(inner)
    assert (np.diff(value) <= 1e-12 * (1 + np.abs(value[:-1]) + np.abs(inner[:-1]))).all()


@given(model=models(reference=False), beta=st.floats(1e-3, 10), rates=rates())
def test_3_dpo_from_its_reference_has_slopes_up_to_half_beta(model, beta, rates):
    loss = get("dpo", beta=beta)
    u = ExactFlow(model, loss, *rates).margin(log_times=LOG_TIMES)
    G = loss.margin(model.samples[0]).slope(u)
    assert (G > 0).all()
    assert (beta / 2 * (1 + 1e-12) >= G).all()


@every_extreme
@given(model=models(), loss=losses(), rates=rates())
def test_4_speed_and_probability_bounds(model, loss, rates):
    """K(u) >= 2 w |u| and pi(+) <= sigmoid(u), along the path; K = |grad u|^2 in the norm of the rates."""
    flow = ExactFlow(model, loss, *rates)
    u, log_p = flow.margin(log_times=LOG_TIMES), flow.log_probs(log_times=LOG_TIMES)
    plus, minus = model.single_pair
    assert (log_p[:, plus] <= -np.logaddexp(0, -u) + 1e-12).all()
    assert (log_p[:, minus] <= -np.logaddexp(0, u) + 1e-12).all()
    eta_W, eta_h = rates
    w = math.sqrt(2 * eta_W * eta_h)
    for x in u[np.abs(u) < 1e6]:
        there = flow.model_at_margin(float(x)) if flow.direction else model
        a, h = there.W[plus] - there.W[minus], there.h
        K = 2 * eta_W * h @ h + eta_h * a @ a
        assert K >= 2 * w * abs(x) * (1 - 1e-9) - 1e-12


def test_4_the_bound_on_the_speed_is_sharp_and_needs_both_groups():
    model = EXTREMES["Q = 0"]  # h parallel to a: K = 2 w |u| exactly
    a, h = model.W[0] - model.W[1], model.h
    assert 2 * 2.0 * h @ h + 1.0 * a @ a == 2 * math.sqrt(2 * 2.0 * 1.0) * (a @ h)
    assert 2 * 2.0 * h @ h + 1.0 * a @ a < 2 * math.sqrt(2 * 2.0 * 1.01) * (a @ h)


@example(model=EXTREMES["Q = 0"], beta=0.5, rates=(2.0, 1.0))
@example(model=EXTREMES["u0 = 1e4"], beta=0.5, rates=(1.0, 1e12))
@given(model=models(reference=False), beta=st.floats(1e-3, 10), rates=rates())
def test_5_dpo_rises_at_most_logarithmically(model, beta, rates):
    """u(t) - u0 <= ln(1 + beta^2 Kmax t)/beta, Kmax = max(K0, K(u(t))), from the reference."""
    flow = ExactFlow(model, get("dpo", beta=beta), *rates)
    eta_W, eta_h = rates
    plus, minus = model.single_pair
    for log_t in (-3.0, 0.0, 4.0):
        u = float(flow.margin(log_times=[log_t])[0])
        ends = [model, flow.model_at_margin(u) if flow.direction else model]
        K = [2 * eta_W * m.h @ m.h + eta_h * np.sum((m.W[plus] - m.W[minus]) ** 2) for m in ends]
        bound = math.log1p(beta**2 * max(K) * math.exp(log_t)) / beta
        assert u - flow.start_margin <= bound * (1 + 1e-9) + 4e-16 * (1 + abs(u))


# ---- 6: discrete drift


@given(model=models(), loss=losses(), rates=rates(zero=False), step=st.floats(1e-3, 0.3))
def test_6_gradient_descent_drifts_exactly(model, loss, rates, step):
    """I_{k+1} = (1 - w^2 eta^2 G_k^2) I_k for I = eta_h |a|^2 - 2 eta_W |h|^2 (E6), and the flow keeps I."""
    eta_W, eta_h = rates
    descent = ExactDescent(model, loss, step=step, steps=6, lr_unembedding=eta_W, lr_hidden=eta_h)
    try:
        h, a = descent._vectors
    except SolverError:  # too large a step for this curvature
        reject()
    assume(max(np.abs(h).max(), np.abs(a).max()) < 1e50)
    I = eta_h * (a * a).sum(1) - 2 * eta_W * (h * h).sum(1)
    K = eta_h * (a * a).sum(1) + 2 * eta_W * (h * h).sum(1)
    G = loss.margin(model.samples[0]).slope(descent.margin())
    factor = 1 - 2 * eta_W * eta_h * step**2 * G**2
    np.testing.assert_allclose(
        I[1:], factor[:-1] * I[:-1], rtol=0, atol=1e-12 * float((K[1:] + (1 + np.abs(factor[:-1])) * K[:-1]).max())
    )


@every_extreme
@given(model=models(), loss=losses(), rates=rates())
def test_conserved_quantities(model, loss, rates):
    """s = W_+ + W_-, every other row, and eta_h |a|^2 - 2 eta_W |h|^2 (E3)."""
    eta_W, eta_h = rates
    flow = ExactFlow(model, loss, *rates)
    plus, minus = model.single_pair
    a0, h0 = model.W[plus] - model.W[minus], model.h
    before = eta_h * a0 @ a0 - 2 * eta_W * h0 @ h0
    for u in flow.margin(log_times=LOG_TIMES):
        if not abs(u) < 1e5 or not flow.direction:
            continue
        there = flow.model_at_margin(float(u))
        a, h = there.W[plus] - there.W[minus], there.h
        K = eta_h * a @ a + 2 * eta_W * h @ h
        assert abs(eta_h * a @ a - 2 * eta_W * h @ h - before) <= 1e-11 * (K + abs(before))
        grown = 1e-13 * (1 + np.abs(there.W).max())
        np.testing.assert_allclose(there.W[plus] + there.W[minus], model.W[plus] + model.W[minus], atol=grown)
        rest = [z for z in range(model.V) if z not in (plus, minus)]
        assert np.array_equal(there.W[rest], model.W[rest])
        # The d x d matrix W^T W / eta_W - h h^T / eta_h, both groups trained at comparable rates.
        if 1e-3 < eta_W * eta_h and abs(u) < 1e3:
            drift = [m.W.T @ m.W / eta_W - np.outer(m.h, m.h) / eta_h for m in (model, there)]
            bound = 1e-11 * (np.sum(there.W**2) / eta_W + there.h @ there.h / eta_h + 1)
            np.testing.assert_allclose(drift[1], drift[0], atol=float(bound))


@given(model=models(), rates=rates())
def test_9_swapping_the_pair_keeps_the_speed(model, rates):
    """K0 is the same, and the swapped flow walks the same curve the other way: u -> -u."""
    plus, minus = model.single_pair
    swapped = single(model.W, model.h, minus, plus)
    one, other = ExactFlow(model, get("slic", delta=1e9), *rates), ExactFlow(swapped, get("slic", delta=1e9), *rates)
    K = [f.path.motion.K0.sum() for f in (one, other)]
    assert K[0] == pytest.approx(K[1], rel=1e-14)
    assert other.start_margin == pytest.approx(-one.start_margin, abs=1e-15)
    u = one.start_margin + np.linspace(-1, 1, 5) * min(1.0, abs(one.start_margin))
    if one.direction:
        np.testing.assert_allclose(one.log_probs_at_margin(u), other.log_probs_at_margin(-u), atol=1e-11 * size(model))


# ---- invariances: each compares log-probabilities at the same times


def same(first: ExactFlow, second: ExactFlow, tokens: Any = slice(None), time_factor: float = 1.0) -> None:
    log_times = LOG_TIMES[1:]
    a = first.log_probs(log_times=log_times)
    b = second.log_probs(log_times=log_times + math.log(time_factor))
    scale = size(first.model) + size(second.model)
    np.testing.assert_allclose(b, a[:, tokens], rtol=1e-8, atol=1e-11 * scale)


@every_extreme
@given(model=models(), loss=losses(), rates=rates())
def test_a_vector_added_to_every_row_changes_nothing(model, loss, rates):
    plus, minus = model.single_pair
    u_ref = model.samples[0].reference_margin
    shift = np.linspace(-1, 2, model.d)
    same(ExactFlow(model, loss, *rates), ExactFlow(single(model.W + shift, model.h, plus, minus, u_ref), loss, *rates))


@given(model=models(), loss=losses(), rates=rates(), c=st.floats(0.1, 10))
def test_scale_freedom(model, loss, rates, c):
    """(c W, h/c, c^2 eta_W, eta_h/c^2): every log-probability at every time is the same; kappa scales as c^-4."""
    plus, minus = model.single_pair
    one = ExactFlow(model, loss, *rates)
    other_rates = (c**2 * rates[0], rates[1] / c**2)
    other = ExactFlow(
        single(c * model.W, model.h / c, plus, minus, model.samples[0].reference_margin), loss, *other_rates
    )
    same(one, other)
    assert other.kappa == pytest.approx(one.kappa / c**4)
    assert other.r_max == pytest.approx(one.r_max, rel=1e-6, abs=1e-9)
    if math.isfinite(one.kappa_star) and math.isfinite(other.kappa_star):
        assert other.kappa_star == pytest.approx(one.kappa_star / c**4, rel=1e-3)


@given(model=models(), loss=losses(), rates=rates(), seed=st.integers(0, 2**32 - 1))
def test_rotations_change_nothing(model, loss, rates, seed):
    R = np.linalg.qr(np.random.default_rng(seed).normal(size=(model.d, model.d)))[0]
    plus, minus = model.single_pair
    u_ref = model.samples[0].reference_margin
    same(ExactFlow(model, loss, *rates), ExactFlow(single(model.W @ R, model.h @ R, plus, minus, u_ref), loss, *rates))


@given(model=models(), loss=losses(), rates=rates(), data=st.data())
def test_renaming_tokens_renames_the_answer(model, loss, rates, data):
    order = np.array(data.draw(st.permutations(range(model.V))))
    where = np.argsort(order)
    plus, minus = model.single_pair
    u_ref = model.samples[0].reference_margin
    renamed = single(model.W[order], model.h, int(where[plus]), int(where[minus]), u_ref)
    same(ExactFlow(model, loss, *rates), ExactFlow(renamed, loss, *rates), tokens=order)


@given(model=models(), loss=losses(), rates=rates(), c=st.floats(1e-3, 1e3))
def test_faster_rates_are_shorter_times(model, loss, rates, c):
    """(eta_W, eta_h) -> c (eta_W, eta_h) is t -> c t."""
    fast = ExactFlow(model, loss, c * rates[0], c * rates[1])
    same(fast, ExactFlow(model, loss, *rates), time_factor=c)


@given(model=models(), loss=losses(), rates=rates(), extra=entries())
def test_an_unused_dimension_changes_nothing(model, loss, rates, extra):
    plus, minus = model.single_pair
    # A coordinate in which h is 0 and every row agrees.
    W = np.concatenate([model.W, np.full((model.V, 1), extra)], axis=1)
    h = np.append(model.h, 0.0)
    u_ref = model.samples[0].reference_margin
    same(ExactFlow(model, loss, *rates), ExactFlow(single(W, h, plus, minus, u_ref), loss, *rates))


@pytest.mark.parametrize("regime", REGIMES)
def test_the_invariances_can_fail(regime):
    """The comparison notices a transformation that is not one."""
    model = random_model(np.random.default_rng(70))
    flow = ExactFlow(model, DPO, *REGIMES[regime])
    eta_W, eta_h = REGIMES[regime]
    wrong = [
        ExactFlow(single(model.W + np.eye(5, 3), model.h, u_ref=flow.start_margin), DPO, eta_W, eta_h),
        ExactFlow(single(model.W, 1.001 * model.h, u_ref=flow.start_margin), DPO, eta_W, eta_h),
        ExactFlow(model, DPO, 1.01 * eta_W, 1.01 * eta_h),
        ExactFlow(single(2 * model.W, model.h / 2, u_ref=flow.start_margin), DPO, 2 * eta_W, eta_h / 2),
    ]
    for other in wrong:
        with pytest.raises(AssertionError):
            same(flow, other)
    same(flow, ExactFlow(single(2 * model.W, model.h / 2, u_ref=flow.start_margin), DPO, 4 * eta_W, eta_h / 4))


# ---- 10: extremes, each for what it is


def test_10_P_zero_and_Q_zero_are_rays():
    """h parallel to a: u decays as e^(-2 w tau), or grows as e^(2 w tau), exactly."""
    rates = (2.0, 1.0)
    w = math.sqrt(2 * rates[0] * rates[1])
    constant = get("slic", delta=1e6)  # G = 1: loss-time is time
    for name, sign in (("P = 0", -1), ("Q = 0", 1)):
        flow = ExactFlow(EXTREMES[name], constant, *rates)
        motion = flow.path.motion
        assert (motion.P if sign < 0 else motion.Q)[0, 0] == 0
        times = np.array([0.0, 0.3, 1.0, 2.5])
        expected = flow.start_margin * np.exp(sign * 2 * w * times)
        np.testing.assert_allclose(flow.margin(times), expected, rtol=1e-13)
        np.testing.assert_allclose(
            flow.log_probs(times), oracles.integrated_log_probs(
                flow.model.W, flow.model.h, 0, 1, lambda u: 1.0, times, *rates
            ), atol=1e-9 * math.exp(2 * w * 2.5)
        )  # fmt: skip


def test_10_K0_zero_stands_still_and_a0_or_h0_zero_does_not():
    for loss in (DPO, IPO):
        still = ExactFlow(EXTREMES["K0 = 0"], loss)
        assert still.direction == 0
        assert still.displacement().status == "stationary"
        assert ExactFlow(EXTREMES["a0 = 0"], loss, 0.0, 1.0).direction == 0  # only h trained, and nothing pulls it
        assert ExactFlow(EXTREMES["h0 = 0"], loss, 1.0, 0.0).direction == 0
        for name in ("a0 = 0", "h0 = 0"):
            flow = ExactFlow(EXTREMES[name], loss)
            assert (flow.direction, flow.start_margin) == (1, 0.0)
            times = np.array([0.0, 0.5, 2.0])
            expected = oracles.integrated_log_probs(
                flow.model.W, flow.model.h, 0, 1, oracles.slope_of(loss, 0.0), times, 1.0, 1.0
            )
            np.testing.assert_allclose(flow.log_probs(times), expected, atol=1e-9)
            assert flow.margin([2.0])[0] > 0.1


@pytest.mark.parametrize(
    "loss", [get("slic", delta=2.0), get("gpo_truncated_quadratic", beta=0.5), get("gpo_hinge", beta=0.5)], ids=repr
)
def test_10_a_start_at_the_kink_stands_still(loss):
    kink = 2.0
    model = single([[1.0, 0.5], [-1.0, 0.5], [0.3, 0.2]], [1.0, 0.7], u_ref=0.0)  # u0 = 2 exactly
    assert oracles.margin(model.W, model.h, 0, 1) == kink == loss.kinks(0.0)[0]
    flow = ExactFlow(model, loss)
    assert (flow.direction, flow.stop_margin) == (0, kink)
    assert flow.displacement().status == "stationary"
    np.testing.assert_array_equal(flow.log_probs([0.0, 1.0, np.inf]), flow.log_probs([0.0, 0.0, 0.0]))
    # One rounding error below it moves, and stops at the kink.
    below = ExactFlow(single(model.W, model.h * (1 - 1e-12), u_ref=0.0), loss)
    assert (below.direction, below.stop_margin) == (1, kink)
    assert not np.isnan(below.log_probs([0.0, 1e-13, 1.0, np.inf])).any()
    assert below.margin([np.inf])[0] == kink


@pytest.mark.parametrize("kappa", [1e-12, 1e12])
def test_10_extreme_ratios_approach_the_frozen_flows(kappa):
    """kappa = 1e-12 is h frozen, and 1e12 W frozen, up to terms of relative size 1e-12 growing with the flow."""
    rng = np.random.default_rng(71)
    times = np.array([0.0, 0.5, 3.0, 10.0])
    for loss in (DPO, IPO, get("slic", delta=4.0)):
        model = random_model(rng, u_ref=-0.3)
        near, frozen = ((1.0, kappa), (1.0, 0.0)) if kappa < 1 else ((1 / kappa, 1.0), (0.0, 1.0))
        got, limit = (ExactFlow(model, loss, *r).log_probs(times) for r in (near, frozen))
        np.testing.assert_allclose(got, limit, atol=1e-8)
        assert np.abs(got[-1] - got[0]).max() > 0.1


def test_10_far_negative_starts_keep_their_digits():
    """u0 = -1e4: against the formulas of E2 in 60 digits."""
    import mpmath

    model = EXTREMES["u0 = -1e4"]
    for eta_W, eta_h in ((1.0, 1.0), (1.0, 1e-12), (1e-12, 1.0), (0.0, 1.0)):
        flow = ExactFlow(model, DPO, eta_W, eta_h)
        assert flow.start_margin == -1e4
        for u in (-9999.9, -5000.0, -1e-3, 0.0, 3.0):
            with mpmath.workdps(60):
                W = [[mpmath.mpf(float(x)) for x in row] for row in model.W]
                h0 = [mpmath.mpf(float(x)) for x in model.h]
                a0 = [x - y for x, y in zip(W[0], W[1], strict=True)]
                dot = lambda x, y: sum(p * q for p, q in zip(x, y, strict=True))  # noqa: E731
                eW, eh, m = mpmath.mpf(eta_W), mpmath.mpf(eta_h), mpmath.mpf(u) - dot(a0, h0)
                K0, w2 = 2 * eW * dot(h0, h0) + eh * dot(a0, a0), 2 * eW * eh
                K = mpmath.sqrt(K0**2 - 4 * w2 * dot(a0, h0) ** 2 + 4 * w2 * mpmath.mpf(u) ** 2)
                theta = 2 * m / (K0 + K)
                h = [(x + eh * theta * y) / mpmath.sqrt(1 - w2 * theta**2) for x, y in zip(h0, a0, strict=True)]
                s = [x + y for x, y in zip(W[0], W[1], strict=True)]
                logits = [(dot(s, h) + u) / 2, (dot(s, h) - u) / 2, dot(W[2], h)]
                total = mpmath.log(sum(mpmath.exp(x) for x in logits))
                expected = [float(x - total) for x in logits]
            got = flow.log_probs_at_margin([u])[0]
            np.testing.assert_allclose(got, expected, rtol=1e-11, atol=1e-9)
