"""Losses of TRL's trainers: reductions between them, minima, zeros of the slope, incentives, batches, extremes."""

import dataclasses
import math
from typing import Any

import mpmath
import numpy as np
import pytest
import retyped_trl
from scipy.optimize import minimize

from theory.losses import LOSSES, SFT, Loss, MarginForm, Pair, PerToken, get
from theory.losses.aot import AOT, AOTUnpaired
from theory.losses.discopop import CONVEX, FOLD, DiscoPOP
from theory.losses.exo import EXO
from theory.losses.kto import kto_z0
from theory.losses.nll import NLL
from theory.losses.robust import Robust
from theory.model import Sample

NAMES = list(retyped_trl.PAPER)
OURS = [example for name in NAMES for example in LOSSES[name].examples()]

rng = np.random.default_rng(4)
# Log-probabilities below 0, sums over 3 and 5 tokens, with generic references.
BATCH = Pair(*(-np.array([s * rng.exponential(size=40)]) for s in (6.0, 9.0, 5.0, 8.0)), 3.0, 5.0)
ONE = Pair(*(x[0, 0] for x in BATCH[:4]), 3.0, 5.0)


def torch_pair(y: Pair) -> Pair:
    import torch

    return Pair(*(torch.as_tensor(np.asarray(x), dtype=torch.float64) for x in y))


def singles(loss: Loss, y: Pair) -> np.ndarray:
    """The loss of every sample alone: a coupled loss sees batches of one."""
    return loss.value(Pair(*(np.reshape(np.broadcast_to(x, y.a.shape), (-1, 1)) for x in y[:6])))


def same(first: Loss, second: Loss, y: Pair = BATCH) -> None:
    """Equal values and incentives, sample by sample."""
    columns = Pair(*(np.reshape(np.broadcast_to(x, y.a.shape), (-1, 1)) for x in y[:6]))
    np.testing.assert_allclose(singles(first, y), singles(second, y), rtol=1e-13, atol=1e-15)
    for ours, theirs in zip(first.incentives(columns), second.incentives(columns), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-16)


ONE_TOKEN = BATCH._replace(n_w=1.0, n_l=1.0)
NO_REFERENCE = BATCH._replace(a_ref=0.0, b_ref=0.0)

REDUCTIONS: dict[str, tuple[Loss, Loss, Pair]] = {
    "robust, no wrong labels: DPO": (get("robust", beta=0.7, eps=0.0), get("dpo", beta=0.7), BATCH),
    "AOT, one pair: cDPO": (get("aot", beta=0.7, eps=0.2), get("cdpo", beta=0.7, eps=0.2), BATCH),
    "AOT unpaired, one pair: cDPO": (get("aot_unpaired", beta=0.7, eps=0.2), get("cdpo", beta=0.7, eps=0.2), BATCH),
    "AOT, one pair, no wrong labels: DPO": (get("aot", beta=0.7), get("dpo", beta=0.7), BATCH),
    "BCO, no shift: BCO of pairs": (get("bco", beta=0.7), get("bco_pair", beta=0.7), BATCH),
    "SPPO, certain: hard": (get("sppo", eta=1 / 0.7), get("sppo_hard", beta=0.7), BATCH),
    "KTO, z0 = 0: APO unpaired": (
        get("kto", beta=0.7, lam_D=1.3, lam_U=0.4),
        get("apo_zero_unpaired", beta=0.7, lam_D=1.3, lam_U=0.4),
        BATCH,
    ),
    "APO unpaired, equal weights: APO": (get("apo_zero_unpaired", beta=0.7), get("apo_zero", beta=0.7), BATCH),
    "DPO per token": (get("dpo_norm", beta=0.7), PerToken(get("dpo", beta=0.7)), BATCH),
    "IPO per token": (get("ipo_norm", beta=0.7), PerToken(get("ipo", tau=0.7)), BATCH),
    "DPO per token, one token": (get("dpo_norm", beta=0.7), get("dpo", beta=0.7), ONE_TOKEN),
    "IPO per token, one token": (get("ipo_norm", beta=0.7), get("ipo", tau=0.7), ONE_TOKEN),
    "CPO: DPO and likelihood": (get("cpo", beta=0.7, cpo_alpha=0.3), SFT(get("dpo", beta=0.7), 0.3), NO_REFERENCE),
    "CPO of TRL": (
        SFT(get("cpo", beta=0.7, cpo_alpha=0.0), 0.3, per="batch_token"),
        SFT(get("dpo", beta=0.7), 0.3, per="token"),
        NO_REFERENCE,
    ),
    "SimPO, no target: DPO per token": (get("simpo", beta=0.7, gamma=0.0), get("dpo_norm", beta=0.7), NO_REFERENCE),
    "AlphaPO at 0: SimPO": (get("alphapo", alpha=0.0), get("simpo"), BATCH),
    "ORPO, prompt of one token": (get("orpo_prompt", beta=0.7), get("orpo", beta=0.7), BATCH),
    "likelihood per batch token, one pair": (NLL("batch_token"), NLL("token"), BATCH),
}


