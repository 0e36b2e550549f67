"""ExactFlow against an integration of all parameters that shares no formula with it, its limits, and its summary."""

import dataclasses
import itertools
import math
from typing import Any

import numpy as np
import oracles
import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracles import integrated_log_probs, slope_of
from scipy.integrate import solve_ivp
from strategies import EXTREMES, MARGIN, REGIMES, SMOOTH, extreme_rates, losses, models, random_model, single

from theory import ExactFlow, UnconstrainedFeatures, batch_log_probs
from theory.losses import get

# DOP853 at rtol 1e-12 ends within about 1e2 rtol of the truth here; the margins of these runs stay below 1e2.
RTOL = 1e-12
ATOL = 1e3 * RTOL
TIMES = np.array([0.0, 0.1, 1.0, 4.0])


def integrated(model: UnconstrainedFeatures, loss: Any, times: np.ndarray, eta_W: float, eta_h: Any) -> np.ndarray:
    """(T, V) ln pi by integrating W and h; a hinge-like loss is stopped at its kink by an event."""
    u_ref = model.samples[0].reference_margin
    plus, minus = model.single_pair
    u0 = oracles.margin(model.W, model.h, plus, minus)
    ahead = [k for k in loss.kinks(u_ref) if k > u0] if loss not in SMOOTH else []
    stop_at = ahead[0] if ahead else None
    slope = slope_of(loss, u_ref)
    return integrated_log_probs(model.W, model.h, plus, minus, slope, times, eta_W, eta_h, stop_at=stop_at, rtol=RTOL)


def moved(log_p: np.ndarray) -> float:
    return float(np.abs(log_p[-1] - log_p[0]).max())


# ---- against the integration of all parameters


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("loss", MARGIN, ids=repr)
def test_flow_equals_the_integrated_parameters(loss, regime):
    rng = np.random.default_rng(11)
    for V, d, scale, u_ref in [(4, 3, 0.6, None), (3, 2, 1.0, -0.7), (6, 4, 0.8, 1.2)]:
        model = random_model(rng, V, d, scale, u_ref)
        got = ExactFlow(model, loss, *REGIMES[regime]).log_probs(TIMES)
        expected = integrated(model, loss, TIMES, *REGIMES[regime])
        np.testing.assert_allclose(got, expected, rtol=0, atol=ATOL)
        assert moved(expected) > 1e-3


def test_the_comparison_fails_on_a_wrong_rate_loss_or_reference():
    rng = np.random.default_rng(11)
    model, loss = random_model(rng, 4, 3, 0.6, -0.7), get("dpo", beta=0.7)
    right = integrated(model, loss, TIMES, 1.0, 1.0)
    started_at_reference = UnconstrainedFeatures.single_token(model.W, model.h, 0, 1)
    wrong = [
        ExactFlow(model, loss, 1.0, 1.001),
        ExactFlow(model, loss, 1.001, 1.0),
        ExactFlow(model, get("dpo", beta=0.701)),
        ExactFlow(started_at_reference, loss),
        ExactFlow(UnconstrainedFeatures.single_token(model.W, model.h, 1, 0, reference=(0.7, 0.0)), loss),
    ]
    for flow in wrong:
        assert np.abs(flow.log_probs(TIMES) - right).max() > 1e4 * ATOL
    assert np.abs(ExactFlow(model, loss).log_probs(TIMES) - right).max() <= ATOL


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("loss", [get("ipo", tau=0.83), get("cdpo", beta=0.6, eps=0.27), get("rebel")], ids=repr)
def test_a_start_beyond_the_minimiser_walks_backwards(loss, regime):
    model = random_model(np.random.default_rng(12), 4, 3, u_ref=-8.0)
    flow = ExactFlow(model, loss, *REGIMES[regime])
    assert flow.direction == -1
    assert flow.stop_margin < flow.start_margin - 1
    expected = integrated(model, loss, TIMES, *REGIMES[regime])
    np.testing.assert_allclose(flow.log_probs(TIMES), expected, rtol=0, atol=ATOL)
    assert moved(expected) > 0.1
    assert (np.diff(flow.margin(TIMES)) <= 0).all()


