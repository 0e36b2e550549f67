"""CHES against truth: the study finds what the alphas imply, and would not find it with a wrong score."""

import json

import numpy as np
import pytest

from sims import gradient_flow
from sims.files import to_json
from sims.plots import plot_ches_truth
from sims.scenarios import ches_truth as study_module
from sims.scenarios.ches_truth import (
    FREQUENT,
    JOINT,
    PATTERNS,
    PERCENTILES,
    REGIMES,
    SCORES,
    T_END,
    alone,
    ches_truth,
    data_set,
    subset,
    trained_alone,
    trained_together,
)
from theory import UnconstrainedFeatures
from theory.ches import sample_terms
from theory.losses import get
from theory.model import contexts_of


@pytest.fixture(scope="module")
def study():
    return ches_truth(pairs=48, seed=1)


# ---- what it must show


def test_alphas_are_near_one_only_where_a_token_is_expected_everywhere(study):
    shares = {r.name: (r.alphas > 0).mean() for r in study.regimes}
    assert shares["shared"] == 1
    assert max(shares[name] for name in ("random", "flat", "fitted")) < 0.6
    assert study["shared"].alphas.mean() > 0.8
    assert abs(study["fitted"].alphas.mean()) < 0.1
    assert 0.3 < study["fitted"].token_probability < 0.7
    assert study["flat"].token_probability < 0.1
    assert all(np.abs(r.alphas).max() <= 2 for r in study.regimes)
    assert study["random"].positive_inner_products < 0.8
    assert all(study[name].positive_inner_products == 1 for name in ("shared", "flat", "fitted"))


def test_the_exact_term_ranks_the_changes_everywhere(study):
    for r in study.regimes:
        assert np.ptp(r.change) > 1, "something moved"
        assert r.correlation("alpha_weighted") < -0.9
        mean = r.by_percentile("alpha_weighted")
        assert mean[0] > mean[2] > mean[4]


def test_ches_is_a_good_proxy_where_alphas_are_near_one_and_poor_elsewhere(study):
    assert study["shared"].correlation("ches") < -0.9
    for name in ("random", "flat", "fitted"):
        assert study[name].correlation("ches") > study[name].correlation("alpha_weighted") + 0.15
    assert study["flat"].correlation("ches", equal_length=True) > -0.4
    assert abs(study["shared"].correlation("ln_ches")) < 0.5, "lengths carry most of what CHES says"
    assert study["flat"].correlation("edit") < study["flat"].correlation("ches"), "equal tokens are what counts there"


def test_displacement_is_met_and_training_together_deepens_it(study):
    shared = study["shared"]
    assert (shared.change < 0).mean() > 0.1
    assert shared.by_percentile("ches")[4] < 0 < shared.by_percentile("ches")[0]
    assert shared.joint[4] < shared.by_percentile("ches", JOINT)[4] - 5


# ---- that it is the truth it claims to be


@pytest.mark.parametrize("regime", ["random", "fitted"])
def test_the_exact_term_is_the_rate_with_hidden_vectors_frozen(regime):
    model, loss, t = data_set(regime, 16, 3), get("dpo", beta=0.1), 1e-5
    for i in range(4):
        one = alone(model, i)
        change = np.diff(gradient_flow(one, loss, [0.0, t], 1.0, 0.0).log_probs())[0]
        G = 0.1 / 2  # DPO at its reference
        assert change / t == pytest.approx(-G * sample_terms(model, i).alpha_weighted, rel=1e-3)


def test_renaming_tokens_changes_nothing():
    model = data_set("fitted", 16, 2)
    change = trained_alone(model)
    for i in (0, 5, 11):
        s = model.samples[i]
        rows = [model.context_row(*c) for c in contexts_of([s])]
        as_it_is = UnconstrainedFeatures.from_samples(model.W, model.H[rows], [s])
        direct = gradient_flow(as_it_is, get("dpo", beta=0.1), [0.0, T_END]).log_probs(s.preferred, s.prompt)
        assert change[i] == pytest.approx(np.diff(direct)[0], abs=1e-4)
        assert trained_together(model, [i])[0] == pytest.approx(change[i], abs=1e-4)


def test_a_wrong_score_is_seen(study):
    r = study["shared"]
    exact, other = r.scores["alpha_weighted"], r.scores["last_hidden"]
    flipped = study_module.Regime(
        **{**vars(r), "scores": {"alpha_weighted": -exact, "ches": np.roll(exact, 1), "edit": other}}
    )
    assert flipped.correlation("alpha_weighted") > 0.9
    assert abs(flipped.correlation("ches")) < 0.5
    assert flipped.by_percentile("alpha_weighted")[0] < flipped.by_percentile("alpha_weighted")[4]


@pytest.mark.parametrize("regime", REGIMES)
def test_data_sets_are_what_they_say(regime):
    model = data_set(regime, 16, 4)
    again, other = data_set(regime, 16, 4), data_set(regime, 16, 5)
    np.testing.assert_array_equal(model.H, again.H)
    assert [s.responses for s in model.samples] == [s.responses for s in again.samples]
    assert not np.array_equal(model.W, other.W)
    assert all(FREQUENT not in y for s in model.samples for y in s.responses)
    shapes = sorted((len(s.preferred), len(s.dispreferred)) for s in model.samples)
    assert shapes == sorted((n, m) for n, m, _ in PATTERNS * 2)
    np.testing.assert_allclose(np.linalg.norm(model.W, axis=1), np.linalg.norm(model.W[0]))


def test_subsets_lie_at_their_percentiles():
    values = np.array([5.0, 1, 4, 2, 3, 3])
    assert sorted(values[subset(values, 0, 2)]) == [1, 2]
    assert sorted(values[subset(values, 100, 2)]) == [4, 5]
    assert subset(values, 50, 2).tolist() == [4, 5]


def test_too_few_pairs():
    with pytest.raises(ValueError, match="pairs must be an integer >= 16, got 8"):
        ches_truth(pairs=8)


# ---- record and figure


def test_record_and_report(study):
    saved = json.loads(to_json(study.to_dict()))
    for r, back in zip(study.regimes, saved["regimes"], strict=True):
        assert back["correlation"]["ches"] == r.correlation("ches")
        assert len(back["change"]) == len(back["scores"]["edit"]) == 48
    text = study.report()
    assert all(name in text for name in REGIMES)
    assert all(label in text for label in SCORES.values())
    assert f"{study['shared'].correlation('ches'):+.2f}" in text
    assert max(map(len, text.splitlines())) <= 120
    assert str(study) == text


def test_figure_shows_the_record(study):
    axes = plot_ches_truth(study)
    assert len(axes) == len(REGIMES) + 2
    for ax, r in zip(axes, study.regimes, strict=False):
        for line, key in zip(ax.lines, SCORES, strict=False):
            np.testing.assert_array_equal(line.get_ydata(), r.by_percentile(key))
            assert line.get_label() == SCORES[key]
        assert [t.get_text() for t in ax.get_xticklabels()] == [str(p) for p in PERCENTILES]
    heights = [bar.get_height() for bar in axes[-1].patches]
    assert heights == [r.correlation(key) for key in SCORES for r in study.regimes]
    with pytest.raises(ValueError, match="ax must hold 6 axes, got 1"):
        plot_ches_truth(study, axes[:1])