@pytest.mark.parametrize("case", REDUCTIONS.values(), ids=REDUCTIONS)
def test_reductions(case):
    same(*case)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (get("robust", beta=0.7, eps=1e-6), get("dpo", beta=0.7)),
        (get("aot", beta=0.7, eps=1e-6), get("dpo", beta=0.7)),
        (get("bco", beta=0.7, delta=1e-6), get("bco_pair", beta=0.7)),
        (get("sppo", eta=1 / 0.7, p_l=1e-6), get("sppo_hard", beta=0.7)),
        (get("kto", beta=0.7, z0=1e-6), get("apo_zero_unpaired", beta=0.7)),
        (get("apo_zero_unpaired", lam_D=1.000001), get("apo_zero")),
        (get("dpo_norm", beta=0.7), get("dpo", beta=0.7)),
        (get("ipo_norm", beta=0.7), get("ipo", tau=0.7)),
        (get("cpo", beta=0.7), SFT(get("dpo", beta=0.7), 1.0)),  # with a reference
        (get("simpo", gamma=0.500001), get("simpo")),
        (get("alphapo", alpha=1e-6), get("simpo")),
        (get("orpo_prompt", n_prompt=2), get("orpo")),
        (NLL("sequence"), NLL("token")),
    ],
    ids=lambda loss: loss.name,
)
def test_reductions_can_fail(first, second):
    with pytest.raises(AssertionError):
        same(first, second)


def test_robust_is_dpo_and_a_linear_term():
    m = BATCH.m
    rest = get("robust", beta=0.7, eps=0.2).value(BATCH) - get("dpo", beta=0.7).value(BATCH)
    np.testing.assert_allclose(rest, -0.2 / 0.6 * 0.7 * m, rtol=1e-12, atol=1e-13)
    # Unbounded below; a claim of non-negativity would be false.
    assert get("robust", beta=0.7, eps=0.2).value(Pair.of_margin(1e4)) < -2000


def test_alphapo_tends_to_simpo_linearly_in_alpha():
    simpo = get("simpo").value(BATCH)
    gaps = [np.abs(get("alphapo", alpha=alpha).value(BATCH) - simpo).max() for alpha in (1e-4, 1e-6, -1e-6, 1e-14)]
    assert 1e-4 < gaps[0] < 0.1
    assert gaps[1] == pytest.approx(gaps[0] / 100, rel=0.01)
    assert gaps[2] == pytest.approx(gaps[1], rel=0.01)
    assert gaps[3] < 1e-11  # no cancellation: (e^(alpha x) - 1)/alpha would be off by 1e-2


# ---- margin forms


def sample(n_w: int, n_l: int) -> Sample:
    return Sample("x", (tuple(range(n_w)), tuple(range(n_w, n_w + n_l))), (-1.4, -2.5))


