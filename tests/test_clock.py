"""The clock t(u): closed forms, generic quadrature and mpmath agree; times from 0 to e^(1e6); no NaN at any extreme."""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mpmath
import numpy as np
import oracles
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mpmath import mpf
from scipy.integrate import solve_ivp
from strategies import EXTREMES, MARGIN, REGIMES, extreme_rates, losses, models, random_model, rates, single

from theory import ExactFlow, SolverError
from theory._quadrature import GAUSS, KRONROD, NODES, TO_ENDS, TOLERANCE, log_integrals
from theory.clock import Clock, log_expm1
from theory.losses import MarginForm, MarginLoss, Pair, get

# ---- the quadrature rule


@pytest.mark.parametrize(("weights", "degree"), [(KRONROD, 22), (GAUSS, 13)], ids=["Kronrod", "Gauss"])
def test_rules_are_exact_on_monomials_up_to_their_degree_and_not_beyond(weights, degree):
    for n in range(degree + 1):
        exact = 2 / (n + 1) if n % 2 == 0 else 0.0
        assert weights @ NODES**n == pytest.approx(exact, abs=2e-15), n
    beyond = degree + 2 if degree % 2 == 0 else degree + 1  # odd powers are exact by symmetry
    assert abs(weights @ NODES**beyond - 2 / (beyond + 1)) > 1e-13
    for n in range(15):  # the polynomial through all 15 nodes, carried to both ends
        np.testing.assert_allclose(TO_ENDS @ NODES**n, [(-1.0) ** n, 1.0], atol=1e-12)
    assert (np.diff(NODES) > 0).all()
    np.testing.assert_array_equal(NODES, -NODES[::-1])


