"""Conditions for displacement: each against a measurement of its own, at its edges, and on wrong objects."""

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from scipy.special import log_softmax, softmax
from strategies import EXTREMES, extreme_rates

import sims
from sims.descent import Optimizer
from sims.routes import Autodiff
from theory.conditions import (
    conditions,
    disentanglement_band,
    displacement_signs,
    divergence_resistance,
    gradient_entanglement,
    incentive_ratio,
    logit_pulls,
    sign_first_step,
    squeezing,
    suffix_condition,
    thresholds,
)
from theory.losses import LOSSES, SFT, Calibrated, Loss, Pair, PerToken, TokenLoss, Weighted, get
from theory.losses._calibrated import calibration
from theory.model import Sample, UnconstrainedFeatures
from theory.problem import Positions, Problem
from theory.theorems import SETTINGS
from theory.theorems.settings import random_pair_loss

NEAR = Pair(-1.2, -4.0, -0.7, -1.0, 3, 5)  # log-ratios -0.5 and -3
MEASURE = Autodiff()


def drawn(setting="sequences", seed=0, B=40, **changes):
    return dataclasses.replace(SETTINGS[setting](np.random.default_rng(seed), B), **changes)


@dataclass(frozen=True)
class Incentives(Loss):
    """-d_w ln pi(y+) + d_l ln pi(y-): constant incentives of any sign."""

    d_w: float = 1.0
    d_l: float = 1.0

    name = "incentives"
    reference = "this test"

    def formula(self, ops: Any, y: Pair) -> Any:
        return -self.d_w * y.a + self.d_l * y.b


# ---- the incentive ratio


@pytest.mark.parametrize(
    ("name", "r"),
    [
        ("dpo", 1.0),
        ("chi_po", 1.53),
        ("f_dpo_js", 0.65),
        ("f_dpo_alpha", 0.29),
        ("f_dpo_forward_kl", 0.082),
        ("squared_po", 0.031),
    ],
)
def test_ratios_of_links(name, r):
    assert incentive_ratio(get(name), NEAR).r == pytest.approx(r, rel=0.02)


@pytest.mark.parametrize(
    ("loss", "kind", "r"),
    [
        (get("dpo", beta=0.3), "margin", 1.0),
        (get("ipo"), "margin", 1.0),
        (get("r_dpo"), "margin", 1.0),
        (Weighted(get("ipo"), 0.6, 0.4), "constant ratio", 1.5),
        (get("dpo_shift"), "constant ratio", None),
        (PerToken(get("dpo")), "constant ratio", 5 / 3),
        (get("nll"), "constant ratio", np.inf),
        (get("simpo"), "constant ratio", 5 / 3),
        (SFT(get("dpo"), 0.2), "two-likelihood", None),
        (get("kto"), "two-likelihood", None),
        (get("dpop"), "two-likelihood", None),
        (get("gate_dpo"), "two-likelihood", None),
        (get("chi_po"), "two-likelihood", None),
        (Incentives(0.0, 0.0), "at rest", None),
        (Incentives(-3.0, 2.0), "constant ratio", -1.5),
    ],
)
def test_kinds(loss, kind, r):
    found = incentive_ratio(loss, NEAR)
    assert found.kind == kind
    assert kind in str(found)
    if r is not None:
        assert found.r == pytest.approx(r, rel=1e-12)
    assert kind != "at rest" or np.isnan(found.r)


def test_lengths_decide_the_kind():
    assert incentive_ratio(get("simpo"), NEAR._replace(n_w=4, n_l=4)).kind == "margin"


def test_ratio_of_arrays():
    found = incentive_ratio(get("bco_pair"), Pair(np.array([-1.0, -2.0]), np.array([-3.0, -1.0])))
    assert found.r.shape == found.d_w.shape == (2,)
    assert np.allclose(found.r, found.d_w / found.d_l)


# ---- entanglement and the band


def pair_of_gradients(angle, length, loss):
    """A model whose g+ has length 1 and g- `length`, at `angle`: two contexts, W alone trained, large known E."""
    e = np.array([0.5, -0.5])  # e_y - pi at logits 0
    h = np.array([[1.0, 0.0], [np.cos(angle), np.sin(angle)]]) / np.sqrt(e @ e)
    h[1] *= length
    samples = (Sample("x", ((0,), (1,)), (-0.7, -0.7)),)
    problem = Problem(
        np.zeros((1, 2, 2)), h[None], samples, (("x", ()), ("z", ())), np.full((1, 1, 2), -0.7), loss, 1.0, 0.0
    )
    # y- is read in the other context, so that its gradient is free.
    problem.__dict__["pairs"] = ((Positions((0,), (0,)), Positions((1,), (0,))),)
    return problem


