"""Certificates against routes that share no formula with them: mpmath on all parameters, finite differences, samples."""

import json
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import mpmath
import numpy as np
import oracles
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from mpmath import mpf
from scipy.optimize import brentq
from strategies import EXTREMES, MARGIN, REGIMES, extreme_rates, models, random_model, rates, single

flint = pytest.importorskip("flint")

from sims import certificate  # noqa: E402
from sims.embeddings import Embeddings, read_embeddings  # noqa: E402
from sims.scenarios.no_never_yes import KAPPA  # noqa: E402
from sims.scenarios.no_never_yes import model as scenario  # noqa: E402
from theory import ExactFlow, UnconstrainedFeatures  # noqa: E402
from theory.certify import certify  # noqa: E402
from theory.certify.box import Box  # noqa: E402
from theory.certify.minimum import _Curve, lowest  # noqa: E402
from theory.certify.reach import passes, slope_on  # noqa: E402
from theory.certify.record import Enclosure  # noqa: E402
from theory.certify.start import Lengths, Start  # noqa: E402
from theory.losses import MarginForm, get  # noqa: E402

REAL = Path(__file__).parents[2] / "shared/data/embeddings/minilm_l6_v2.npz"


@pytest.fixture(autouse=True)
def working_precision():
    with flint.ctx.workprec(128):
        yield


# ---- second routes


def by_parameters(model: UnconstrainedFeatures, eta_W: float, eta_h: float, tau: Any) -> tuple[Any, list[Any]]:
    """(u, ln pi of every token) at loss-time tau from the linear flow of all rows of W and of h, in mpmath."""
    plus, minus = model.single_pair
    W = [[mpf(float(x)) for x in row] for row in model.W]
    h = [mpf(float(x)) for x in model.h]
    eW, eh = mpf(float(eta_W)), mpf(float(eta_h))
    a = [x - y for x, y in zip(W[plus], W[minus], strict=True)]
    w = mpmath.sqrt(2 * eW * eh)
    C, S = (mpmath.cosh(w * tau), mpmath.sinh(w * tau) / w) if w else (mpf(1), mpf(tau))
    ht = [C * x + eh * S * y for x, y in zip(h, a, strict=True)]
    # W_+ gains eta_W times the integral of h, and W_- loses it.
    whole = (C - 1) / w**2 if w else mpf(tau) ** 2 / 2
    moved = [eW * (S * x + eh * whole * y) for x, y in zip(h, a, strict=True)]
    W[plus] = [x + m for x, m in zip(W[plus], moved, strict=True)]
    W[minus] = [x - m for x, m in zip(W[minus], moved, strict=True)]
    logits = [mpmath.fdot(row, ht) for row in W]
    total = mpmath.log(mpmath.fsum(mpmath.exp(x) for x in logits))
    return logits[plus] - logits[minus], [x - total for x in logits]


def at_margin(model: UnconstrainedFeatures, eta_W: float, eta_h: float, u: Any) -> list[Any]:
    """ln pi of every token where the margin is u, to the caller's digits."""
    u, high = mpf(float(u)), mpf(1) / 1024
    while by_parameters(model, eta_W, eta_h, high)[0] < u:
        high *= 2
    miss = lambda tau: by_parameters(model, eta_W, eta_h, tau)[0] - u  # noqa: E731
    tau = mpmath.findroot(miss, (0, high), solver="anderson", tol=mpf(10) ** (3 - 2 * mpmath.mp.dps), maxsteps=300)
    return by_parameters(model, eta_W, eta_h, tau)[1]


def float_log_probs(W: np.ndarray, h: np.ndarray, plus: int, minus: int, eta_W: float, eta_h: float, u: float):
    """(V,) ln pi where the margin is u, in float64: a root of u(tau), then the rows of W moved one by one."""
    a, w = W[plus] - W[minus], np.sqrt(2 * eta_W * eta_h)

    def there(tau: float) -> tuple[np.ndarray, np.ndarray]:
        C, S, whole = (np.cosh(w * tau), np.sinh(w * tau) / w, (np.cosh(w * tau) - 1) / w**2)
        new, moved = W.copy(), eta_W * (S * h + eta_h * whole * a)
        new[plus] += moved
        new[minus] -= moved
        return new, C * h + eta_h * S * a

    def margin(tau: float) -> float:
        new, ht = there(tau)
        return float((new[plus] - new[minus]) @ ht)

    high = 1e-3
    while margin(high) < u:
        high *= 2
    tau: Any = brentq(lambda t: margin(t) - u, 0.0, high, xtol=1e-15, rtol=1e-14)
    return oracles.log_probs(*there(tau))


def digits(x: Any) -> str:
    return mpmath.nstr(x, mpmath.mp.dps)


