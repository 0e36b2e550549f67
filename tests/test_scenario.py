"""The No/Never/Yes study: what it must show, computed; and that it would not show it if the geometry were wrong."""

import numpy as np
import pytest

from sims.scenarios import no_never_yes as scenario
from sims.scenarios._batch import deepest
from theory import ExactFlow, UnconstrainedFeatures
from theory.losses import get
from theory.path import Path


@pytest.fixture(scope="module")
def study():
    return scenario.no_never_yes(draws=60)


def test_no_starts_high_and_falls_while_yes_rises(study):
    assert 0.65 <= study.start["No"] <= 0.85
    assert study.start["Yes"] < 0.1
    assert study.main.status == "transient"
    assert study.main.gainers_at_trough[0].name == "Yes"
    assert study.main.gainers_at_trough[0].then > 0.5
    assert study.main.kappa > study.main.kappa_star
    assert study.main.initial_rate < 0
    assert study.paper_drop > 0.6
    assert study.paper_final < -5


def test_below_the_critical_ratio_nothing_is_displaced(study):
    assert study.below.status == "none"
    assert study.below.initial_rate > 0
    assert study.kappa_below < study.kappa_any <= study.main.kappa_star
    just = [
        ExactFlow(scenario.model(), get("dpo"), 1.0, study.kappa_any * c).displacement().status for c in (0.99, 1.01)
    ]
    assert just == ["none", "transient"]
    rates = [
        ExactFlow(scenario.model(), get("dpo"), 1.0, study.main.kappa_star * c).displacement().initial_rate
        for c in (1 - 1e-9, 1 + 1e-9)
    ]
    assert rates[0] > 0 > rates[1]


def test_the_benign_pair_loses_to_its_own_spellings(study):
    assert study.benign.status == "transient"
    assert study.benign.largest_drop > 0.02
    assert {g.name for g in study.benign.gainers_at_trough[:2]} <= {" Yes", "yes"}


def test_other_losses_stop_on_the_same_path(study):
    m = scenario.model()
    flow = ExactFlow(m, get("dpo"), 1.0, scenario.KAPPA)
    for row in study.losses[1:]:
        assert row.status == "permanent"
        there = flow.log_probs_at_margin([row.stop_margin])[0, scenario.TOKENS.index("No")]
        assert row.log_prob_at_end == pytest.approx(there, abs=1e-9)
    assert len({round(r.stop_margin, 6) for r in study.losses}) == len(study.losses)


def test_transient_when_both_are_trained_and_permanent_with_w_frozen(study):
    assert study.main.last_return is not None
    assert study.main.last_return.log_time > study.main.trough.log_time
    assert study.main.end.log_prob == pytest.approx(0.0, abs=1e-12)
    assert study.frozen.status == "permanent"
    assert study.frozen.end.log_prob == -np.inf


def test_three_routes_agree(study):
    exact, integrated, descent = study.curves
    assert study.worst_flow < 1e-9
    assert study.worst_descent < 1e-10
    assert np.abs(integrated.log_probs[-1] - integrated.log_probs[0]).max() > 5
    # Gradient descent lies near the flow, but is not the flow.
    near = np.abs(descent.log_probs - exact.log_probs[:: len(exact.times) // 20]).max()
    assert 1e-6 < near < 0.5


def test_robustness_is_measured(study):
    shares = [r.falls_to_yes for r in study.robustness]
    assert shares[0] > 0.95
    assert shares[-1] < shares[0]
    assert all(r.falls_to_yes <= r.falls for r in study.robustness)


def test_the_explanation_is_the_cause(study):
    """Each direction's share of Yes's lead; and the effect goes when the directions that carry it are levelled."""
    m = scenario.model()
    a = m.W[0] - m.W[1]
    lead = float((m.W[2] - m.W[0]) @ a / (a @ a))
    assert sum(study.lead_by_direction.values()) == pytest.approx(lead, abs=1e-12)
    assert lead > 0.5
    assert max(study.lead_by_direction, key=study.lead_by_direction.__getitem__) == "negation"
    W = m.W.copy()
    direction = {name: i for i, name in enumerate(scenario.DIRECTIONS)}
    at = scenario.TOKENS.index
    W[at("Never"), direction["negation"]] = W[at("No"), direction["negation"]]  # Never denies no more than No
    W[:, direction["adverb"]] = 0.0  # and is no adverb
    for word in scenario.TOKENS:  # and nothing answers better than No
        W[at(word), direction["answer"]] = min(W[at(word), direction["answer"]], W[at("No"), direction["answer"]])
    level = ExactFlow(m.single_token(W, m.h, "No", "Never", scenario.TOKENS), get("dpo"), 1.0, scenario.KAPPA)
    assert level.displacement().largest_drop < 0.01


def test_the_batch_agrees_with_the_exact_summary():
    rng = np.random.default_rng(1)
    m = scenario.model()
    W = m.W + 0.5 * rng.standard_normal((12, *m.W.shape))
    h = m.h + 0.05 * rng.standard_normal((12, m.d))
    plus, minus = m.single_pair
    look = deepest(Path.build(W, h, np.full(12, plus), np.full(12, minus), 1.0, scenario.KAPPA))
    for i in range(12):
        one = UnconstrainedFeatures.single_token(W[i], h[i], plus, minus)
        d = ExactFlow(one, get("dpo"), 1.0, scenario.KAPPA).displacement()
        assert look.largest_drop[i] == pytest.approx(d.largest_drop, abs=2e-3)
        assert look.depth[i] == pytest.approx(d.depth, abs=0.02 * max(1, -d.depth))
