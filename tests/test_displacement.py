"""The summary of a flow against dense evaluation, the conditions at the start, and the limits (exact_solution E4, E5)."""

import dataclasses
import itertools
import math
from typing import Any

import numpy as np
import oracles
import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracles import slope_of
from strategies import ENDLESS, EXTREMES, MARGIN, entries, extreme_rates, losses, models, random_model, single

from theory import Displacement, ExactFlow, UnconstrainedFeatures
from theory.losses import get

TINY = 1e-9  # nats: extrema less prominent than this are rounding to a dense grid


def dense(flow: ExactFlow, n: int = 20_001, far: float = 1e9) -> tuple[np.ndarray, np.ndarray]:
    """Margins from the start to the stop (or far out), finely spaced near the start, and ln pi of every token there."""
    reach = min(abs(flow.stop_margin - flow.start_margin), far)
    steps = np.geomspace(min(1e-7, 1e-7 * reach), reach, n)
    if reach < 100:
        steps = np.unique(np.concatenate([steps, reach * np.linspace(1 / n, 1, n)]))
    u = flow.start_margin + flow.direction * np.concatenate([[0.0], steps])
    u[-1] = flow.stop_margin if reach < far else u[-1]
    return u, flow.log_probs_at_margin(u)


def turning_points(f: np.ndarray, prominence: float = TINY) -> list[tuple[str, int]]:
    """Alternating peaks and troughs of a sequence, each left and re-entered by more than `prominence`."""
    f = np.maximum(f, -1e300)
    found: list[tuple[str, int]] = []
    high = low = 0
    rising = falling = False
    for i in range(1, len(f)):
        high = i if f[i] > f[high] else high
        low = i if f[i] < f[low] else low
        if not falling and f[high] - f[i] > prominence:
            found += [("peak", high)] if rising else []
            rising, falling, high, low = False, True, i, i
        elif not rising and f[i] - f[low] > prominence:
            found += [("trough", low)] if falling else []
            rising, falling, high, low = True, False, i, i
    return found


def test_turning_points_of_known_sequences():
    assert turning_points(np.array([0.0, 1, 2, 1, 0, 3])) == [("peak", 2), ("trough", 4)]
    assert turning_points(np.array([0.0, -1, -2, -2, -1])) == [("trough", 2)]
    assert turning_points(np.array([0.0, 1e-12, -1e-12, 1, 2])) == []
    assert turning_points(np.array([0.0, -1, -np.inf])) == []


