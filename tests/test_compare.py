"""Losses side by side and the smallest remedies: against the exact flow, against closed forms, and with wrong ones."""

import json
from dataclasses import dataclass, replace

import numpy as np
import pytest

from sims import gradient_flow
from sims.cli import main
from sims.files import to_json
from sims.plots import plot_comparison
from sims.scenarios import remedy
from sims.scenarios._arc import Landscape, walk
from sims.scenarios.compare import SCENARIOS, compare
from sims.scenarios.remedy import closed_form, needed_ratio, remedies, smallest
from theory import ExactFlow
from theory.losses import LOSSES, Loss, MarginLoss, Weighted, get
from theory.problem import Problem

MARGIN = ("dpo", "cdpo", "ipo", "rebel", "gpo_exponential", "gpo_hinge", "gpo_savage")
OTHERS = ("sppo_hard", "dpop", "dpo_shift", "nll", "simpo", "tdpo2", "grpo")


@dataclass(frozen=True)
class Mine(Loss):
    """A loss that no registry knows: DPO with a double pull on y+."""

    def formula(self, ops, y):
        return ops.softplus(-0.1 * (2 * y.da - y.db))


@dataclass(frozen=True)
class Broken(MarginLoss):
    """Raises what a mistyped formula raises."""

    def formula(self, ops, y):
        raise RuntimeError("no such thing")


@dataclass(frozen=True)
class Flat(MarginLoss):
    """Nothing to learn."""

    def formula(self, ops, y):
        return 0.0 * y.u


@pytest.fixture(scope="module")
def study():
    return compare((*MARGIN, *OTHERS, Mine()))


# ---- the walk is the gradient flow


@pytest.mark.parametrize("name", MARGIN)
def test_margin_losses_on_one_token_agree_with_the_exact_flow(study, name):
    c, s = study.course("token", name), SCENARIOS["token"]
    flow = ExactFlow(s.model(), get(name), 1.0, s.eta_h)
    exact = flow.displacement()
    assert c.initial_rate == pytest.approx(exact.initial_rate, rel=1e-9)
    assert exact.depth < -0.05, "something is displaced"
    if flow.stop_margin - flow.start_margin > s.margin:  # the walk ends before the flow, but after its trough
        assert c.final_margin == pytest.approx(s.margin, abs=1e-9)
        assert c.status == "unrecovered"
    else:
        assert c.final_margin == pytest.approx(flow.stop_margin - flow.start_margin, abs=1e-4)
        assert c.status == exact.status == "permanent"
    assert c.depth == pytest.approx(exact.depth, abs=1e-6)
    exact_time = float(np.squeeze(flow.log_time_at_margin(flow.start_margin + 4.0)))
    assert c.log_time == pytest.approx(exact_time, abs=2e-3)


@pytest.mark.parametrize(("scenario", "loss"), [("sequence", "dpo"), ("data", "simpo"), ("data", "tdpo2")])
def test_the_clock_and_the_curve_are_those_of_the_flow_in_time(scenario, loss):
    s = SCENARIOS[scenario]
    land = Landscape.of(s.model(), get(loss), 1.0, s.eta_h)
    found = walk(land, 6.0)
    t = float(np.exp(found.log_times[-1]))
    run = gradient_flow(s.model(), get(loss), [0.0, t], 1.0, s.eta_h, rtol=1e-8, atol=1e-9)
    a = np.mean([np.diff(run.log_probs(x.preferred, x.prompt))[0] for x in s.model().samples])
    gained, change = land.change(found.x)
    assert gained[-1] == pytest.approx(6.0, abs=1e-9)
    assert change[-1] == pytest.approx(a, abs=1e-4)


def test_implicit_steps_reach_the_minimum_and_slide_along_a_kink(study):
    for scenario in ("token", "sequence"):
        land = SCENARIOS[scenario].model()
        best = -land.log_prob(land.samples[0].preferred)  # ln pi(y+) cannot rise beyond 0
        c = study.course(scenario, "sppo_hard")
        assert c.end == "stationary"
        assert c.final_change == pytest.approx(best, abs=1e-2)
    dpop = study.course("sequence", "dpop")
    assert -0.05 < dpop.depth <= 0, "its penalty holds y+ where the slope of relu jumps"
    assert dpop.final_margin > 10


@pytest.mark.parametrize("loss", [get("dpo", beta=1.0), get("dpo", beta=0.3)])
def test_gradients_far_below_the_root_of_the_smallest_float_are_walked(loss):
    """At a margin of 600 nats the slope is 1e-261: its square underflows, it does not."""
    c = compare([loss], ["token"], margin=600.0).courses[0]
    assert (c.status, c.end) == ("transient", "margin")
    assert c.off_curve <= 1e-6