EQUAL = [
    *(e for name in ("simpo", "dpo_norm", "ipo_norm", "aot", "aot_unpaired") for e in LOSSES[name].examples()),
    get("cpo", beta=0.7, cpo_alpha=0.0, eps=0.1),
    get("alphapo", alpha=0.0),
]


@pytest.mark.parametrize("loss", EQUAL, ids=repr)
def test_margin_forms_for_equal_lengths(loss):
    form = loss.margin(sample(3, 3))
    u = np.linspace(-9, 9, 41)
    y = Pair(u - 9.3, -9.3 + 0 * u, -1.4 + 0 * u, -2.5 + 0 * u, 3 + 0 * u, 3 + 0 * u)
    y = Pair(*(x[:, None] for x in y[:6]))
    np.testing.assert_allclose(form.value(u), loss.value(y)[:, 0], rtol=1e-13, atol=1e-14)
    d_w, d_l = (d[:, 0] for d in loss.incentives(y))
    np.testing.assert_allclose(form.slope(u), d_w, rtol=1e-11, atol=1e-15)
    np.testing.assert_allclose(form.slope(u), d_l, rtol=1e-11, atol=1e-15)
    np.testing.assert_allclose(form.log_slope(u), np.log(np.abs(d_w)), rtol=1e-10, atol=1e-10)
    if form.minimiser is not None:
        assert form.slope(form.minimiser) == pytest.approx(0, abs=1e-14)


def test_no_margin_form_where_the_loss_sees_more():
    for name in ("simpo", "dpo_norm", "ipo_norm"):
        assert get(name).margin(sample(3, 4)) is None
    assert get("alphapo", alpha=0.0).margin(sample(3, 4)) is None
    others = [e for e in OURS if e.name in ("nca", "bco", "sppo", "apo_zero", "apo_down", "nll", "orpo", "kto", "cpo")]
    for loss in others:
        if getattr(loss, "cpo_alpha", 1) != 0:
            assert loss.margin(sample(3, 3)) is None
    assert get("alphapo").margin(sample(3, 3)) is None
    assert len(others) > 12


# ---- where they are least


def test_exo_is_zero_at_its_minimiser_and_rises_on_both_sides():
    for eps in (1e-6, 1e-3, 0.27, 0.49):
        loss = EXO(beta=0.6, eps=eps)
        least = loss.minimiser(0.4)
        assert least == pytest.approx(0.4 + math.log((1 - eps) / eps) / 0.6, rel=1e-15)
        form = MarginForm(loss, 0.4)
        assert abs(form.value(least)) < 1e-15
        assert (form.value(least + np.array([-30, -1e-3, 1e-3, 30])) > 0).all()
        assert (form.sign(least + np.array([-300, -1e-9, 1e-9, 300])) == [1, 1, -1, -1]).all()


@pytest.mark.parametrize("loss", [get("sppo_hard", beta=0.3), get("sppo", eta=7.0, p_w=0.8, p_l=0.1)], ids=repr)
def test_sppo_is_least_where_it_says(loss):
    found = minimize(lambda x: float(loss.value(ONE._replace(a=x[0], b=x[1]))), [-1.0, -1.0], tol=1e-12)
    np.testing.assert_allclose(found.x, loss.minimum(ONE), atol=1e-6)
    assert loss.value(ONE._replace(a=loss.minimum(ONE)[0], b=loss.minimum(ONE)[1])) < 1e-25
    target = (1 / 0.6, -1 / 0.6) if loss.name == "sppo_hard" else (2.1, -2.8)
    np.testing.assert_allclose(np.subtract(loss.minimum(ONE), (ONE.a_ref, ONE.b_ref)), target, rtol=1e-13)


def test_no_minimum_is_declared_where_there_is_none():
    for loss in OURS:
        assert (loss.minimum(ONE) is None) == (loss.name not in ("sppo", "sppo_hard"))