def assert_summary_is(summary: Displacement, flow: ExactFlow, n: int = 20_001) -> None:
    """Everything the summary says of ln pi(y+), against a dense evaluation of the path."""
    plus = flow.model.single_pair[0]
    u, log_p = dense(flow, n)
    f = log_p[:, plus]
    end = flow.limit_log_probs()[plus]
    said = np.array([summary.start.log_prob, *(p.log_prob for p in summary.extrema), summary.end.log_prob])
    tolerance = TINY * (1 + abs(f[0]))
    assert summary.start.log_prob == pytest.approx(f[0], abs=1e-12)
    assert summary.end.log_prob == end

    # Extrema: those of the dense curve are those listed, by kind and value; beside them nothing prominent is listed.
    turns = [(kind, i) for kind, i in turning_points(np.append(f, end), tolerance) if i < len(f)]
    kept = [summary.extrema[i - 1] for _, i in turning_points(said, tolerance) if 0 < i < len(said) - 1]
    assert [p.kind for p in kept] == [kind for kind, _ in turns]
    for point, (_, i) in zip(kept, turns, strict=True):
        change = float(np.ptp(f[max(i - 1, 0) : i + 2]))
        assert abs(point.log_prob - f[i]) <= change + tolerance
        there = flow.log_probs_at_margin([point.margin])[0, plus]
        assert there == pytest.approx(point.log_prob, abs=tolerance, rel=1e-9)
    assert all(a.kind != b.kind for a, b in itertools.pairwise(summary.extrema)), "peaks and troughs alternate"
    assert (flow.direction * np.diff([p.margin for p in summary.extrema]) >= 0).all()

    # Depth: the dense minimum is never below the exact one, and above it by less than the curve changes in a step.
    lowest = int(np.argmin(f))
    depth = min(f[lowest], end) - f[0]
    change = float(np.ptp(f[max(lowest - 1, 0) : lowest + 2]))
    assert summary.depth <= min(depth, 0.0) + tolerance
    if np.isfinite(depth):
        assert summary.depth >= min(depth, 0.0) - change - tolerance
        assert summary.final_change == pytest.approx(end - f[0], abs=1e-12)
    else:
        assert summary.depth == summary.final_change == -np.inf

    # Status, from the dense values alone (when they are not within rounding of the start).
    if depth < -tolerance:
        assert summary.status == ("permanent" if end - f[0] < -tolerance else "transient")
    elif depth > -tolerance / 1e6:
        assert summary.status == "none"

    # The last return: at the start's value, nothing below it later, and the last low dense point before it.
    if summary.status == "transient":
        back = summary.last_return
        assert back is not None
        assert back.log_prob == pytest.approx(f[0], abs=tolerance)
        assert (f[u > back.margin] >= f[0] - tolerance).all()
        low = np.nonzero(f < f[0] - tolerance)[0]
        assert not low.size or u[low[-1]] <= back.margin
        at = flow.log_probs_at_margin([back.margin])[0, plus]
        assert at == pytest.approx(f[0], abs=tolerance, rel=1e-9)
    else:
        assert summary.last_return is None

    # The paper's statistic: the largest fall of pi(y+) from any point to a later one.
    p = np.exp(np.append(f, end))
    fall = float((np.maximum.accumulate(p) - p).max())
    assert fall - 1e-9 <= summary.largest_drop <= fall + float(np.abs(np.diff(p)).max()) + 1e-9

    slack = TINY * (1 + abs(summary.trough.log_prob)) if np.isfinite(summary.trough.log_prob) else 0.0
    assert summary.lower_bound - slack <= summary.trough.log_prob <= summary.upper_bound + slack


def drawn_flow(rng: np.random.Generator) -> ExactFlow:
    V, d, scale = int(rng.integers(2, 13)), int(rng.integers(1, 4)), float(rng.choice([0.3, 1, 2, 4]))
    kappa = 10 ** rng.uniform(-1, 3)
    rates = [(1.0, kappa), (1.0, kappa), (1.0, kappa), (0.0, 1.0), (1.0, 0.0)][rng.integers(5)]
    losses = [get("dpo"), get("ipo"), get("slic", delta=3.0), get("cdpo", beta=0.3), get("gpo_savage", beta=0.7)]
    W, h = scale * rng.normal(size=(V, d)), scale * rng.normal(size=d) * rng.choice([0.1, 1.0, 3.0])
    u_ref = None if rng.random() < 0.5 else float(5 * rng.normal())
    return ExactFlow(single(W, h, u_ref=u_ref), losses[rng.integers(len(losses))], *rates)


def test_the_summary_equals_dense_evaluation_on_random_models():
    rng = np.random.default_rng(30)
    seen: dict[str, int] = {}
    for _ in range(90):
        flow = drawn_flow(rng)
        summary = flow.displacement()
        seen[summary.status] = seen.get(summary.status, 0) + 1
        if flow.direction:
            assert_summary_is(summary, flow)
    assert all(seen.get(status, 0) >= 3 for status in ("none", "transient", "permanent", "stationary")), seen


def test_the_summary_equals_dense_evaluation_with_kernels():
    rng = np.random.default_rng(31)
    seen = set()
    for i in range(24):
        d = int(rng.integers(2, 4))
        A = rng.normal(size=(d, int(rng.integers(1, d + 1))))
        model = random_model(rng, int(rng.integers(4, 12)), d, float(rng.choice([1, 2])))
        flow = ExactFlow(
            model, get("dpo") if i % 2 else get("ipo"), float(i % 3 > 0), 10 ** rng.uniform(-1, 2) * A @ A.T
        )
        summary = flow.displacement()
        if flow.direction:
            seen.add(summary.status)
            assert_summary_is(summary, flow, n=4_001)
    assert seen == {"none", "transient", "permanent"}


# ---- several troughs