def displaced_model(seed: int = 3, V: int = 5, d: int = 3) -> UnconstrainedFeatures:
    """A random model whose y+ falls below its start with the rates (1, 4)."""
    rng = np.random.default_rng(seed)
    while True:
        model = random_model(rng, V, d)
        if ExactFlow(model, get("dpo"), 1.0, 4.0).displacement().depth < -0.3:
            return model


# ---- one margin


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("seed", range(4))
def test_the_enclosures_contain_sixty_digits_of_another_route(regime, seed):
    model = random_model(np.random.default_rng(seed), 5, 3)
    flow = ExactFlow(model, get("dpo"), *REGIMES[regime])
    u1 = flow.start_margin + 1.7
    got = certify(model, None, *REGIMES[regime], margin=u1, token=3, thorough=False)
    with mpmath.workdps(60):
        before, after = (
            by_parameters(model, *REGIMES[regime], mpf(0))[1],
            at_margin(model, *REGIMES[regime], u1),
        )
        assert got.start.contains(digits(before[0]))
        assert got.change.contains(digits(after[0] - before[0]))
        assert got.gain.contains(digits(after[3] - before[3]))
        # The balls are small enough to tell the truth from a change in the 30th digit.
        assert not got.change.contains(digits((after[0] - before[0]) * (1 + mpf(10) ** -30)))
    assert got.change.relative_width < 1e-30
    assert got.change.low <= float(after[0] - before[0]) <= got.change.high


def test_the_enclosure_agrees_with_an_ode_solver_on_all_parameters():
    """mpmath's Taylor integrator along the margin: no hyperbolic function, no algebra."""
    model, eta_W, eta_h = single([[0.5, 1.0], [-0.25, 0.5], [0.75, -1.0]], [0.5, 0.25]), 0.5, 2.0
    u0, u1 = oracles.margin(model.W, model.h, 0, 1), 1.5
    got = certify(model, None, eta_W, eta_h, margin=u1, token=2, thorough=False)
    with mpmath.workdps(30):

        def velocity(u: Any, x: list[Any]) -> list[Any]:  # (W_+, W_-, h) per nat of margin
            a, h = [x[0] - x[2], x[1] - x[3]], x[4:]
            speed = 2 * eta_W * mpmath.fdot(h, h) + eta_h * mpmath.fdot(a, a)
            return [y / speed for y in (*(eta_W * z for z in h), *(-eta_W * z for z in h), *(eta_h * z for z in a))]

        start = [mpf(x) for x in (*model.W[0].tolist(), *model.W[1].tolist(), *model.h.tolist())]
        end = mpmath.odefun(velocity, mpf(u0), start)(mpf(u1))
        logits = lambda x: [  # noqa: E731
            mpmath.fdot(x[:2], x[4:]), mpmath.fdot(x[2:4], x[4:]), mpmath.fdot([mpf(0.75), mpf(-1)], x[4:])
        ]  # fmt: skip
        log_pi = lambda x: logits(x)[0] - mpmath.log(sum(mpmath.exp(y) for y in logits(x)))  # noqa: E731
        change = log_pi(end) - log_pi(start)
        middle = mpf(str(got.change.ball.mid().str(40, radius=False)))
        assert abs(change - middle) < mpf(10) ** -22
    assert abs(change) > 0.01


def test_a_wrong_path_is_told_apart(monkeypatch):
    model, u1 = displaced_model(), 4.0
    truth = certify(model, None, 1.0, 4.0, margin=u1, token=2, thorough=False)
    flipped = UnconstrainedFeatures.single_token(model.W, -model.h, 0, 1)
    with mpmath.workdps(60):
        change = digits(at_margin(model, 1.0, 4.0, u1)[0] - by_parameters(model, 1.0, 4.0, mpf(0))[1][0])
    assert truth.change.contains(change)
    wrong = [
        certify(flipped, None, 1.0, 4.0, margin=u1, token=2, thorough=False),
        certify(model, None, 1.0, 4.0 * (1 + 1e-14), margin=u1, token=2, thorough=False),
        certify(model, None, 1.0, 4.0, margin=u1 * (1 + 1e-14), token=2, thorough=False),
    ]
    turn = Start.turn

    def backwards(self: Start, u: Any) -> Any:
        t = turn(self, u)
        return type(t)(t.c, -t.g, t.c_K, t.g_K, t.c_u, t.g_u)

    monkeypatch.setattr(Start, "turn", backwards)
    wrong.append(certify(model, None, 1.0, 4.0, margin=u1, token=2, thorough=False, max_bits=128))
    for other in wrong:
        assert not other.change.contains(change)


def test_a_token_that_does_not_gain_refutes_the_claim():
    model = scenario()
    for token in ("Never", "apple", "No"):
        got = certify(model, None, 1.0, KAPPA, token=token, thorough=False)
        falls, rises = got.claims
        assert (falls.proved, rises.proved, got.certified) == (True, False, False)
        assert "refuted" in str(got)
        assert str(got).startswith("NOT certified")
    boxed = certify(model, None, 1.0, KAPPA, token="No", box=1e-6, thorough=True)
    assert (boxed.claims[-1].proved, boxed.largest_box) == (None, 0.0)