@pytest.mark.parametrize(
    ("angle", "length", "loss", "case", "signs"),
    [
        (0.5, 1.0, Incentives(), "apart", (1, -1)),
        (2.5, 1.0, Incentives(), "apart", (1, -1)),
        (0.5, 3.0, Incentives(), "both fall", (-1, -1)),
        (0.5, 1 / 3, Incentives(), "both rise", (1, 1)),
        (0.5, 1.0, Incentives(-1.0, -1.0), "reversed", (-1, 1)),
        (0.5, 1.0, Incentives(0.0, 0.0), "at rest", (0, 0)),
        (0.5, 1.0, Incentives(0.0, 1.0), "both fall", (-1, -1)),
    ],
)
def test_cases(angle, length, loss, case, signs):
    p = pair_of_gradients(angle, length, loss)
    e, band = gradient_entanglement(p), disentanglement_band(p)
    assert e.case == (case,)
    assert case in str(e)
    assert e.own_w[0] == pytest.approx(1)
    assert e.rho[0] == pytest.approx(np.cos(angle))
    assert e.r_star[0] == pytest.approx(length)
    assert displacement_signs(p)[:2] == tuple((s,) for s in signs)
    assert e.rate_u == e.rate_w - e.rate_l
    assert band.winner_safe[0] == (signs[0] >= 0)
    assert band.loser_suppressed[0] == (signs[1] <= 0)


@pytest.mark.parametrize("edge", [-1, 1])
def test_the_edges_of_the_band(edge):
    """At an edge one rate vanishes; just inside both have the wanted sign, just outside one has not."""
    angle, length = 0.5, 3.0
    r = length * np.cos(angle) ** -edge
    at = pair_of_gradients(angle, length, Incentives(r, 1.0))
    band, e = disentanglement_band(at), gradient_entanglement(at)
    assert band.position[0] == pytest.approx(edge)
    assert r == pytest.approx((band.lower if edge < 0 else band.upper)[0])
    assert (e.rate_w if edge < 0 else e.rate_l)[0] == pytest.approx(0, abs=1e-12)
    assert (e.rate_l if edge < 0 else e.rate_w)[0] * edge > 1e-3
    for by, inside in ((1 - edge * 1e-6, True), (1 + edge * 1e-6, False)):
        found = disentanglement_band(pair_of_gradients(angle, length, Incentives(r * by, 1.0)))
        assert bool(found.winner_safe[0] and found.loser_suppressed[0]) == inside
        assert (abs(found.position[0]) < 1) == inside


def test_positions_at_the_extremes():
    def position(angle, loss, length=2.0):
        return disentanglement_band(pair_of_gradients(angle, length, loss)).position[0]

    assert position(0.5, Incentives(2.0, 1.0)) == pytest.approx(0, abs=1e-12)
    assert position(2.5, Incentives(7.0, 1.0)) == 0  # an obtuse angle: any ratio will do
    assert position(0.0, Incentives(3.0, 1.0)) > 1e6
    assert position(0.0, Incentives(1.0, 1.0)) < -1e6
    assert position(0.5, Incentives(-1.0, 1.0)) == -np.inf
    assert position(0.5, Incentives(1.0, -1.0)) == np.inf
    still = disentanglement_band(pair_of_gradients(0.5, 0.0, Incentives()))
    assert np.isnan(still.position[0])
    assert still.winner_safe[0]
    assert still.loser_suppressed[0]
    obtuse = disentanglement_band(pair_of_gradients(2.5, 2.0, Incentives(7.0, 1.0)))
    assert (obtuse.lower[0], obtuse.upper[0]) == (0, np.inf)