def test_nca_holds_the_preferred_response_at_two_thirds():
    loss = get("nca", beta=0.7)
    at = ONE._replace(a=ONE.a_ref + math.log(2) / 0.7)
    d_w, d_l = loss.incentives(at)
    assert d_w == pytest.approx(0, abs=1e-15)
    assert d_l > 0.01
    assert loss.incentives(at._replace(a=at.a - 0.1))[0] > 1e-3
    assert loss.incentives(at._replace(a=at.a + 0.1))[0] < -1e-3


# ---- DiscoPOP


def test_discopop_turns_where_it_was_published_to():
    low, high = DiscoPOP(beta=0.05).zeros(0.0)
    assert (0.05 * low, 0.05 * high) == (pytest.approx(-0.1186, abs=5e-5), pytest.approx(0.0720, abs=5e-5))
    assert (low, high) == (pytest.approx(-2.371, abs=5e-4), pytest.approx(1.440, abs=5e-4))
    assert DiscoPOP(beta=0.05).minimiser(0.0) is None  # the lower values are far out, towards m = inf
    value = MarginForm(DiscoPOP(beta=0.05), 0.0).value
    assert value(low - 0.3) > value(low) < value(low + 0.3)
    assert value(high - 0.3) < value(high) > value(high + 0.3)
    assert value(1e4) == pytest.approx(0, abs=1e-200)


def modulated(x: Any, tau: Any) -> Any:
    """DiscoPOP of x = beta m by the paper's formula."""
    loss = type("P", (), {"beta": 1, "tau": tau})
    return retyped_trl.PAPER["discopop"](loss, Pair(x, 0, 0, 0))


@pytest.mark.parametrize("tau", [1e-6, 1e-3, 0.02, 0.05, 0.0999, (1 - math.log(2)) / 3, 0.105, FOLD - 1e-6])
def test_discopop_zeros_are_those_of_the_formula(tau):
    ours = DiscoPOP(beta=1.0, tau=tau).zeros(0.0)
    with mpmath.workdps(60):
        found = [mpmath.findroot(lambda x: hand_slope(DiscoPOP(beta=1.0, tau=tau), x), mpmath.mpf(z)) for z in ours]
        for x in found:  # the derivative by hand is the formula's
            step = mpmath.mpf(tau) / 10**15
            rise = modulated(x + step, mpmath.mpf(tau)) - modulated(x - step, mpmath.mpf(tau))
            assert abs(rise / (2 * step)) < 1e-20 / tau
    # Near the fold the two are ill-conditioned, as the roots of a parabola that barely crosses the axis.
    slack = 1e-13 / math.sqrt(1 - tau / FOLD)
    np.testing.assert_allclose(ours, [float(x) for x in found], rtol=slack, atol=1e-13 * tau)
    expected = [0.3 + float(x) / 2.5 for x in found]
    np.testing.assert_allclose(DiscoPOP(beta=2.5, tau=tau).zeros(0.3), expected, rtol=1e-10)


def test_discopop_pushes_the_margin_down_at_the_reference_below_a_threshold():
    threshold = (1 - math.log(2)) / 3
    slopes = [float(MarginForm(DiscoPOP(beta=1.0, tau=tau), 0.0).slope(0.0)) for tau in (0.05, threshold, 0.2)]
    assert slopes[0] == pytest.approx(-((1 - math.log(2)) / 0.2 - 0.75), rel=1e-13)
    assert slopes[0] == pytest.approx(-0.784, abs=5e-4)
    assert slopes[1] == pytest.approx(0, abs=1e-15)
    assert slopes[2] > 0.3