def test_a_benign_pair_is_refuted_and_the_record_says_why():
    model = scenario()
    no_kappa = certify(model, None, 1.0, 0.05)
    h_frozen = certify(model, None, 1.0, 0.0)
    aligned = certify(single([[1, 0], [-1, 0], [0.2, 1]], [0.3, 0.5]), None, 0.0, 1.0)  # r_max < 1
    for got in (no_kappa, h_frozen, aligned):
        assert not got.certified
        assert got.claims[0].proved is False
        assert got.displaces is False
        assert "never below its start" in got.course
        assert got.largest_box == 0.0
    tie = certify(single([[1, 0], [-1, 0], [1, 1]], [0.3, 0.5]), None, 0.0, 1.0)  # r_max = 1 exactly
    assert tie.displaces is False


@pytest.mark.parametrize(
    ("first", "u1", "falls", "displaces"),
    [
        (1.2, 40.0, True, True),
        (1.9, 40.0, True, True),
        (1 + 2.0**-40, 2.0**42, True, True),
        (1 + 2.0**-40, 40.0, False, True),  # y- still matters at u1
        (1 - 2.0**-40, 2.0**42, False, False),
    ],
)
def test_with_w_frozen_the_whole_path_turns_on_r_z_being_above_one(first, u1, falls, displaces):
    # h = (u, 0) at margin u, so 1/pi(y+) = 1 + e^-u + e^((first - 1) u), and r_z = 2 first - 1.
    got = certify(single([[1, 0], [0, 0], [first, 0.1]], [3, 0]), None, 0.0, 1.0, margin=u1)
    with mpmath.workdps(60):
        inverse = lambda u: 1 + mpmath.exp(-mpf(u)) + mpmath.exp((mpf(first) - 1) * mpf(u))  # noqa: E731
        assert got.change.contains(digits(mpmath.log(inverse(3) / inverse(u1))))
    assert got.claims[0].proved is falls
    assert got.displaces is displaces
    assert ("never below its start" in got.course) is not displaces


def test_a_change_of_exactly_zero_stays_undecided():
    # W frozen, one dimension: D_z = u, so 1/pi(y+) = 1 + 2 cosh u is the same at u0 = -1 and u1 = 1.
    model = single([[0.5], [-0.5], [1.5]], [-1.0])
    got = certify(model, None, 0.0, 1.0, margin=1.0, token=2, max_bits=512)
    falls, rises = got.claims
    assert (falls.proved, falls.verdict, rises.proved, got.bits) == (None, "undecided", True, 512)
    assert got.change.contains(0)
    assert not got.certified
    for u1, falling in ((0.999999999999, False), (1.000000000001, True)):
        assert certify(model, None, 0.0, 1.0, margin=u1, token=2).claims[0].proved is falling


# ---- the minimum


def mp_minimum(model: UnconstrainedFeatures, eta_W: float, eta_h: float) -> tuple[Any, Any]:
    """(lowest ln pi(y+), its margin): a fine grid in loss-time, then a root of the numerical derivative."""
    f = lambda tau: by_parameters(model, eta_W, eta_h, tau)[1][0]  # noqa: E731
    with mpmath.workdps(20):
        end = 1.0
        while by_parameters(model, eta_W, eta_h, end)[0] < 300:
            end *= 1.2
        taus = [end * k / 400 for k in range(401)]
        values = [f(tau) for tau in taus]
        k = min(range(401), key=values.__getitem__)
    assert 0 < k < 400
    with mpmath.workdps(60):
        slope = lambda tau: mpmath.diff(f, tau, h=mpf(10) ** -25)  # noqa: E731
        tau = mpmath.findroot(slope, (mpf(taus[k - 1]), mpf(taus[k + 1])), solver="anderson", tol=1e-40, maxsteps=200)
        return f(tau), by_parameters(model, eta_W, eta_h, tau)[0]


def test_the_minimum_of_no_never_yes_is_enclosed():
    got = certify(scenario(), get("dpo", beta=0.1), 1.0, KAPPA)
    assert got.certified
    assert got.displaces is True
    assert got.lowest is not None
    assert got.lowest_margin is not None
    assert got.lowest.relative_width <= 1e-12
    assert got.lowest.relative_width <= 1e-30
    value, margin = mp_minimum(scenario(), 1.0, KAPPA)
    with mpmath.workdps(60):
        assert abs(value - mpf(got.lowest.ball.mid().str(45, radius=False))) < mpf(10) ** -34
        assert abs(margin - mpf(got.lowest_margin.ball.mid().str(45, radius=False))) < mpf(10) ** -15
    found = ExactFlow(scenario(), get("dpo", beta=0.1), 1.0, KAPPA).displacement().trough
    assert got.lowest.low == pytest.approx(found.log_prob, rel=1e-14)  # 50 units in the last place
    assert got.lowest_margin.low == pytest.approx(found.margin, rel=1e-8)  # a minimum is flat: half the digits