@pytest.mark.parametrize("setting", ["sequences", "shared_prefix", "one_edit", "fixed_unembeddings"])
def test_the_band_says_what_the_rates_do(setting):
    cases = set()
    for seed in range(12):
        rng = np.random.default_rng((seed, 9))
        p = drawn(setting, seed, loss=random_pair_loss(rng))
        # Not exactly at the reference: DPOP has its kink there, and rounding would choose the side.
        p = dataclasses.replace(p, references=p.references + 0.1 * rng.standard_normal(p.references.shape))
        w, l = p.pairs[0]
        up, down = MEASURE.rate(p, w), MEASURE.rate(p, l)
        band, e = disentanglement_band(p), gradient_entanglement(p)
        clear = (abs(up) > 1e-9 * p.rate_scale(w)) & (abs(down) > 1e-9 * p.rate_scale(l))
        assert (band.winner_safe == (up > 0))[clear].all()
        assert (band.loser_suppressed == (down < 0))[clear].all()
        inside = np.isfinite(band.position) & (e.d_w > 0) & (e.d_l > 0) & clear
        assert ((abs(band.position) <= 1) == (band.winner_safe & band.loser_suppressed))[inside].all()
        cases |= {e.case[i] for i in np.nonzero(clear)[0]}
    assert {"apart", "both fall", "both rise"} <= cases


# ---- calibration


def test_calibration_takes_the_ratio_to_the_centre():
    for seed in range(8):
        p = drawn("sequences", seed, loss=Weighted(get("dpo", beta=0.4), 0.3, 1.7))
        q = dataclasses.replace(p, loss=Calibrated(p.loss))
        plain, band = disentanglement_band(p), disentanglement_band(q)
        live = np.isfinite(plain.position)
        assert live.any()
        assert np.allclose(band.r[live], plain.r_star[live])
        assert np.allclose(np.where(plain.rho > 0, band.position, 0)[live & (plain.rho < 1 - 1e-9)], 0, atol=1e-6)
        assert (band.winner_safe | (plain.rho > 1 - 1e-9))[live].all()
        d, c = p.incentives, calibration(*(x[:, 0] for x in p.incentives), plain.r_star)
        assert np.allclose(q.incentives[0][:, 0], c * d[0][:, 0])
        assert np.allclose(q.incentives[1][:, 0] * c, d[1][:, 0])
        assert np.allclose(c, plain.calibration)


def test_calibration_keeps_the_value():
    for base in (get("dpo"), get("kto"), SFT(get("ipo"), 0.3)):
        loss, y = Calibrated(base), NEAR._replace(norm_ratio=3.0)
        assert loss.value(y) == base.value(y)
        assert loss.mpmath_value(y) == base.mpmath_value(y)
        assert loss.uses_norms
        assert SFT(loss, 0.2).uses_norms
        assert base.latex() in loss.latex()
        assert loss.latex() != base.latex()
        assert loss.incentives(y) != base.incentives(y)


def test_nothing_to_calibrate():
    numbers = np.array([-1.0, 0.0, np.inf, np.nan, 2.0])
    with np.errstate(all="ignore"):
        assert calibration(numbers, np.ones(5), 1.0).tolist()[:2] == [1.0, 1.0]
        assert calibration(np.ones(5), -np.ones(5), 1.0).tolist() == [1.0] * 5
        assert calibration(1.0, 1.0, numbers).tolist() == [1.0, 1.0, 1.0, 1.0, np.sqrt(2.0)]
    past = Calibrated(get("ipo", tau=0.5))  # beyond its minimiser: d_w = d_l < 0
    y = Pair(-1.0, -9.0, -3.0, -4.0, norm_ratio=5.0)
    assert past.incentives(y) == get("ipo", tau=0.5).incentives(y)
    with pytest.raises(ValueError, match="base must be a loss"):
        Calibrated(next(c for c in LOSSES.values() if issubclass(c, TokenLoss))())


# ---- thresholds


def falling(seed=0):
    """Instances in which y+ falls."""
    p = drawn("shared_prefix", seed, 200, loss=get("dpo", beta=0.5))
    return p.take(gradient_entanglement(p).rate_w < -1e-3)


def test_the_sft_weight_is_the_smallest():
    checked = 0
    for seed in range(6):
        p = falling(seed)
        t = thresholds(p)
        for i in range(min(3, len(p))):
            one, w = p.take(slice(i, i + 1)), p.pairs[0][0]
            n_w = len(w.tokens)
            for by in (0.999, 1.0, 1.001):
                for lam, per in ((t.sft[i], "sequence"), (t.sft_per_token[i], "token")):
                    regularised = dataclasses.replace(one, loss=SFT(one.loss, by * float(lam), per))
                    rate = MEASURE.rate(regularised, w)[0]
                    assert abs(rate) < 1e-9 if by == 1 else rate * (by - 1) > 0
            assert t.sft_per_token[i] == n_w * t.sft[i]
            checked += 1
    assert checked > 6


