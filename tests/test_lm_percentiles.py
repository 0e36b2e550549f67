"""Scores of preference pairs of a language model: they are the derivatives they claim to be, and the study finds them."""

import json

import numpy as np
import pytest
import torch
from scipy.stats import rankdata, spearmanr

pytest.importorskip("transformers")

from sims.cli import main
from sims.descent import Optimizer
from sims.files import to_json
from sims.language.fitting import Recipe, fit
from sims.language.loss_json import loss_of, plain_loss
from sims.language.model import load, new_model, save
from sims.language.ranks import correlations, spearman
from sims.language.responses import log_probs
from sims.language.scores import SCORES, PairGradients, score_pairs
from sims.language.studies import percentiles as study_module
from sims.language.studies.graded import graded_pairs, reversed_pairs, sampled_pairs
from sims.language.studies.percentile_record import PERCENTILES, Alone, Group, Percentiles, Setting
from sims.language.studies.percentiles import FAST, RESULT, halved, percentiles, trained_alone
from sims.language.studies.percentiles import trained_together as together
from sims.language.worlds.requests import RequestsWorld
from sims.plots.percentiles import plot_percentiles
from theory.ches import edit_similarity
from theory.losses import SFT, get

DPO = get("dpo", beta=0.1)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    world = RequestsWorld()
    model = new_model(world.words(), d=16, layers=1, heads=2, max_length=48)
    torch.set_num_threads(1)
    trained = fit(model, world.texts, Recipe(120, 16, 2e-2, warmup=10), progress=False)
    return str(save(trained, tmp_path_factory.mktemp("requests") / "model"))


@pytest.fixture(scope="module")
def model(path):
    return load(path)


@pytest.fixture(scope="module")
def prompts(model):
    return [model.prompt(r.text) for r in RequestsWorld().requests[::7]]


@pytest.fixture(scope="module")
def pairs(model, prompts):
    return sampled_pairs(model, prompts, 0, 24)[:6] + graded_pairs(model, prompts, 0, 24)[:6]


@pytest.fixture(scope="module")
def study(path, tmp_path_factory):
    return percentiles(path, **FAST, folder=tmp_path_factory.mktemp("jobs"), workers=1)


# ---- rank statistics


def test_correlations_are_scipys_in_every_resample():
    rng = np.random.default_rng(0)
    x = rng.integers(0, 9, 40).astype(float)  # ties
    y, z = x + 3 * rng.normal(size=40), x + rng.normal(size=40)
    counts = rng.multinomial(40, np.full(40, 1 / 40), size=7)
    found = correlations(x, y, counts=counts)
    for row, value in zip(counts, found, strict=True):
        assert value == pytest.approx(spearmanr(np.repeat(x, row), np.repeat(y, row)).statistic, abs=1e-12)
    r = np.corrcoef([rankdata(a) for a in (x, y, z)])
    partial = (r[0, 1] - r[0, 2] * r[1, 2]) / np.sqrt((1 - r[0, 2] ** 2) * (1 - r[1, 2] ** 2))
    assert correlations(x, y, [z])[0] == pytest.approx(partial, abs=1e-12)
    assert correlations(x, y, [z, z, np.ones(40)])[0] == pytest.approx(partial, abs=1e-9)
    assert correlations(x, y, [x])[0] == 0
    assert correlations(np.ones(40), y)[0] == 0


def test_a_partial_correlation_sees_through_a_common_cause():
    rng = np.random.default_rng(1)
    cause = rng.normal(size=400)
    x, y = cause + 0.5 * rng.normal(size=400), cause + 0.5 * rng.normal(size=400)
    plain, fixed = spearman([x], [y]), spearman([x], [y], [[cause]])
    assert plain.low > 0.6
    assert fixed.low < 0 < fixed.high


def test_intervals_hold_the_value_and_narrow():
    rng = np.random.default_rng(2)
    x = [rng.normal(size=400) for _ in range(3)]
    y = [v + rng.normal(size=400) for v in x]
    few, many = spearman([v[:40] for v in x], [v[:40] for v in y]), spearman(x, y)
    for e in (few, many):
        assert e.low < e.value < e.high
        assert e.least <= e.value <= e.most
    assert many.high - many.low < 0.6 * (few.high - few.low)


# ---- scores are what they claim


