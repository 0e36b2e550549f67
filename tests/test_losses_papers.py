"""Losses of papers outside TRL: reductions, minima, incentives, the far ends; the formulas are retyped beside this file."""

import math
from dataclasses import dataclass
from typing import Any

import mpmath
import numpy as np
import pytest
import retyped_papers
from scipy.integrate import quad
from scipy.stats import beta as beta_distribution

from theory import check_loss
from theory.losses import LOSSES, SFT, Loss, MarginForm, Pair, Weighted, get
from theory.losses._gate import Gated
from theory.losses._links import FDivergence
from theory.losses.beta_dpo import keep_probabilities
from theory.losses.bonbon import BoNBoN, best_of_n_beta
from theory.model import Sample
from theory.ops import DUAL, Dual

NAMES = list(retyped_papers.PAPER)
# The gradients of beta-DPO and Gate-DPO hold something constant; they have tests of their own.
POTENTIALS = [e for name in NAMES if name not in ("beta_dpo", "gate_dpo") for e in LOSSES[name].examples()]

# Log-probabilities <= 0, off every kink, on both sides of the references; n+ != n-.
POINTS = [
    Pair(a, b, -2.1, -3.4, 3, 5)
    for a, b in [(-0.3, -4.0), (-2.6, -3.4), (-1.9, -2.8), (-7.5, -3.1), (-1.4, -6.9), (-0.2, -3.2), (-5.0, -9.0)]
]


def columns(points: list[Pair]) -> Pair:
    return Pair(*(np.array(x, dtype=float) for x in zip(*points, strict=True)))


def incentives(loss: Loss, y: Pair) -> np.ndarray:
    return np.array(loss.incentives(y))


def same(one: Loss, other: Loss, rtol: float = 1e-13) -> bool:
    """Values and incentives agree on every point."""
    y = columns(POINTS)
    values = np.allclose(one.value(y), other.value(y), rtol=rtol, atol=rtol)
    return values and np.allclose(incentives(one, y), incentives(other, y), rtol=rtol, atol=rtol)


def mp(y: Pair) -> Pair:
    return Pair(*(mpmath.mpf(float(x)) for x in y))


# ---- values and incentives against the retyped formulas


@pytest.mark.parametrize("loss", POTENTIALS, ids=repr)
def test_value_and_autodiff_are_the_papers(loss):
    """Incentives against difference quotients of the retyped formula in 60 digits."""
    with mpmath.workdps(60):
        step, paper = mpmath.mpf(10) ** -20, retyped_papers.PAPER[loss.name]
        for y in POINTS:
            exact = mp(y)
            assert float(loss.value(y)) == pytest.approx(float(paper(loss, exact)), rel=1e-13, abs=1e-14)
            for kind, sign, d in zip("ab", (-1, 1), loss.incentives(y), strict=True):
                up, down = (exact._replace(**{kind: getattr(exact, kind) + s}) for s in (step, -step))
                slope = sign * (paper(loss, up) - paper(loss, down)) / (2 * step)
                assert float(d) == pytest.approx(float(slope), rel=1e-10, abs=1e-13), (kind, y)


@dataclass(frozen=True)
class WrongJS(Loss):
    """f-DPO of Jensen-Shannon with the sign of the log-ratios forgotten, and DPO's claims."""

    name = "wrong_js"
    reference = "tests"

    def formula(self, ops: Any, y: Pair) -> Any:
        return -ops.log_sigmoid(0.1 * (ops.log_sigmoid(-y.da) - ops.log_sigmoid(-y.db)))


def test_a_wrong_loss_fails():
    report = check_loss(WrongJS())
    assert {c.name for c in report.failures} >= {"convex", "decreasing"}
    with mpmath.workdps(30):
        right = retyped_papers.PAPER["f_dpo_js"](get("f_dpo_js"), mp(POINTS[0]))
    assert abs(float(WrongJS().value(POINTS[0])) - float(right)) > 0.01