def test_the_weight_ratio_is_the_smallest():
    for seed in range(6):
        p = falling(seed)
        t, w = thresholds(p), p.pairs[0][0]
        for i in range(min(3, len(p))):
            one = p.take(slice(i, i + 1))
            assert t.weight_ratio[i] > 1
            assert t.boost[i] == pytest.approx(t.weight_ratio[i])  # a margin loss: r = 1
            for by in (0.999, 1.0, 1.001):
                loss = Weighted(get("ipo", tau=0.02), by * float(t.weight_ratio[i]), 1.0)
                rate = MEASURE.rate(dataclasses.replace(one, loss=loss), w)[0]
                assert abs(rate) < 1e-7 if by == 1 else rate * (by - 1) > 0


def test_no_remedy_is_needed_or_none_is_enough():
    fine = thresholds(pair_of_gradients(2.5, 3.0, Incentives()))
    assert (fine.sft[0], fine.weight_ratio[0], fine.boost[0]) == (0, 0, 1)
    hopeless = thresholds(pair_of_gradients(0.5, 3.0, Incentives(-1.0, 1.0)))
    assert hopeless.boost[0] == np.inf
    assert hopeless.sft[0] == pytest.approx(1 + 3 * np.cos(0.5))


# ---- squeezing


def test_squeezing_is_a_step_of_softmax_regression():
    rng = np.random.default_rng(0)
    for _ in range(50):
        V, eta = int(rng.integers(2, 9)), float(np.exp(rng.uniform(-3, 3)))
        logits, y = 2 * rng.standard_normal(V), int(rng.integers(V))
        pi = softmax(logits)
        after = logits - eta * (np.eye(V)[y] - pi)
        found = squeezing(logits, y, eta)
        change = log_softmax(after) - log_softmax(logits)
        assert np.allclose(found.change, change, atol=1e-12)
        assert set(found.gains) == set(np.nonzero(change > 1e-12)[0])
        small = squeezing(logits, y, 1e-6)
        assert np.allclose(small.change / 1e-6, small.first_order, atol=1e-4)
        others = np.arange(V) != y
        assert ((small.first_order > 0) == (pi > small.threshold))[others].all()
        assert found.change[y] < 0
        assert found.gains[0] == np.where(others, pi, -1).argmax()


def test_a_peaky_distribution_squeezes_all_but_its_top():
    found = squeezing(np.log([0.9, 0.05, 0.03, 0.02]), 3)
    assert found.gains == (0,)
    assert "gaining: 0" in str(found)
    flat = squeezing(np.zeros(4), 3)
    assert set(flat.gains) == {0, 1, 2}
    for bad in (4, -1, True, 1.0):
        with pytest.raises(ValueError, match="pushed must be a token index"):
            squeezing(np.zeros(4), bad)
    with pytest.raises(ValueError, match="step must be"):
        squeezing(np.zeros(4), 0, 0.0)


# ---- suffix


def test_the_suffix_adds_up():
    for seed in range(5):
        p = drawn("one_edit", seed)
        w, l = p.pairs[0]
        found = suffix_condition(p)
        edit = next(k for k, (v, z) in enumerate(zip(w.tokens, l.tokens, strict=True)) if v != z)
        assert found.position == tuple(range(edit + 2, len(w.tokens) + 1))
        total = np.zeros(len(p))
        for j, k in enumerate(found.position):
            here, there = (Positions(y.rows[k - 1 : k], y.tokens[k - 1 : k]) for y in (w, l))
            measured = MEASURE.inner(p, here, there)
            assert np.allclose(found.coupling[:, j], measured, rtol=1e-10, atol=1e-14)
            total += measured
            p_v, q_v = (np.exp(p.log_prob(y)) for y in (here, there))
            assert np.allclose(found.probability_w[:, j], p_v)
            assert (found.lowered[:, j] == (q_v < p_v)).all()
        assert (found.alpha >= 0).all()
        common = p.inner(w, l)
        assert np.allclose(found.share * common, total, atol=1e-12)


def test_no_suffix_is_shared():
    p = drawn("single_token")
    found = suffix_condition(p)
    assert found.position == ()
    assert found.coupling.shape == (len(p), 0)
    assert (found.share == 0).all()
    assert "no token is shared" in str(found)


