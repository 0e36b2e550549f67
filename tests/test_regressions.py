"""What reviewers broke once: each case with the model that showed it."""

import numpy as np
import pytest

from theory import ExactDescent, ExactFlow, UnconstrainedFeatures, batch_log_probs, log_prob_rate
from theory.losses import get

single = UnconstrainedFeatures.single_token
DPO = get("dpo")


@pytest.mark.parametrize("kappa", [1e2, 1e4, 1e6])
def test_a_kernel_next_to_the_identity_finds_the_same_deep_trough(kappa):
    """The search once ended where pi(y+) first became tiny, long before it turns."""
    rng = np.random.default_rng(19)
    m = single(3 * rng.normal(size=(6, 3)), rng.normal(size=3), 0, 1)
    scalar = ExactFlow(m, DPO, 1.0, kappa).displacement()
    kernel = ExactFlow(m, DPO, 1.0, kappa * np.diag([1.0, 1.0, 1 + 1e-9])).displacement()
    assert kernel.status == scalar.status == "transient"
    assert kernel.depth == pytest.approx(scalar.depth, rel=1e-6)
    assert kernel.lower_bound <= kernel.trough.log_prob <= kernel.upper_bound + 1e-9
    assert scalar.depth < -50


def test_a_confident_start_may_still_fall_with_a_kernel():
    m = single(np.array([[1.0, 1], [-1, 0], [4, 0], [0.5, -0.2]]), np.array([0.05, 40]), 0, 1)
    scalar = ExactFlow(m, DPO, 1.0, 1e5).displacement()
    kernel = ExactFlow(m, DPO, 1.0, 1e5 * np.diag([1.0, 1 + 1e-9])).displacement()
    assert scalar.depth == pytest.approx(-861.6375, abs=1e-3)
    assert kernel.depth == pytest.approx(scalar.depth, rel=1e-6)


def test_an_empty_fast_mode_does_not_end_the_flow():
    W, h = np.array([[0, 1.0], [0, -1.0], [0, 1.5], [0, 0.3]]), np.array([0, 0.2])
    kernel = ExactFlow(single(W, h, 0, 1), DPO, 1.0, np.diag([1e6, 1.0]))
    plain = ExactFlow(single(W, h, 0, 1), DPO, 1.0, 1.0)
    assert np.abs(kernel.log_probs([1.0, 10.0]) - plain.log_probs([1.0, 10.0])).max() < 1e-12
    assert kernel.displacement().depth == pytest.approx(plain.displacement().depth, abs=1e-12)


@pytest.mark.parametrize("rates", [(1.0, 1.0), (0.0, 1.0), (1.0, 0.0)])
def test_a_batch_reaches_its_limits_as_single_flows_do(rates):
    rng = np.random.default_rng(3)
    W, h = rng.normal(size=(3, 5, 3)), rng.normal(size=(3, 3))
    together = batch_log_probs(W, h, [0, 1, 2], [1, 2, 0], DPO, [0.0, 1.0, np.inf], *rates)
    assert not np.isnan(together).any()
    for i in range(3):
        alone = ExactFlow(single(W[i], h[i], i, (i + 1) % 3), DPO, *rates).log_probs([0.0, 1.0, np.inf])
        finite = np.isfinite(alone)
        assert np.array_equal(finite, np.isfinite(together[i]))
        assert np.abs(alone[finite] - together[i][finite]).max() < 1e-12


@pytest.mark.parametrize(("g", "kappa_star"), [(20.0, 959.91914), (30.0, 2091.594547), (40.0, 3702.4663)])
def test_kappa_star_keeps_its_digits_as_the_start_becomes_sure(g, kappa_star):
    """1 - pi(y+) is summed over the others; the values are from 60-digit arithmetic."""
    m = single(np.array([[1.0, 1], [-1, 0], [4, 0], [0.5, -0.2]]), np.array([0.05, g]), 0, 1)
    assert ExactFlow(m, DPO).kappa_star == pytest.approx(kappa_star, rel=1e-7)
    assert log_prob_rate(m, DPO).total == pytest.approx(ExactFlow(m, DPO).displacement().initial_rate, rel=1e-9)


def test_bounds_hold_without_slack_for_three_tokens_and_kernels():
    rng = np.random.default_rng(114)
    m = single(3 * rng.normal(size=(3, 2)), rng.normal(size=2) * 2, 0, 1)
    d = ExactFlow(m, DPO, 1.0, 100 * np.diag([1, 0.1])).displacement()
    assert d.lower_bound <= d.trough.log_prob + 1e-9
    assert d.trough.log_prob <= d.upper_bound + 1e-9
    assert d.depth < -50


def test_sign_descent_goes_on_where_the_slope_underflows():
    m = single(np.array([[1.0, 0.5], [-1.0, 0], [0.2, 0.1]]), np.array([0.3, 0.2]), 0, 1)
    steep, gentle = (ExactDescent(m, get("dpo", beta=b), 0.1, 60, "sign").margin() for b in (1e3, 1.0))
    assert np.array_equal(steep, gentle)
    assert gentle[-1] > 100


def test_a_hinge_is_reached_however_near_its_kink_the_start_lies():
    m = single(np.array([[1.0, 0], [-1, 0], [0.3, 2]]), np.array([0.5, 0.1]), 0, 1)
    for gap in (1e-3, 1e-9, 1e-12):
        end = ExactFlow(m, get("slic", delta=1 + gap)).displacement().end
        assert end.log_time == pytest.approx(np.log(gap) - np.log(4.52), abs=0.02)


def test_norms_beyond_float_range_are_refused():
    with pytest.raises(ValueError, match="in float range, got an overflow"):
        ExactFlow(single(1e160 * np.eye(3), np.ones(3), 0, 1), DPO)


def test_walking_backwards_to_the_ends_of_the_path():
    """At u = -inf all mass is on y- with both groups trained, and with W frozen on the token least aligned with a."""
    rng = np.random.default_rng(8)
    both = ExactFlow(single(rng.normal(size=(4, 2)), rng.normal(size=2), 0, 1), DPO)
    assert np.exp(both.log_probs_at_margin([-np.inf, np.inf]))[:, :2].tolist() == [[0, 1], [1, 0]]
    frozen = ExactFlow(single(np.array([[1.0], [-1.0], [3.0], [0.5]]), np.array([0.4]), 0, 1), DPO, 0.0)
    assert np.exp(frozen.log_probs_at_margin([-np.inf, np.inf])).argmax(axis=1).tolist() == [1, 2]


def test_descent_from_beyond_a_minimiser_against_a_loop():
    rng = np.random.default_rng(5)
    W, h = rng.normal(size=(4, 3)), rng.normal(size=3)
    m = single(W, h, 0, 1, reference=(-30.0, 0.0))  # u_ref = -30: IPO's minimiser lies below the start
    loss, a = get("ipo", tau=0.5), W[0] - W[1]
    for method in ("gradient", "sign"):
        run = ExactDescent(m, loss, 0.003, 40, method).margin()
        x, y, seen = h.copy(), a.copy(), []
        for _ in range(41):
            seen.append(x @ y)
            G = 2 * (-30 + 1 - x @ y)
            g_h, g_a = (G * y, G * x) if method == "gradient" else (np.sign(G * y), np.sign(G * x))
            x, y = x + 0.003 * g_h, y + 2 * 0.003 * g_a
        assert np.abs(run - np.array(seen)).max() < 1e-11
        assert run[-1] < run[0] - 0.1
