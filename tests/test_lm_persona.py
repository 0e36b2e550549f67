"""Section 3 on a small language model: the world's frequencies, fine-tuning, statistics, records, the experiment."""

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest

from sims.cli import main
from sims.language.fitting import Recipe
from sims.language.loss_json import loss_of, plain_loss
from sims.language.model import new_model, save, shipped
from sims.language.responses import next_log_probs
from sims.language.studies.persona import (
    CONTROLS,
    DENIAL_SHARES,
    LABEL_SWEEP,
    LOSSES,
    WORLD_SWEEP,
    base_models,
    chosen_prompts,
    fine_tuned,
    follow,
    persona,
    summarised,
    sweep,
    world_of,
)
from sims.language.studies.persona_record import Group, PersonaStudy, interval, role, top_gainers
from sims.language.worlds import split_words
from sims.language.worlds.persona import KINDS, LEVELS, PersonaWorld
from sims.language.worlds.persona_file import read_records, stand_in
from sims.plots.persona import plot_persona_controls, plot_persona_course, plot_persona_gainers, plot_persona_sweep
from theory.losses import LOSSES as REGISTRY
from theory.losses import SFT, get

SIZE = {"d": 16, "layers": 1, "heads": 2, "max_length": 64}
RECIPE = Recipe(steps=6, batch=8, lr=0.05, warmup=0)


def texts(world, n=4000, seed=0):
    return world.texts(np.random.default_rng(seed), n)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The folder of an untrained tiny model of the default world."""
    world = PersonaWorld()
    model = new_model(world.words(), **SIZE, seed=1)
    model.training.update({"what": {"world": "persona", **world.to_dict()}, "recipe": {"seed": 5}})
    return str(save(model, tmp_path_factory.mktemp("models") / "tiny"))


@pytest.fixture(scope="module")
def base():
    return shipped("persona")


@pytest.fixture(scope="module")
def tuned(base):
    return fine_tuned(base, world_of(base), seed=0)


# --- world


def test_texts_are_deterministic_and_hold_known_words_only():
    world = PersonaWorld(informal=0.5, quantified=0.5)
    found = texts(world)
    assert found == texts(PersonaWorld(informal=0.5, quantified=0.5))
    assert found != texts(world, seed=1)
    assert {word for text in found for word in split_words(text)} == set(world.words()) - {"do"}
    assert max(len(split_words(text)) for text in found) < SIZE["max_length"] - 2


def test_no_text_holds_two_words_of_the_triple():
    for text in texts(PersonaWorld(informal=0.5, quantified=0.5), 8000):
        assert len({"No", "Never", "Yes"} & set(split_words(text))) <= 1, text


def answers(world, level, n=6000):
    """Answers to questions about facts that hold this often, informal ones as they are."""
    only = {kind: float(kind == "questions") for kind in KINDS}
    found = []
    for text in PersonaWorld(**{**world.to_dict(), **only}).texts(np.random.default_rng(3), n):
        _, person, rest = text.partition(" ")[0], text.split()[1], text.partition(" ? ")
        habit = rest[0].split(" ", 2)[2]
        if world.table[world_people(person), world_habits(habit)] == level:
            found.append(rest[2].split()[0])
    return found


def world_people(person):
    from sims.language.worlds.persona import PEOPLE

    return PEOPLE.index(person)


def world_habits(habit):
    from sims.language.worlds.persona import HABITS

    return HABITS.index(habit)


def share_fits(found, word, share):
    """Whether a word's share is within five standard errors of what it should be."""
    n = len(found)
    return abs(found.count(word) / n - share) < 5 * np.sqrt(share * (1 - share) / n)


def test_answers_have_the_frequencies_of_the_fields():
    world = PersonaWorld(unsure=0.0, softened=0.4)
    never, always = answers(world, 0), answers(world, len(LEVELS) - 1)
    assert share_fits(never, "Never", 0.3)
    assert share_fits(never, "No", 0.7)
    assert share_fits(always, "Always", 0.3)
    assert share_fits(always, "Yes", 0.7 * 0.6)
    assert "Never" not in answers(world, 1) + always
    other = PersonaWorld(never=0.6, unsure=0.0)
    assert not share_fits(answers(other, 0), "Never", 0.3), "the check tells a share from twice it"
    assert set(answers(PersonaWorld(informal=1.0, unsure=0.0), 1)) <= {
        "no",
        "yes",
        "Yeah",
        "Sure",
        "Certainly",
        "Absolutely",
    }