# ---- sign descent


@pytest.mark.parametrize("setting", ["single_token", "sequences", "shared_prefix", "one_edit", "data_set"])
@pytest.mark.parametrize(("name", "factor"), [("sign", 1.0), ("adam", 1.0), ("rmsprop", 10.0)])
def test_first_steps_of_optimisers(setting, name, factor):
    p = drawn(setting, 3, 3, loss=get("dpo", beta=0.5), lr_unembedding=1.0, lr_hidden=1.0)
    found, lr = sign_first_step(p), 1e-6
    for i in range(3):
        run = sims.gradient_descent(p.model(i), p.loss, Optimizer(name, lr), 1)
        for y, predicted in (("preferred", found.change_w), ("dispreferred", found.change_l)):
            log_p = run.log_probs(getattr(p.samples[0], y))
            # Adam and RMSprop add 1e-8 to the size of a gradient.
            assert (log_p[1] - log_p[0]) / (factor * lr) == pytest.approx(predicted[i], rel=1e-3, abs=1e-3)
    assert abs(found.change_w).min() > 1e-2
    assert np.allclose(found.change_u, found.change_w - found.change_l)


def test_sign_step_of_a_single_token_in_closed_form():
    p = drawn("single_token", 1, 200, loss=get("dpo", beta=0.5), lr_unembedding=0.02, lr_hidden=1.0)
    plus, minus = (y.tokens[0] for y in p.pairs[0])
    pi, h, a = p.pi[:, 0], p.H[:, 0], p.W[:, plus] - p.W[:, minus]
    Wbar = np.einsum("bv,bvd->bd", pi, p.W)
    mass = 1 - pi[:, plus] + pi[:, minus]
    closed = p.lr_unembedding * mass * abs(h).sum(1) + p.lr_hidden * ((p.W[:, plus] - Wbar) * np.sign(a)).sum(1)
    found = sign_first_step(p).change_w
    assert np.allclose(found, closed)
    # It is another condition than gradient flow's: they disagree in some of these.
    assert (np.sign(found) != displacement_signs(p)[0]).any()
    # A margin loss moves the rows of y+ and y- alone, exactly.
    assert (logit_pulls(p)[:, 0, [z for z in range(p.V) if z not in (plus, minus)]] == 0).all()


def test_sign_step_of_a_token_loss():
    p = drawn("token_data_set", 0, 4)
    assert isinstance(p.loss, TokenLoss)
    found = sign_first_step(p)
    assert np.isfinite(found.change_w).all()
    assert np.allclose(logit_pulls(p), p.pulls.mean(1))


# ---- links


LINKS = {
    "kl": lambda ops, t: t,
    "kl, f = t ln t": lambda ops, t: t + 1,
    "chi": lambda ops, t: t + ops.exp(t),
    "squared": lambda ops, t: t * ops.exp(-t),
    "forward": lambda ops, t: -ops.exp(-t),
    "bounded": lambda ops, t: ops.sigmoid(t) - 0.25,
}


@pytest.mark.parametrize(
    ("name", "argmin", "meets", "inducing"),
    [
        ("kl", 1.0, True, True),
        ("kl, f = t ln t", np.exp(-1), False, True),
        ("chi", 0.5671432904, False, True),
        ("squared", 1.0, True, True),
        ("forward", np.inf, True, True),
        ("bounded", 1 / 3, False, False),
    ],
)
def test_the_argmin_criterion(name, argmin, meets, inducing):
    found = divergence_resistance(LINKS[name])
    assert found.argmin == pytest.approx(argmin, rel=1e-9)
    assert found.meets_criterion == meets
    assert found.inducing == inducing
    assert ("meets" in str(found)) == meets


def test_the_criterion_hangs_on_a_constant_and_the_ratio_does_not():
    plain, moved = (divergence_resistance(LINKS[name]) for name in ("kl", "kl, f = t ln t"))
    assert plain.meets_criterion != moved.meets_criterion
    assert (plain.ratio == moved.ratio).all()
    assert (plain.push_down == moved.push_down).all()
    assert plain.movable == moved.movable == (0, np.inf)
    assert divergence_resistance(LINKS["squared"]).movable == pytest.approx((0, np.e), rel=1e-2)