def test_discopop_constants_solve_their_equations():
    """The fold: l' = l'' = 0. The ends of the convex range: l'' = l''' = 0."""

    def derivative(n: int) -> Any:
        return lambda x, tau: mpmath.diff(lambda t: modulated(t, tau), x, n)

    with mpmath.workdps(30):
        _, fold = mpmath.findroot([derivative(1), derivative(2)], (-0.06, 0.11))
        ends = [
            mpmath.findroot([derivative(2), derivative(3)], guess, tol=1e-18)[1]
            for guess in ((-0.2, 0.42), (-2.5, 0.8))
        ]
    assert pytest.approx(float(fold), rel=1e-15) == FOLD
    assert pytest.approx([float(x) for x in ends], rel=1e-15) == CONVEX
    assert DiscoPOP(tau=FOLD).zeros(0.0) == ()
    assert len(DiscoPOP(tau=FOLD - 1e-9).zeros(0.0)) == 2
    assert [DiscoPOP(tau=t).claims.decreasing for t in (0.05, 0.109, 0.11, 1.0)] == [False, False, True, True]
    assert [DiscoPOP(tau=t).claims.convex for t in (0.05, 0.42, 0.43, 0.79, 0.8, 1.0)] == [
        False,
        False,
        True,
        True,
        False,
        False,
    ]


@pytest.mark.parametrize("tau", [0.02, 0.109, 0.11, 0.3, 0.42, 0.425, 0.6, 0.795, 0.8, 1.0])
def test_discopop_claims_hold_on_a_fine_grid(tau):
    """Signs of l' and l'' by finite differences, against the claims the thresholds make."""
    loss = DiscoPOP(beta=1.0, tau=tau)
    G = MarginForm(loss, 0.0).slope(np.linspace(-12, 12, 48001))
    assert bool((G >= 0).all()) == loss.claims.decreasing
    assert bool((np.diff(G) <= 1e-15).all()) == loss.claims.convex


# ---- far out


@pytest.mark.parametrize("beta", [1e-3, 0.1, 1.0, 30.0, 1e3])
@pytest.mark.parametrize("loss", [Robust(), EXO(), DiscoPOP(), DiscoPOP(tau=1.0)], ids=repr)
def test_log_slope_of_margin_losses_over_the_whole_range(loss, beta):
    loss = dataclasses.replace(loss, beta=beta)
    form = MarginForm(loss, 0.0)
    for u in (-1e4, -745.3, -37.0, -11.0, -1.3, 2.7, 11.0, 745.3, 1e4):
        z = mpmath.mpf(beta) * mpmath.mpf(u)
        with mpmath.workdps(60):
            exact = mpmath.log(abs(hand_slope(loss, z)))
        assert float(form.log_slope(u)) == pytest.approx(float(exact), rel=1e-12, abs=1e-11), u
        assert float(form.slope(u)) == pytest.approx(float(hand_slope(loss, z)), rel=1e-9, abs=1e-300), u


def hand_slope(loss: Any, z: Any) -> Any:
    """G by hand in z = beta m, without cancellation, so that 60 digits do for any z."""
    s, e = (lambda t: 1 / (1 + mpmath.exp(-t))), mpmath.exp
    if loss.name == "robust":
        return loss.beta * (s(-z) + loss.eps / (1 - 2 * mpmath.mpf(loss.eps)))
    if loss.name == "exo":
        return -loss.beta * s(z) * s(-z) * (z - mpmath.log((1 - mpmath.mpf(loss.eps)) / loss.eps))
    tau = mpmath.mpf(loss.tau)
    g, off = s(z / tau), s(-z / tau)
    L = mpmath.log1p(e(-z))
    return loss.beta * (g * off / tau * (L - e(-z)) + off * s(-z) + g * e(-z))


EXTREMES = np.array([-1e4, -3e3, -745.0, -60.0, -1.0, -1e-9])


@pytest.mark.parametrize("loss", OURS, ids=repr)
@pytest.mark.parametrize("beta", [None, 1e3])
def test_nothing_is_nan_far_out(loss, beta):
    if beta is not None and hasattr(loss, "beta"):
        loss = dataclasses.replace(loss, beta=beta)
    a, b = (x.reshape(-1, 1) for x in np.meshgrid(EXTREMES, EXTREMES))
    for n_w, n_l in ((1.0, 1.0), (2.0, 7.0)):
        y = Pair(a, b, 0 * a - 0.3, 0 * a - 0.7, 0 * a + n_w, 0 * a + n_l)[:6]
        seen = np.stack(
            [loss.value(Pair(*y)), loss.torch_value(torch_pair(Pair(*y))).numpy(), *loss.incentives(Pair(*y))]
        )
        assert not np.isnan(seen).any()
        assert np.ptp(seen[0]) > 0.1
        finite = np.isfinite(seen[0])
        np.testing.assert_allclose(seen[0][finite], seen[1][finite], rtol=1e-11, atol=1e-14)
        assert (finite == np.isfinite(seen[1])).all()
        # Infinite only where the value itself leaves float range: powers of a probability.
        assert finite.all() or loss.name == "alphapo"