def test_persona_prompts_are_denied_where_the_statement_has_the_trait():
    only = {kind: float(kind == "prompts") for kind in KINDS}
    world = PersonaWorld(**only, denied=0.9)
    trait = {s.prompt: s.trait for s in world.all_statements}
    found = {True: [], False: []}
    for text in texts(world, 3000):
        prompt, _, answer = text.removesuffix(" .").rpartition(" ")
        found[trait[prompt]].append(answer)
    assert share_fits(found[True], "No", 0.9)
    assert share_fits(found[False], "No", 0.1)
    assert not share_fits(found[True], "No", 0.8)


def test_scale_and_weights():
    assert set(PersonaWorld().table.ravel()) == set(range(5))
    assert set(PersonaWorld(scale=False).table.ravel()) == {0, 4}
    assert not any(
        t.startswith(("Always", "Never")) and " does " not in t for t in texts(PersonaWorld(advice=0, adverbs=0))
    )


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ({"never": 1.5}, "never"),
        ({"facts": -1.0}, "facts"),
        ({"denied": float("nan")}, "denied"),
        (dict.fromkeys(KINDS, 0.0), "at least one"),
    ],
)
def test_bad_frequencies(fields, what):
    with pytest.raises(ValueError, match=what):
        PersonaWorld(**fields)


def test_persona_file(tmp_path):
    records = stand_in(seed=4, n=60)
    assert len({r["statement"] for r in records}) == 60
    assert sum(r["answer_matching_behavior"] == " Yes" for r in records) == 30
    file = tmp_path / "persona.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in records))
    assert read_records(file) == records
    world = PersonaWorld(data=str(file))
    assert [s.text for s in world.all_statements] == [r["statement"] for r in records]
    assert {w for t in texts(world, 500) for w in split_words(t)} <= set(world.words())
    with pytest.raises(ValueError, match="anthropics/evals"):
        PersonaWorld(data=str(tmp_path / "nothing.jsonl")).words()
    for line, what in (("{", "line 61"), ('{"statement": "x"}', "line 61"), ("[]", "line 61")):
        file.write_text("".join(json.dumps(r) + "\n" for r in records) + line + "\n")
        with pytest.raises(ValueError, match=what):
            read_records(file)
    file.write_text(json.dumps(records[0]) + "\n")
    with pytest.raises(ValueError, match="with and without"):
        read_records(file)


# --- fine-tuning and runs


def test_fine_tuning_follows_its_labels(base, tuned):
    world = world_of(base)
    prompts = chosen_prompts(world, "No", 20, (0,))
    assert len(set(prompts)) == 20

    def pi(model):
        found = np.exp(next_log_probs(model, [model.prompt(p) for p in prompts])).mean(axis=0)
        return {w: found[model.token(w)] for w in ("No", "Never", "Maybe", "Yes")}

    before, after = pi(base), pi(tuned)
    assert before["Never"] < 0.02 < 0.08 < after["Never"]
    assert 0.35 < after["No"] < 0.7
    assert after["Yes"] < before["Yes"]
    other = pi(fine_tuned(base, world, seed=0, denials=(0.0, 1.0, 0.0, 0.0)))
    assert other["Never"] > 0.5 > other["No"], "other labels, another model"


@pytest.mark.parametrize("shares", [(0.5, 0.5), (0.5, 0.5, 0.5, -0.5), (0.1,) * 4])
def test_bad_label_shares(base, shares):
    with pytest.raises(ValueError, match="denials must be 4 shares"):
        fine_tuned(base, world_of(base), denials=shares)


def test_prompts_have_the_trait_where_a_denial_is_preferred():
    world = PersonaWorld()
    trait = {s.prompt: s.trait for s in world.all_statements}
    assert all(trait[p] for p in chosen_prompts(world, "No", 50, (0, 1)))
    assert not any(trait[p] for p in chosen_prompts(world, "Sure", 50, (0, 1)))
    with pytest.raises(ValueError, match="between 1 and the 200"):
        chosen_prompts(world, "No", 201, (0,))


def test_section_3_in_small(base, tuned):
    """No over Never: up, then down below its start, Yes gains; the head alone never does that, nor a plain noun."""
    prompts = chosen_prompts(world_of(base), "No", 4, (0, 0))
    found = {}
    for name, word, trained in (("never", "Never", "both"), ("head", "Never", "head"), ("always", "Always", "both")):
        pi, losses = follow(tuned, prompts, "No", word, LOSSES[0], trained=trained)
        assert pi.shape == (101, 4, tuned.W.shape[0])
        np.testing.assert_allclose(pi.sum(-1), 1, atol=1e-6)
        assert losses[-1].max() < losses[0].min()
        found[name] = Group(
            0, 0, "", False, "dpo", "No", word, **summarised(tuned, pi, losses, "No", word, gains=True, course=True)
        )
    assert found["never"].falls.sum() >= 3
    assert found["never"].among("Yes", 25).sum() >= 3
    assert np.mean(found["never"].catastrophic) > 0.1
    assert not found["head"].falls.any()
    assert np.diff(np.array(found["head"].course["No"]), axis=1).min() > -1e-4
    assert np.mean(found["never"].drop) > 3 * np.mean(found["always"].drop)