def stepped(model, pair, optimizer, loss=DPO):
    """Change of ln pi(y+) by one step of a torch optimiser on a plain network, per unit of rate."""
    network = model.copy().network.double()
    theta = list(network.parameters())
    opt, rate = optimizer(theta)

    def values():
        out = []
        for y in (pair.preferred, pair.dispreferred):
            ids = torch.tensor([[*pair.prompt, *y]])
            rows = torch.log_softmax(network(input_ids=ids).logits[0], -1)[len(pair.prompt) - 1 : -1]
            out.append(rows[torch.arange(len(y)), list(y)].sum())
        return out

    a, b = values()
    u = a - b
    (-torch.nn.functional.logsigmoid(0.1 * (u - u.detach()))).backward()
    opt.step()
    return float((values()[0] - a).detach()) / rate


def sign_step(theta):
    class Sign(torch.optim.SGD):
        @torch.no_grad()
        def step(self):
            for p in theta:
                p -= 1e-6 * p.grad.sign()

    return Sign(theta, lr=1.0), 1e-6


ROUTES = {
    "gradient": lambda theta: (torch.optim.SGD(theta, lr=1e-5), 1e-5),
    "sign": sign_step,
    "rmsprop": lambda theta: (torch.optim.RMSprop(theta, lr=1e-7), 1e-7),
}


@pytest.mark.parametrize("name", ROUTES)
def test_gradient_scores_are_the_first_step(model, pairs, name):
    scored = score_pairs(model, pairs, DPO)
    actual = np.array([-stepped(model, p, ROUTES[name]) for p in pairs])
    scale = np.abs(actual).max()
    assert scale > 0.1
    np.testing.assert_allclose(scored.scores[name], actual, rtol=2e-3, atol=2e-3 * scale)
    other = {"gradient": "sign", "sign": "gradient", "rmsprop": "gradient"}[name]
    assert not np.allclose(scored.scores[other], actual, rtol=0.1)


def test_the_alpha_term_is_the_heads_part_of_the_gradient(model, pairs):
    scored = score_pairs(model, pairs, DPO)
    assert scored.slope == pytest.approx(0.05, rel=1e-4)
    np.testing.assert_allclose(scored.facts["gradient_head"], 0.05 * scored.scores["alpha"], rtol=1e-3)
    body = scored.scores["gradient"] - scored.facts["gradient_head"]
    assert np.abs(body).max() > 0.1, "the body's part is not nothing"
    assert not np.allclose(scored.facts["gradient_head"], 0.05 * scored.scores["ches"], rtol=0.5)


def test_loss_gradient_by_the_engine_is_the_chain_rule(model, pairs):
    """Of a loss whose two incentives differ, and with an SFT term."""
    p = pairs[0]
    for loss in (get("dpop"), SFT(DPO, 0.5)):
        gradients = PairGradients(model, loss)
        a, b = (gradients.of_log_prob(p.prompt, y) for y in (p.preferred, p.dispreferred))
        g = gradients.of_loss(p)
        basis = torch.stack([a, b], dim=1).double()
        weights = torch.linalg.lstsq(basis, g.double()).solution
        torch.testing.assert_close((basis @ weights).float(), g, rtol=1e-3, atol=1e-5 * float(g.abs().max()))
        assert weights[0] < 0
    assert weights.tolist() == pytest.approx([-0.55, 0.05], rel=1e-3)


@pytest.mark.parametrize("name", ["tdpo2", "simpo", "orpo"])
def test_every_kind_of_loss_has_scores(model, pairs, name):
    scored = score_pairs(model, pairs[:2], get(name))
    assert scored.slope > 0
    assert all(np.isfinite(v).all() for v in (*scored.scores.values(), *scored.facts.values()))


def test_centring_takes_the_mean_state_out(model, pairs):
    """Twice the same pairs: the mean stays. With all pairs of equal lengths it still moves CHES, through S- - S+."""
    scored = score_pairs(model, pairs, DPO)
    twice = score_pairs(model, pairs * 2, DPO)
    np.testing.assert_allclose(twice.scores["ches_centred"][: len(pairs)], scored.scores["ches_centred"], rtol=1e-6)
    one = score_pairs(model, pairs[:1], DPO)
    assert one.scores["ches"][0] == pytest.approx(scored.scores["ches"][0])
    assert one.scores["ches_centred"][0] != pytest.approx(scored.scores["ches_centred"][0], rel=0.01)
    states = states_of(model, pairs)
    mean = np.concatenate([h for both in states for h in both]).mean(0)
    for (plus, minus), value in zip(states, scored.scores["ches_centred"], strict=True):
        S_plus, S_minus = ((h - mean).sum(0) for h in (plus, minus))
        assert value == pytest.approx(S_plus @ (S_minus - S_plus), rel=1e-4, abs=1e-3)