@given(models(min_tokens=3), rates(zero=False))
def test_nothing_on_the_path_is_below_the_minimum(model, r):
    with flint.ctx.workprec(128):
        start = Start.of(model, *r)
        low = lowest(start) if start.K0 > 0 else None
    assume(low is not None)
    assert low is not None
    flow = ExactFlow(model, get("dpo"), *r)
    found = flow.displacement()
    assert float(low.log_prob) == pytest.approx(min(found.trough.log_prob, found.start.log_prob), rel=1e-10, abs=1e-10)
    if low.at_start:
        assert found.status == "none"


def test_the_tail_and_the_pruning_are_needed_and_right():
    start = Start.of(scenario(), 1.0, KAPPA)
    curve = _Curve(start)
    assert not curve.falls_beyond(flint.arb(1))  # ln pi(No) still falls there
    X = flint.arb(1)
    while not curve.falls_beyond(X):
        X = X * 1.25
    S, slope, _ = curve.jet(X.log())
    assert slope < 0
    for k in range(1, 40):
        assert curve.jet(X.log() + k * flint.arb(0.1))[1] < 0
    # The derivatives are those of the value (differences with a step of 2^-40 at 128 bits).
    y, step = flint.arb(0.7), flint.arb(2) ** -40
    S, S1, S2 = curve.jet(y)
    above, below = curve.value(y + step), curve.value(y - step)
    assert abs(float((above - below) / (2 * step) / S1) - 1) < 1e-15
    assert abs(float((above - 2 * S + below) / step**2 / S2) - 1) < 1e-10
    assert curve.value(y).overlaps(S)


def test_a_fall_that_comes_after_a_rise_is_found():
    """The quartic is positive at x = 1 and x = e, negative from 5 to 19: the odds against y+ fall, then rise higher."""
    model, rate = single([[0.5, -1.5], [-0.5, 1.5], [20, 45]], [1, 3]), (0.5, 1.0)  # omega = rho = 1
    quartic = lambda x: x**4 - 20 * x**3 + 135 * x + 9  # noqa: E731
    assert min(map(quartic, (1, np.e, 25))) > 0 > max(map(quartic, (5, 19)))
    start = Start.of(model, *rate)
    curve = _Curve(start)
    assert not any(curve.falls_beyond(flint.arb(x)) for x in (1, np.e, 5, 19))
    assert curve.falls_beyond(flint.arb(25))
    low = lowest(start)
    assert low is not None
    assert (low.below_start, low.at_start) == (True, False)
    # In loss-time, from the parameters: up first, and the lowest value is the one enclosed.
    value, margin = mp_minimum(model, *rate)
    with mpmath.workdps(60):
        before, early = (by_parameters(model, *rate, mpf(tau))[1][0] for tau in (0, 1))
    assert value + 40 < before < early - 40
    assert float(low.log_prob) == pytest.approx(float(value), rel=1e-14)
    assert float(low.margin) == pytest.approx(float(margin), rel=1e-14)


def test_several_troughs_and_a_minimum_at_the_start():
    # With W_2 far away but aligned, ln pi(y+) rises at first (its competitor y- goes) and falls later.
    rng, deep, shallow = np.random.default_rng(5), 0, 0
    for _ in range(60):
        model = random_model(rng, 6, 3, 1.5)
        got = certify(model, None, 1.0, 6.0)
        found = ExactFlow(model, get("dpo"), 1.0, 6.0).displacement()
        assert got.lowest is not None
        best = min(found.start.log_prob, *(p.log_prob for p in found.extrema), 0.0)
        assert got.lowest.low == pytest.approx(best, rel=1e-12)
        assert got.displaces is (found.status != "none")
        deep += got.displaces is True
        shallow += got.displaces is False
    assert deep > 5
    assert shallow > 5


# ---- boxes


def box_and_point(seed: int, regime: str) -> tuple[Box, np.ndarray, Any]:
    """A box of a random model, its centre as a vector, and (exponents, F) at any vector, free of rounding."""
    model, (eta_W, eta_h) = random_model(np.random.default_rng(seed), 5, 3), REGIMES[regime]
    start = Start.of(model, eta_W, eta_h)
    u1 = float(start.u0) + 1.3

    def at(x: np.ndarray) -> np.ndarray:
        """D_z and D_z - D_g at u1, D_z(u1) - D_z(u0), D_z at the start, and both F; g is the second other token."""
        near = Start.of(single(x[:15].reshape(5, 3), x[15:]), eta_W, eta_h)
        after, before = near.odds(flint.arb(u1)), near.start_odds
        change = [x - y for x, y in zip(after, before, strict=True)]
        all_values = [*after, *(D - after[1] for D in after), *change, *before, *Box(model, near, u1, 1).values]
        with mpmath.workdps(40):
            return np.array([mpf(v.mid().str(40, radius=False)) for v in all_values])

    return Box(model, start, u1, 1), np.concatenate([model.W.ravel(), model.h]), at


