"""Validation: the runs are what they say, every score gets its due, and the command goes on where it was stopped."""

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

pytest.importorskip("transformers")

import transformers

from sims.cli import main
from sims.descent import Optimizer
from sims.language.fitting import Recipe, fit
from sims.language.model import LanguageModel, new_model, save
from sims.language.preferences import PreferencePair, train_preferences
from sims.language.studies.graded import graded_pairs, sampled_pairs
from sims.language.validation.record import (
    LENGTH,
    PERCENTILES,
    SCORES,
    Range,
    Validation,
    decide,
    ranges,
    runs_needed,
)
from sims.language.validation.runs import Kept, Restarts, log_probs, portions
from sims.language.validation.study import around_percentile, draw_pairs, oriented, validate
from sims.language.worlds.requests import RequestsWorld
from sims.plots.validation import plot_change, plot_lift, plot_validation
from theory import SolverError
from theory.losses import SFT, get

DPO = get("dpo", beta=0.1)
ADAM = Optimizer("adam", 1e-3)


@pytest.fixture(scope="module")
def model():
    torch.set_num_threads(1)
    world = RequestsWorld()
    new = new_model(world.words(), d=16, layers=1, heads=2, max_length=48)
    return fit(new, world.texts, Recipe(60, 16, 2e-2, warmup=10), progress=False)


@pytest.fixture(scope="module")
def pairs(model):
    prompts = [model.prompt(r.text) for r in RequestsWorld().requests[::9]]
    return sampled_pairs(model, prompts, 0, 24)[:16] + graded_pairs(model, prompts, 0, 24)[:16]


@pytest.fixture(scope="module")
def near(model, pairs):
    """Runs at small steps, by optimiser."""
    return {name: validate(model, pairs, DPO, name, margin_gain=0.1, steps=4) for name in ("sgd", "adamw")}


def planted(fall, **scores):
    """A record of one-pair runs of one step with this fall and these scores."""
    n = len(fall)
    zero = np.zeros(n)
    chosen = np.stack([zero, -np.asarray(fall, dtype=float)], axis=1)
    every = {name: np.random.default_rng(i).normal(size=n) for i, name in enumerate(SCORES)} | scores
    about = {"subset_size": 1, "pairs": n}
    return Validation(
        about, tuple(map(str, range(n))), every, tuple((i,) for i in range(n)), chosen, 0 * chosen, {}, {}
    )


# ---- runs


@pytest.mark.parametrize("loss", [DPO, SFT(get("simpo"), 0.1, "batch_token")], ids=["dpo", "simpo+sft"])
@pytest.mark.parametrize("optimizer", [Optimizer("sgd", 0.05), ADAM, Optimizer("rmsprop", 1e-4)], ids=lambda o: o.name)
def test_a_run_is_that_of_the_stacked_trainer(model, pairs, loss, optimizer, monkeypatch):
    own = pairs[:3] + pairs[-2:]
    seen = train_preferences(
        model, [own], loss, optimizer, 3, observe=lambda _, runs: runs.log_probs([own])[0]
    ).observed
    with Restarts(model, loss, 3, pairs[0]) as restarts:
        course = restarts.run(own, optimizer)
        wrong = restarts.run([PreferencePair(x, z, y) for x, y, z in own], optimizer)
        monkeypatch.setattr(portions, "__defaults__", (60,))
        assert len(portions(own)) > 1
        parts = restarts.run(own, optimizer)
    for name, k in (("chosen", 0), ("rejected", 1)):
        assert getattr(course, name) == pytest.approx(np.stack(seen)[..., k], abs=2e-5)
        assert getattr(parts, name) == pytest.approx(getattr(course, name), abs=2e-5)
    assert np.abs(course.chosen[-1] - course.chosen[0]).max() > 0.05
    assert np.abs(wrong.rejected - course.chosen)[-1].max() > 0.05