def bumpy(intervals: list[tuple[float, float]], strength: float = 1.0) -> tuple[UnconstrainedFeatures, float]:
    """A model with one token per interval of x = e^{w tau} that overtakes y+ exactly there, and its w (kappa = 1).

    D_z(x) = alpha x + beta/x - (P x^2 - Q/x^2)/(8 w) has two free numbers per token (E2): put its zeros at both ends.
    """
    h, a = strength * np.array([3.0, -1.0]), strength * np.array([4.0, 1.5])
    w, p, q = math.sqrt(2), math.sqrt(2) * h + a, math.sqrt(2) * h - a
    P, Q = p @ p, q @ q
    W = [a / 2, -a / 2]
    for interval in intervals:
        x = np.array(interval)
        coefficients = np.linalg.solve(np.stack([x, 1 / x], axis=1), (P * x**2 - Q / x**2) / (8 * w))
        W.append(np.linalg.solve(np.stack([p, q]), 2 * math.sqrt(2) * coefficients))
    return single(W, h), w


@pytest.mark.parametrize(
    "intervals",
    [[(1.3, 1.5)], [(1.3, 1.5), (2.0, 2.6)], [(1.2, 1.3), (1.7, 1.9), (2.6, 3.0), (4.2, 5.2)]],
    ids=lambda x: f"{len(x)} troughs",
)
def test_every_trough_is_found(intervals):
    model, w = bumpy(intervals, strength=6.0)
    flow = ExactFlow(model, get("dpo"))
    summary = flow.displacement()
    troughs = [p for p in summary.extrema if p.kind == "trough"]
    assert len(troughs) == len(intervals)
    for point, (low, high) in zip(troughs, intervals, strict=True):
        # y+ lies below one half exactly between the ends of the interval: the trough is inside.
        K0 = 2 * model.h @ model.h + (model.W[0] - model.W[1]) @ (model.W[0] - model.W[1])
        u_low, u_high = (float(margin_at(model, w, x, K0)) for x in (low, high))
        assert u_low < point.margin < u_high
        assert point.log_prob < -math.log(2)
    assert summary.status == "transient"
    assert summary.depth == min(p.log_prob for p in troughs) - summary.start.log_prob
    assert summary.last_return is not None
    assert summary.last_return.margin > troughs[-1].margin
    assert_summary_is(summary, flow)


def margin_at(model: UnconstrainedFeatures, w: float, x: float, K0: float) -> float:
    """u = u0 cosh(2 w tau) + K0 sinh(2 w tau)/(2 w), x = e^{w tau}."""
    y = 2 * math.log(x)
    return float((model.W[0] - model.W[1]) @ model.h) * math.cosh(y) + K0 * math.sinh(y) / (2 * w)


@pytest.mark.parametrize("before", [0, 1, 2])
@pytest.mark.parametrize("name", ["ipo", "slic"])
def test_a_flow_that_stops_between_troughs_sees_only_those_before(name, before):
    model, _ = bumpy([(1.2, 1.3), (1.7, 1.9), (2.6, 3.0)], strength=6.0)
    endless = ExactFlow(model, get("dpo"))
    margins = [p.margin for p in endless.displacement().extrema if p.kind == "trough"]
    assert len(margins) == 3
    bounds = [endless.start_margin, *margins]
    stop = 0.05 * bounds[before] + 0.95 * bounds[before + 1]  # just before the next trough
    loss = get("ipo", tau=0.5 / (stop - bounds[0])) if name == "ipo" else get("slic", delta=stop)
    flow = ExactFlow(model, loss)
    assert flow.stop_margin == pytest.approx(stop, rel=1e-12)
    summary = flow.displacement()
    assert [p.margin for p in summary.extrema if p.kind == "trough"] == pytest.approx(margins[:before], rel=1e-9)
    assert summary.status == "permanent"
    assert_summary_is(summary, flow)


def test_the_comparison_fails_on_a_tampered_summary():
    model, _ = bumpy([(1.3, 1.5), (2.0, 2.6)], strength=6.0)
    flow = ExactFlow(model, get("dpo"))
    right = flow.displacement()
    assert_summary_is(right, flow)
    assert right.last_return is not None
    first_trough = next(p for p in right.extrema if p.kind == "trough")
    wrong: list[dict[str, Any]] = [
        {"extrema": right.extrema[2:]},
        {"extrema": (*right.extrema[:-1], dataclasses.replace(right.extrema[-1], log_prob=-1e-3))},
        {"depth": right.depth / 2},
        {"depth": 1.01 * right.depth},
        {"status": "permanent"},
        {"last_return": dataclasses.replace(right.last_return, margin=first_trough.margin)},
        {"last_return": None},
        {"largest_drop": right.largest_drop / 2},
        {"lower_bound": right.trough.log_prob + 0.01},
        {"upper_bound": right.trough.log_prob - 0.01},
        {"final_change": -0.1},
    ]
    for change in wrong:
        with pytest.raises(AssertionError):
            assert_summary_is(dataclasses.replace(right, **change), flow)