def test_where_gradients_underflow_the_loss_is_not_at_rest():
    steep = compare([get("dpo", beta=1.0)], ["token"], margin=1000.0).courses[0]
    assert steep.end == "float"
    assert 600 < steep.final_margin < 745  # exp(-745) is the last float
    for c in compare(["beta_dpo", "f_dpo_alpha", "f_dpo_forward_kl", "squared_po", "alphapo"], ["token"]).courses:
        assert (c.status, c.end) == ("unrecovered", "margin" if c.loss == "beta_dpo" else "float"), c.loss
    for c in compare(["ipo", "gpo_hinge"], ["token"]).courses:  # these are: a minimum, a plateau
        assert (c.status, c.end) == ("permanent", "stationary"), c.loss


def test_a_minimum_is_never_reached_in_time():
    at, before = (compare(["ipo"], ["token"], reach=r).courses[0].log_time for r in (5.0, 4.99))
    assert at == np.inf  # 1/(2 tau)
    flow = ExactFlow(SCENARIOS["token"].model(), get("ipo"), 1.0, SCENARIOS["token"].eta_h)
    assert before == pytest.approx(float(np.squeeze(flow.log_time_at_margin(flow.start_margin + 4.99))), abs=2e-3)


@pytest.mark.parametrize(("scenario", "name"), [("sequence", "nca"), ("data", "cal_dpo"), ("sequence", "tdpo1")])
def test_other_losses_gain_the_margin_when_the_flow_in_time_does(scenario, name):
    s = SCENARIOS[scenario]
    c = compare([name], [scenario], margin=4.5).courses[0]
    run = gradient_flow(s.model(), get(name), [0.0, float(np.exp(c.log_time))], 1.0, s.eta_h)
    ends = [[np.diff(run.log_probs(y, x.prompt))[0] for y in x.responses[:2]] for x in s.model().samples]
    a, b = np.mean(ends, axis=0)
    assert a - b == pytest.approx(4.0, abs=1e-2)
    assert a == pytest.approx(np.interp(4.0, c.margin, c.change), abs=1e-2)


def test_a_wrong_walk_is_seen():
    s = SCENARIOS["token"]
    wrong = replace(Landscape.of(s.model(), get("dpo"), 1.0, s.eta_h), scale=(1.0, 1.0))  # H at the rate of W
    change = wrong.change(walk(wrong, s.margin).x)[1]
    assert abs(change.min() - ExactFlow(s.model(), get("dpo"), 1.0, s.eta_h).displacement().depth) > 1


# ---- what the comparison says


@pytest.mark.parametrize("scenario", ["token", "sequence"])
def test_losses_of_the_margin_lie_on_one_curve_and_others_do_not(study, scenario):
    kinds = {c.loss: c.kind for c in study.of(scenario)}
    assert all(kinds[name] == "margin" for name in MARGIN)
    for c in study.of(scenario):
        if c.kind == "margin":
            assert c.off_curve <= 1e-6, c.loss
    off = {c.loss: c.off_curve for c in study.of(scenario)}
    assert min(off[n] for n in ("sppo_hard", "dpo_shift", "nll")) > 1e-2


def test_kinds_are_measured(study):
    kinds = {c.loss: c.kind for c in study.of("data")}
    assert kinds["dpo"] == "margin"
    assert kinds["dpo_shift"] == kinds["simpo"] == kinds["Mine()"] == "constant ratio"
    assert kinds["sppo_hard"] == kinds["dpop"] == "two-likelihood"
    assert kinds["tdpo2"] == "token"
    assert kinds["grpo"] == "group"
    assert study.course("token", "simpo").kind == "margin", "lengths are equal there"
    assert study.course("data", "Mine()").ratio == pytest.approx(2.0, rel=1e-12)
    assert study.course("sequence", "simpo").ratio == pytest.approx(8 / 5, rel=1e-12)
    assert study.course("data", "tdpo2").ratio is None


def test_every_scenario_displaces_under_dpo_and_not_under_likelihood(study):
    for scenario in SCENARIOS:
        dpo, nll = study.course(scenario, "dpo"), study.course(scenario, "nll")
        assert dpo.depth < -1
        assert dpo.initial_rate < 0
        assert nll.depth == 0
        assert nll.status == "none"
    yes = study.course("token", "dpo")
    assert (yes.gainer, yes.gainer_then > 0.5) == ("Yes", True)
    assert study.course("token", "sppo_hard").status == "transient"