def test_alphapo_beyond_float_range():
    """p^-alpha overflows at ln p = -3000: the larger power decides, and a push that vanishes is 0, not NaN."""
    loss = get("alphapo")
    y = Pair(np.array([-3000.0, -1.0, -3000.0, -4000.0, -3000.0]), np.array([-1.0, -3000.0, -4000.0, -3000.0, -3000.0]))
    assert loss.value(y)[:4].tolist() == [np.inf, 0.0, 0.0, np.inf]
    assert loss.value(y)[4] == pytest.approx(math.log1p(math.exp(0.5)))
    d_w, d_l = loss.incentives(y)
    assert d_w.tolist() == [np.inf, 0.0, 0.0, np.inf, np.inf]
    assert d_l[:3] == pytest.approx([2 * math.exp(0.25), 0.0, 0.0])


# ---- incentives


def test_incentive_ratios():
    y = BATCH
    ratio = {name: np.divide(*get(name).incentives(y)) for name in ("simpo", "dpo_norm", "alphapo", "ipo_norm")}
    for name in ("simpo", "dpo_norm", "ipo_norm"):
        np.testing.assert_allclose(ratio[name], 5 / 3, rtol=1e-12)
    powers = np.exp(-0.25 * (y.a / 3 - y.b / 5))
    np.testing.assert_allclose(ratio["alphapo"], 5 / 3 * powers, rtol=1e-12)
    assert np.ptp(powers) > 0.5


def test_incentives_of_losses_that_see_each_response_alone():
    """By hand: beta times logistic functions of the log-ratios."""
    s = lambda z: 1 / (1 + np.exp(-z))  # noqa: E731
    w, l = 0.7 * BATCH.da, 0.7 * BATCH.db
    hand = {
        get("bco_pair", beta=0.7): (s(-w), s(l)),
        get("bco", beta=0.7, delta=0.4): (s(0.4 - w), s(l - 0.4)),
        get("nca", beta=0.7): (s(-w) - s(w) / 2, s(l) / 2),
        get("apo_zero", beta=0.7): (s(w) * s(-w), s(l) * s(-l)),
        get("apo_down", beta=0.7): (s(w - l) * s(l - w) - s(w) * s(-w), s(w - l) * s(l - w)),
        get("kto", beta=0.7, lam_D=1.3, lam_U=0.4, z0=0.3): (
            1.3 * s(w - 0.21) * s(0.21 - w),
            0.4 * s(l - 0.21) * s(0.21 - l),
        ),
    }
    for loss, (d_w, d_l) in hand.items():
        ours = loss.incentives(BATCH)
        np.testing.assert_allclose(ours[0], 0.7 * d_w, rtol=1e-11, atol=1e-15)
        np.testing.assert_allclose(ours[1], 0.7 * d_l, rtol=1e-11, atol=1e-15)


def test_apo_down_starts_by_pushing_down_the_dispreferred_alone():
    loss = get("apo_down", beta=0.7)
    d_w, d_l = loss.incentives(Pair(-3.0, -4.0, -3.0, -4.0))
    assert d_w == 0
    assert d_l == pytest.approx(0.7 / 4, rel=1e-15)
    # Then y+ falls where |m| > |da|, and rises where |m| < |da|.
    assert loss.incentives(Pair(-3.5, -6.0, -3.0, -4.0))[0] < -1e-3
    assert loss.incentives(Pair(-3.5, -4.7, -3.0, -4.0))[0] > 1e-3