def gradient_norms(at: Any, x: np.ndarray) -> np.ndarray:
    """L1 norms over all entries of the gradients of what `at` returns, by central differences."""
    step = 2.0**-22
    J = np.array([(at(x + step * e) - at(x - step * e)) / (2 * step) for e in np.eye(len(x))])
    return np.abs(J).sum(0).astype(float)


@pytest.mark.parametrize("regime", REGIMES)
def test_the_norms_are_those_of_the_gradients_at_radius_zero(regime):
    box, x0, at = box_and_point(30, regime)
    norms = gradient_norms(at, x0)
    start, t, zero, half = box.start, box.start.turn(box.u1), flint.arb(0), flint.arb(0.5)
    D_K = [a * t.c_K + b * t.g_K for a, b in zip(start.A, start.B, strict=True)]
    D_u = [a * t.c_u + b * t.g_u for a, b in zip(start.A, start.B, strict=True)]
    own, rel = box._exponents(t.c, t.g, D_K, D_u, 0.0, 0.0)
    change, _ = box._exponents(t.c - 1, t.g, D_K, [x + half for x in D_u], 0.0, 0.0)
    before, _ = box._exponents(flint.arb(1), zero, [zero] * 3, [-half] * 3, 0.0, 0.0)
    np.testing.assert_allclose(np.concatenate([x[:3] for x in (own, rel, change, before)]), norms[:12], rtol=1e-8)
    slopes = box._slopes(box.centre, 0.0)
    assert slopes is not None
    assert (norms[12:] <= np.array(slopes[2]) * (1 + 1e-8)).all()
    assert (norms[12:] > 1e-3).all()


def test_the_bound_on_the_gain_holds_where_y_minus_starts_with_all_probability():
    """The token has nearly all at u1, so the gradient is about that of (W_- - W_z) h: norm 4 + 2 * 2.

    It is bounded by those of (W_z - W_+) h and of u0, 6 each.
    """
    W, h, u1, corner = np.array([1.0, -1.0, 3.0]), np.array([-2.0]), 6.0, np.array([1.0, -1.0, 1.0, -1.0])

    def minus_gain(x: np.ndarray) -> float:  # W frozen: h = u1/(W_+ - W_-) at u1
        W = x[:3, None]
        after = np.array([u1 / (x[0] - x[1])])
        return float(oracles.log_probs(W, x[3:])[2] - oracles.log_probs(W, after)[2])

    model = single(W[:, None], h)
    box = Box(model, Start.of(model, 0.0, 1.0), u1, 0)
    for eps in (0.0, 0.01):
        x = np.concatenate([W, h]) + eps * corner
        step = 2.0**-20
        J = [(minus_gain(x + step * e) - minus_gain(x - step * e)) / (2 * step) for e in np.eye(4)]
        slopes = box._slopes(box.centre, eps)
        assert slopes is not None
        assert np.abs(J).sum() * (1 - 1e-8) <= slopes[2][1] <= 12 + 9 * eps