def one(log_f: Callable[[np.ndarray], np.ndarray], lo: float = 0.0, hi: float = 1.0, **kwargs: Any) -> float:
    """ln of one integral, with an integrand known to rounding."""

    def with_noise(owner: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        with np.errstate(divide="ignore"):
            return log_f(x), np.full(x.shape, 1e-15)

    return float(log_integrals(with_noise, np.array([lo]), np.array([hi]), **kwargs)[0])


@pytest.mark.parametrize("c", [1e-3, 1.0, 30.0, 1e3, 1e6, 1e9, -1.0, -1e3, -1e6])
def test_log_integral_of_an_exponential(c):
    """ln int_0^1 e^(c x) dx: 1e6 e-folds within one panel."""
    exact = float(mpmath.log(mpmath.expm1(c) / c))
    assert one(lambda x: c * x) == pytest.approx(exact, rel=1e-13, abs=1e-12)


@pytest.mark.parametrize("kink", [1 / 3, 0.999, 1e-3, 1e-6])
def test_log_integral_over_a_kink(kink):
    """A corner inside the panel, not announced as a kink: bisected until its share is below TOLERANCE."""
    exact = math.log((kink**2 + (1 - kink) ** 2) / 2)
    assert one(lambda x: np.log(np.abs(x - kink))) == pytest.approx(exact, abs=10 * TOLERANCE)


@pytest.mark.parametrize("power", [0.5, 0.25, -0.5, -0.75])
def test_log_integral_with_a_singular_end(power):
    assert one(lambda x: power * np.log(x)) == pytest.approx(-math.log(1 + power), abs=10 * TOLERANCE)
    if power >= -0.5:  # near 1 floats are 1e-16 apart, and (1e-16)^(1 + power) of the integral lies between them
        assert one(lambda x: power * np.log1p(-x)) == pytest.approx(-math.log(1 + power), abs=1e-7)


@pytest.mark.parametrize("layer", [1e-2, 1e-4, 1e-8])
@pytest.mark.parametrize("rise", [20.0, 1e3, 1e6])
def test_log_integral_with_a_layer_that_no_node_sees(layer, rise):
    """Flat, then e-folding `rise` times within the last share `layer` of the panel (or the first)."""
    exact = float(mpmath.log(1 - mpf(layer) + mpf(layer) * mpmath.expm1(rise) / rise))
    ahead = one(lambda x: np.maximum(0.0, rise * (1 - (1 - x) / layer)))
    assert ahead == pytest.approx(exact, rel=1e-9, abs=1e-8)
    behind = one(lambda x: np.maximum(0.0, rise * (1 - x / layer)))
    assert behind == pytest.approx(exact, rel=1e-9, abs=1e-8)


def test_log_integrals_of_many_intervals_at_once():
    lo, hi = np.array([0.0, 1.0, -2.0, 3.0, 0.0]), np.array([1.0, 1.0, 5.0, 3.5, 1e-200])
    c = np.array([1.0, 2.0, -3.0, 700.0, 1.0])

    def log_f(owner: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        assert x.shape[0] == owner.shape[0]
        return c[owner][:, None] * x, np.full(x.shape, 1e-16)

    got = log_integrals(log_f, lo, hi)
    assert got[1] == -np.inf  # zero width
    for i in (0, 2, 3, 4):
        with mpmath.workdps(260):
            a, b, k = (mpf(float(v[i])) for v in (lo, hi, c))
            exact = float(mpmath.log((mpmath.exp(k * b) - mpmath.exp(k * a)) / k))
        assert got[i] == pytest.approx(exact, rel=1e-13)


def test_log_integrals_fail_loudly():
    with pytest.raises(SolverError, match="NaN"):
        one(lambda x: x * np.nan)
    with pytest.raises(SolverError, match="did not settle in 3 bisections"):
        one(lambda x: 1e6 * x, max_depth=3)
    assert one(lambda x: np.where(x > 0.4, np.inf, 0.0)) == np.inf  # correctly infinite
    assert one(lambda x: np.full_like(x, -np.inf)) == -np.inf


@pytest.mark.parametrize("x", [0.0, 1e-300, 1e-9, 0.3, 30.0, 31.0, 700.0, 1e6])
def test_log_expm1(x):
    exact = float(mpmath.log(mpmath.expm1(x))) if x else -math.inf
    with np.errstate(divide="ignore"):
        assert float(log_expm1(np.array(x))) == pytest.approx(exact, rel=1e-14, abs=1e-14)


# ---- t(u) as an integral over the margin (E1), where theory integrates over loss-time


def speed_of(flow: ExactFlow) -> Callable[[Any], Any]:
    """K(u) = sqrt(P Q + 4 w^2 u^2) from h and a alone, for floats, arrays and mpmath numbers."""
    plus, minus = flow.model.single_pair
    a, h, eta_W, eta_h = flow.model.W[plus] - flow.model.W[minus], flow.model.h, flow.lr_unembedding, flow.lr_hidden
    p, q = (math.sqrt(2 * eta_W) * h + s * math.sqrt(eta_h) * a for s in (1, -1))
    PQ, w2 = float(p @ p) * float(q @ q), 8 * eta_W * eta_h
    return lambda u: (PQ + w2 * u * u) ** 0.5


def log_slope(loss: Any, u: np.ndarray, u_ref: float) -> np.ndarray:
    """ln |G|, by hand where G underflows."""
    beta = getattr(loss, "beta", 1.0)
    z = beta * (u - u_ref)
    if loss.name in ("dpo", "gpo_logistic"):
        return math.log(beta) - np.logaddexp(0, z)
    if loss.name == "gpo_exponential":
        return math.log(beta) - z
    if loss.name == "gpo_savage":
        return math.log(2 * beta) - 2 * np.logaddexp(0, z) - np.logaddexp(0, -z)
    return np.log([abs(oracles.slope_of(loss, u_ref)(x)) for x in u.ravel()]).reshape(u.shape)


def log_time_gauss(flow: ExactFlow, u: float) -> float:
    """ln int dv / (|G| K) by 40-point Gauss-Legendre on panels halved towards both ends and towards the reference."""
    u0, u_ref = flow.start_margin, flow.model.samples[0].reference_margin
    length, halves = u - u0, 2.0 ** -np.arange(1, 50)
    cuts = [u0, u, *(u0 + length * halves), *(u - length * halves), u_ref]
    cuts += [u_ref + s * abs(length) * x for s in (1, -1) for x in halves]
    edges = np.unique([c for c in cuts if min(u0, u) <= c <= max(u0, u)])
    nodes, weights = np.polynomial.legendre.leggauss(40)
    half = np.diff(edges)[:, None] / 2
    v = edges[:-1, None] + half * (1 + nodes)
    with np.errstate(divide="ignore"):
        log_f = np.log(weights * half) - log_slope(flow.loss, v, u_ref) - np.log(speed_of(flow)(v))
    return float(np.logaddexp.reduce(log_f.ravel()))


def rounding(flow: ExactFlow, u: float) -> float:
    """How much ln t changes with the last digit of u: 1/(u - u0) near the start, 1/(u* - u) near the stop, beta in general."""
    size = 2.3e-16 * (1 + abs(u) + abs(flow.start_margin) + abs(flow.model.samples[0].reference_margin))
    steepness = getattr(flow.loss, "beta", 1.0) + 1 / abs(u - flow.start_margin)
    return size * (steepness + (0 if np.isinf(flow.stop_margin) else 1 / abs(flow.stop_margin - u)))


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("loss", MARGIN, ids=repr)
def test_times_equal_the_integral_over_the_margin(loss, regime):
    for u_ref in (0.2, None, -12.0):
        flow = ExactFlow(random_model(np.random.default_rng(50), 4, 3, u_ref=u_ref), loss, *REGIMES[regime])
        if flow.direction == 0:
            assert flow.start_margin >= flow.loss.kinks(u_ref)[0]  # type: ignore[attr-defined]
            continue
        end = flow.stop_margin if np.isfinite(flow.stop_margin) else flow.start_margin + 40.0 * flow.direction
        for share in (1e-6, 0.3, 0.999):
            u = flow.start_margin + share * (end - flow.start_margin)
            got = float(flow.log_time_at_margin([u])[0])
            assert got == pytest.approx(log_time_gauss(flow, u), abs=1e-12 + 8 * rounding(flow, u), rel=1e-13)


@pytest.mark.parametrize("loss", [l for l in MARGIN if l.claims.differentiable], ids=repr)
def test_times_equal_mpmath_quadrature(loss):
    """The same with 30 digits and the slope differentiated by mpmath from the formula of the paper."""
    model = random_model(np.random.default_rng(50), 3, 2, u_ref=0.2)
    flow = ExactFlow(model, loss)
    u = flow.start_margin + 0.8 * (min(flow.stop_margin, flow.start_margin + 10) - flow.start_margin)
    speed = speed_of(flow)

    def integrand(v: Any) -> Any:
        step = mpf(10) ** -10
        value = lambda x: oracles.value_of(loss, Pair(x, mpf(0), mpf(0.2), mpf(0)))  # noqa: E731
        return 2 * step / ((value(v - step) - value(v + step)) * speed(v))

    with mpmath.workdps(30):
        exact = float(mpmath.log(mpmath.quad(integrand, np.linspace(flow.start_margin, u, 5).tolist())))
    assert float(flow.log_time_at_margin([u])[0]) == pytest.approx(exact, abs=1e-13 + 8 * rounding(flow, u), rel=1e-13)


def test_the_comparison_fails_on_a_wrong_rate_parameter_or_reference():
    model = random_model(np.random.default_rng(50), 4, 3, u_ref=0.2)
    flow = ExactFlow(model, get("dpo", beta=0.7), 1.0, 1.0)
    exact = log_time_gauss(flow, 5.0)
    moved = random_model(np.random.default_rng(50), 4, 3, u_ref=0.201)
    wrong = [
        ExactFlow(model, get("dpo", beta=0.7), 1.0, 1.001),
        ExactFlow(model, get("dpo", beta=0.7001)),
        ExactFlow(moved, get("dpo", beta=0.7)),
    ]
    assert float(flow.log_time_at_margin([5.0])[0]) == pytest.approx(exact, abs=1e-13)
    for other in wrong:
        assert abs(float(other.log_time_at_margin([5.0])[0]) - exact) > 1e-5


@pytest.mark.parametrize("u_ref", [-1e4, -300.0, 0.0, 300.0, 1e4])
@pytest.mark.parametrize("beta", [1e-3, 0.5, 20.0, 1e3])
@pytest.mark.parametrize("name", ["dpo", "gpo_exponential", "gpo_savage"])
@pytest.mark.parametrize("regime", ["both", "W frozen"])
def test_times_far_from_the_reference(name, beta, u_ref, regime):
    """Flat, then collapsing slopes: boundary layers of width 1/beta at the reference or at the end."""
    flow = ExactFlow(random_model(np.random.default_rng(51), 4, 3, u_ref=u_ref), get(name, beta=beta), *REGIMES[regime])
    for u in (flow.start_margin + 1e-3, 2.0, 350.0, 1100.0, 1e4, 1.0001e4, 1e6):
        exact = log_time_gauss(flow, u)
        got = float(flow.log_time_at_margin([u])[0])
        assert got == pytest.approx(exact, rel=1e-12, abs=1e-11 + 8 * rounding(flow, u)), u


@pytest.mark.parametrize("u_ref", [-300.0, 0.0, 1e4])
@pytest.mark.parametrize("beta", [1e-3, 0.5, 20.0, 1e3])
@pytest.mark.parametrize("name", ["dpo", "gpo_exponential", "gpo_savage", "cdpo"])
def test_margins_at_times_on_both_sides_of_a_collapse(name, beta, u_ref):
    """The inverse of the clock: margins at times chosen around the reference, each timed again by the integral."""
    flow = ExactFlow(random_model(np.random.default_rng(51), 4, 3, u_ref=u_ref), get(name, beta=beta))
    around = np.concatenate(
        [u_ref + np.linspace(-3, 3, 7) / beta, flow.start_margin + flow.direction * np.geomspace(1e-6, 2e4, 9)]
    )
    ahead = (flow.direction * (around - flow.start_margin) > 0) & (flow.direction * (flow.stop_margin - around) > 0)
    log_times = np.sort(flow.log_time_at_margin(around[ahead]))
    compared = 0
    for log_t, u in zip(log_times, flow.margin(log_times=log_times), strict=True):
        if abs(u - flow.start_margin) > 1e-9 and abs(u - flow.stop_margin) > 1e-6:
            exact = log_time_gauss(flow, float(u))
            assert log_t == pytest.approx(exact, rel=1e-12, abs=1e-9 + 20 * rounding(flow, float(u)))
            compared += 1
    assert compared >= 3


# ---- the same clock with its closed forms and without


def without_law(loss: MarginLoss) -> MarginLoss:
    """The loss with its elementary form hidden: the generic quadrature and Newton take over."""
    return type("NoLaw", (type(loss),), {"law": lambda self, u_ref: None})(**dataclasses.asdict(loss))  # type: ignore[call-overload]


LAWFUL = [l for l in MARGIN if l.law(0.0) is not None]


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("loss", LAWFUL, ids=repr)
def test_closed_clocks_equal_the_generic_ones(loss, regime):
    for seed, u_ref in [(52, None), (53, 3.0), (54, 9.0)]:
        model = random_model(np.random.default_rng(seed), 4, 3, u_ref=u_ref)
        closed, generic = (ExactFlow(model, l, *REGIMES[regime]) for l in (loss, without_law(loss)))
        assert generic.clock.form.law is None
        assert closed.direction != 0
        end = closed.stop_margin if np.isfinite(closed.stop_margin) else closed.start_margin + 60.0
        u = closed.start_margin + np.array([1e-9, 1e-3, 0.2, 0.7, 0.9999]) * (end - closed.start_margin)
        np.testing.assert_allclose(closed.log_time_at_margin(u), generic.log_time_at_margin(u), rtol=1e-11, atol=1e-10)
        log_times = np.array([-700.0, -30.0, -3.0, 0.0, 2.0, 6.0])
        span = np.abs(closed.margin(log_times=log_times) - closed.start_margin)
        np.testing.assert_allclose(
            closed.margin(log_times=log_times) - generic.margin(log_times=log_times), 0, atol=1e-12 * (1 + span.max())
        )
        assert span[-1] > 1e-3


def test_frozen_dpo_is_the_omega_function():
    """z + expm1(z) = beta^2 K0 t, z = beta (u - u0), from the reference (E1)."""
    model = random_model(np.random.default_rng(55))
    flow = ExactFlow(model, get("dpo", beta=0.3), 0.0, 1.0)
    a = model.W[0] - model.W[1]
    for log_t in (-30.0, -2.0, 1.0, 5.0, 300.0, 5e5):
        z = 0.3 * (float(flow.margin(log_times=[log_t])[0]) - flow.start_margin)
        with mpmath.workdps(30):
            left = mpmath.log(mpf(z) + mpmath.expm1(mpf(z)))
            right = mpmath.log(mpf(0.3) ** 2 * mpf(float(a @ a))) + mpf(log_t)
        if log_t > -20:  # before, z is lost in the rounding of u
            assert float(left) == pytest.approx(
                float(right), abs=1e-13 + 1e-15 * (1 + abs(flow.start_margin)) / z, rel=1e-13
            )


@pytest.mark.parametrize(
    "loss", [get("ipo", tau=0.3), get("rebel", eta=2.3, reward_gap=1.7), get("gpo_squared")], ids=repr
)
@pytest.mark.parametrize("regime", REGIMES)
def test_quadratic_losses_are_explicit_in_time(loss, regime):
    """The formula of E5, retyped: x^2 in terms of E = e^(c K(u*) t), or u* + (u0 - u*) e^(-c K0 t) when frozen."""
    eta_W, eta_h = REGIMES[regime]
    model = random_model(np.random.default_rng(56), u_ref=0.1)
    flow = ExactFlow(model, loss, eta_W, eta_h)
    a, h = model.W[0] - model.W[1], model.h
    least, u0 = loss.minimiser(0.1), float(a @ h)
    c = oracles.slope_of(loss, 0.1)(least - 1.0)
    times = np.array([0.0, 1e-3, 0.02, 0.1])
    K0, w = 2 * eta_W * h @ h + eta_h * a @ a, math.sqrt(2 * eta_W * eta_h)
    if w == 0:
        expected = least + (u0 - least) * np.exp(-c * K0 * times)
    else:
        p, q = (math.sqrt(2 * eta_W) * h + s * math.sqrt(eta_h) * a for s in (1, -1))
        P, Q = p @ p, q @ q
        K = math.sqrt(P * Q + 4 * w * w * least * least)
        y = (K + 2 * w * least) / P
        E = np.exp(c * K * times)
        x2 = (E * (P * y + Q) - Q * (1 - 1 / y)) / (P * (y - 1) + E * (P + Q / y))
        expected = (P * x2 - Q / x2) / (4 * w)
    np.testing.assert_allclose(flow.margin(times), expected, rtol=1e-12, atol=1e-12)
    assert abs(expected[-1] - expected[0]) > 0.1


# ---- round trips, monotony, extremes

LOG_TIMES = np.array([-np.inf, -1e6, -50.0, -5.0, 0.0, 3.0, 10.0, 100.0, 1e3, 1e4, 1e5, 1e6, np.inf])


def assert_clock_is_sound(flow: ExactFlow, log_times: np.ndarray = LOG_TIMES) -> None:
    """Never NaN; from the start to the stop, monotone; probabilities normalise; times and margins invert each other."""
    u = flow.margin(log_times=log_times)
    assert not np.isnan(u).any()
    if log_times[0] == -np.inf:
        assert u[0] == flow.start_margin
    if log_times[-1] == np.inf:
        assert u[-1] == flow.stop_margin
    inner = u[np.isfinite(u)]
    assert (flow.direction * np.diff(inner) >= -4e-16 * np.abs(inner[1:])).all()
    log_p = flow.log_probs(log_times=log_times)
    assert not np.isnan(log_p).any()
    assert (log_p <= 0).all()
    np.testing.assert_allclose(np.logaddexp.reduce(log_p, axis=1), 0, atol=1e-10)
    # Round trip, where the margin determines the time: clear of the start and of the stop.
    away = np.abs(u - flow.start_margin) > 1e-4 * (1 + abs(flow.start_margin))
    short = (
        ~(np.abs(u - flow.stop_margin) <= 1e-4 * (1 + abs(flow.start_margin)))
        if np.isfinite(flow.stop_margin)
        else away
    )
    clear = away & short & np.isfinite(u) & np.isfinite(log_times)
    if clear.any():
        # d ln t / du is about beta plus 1/(u - u0): rounding of u, some ten units in its last digit, costs that much.
        beta = max(abs(x) for x in (1.0, *dataclasses.asdict(flow.loss).values()))  # type: ignore[call-overload]
        size = np.abs(u[clear]) + abs(flow.model.samples[0].reference_margin)
        slack = 1e-9 + 3e-15 * beta * size + 3e-15 * size / np.minimum(1, np.abs(u[clear] - flow.start_margin))
        if np.isfinite(flow.stop_margin):
            slack = slack + 3e-15 * size / np.minimum(1, np.abs(flow.stop_margin - u[clear]))
        again = flow.log_time_at_margin(u[clear])
        assert (np.abs(again - log_times[clear]) <= slack + 1e-12 * np.abs(log_times[clear])).all(), (
            again,
            log_times[clear],
        )


SCALED = [
    *(get(name, beta=beta) for name in ("dpo", "gpo_exponential", "gpo_savage") for beta in (1e-3, 0.1, 1e3)),
    *(get("cdpo", beta=beta) for beta in (1e-3, 1e3)),
    *(get("gpo_truncated_quadratic", beta=beta) for beta in (1e-3, 1e3)),
    *(get("ipo", tau=tau) for tau in (1e-3, 1e3)),
    get("rebel", eta=1e3, reward_gap=-2.0),
    get("slic", delta=1e4),
]


@pytest.mark.parametrize("loss", SCALED, ids=repr)
@pytest.mark.parametrize("kappa", [1e-12, 1.0, 1e12])
def test_extreme_parameters_rates_and_references(loss, kappa):
    rng = np.random.default_rng(57)
    for u_ref in (None, -1e4, -30.0, 700.0, 1e4):
        flow = ExactFlow(random_model(rng, u_ref=u_ref), loss, *((1.0, kappa) if kappa <= 1 else (1 / kappa, 1.0)))
        assert_clock_is_sound(flow)


@pytest.mark.parametrize("name", EXTREMES)
@pytest.mark.parametrize("rates", [None, (0.0, 1.0), (1.0, 0.0), (1.0, 1e-12), (1e-12, 1.0), (0.0, 0.0)], ids=str)
def test_extreme_models(name, rates):
    for loss in (
        get("dpo"),
        get("gpo_savage", beta=0.7),
        get("ipo"),
        get("slic", delta=3.0),
        get("gpo_exponential", beta=2.0),
    ):
        assert_clock_is_sound(ExactFlow(EXTREMES[name], loss, *(rates or extreme_rates(name))))


@given(model=models(), loss=losses(), rates=rates(), shift=st.floats(-50, 50))
def test_any_clock_is_sound(model, loss, rates, shift):
    plus, minus = model.single_pair
    model = single(model.W, model.h, plus, minus, model.samples[0].reference_margin + shift)
    assert_clock_is_sound(
        ExactFlow(model, loss, *rates), np.array([-np.inf, -40.0, -1.0, 0.0, 2.0, 30.0, 500.0, np.inf])
    )


def test_soundness_can_fail():
    flow = ExactFlow(random_model(np.random.default_rng(58)), get("dpo"))
    u = flow.margin(log_times=LOG_TIMES)
    for broken in (u * np.nan, -u, np.where(LOG_TIMES == 1e3, u + 1e-2, u)):
        fake: Any = type("Fake", (), {"margin": lambda self, log_times, b=broken: b, **public(flow)})()
        with pytest.raises(AssertionError):
            assert_clock_is_sound(fake)
    assert_clock_is_sound(type("Fake", (), {"margin": lambda self, log_times: u, **public(flow)})())  # type: ignore[arg-type]


def public(flow: ExactFlow) -> dict[str, Any]:
    names = ("start_margin", "stop_margin", "direction", "model", "loss")
    return {n: getattr(flow, n) for n in names} | {
        "log_probs": lambda self, log_times: flow.log_probs(log_times=log_times),
        "log_time_at_margin": lambda self, u: flow.log_time_at_margin(u),
    }


@pytest.mark.parametrize("beta", [1e-3, 0.1, 1e3])
def test_late_margins_of_dpo(beta):
    """ln t to 1e6: with W frozen beta (u - u_ref) = ln(beta^2 K0 t) to rounding; with both trained K grows with u."""
    model = random_model(np.random.default_rng(59))
    a = model.W[0] - model.W[1]
    log_times = np.array([1e3, 1e5, 1e6])
    frozen = ExactFlow(model, get("dpo", beta=beta), 0.0, 1.0)
    expected = frozen.start_margin + (log_times + math.log(beta**2 * a @ a)) / beta
    np.testing.assert_allclose(frozen.margin(log_times=log_times), expected, rtol=1e-5)
    both = ExactFlow(model, get("dpo", beta=beta))
    u = both.margin(log_times=log_times)
    # t ~ e^{beta (u - u_ref)} / (2 w beta^2 u) once beta u >> 1 (E5)
    grown = u > 30
    late = beta * (u[grown] - both.start_margin) - np.log(2 * math.sqrt(2) * beta**2 * u[grown])
    np.testing.assert_allclose(late, log_times[grown], rtol=1e-2)
    assert grown[-1]
    assert (np.diff(u) > 0).all()


def test_a_start_far_out_on_the_flat_side_waits_and_then_moves():
    """u0 = 1e4 above the reference: G = e^-1e4 underflows, ln G does not; nothing happens until ln t is about 1e4."""
    for loss in (get("dpo", beta=1.0), get("gpo_savage", beta=1.0), get("gpo_exponential", beta=1.0)):
        model = random_model(np.random.default_rng(60), u_ref=-1e4)
        flow = ExactFlow(model, loss)
        assert float(flow.clock.form.slope(flow.start_margin)) == 0
        assert flow.direction == 1
        u = flow.margin(log_times=[0.0, 5e3, 5e4])
        assert u[0] == u[1] == flow.start_margin
        assert u[2] > 1e4
        assert flow.displacement().status != "stationary"
    # But a slope that is exactly zero stays so.
    flow = ExactFlow(random_model(np.random.default_rng(60), u_ref=-1e4), get("gpo_hinge", beta=1.0))
    assert flow.direction == 0


# ---- minimisers reached in finite time, or not


@dataclass(frozen=True)
class Power(MarginLoss):
    """|2 - m|^power: with power < 2 the slope is not Lipschitz at the minimiser, which is then reached in finite time."""

    power: float = 1.5
    name = "power"
    reference = "tests"

    def formula(self, ops: Any, y: Pair) -> Any:
        gap = 2.0 - y.m
        return ops.relu(gap) ** self.power + ops.relu(-gap) ** self.power

    def closed_slope(self, ops: Any, y: Pair) -> Any:
        gap = 2.0 - y.m
        return self.power * (ops.relu(gap) ** (self.power - 1) - ops.relu(-gap) ** (self.power - 1))

    def minimiser(self, u_ref: Any) -> Any:
        return u_ref + 2.0


@pytest.mark.parametrize("power", [1.2, 1.5, 1.7])
@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("u_ref", [None, -20.0], ids=["from below", "from above"])
def test_a_minimiser_with_a_slow_zero_is_reached_in_finite_time(power, regime, u_ref):
    model = random_model(np.random.default_rng(61), 4, 3, u_ref=u_ref)
    flow = ExactFlow(model, Power(power), *REGIMES[regime])
    assert flow.direction == (1 if u_ref is None else -1)
    stop = flow.stop_margin
    log_t = float(flow.log_time_at_margin([stop])[0])
    assert np.isfinite(log_t)
    # y = |u* - u|^(2 - power) falls to 0 at a rate that is smooth there: integrate that instead of u.
    a, h, (eta_W, eta_h) = model.W[0] - model.W[1], model.h, REGIMES[regime]
    K0, w = 2 * eta_W * h @ h + eta_h * a @ a, math.sqrt(2 * eta_W * eta_h)
    p, q = (math.sqrt(2 * eta_W) * h + s * math.sqrt(eta_h) * a for s in (1, -1))
    gap = abs(stop - flow.start_margin)

    def slowness(t: float, y: np.ndarray) -> np.ndarray:  # dt/dy at |u* - u| = y^(1/(2 - power))
        u = stop - flow.direction * max(y[0], 0.0) ** (1 / (2 - power))
        K = math.sqrt((p @ p) * (q @ q) + 4 * w * w * u * u) if w else K0
        return np.array([-(2 - power) * power * K])

    def arrived(t: float, y: np.ndarray) -> float:
        return float(y[0])

    arrived.terminal = True  # type: ignore[attr-defined]
    run = solve_ivp(slowness, (0, 1e3), [gap ** (2 - power)], events=arrived, method="DOP853", rtol=1e-12, atol=1e-14)
    # The margin resolves the last 1e-16 of the way, in which (1e-16)^(2 - power) of the time is spent.
    assert math.exp(log_t) == pytest.approx(run.t_events[0][0], rel=1e-9 + 10 * 2.3e-16 ** (2 - power))
    assert flow.displacement().end.log_time == pytest.approx(log_t, abs=1e-12)
    t = math.exp(log_t)
    assert flow.margin([0.5 * t])[0] != stop
    np.testing.assert_allclose(flow.margin([1.0001 * t, 1e3 * t, np.inf]), stop, rtol=1e-14)


@pytest.mark.parametrize("loss", [get("ipo"), get("cdpo", beta=0.6, eps=0.27), Power(2.0), Power(3.0)], ids=repr)
def test_a_minimiser_with_a_linear_zero_is_only_approached(loss):
    flow = ExactFlow(random_model(np.random.default_rng(62), 4, 3), loss)
    assert flow.log_time_at_margin([flow.stop_margin])[0] == np.inf
    assert flow.displacement().end.log_time == np.inf
    u = flow.margin([1.0, 10.0, np.inf])
    assert (np.diff(u) >= 0).all()
    assert u[-1] == flow.stop_margin
    assert flow.margin([0.01])[0] < flow.stop_margin


def test_a_margin_the_flow_never_has_takes_for_ever():
    flow = ExactFlow(random_model(np.random.default_rng(63)), get("ipo"))
    behind, beyond = flow.start_margin - 0.5, flow.stop_margin + 0.5
    assert flow.log_time_at_margin([behind, beyond]).tolist() == [np.inf, np.inf]
    assert flow.time_at_margin([beyond]) == [np.inf]
    # Any order, duplicates included.
    u = np.array([2.0, flow.start_margin, 1.0, 2.0, beyond, flow.stop_margin])
    alone = np.concatenate([flow.log_time_at_margin([x]) for x in u])
    np.testing.assert_allclose(flow.log_time_at_margin(u), alone, rtol=1e-12)


# ---- losses that break the contract


@dataclass(frozen=True)
class Hidden(MarginLoss):
    """A quadratic well that does not declare its minimiser."""

    name = "hidden"
    reference = "tests"

    def formula(self, ops: Any, y: Pair) -> Any:
        return (y.m - 2.0) ** 2


@dataclass(frozen=True)
class HiddenWithSlope(Hidden):
    def closed_slope(self, ops: Any, y: Pair) -> Any:
        return 2 * (2.0 - y.m)


@pytest.mark.parametrize("loss", [Hidden(), HiddenWithSlope()], ids=repr)
def test_an_undeclared_zero_of_the_slope_raises(loss):
    """Never a wrong time: the message names the loss and what to define."""
    flow = ExactFlow(random_model(np.random.default_rng(64)), loss)
    with pytest.raises(SolverError, match=r"Hidden.*declares no zero.*minimiser"):
        flow.log_time_at_margin([flow.start_margin + 3.0])
    with pytest.raises(SolverError, match="declares no zero"):
        flow.margin([1e3])


@dataclass(frozen=True)
class Nan(MarginLoss):
    name = "nan"
    reference = "tests"

    def formula(self, ops: Any, y: Pair) -> Any:
        return ops.exp(-y.m)

    def closed_slope(self, ops: Any, y: Pair) -> Any:
        return ops.exp(-y.m) + np.where(y.m > 1.0, np.nan, 0.0)


def test_a_slope_that_is_nan_raises():
    flow = ExactFlow(random_model(np.random.default_rng(65)), Nan())
    with pytest.raises(SolverError, match="NaN along the path"):
        flow.log_time_at_margin([flow.start_margin + 3.0])


# ---- batches


def test_a_batch_of_clocks_equals_single_clocks():
    """Rows that rise, fall, stand still and have a reference of their own."""
    rng = np.random.default_rng(66)
    flows = [ExactFlow(random_model(rng, 4, 3), get("cdpo", beta=0.6, eps=0.27)) for _ in range(5)]
    motions = [f.path.motion for f in flows]
    stacked = type(motions[0])(
        1.0, *(np.concatenate([getattr(m, n) for m in motions]) for n in ("k", "P", "Q", "u0", "K0"))
    )
    refs = stacked.start - np.array([0.0, 9.0, -4.0, 1.0, 0.0])
    refs[3] = stacked.start[3] - float(flows[0].loss.minimiser(0.0))  # starts at its minimiser  # type: ignore[attr-defined]
    clock = Clock(stacked, MarginForm(get("cdpo", beta=0.6, eps=0.27), refs))  # type: ignore[arg-type]
    assert clock.direction.tolist()[:3] == [1, -1, 1]
    log_t = np.broadcast_to(np.array([-4.0, 0.0, 3.0]), (5, 3))
    sigma = clock.sigma_at(log_t)
    for i in range(5):
        alone = Clock(motions[i], MarginForm(get("cdpo", beta=0.6, eps=0.27), refs[i]))  # type: ignore[arg-type]
        np.testing.assert_allclose(sigma[i], alone.sigma_at(log_t[:1])[0], rtol=1e-11, atol=1e-15)
    np.testing.assert_allclose(clock.log_time(sigma)[:3, :2], log_t[:3, :2], rtol=1e-9, atol=1e-9)