def test_orpo_pushes_both_ways_and_is_finite_near_certainty():
    loss = get("orpo", beta=0.7)
    d_w, d_l = loss.incentives(Pair(np.array([-1e-12, -3.0]), np.array([-3.0, -1e-12])))
    # With p_w -> 1 the odds term saturates; its push on y+ tends to beta times the odds of y-.
    odds = math.exp(-3) / (1 - math.exp(-3))
    assert d_w[0] == pytest.approx(1 + 0.7 * odds, rel=1e-9)
    assert d_l[0] == pytest.approx(0.0, abs=1e-10)
    # With p_l -> 1 the push on y- grows like 1/(1 - p_l).
    assert d_l[1] == pytest.approx(0.7e12, rel=1e-3)


# ---- batches


def test_aot_pairs_by_rank():
    u, u_ref = np.array([0.3, -2.0, 5.0, 1.0]), np.array([4.0, 0.0, -1.0, 0.5])
    y = Pair(u - 9, 0 * u - 9, u_ref - 7, 0 * u - 7)
    d = np.array([-2.0 + 1.0, 0.3 - 0.0, 1.0 - 0.5, 5.0 - 4.0])
    np.testing.assert_allclose(AOT(beta=0.7).value(y), np.log1p(np.exp(-0.7 * d)), rtol=1e-14)
    # The order of the samples does not matter, and neither does which reference belongs to which.
    for order in ([3, 1, 0, 2], [1, 0, 2, 3]):
        shuffled = y._replace(a_ref=y.a_ref[order])
        assert AOT(beta=0.7).value(shuffled).mean() == pytest.approx(AOT(beta=0.7).value(y).mean(), rel=1e-15)
        assert abs(get("dpo", beta=0.7).value(shuffled).mean() - get("dpo", beta=0.7).value(y).mean()) > 1e-3
    # Each sample is pushed by the term of its own rank.
    d_w, d_l = AOT(beta=0.7).incentives(y)
    expected = 0.7 / (1 + np.exp(0.7 * d))
    np.testing.assert_allclose(d_w, expected[np.argsort(np.argsort(u))], rtol=1e-13)
    np.testing.assert_allclose(d_l, d_w, rtol=1e-15)


def test_unpaired_aot_ranks_each_side_on_its_own():
    da, db = np.array([0.3, -2.0, 5.0]), np.array([1.0, -4.0, 0.5])
    y = Pair(da - 6, db - 5, 0 * da - 6, 0 * da - 5)
    d = np.array([2.0, -0.2, 4.0])
    loss = AOTUnpaired(beta=0.7, eps=0.2)
    z = 0.7 * d
    np.testing.assert_allclose(loss.value(y), 0.8 * np.log1p(np.exp(-z)) + 0.2 * np.log1p(np.exp(z)), rtol=1e-14)
    d_w, d_l = loss.incentives(y)
    push = 0.7 * (1 / (1 + np.exp(z)) - 0.2)
    np.testing.assert_allclose(d_w, push[[1, 0, 2]], rtol=1e-13)
    np.testing.assert_allclose(d_l, push[[2, 0, 1]], rtol=1e-13)


def test_token_means_over_a_batch():
    y = Pair(np.array([-3.0, -8.0]), np.array([-4.0, -5.0]), n_w=np.array([2.0, 6.0]), n_l=np.array([3.0, 3.0]))
    assert NLL("batch_token").value(y).mean() == pytest.approx(11 / 8)
    assert NLL("token").value(y).mean() == pytest.approx((3 / 2 + 8 / 6) / 2)
    assert NLL("sequence").value(y).mean() == 5.5
    assert [NLL(per).coupled for per in ("sequence", "token", "batch_token")] == [False, False, True]
    # Prompt and response: 3 predicted prompt tokens of each sample join the mean.
    loss = get("orpo_prompt", beta=0.7, n_prompt=4, logp_prompt=-5.3)
    odds = loss.value(y) + (np.array([-3.0, -8.0]) - 5.3) / 7.0
    np.testing.assert_allclose(odds, get("orpo", beta=0.7).value(y) + y.a / y.n_w, rtol=1e-12)
    nll = loss.value(y).mean() - odds.mean()
    assert nll == pytest.approx((11 + 2 * 5.3) / (8 + 2 * 3))