@pytest.mark.parametrize("less", [None, 1])
@pytest.mark.parametrize("eps", [0.0, 0.1])
@pytest.mark.parametrize("ball", [(1, 0), (0, 1), (0.5, 0.5)], ids=["point", "radius", "both"])
def test_the_norm_bounds_are_attained_coefficient_by_coefficient(ball, eps, less):
    """With one coefficient of grad D_z alone, known as a ball, the largest norm over the box is explicit."""
    box, _, _ = box_and_point(32, "unequal")
    (eta_W, eta_h), W, d = REGIMES["unequal"], box.model.W, 3
    zero, one = flint.arb(0), flint.arb(*ball)
    size = lambda x: np.abs(x).sum(-1)  # noqa: E731
    h, a = size(box.model.h) + eps * d, size(W[0] - W[1]) + 2 * eps * d
    rest = size(W[2:] - ((W[0] + W[1]) / 2 if less is None else W[2 + less])) + 2 * eps * d
    # With `less`, the radius of c or g is multiplied with the sum of the two rows' norms.
    most = rest if less is None else box.lengths.rows + box.lengths.rows[less] + 2 * eps * d
    # (balls of c, g, D_K, D_u), the largest norm, and what the bound may be at most
    cases = [
        ((one, zero, zero, zero), rest + 2 * h, most + 2 * h),
        ((zero, zero, one, zero), 4 * eta_W * h + 4 * eta_h * a, 4 * eta_W * h + 4 * eta_h * a),
        ((zero, zero, zero, one), a + 2 * h, a + 2 * h),
        # The rows of y+ and y- hold g (+-(W_z - s/2) - a/2), or without the half: the larger of the two, entrywise.
        ((zero, one, zero, zero), (a + np.maximum(2 * rest, a)) if less is None else 2 * (a + rest), 2 * (a + most)),
    ]
    for (c, g, K, u), true, loose in cases:
        bound = box._norms(c, g, [K] * 3, [u] * 3, eps, less)
        assert (bound >= true * (1 - 1e-12)).all()
        assert (bound <= loose * (1 + 1e-8)).all()  # a ball's radius has 30 bits


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("eps", [0.005, 0.02])
def test_the_bounds_over_a_box_hold_at_its_corners(regime, eps):
    box, x0, at = box_and_point(30, regime)
    slopes, centre, rng = box._slopes(box.centre, eps), at(x0), np.random.default_rng(1)
    assert slopes is not None
    off0, off1, N = slopes
    inside = 1 - 1e-9  # differences look a little beyond
    for _ in range(12):
        x = x0 + eps * inside * rng.choice([-1.0, 1.0], x0.size)
        moved = np.abs((at(x) - centre).astype(float))
        assert (moved[9:12] <= off0[:3]).all()
        assert (moved[3:6] <= off1[:3]).all()
        assert (moved[12:] <= eps * np.array(N)).all()
        norms = gradient_norms(at, x)
        assert (norms[9:12] <= off0[:3] / eps * (1 + 1e-6)).all()
        assert (norms[3:6] <= off1[:3] / eps * (1 + 1e-6)).all()
        assert (norms[12:] <= np.array(N) * (1 + 1e-6)).all()
        assert moved.max() > eps


def test_every_sampled_geometry_in_the_certified_box_displaces():
    model = scenario()
    got = certify(model, None, 1.0, KAPPA, token="Yes")
    eps, u1 = got.largest_box, got.margin
    assert eps is not None
    assert eps > 0.01
    assert certify(model, None, 1.0, KAPPA, token="Yes", box=eps).certified
    plus, minus = model.single_pair
    yes = model.tokens.index("Yes")  # type: ignore[union-attr]
    rng = np.random.default_rng(0)

    def F(W: np.ndarray, h: np.ndarray) -> np.ndarray:
        u0 = float((W[plus] - W[minus]) @ h)
        assert u0 < u1
        d = float_log_probs(W, h, plus, minus, 1.0, KAPPA, u1) - oracles.log_probs(W, h)
        return np.array([d[plus], -d[yes]])

    x0 = np.concatenate([model.W.ravel(), model.h])
    apart = lambda x: (x[:-6].reshape(16, 6), x[-6:])  # noqa: E731
    centre = F(*apart(x0))
    worst = np.full(2, -np.inf)
    for k in range(200):
        shift = rng.uniform(-1, 1, x0.size) if k % 2 else rng.choice([-1.0, 1.0], x0.size)
        worst = np.maximum(worst, F(*apart(x0 + eps * shift)))
    # The corner that the gradient points to, for each claim.
    J = np.array([(F(*apart(x0 + 1e-6 * e)) - F(*apart(x0 - 1e-6 * e))) / 2e-6 for e in np.eye(x0.size)])
    for i in range(2):
        worst = np.maximum(worst, F(*apart(x0 + eps * np.sign(J[:, i]))))
    assert (worst < 0).all()
    assert (worst > centre + 0.5).all()  # the box is large enough to matter
    # Further out that corner breaks the claim, so a box of that size must not be certified.
    bad = next(e for e in np.arange(1, 40) * 0.01 if (F(*apart(x0 + e * np.sign(J[:, 1]))) > 0).any())
    assert eps < bad
    assert not certify(model, None, 1.0, KAPPA, token="Yes", box=bad).certified
    assert eps > bad / 4  # not far from the best possible


def test_the_mean_value_form_beats_plain_balls_and_both_are_monotone():
    model = scenario()
    start = Start.of(model, 1.0, KAPPA)
    box = Box(model, start, 70.9177, int(np.searchsorted(start.others, model.tokens.index("Yes"))))  # type: ignore[union-attr]
    plain = max(e for e in np.geomspace(1e-5, 1, 60) if box.plainly(e))
    mean = max(e for e in np.geomspace(1e-5, 1, 60) if box.certified(e))
    assert 4 * plain < mean
    assert [box.plainly(e) for e in (plain / 3, plain * 1.5)] == [True, False]
    assert [box.certified(e) for e in (mean / 3, mean * 1.5)] == [True, False]
    assert mean / 1.25 < box.largest() < mean * 1.25