def test_log_times_of_the_points_are_those_of_the_clock():
    model, _ = bumpy([(1.3, 1.5), (2.0, 2.6)], strength=3.0)
    flow = ExactFlow(model, get("dpo", beta=0.02))
    summary = flow.displacement()
    assert summary.last_return is not None
    points = [*summary.extrema, summary.last_return]
    assert len(points) >= 4
    for point in points:
        assert point.log_time == pytest.approx(float(flow.log_time_at_margin([point.margin])[0]), abs=1e-7)
        at = flow.log_probs(log_times=[point.log_time])[0, 0]
        assert at == pytest.approx(point.log_prob, abs=1e-6)
    assert (np.diff([p.log_time for p in points]) > 0).all()
    assert (summary.start.log_time, summary.end.log_time, summary.end.margin) == (-np.inf, np.inf, np.inf)


def test_gainers_are_the_tokens_that_rise_most():
    rng = np.random.default_rng(33)
    checked = 0
    for _ in range(30):
        model = random_model(rng, 7, 3, 1.5)
        flow = ExactFlow(model, get("ipo"), 1.0, 5.0)
        summary = flow.displacement(top=3)
        start = np.exp(oracles.log_probs(model.W, model.h))
        for point, gainers in ((summary.trough, summary.gainers_at_trough), (summary.end, summary.gainers_at_end)):
            then = np.exp(flow.log_probs_at_margin([point.margin])[0])
            rise = then - start
            expected = [z for z in np.argsort(-rise)[:3] if rise[z] > 1e-12]
            assert [g.token for g in gainers if g.then - g.start > 1e-12] == expected
            for g in gainers:
                assert g.name == str(g.token)
                assert (g.start, g.then) == (pytest.approx(start[g.token]), pytest.approx(then[g.token]))
                assert g.log_change == pytest.approx(math.log(then[g.token] / start[g.token]), abs=1e-9)
            checked += len(expected)
        if summary.trough == summary.start:
            assert summary.gainers_at_trough == ()
    assert checked > 40


def test_the_summary_reads_well():
    model = UnconstrainedFeatures.single_token(
        bumpy([(1.3, 1.5)])[0].W, bumpy([(1.3, 1.5)])[0].h, "no", "never", tokens=["no", "never", "<yes>"]
    )
    summary = ExactFlow(model, get("dpo")).displacement()
    text, page, record = str(summary), summary._repr_html_(), summary.to_dict()
    assert "transient" in text
    assert "back at its start" in text
    assert "<yes>" in text
    assert "&lt;yes&gt;" in page
    assert "<yes>" not in page
    assert record["status"] == summary.status
    assert record["trough"]["log_prob"] == summary.trough.log_prob
    assert len(record["extrema"]) == len(summary.extrema)


# ---- the conditions at the start


def initial_rate(model: UnconstrainedFeatures, G: float, eta_W: float, eta_h: float) -> float:
    """d/dt ln pi(+) of E4, retyped."""
    p, a = np.exp(oracles.log_probs(model.W, model.h)), model.W[0] - model.W[1]
    return float(G * (eta_h * (model.W[0] - p @ model.W) @ a + eta_W * (1 - p[0] + p[1]) * model.h @ model.h))