def states_of(model, pairs):
    """(n, d) states of y+ and y- of every pair, from the network's own output_hidden_states."""
    found = []
    for p in pairs:
        both = []
        for y in (p.preferred, p.dispreferred):
            out = model.network(input_ids=torch.tensor([[*p.prompt, *y]]), output_hidden_states=True)
            both.append(out.hidden_states[-1][0, len(p.prompt) - 1 : -1].detach().double().numpy())
        found.append(both)
    return found


# ---- pairs


def test_pairs_are_what_they_say(model, prompts):
    sampled, graded = sampled_pairs(model, prompts, 3, 24), graded_pairs(model, prompts, 3, 24)
    for p in (*sampled, *graded):
        assert p.preferred != p.dispreferred
        assert p.preferred[-1] == p.dispreferred[-1] == model.end
        assert max(len(p.preferred), len(p.dispreferred)) <= 24
        assert model.end not in p.dispreferred[:-1]
    assert sampled == sampled_pairs(model, prompts, 3, 24) != sampled_pairs(model, prompts, 4, 24)
    alike = np.array([edit_similarity(p.preferred, p.dispreferred) for p in graded])
    assert alike.max() > -0.2 > -0.7 > alike.min(), "from light edits to other responses"
    lengths = {len(p.dispreferred) - len(p.preferred) for p in graded}
    assert min(lengths) < 0 < max(lengths)
    assert 0 in lengths
    ours, theirs = (
        log_probs(model, [p.prompt for p in graded], y) for y in zip(*((p[1], p[2]) for p in graded), strict=True)
    )
    assert np.median(ours - theirs) > 1, "edits are less likely than samples"
    assert [(p.prompt, p.dispreferred, p.preferred) for p in reversed_pairs(model, prompts, 3, 24)] == graded


def test_subsets_lie_at_their_percentiles_and_do_not_overlap():
    values = np.random.default_rng(0).permutation(100).astype(float)
    for p, window in ((0, range(20)), (50, range(40, 60)), (100, range(80, 100))):
        ours, others = halved(values, p, 10, seed=1)
        assert sorted(values[np.concatenate([ours, others])]) == list(window)
        assert len(ours) == len(others) == 10
        assert abs(values[ours].mean() - values[others].mean()) < 8, "the halves are mixed"
    assert set(halved(values, 0, 10, 1)[0]) != set(halved(values, 0, 10, 2)[0])


# ---- training


def test_a_pair_alone_is_a_plain_loop(model, pairs):
    found = trained_alone(model, pairs, DPO, Optimizer("sgd", 0.3), 3)
    for i in (0, 7, 11):
        network, p = model.copy().network, pairs[i]
        opt = torch.optim.SGD(network.parameters(), lr=0.3)
        seen = []
        for _ in range(4):
            rows = []
            for y in (p.preferred, p.dispreferred):
                ids = torch.tensor([[*p.prompt, *y]])
                log_pi = torch.log_softmax(network(input_ids=ids).logits[0], -1)[len(p.prompt) - 1 : -1]
                rows.append(log_pi[torch.arange(len(y)), list(y)].sum())
            seen.append([float(x.detach()) for x in rows])
            u0 = seen[0][0] - seen[0][1]
            opt.zero_grad()
            (-torch.nn.functional.logsigmoid(0.1 * (rows[0] - rows[1] - u0))).backward()
            opt.step()
        seen = np.array(seen)
        assert found["change"][i] == pytest.approx(seen[3, 0] - seen[0, 0], rel=1e-3, abs=1e-4)
        assert found["first"][i] == pytest.approx(seen[1, 0] - seen[0, 0], rel=1e-3, abs=1e-4)
        assert found["margin"][i] == pytest.approx(np.diff(seen[3] - seen[0])[0] * -1, rel=1e-3, abs=1e-4)
        assert abs(found["change"][i]) > 0.01
        assert found["change"][i] != pytest.approx(found["first"][i], rel=0.1)