def test_a_box_that_may_start_beyond_the_margin_is_not_certified():
    model = displaced_model()
    got = certify(model, None, 1.0, 4.0)
    assert got.largest_box
    u0 = got.start_margin.low
    near = u0 + 1e-3
    start = Start.of(model, 1.0, 4.0)
    box = Box(model, start, near, None)
    assert not box.start.widened(0.1, box.lengths).reaches(flint.arb(near))
    assert box._slopes(box.centre, 0.0) is not None
    # The formulas are finite there, but from some of these starts u1 lies behind.
    assert not box.start.widened(1e-3, box.lengths).reaches(flint.arb(near))
    assert box._slopes(box.centre, 1e-3) is None
    assert not box.certified(0.1)


def test_a_box_too_large_is_undecided_not_refuted():
    got = certify(scenario(), None, 1.0, KAPPA, box=0.5, thorough=False)
    claim = got.claims[-1]
    assert (claim.proved, claim.verdict, got.certified) == (None, "undecided", False)
    assert got.largest_box is None


@given(st.integers(0, 10_000), st.floats(1e-4, 0.3))
def test_widened_balls_contain_the_inner_products_of_every_geometry(seed, eps):
    rng = np.random.default_rng(seed)
    model = random_model(rng, 4, 3)
    others = np.array([2, 3])
    with flint.ctx.workprec(128):
        wide = Start.of(model, 0.7, 1.3).widened(eps, Lengths.of(model, others))
        corner = rng.choice([-1.0, 1.0], (5, 3)) * eps * (1 - 1e-12)  # adding it rounds
        near = Start.of(single(model.W + corner[:4], model.h + corner[4]), 0.7, 1.3)
        for name in ("H2", "A2", "u0"):
            assert getattr(wide, name).contains(getattr(near, name))
        assert all(x.contains(y) for x, y in zip([*wide.A, *wide.B], [*near.A, *near.B], strict=True))


# ---- the loss


@pytest.mark.parametrize("loss", MARGIN, ids=repr)
def test_slopes_of_every_loss_contain_those_of_the_table(loss):
    form = MarginForm(loss, np.float64(0.3))
    slope = oracles.slope_of(loss, 0.3)
    for u in (-2.0, 0.7, 3.1):
        ball = slope_on(form, flint.arb(u))
        assert float(ball) == pytest.approx(slope(u), rel=1e-13, abs=1e-15)
    wide = slope_on(form, flint.arb(0.5, 0.25))
    assert all(wide.contains(slope_on(form, flint.arb(u))) for u in (0.25, 0.4, 0.75))


@pytest.mark.parametrize("loss", MARGIN, ids=repr)
def test_a_loss_passes_a_margin_exactly_if_its_slope_is_positive_on_the_way(loss):
    form = MarginForm(loss, np.float64(0.3))
    slope = oracles.slope_of(loss, 0.3)
    verdicts = set()
    for u1 in (0.8, 1.1, 4.9, 40.0):
        expected = all(slope(u) > 0 for u in np.linspace(-1, u1, 2001))
        got = passes(form, flint.arb(-1), flint.arb(u1))
        assert got is expected
        verdicts.add(got)
    # Without a zero on the way the slope has one sign; with one, some margin is not passed.
    inside = [z for z in loss.zeros(0.3) if -1 < z < 40]
    assert (False in verdicts) if inside else (len(verdicts) == 1)


def test_a_margin_at_the_minimiser_is_not_passed():
    loss = get("rebel", eta=1.0, reward_gap=1.0)
    assert passes(MarginForm(loss, np.float64(0.5)), flint.arb(0), flint.arb(1.5)) is not True
    got = certify(scenario(), get("slic", delta=5.0), 1.0, KAPPA, margin=30.0)
    assert [c.proved for c in got.claims] == [True, True, False]
    assert not got.certified
    inside = certify(scenario(), get("slic", delta=5.0), 1.0, KAPPA)
    assert inside.margin < 5.0


# ---- the whole


@given(models(min_tokens=2), rates())
def test_verdicts_agree_with_the_float_summary(model, r):
    flow = ExactFlow(model, get("dpo"), *r)
    found = flow.displacement()
    assume(found.status != "stationary")
    got = certify(model, None, *r, thorough=True, max_bits=512)
    if got.displaces is True:
        assert found.depth < 1e-9 or got.change.high > -1e-9
        assert found.status != "none" or found.depth > -1e-9
    if got.displaces is False:
        assert found.depth > -1e-9
    if found.depth < -1e-6:
        assert got.displaces is True
        assert got.claims[0].proved is True


@pytest.mark.parametrize("name", EXTREMES)
def test_extremes_are_decided_or_refused_in_words(name):
    model, r = EXTREMES[name], extreme_rates(name)
    found = ExactFlow(model, get("dpo"), *r).displacement()
    if found.status == "stationary":
        with pytest.raises(ValueError, match="let something move"):
            certify(model, None, *r)
        return
    got = certify(model, None, *r)
    assert got.displaces is (found.status != "none") or (name == "P = 0" and got.displaces is None)
    assert got.claims[0].proved is not None