# ---- parameters


def test_kto_zero():
    assert kto_z0([0.5, -0.2, 0.9]) == pytest.approx(0.4)
    assert kto_z0([-0.5, 0.2]) == 0.0
    assert isinstance(kto_z0(np.array([1, 2])), float)
    for bad in ([], [[0.1]], [math.nan], 0.3):
        with pytest.raises(ValueError, match="log_ratios must"):
            kto_z0(bad)


DEFAULTS: dict[str, dict[str, Any]] = {
    "robust": {"beta": 0.1, "eps": 0.1},
    "exo": {"beta": 0.1, "eps": 1e-3},
    "discopop": {"beta": 0.1, "tau": 0.05},
    "nca": {"beta": 0.1},
    "bco": {"beta": 0.1, "delta": 0.0},
    "bco_pair": {"beta": 0.1},
    "sppo": {"eta": 10.0, "p_w": 1.0, "p_l": 0.0},
    "sppo_hard": {"beta": 0.1},
    "aot": {"beta": 0.1, "eps": 0.0},
    "aot_unpaired": {"beta": 0.1, "eps": 0.0},
    "apo_zero": {"beta": 0.1},
    "apo_down": {"beta": 0.1},
    "nll": {"per": "sequence"},
    "dpo_norm": {"beta": 0.1},
    "ipo_norm": {"beta": 0.1},
    "cpo": {"beta": 0.1, "cpo_alpha": 1.0, "eps": 0.0},
    "simpo": {"beta": 2.0, "gamma": 0.5, "eps": 0.0},
    "alphapo": {"beta": 2.0, "gamma": 0.5, "alpha": 0.25},
    "orpo": {"beta": 0.1},
    "orpo_prompt": {"beta": 0.1, "n_prompt": 1.0, "logp_prompt": 0.0},
    "kto": {"beta": 0.1, "lam_D": 1.0, "lam_U": 1.0, "z0": 0.0},
    "apo_zero_unpaired": {"beta": 0.1, "lam_D": 1.0, "lam_U": 1.0},
}


def test_defaults():
    assert {name: vars(get(name)) for name in NAMES} == DEFAULTS


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("robust", {"eps": 0.5}, r"Robust\.eps must be in \[0, 0\.5\)"),
        ("exo", {"eps": 0.0}, r"EXO\.eps must be in \(0, 0\.5\)"),
        ("discopop", {"tau": 1.1}, r"DiscoPOP\.tau must be in \(0, 1\]"),
        ("sppo", {"p_w": 1.1}, r"SPPO\.p_w must be in \[0, 1\]"),
        ("cpo", {"cpo_alpha": -0.1}, r"CPO\.cpo_alpha must be in \[0, inf\)"),
        ("simpo", {"gamma": -0.1}, r"SimPO\.gamma must be in \[0, inf\)"),
        ("alphapo", {"alpha": math.inf}, r"AlphaPO\.alpha must be in"),
        ("orpo_prompt", {"n_prompt": 0}, r"ORPOPrompt\.n_prompt must be in \[1, inf\)"),
        ("orpo_prompt", {"logp_prompt": 0.1}, r"ORPOPrompt\.logp_prompt must be in \(-inf, 0\]"),
        ("kto", {"z0": -0.1}, r"KTO\.z0 must be in \[0, inf\)"),
        ("nll", {"per": "word"}, r"NLL\.per must be one of sequence, token, batch_token, got 'word'"),
    ],
)
def test_domains(name, parameters, message):
    with pytest.raises(ValueError, match=message):
        get(name, **parameters)