def test_initial_rate_and_curvature_against_the_formulas():
    rng = np.random.default_rng(34)
    for loss, (eta_W, eta_h) in itertools.product(MARGIN, [(1.0, 1.0), (0.0, 2.0), (0.5, 0.0), (0.3, 7.0)]):
        model = random_model(rng, 5, 3, u_ref=-0.4)
        summary = ExactFlow(model, loss, eta_W, eta_h).displacement()
        W, h = model.W, model.h
        a, L = W[0] - W[1], W @ h
        p = np.exp(oracles.log_probs(W, h))
        e = np.eye(5)
        G = slope_of(loss, -0.4)(a @ h)
        assert summary.initial_rate == pytest.approx(initial_rate(model, G, eta_W, eta_h), rel=1e-11, abs=1e-13)
        # d^2 ln pi(+)/d tau^2 of E4
        w2, L1 = 2 * eta_W * eta_h, eta_h * W @ a + eta_W * (h @ h) * (e[0] - e[1])
        curvature = w2 * (e[0] - p) @ L + 1.5 * w2 * (a @ h) * (1 - p[0] + p[1]) - p @ L1**2 + (p @ L1) ** 2
        if G != 0:
            assert summary.initial_curvature == pytest.approx(curvature, rel=1e-10, abs=1e-10)


def test_curvature_is_the_second_derivative_in_loss_time():
    """By second differences of a run with a constant slope, where loss-time is time."""
    model, loss = random_model(np.random.default_rng(35)), get("slic", delta=50.0)
    flow = ExactFlow(model, loss, 0.8, 1.7)
    t = 1e-4
    f = flow.log_probs([0.0, t, 2 * t])[:, 0]
    # One-sided: the error is t times the third derivative.
    assert (f[2] - 2 * f[1] + f[0]) / t**2 == pytest.approx(flow.displacement().initial_curvature, rel=1e-2)


def test_kappa_star_separates_falling_from_rising_starts():
    """On integrated parameters, which know nothing of kappa*."""
    rng = np.random.default_rng(36)
    found = 0
    for _ in range(80):
        model = random_model(rng, 8, 2)
        star = ExactFlow(model, get("dpo")).kappa_star
        if not np.isfinite(star):
            a = model.W[0] - model.W[1]
            assert (model.W[0] - np.exp(oracles.log_probs(model.W, model.h)) @ model.W) @ a >= -1e-12
            continue
        found += 1
        for factor, sign in ((0.99, 1), (1.01, -1)):
            kappa = factor * star
            t = 1e-4 / max(1.0, kappa)
            f = oracles.integrated_log_probs(
                model.W, model.h, 0, 1, slope_of(get("dpo"), model.samples[0].reference_margin), [0.0, t], 1.0, kappa
            )[:, 0]
            assert np.sign(f[1] - f[0]) == sign
            summary = ExactFlow(model, get("dpo"), 1.0, kappa).displacement()
            assert np.sign(summary.initial_rate) == sign
            assert summary.kappa_star == pytest.approx(star, rel=1e-12)
            if sign < 0:
                assert summary.status in ("transient", "permanent")
    assert found > 10


def test_kappa_star_and_r_max_do_not_depend_on_the_rates():
    rng = np.random.default_rng(37)
    for _ in range(10):
        model = random_model(rng, 5, 3)
        flows = [ExactFlow(model, get("dpo"), *rates) for rates in [(1.0, 1.0), (0.0, 1.0), (1.0, 0.0), (0.3, 1e4)]]
        assert len({round(f.kappa_star, 9) for f in flows}) == 1
        assert len({round(f.r_max, 9) for f in flows}) == 1


@st.composite
def widest_pairs(draw: st.DrawFn) -> UnconstrainedFeatures:
    """y+ and y- are the two tokens furthest apart: then <W_z, a> <= <W_+, a> for every z, that is, r_max <= 1."""
    model = draw(models(min_tokens=3, reference=False))
    far = np.linalg.norm(model.W[:, None] - model.W[None], axis=-1)
    plus, minus = np.unravel_index(far.argmax(), far.shape)
    return single(model.W, model.h, int(plus), int(minus)) if plus != minus else model


@given(model=widest_pairs(), stretch=st.floats(-3, 3), kappa=st.floats(-12, 12))
def test_r_max_at_most_one_never_displaces_at_the_start(model, stretch, kappa):
    plus, minus = model.single_pair
    flow = ExactFlow(model, get("dpo"))
    assert flow.r_max <= 1 + 1e-9
    # Any h: the drawn one, stretched; any ratio of rates.
    other = single(model.W, model.h * 10**stretch, plus, minus)
    summary = ExactFlow(other, get("dpo"), *((1.0, 10**kappa) if kappa < 0 else (10**-kappa, 1.0))).displacement()
    assert summary.initial_rate >= -1e-12 * (1 + np.abs(model.W).max() ** 2)
    assert ExactFlow(other, get("dpo")).kappa_star > 1e9