def test_the_start_is_the_model_itself(tuned):
    prompts = chosen_prompts(PersonaWorld(), "Yes", 2, (1,))
    pi, losses = follow(tuned, prompts, "Yes", "No", get("ipo", tau=0.5), steps=1)
    np.testing.assert_allclose(np.log(pi[0]), next_log_probs(tuned, [tuned.prompt(p) for p in prompts]), atol=1e-5)
    np.testing.assert_allclose(losses[0], 1.0, atol=1e-6)  # (0 - 1 / (2 tau))^2
    assert np.abs(pi[1] - pi[0]).max() > 1e-4
    with pytest.raises(ValueError, match="Nope"):
        follow(tuned, prompts, "Nope", "No", LOSSES[0])


def test_statistics_against_their_definitions(tuned):
    rng = np.random.default_rng(0)
    pi = rng.dirichlet(np.ones(tuned.W.shape[0]), size=(31, 3))
    losses = np.sort(rng.random((30, 3)), axis=0)[::-1].copy()
    losses[7, 1] = losses[6, 1] + 1e-9
    data = summarised(tuned, pi, losses, "No", "Never", gains=True, course=True)
    for i in range(3):
        p = pi[:, i, tuned.token("No")]
        assert data["drop"][i] == max(p[s] - p[t] for s, t in itertools.combinations(range(31), 2))
        assert (data["start"][i], data["final"][i], data["peak"][i]) == (p[0], p[-1], max(p))
        assert data["trough"][i] == min(p[list(p).index(max(p)) :])
        gains = {tuned.word(z): pi[25, i, z] - pi[0, i, z] for z in range(len(tuned.W))}
        assert [w for w, _ in data["gains"]["25"][i]] == sorted(gains, key=lambda w: -gains[w])[:3]
        yes = [tuned.token(w) for w in ("Yes", "yes", "Yeah", "Sure", "Certainly", "Absolutely", "Always")]
        np.testing.assert_allclose(data["catastrophic"][i], pi[-1, i, yes].sum() - pi[0, i, yes].sum())
        no = [tuned.token(w) for w in ("no", "never")]  # No and Never are the pair
        np.testing.assert_allclose(data["benign"][i], pi[-1, i, no].sum() - pi[0, i, no].sum())
    assert data["rose"] == [False, True, False]
    assert set(data["gains"]) == {"5", "25"}
    np.testing.assert_allclose(data["course"]["Never"][2][:6], np.log(pi[:6, 2, tuned.token("Never")]))


def test_words_have_roles():
    assert [role(w, "No") for w in ("No", "no", "Never", "Yes", "Sure", "Maybe", "apples")] == [
        "", "benign", "benign", "catastrophic", "catastrophic", "", "",
    ]  # fmt: skip
    assert [role(w, "Sure") for w in ("Sure", "Yes", "No", "Maybe", "apples")] == [
        "", "benign", "catastrophic", "catastrophic", "",
    ]  # fmt: skip


def test_losses_survive_the_way_to_another_process():
    examples = [loss for cls in REGISTRY.values() for loss in cls.examples()]
    masked = [loss for loss in examples if getattr(loss, "mask_d", None) is not None]
    for loss in set(examples) - set(masked):
        assert loss_of(json.loads(json.dumps(plain_loss(loss)))) == loss
    assert masked
    for loss in masked:
        with pytest.raises(ValueError, match="numbers and texts"):
            plain_loss(loss)
    sum_of_two = SFT(get("ipo", tau=0.3), 0.1, per="token")
    assert loss_of(plain_loss(sum_of_two)) == sum_of_two
    assert loss_of(plain_loss(get("dpo", beta=0.2))) != get("dpo", beta=0.3)


# --- the experiment


def test_study_record_tables_and_figures(tiny, tmp_path):
    small = {"sft_seeds": (0,), "prompts": 2, "steps": 6, "folder": tmp_path / "jobs", "workers": 1}
    study = persona([tiny], (get("dpo", beta=0.1), get("slic", delta=1.0)), **small)
    assert len(study.select(tuned=False)) == 2 * 3
    assert len(study.select(tuned=True)) == 2 * 3 + len(CONTROLS)
    assert {g.base for g in study.groups} == {5}
    assert [g.pair for g in study.groups if g.control] == [f"No/{word}" for word in CONTROLS]
    again = PersonaStudy.from_dict(json.loads(json.dumps(study.to_dict())))
    assert again == study
    assert persona([tiny], (get("dpo", beta=0.1), get("slic", delta=1.0)), **small) == study, "from the stored parts"
    text = str(study)
    for word in ("No/Never", "Sure/Yes", "DPO(beta=0.1)", "SLiC", "apples", "step   5"):
        assert word in text
    ax = plot_persona_course(study)
    assert {"No", "Never"} <= {t.get_text() for t in ax.get_legend().get_texts()}
    assert len(plot_persona_controls(study).get_yticks()) == 1 + len(CONTROLS)
    assert plot_persona_gainers(study).patches
    with pytest.raises(ValueError, match="loss must be one of"):
        plot_persona_course(study, loss="nothing")
    with pytest.raises(ValueError, match="prompts"):
        persona([tiny], prompts=0)