# ---- reductions


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (get("dpop", beta=0.7, lam=0), get("dpo", beta=0.7)),
        (get("dpo_shift", beta=0.7, lam=1), get("dpo", beta=0.7)),
        (get("dpo_shift", beta=0.7, lam=0.3), Weighted(get("dpo", beta=0.7), 1.0, 0.3)),
        (get("r_dpo", beta=0.7, alpha=0), get("dpo", beta=0.7)),
        (get("focal_po", beta=0.7, gamma=0), get("dpo", beta=0.7)),
        (get("beta_dpo", beta=0.7, alpha=0), get("dpo", beta=0.7)),
        (get("rpo", beta=0.7, eta=0.3), SFT(get("dpo", beta=0.7), 0.3)),
        (get("irpo", beta=0.7, alpha=0.3), SFT(get("dpo", beta=0.7), 0.3, "token")),
        (get("slic_hf", delta=2.3, lam=0.3), SFT(get("slic", delta=2.3), 0.3)),
        (get("f_dpo_alpha", beta=0.7, alpha=0), get("f_dpo_forward_kl", beta=0.7)),
        (get("f_dpo_forward_kl", beta=0.7), FDivergence(get("dpo", beta=0.7), "forward_kl")),
        (get("f_dpo_js", beta=0.7), FDivergence(get("gpo_logistic", beta=0.7), "js")),
        (get("f_dpo_alpha", beta=0.7, alpha=0.3), FDivergence(get("dpo", beta=0.7), "alpha", 0.3)),
        (FDivergence(get("dpo", beta=0.7), "reverse_kl"), get("dpo", beta=0.7)),
        (FDivergence(get("dpo", beta=0.7), "alpha", 1.0), get("dpo", beta=0.7)),
        (FDivergence(get("cal_dpo"), "reverse_kl"), get("cal_dpo")),
        (get("gate_dpo", beta=0.7, alpha=3, tau=0.3), Gated(get("dpo", beta=0.7), 3.0, 0.3)),
        # An open gate: p - tau > 0 times 1e9.
        (get("gate_dpo", beta=0.7, alpha=1e9, tau=0), get("dpo", beta=0.7)),
    ],
    ids=lambda loss: repr(loss),
)
def test_reductions(one, other):
    assert same(one, other)


def test_reductions_can_fail():
    assert not same(get("dpop", beta=0.7, lam=1e-3), get("dpo", beta=0.7))
    assert not same(get("r_dpo", beta=0.7, alpha=1e-3), get("dpo", beta=0.7))
    assert not same(get("gate_dpo", beta=0.7, alpha=3, tau=0.3), get("dpo", beta=0.7))  # same value, other gradient


def test_alpha_tends_to_dpo():
    gaps = []
    for alpha in (0.99, 0.999, 0.9999):
        y = columns(POINTS)
        gaps.append(np.abs(get("f_dpo_alpha", beta=0.7, alpha=alpha).value(y) - get("dpo", beta=0.7).value(y)).max())
    ratio = np.array(gaps[:-1]) / gaps[1:]
    np.testing.assert_allclose(ratio, 10, rtol=0.05)


@pytest.mark.parametrize(
    ("loss", "other"),
    [
        (get("r_dpo", beta=0.6, alpha=0.23), None),
        (get("dpop", beta=0.6, lam=0), get("dpo", beta=0.6)),
        (get("dpo_shift", beta=0.6, lam=1), get("dpo", beta=0.6)),
    ],
    ids=repr,
)
def test_margin_forms(loss, other):
    """As functions of the margin they are the loss, for a sample with three tokens against one."""
    sample = Sample("x", ((0, 1, 2), (1,)), (-2.1, -3.4))
    form = loss.margin(sample)
    u = np.array([-3.0, 0.2, 4.0])
    y = Pair(-5.0 + u, -5.0, -2.1, -3.4, 3, 1)
    np.testing.assert_allclose(form.value(u), loss.value(y), rtol=1e-14)
    np.testing.assert_allclose([form.slope(u)] * 2, incentives(loss, y), rtol=1e-13)
    if other is not None:
        assert form == other.margin(sample)
    assert get("dpop").margin(sample) is get("dpo_shift").margin(sample) is None