def test_the_precision_rises_until_the_sign_is_known():
    # The exact tie above, moved by 2^-200: S(1) - S(-1) = (e - 1/e) (e^(2^-200) - 1) > 0.
    got = certify(single([[0.5, 0], [-0.5, 0], [1.5, 2.0**-200]], [-1, 1]), None, 0.0, 1.0, margin=1.0, token=2)
    assert (got.bits, got.claims[0].proved) == (256, True)
    other = certify(single([[0.5, 0], [-0.5, 0], [1.5, -(2.0**-200)]], [-1, 1]), None, 0.0, 1.0, margin=1.0, token=2)
    assert (other.bits, other.claims[0].proved) == (256, False)


def test_records_speak_and_save():
    got = certify(scenario(), get("dpo"), 1.0, KAPPA, box=0.01)
    text = str(got)
    for words in ("Certified", "proved", "'Yes'", "u1 = ", "G = -l'", "Whole path", "Discrete steps", "0.01"):
        assert words in text
    saved = json.loads(json.dumps(got.to_dict()))
    assert saved["certified"] is True
    assert saved["change"]["high"] < 0 < saved["gain"]["low"]
    assert saved["lowest"]["relative_width"] < 1e-12
    assert "<pre>" in got._repr_html_()
    zero = Enclosure(flint.arb(0, 1))
    assert zero.relative_width == np.inf
    assert zero.contains("0.5")
    assert not zero.contains(2)


@pytest.mark.parametrize(("mid", "radius"), [(2, 0.5), (-2, 0.5), (0, 1e-9), (1e300, 1e299), (-1e-300, 0)])
def test_low_and_high_enclose_the_ball_and_little_more(mid, radius):
    ball = flint.arb(mid, radius)
    got, below, above = Enclosure(ball), ball.lower(), ball.upper()
    assert flint.arb(got.low) < below
    assert above < flint.arb(got.high)
    slack = flint.arb(2) ** -51  # two units in the last place
    assert flint.arb(got.low) >= below - abs(below) * slack
    assert flint.arb(got.high) <= above + abs(above) * slack
    third = Enclosure(flint.arb(mid) / 3)  # no float, in general
    assert Fraction(third.low) < Fraction(mid) / 3 < Fraction(third.high)


# ---- files and the scenario


def test_the_scenario_and_a_file_give_the_same_certificate():
    model = scenario()
    built_in = certificate.certify()
    embeddings = Embeddings(model.W, model.tokens or ())
    given = certificate.certify(embeddings, "No", "Never", hidden=model.h, lr_hidden=KAPPA, token="Yes")
    assert built_in.certified
    assert (built_in.margin, str(built_in.change), built_in.token) == (given.margin, str(given.change), "Yes")
    assert certificate.certify(None, "Yes", "No").preferred == "Yes"


@pytest.mark.skipif(not REAL.exists(), reason="needs the embedding matrix of the shared data")
def test_a_real_matrix():
    embeddings = read_embeddings(REAL)
    got = certificate.certify(embeddings, "maybe", "perhaps", lr_unembedding=0.0)
    assert got.certified
    assert got.V == 30522
    assert got.largest_box is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"margin": 1.0}, r"margin must lie above the start margin 2\.91.*got 1\.0"),
        ({"margin": np.inf}, "margin must be in"),
        ({"token": 16}, r"token must be a token index in \[0, 16\), got 16"),
        ({"token": "Yess"}, "unknown token 'Yess'"),
        ({"box": 0.0}, r"box must be in \(0"),
        ({"lr_hidden": np.eye(6)}, "lr_hidden must be a real number"),
        ({"lr_hidden": 0.0, "lr_unembedding": 0.0}, "let something move"),
        ({"lr_hidden": -1.0}, "lr_hidden must be in"),
        ({"max_bits": 64}, "max_bits must be an integer >= 128"),
        ({"loss": get("slic", delta=1.0)}, "loss must raise the margin"),
    ],
)
def test_bad_input_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        certify(scenario(), **change)


def test_bad_input_of_the_scenario_is_named():
    with pytest.raises(ValueError, match="embeddings must be given"):
        certificate.certify(None, hidden=np.zeros(6))
    with pytest.raises(ValueError, match="must be tokens of the scenario, got 'Nein'"):
        certificate.certify(None, "Nein", "No")
    with pytest.raises(ValueError, match="must be an Embeddings record"):
        certificate.certify(np.zeros((3, 2)))  # type: ignore[arg-type]


def test_a_margin_the_path_never_reaches_is_refused():
    with pytest.raises(ValueError, match="reached by the path"):
        certify(EXTREMES["P = 0"], None, *extreme_rates("P = 0"), margin=0.5)


def test_without_flint_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "flint", None)
    with pytest.raises(ImportError, match=r"likelihood-displacement\[certify\]"):
        certify(scenario())