@pytest.mark.parametrize("name", ["slic", "gpo_hinge"])
def test_a_hinge_stops_exactly_at_its_kink_in_finite_time(name):
    model = random_model(np.random.default_rng(13), 4, 3)
    loss = get(name)
    kink = loss.kinks(model.samples[0].reference_margin)[0]
    flow = ExactFlow(model, loss, 0.8, 1.1)
    stop_time = float(flow.time_at_margin([kink])[0])
    assert np.isfinite(stop_time)
    assert flow.time_at_margin([kink + 1e-6, kink + 0.5, kink + 5]).tolist() == [np.inf] * 3  # never beyond it
    assert flow.margin([stop_time * (1 - 1e-9)])[0] < kink
    assert flow.margin([stop_time * (1 + 1e-12), 1e9, np.inf]).tolist() == [kink] * 3  # exactly
    assert flow.displacement().end.log_time == pytest.approx(math.log(stop_time), rel=1e-13)
    # Time to the kink with a constant slope: independent quadrature of 1/K by integrating du/dt.
    W, h, G = model.W, model.h, oracles.slope_of(loss, model.samples[0].reference_margin)(kink - 1)
    a = W[0] - W[1]

    def velocity(u: float, x: np.ndarray) -> np.ndarray:  # (h, a, t) against u
        speed = 2 * 0.8 * x[:3] @ x[:3] + 1.1 * x[3:6] @ x[3:6]
        return np.concatenate([1.1 * x[3:6] / speed, 2 * 0.8 * x[:3] / speed, [1 / (G * speed)]])

    run = solve_ivp(velocity, (a @ h, kink), np.concatenate([h, a, [0.0]]), method="DOP853", rtol=RTOL, atol=1e-14)
    assert run.y[-1, -1] == pytest.approx(stop_time, rel=1e-10)


def test_beyond_the_kink_at_the_start_nothing_moves():
    model = single([[3, 0], [-3, 0], [0, 1]], [1, 0.2])  # u0 = 6
    flow = ExactFlow(model, get("slic", delta=1.0))
    assert (flow.direction, flow.start_margin, flow.stop_margin) == (0, 6.0, 6.0)
    np.testing.assert_array_equal(flow.log_probs([0.0, 1.0, np.inf]), flow.log_probs([0.0] * 3))
    summary = flow.displacement()
    assert (summary.status, summary.depth, summary.extrema, summary.initial_rate) == ("stationary", 0.0, (), 0.0)
    assert summary.lower_bound == summary.upper_bound == summary.start.log_prob


# ---- the path does not depend on the loss