# ---- minima


@pytest.mark.parametrize("beta", [0.001, 0.1, 0.43, 5.0])
def test_cal_dpo_is_least_where_it_says(beta):
    loss = get("cal_dpo", beta=beta)
    y = Pair(0.0, 0.0, -2.1, -3.4)
    a, b = loss.minimum(y)
    x = a + 2.1
    assert x == pytest.approx(1 / (2 * beta) + math.exp(-2 * x) / (1 + math.exp(-2 * x)), rel=1e-13)
    assert b == pytest.approx(-3.4 - x, rel=1e-13)
    assert incentives(loss, y._replace(a=a, b=b)) == pytest.approx(0, abs=1e-11 * (1 + x))
    for da, db in np.array([(1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, 1)]) * 0.01:
        assert loss.value(y._replace(a=a + da, b=b + db)) > loss.value(y._replace(a=a, b=b))


@pytest.mark.parametrize("gamma", [0.05, 0.7, 1.3, 5.0, 50.0])
def test_focal_po_turns_at_its_zero(gamma):
    """The slope changes sign where p = e^(-1/gamma), at the largest value 1/(e gamma); 1/ln 2 decides at the start."""
    loss = get("focal_po", beta=0.7, gamma=gamma)
    form = MarginForm(loss, 0.3)
    (zero,) = form.zeros
    p = 1 / (1 + math.exp(-0.7 * (zero - 0.3)))
    assert p == pytest.approx(math.exp(-1 / gamma), rel=1e-12)
    assert form.value(zero) == pytest.approx(1 / (math.e * gamma), rel=1e-13)
    assert form.slope(zero - 0.01) < 0 < form.slope(zero + 0.01)
    assert form.value(zero + np.array([-1.0, 1.0])).max() < form.value(zero)
    assert form.minimiser is None
    assert (form.slope(0.3) > 0) == (gamma < 1 / math.log(2))


def test_focal_po_starts_flat_at_the_critical_exponent():
    assert MarginForm(get("focal_po", gamma=1 / math.log(2)), 0.0).slope(0.0) == pytest.approx(0, abs=1e-17)
    assert get("focal_po", gamma=0).zeros(0.0) == ()


@pytest.mark.parametrize("n", [2, 3, 8])
def test_bonbons_target_is_that_of_best_of_n(n):
    """(n-1) E[ln F(best) - ln F(worst)] by quadrature over the order statistics of n uniforms."""
    means = [
        quad(lambda x, i=i, j=j: math.log(x) * beta_distribution.pdf(x, i, j), 0, 1)[0] for i, j in ((n, 1), (1, n))
    ]
    target = (n - 1) * (means[0] - means[1])
    assert 1 / (2 * best_of_n_beta(n)) == pytest.approx(target, rel=1e-7)
    assert BoNBoN.best_of(n, 0.3) == get("bonbon", alpha=0.3, beta=best_of_n_beta(n))
    # Without the likelihood term the margin rests there.
    y = Pair(-2.1 + target, -3.4, -2.1, -3.4)
    assert incentives(BoNBoN.best_of(n, 1e-12), y) == pytest.approx(0, abs=1e-10)


@pytest.mark.parametrize("n", [1, 2.5, True])
def test_best_of_n_needs_two_samples(n):
    with pytest.raises(ValueError, match="n must be an integer >= 2"):
        best_of_n_beta(n)


# ---- incentives that are known in closed form


def ratio(loss: Loss, da: float, db: float) -> float:
    d_w, d_l = loss.incentives(Pair(da - 2.1, db - 3.4, -2.1, -3.4, 3, 5))
    return float(d_w / d_l)


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (get("dpo"), 1.0),
        (get("chi_po"), 1.53),
        (get("f_dpo_js"), 0.65),
        (get("f_dpo_alpha", alpha=0.5), 0.29),
        (get("f_dpo_forward_kl"), 0.082),
        (get("squared_po"), 0.031),
    ],
    ids=lambda x: x.name if isinstance(x, Loss) else str(x),
)
def test_incentive_ratios_as_the_pair_separates(loss, expected):
    """At da = -0.5, db = -3: of these only chi-PO turns towards y+."""
    assert ratio(loss, -0.5, -3.0) == pytest.approx(expected, abs=0.005)