def test_held_out_pairs_are_not_trained_on(model, pairs):
    """In a subset of one pair, the pair moves as it does alone; a copy of it held out does too, another one otherwise."""
    alone = trained_alone(model, pairs, DPO, Optimizer("sgd", 1e-2), 2)["change"]
    for i, j in ((0, 7), (7, 0)):
        found = together(model, [[pairs[i]]] * 2, [[pairs[i]], [pairs[j]]], DPO, Optimizer("sgd", 1e-2), 2, seed=0)
        assert found["trained"] == pytest.approx([alone[i]] * 2, rel=1e-3, abs=1e-5)
        assert found["held"][0] == pytest.approx(alone[i], rel=1e-3, abs=1e-5)
        assert found["held"][1] != pytest.approx(alone[i], rel=0.1)
        assert found["held"][1] != pytest.approx(alone[j], rel=0.1)


# ---- the study


@pytest.mark.parametrize(("optimizer", "own"), [("sgd", "gradient"), ("rmsprop", "rmsprop")])
def test_falls_count_positive_scores_and_negative_changes(optimizer, own):
    """5 pairs of two seeds: 4 have a positive score, ln pi(y+) falls for 2."""
    setting = Setting("dpo", optimizer, 1e-3, 1)
    groups, alone = [], []
    for seed, (score, change) in enumerate((([1.0, 2.0, -0.5], [-1.0, 0.5, 2.0]), ([0.1, 3.0], [-0.1, 1.0]))):
        scores = {name: np.array(score) * (1 if name == own else -1) for name in SCORES}
        groups.append(Group("sampled", seed, "dpo", scores, {}, 0.05, 0.0))
        alone.append(Alone("sampled", seed, setting, *[np.array(change) * k for k in (1, -1, -1)]))
    assert Percentiles({}, tuple(groups), tuple(alone), (), ()).falls("sampled", setting) == (0.8, 0.4)


def test_rates_of_sgd_are_per_unit_of_slope(study):
    """First order: ln pi(y+) falls by rate times score in the first step. DPO of beta 0.1 has slope 0.05."""
    s = next(s for s in study.settings if (s.optimizer, s.lr) == ("sgd", 1e-6))
    for kind in study.kinds:
        (group,), (alone,) = study.runs(kind, s)
        score = group.scores["gradient"]
        assert -(alone.first @ score) / (score @ score) == pytest.approx(1e-6 / 0.05, rel=0.1)
    s = next(s for s in study.settings if (s.optimizer, s.lr) == ("rmsprop", 1e-7))
    (group,), (alone,) = study.runs("sampled", s)
    score = group.scores["rmsprop"]
    assert -(alone.first @ score) / (score @ score) == pytest.approx(1e-7, rel=0.1)


def test_gradient_predictors_rank_the_falls_of_small_steps(study):
    own = {"sgd": "gradient", "rmsprop": "sign"}
    for kind in study.kinds:
        for s in study.settings:
            best = study.correlation(kind, s, own[s.optimizer])
            _, (alone,) = study.runs(kind, s)
            assert np.ptp(alone.change) > 1e-5, "something moved"
            if s.lr <= 1e-6:
                assert best.value >= 0.9
                assert best.value >= study.correlation(kind, s, "ches").value
        assert study.ranking(kind, study.settings[-2])[0][0] == "gradient"


def test_a_wrong_score_is_seen(study):
    s = next(s for s in study.settings if s.optimizer == "sgd")
    groups, alone = study.runs("graded", s)
    score, fall = groups[0].scores["gradient"], -alone[0].change
    assert correlations(-score, fall)[0] < -0.9
    assert abs(correlations(np.roll(score, 1), fall)[0]) < 0.7


def test_first_order_fails_at_large_steps(study):
    for kind in study.kinds:
        small, large = (s for s in study.settings if s.optimizer == "rmsprop")
        assert study.correlation(kind, large, "sign").value < study.correlation(kind, small, "sign").value
        margins = [np.median(study.runs(kind, s)[1][0].margin) for s in (small, large)]
        assert margins[1] > 10 * margins[0] > 0