def test_ratio_rate_and_slope_agree_in_sign(study):
    for scenario in ("token", "sequence"):
        s = SCENARIOS[scenario]
        needed = needed_ratio(Problem.of([s.model()], get("dpo"), 1.0, s.eta_h))
        for name in ("dpo", "dpop", "dpo_shift", "sppo_hard", "simpo"):  # those that push y- down
            c = study.course(scenario, name)
            assert np.sign(c.initial_rate) == np.sign(c.initial_slope) == np.sign(c.ratio - needed), (scenario, name)


def test_a_loss_at_rest_is_stationary():
    c = compare([Flat()], ["sequence"]).courses[0]
    assert (c.status, c.end, c.depth, c.log_time) == ("stationary", "stationary", 0.0, np.inf)


def test_every_registered_loss_can_be_compared():
    found = compare(scenarios=["sequence"], margin=0.5)
    assert not found.failed
    assert [c.loss for c in found.courses] == list(LOSSES)
    assert all(np.isfinite([*c.margin, *c.change]).all() for c in found.courses)


def test_a_loss_that_raises_is_a_failed_row_and_the_rest_goes_on():
    found = compare([Broken(), "dpo"], ["token"], margin=1.0)
    assert found.failed == (("token", "Broken()", "RuntimeError: no such thing"),)
    assert [c.loss for c in found.courses] == ["dpo"]
    assert "Broken() on token: RuntimeError: no such thing" in str(found)


def test_scenarios_named_twice_are_walked_once():
    assert len(compare(["dpo"], ["token", "token"], margin=1.0).courses) == 1