@pytest.mark.parametrize(
    ("loss", "r"),
    [
        (get("dpo_shift", lam=0.4), lambda da, db: 2.5),
        (get("dpop", beta=0.7, lam=2.3), lambda da, db: 1.0 if da >= 0 else 3.3),
        (get("lsif"), lambda da, db: math.exp(da - 2 * db)),
        (get("ukl"), lambda da, db: math.exp(-db)),
        (get("ddro"), lambda da, db: (2 - math.exp(db)) * math.exp(-db)),
        (get("squared_po", beta=0.7), lambda da, db: (1 - da) / (1 - db) * math.exp(db - da)),
        (get("beta_dpo"), lambda da, db: 1.0),
        (get("r_dpo"), lambda da, db: 1.0),
        (
            get("rpo", beta=0.7, eta=0.3),
            lambda da, db: 1 + 0.3 / (0.7 / (1 + math.exp(0.7 * (da - db)))),
        ),
    ],
    ids=lambda x: x.name if isinstance(x, Loss) else "",
)
def test_incentive_ratios(loss, r):
    for da, db in ((-0.5, -3.0), (0.4, -0.2), (-1.7, 0.6), (0.0, 0.0)):
        assert ratio(loss, da, db) == pytest.approx(r(da, db), rel=1e-12)


def test_squared_pos_force_is_gone_after_a_few_nats():
    """The weight of the push on y- at da = 0, beta = 0.1, and DPO's."""
    weights = [float(get("squared_po").incentives(Pair(0.0, b))[1]) for b in (-1.0, -2.0, -3.0, -4.0)]
    np.testing.assert_allclose(weights, [0.235, 0.41, 0.019, 9e-9], rtol=0.05)
    assert float(get("dpo").incentives(Pair(0.0, -4.0))[1]) == pytest.approx(0.040, rel=0.01)


def test_chi_po_turns_towards_the_response_that_gained():
    """r >= 1 exactly where m >= 0; flat outside the clip."""
    loss = get("chi_po", beta=0.1, r_max=10.0)
    rng = np.random.default_rng(3)
    for da, db in rng.uniform(-3, 2, (200, 2)):
        assert (ratio(loss, da, db) >= 1) == (da >= db)
    clipped = get("chi_po", beta=0.7, r_max=2.0)
    y = Pair(np.array([-1.0, -1.0, -9.0]), np.array([-5.0, -9.0, -1.0]), -1.0, -1.0)
    score = 0.7 * ((y.da + np.exp(y.da)) - (y.db + np.exp(y.db)))
    assert (np.abs(score) < 4).tolist() == [True, False, False]
    d_w, d_l = incentives(clipped, y)
    assert d_w[0] > 0 < d_l[0]
    assert not d_w[1:].any()
    assert not d_l[1:].any()
    np.testing.assert_allclose(clipped.value(y)[1:], [math.log1p(math.exp(-4)), 4 + math.log1p(math.exp(-4))])


def test_ddro_ends_where_the_ratio_is_two():
    inside, outside = (Pair(-1.0, math.log(2) + s - 3.4, -2.1, -3.4) for s in (-1e-9, 1e-9))
    assert float(get("ddro").value(inside)) == pytest.approx(-1.1 - math.log(2e-9), rel=1e-6)
    assert float(get("ddro").value(outside)) == math.inf
    assert float(get("ddro").torch_value(Pair(*(np.float64(x) for x in outside)))) == math.inf
    assert incentives(get("ddro"), outside).tolist() == [1.0, 0.0]
    assert float(get("ddro").incentives(inside)[1]) == pytest.approx(1e9, rel=1e-5)