def small(config):
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}
    shape = sizes | {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    if config == "GPT2":
        made = transformers.GPT2Config(**sizes, n_embd=16, n_layer=2, n_head=2, n_positions=64)
    else:
        made = getattr(transformers, f"{config}Config")(
            **shape, intermediate_size=32, num_key_value_heads=1, head_dim=8
        )
    return LanguageModel(transformers.AutoModelForCausalLM.from_config(made).eval(), None)


@pytest.mark.parametrize("config", ["GPT2", "Gemma2", "Qwen3"])
def test_any_architecture_says_what_it_says_alone_and_comes_back(config):
    own = [PreferencePair((1, 2, 3), (4, 5), (6,)), PreferencePair((7,), (8, 9, 10, 11), (8, 12))]
    model = small(config)
    found = log_probs(model.network, own).detach().numpy()
    for i, pair in enumerate(own):
        for k, y in enumerate(pair[1:]):
            logits = model.network(input_ids=torch.tensor([[*pair.prompt, *y]])).logits[0].detach().double()
            rows = torch.log_softmax(logits, -1)
            at = len(pair.prompt) - 1
            value = float(sum(rows[at + t, token] for t, token in enumerate(y)))
            shifted = float(sum(rows[at + 1 + t, token] for t, token in enumerate(y)))
            assert found[i, k] == pytest.approx(value, abs=1e-5)
            assert abs(found[i, k] - shifted) > 1e-3
    before = {name: x.clone() for name, x in model.network.state_dict().items()}
    with Restarts(model, DPO, 3, own[0]) as restarts:
        one = restarts.run(own, ADAM)
        assert not all(torch.equal(x, before[name]) for name, x in model.network.state_dict().items())
        two = restarts.run(own, ADAM)
    assert np.array_equal(one.chosen, two.chosen)  # the optimiser starts anew, too
    assert all(torch.equal(x, before[name]) for name, x in model.network.state_dict().items())
    assert all(p.grad is None for p in model.network.parameters())


def test_weights_that_do_not_come_back_are_noticed(model, pairs):
    with Restarts(model, DPO, 1, pairs[0]) as restarts:
        right = {name: x.clone() for name, x in restarts.start.items()}
        name = next(n for n in right if "down_proj" in n)
        restarts.start[name] = right[name] + 1e-6
        with pytest.raises(SolverError, match="to the bit"):
            restarts.run(pairs[:1], ADAM)
        restarts.start = right


def test_losses_of_single_tokens_are_declined(model, pairs):
    with pytest.raises(ValueError, match="loss must be a function of the log-probabilities"):
        validate(model, pairs, get("tdpo1"))
    with pytest.raises(ValueError, match="loss must be a function of the log-probabilities"):
        Restarts(model, get("tdpo1"), 1, pairs[0])


def test_steps_lost_in_rounding_are_seen(pairs):
    half = new_model(RequestsWorld().words(), d=16, layers=1, heads=2, max_length=48)
    whole = half.copy()
    half.network.to(torch.bfloat16)
    courses = [Restarts(m, DPO, 1, pairs[0]).run(pairs[:1], Optimizer("adam", 1e-6)) for m in (half, whole)]
    assert courses[0].moved < 0.1
    assert courses[1].moved > 0.99


# ---- scores against what happened


def test_probes_foretell_small_steps_and_ches_does_not(near):
    for name, probe in (("sgd", "gradient_step_chosen"), ("adamw", "sign_step_chosen")):
        found = near[name]
        assert found.finding(probe).rho.value > 0.95
        assert found.finding(probe).early.value > 0.95
        assert found.finding(probe).verdict == "useful"
        assert found.findings[0].name == probe
        assert found.finding("ches").rho.value < 0.7
        assert (
            f"\n  best predictor: {SCORES[probe].label} ({probe}), rho = {found.findings[0].rho}: {'useful' if (found.fall() > 0).any() else 'ranks the rises'}\n"
            in str(found)
        )


def test_early_and_late_are_the_first_step_and_the_last(near):
    found = near["adamw"]
    for name in ("ches", "gradient_step_chosen"):
        early = spearmanr(found.scores[name], found.chosen[:, 0] - found.chosen[:, 1]).statistic
        assert found.finding(name).early.value == pytest.approx(early, abs=1e-9)
        late = spearmanr(found.scores[name], found.chosen[:, 0] - found.chosen[:, 4]).statistic
        assert found.finding(name).rho.value == pytest.approx(late, abs=1e-9)
        assert early != pytest.approx(late, abs=1e-4)


def test_all_pairs_together_are_one_training_and_what_they_do_to_each_other(model, pairs, near):
    for name, by in (("sgd", "sgd"), ("adamw", "adam")):
        found = near[name]
        rate = found.parameters["learning_rate"]
        seen = train_preferences(
            model, [pairs], DPO, Optimizer(by, rate), 4, observe=lambda _, runs: runs.log_probs([pairs])[0].mean(axis=0)
        ).observed
        assert found.whole == pytest.approx(np.stack(seen).T, abs=1e-4)
        fall, margin = found.together
        assert fall == pytest.approx(-(seen[-1][0] - seen[0][0]), abs=1e-4)
        # Small steps: what one step does per nat of margin, to first order.
        first = {"sgd": found.first.gradient, "adamw": found.first.sign}[name]
        assert -fall / margin == pytest.approx(first, abs=0.05)
    again = Validation.from_dict(json.loads(json.dumps(near["sgd"].to_dict())))
    assert again.first == near["sgd"].first
    assert "pull against each other" not in str(near["sgd"])
    apart = replace(near["sgd"], first=replace(near["sgd"].first, gradient=-0.3, own=0.2, others=-0.5))
    assert "pull against each other" in str(apart)


def test_the_probe_of_the_other_optimizer_is_worse(near):
    assert near["sgd"].finding("sign_step_chosen").rho.value < near["sgd"].findings[0].rho.value - 0.02
    assert near["adamw"].finding("gradient_step_chosen").rho.value < near["adamw"].findings[0].rho.value - 0.02


def test_scores_are_signed_so_that_larger_means_a_deeper_fall():
    raw = {name: np.array([1.0, 2.0]) for name in (*SCORES, "len_chosen")} | {"len_rejected": np.array([5.0, 1.0])}
    found = oriented(raw, np.array([3.0, 5.0]))
    for name in ("ches", "ln_ches", "last_hidden", "alpha"):
        assert found[name].tolist() == [1, 2]
    for name in ("edit_distance", "sign_step_chosen"):
        assert found[name].tolist() == [-1, -2]
    assert found["gradient_step_chosen"].tolist() == [-3, -10]
    assert found[LENGTH].tolist() == [4, -1]


def test_the_probe_knows_how_hard_the_loss_pushes_each_pair(model, pairs):
    found = validate(model, pairs, get("slic", delta=1.0), "sgd", learning_rate=1e-4, steps=1)
    still = found.fall() == 0  # pairs whose margin is large enough already
    assert 5 < still.sum() < len(pairs) - 5
    for probe in ("gradient_step_chosen", "sign_step_chosen"):
        assert (found.scores[probe][still] == 0).all()
        assert (found.scores[probe][~still] != 0).all()
    assert found.findings[0].name == "gradient_step_chosen"
    assert found.findings[0].rho.value > 0.99
    assert found.parameters["exact"]
    mixed = validate(model, pairs[:8], SFT(DPO, 0.1), "sgd", learning_rate=1e-3, steps=1)
    assert not mixed.parameters["exact"]
    assert "no function of the margin alone" in str(mixed)


def test_the_learning_rate_sought_gives_the_margin_asked_for(near):
    for found in near.values():
        assert 0.05 < np.median(found.margin()) < 0.2
        assert found.parameters["sought"] >= 1


def test_planted_scores_get_their_due():
    rng = np.random.default_rng(0)
    fall = rng.normal(size=64)
    found = planted(fall, ches=fall, ln_ches=-fall)
    assert (found.finding("ches").rho.value, found.finding("ches").verdict) == (1, "useful")
    assert (found.finding("ln_ches").rho.value, found.finding("ln_ches").verdict) == (-1, "misleading")
    assert found.findings[0].name == "ches"
    assert found.findings[-1].name == "ln_ches"
    # What foretells by its length alone is no better than the length.
    n = 250
    fall, length = rng.normal(size=(2, n))
    fall += 2 * length
    scores = {"ches": length + 0.1 * rng.normal(size=n), "alpha": fall, LENGTH: length}
    verdicts = {name: decide(*found) for name, found in ranges(scores, fall, draws=500).items()}
    assert verdicts == {"ches": "no better than length", "alpha": "useful", LENGTH: "useful"}


def test_random_scores_are_not_called_useful():
    rng = np.random.default_rng(1)
    verdicts = Counter()
    for _ in range(25):
        fall = rng.standard_t(3, size=48)
        scores = {str(i): rng.normal(size=48) for i in range(8)} | {LENGTH: fall + rng.normal(size=48)}
        found = ranges(scores, fall, draws=400)
        verdicts.update(decide(*found[name]) for name in scores if name != LENGTH)
    assert verdicts.total() == 200
    assert verdicts["useful"] + verdicts["no better than length"] <= 10
    assert set(verdicts) <= {"useful", "no better than length", "useless", "misleading", "undecided"}


def test_intervals_hold_together():
    """Of eight scores with a true correlation of .5, all intervals hold it in about 95 % of the samples."""
    rng = np.random.default_rng(2)
    normal = 2 * np.sin(np.pi * 0.5 / 6)  # the product-moment correlation whose rank correlation is .5
    held = single = 0
    for _ in range(60):
        fall = rng.normal(size=40)
        scores = {str(i): normal * fall + np.sqrt(1 - normal**2) * rng.normal(size=40) for i in range(8)}
        found = [r for r, _ in ranges(scores, fall, draws=400).values()]
        held += all(r.low < 0.5 < r.high for r in found)
        single += all(abs(np.arctanh(r.value) - np.arctanh(0.5)) < 1.96 / np.sqrt(37) for r in found)
    assert held >= 53
    assert single < 50  # what intervals of each alone would do


def test_the_rule_and_the_pairs_that_would_decide():
    def around(value, width):
        return Range(value, value - width, value + width)

    assert decide(around(0.5, 0.4), around(0.3, 0.2)) == "useful"
    assert decide(around(0.5, 0.4), around(0.0, 0.2)) == "no better than length"
    assert decide(around(0.5, 0.4), around(0.2, 0.3)) == "undecided"
    assert decide(around(0.5, 0.6), None) == "undecided"
    assert decide(around(0.1, 0.1), around(0.1, 0.1)) == "useless"
    assert decide(around(-0.5, 0.4), None) == "misleading"
    cases = [(0.5, 0.4), (0.2, 0.5), (0.35, 0.1), (0.1, 0.4)]
    for value, beyond in cases:
        wide = ranged(value, 64), ranged(beyond, 64)
        if decide(*wide) == "undecided":
            needed = runs_needed(*wide, 64)
            assert decide(ranged(value, needed + 8), ranged(beyond, needed + 8)) != "undecided"
            assert decide(ranged(value, needed - 16), ranged(beyond, needed - 16)) == "undecided"
    assert runs_needed(ranged(0.1, 64), None, 64) > 64


def ranged(value, n):
    """A correlation with the interval of n runs."""
    z = np.arctanh(value) + np.array([-3, 3]) / np.sqrt(n - 3)
    return Range(value, *np.tanh(z).tolist())


def test_what_dropping_removes():
    fall = np.array([4.0, 3, 2, 1, -5, -6, -7, -8, -9, -10])
    score = np.array([9.0, 1, 8, 2, 7, 6, 5, 4, 3, 0])
    found = planted(fall, ches=score)
    assert replace(found, scores=found.scores | {"ches": -score}).lift("ches", 0.1) == (0, 0)
    assert found.lift("ches", 0.1) == (0.4, 1)  # drops the pair that fell by 4 of 10
    assert found.lift("ches", 0.3) == (0.6, pytest.approx(2 / 3))
    assert found.lift(None, 0.2) == (0.7, 1)
    assert not found.lifts  # four falls are few
    assert found.finding("ches").removed == ()
    assert planted(np.append(fall, 1.0)).lifts


# ---- subsets


def test_subsets_share_no_pair_and_have_the_mean_score(model, pairs):
    found = validate(model, pairs, DPO, "sign", learning_rate=1e-4, steps=1, subset_size=4, percentiles=True, seed=3)
    flat = [i for rows in found.runs for i in rows]
    assert sorted(flat) == list(range(len(pairs)))
    assert found.runs != validate(model, pairs, DPO, "sign", learning_rate=1e-4, steps=1, subset_size=4).runs
    assert found.of_runs("ches")[2] == pytest.approx(found.scores["ches"][list(found.runs[2])].mean())
    assert not found.alone
    with Restarts(model, DPO, 1, pairs[0]) as restarts:
        for name, p in (("ches", 0), ("alpha", 75)):
            rows = around_percentile(found.scores[name], p, 4)
            course = restarts.run([pairs[i] for i in rows], Optimizer("sign", 1e-4))
            change = (course.chosen[-1] - course.chosen[0]).mean()
            assert found.percentiles[name][PERCENTILES.index(p)] == pytest.approx(change, abs=1e-6)
    assert "around a percentile" in str(found)


def test_percentiles_are_those_of_the_values():
    values = np.array([5.0, 1, 4, 2, 3, 9, 8, 7, 6, 0])
    assert sorted(values[around_percentile(values, 0, 3)]) == [0, 1, 2]
    assert sorted(values[around_percentile(values, 100, 3)]) == [7, 8, 9]
    assert sorted(values[around_percentile(values, 50, 2)]) == [4, 5]


# ---- resume


def same(found):
    """All but the times."""
    return json.dumps({k: v for k, v in found.to_dict().items() if k != "seconds"})


def test_interrupted_work_goes_on_to_the_same_result(model, pairs, tmp_path, monkeypatch):
    how = {"optimizer": "adamw", "steps": 2, "margin_gain": 0.1}
    whole = validate(model, pairs[:10], DPO, **how)
    run, left, before = Restarts.run, [12], {n: p.clone() for n, p in model.network.named_parameters()}

    def stopped(self, *arguments):
        course = run(self, *arguments)
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return course

    monkeypatch.setattr(Restarts, "run", stopped)
    done = 0
    while True:
        left[0] = 3
        try:
            found = validate(model, pairs[:10], DPO, **how, folder=tmp_path)
            break
        except KeyboardInterrupt:
            done += 3
            assert all(torch.equal(p, before[n]) for n, p in model.network.named_parameters())
            assert len(list(tmp_path.glob("run-*.json"))) == done
    assert done >= 9
    assert same(found) == same(whole)
    left[0] = 0  # everything is there
    assert same(validate(model, pairs[:10], DPO, **how, folder=tmp_path)) == same(whole)
    with pytest.raises(KeyboardInterrupt):  # another loss is another run
        validate(model, pairs[:10], get("ipo", tau=0.1), **how, folder=tmp_path)
    next(tmp_path.glob("run-*.json")).write_text('{"run": 1}')
    with pytest.raises(ValueError, match="damaged"):
        validate(model, pairs[:10], DPO, **how, folder=tmp_path)
    (tmp_path / "scores.json").write_text("[")
    with pytest.raises(ValueError, match="damaged"):
        validate(model, pairs[:10], DPO, **how, folder=tmp_path)


def test_stored_scores_of_other_pairs_or_another_model_are_not_taken(model, pairs, tmp_path):
    other = model.copy()
    with torch.no_grad():
        other.network.get_output_embeddings().weight.mul_(1.5)
        next(other.network.parameters()).mul_(1.5)
    found = []
    for m, own in ((model, pairs[:8]), (model, pairs[8:16]), (other, pairs[8:16])):
        found.append(validate(m, own, DPO, "sgd", learning_rate=1e-3, steps=1, folder=tmp_path))
        alone = validate(m, own, DPO, "sgd", learning_rate=1e-3, steps=1)
        assert all(np.array_equal(found[-1].scores[name], x) for name, x in alone.scores.items())
        assert found[-1].first == alone.first
    assert len({tuple(f.scores["ches"]) for f in found}) == 3


def test_half_precision_that_cannot_be_trained_is_declined(model, pairs):
    half = model.copy()
    half.network.half()
    with pytest.raises(ValueError, match=r"model must have float32.* got float16"):
        validate(half, pairs[:8], DPO)


def test_a_run_is_not_done_twice(model, pairs):
    with Restarts(model, DPO, 1, pairs[0]) as restarts:
        kept = Kept(restarts, None, model=model.fingerprint)
        assert not kept.has(pairs[:1], ADAM)
        one = kept.run(pairs[:1], ADAM)
        assert kept.has(pairs[:1], ADAM)
        assert kept.run(pairs[:1], ADAM) is one
        assert not kept.has(pairs[1:2], ADAM)
        assert not kept.has(pairs[:1], Optimizer("adam", 2e-3))


def test_no_rate_that_does_what_is_asked_is_an_error(model, pairs):
    with pytest.raises(SolverError, match="no learning rate was found"):
        validate(model, pairs[:8], DPO, "sign", margin_gain=1e30, steps=1)
    with pytest.raises(SolverError, match="left float range"):
        validate(model, pairs[:8], DPO, "sgd", learning_rate=1e30, steps=2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"optimizer": "adagrad"}, "unknown optimizer"),
        ({"steps": 0}, "steps must be"),
        ({"margin_gain": 0.0}, "margin_gain must be"),
        ({"learning_rate": -1.0}, "learning_rate must be"),
        ({"subset_size": 5}, "at least 8 subsets of 5"),
        ({"percentiles": True}, "percentiles needs subsets"),
    ],
)
def test_bad_arguments_are_named(model, pairs, arguments, message):
    with pytest.raises(ValueError, match=message):
        validate(model, pairs[:20], DPO, **arguments)