def test_r_max_above_one_exhibits_a_start_that_displaces():
    rng = np.random.default_rng(38)
    found = 0
    for _ in range(40):
        model = random_model(rng, 5, 3)
        r_max = ExactFlow(model, get("dpo")).r_max
        a = model.W[0] - model.W[1]
        by_hand = max((2 * model.W[z] - model.W[0] - model.W[1]) @ a for z in range(2, 5)) / (a @ a)
        assert r_max == pytest.approx(by_hand, rel=1e-12)
        if r_max <= 1:
            continue
        # All mass on the most aligned token: h far along a.
        h = next(
            c * a for c in 2.0 ** np.arange(12) if ExactFlow(single(model.W, c * a), get("dpo")).kappa_star < np.inf
        )
        witness = single(model.W, h)
        kappa = 2 * ExactFlow(witness, get("dpo")).kappa_star
        summary = ExactFlow(witness, get("dpo"), 1.0, kappa).displacement()
        assert summary.initial_rate < 0
        assert summary.depth < 0
        found += 1
    assert found > 8


@given(model=models(min_tokens=3, reference=False), kappa=st.floats(-3, 3))
def test_bounds_of_the_trough_hold(model, kappa):
    """-ln(1 + e^-u0 + (V-2) e^D*) <= min ln pi(+) <= -ln(1 + e^D*) (E4), with D* found densely as well."""
    flow = ExactFlow(model, get("dpo"), 1.0, 10**kappa)
    summary = flow.displacement()
    tolerance = 1e-9 * (1 + abs(summary.trough.log_prob))
    assert summary.lower_bound - tolerance <= summary.trough.log_prob <= summary.upper_bound + tolerance
    if flow.direction and np.isposinf(flow.stop_margin):
        _, log_p = dense(flow, 2001)
        plus, minus = model.single_pair
        odds = np.delete(log_p - log_p[:, [plus]], [plus, minus], axis=1).max()
        lower = -np.logaddexp(np.logaddexp(0, -flow.start_margin), math.log(model.V - 2) + odds)
        assert summary.lower_bound == pytest.approx(lower, rel=1e-3, abs=1e-3)
        assert summary.lower_bound <= lower + 1e-9


# ---- large kappa, limits


def test_large_kappa_asymptotics():
    rng = np.random.default_rng(39)
    kappa, checked = 1e10, 0
    for _ in range(40):
        model = random_model(rng, 6, 2)
        flow = ExactFlow(model, get("dpo"), 1.0, kappa)
        r = flow.r_max
        if r <= 1.05:
            continue
        summary = flow.displacement()
        n, c = float(np.sum((model.W[0] - model.W[1]) ** 2)), (r + math.sqrt(r * r + 8)) / 4
        trough = -n * math.sqrt(kappa / 8) * math.sqrt(c * c - 1) * (r - c)
        assert summary.status == "transient"
        assert summary.trough.log_prob == pytest.approx(trough, rel=2e-3)
        assert summary.last_return is not None
        recovery = n * math.sqrt(kappa / 2) * r * math.sqrt(r * r - 1)
        assert summary.last_return.margin == pytest.approx(recovery, rel=2e-3)
        checked += 1
    assert checked > 8


@pytest.mark.parametrize("loss", ENDLESS, ids=repr)
def test_with_both_trained_the_preferred_token_wins_in_the_end(loss):
    rng = np.random.default_rng(40)
    for _ in range(3):
        model = random_model(rng, 6, 3, 1.5)
        flow = ExactFlow(model, loss, 1.0, 3.0)
        assert flow.limit_log_probs().tolist() == [0.0] + [-np.inf] * 5
        # As late as e^2000, but for losses whose margin explodes not beyond a margin of 1e8.
        at = min(2e3, float(flow.log_time_at_margin([1e8])[0]))
        late = flow.log_probs(log_times=[at])[0]
        assert late[0] > -1e-9
        # logit_+ ~ u/2 and every other O(sqrt u)
        u = float(flow.margin(log_times=[at])[0])
        assert -late[1] == pytest.approx(u, rel=1e-9)
        assert (np.abs(-late[2:] - u / 2) < 20 * math.sqrt(u)).all()
        assert flow.displacement().status in ("none", "transient")