@given(model=models(min_tokens=3), loss=losses(), rates=st.sampled_from(list(REGIMES.values())), share=st.floats(0, 1))
def test_every_loss_walks_the_same_path(model, loss, rates, share):
    flow, other = ExactFlow(model, loss, *rates), ExactFlow(model, get("dpo"), *rates)
    # e^share as a time: some point of the flow of `loss`, found by margin on another loss's flow.
    times = [3.0 * share]
    u = flow.margin(times)
    np.testing.assert_allclose(other.log_probs_at_margin(u), flow.log_probs(times), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("regime", REGIMES)
def test_the_path_equals_the_integrated_parameters_of_another_loss(regime):
    """Integrated with IPO, evaluated by margin under DPO: the loss sets only the speed."""
    model = random_model(np.random.default_rng(14), 5, 3)
    ipo = get("ipo", tau=0.1)
    expected = integrated(model, ipo, TIMES, *REGIMES[regime])
    u = expected[:, 0] - expected[:, 1]
    assert np.ptp(u) > 1
    got = ExactFlow(model, get("dpo"), *REGIMES[regime]).log_probs_at_margin(u)
    np.testing.assert_allclose(got, expected, rtol=0, atol=10 * ATOL)


# ---- semigroup, vectorisation, limits of time


@given(
    model=models(min_tokens=3),
    loss=losses(),
    rates=st.sampled_from(list(REGIMES.values())),
    first=st.floats(0.01, 3),
    second=st.floats(0.01, 3),
)
def test_restart_midway_equals_one_run(model, loss, rates, first, second):
    flow = ExactFlow(model, loss, *rates)
    once = flow.log_probs([first + second])
    midway = flow.model_at_margin(float(flow.margin([first])[0]))
    assert midway.samples == model.samples  # references kept
    again = ExactFlow(midway, loss, *rates)
    # A restart rounds W and h: the error is that of the margin, times the growth of the rest of the run.
    size = 1 + np.abs(once).max()
    np.testing.assert_allclose(again.log_probs([second]), once, rtol=0, atol=1e-9 * size)


def test_a_restart_that_forgets_its_reference_is_noticed():
    model, loss = random_model(np.random.default_rng(15)), get("dpo", beta=0.7)
    flow = ExactFlow(model, loss)
    midway = flow.model_at_margin(float(flow.margin([1.0])[0]))
    forgot = UnconstrainedFeatures.single_token(midway.W, midway.h, 0, 1)
    kept, lost = (ExactFlow(m, loss).log_probs([1.0]) for m in (midway, forgot))
    np.testing.assert_allclose(kept, flow.log_probs([2.0]), rtol=0, atol=1e-11)
    assert np.abs(lost - flow.log_probs([2.0])).max() > 1e-3


def test_the_model_at_a_margin_has_the_paths_probabilities():
    model = random_model(np.random.default_rng(16))
    for rates, u in itertools.product(REGIMES.values(), [-2.0, 0.4, 3.0]):
        flow = ExactFlow(model, get("dpo"), *rates)
        there = flow.model_at_margin(u)
        np.testing.assert_allclose(there.next_token_log_probs(), flow.log_probs_at_margin(u)[0], rtol=0, atol=1e-12)
        assert there.log_prob(0) - there.log_prob(1) == pytest.approx(u, abs=1e-12)
        assert np.array_equal(there.W[2:], model.W[2:])
        np.testing.assert_allclose(there.W[0] + there.W[1], model.W[0] + model.W[1], atol=1e-12)


@pytest.mark.parametrize("loss", MARGIN, ids=repr)
def test_a_vector_of_times_equals_a_loop(loss):
    model = random_model(np.random.default_rng(17), u_ref=0.3)
    times = np.array([0.0, 1e-9, 0.2, 0.2, 3.0, 50.0, np.inf])
    flow = ExactFlow(model, loss)
    together, alone = flow.log_probs(times), np.concatenate([flow.log_probs([t]) for t in times])
    # Rows share brackets and panels: the same numbers to the solver's accuracy in ln t, 1e-13.
    with np.errstate(invalid="ignore"):
        assert np.nanmax(np.abs(together - alone) / (1 + np.abs(alone))) < 1e-11
    assert (np.isfinite(together) == np.isfinite(alone)).all()
    assert (flow.log_probs(0.2) == flow.log_probs([0.2])).all()  # a scalar is a grid of one
    # The same grid as logarithms.
    np.testing.assert_allclose(flow.log_probs(log_times=np.log(times[1:-1])), together[1:-1], rtol=1e-13, atol=1e-13)


@given(model=models(), loss=losses(), rates=st.sampled_from(list(REGIMES.values())))
def test_time_zero_is_the_start(model, loss, rates):
    flow = ExactFlow(model, loss, *rates)
    np.testing.assert_allclose(
        flow.log_probs([0.0])[0],
        oracles.log_probs(model.W, model.h),
        rtol=0,
        atol=1e-13 * (1 + np.abs(model.W).max() ** 2),
    )
    assert flow.margin([0.0])[0] == flow.start_margin
    assert flow.log_time_at_margin([flow.start_margin]) == [-np.inf]
    assert flow.time_at_margin([flow.start_margin]) == [0.0]


@given(model=models(), loss=losses(), rates=st.sampled_from(list(REGIMES.values())))
def test_log_probs_normalise_and_differ_by_the_margin(model, loss, rates):
    flow = ExactFlow(model, loss, *rates)
    log_times = np.array([-3.0, 0.0, 2.0, 6.0])
    log_p, u = flow.log_probs(log_times=log_times), flow.margin(log_times=log_times)
    plus, minus = model.single_pair
    np.testing.assert_allclose(np.logaddexp.reduce(log_p, axis=1), 0, atol=1e-12)
    # A slope that stays (robust DPO) drives the margin out of float range: beyond its square root ln pi(y-) is -inf.
    seen = u < 1e150
    np.testing.assert_allclose((log_p[:, plus] - log_p[:, minus])[seen], u[seen], rtol=1e-12, atol=1e-12)
    assert (log_p[~seen][:, minus] <= -1e150).all()


def test_a_margin_that_explodes_is_found_at_any_time():
    """Robust DPO's slope tends to c = beta eps/(1 - 2 eps): loss-time to c t, the margin to e^(2 omega c t)."""
    model = single([[0.0], [0.25], [0.0], [0.0]], [0.0])
    loss = get("robust", beta=2.0, eps=0.375)
    flow = ExactFlow(model, loss, 1.0, 1.0)
    u = flow.margin(log_times=[2.0, 3.0, 4.0, 6.0, 9.0])
    assert (np.diff(u[:3]) > 0).all()
    assert u[3:].tolist() == [np.inf, np.inf]
    growth = (math.log(u[2]) - math.log(u[1])) / (math.exp(4.0) - math.exp(3.0))
    assert growth == pytest.approx(2 * math.sqrt(2) * 3.0, rel=1e-9)
    assert flow.log_probs(log_times=[9.0])[0].tolist() == [0.0] + [-np.inf] * 3


def test_the_batch_equals_single_flows():
    rng = np.random.default_rng(18)
    B, V, d = 7, 5, 3
    W, h = rng.normal(size=(B, V, d)), rng.normal(size=(B, d))
    W[3, 2] = W[3, 4]  # stationary: W_+ = W_- and h = 0
    h[3] = 0
    plus, minus = np.array([0, 1, 2, 2, 4, 0, 3]), np.array([1, 0, 3, 4, 0, 2, 1])
    times = np.array([0.0, 0.5, 7.0])
    for loss, rates in itertools.product(MARGIN, [(1.0, 1.0), (0.0, 2.0), (1.0, 0.0)]):
        got = batch_log_probs(W, h, plus, minus, loss, times, *rates)
        for i in range(B):
            model = UnconstrainedFeatures.single_token(W[i], h[i], int(plus[i]), int(minus[i]))
            expected = ExactFlow(model, loss, *rates).log_probs(times)
            np.testing.assert_allclose(got[i], expected, rtol=1e-11, atol=1e-11)
        assert moved(got[0]) > 1e-3
    kernel = np.diag([0.5, 0.0, 2.0])
    got = batch_log_probs(W, h, plus, minus, get("dpo"), times, 1.0, kernel)
    for i in range(B):
        model = UnconstrainedFeatures.single_token(W[i], h[i], int(plus[i]), int(minus[i]))
        np.testing.assert_allclose(got[i], ExactFlow(model, get("dpo"), 1.0, kernel).log_probs(times), atol=1e-11)

    model = UnconstrainedFeatures.single_token(W[0], h[0], 0, 1)
    np.testing.assert_allclose(
        batch_log_probs(W[:1], h[:1], [0], [1], get("dpo"), times)[0], ExactFlow(model, get("dpo")).log_probs(times)
    )


# ---- the pair alone, limits, what a flow says of itself


@pytest.mark.parametrize("loss", [get("dpo", beta=0.7), get("ipo", tau=0.3), get("slic", delta=2.5)], ids=repr)
def test_the_pair_alone_is_two_columns_of_the_whole(loss):
    """Also beyond float range, where both are the limit, and for a flow that walks backwards."""
    rng = np.random.default_rng(22)
    log_times = np.array([-np.inf, -2.0, 1.0, 800.0, np.inf])
    directions = set()
    for u_ref, rates in itertools.product([None, -9.0], [*REGIMES.values(), (0.6, np.diag([0.2, 0.0, 1.4]))]):
        W, h = rng.normal(size=(5, 3)), rng.normal(size=3)
        flow = ExactFlow(single(W, h, 2, 0, u_ref), loss, *rates)
        directions.add(flow.direction)
        both = flow.pair_log_probs(log_times=log_times)
        np.testing.assert_allclose(both, flow.log_probs(log_times=log_times)[:, [2, 0]], rtol=1e-12, atol=1e-12)
        np.testing.assert_array_equal(flow.pair_log_probs([0.0, np.inf]), both[[0, -1]])
        assert flow.direction == 0 or np.abs(both[3] - both[0]).max() > 0.1
    assert {1} <= directions <= {-1, 0, 1}


def test_a_limit_beyond_float_range_is_not_computed_on_the_way():
    """With rates of 1e3 the path itself overflows at loss-time 1: nothing there may be evaluated (warnings are errors)."""
    model = random_model(np.random.default_rng(23), 4, 3)
    limit = np.array([[0.0, -np.inf, -np.inf, -np.inf]])
    flow = ExactFlow(model, get("dpo"), 1e3, 1e3)
    np.testing.assert_array_equal(flow.log_probs([np.inf]), limit)
    np.testing.assert_array_equal(flow.pair_log_probs([np.inf]), limit[:, :2])
    np.testing.assert_array_equal(flow.log_probs_at_margin([np.inf]), limit)


@pytest.mark.parametrize("u_ref", [None, -9.0], ids=["forwards", "backwards"])
@pytest.mark.parametrize("loss", [get("ipo", tau=0.3), get("cdpo", beta=0.6, eps=0.27)], ids=repr)
def test_the_limit_is_the_path_at_the_minimiser(loss, u_ref):
    rng = np.random.default_rng(24)
    for rates in [*REGIMES.values(), (0.6, np.diag([0.2, 0.0, 1.4]))]:
        model = random_model(rng, 5, 3, u_ref=u_ref)
        flow = ExactFlow(model, loss, *rates)
        assert abs(flow.stop_margin - flow.start_margin) > 0.5
        there = ExactFlow(model, get("dpo"), *rates).model_at_margin(flow.stop_margin)
        np.testing.assert_allclose(flow.limit_log_probs(), oracles.log_probs(there.W, there.h), rtol=0, atol=1e-11)


@pytest.mark.parametrize("scale", [0.05, 1.0])
def test_a_decaying_pair_ends_uniform_at_margin_zero(scale):
    """p = sqrt(2 eta_W) h + sqrt(eta_h) a = 0: h and a shrink together, the margin rises to 0 and never passes it."""
    model = EXTREMES["P = 0"]
    model = UnconstrainedFeatures.single_token(scale * model.W, scale * model.h, 0, 1)
    flow = ExactFlow(model, get("dpo"), *extreme_rates("P = 0"))
    assert flow.start_margin == pytest.approx(-2 * scale**2, rel=1e-12)
    at_end = flow.log_probs_at_margin([0.0])[0]
    np.testing.assert_allclose(at_end, -math.log(model.V), rtol=1e-14)
    nearly = flow.log_probs_at_margin([-1e-9 * scale**2])[0]
    np.testing.assert_allclose(nearly, at_end, atol=1e-3)
    assert np.abs(flow.log_probs_at_margin([flow.start_margin])[0] - at_end).max() > 1e-4
    assert flow.log_time_at_margin([0.0]) == [np.inf]


def test_kappa_is_the_ratio_of_the_rates():
    model = random_model(np.random.default_rng(25), 5, 3)
    assert ExactFlow(model, get("dpo"), 0.3, 2.1).kappa == pytest.approx(7, rel=1e-15)
    assert ExactFlow(model, get("dpo"), 0.3, np.diag([0.3, 0.0, 1.5])).kappa == pytest.approx(2, rel=1e-15)
    assert ExactFlow(model, get("dpo"), 0.0, 2.1).kappa == np.inf
    # The defaults are one and one.
    assert ExactFlow(model, get("dpo")).kappa == 1
    np.testing.assert_array_equal(
        ExactFlow(model, get("dpo")).log_probs(TIMES), ExactFlow(model, get("dpo"), 1, 1).log_probs(TIMES)
    )


def test_r_max_and_alignment_by_their_definitions():
    """max over z of <2 W_z - W_+ - W_-, Kf a>/<a, Kf a>, and <W_z, Kf a> with the trace of Kf scaled to d."""
    rng = np.random.default_rng(26)
    for kind in ["identity", *kernels(rng, 3)]:
        model = random_model(rng, 6, 3)
        kernel = 1.7 * np.eye(3) if kind == "identity" else kernels(rng, 3)[kind]
        flow = ExactFlow(model, get("dpo"), 0.8, 1.7 if kind == "identity" else kernel)
        a = model.W[0] - model.W[1]
        turned = kernel @ a / (np.trace(kernel) / 3)
        np.testing.assert_allclose(flow.alignment, model.W @ turned, rtol=1e-11, atol=1e-12)
        ratios = (2 * model.W[2:] - model.W[0] - model.W[1]) @ turned / (a @ turned)
        assert flow.r_max == pytest.approx(float(ratios.max()), rel=1e-11)


@pytest.mark.parametrize("name", ["P = 0", "Q = 0", "two tokens", "a0 = 0"])
@pytest.mark.parametrize("frozen", [False, True], ids=["both trained", "h frozen"])
def test_alignment_and_r_max_of_extremes(name, frozen):
    """h and a on one line (another basis inside), no other token, nothing that turns; and a body that does not move."""
    model, (eta_W, eta_h) = EXTREMES[name], extreme_rates(name)
    a = model.W[0] - model.W[1]
    other = model.W[2:]
    ratio = max((2 * z - model.W[0] - model.W[1]) @ a / (a @ a) for z in other) if len(other) and a.any() else -np.inf
    for eta in (0.0, np.zeros((model.d, model.d))) if frozen else (eta_h, eta_h * np.eye(model.d)):
        flow = ExactFlow(model, get("dpo"), eta_W, eta)
        np.testing.assert_allclose(flow.alignment, model.W @ a, rtol=1e-14, atol=1e-14)
        assert flow.r_max == pytest.approx(ratio, rel=1e-13)


def test_a_flow_shows_what_it_was_built_from_and_is_itself_alone():
    model = random_model(np.random.default_rng(27), 9, 3)
    flow = ExactFlow(model, get("dpo"), 0.5, 2.0)
    text = repr(flow)
    assert "DPO(beta=0.1)" in text
    assert "lr_unembedding=0.5, lr_hidden=2.0" in text
    assert "Path" not in text
    assert "Clock" not in text
    # Arrays have no single truth value: flows are compared, and hashed, as objects.
    assert flow == flow
    assert len({flow, ExactFlow(model, get("dpo"), 0.5, 2.0)}) == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        flow.lr_hidden = 1.0  # type: ignore[misc]


def test_the_summary_names_five_gainers_unless_told():
    model = single(np.concatenate([[[1.0, 0.0], [0.2, 0.0]], np.linspace([3.0, 0.0], [3.01, 0.0], 8)]), [0.1, 0.3])
    flow = ExactFlow(model, get("ipo", tau=0.3), 0.0, 1.0)
    assert len(flow.displacement(top=8).gainers_at_end) == 8  # all of them rise
    assert len(flow.displacement().gainers_at_end) == 5


# ---- feature kernels (E8)


def kernels(rng: np.random.Generator, d: int) -> dict[str, np.ndarray]:
    A = rng.normal(size=(d, d))
    v = rng.normal(size=d)
    U = np.linalg.qr(A)[0]
    return {
        "full": A @ A.T,
        "rank one": np.outer(v, v),
        "two zeros": U[:, :1] @ U[:, :1].T * 0.7 + U[:, 1:2] @ U[:, 1:2].T * 2.0,
        "repeated": U @ np.diag([0.5] * (d - 1) + [3.0]) @ U.T,
        "diagonal": np.diag(np.arange(d) / 2),
    }


@pytest.mark.parametrize("eta_W", [1.0, 0.0, 0.3], ids=lambda x: f"eta_W={x}")
@pytest.mark.parametrize("kind", ["full", "rank one", "two zeros", "repeated", "diagonal"])
def test_kernel_flow_equals_the_integrated_parameters(kind, eta_W):
    rng = np.random.default_rng(19)
    for d, loss, u_ref in [(3, get("dpo", beta=0.7), None), (4, get("ipo", tau=0.3), -0.6), (4, get("cdpo"), 0.4)]:
        model = random_model(rng, 5, d, 0.8, u_ref)
        kernel = kernels(rng, d)[kind]
        got = ExactFlow(model, loss, eta_W, kernel).log_probs(TIMES)
        expected = integrated(model, loss, TIMES, eta_W, kernel)
        np.testing.assert_allclose(got, expected, rtol=0, atol=ATOL)
        assert moved(expected) > 1e-2


def test_the_kernel_comparison_fails_on_a_wrong_kernel():
    rng = np.random.default_rng(19)
    model, kernel = random_model(rng, 5, 3), kernels(rng, 3)["full"]
    right = integrated(model, get("dpo"), TIMES, 1.0, kernel)
    for wrong in (np.trace(kernel) / 3, np.diag(np.diag(kernel)), 1.001 * kernel):
        assert np.abs(ExactFlow(model, get("dpo"), 1.0, wrong).log_probs(TIMES) - right).max() > 1e4 * ATOL


@given(
    model=models(min_tokens=3),
    loss=losses(),
    c=st.sampled_from([0.0, 1e-12, 0.3, 1.0, 1e6]),
    eta_W=st.sampled_from([0.0, 1.0]),
)
def test_a_multiple_of_the_identity_is_the_number(model, loss, c, eta_W):
    number, matrix = (ExactFlow(model, loss, eta_W, k) for k in (c, c * np.eye(model.d)))
    log_times = np.array([-2.0, 0.0, 1.5])
    np.testing.assert_allclose(
        matrix.log_probs(log_times=log_times), number.log_probs(log_times=log_times), rtol=1e-10, atol=1e-10
    )
    assert matrix.kappa == pytest.approx(number.kappa)
    assert matrix.kappa_star == pytest.approx(number.kappa_star, rel=1e-9)
    assert matrix.r_max == pytest.approx(number.r_max, rel=1e-9, abs=1e-9)
    np.testing.assert_allclose(matrix.alignment, number.alignment, rtol=1e-9, atol=1e-12)


def test_kernel_restart_and_margin():
    rng = np.random.default_rng(20)
    model, loss = random_model(rng, 5, 4), get("dpo", beta=0.4)
    for kernel in kernels(rng, 4).values():
        flow = ExactFlow(model, loss, 0.7, kernel)
        midway = flow.model_at_margin(float(flow.margin([1.0])[0]))
        np.testing.assert_allclose(
            ExactFlow(midway, loss, 0.7, kernel).log_probs([1.5]), flow.log_probs([2.5]), rtol=0, atol=1e-11
        )
        u = np.array([flow.start_margin, flow.start_margin + 0.5, flow.start_margin + 40.0])
        np.testing.assert_allclose(flow.margin(log_times=flow.log_time_at_margin(u)), u, rtol=1e-11)


def test_kernel_start_condition_and_gainers_by_finite_differences():
    """d/dt ln pi(+) = G [<W_+ - Wbar, Kf a> + eta_W (1 - pi_+ + pi_-)|h|^2] and kappa* for a kernel (E8)."""
    rng = np.random.default_rng(21)
    found = 0
    for _ in range(40):
        model, kernel = random_model(rng, 5, 3, 1.5), kernels(rng, 3)["full"]
        flow = ExactFlow(model, get("dpo"), 1.0, kernel)
        p = np.exp(oracles.log_probs(model.W, model.h))
        a = model.W[0] - model.W[1]
        G = 0.1 / 2  # at the reference
        turn = float((model.W[0] - p @ model.W) @ kernel @ a)
        lift = float((1 - p[0] + p[1]) * model.h @ model.h)
        assert flow.displacement().initial_rate == pytest.approx(G * (turn + lift), rel=1e-10, abs=1e-12)
        np.testing.assert_allclose(flow.alignment, model.W @ kernel @ a / (np.trace(kernel) / 3), rtol=1e-9, atol=1e-12)
        if turn < 0:
            # kappa* scales the kernel: at that multiple the initial rate is zero.
            scale = flow.kappa_star / flow.kappa
            assert scale == pytest.approx(lift / -turn, rel=1e-10)
            rates = [
                ExactFlow(model, get("dpo"), 1.0, c * scale * kernel).displacement().initial_rate for c in (0.99, 1.01)
            ]
            assert rates[0] > 0 > rates[1]
            found += 1
        else:
            assert flow.kappa_star == np.inf
    assert found > 3