def test_squared_po_saturates():
    found = divergence_resistance(get("squared_po").link, beta=0.1)
    assert found.push_down == pytest.approx([0.235, 0.41, 0.019, 9e-9], rel=0.03)
    kl = divergence_resistance(get("f_dpo_alpha", alpha=1 - 1e-9).link, beta=0.1)
    assert kl.push_down[3] == pytest.approx(0.040, rel=0.02)
    assert divergence_resistance(get("chi_po").link, da=-0.5, db=(-3.0,)).ratio == pytest.approx([1.53], rel=0.01)
    with pytest.raises(ValueError, match="link must be phi"):
        divergence_resistance("kl")


# ---- all together


def model(seed=3):
    rng = np.random.default_rng(seed)
    sample = Sample("x", ((0, 1, 2, 2), (0, 3, 2, 2)))
    W, hidden = rng.normal(size=(6, 4)), rng.normal(size=(6, 4)) + 1.5
    return UnconstrainedFeatures.from_samples(W, hidden, (sample,), tokens=list("abcdef"))


def test_the_record_reads():
    found = conditions(model(), get("dpo"))
    text = str(found)
    assert text == repr(found)
    assert text.startswith("a b c c > a d c c, DPO(beta=0.1)\n")
    for part in ("incentives", "band for r", "shared suffix", "push on y- alone", "RMSprop", "enough for this sample"):
        assert part in text
    assert "f-divergence" not in text
    assert "f-divergence" in str(conditions(model(), get("chi_po")))
    saved = json.loads(json.dumps(found.to_dict()))
    assert saved["entanglement"]["case"] == ["apart"]
    assert saved["suffix"]["position"] == [3, 4]
    assert not found.displaced


def test_why_it_falls_and_what_is_enough():
    """A falling y+: the table says so, and each remedy it names stops it."""
    seen = 0
    for seed in range(200):
        m = model(seed)
        found = conditions(m, get("dpo"))
        if not found.displaced:
            continue
        seen += 1
        assert "below: y- drags y+ down" in str(found)
        weight, ratio = found.thresholds.sft[0], found.thresholds.weight_ratio[0]
        assert f"SFT weight {weight:.4g}" in str(found)
        for remedy in (
            SFT(get("dpo"), 1.001 * weight),
            Weighted(get("dpo"), 1.001 * ratio, 1.0),
            Calibrated(get("dpo")),
        ):
            after = conditions(m, remedy)
            assert after.rate_w > 0
            assert "nothing: it does not push its y+ down" in str(after)
    assert seen > 3


def test_a_data_set_adds_what_other_samples_do():
    p = drawn("sequence_data_set", 2, 1)
    found = conditions(p.model(0), p.loss, lr_unembedding=p.lr_unembedding, lr_hidden=p.lr_hidden)
    assert found.rate_w == pytest.approx(MEASURE.rate(p, p.pairs[0][0])[0])
    e = gradient_entanglement(p)
    assert found.own_w == pytest.approx(e.rate_w[0] / len(p.samples))
    assert "others" in str(found)
    second = conditions(p.model(0), p.loss, 1, lr_unembedding=p.lr_unembedding, lr_hidden=p.lr_hidden)
    assert second.rate_w == pytest.approx(MEASURE.rate(p, p.pairs[1][0])[0])
    assert second.own_w == pytest.approx(gradient_entanglement(p, 1).rate_w[0] / len(p.samples))
    assert second.own_w != pytest.approx(found.own_w)


@pytest.mark.parametrize("name", EXTREMES)
def test_extremes_make_no_noise(name):
    """Warnings are errors here; exact zeros, equal rows, probabilities of 1 and of e^-10000."""
    eta_W, eta_h = extreme_rates(name)
    for loss in (get("dpo"), get("ipo"), get("gpo_hinge"), get("kto"), get("squared_po"), Calibrated(get("dpo"))):
        for rates in ((eta_W, eta_h), (0.0, 1.0), (1.0, 0.0), (0.0, 0.0)):
            found = conditions(EXTREMES[name], loss, lr_unembedding=rates[0], lr_hidden=rates[1])
            assert np.isfinite([found.rate_w, found.rate_l, found.thresholds.sft[0]]).all()
            assert str(found)
    overflows = UnconstrainedFeatures.single_token(np.diag([-800.0, 0.0]), [1.0, 1.0], 0, 1)
    with pytest.raises(ValueError, match="finite incentives"):
        conditions(overflows, get("alphapo", alpha=2.0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sample": 1}, r"sample must be an index in \[0, 1\), got 1"),
        ({"sample": -1}, "sample must be an integer"),
        ({"lr_hidden": -1.0}, "lr_hidden must be"),
        ({"loss": get("tdpo1")}, "loss must be one of two log-probabilities"),
        ({"loss": "dpo"}, "loss must be a theory.losses.Loss"),
    ],
)
def test_bad_arguments(change, message):
    arguments: dict[str, Any] = {"model": model(), "loss": get("dpo")} | change
    with pytest.raises(ValueError, match=message):
        conditions(**arguments)