def test_dpop_starts_as_dpo():
    """At da = 0 the slope is that of the side above."""
    start = Pair(-2.1, -3.4, -2.1, -3.4)
    assert incentives(get("dpop"), start).tolist() == [0.15, 0.15]
    below = start._replace(a=np.nextafter(-2.1, -3))
    assert incentives(get("dpop"), below) == pytest.approx([0.15 * 51, 0.15])


# ---- stop-gradients


@pytest.mark.parametrize("base", [get("dpo", beta=0.7), get("ipo", tau=0.3), get("cal_dpo", beta=0.43)], ids=repr)
def test_the_gate_scales_the_push_on_the_dispreferred_alone(base):
    loss, y = Gated(base, 3.0, 0.3), columns(POINTS)
    np.testing.assert_array_equal(loss.value(y), base.value(y))
    (d_w, d_l), (base_w, base_l) = loss.incentives(y), base.incentives(y)
    gate = 1 / (1 + np.exp(-3.0 * (np.exp(y.b) ** (1 / 5) - 0.3)))
    np.testing.assert_allclose(d_w, base_w, rtol=1e-14)
    np.testing.assert_allclose(d_l, gate * base_l, rtol=1e-14)
    assert np.ptp(gate) > 0.1


def test_gate_closes_as_the_dispreferred_becomes_improbable():
    y = Pair(-1.0, np.array([-0.1, -10.0, -60.0]), -1.0, -3.0, 3, 5)
    d_w, d_l = get("gate_dpo", alpha=20.0, tau=0.5).incentives(y)
    r = d_w / d_l
    assert 1 < r[0] < 1.01
    assert r[1] == pytest.approx(1 + math.exp(-20 * (math.exp(-2) - 0.5)), rel=1e-9)
    assert r[2] == pytest.approx(1 + math.exp(-20 * (math.exp(-12) - 0.5)), rel=1e-9)


def test_beta_dpos_beta_follows_the_batch_and_is_held_constant():
    loss = get("beta_dpo", beta=0.3, alpha=0.23, m0=0.7)
    y = columns(POINTS)
    mean = sum(p.m for p in POINTS) / len(POINTS)
    batch = 0.3 * (1 + 0.23 * (mean - 0.7))
    assert same(loss, loss)
    np.testing.assert_allclose(loss.value(y), get("dpo", beta=batch).value(y), rtol=1e-13)
    np.testing.assert_allclose(incentives(loss, y), incentives(get("dpo", beta=batch), y), rtol=1e-13)
    assert batch != pytest.approx(0.3, rel=0.01)
    # Never below 0.001, however low the margins are.
    low = y._replace(a=y.a - 50)
    np.testing.assert_allclose(loss.value(low), get("dpo", beta=1e-3).value(low), rtol=1e-13)
    # Alone, a sample is its own batch.
    alone = loss.value(y._replace(**{k: getattr(y, k)[:, None] for k in y._fields[:-1]}))[:, 0]
    with mpmath.workdps(30):
        paper = [float(retyped_papers.PAPER["beta_dpo"](loss, mp(p))) for p in POINTS]
    np.testing.assert_allclose(alone, paper, rtol=1e-13)


def test_keep_probabilities_are_normal_weights():
    margins = np.array([-1.0, 0.5, 2.0, 7.0])
    kept = keep_probabilities(margins, m0=0.5, sd=1.5)
    weights = [math.exp(-((m - 0.5) ** 2) / (2 * 1.5**2)) for m in margins]
    np.testing.assert_allclose(kept, np.array(weights) / sum(weights), rtol=1e-14)
    assert kept[0] == kept[2]
    # Far from m0 the plain weights all vanish; the nearest margin then has it all.
    assert keep_probabilities([1e4, 1e4 + 100], 0.0, 1.0).tolist() == [1.0, 0.0]
    with pytest.raises(ValueError, match=r"sd must be in \(0, inf\), got 0"):
        keep_probabilities(margins, 0.0, 0.0)
    with pytest.raises(ValueError, match="margins must be finite"):
        keep_probabilities([math.nan], 0.0, 1.0)


# ---- f-divergences of any base