def test_P_zero_decays_to_uniform_and_reaches_no_positive_minimiser():
    model, rates = EXTREMES["P = 0"], extreme_rates("P = 0")
    for loss in (get("dpo"), get("ipo", tau=0.1), get("slic", delta=1.0), get("gpo_savage")):
        flow = ExactFlow(model, loss, *rates)
        assert flow.start_margin < 0
        assert flow.stop_margin == 0
        np.testing.assert_allclose(flow.limit_log_probs(), -math.log(4), atol=1e-15)
        np.testing.assert_allclose(flow.log_probs([1e4])[0], -math.log(4), atol=1e-6)
        u = flow.margin([0.0, 1.0, 10.0, 1e3, np.inf])
        assert (np.diff(u) >= 0).all()
        assert (u <= 0).all()
        assert u[-1] == 0
        summary = flow.displacement()
        assert summary.end.log_time == np.inf
        assert summary.end.log_prob == pytest.approx(-math.log(4))
        with pytest.raises(ValueError, match="margin the path reaches"):
            flow.log_probs_at_margin([0.1])
    # A minimiser on the way (a start far below its reference) is reached as usual.
    flow = ExactFlow(single(model.W, model.h, u_ref=-7.0), get("ipo", tau=0.1), *rates)
    assert flow.stop_margin == -2.0
    assert ExactFlow(single(model.W, model.h, u_ref=-6.5), get("ipo", tau=0.1), *rates).stop_margin == -1.5


@pytest.mark.parametrize("loss", ENDLESS, ids=repr)
def test_with_W_frozen_the_most_aligned_token_wins(loss):
    rng = np.random.default_rng(41)
    lost = 0
    for _ in range(6):
        model = random_model(rng, 9, 2)
        flow = ExactFlow(model, loss, 0.0, 1.0)
        winner = int(np.argmax(model.W @ (model.W[0] - model.W[1])))
        expected = np.where(np.arange(9) == winner, 0.0, -np.inf)
        np.testing.assert_array_equal(flow.limit_log_probs(), expected)
        assert flow.log_probs(log_times=[1e4])[0].argmax() == winner
        summary = flow.displacement()
        assert summary.final_change == (-summary.start.log_prob if winner == 0 else -np.inf)
        lost += winner != 0
        assert summary.status == ("permanent" if winner != 0 else summary.status)
    assert 0 < lost < 6


@pytest.mark.parametrize("name", ["tie", "equal rows"])
def test_with_W_frozen_ties_share_the_limit(name):
    """pi(+) -> 1/(1 + sum over ties of e^{<W_z - W_+, h0>}), above the start."""
    model = EXTREMES[name]
    a = model.W[0] - model.W[1]
    ties = [z for z in range(2, model.V) if (model.W[z] - model.W[0]) @ a == 0]
    assert ties
    limit = -math.log(1 + sum(math.exp((model.W[z] - model.W[0]) @ model.h) for z in ties))
    flow = ExactFlow(model, get("dpo"), 0.0, 1.0)
    assert flow.limit_log_probs()[0] == pytest.approx(limit, abs=1e-14)
    assert flow.log_probs(log_times=[1e3])[0, 0] == pytest.approx(limit, abs=1e-12)
    summary = flow.displacement()
    assert summary.end.log_prob > summary.start.log_prob
    assert summary.status == "none"
    assert flow.r_max == 1.0


@given(model=models(min_tokens=3), loss=losses(), eta_h=st.floats(1e-3, 1e3))
def test_with_W_frozen_displacement_never_recovers(model, loss, eta_h):
    """ln pi(+) and ln pi(-) are concave along the path (E4), which is linear in the margin."""
    flow = ExactFlow(model, loss, 0.0, eta_h)
    assert flow.displacement().status in ("none", "permanent", "stationary")
    if flow.path.motion.K0.sum() == 0:
        return
    u = flow.start_margin + np.linspace(-8, 8, 41)
    log_p = flow.log_probs_at_margin(u)[:, list(model.single_pair)]
    bend = log_p[2:] - 2 * log_p[1:-1] + log_p[:-2]
    assert (bend <= 1e-12 * (1 + np.abs(log_p).max())).all()