def test_workers_change_nothing():
    one = compare(["dpo", "sppo_hard", Mine()], ["sequence"], margin=3.0)
    two = compare(["dpo", "sppo_hard", Mine()], ["sequence"], margin=3.0, workers=2)
    assert to_json(one.to_dict()) == to_json(two.to_dict())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"losses": ["dpoo"]}, "unknown loss 'dpoo'; did you mean 'dpo'"),
        ({"losses": ["dpo", "dpo"]}, "losses must be distinct and not empty"),
        ({"losses": [3]}, "losses must hold names or theory.losses.Loss instances, got 3"),
        ({"scenarios": ["tokens"]}, "unknown scenario 'tokens'"),
        ({"margin": -1.0}, "margin must be in"),
        ({"workers": 0}, "workers must be an integer >= 1, got 0"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        compare(**call)


# ---- figure, files, commands


def test_figure_numbers_every_loss_and_draws_the_common_curve_once(study):
    axes = plot_comparison(study)
    assert len(axes) == 3
    texts = [t.get_text() for t in axes[0].figure.axes[-1].texts]
    assert [t.split("  ")[1] for t in texts][:3] == ["dpo", "cdpo", "ipo"]
    bold = [[line for line in ax.lines if line.get_linewidth() == 3] for ax in axes]
    assert [len(b) for b in bold] == [1, 1, 0]
    drawn = len([line for line in axes[0].lines if line.get_linewidth() == 1.1])
    assert drawn == sum(c.kind != "margin" for c in study.of("token") if c.off_curve > 1e-6)
    with pytest.raises(ValueError, match="axes must hold one per scenario"):
        plot_comparison(study, axes[:2])


def test_table_has_a_row_per_loss(study):
    text = str(study)
    for c in study.of("data"):
        assert f"\n  {c.loss} " in text
    assert study._repr_html_().count("<tr>") == len(study.courses) + 3


def test_command_takes_a_file_and_writes_everything(tmp_path, capsys):
    file = tmp_path / "mine.py"
    file.write_text(
        "from dataclasses import dataclass\nfrom theory.losses import MarginLoss\n\n\n@dataclass(frozen=True)\n"
        "class Steep(MarginLoss):\n    def formula(self, ops, y):\n        return ops.softplus(-3.0 * y.m)\n"
    )
    out = tmp_path / "out"
    call = [
        "compare",
        "--losses",
        "dpo",
        "--file",
        str(file),
        "--scenario",
        "token",
        "--margin",
        "4",
        "--out",
        str(out),
    ]
    assert main(call) == 0
    assert "Steep()" in capsys.readouterr().out
    data = json.loads((out / "compare.json").read_text())
    assert [c["loss"] for c in data["courses"]] == ["dpo", "Steep()"]
    assert data["courses"][1]["off_curve"] < 1e-6
    assert (out / "compare.png").stat().st_size > 20_000
    assert main(["compare", "--losses", "nope", "--out", str(out)]) == 2
    file.write_text(file.read_text().replace("ops.softplus(-3.0 * y.m)", "ops.soft(y.m)"))
    for others, there in (("dpo", True), ("none", False)):
        (out / "compare.png").unlink(missing_ok=True)
        assert main([*call[:2], others, *call[3:]]) == 1
        assert "Steep() on token: AttributeError" in capsys.readouterr().out
        assert (out / "compare.png").exists() == there
    file.write_text(file.read_text() + "\n    @classmethod\n    def examples(cls):\n        return 1 / 0\n")
    assert main(call) == 2
    assert "Steep.examples() raised ZeroDivisionError" in capsys.readouterr().err


# ---- remedies


@pytest.mark.parametrize("scenario", list(SCENARIOS))
@pytest.mark.parametrize("name", ["dpo", "ipo", "gpo_exponential"])
def test_the_smallest_sft_weight_is_the_closed_form(scenario, name):
    s = SCENARIOS[scenario]
    r = smallest(s.model(), get(name), "sft", "start", 1.0, s.eta_h)
    assert r.verdict == "found"
    assert r.amount > 0
    assert r.amount == pytest.approx(r.closed, rel=1e-8)
    if r.needed_ratio is not None:
        assert r.ratio == pytest.approx(r.needed_ratio, rel=1e-8)


@pytest.mark.parametrize("scenario", ["token", "sequence"])
def test_the_smallest_weight_ratio_is_the_closed_form(scenario):
    s = SCENARIOS[scenario]
    for name in ("dpo", "slic", "gpo_hinge"):
        r = smallest(
            s.model(), get(name, **({"delta": 50.0} if name == "slic" else {})), "ratio", "start", 1.0, s.eta_h
        )
        assert r.amount == pytest.approx(r.closed, rel=1e-8)
        assert r.amount > 1


def test_a_parameter_is_changed_until_the_ratio_is_the_needed_one():
    s = SCENARIOS["sequence"]
    r = smallest(s.model(), get("dpo_shift"), "lam", "start", 1.0, s.eta_h)
    assert r.amount == pytest.approx(1 / r.needed_ratio, rel=1e-8)
    assert r.amount < r.now


def test_no_value_of_beta_prevents_it_and_turning_round_is_no_remedy():
    s = SCENARIOS["sequence"]
    assert smallest(s.model(), get("dpo"), "beta", "start", 1.0, s.eta_h).verdict == "none"
    r = smallest(s.model(), get("cdpo", eps=0.1), "eps", "start", 1.0, s.eta_h)
    assert (r.verdict, r.amount) == ("none", None), "past eps = 1/2 y+ rises because the preference is unlearned"
    assert "no value prevents it" in str(r)


def test_a_wrong_closed_form_is_seen():
    s = SCENARIOS["sequence"]
    r = smallest(s.model(), get("dpo"), "sft", "start", 1.0, s.eta_h)
    other_metric = closed_form(Problem.of([s.model()], get("dpo"), 1.0, 1.0), "sft")  # the wrong rate of H
    assert r.amount != pytest.approx(other_metric, rel=1e-2)
    assert r.amount != pytest.approx(r.closed * r.needed_ratio / (r.needed_ratio - 1), rel=1e-2)  # the -1 forgotten


def test_the_whole_path_may_ask_for_more_than_the_start():
    s = SCENARIOS["token"]
    shift = get("dpo_shift", lam=0.7)
    assert smallest(s.model(), shift, "lam", "start", 1.0, s.eta_h).verdict == "not needed"
    r = smallest(s.model(), shift, "lam", "path", 1.0, s.eta_h, margin=12.0)
    assert r.verdict == "found"
    assert r.closed is None
    assert r.amount < 0.65
    for factor, falls in ((1.01, True), (0.99, False)):
        land = Landscape.of(s.model(), get("dpo_shift", lam=factor * r.amount), 1.0, s.eta_h)
        assert (land.change(walk(land, 12.0).x)[1].min() < -1e-9) == falls
    s = SCENARIOS["sequence"]  # and may not: once it rises it goes on rising
    at_start, path = (smallest(s.model(), get("dpo"), "sft", q, 1.0, s.eta_h, margin=6.0) for q in ("start", "path"))
    assert path.amount == pytest.approx(at_start.amount, rel=2e-3)
    assert path.amount >= at_start.amount * (1 - 1e-9)  # a dip at the start is a dip


def test_where_nothing_falls_nothing_is_needed():
    s = SCENARIOS["sequence"]
    for loss in (Weighted(get("dpo"), 3.0, 1.0), Flat()):
        r = smallest(s.model(), loss, "sft", "start", 1.0, s.eta_h)
        assert (r.verdict, r.amount) == ("not needed", None)
        assert "margin falls" not in str(r)


@pytest.mark.parametrize(("scenario", "name"), [("sequence", "nll"), ("token", "discopop")])
def test_a_margin_that_falls_instead_is_said(scenario, name):
    """Likelihood alone lifts y- faster than y+ there (r needed > 1); DiscoPOP pulls the margin down from the start."""
    s = SCENARIOS[scenario]
    r = smallest(s.model(), get(name), "sft", "start", 1.0, s.eta_h)
    assert (r.verdict, r.amount) == ("unlearns", None)
    assert "not needed, but the margin falls" in str(r)
    c = compare([name], [scenario], margin=0.01).courses[0]
    assert c.final_margin < 0 < c.initial_rate


def test_an_amount_found_by_walking_is_printed_as_far_as_it_is_known():
    r = smallest(SCENARIOS["sequence"].model(), get("dpo"), "sft", "path", 1.0, 0.1, margin=2.0)
    assert f"smallest {r.amount:.3g}  " in str(r)
    assert f"r then {r.ratio:.3g}" in str(r)


def test_paths_are_followed_as_far_as_asked_and_only_where_the_start_does_not_fall(monkeypatch):
    margins = []

    def counted(land, margin):
        margins.append(margin)
        return walk(land, margin)

    monkeypatch.setattr(remedy, "walk", counted)
    assert remedies("token", get("dpo"), ["beta"], ["path"]).rows[0].verdict == "none"
    assert not margins
    remedies("token", get("dpo"), ["ratio"], ["path"], margin=2.0)
    assert set(margins) == {2.0}
    assert len(margins) < 25
    margins.clear()
    remedies("token", get("dpo"), ["sft"], ["path"])
    assert set(margins) == {SCENARIOS["token"].margin}


def test_remedies_as_a_table_and_a_command(capsys):
    table = remedies("token", get("dpo"), questions=("start",))
    assert [r.remedy for r in table.rows] == ["sft", "ratio", "beta"]
    assert str(table.rows[0].amount)[:6] in str(table)
    call = ["remedy", "--scenario", "token", "--loss", "dpo_shift", "--set", "lam=0.9", "--parameter", "lam"]
    assert main([*call, "--question", "start", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert row["amount"] == pytest.approx(1 / row["needed_ratio"], rel=1e-8)
    with pytest.raises(ValueError, match="margin must be in"):
        remedies("token", get("dpo"), ["sft"], margin=-1.0)
    with pytest.raises(ValueError, match="unknown remedy 'bet'; did you mean 'beta'"):
        remedies("token", get("dpo"), ["bet"])
    with pytest.raises(ValueError, match="unknown scenario"):
        remedies("nowhere", get("dpo"))
    with pytest.raises(ValueError, match="question must be one of start, path, got 'end'"):
        smallest(SCENARIOS["token"].model(), get("dpo"), "sft", "end")


def test_remedies_of_losses_in_a_file(tmp_path, capsys):
    file = tmp_path / "mine.py"
    file.write_text(
        "from theory.losses import DPO, SLiC\n\n\nclass Mine(DPO):\n    pass\n\n\nclass Other(SLiC):\n    pass\n"
    )
    call = ["remedy", "--scenario", "token", "--parameter", "ratio", "--question", "start", "--json"]
    assert main([*call, "--file", str(file)]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert {row["loss"].split("(")[0] for row in rows} == {"Mine", "Other"}
    assert rows[0]["amount"] == pytest.approx(rows[0]["needed_ratio"], rel=1e-8)
    assert main([*call, "--file", str(file), "--set", "beta=0.3"]) == 2
    assert "--set goes with --loss" in capsys.readouterr().err
    file.write_text(file.read_text() + "\n    def formula(self, ops, y):\n        return ops.nothing(y.u)\n")
    assert main([*call, "--file", str(file)]) == 2
    assert "AttributeError" in capsys.readouterr().err


def test_one_name_is_a_list_of_one():
    one = compare("dpo", "token", margin=1.0)
    assert [(c.loss, c.scenario) for c in one.courses] == [("dpo", "token")]
    assert compare(get("dpo"), ["token"], margin=1.0).courses == one.courses
    assert "who gains: token" in str(one)