@pytest.mark.parametrize("divergence", ["forward_kl", "js", "alpha"])
def test_links_are_trls(divergence):
    """Constants included: they show in a loss that divides by the lengths, or weighs the two responses apart."""
    loss = FDivergence(Weighted(get("ipo", tau=0.5), 1 / 8, 1 / 2), divergence)
    phi = {
        "forward_kl": lambda t: 1 - math.exp(-t),
        "js": lambda t: math.log(2) + math.log(1 / (1 + math.exp(-t))),
        "alpha": lambda t: (math.exp(-0.5 * t) - 1) / -0.5,
    }[divergence]
    y = Pair(0.1 - 2.1, -0.1 - 3.4, -2.1, -3.4, 8, 2)
    assert float(loss.value(y)) == pytest.approx((phi(0.1) / 8 - phi(-0.1) / 2 - 1) ** 2, rel=1e-12)
    slope, step = 2 * (phi(0.1) / 8 - phi(-0.1) / 2 - 1), 1e-6
    by_a, by_b = ((phi(t + step) - phi(t - step)) / (2 * step) for t in (0.1, -0.1))
    assert incentives(loss, y) == pytest.approx([-slope * by_a / 8, -slope * by_b / 2], rel=1e-8)


def test_a_wrong_divergence_is_refused():
    with pytest.raises(ValueError, match="unknown divergence 'jss'; did you mean 'js'"):
        FDivergence(get("dpo"), "jss")
    with pytest.raises(ValueError, match="alpha must be in"):
        FDivergence(get("dpo"), "alpha", math.nan)
    with pytest.raises(ValueError, match="base must be a loss"):
        FDivergence(0.1, "js")
    with pytest.raises(ValueError, match="tau must be in"):
        Gated(get("dpo"), 1.0, 1.5)


# ---- the far ends

EXTREME = [-1e4, -3000.0, -800.0, -30.0, -0.5, 0.0, 0.25, 30.0, 800.0, 3000.0, 1e4]


@pytest.mark.parametrize("scale", [1e-3, 0.1, 1e3])
@pytest.mark.parametrize("name", [n for n in NAMES if n != "gate_dpo"])
def test_nothing_is_nan_far_out(name, scale):
    """Log-ratios of +-1e4 in every combination, log-probabilities <= 0; equal ones among them."""
    fields = list(LOSSES[name].__dataclass_fields__)
    loss = get(name, beta=scale) if "beta" in fields else get(name)
    da, db = np.meshgrid(EXTREME, EXTREME)
    y = Pair(-1e4 + np.minimum(da, 0), -1e4 + np.minimum(db, 0), -1e4 - np.maximum(da, 0), -1e4 - np.maximum(db, 0))
    np.testing.assert_array_equal([y.da, y.db], [da, db])
    y = y._replace(n_w=np.full_like(da, 3), n_l=np.full_like(da, 5))
    seen = [loss.value(y), *loss.incentives(y)]
    assert not np.isnan(seen).any()
    assert len(np.unique(seen[0])) > 2  # something moved: a clipped loss has both ends and its start


@pytest.mark.parametrize("name", ["f_dpo_forward_kl", "f_dpo_alpha", "squared_po", "f_dpo_js", "lsif"])
def test_where_both_ratios_overflow_the_sign_is_right(name):
    """da, db below -709 (for LSIF: above): the larger of the two still decides, as in 400 digits."""
    loss = get(name)
    high = 1e4 if name == "lsif" else -1e3
    y = Pair(0.0, 0.0, 0.0, 0.0)
    for a, b in ((high, 2 * high), (2 * high, high), (high, high), (high, high * (1 + 1e-12))):
        with mpmath.workdps(400):
            exact = loss.formula(DUAL, y._replace(a=Dual(a, 1), b=Dual(b)))
            value, d_w = float(exact.x), -float(exact.dx)
        point = y._replace(a=a, b=b)
        assert float(loss.value(point)) == pytest.approx(value, rel=1e-12)
        assert float(loss.incentives(point)[0]) == pytest.approx(d_w, rel=1e-9, abs=1e-300)