def test_without_freezing_W_displacement_does_recover():
    model, _ = bumpy([(1.3, 1.5)])
    assert ExactFlow(model, get("dpo")).displacement().status == "transient"
    assert ExactFlow(model, get("dpo"), 0.0, 1.0).displacement().status != "transient"


@given(model=models(min_tokens=3), loss=losses())
def test_with_h_frozen_the_preferred_token_never_falls(model, loss):
    flow = ExactFlow(model, loss, 1.0, 0.0)
    f = flow.log_probs(log_times=np.linspace(-5, 8, 40))[:, model.single_pair[0]]
    assert (flow.direction * np.diff(f) >= -1e-12).all()
    if flow.direction > 0:
        assert flow.displacement().status == "none"


@pytest.mark.parametrize("loss", [get("ipo"), get("cdpo", beta=0.6, eps=0.27), get("rebel"), get("slic")], ids=repr)
def test_a_finite_minimiser_decides_what_is_permanent(loss):
    rng = np.random.default_rng(42)
    seen = set()
    for _ in range(40):
        model = random_model(rng, 6, 3, 2.0)
        flow = ExactFlow(model, loss, 1.0, 20.0)
        summary = flow.displacement()
        least = float(loss.minimiser(model.samples[0].reference_margin))
        if flow.direction == 0:
            assert flow.start_margin >= least
            continue
        assert flow.stop_margin == least
        there = flow.log_probs_at_margin([least])[0, 0]
        assert summary.end.log_prob == pytest.approx(there, abs=1e-12)
        assert flow.log_probs([np.inf])[0, 0] == pytest.approx(there, abs=1e-12)
        assert (summary.status == "permanent") == (there < summary.start.log_prob - 1e-9)
        seen.add(summary.status)
    assert {"none", "permanent"} <= seen


def test_recovery_time_of_dpo():
    """t ~ e^{beta (u_rec - u_ref)} / (2 w beta^2 u_rec): a matter of beta times the recovery margin (E5)."""
    model, _ = bumpy([(1.3, 1.5), (2.0, 2.6)], strength=6.0)
    for beta in (0.05, 0.5):
        flow = ExactFlow(model, get("dpo", beta=beta))
        back = flow.displacement().last_return
        assert back is not None
        w = math.sqrt(2)
        expected = beta * (back.margin - flow.start_margin) - math.log(2 * w * beta**2 * back.margin)
        assert back.log_time == pytest.approx(expected, abs=0.2)


@pytest.mark.parametrize("name", EXTREMES)
@pytest.mark.parametrize("rates", [None, (0.0, 1.0), (1.0, 0.0), (1.0, 1e-12), (1.0, 1e12), (0.0, 0.0)], ids=str)
def test_the_summary_of_an_extreme_has_no_nan(name, rates):
    model = EXTREMES[name]
    for loss in (get("dpo"), get("ipo"), get("slic", delta=3.0), get("gpo_exponential"), get("cdpo")):
        flow = ExactFlow(model, loss, *(rates or extreme_rates(name)))
        summary = flow.displacement()
        for value in numbers(summary.to_dict()):
            assert not math.isnan(value)
        if flow.direction:
            assert (summary.status == "stationary") is False
        else:
            assert (summary.status, summary.depth, summary.final_change) == ("stationary", 0.0, 0.0)


def numbers(record: Any) -> list[float]:
    """Every float in a nested record."""
    if isinstance(record, float):
        return [record]
    parts = record.values() if isinstance(record, dict) else record if isinstance(record, list | tuple) else []
    return [x for part in parts for x in numbers(part)]


@given(model=models(bound=8.0), loss=losses(), kappa=st.floats(-6, 6), u_ref=entries(20.0))
def test_the_summary_never_fails(model, loss, kappa, u_ref):
    plus, minus = model.single_pair
    model = single(model.W, model.h, plus, minus, u_ref)
    summary = ExactFlow(model, loss, 1.0, 10**kappa).displacement()
    assert not any(math.isnan(x) for x in numbers(summary.to_dict()))
    assert summary.depth <= 0 <= summary.largest_drop
    assert str(summary)