def test_record_round_trip_and_report(study):
    saved = json.loads(to_json(study.to_dict()))
    again = RESULT.from_dict(saved)
    assert json.loads(to_json(again.to_dict())) == saved
    text = str(study)
    for label in SCORES.values():
        assert label in text
    assert max(map(len, text.splitlines())) <= 125
    s = study.settings[0]
    assert str(study.correlation("sampled", s, "ches")) in text
    assert again.correlation("graded", s, "gradient").value == pytest.approx(
        study.correlation("graded", s, "gradient").value, abs=0.02
    )
    trained, held = study.by_percentile("graded", study.subset_settings[0], "ches")
    assert trained.shape == held.shape == (1, len(PERCENTILES))
    assert np.abs(trained - held).max() > 0
    with pytest.raises(ValueError, match="setting must be one of those run"):
        study.runs("reversed", s)


def test_the_anatomy_is_of_the_pairs(study):
    for kind in study.kinds:
        a = study.anatomy(kind)
        (g,) = (g for g in study.groups if g.kind == kind)
        assert a["positive alphas, mean share"] == pytest.approx(g.facts["positive"].mean())
        assert a["CHES ~ n- - n+"].value == pytest.approx(
            spearmanr(g.scores["ches"], g.facts["n_dispreferred"] - g.facts["n_preferred"]).statistic
        )
        assert 0 < a["body's share of the gradient score"] < 1


def test_a_study_resumes_from_its_folder(path, tmp_path, monkeypatch):
    small = FAST | {"rates": {"sgd": (1e-6,)}, "finer": 0, "kinds": ("sampled",), "scores": ("ches",)}
    small |= {"pairs": 8, "alone": 6, "size": 2}
    first = percentiles(path, **small, folder=tmp_path, workers=1)
    files = {f: f.stat().st_mtime_ns for f in tmp_path.iterdir()}
    assert len(files) == 3
    monkeypatch.setattr(study_module, "train_preferences", None)  # nothing may be trained again
    again = percentiles(path, **small, folder=tmp_path, workers=1)
    assert to_json(again.to_dict()) == to_json(first.to_dict())
    assert {f: f.stat().st_mtime_ns for f in tmp_path.iterdir()} == files


def test_losses_survive_as_plain_values():
    for loss in (DPO, SFT(get("ipo", tau=0.01), 0.5), get("simpo")):
        assert loss_of(json.loads(json.dumps(plain_loss(loss)))) == loss


def test_errors(path, tmp_path):
    with pytest.raises(ValueError, match="pairs must be at least 2 size = 80 and alone = 6, got 20"):
        percentiles(path, pairs=20, alone=6, size=40)
    with pytest.raises(ValueError, match="'nonsense'"):
        percentiles(path, kinds=("nonsense",))
    with pytest.raises(ValueError, match="pairs must not be empty"):
        score_pairs(load(path), [], DPO)
    few = tmp_path / "prompts.txt"
    few.write_text("How do I make a cake ?\n\n")
    with pytest.raises(ValueError, match="pairs must be at most what the model gives"):
        percentiles(path, **FAST, prompts=few, workers=1)


def test_figure_shows_the_record(study):
    axes = plot_percentiles(study, "graded")
    assert len(axes) == 4
    s = study.settings
    widths = [bar.get_width() for bar in axes[0].patches[: len(SCORES)]]
    assert widths == [study.correlation("graded", s[0], name).value for name in SCORES]
    assert list(axes[1].lines[0].get_ydata()) == [study.correlation("graded", x, "rmsprop").value for x in s[:2]]
    trained, _ = study.by_percentile("graded", study.subset_settings[0], "gradient")
    np.testing.assert_array_equal(axes[3].lines[0].get_ydata(), trained.mean(0))
    with pytest.raises(ValueError, match="axes must hold 4 axes, got 1"):
        plot_percentiles(study, axes=axes[:1])


def test_command(path, tmp_path, capsys):
    arguments = ["lm", "percentiles", "--model", path, "--fast", "--pairs", "12", "--alone", "8", "--size", "4"]
    assert main([*arguments, "--kinds", "sampled", "--workers", "1", "--out", str(tmp_path / "out")]) == 0
    written = json.loads((tmp_path / "out" / "percentiles.json").read_text())
    assert written["model"]["fingerprint"] == load(path).fingerprint
    assert str(RESULT.from_dict(written["result"]))[:60] in capsys.readouterr().out
    assert (tmp_path / "out" / "percentiles-sampled.png").stat().st_size > 10_000
    assert main([*arguments, "--kinds", "both", "--out", str(tmp_path / "other")]) == 2