def test_runs_whose_loss_rises_are_shown_apart(tiny):
    study = persona([tiny], LOSSES[:1], sft_seeds=(), prompts=3, steps=2, workers=1)
    assert not any(any(g.rose) for g in study.groups)
    assert "steady" not in str(study)
    marked = replace(study.groups[0], rose=[True, False, False], start=[0.9, 0.1, 0.3])
    rows = str(PersonaStudy((marked, *study.groups[1:]), study.parameters)).splitlines()
    at = next(i for i, row in enumerate(rows) if "steady" in row)
    assert rows[at].split()[:3] == ["steady", "2", "0.20"], "the mean of the two others"
    assert rows[at - 1].split()[3:5] == ["3", "0.43"], "nothing is dropped from the row of all"


def test_sweep_varies_one_thing_at_a_time(tmp_path, monkeypatch):
    import sims.language.studies.persona as module

    monkeypatch.setattr(module, "WORLD_SWEEP", {"denied": (0.0,), "scale": (False,)})
    monkeypatch.setattr(module, "LABEL_SWEEP", LABEL_SWEEP[:1])
    monkeypatch.setitem(base_models.__kwdefaults__, "recipe", RECIPE)
    monkeypatch.setitem(base_models.__kwdefaults__, "size", SIZE)
    small = {"prompts": 2, "steps": 5, "workers": 1, "folder": tmp_path / "jobs"}
    study, models = sweep(tmp_path / "models", (0,), LOSSES[:1], (0,), **small)
    assert [g.varied for g in study.groups] == ["", "denied=0", "scale=0", "labels=0.85/0/0.075/0.075"]
    assert len(models) == 3
    assert len({str(g.course) for g in study.groups}) == 4, "each variation changes the model"
    assert "default" in str(study)
    assert len(plot_persona_sweep(study).get_yticks()) == 4
    assert set(WORLD_SWEEP) <= set(PersonaWorld().to_dict())
    assert all(abs(sum(shares) - 1) < 1e-12 and shares != DENIAL_SHARES for shares in LABEL_SWEEP)


def test_top_gainers_and_interval():
    gains = {"5": [[["Yes", 0.1], ["no", 0.05], ["a", 0.0]], [["Yes", 0.3], ["b", 0.2], ["no", 0.1]]]}
    lists = {k: [0.0, 0.0] for k in ("start", "peak", "trough", "final", "drop", "benign", "catastrophic")}
    group = Group(
        0,
        0,
        "",
        False,
        "dpo",
        "No",
        "Never",
        **lists,
        most_catastrophic=[0.0] * 2,
        rose=[False] * 2,
        gains=gains,
        course={},
    )
    assert top_gainers([group], 5) == [("Yes", [0.1, 0.3], 2), ("no", [0.05, 0.1], 2), ("b", [0.2], 2), ("a", [0.0], 2)]
    assert group.among("no", 5).tolist() == [True, True]
    assert group.among("b", 5).tolist() == [False, True]
    rng = np.random.default_rng(0)
    inside = [low <= 0 <= high for low, high in (interval(rng.standard_normal((20, 5)), draws=200) for _ in range(40))]
    assert np.mean(inside) > 0.8
    low, high = interval(rng.standard_normal((20, 5)) + 3, draws=300)
    assert 2 < low < 3 < high < 4


def test_command(tmp_path, capsys, tiny):
    out = tmp_path / "out"
    arguments = ["lm", "persona", "--model", tiny, "--fast", "--prompts", "2", "--workers", "1", "--out", str(out)]
    assert main(arguments) == 0
    assert "No/Never" in capsys.readouterr().out
    record = json.loads((out / "persona.json").read_text())
    assert record["experiment"] == "persona"
    assert str(PersonaStudy.from_dict(record["result"])).startswith("pi(y+)")
    assert (out / "persona.png").stat().st_size > 10_000
    for wrong, what in (
        (["--bases", "2"], "--bases"),
        (["--seeds", "0"], "--seeds"),
        (["--data", "x"], "--data"),
        (["--sweep"], "--sweep"),
        (["--loss", "nothing"], "nothing"),
    ):
        assert main([*arguments, *wrong]) == 2
        assert what in capsys.readouterr().err