# ---- after review


def two_pairs(u_ref=None):
    """Two prompts, pairs of different lengths and a shared first token."""
    rng = np.random.default_rng(3)
    samples = [Sample("x", ((0, 1, 2), (0, 3)), u_ref), Sample("z", ((1,), (2, 2, 0)), u_ref)]
    contexts = [c for s in samples for c in _contexts(s)]
    hidden = {c: rng.standard_normal(4) for c in contexts}
    tokens = ("a", "b", "c", "d", "e")
    return UnconstrainedFeatures.from_samples(rng.standard_normal((5, 4)), hidden, samples, tokens)


def _contexts(sample):
    return [(sample.prompt, y[:k]) for y in sample.responses for k in range(len(y))]


@pytest.mark.parametrize(
    "loss",
    [get("beta_dpo", alpha=2.0), get("orpo_prompt", n_prompt=3.0), SFT(get("dpo"), 0.2, "batch_token")],
    ids=repr,
)
def test_the_incentives_shown_are_those_of_the_whole_batch(loss):
    model = two_pairs().with_parameters(*(x + 0.5 for x in (two_pairs().W, two_pairs().H * 1.1)))
    problem = Problem.of(model, loss)
    for i in (0, 1):
        found = conditions(model, loss, i)
        assert (float(found.ratio.d_w), float(found.ratio.d_l)) == tuple(float(d[0, i]) for d in problem.incentives)
        assert float(found.ratio.r) == pytest.approx(float(found.band.r[0]), rel=1e-12)
    alone = incentive_ratio(loss, Pair(-3.0, -2.0, -2.5, -2.5, 3, 2))
    assert float(alone.d_w) != pytest.approx(float(problem.incentives[0][0, 0]), rel=1e-3)


def test_squeezing_is_read_where_the_responses_part_and_in_names():
    model = two_pairs()
    found = conditions(model, get("dpo"))
    # y+ = a b c, y- = a d: they part after `a`.
    parting = squeezing(log_softmax(model.W @ model.H[model.context_row("x", (0,))]), 3)
    assert found.squeezing.gains == parting.gains
    np.testing.assert_allclose(found.squeezing.change, parting.change, rtol=1e-12)
    first = squeezing(log_softmax(model.W @ model.H[model.context_row("x", ())]), 0)
    assert not np.allclose(first.change, parting.change)
    assert found.gainers == tuple("abcde"[z] for z in parting.gains)
    assert f"lifts {', '.join(found.gainers)};" in str(found)


@pytest.mark.parametrize("rates", [(0.7, 1.3), (1.0, 0.2), (0.0, 1.0), (1.0, 0.0)])
def test_both_rates_count_in_a_sign_step(rates):
    """By hand, from the gradients of autodiff: every parameter moves by its own rate."""
    model = two_pairs()
    problem = Problem.of(model, get("dpo", beta=0.7), *rates)
    step = sign_first_step(problem)
    unit = Problem.of(model, get("dpo", beta=0.7), 1.0, 1.0)
    dW, dH = MEASURE.velocity(unit)
    e = 1e-7
    W, H = model.W + e * rates[0] * np.sign(dW[0]), model.H + e * rates[1] * np.sign(dH[0])
    moved = model.with_parameters(W, H)
    change = (moved.log_prob((0, 1, 2), "x") - model.log_prob((0, 1, 2), "x")) / e
    assert float(step.change_w[0]) == pytest.approx(change, rel=1e-4, abs=1e-5)


def test_a_link_that_levels_off_far_below_does_not_induce():
    """phi -> -inf as t -> -inf is asked for; a link that comes to rest at -600, or falls too little, has no such limit."""
    assert divergence_resistance(lambda ops, t: t).inducing
    assert not divergence_resistance(lambda ops, t: ops.expm1(t)).inducing
    assert not divergence_resistance(lambda ops, t: 1e-4 * t).inducing