# ---- data and command


@pytest.fixture(scope="module")
def data(model, pairs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    rows = [{"prompt": model.text(x), "chosen": model.text(y), "rejected": model.text(z)} for x, y, z in pairs]
    lines = [*map(json.dumps, rows[:20]), "{bad", json.dumps({"prompt": "a", "chosen": "b", "rejected": "b"})]
    (folder / "pairs.jsonl").write_text("\n".join(lines) + "\n")
    save(model, folder / "model")
    return folder


def test_pairs_are_drawn_at_random_from_rows_that_can_be_used(model, data):
    from sims.language.data.layouts import detect_layout
    from sims.language.data.table import open_table

    table = open_table(data / "pairs.jsonl")
    layout = detect_layout(table)
    every = draw_pairs(model, table, layout, 50)
    assert (len(every.pairs), every.rows) == (20, 22)
    assert sorted(where for where, _ in every.unusable) == ["line 21", "line 22"]
    assert any("same" in reason for _, reason in every.unusable)
    counts = Counter(where for seed in range(150) for where in draw_pairs(model, table, layout, 4, seed=seed).where)
    assert len(counts) == 20
    assert max(counts.values()) < 60  # of 150 draws of 4 in 20, 30 each
    assert draw_pairs(model, table, layout, 4, seed=1) == draw_pairs(model, table, layout, 4, seed=1)


def test_the_command(data, capsys, tmp_path):
    words = ["validate", "--model_name_or_path", str(data / "model"), "--dataset", str(data / "pairs.jsonl")]
    words += ["--pairs", "30", "--steps", "2", "--out", str(tmp_path / "out"), "--device", "cpu"]
    assert main(words) == 3  # two rows cannot be used
    printed, progress = capsys.readouterr()
    saved = json.loads((tmp_path / "out" / "validate.json").read_text())
    found = Validation.from_dict(saved)
    assert str(found) == printed.rstrip("\n")
    assert json.dumps(found.to_dict()) == json.dumps(saved)
    assert len(saved["where"]) == 20
    assert "of 20 pairs, each trained on alone" in printed.splitlines()[0]
    assert "30 pairs were asked for, 20 could be used" in printed
    assert "2 rows that were drawn cannot be used: line 2" in printed
    assert "runs of 2 steps, about" in progress
    assert (tmp_path / "out" / "validate.png").stat().st_size > 10_000
    assert main([*words, "--json"]) == 3
    assert json.loads(capsys.readouterr().out) == saved  # nothing was trained anew: the times are the same


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--pairs", "7"], "--pairs must be at least 8"),
        (["--subset_size", "0"], "--subset_size must be at least 1"),
        (["--percentiles"], "--percentiles needs"),
        (["--seed", "-1"], "--seed must be"),
        (["--loss", "nothing"], "unknown loss"),
    ],
)
def test_wrong_input_of_the_command(data, capsys, more, message, tmp_path):
    words = ["validate", "--model_name_or_path", str(data / "model"), "--dataset", str(data / "pairs.jsonl")]
    assert main([*words, "--out", str(tmp_path), *more]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


# ---- figure


def test_the_figure_shows_the_data(near):
    found = near["sgd"]
    axes = plot_validation(found)
    assert len(axes) == 4
    assert [t.get_text() for t in axes[0].get_yticklabels()] == [f.label for f in found.findings]
    ax = plot_change(found, "ches")
    points = np.concatenate([line.get_xydata() for line in ax.get_lines()[:2]])
    order = np.argsort(found.of_runs("ches"), kind="stable")
    assert sorted(points.tolist()) == [[i + 1, -found.fall()[j]] for i, j in enumerate(order)]
    with pytest.raises(ValueError, match="axes must hold 4"):
        plot_validation(found, axes[:2])


def test_lifts_are_drawn_where_enough_fell():
    found = planted(np.random.default_rng(0).normal(size=30))
    ax = plot_lift(found)
    best = next(line for line in ax.get_lines() if line.get_label() == "best possible")
    assert best.get_ydata()[3] == pytest.approx(found.lift(None, 0.1)[0])
    assert plot_validation(found)[3].get_title("left") == "(d) what dropping pairs would have removed"
    assert plot_validation(planted(-np.ones(12)))[3].get_title("left") == "(d) from the first step to the last"
