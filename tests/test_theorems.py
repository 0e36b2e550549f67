"""The ledger: every claim holds on every route, its wrong copies are caught, and the ledger itself can fail."""

import json

import numpy as np
import pytest
from scipy.special import softmax

from sims.cli import main
from sims.routes import Autodiff, Integrated, Simulated
from sims.verify import verify
from theory.losses import get
from theory.model import Sample
from theory.problem import Problem
from theory.theorems import SETTINGS, THEOREMS, Sharpness, Theorem
from theory.theorems._base import RateTheorem, excess, relative

PAPER = {f"theorem_{i}" for i in range(1, 10)} | {"proposition_1", "proposition_2"}
NO_PROOF = {
    "sign_descent_decouples",
    "order_of_descent",
    "transience",
    "only_hidden_trained",
    "large_ratio",
    "ches_limit",
    "token_rate",
    "disentanglement_band",
    "reward_calibration",
    "sft_threshold",
    "sign_first_step",
    "link_incentives",
    "link_constant",
}


@pytest.mark.parametrize("name", THEOREMS)
def test_the_claim(name):
    theorem = THEOREMS[name]
    (row,) = verify([name], instances=24, workers=1).rows
    assert row.problems == ()
    assert set(row.routes) == set(theorem.routes)
    for route, tried in row.routes.items():
        assert tried.instances >= (2 if route == "integrated" else 12)
        assert 0 <= tried.residual <= theorem.tolerance
    assert row.wrong_copies == len(list(theorem.wrong_copies())) >= 1
    assert row.missed_copies == ()
    assert row.sharpness
    assert all(s["shown"] if s["broken_in"] else s["reason"] for s in row.sharpness)
    assert (row.proof is None) == (name in NO_PROOF)
    assert row.proof is None or row.proof["zero"]


def test_the_claims_are_all_there():
    assert PAPER < set(THEOREMS)
    assert len(THEOREMS) >= 50
    assert all(t.name == name for name, t in THEOREMS.items())
    assert all(setting in SETTINGS for t in THEOREMS.values() for setting in t.settings)
    assert sum(name not in NO_PROOF for name in THEOREMS) >= 10


def test_seed_and_workers():
    names = ["theorem_4", "theorem_6", "kernel_path"]
    one = verify(names, instances=60, seed=3, workers=1).to_dict()
    assert verify(names, instances=60, seed=3, workers=2).to_dict() == one
    assert verify(names, instances=60, seed=4, workers=1).to_dict() != one


def test_only_the_losses_asked_for(monkeypatch):
    seen = set()
    draw = SETTINGS["single_token"]

    def spy(*args):
        new = draw(*args)
        if args[2] is not None:  # the audit of wrong copies draws from all losses
            seen.add(new.loss.name)
        return new

    monkeypatch.setitem(SETTINGS, "single_token", spy)
    assert verify(["theorem_4"], instances=200, losses=["ipo"], workers=1).ok
    assert seen == {"ipo"}


# ---- a ledger that cannot fail is worth nothing


class HalfOfTheRate(RateTheorem):
    """A claim of the test's own: the rate is the general formula (true), or half of it (false)."""

    name = "own_claim"
    statement = r"$\frac{d}{dt}\ln\pi_+ = \langle\nabla\ln\pi_+, -\nabla L\rangle$"
    source = "this test"
    knobs = ("whole",)
    routes = ("autodiff",)
    sharpness = (Sharpness("none", None, "an identity"),)
    factor = 1.0

    def terms(self, problem, z):
        return {"whole": self.factor * problem.rate(z)}


def own(**changes):
    return type("Own", (HalfOfTheRate,), changes)()


def problems_of(theorem):
    ledger = verify([theorem], instances=100)
    assert ledger.ok == (not ledger.rows[0].problems)
    assert ("FAILED" in str(ledger)) == (not ledger.ok)
    assert ("FAILED" in ledger.markdown()) == (not ledger.ok)
    return " | ".join(ledger.rows[0].problems)


def test_a_claim_of_ones_own_runs_without_registration():
    assert problems_of(own()) == ""


def test_a_false_claim_fails():
    assert "autodiff: residual" in problems_of(own(factor=0.5))


def test_nan_fails():
    nan = own(residual=lambda self, problem, route: np.full(len(problem), np.nan))
    assert "autodiff: residual nan" in problems_of(nan)
    late = own(residual=lambda self, p, route: np.where(np.arange(len(p)) == len(p) - 1, np.nan, 0.0))
    assert "autodiff: residual nan" in problems_of(late)


def test_a_claim_that_applies_to_nothing_fails():
    empty = own(applies=lambda self, problem: np.zeros(len(problem), dtype=bool))
    assert "autodiff: applies to no instance" in problems_of(empty)


def test_a_knob_without_effect_is_reported():
    idle = own(knobs=("whole", "idle"))
    assert "wrong copy not caught: idle times" in problems_of(idle)


def test_a_hypothesis_that_does_no_work_is_reported():
    needless = own(
        applies=lambda self, p: np.full(len(p), p.V > 4), sharpness=(Sharpness("more than four tokens", "two_tokens"),)
    )
    assert "not shown sharp: without 'more than four tokens'" in problems_of(needless)


def test_a_proof_that_is_not_zero_is_reported():
    from sympy import Symbol

    from theory.theorems import Proof

    assert "the proof does not reduce to zero" in problems_of(own(proof=lambda self: Proof((Symbol("x"),), "nothing")))


@pytest.mark.parametrize("name", ["theorem_4", "trough_bounds", "path_formula", "balancedness"])
def test_wrong_copies_fail_as_claims(name):
    what, wrong = next(iter(THEOREMS[name].wrong_copies()))
    ledger = verify([wrong], instances=60)
    assert not ledger.ok, what
    assert any("residual" in p for p in ledger.rows[0].problems)


# ---- the helpers of residuals


def test_relative_and_excess():
    assert relative(np.array([0.0, 2.0, -1.0]), np.array([0.0, 4.0, 0.0])).tolist() == [0.0, 0.5, np.inf]
    assert excess(np.array([1.0, 3.0]), np.array([2.0, 2.0]), np.array([1.0, 2.0])).tolist() == [0.0, 0.5]


def test_knobs():
    theorem = THEOREMS["theorem_4"]
    wrong = theorem.turn("hidden norm", -1.0)
    assert (theorem.k("hidden norm"), wrong.k("hidden norm"), wrong.k("other tokens, weighted")) == (1.0, -1.0, 1.0)
    with pytest.raises(KeyError, match="no knob 'nothing'"):
        theorem.k("nothing")
    assert len(list(theorem.wrong_copies())) == 12
    assert ("frequency times -1") not in dict(THEOREMS["kernel_path"].wrong_copies())


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_draw_what_they_say(name):
    sizes, moving = set(), []
    for seed in range(10):
        p = SETTINGS[name](np.random.default_rng(seed), 24)
        assert len(p) == 24
        assert p.probe is not None
        assert p.positions(p.probe[1], p.probe[0])
        assert np.isfinite(p.W).all()
        assert np.isfinite(p.H).all()
        assert p.has_margin_loss == (not name.startswith(("sft", "weighted", "token")))
        dW, dH = Autodiff().velocity(p)
        moving.append((abs(dW).max((1, 2)) + abs(dH).max((1, 2)) > 0).mean())
        sizes.add((p.V, p.W.shape[2], len(p.samples)))
    assert len(sizes) > 1
    assert np.mean(moving) > 0.6  # some hinges are past their kink, and rest
    one, again = (SETTINGS[name](np.random.default_rng(5), 8) for _ in range(2))
    assert np.array_equal(one.W, again.W)
    first = one.samples[0]
    if name in ("sequences", "weighted", "sft_regularised"):
        assert first.preferred[0] != first.dispreferred[0]
    if name == "shared_prefix":
        assert first.preferred[0] == first.dispreferred[0]
    if name in ("data_set", "sequence_data_set"):
        assert len(one.samples) > 1


# ---- the routes, against formulas written out here


def tiny() -> Problem:
    rng = np.random.default_rng(8)
    W, H = rng.standard_normal((3, 4, 2)), rng.standard_normal((3, 1, 2))
    references = np.zeros((3, 1, 2))
    return Problem(W, H, (Sample("x", ((0,), (1,))),), (("x", ()),), references, get("dpo", beta=0.7), 0.6, 1.7)


def by_hand(p: Problem, i: int) -> tuple[np.ndarray, np.ndarray, float]:
    """dW, dh of DPO on one pair, and d/dt ln pi(+)."""
    W, h = p.W[i], p.H[i, 0]
    pi, u = softmax(W @ h), (W[0] - W[1]) @ h
    G = 0.7 / (1 + np.exp(0.7 * u))
    dW, dh = np.zeros_like(W), p.lr_hidden * G * (W[0] - W[1])
    dW[0], dW[1] = p.lr_unembedding * G * h, -p.lr_unembedding * G * h
    moved = dW @ h + W @ dh
    return dW, dh, float(moved[0] - pi @ moved)


def test_autodiff_and_integrated_routes():
    p = tiny()
    z = p.pairs[0][0]
    dW, dH = Autodiff().velocity(p)
    rates, slow = Autodiff().rate(p, z), Integrated().rate(p, z)
    for i in range(3):
        W, h, rate = by_hand(p, i)
        np.testing.assert_allclose(dW[i], W, atol=1e-14)
        np.testing.assert_allclose(dH[i, 0], h, atol=1e-14)
        assert rates[i] == pytest.approx(rate, rel=1e-13)
        assert slow[i] == pytest.approx(rate, rel=1e-14)
    inner = Autodiff().inner(p, z, z)
    assert (inner > 0).all()
    np.testing.assert_allclose(inner, p.inner(z, z), rtol=1e-13)


def test_simulated_route():
    p, e = tiny(), 1e-3
    run = Simulated().flow(p, np.array([e, 2 * e]))
    step = Simulated().descent(p, e, 1)
    assert run.W.shape == (2, 3, 4, 2)
    assert step.times.tolist() == [0, 1]
    for i in range(3):
        dW, dh, _ = by_hand(p, i)
        np.testing.assert_allclose((4 * run.W[0, i] - 3 * p.W[i] - run.W[1, i]) / (2 * e), dW, atol=1e-6)
        np.testing.assert_allclose((step.H[1, i, 0] - p.H[i, 0]) / e, dh, rtol=1e-11)
    J = np.array([[1.0], [2.0]])
    tied = Simulated().flow(p, np.array([e]), features=J)
    for i in range(3):
        _, dh, _ = by_hand(p, i)
        np.testing.assert_allclose((tied.H[0, i, 0] - p.H[i, 0]) / e, J @ J.T @ dh, rtol=1e-2)
        assert np.linalg.matrix_rank(np.stack([tied.H[0, i, 0] - p.H[i, 0], J[:, 0]]), tol=1e-12) == 1


# ---- the command


def test_the_command(tmp_path, capsys):
    out = tmp_path / "ledger"
    assert (
        main(
            [
                "verify",
                "--theorem",
                "theorem_4",
                "--theorem",
                "margin_bounds",
                "--instances",
                "50",
                "--workers",
                "1",
                "--out",
                str(out),
            ]
        )
        == 0
    )
    text = capsys.readouterr().out
    assert "theorem_4" in text
    assert "2 claims" in text
    assert "all hold" in text
    saved = json.loads((out / "ledger.json").read_text())
    assert saved["ok"] is True
    assert [c["name"] for c in saved["claims"]] == ["theorem_4", "margin_bounds"]
    markdown = (out / "ledger.md").read_text()
    assert THEOREMS["theorem_4"].statement in markdown
    assert "hypothesis *one sample*" in markdown


def test_the_command_fails_when_a_claim_does(tmp_path, monkeypatch, capsys):
    _, wrong = next(iter(THEOREMS["theorem_4"].wrong_copies()))
    monkeypatch.setitem(THEOREMS, "theorem_4", wrong)
    assert (
        main(["verify", "--theorem", "theorem_4", "--instances", "50", "--workers", "1", "--out", str(tmp_path)]) == 1
    )
    assert "FAILED" in capsys.readouterr().out
    assert json.loads((tmp_path / "ledger.json").read_text())["ok"] is False


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--theorem", "theorem_44"], "unknown theorem 'theorem_44'"),
        (["--loss", "dqo"], "unknown loss 'dqo'"),
        (["--instances", "0"], "instances must be"),
        (["--workers", "0"], "workers must be"),
        (["--seed", "-1"], "seed must be"),
    ],
)
def test_bad_arguments(arguments, message, tmp_path, capsys):
    assert main(["verify", *arguments, "--out", str(tmp_path / "new")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_no_claims_at_all():
    with pytest.raises(ValueError, match="at least one claim"):
        verify([])


def test_a_claim_must_say_how_far_off_it_is():
    class Mute(Theorem):
        name = "mute"

    with pytest.raises(NotImplementedError, match="Mute must define residual"):
        Mute().residual(tiny(), Autodiff())
    with pytest.raises(ValueError, match="has no probe"):
        THEOREMS["theorem_5"].residual(tiny(), Autodiff())


# ---- what a ledger accepts and says


def test_classes_names_and_instances_are_accepted():
    assert verify("theorem_2", instances=20).rows[0].name == "theorem_2"
    assert verify(HalfOfTheRate, instances=20).ok
    assert verify(["theorem_2", "theorem_2"], instances=20, losses=[get("ipo")]).settings["losses"] == "ipo"
    with pytest.raises(ValueError, match="different names"):
        verify([own(), own()])
    with pytest.raises(ValueError, match="at least one loss"):
        verify(["theorem_2"], losses=[])
    with pytest.raises(ValueError, match="margin losses, got"):
        verify(["theorem_2"], losses=[int])


def test_a_claim_that_the_losses_rule_out_is_no_failure():
    ledger = verify(["order_of_descent"], instances=12, losses=["slic"])
    assert ledger.ok
    assert "applies to none of these losses" in str(ledger)


def test_a_failed_proof_is_not_called_one():
    wrong = THEOREMS["theorem_4"].turn("hidden norm", 2.0)
    text = verify([wrong], instances=20).markdown()
    assert "proved" not in text
    assert "the proof does not reduce to zero" in text


def test_the_markdown_stands_alone():
    text = verify(["margin_bounds", "theorem_4"], instances=20).markdown()
    assert "## Notation" in text
    assert "`two_tokens`: A vocabulary of y+ and y- alone" in text
    assert text.index("## theorem_4") < text.index("## margin_bounds")  # the paper first
    assert "exact_solution" not in text


def test_out_must_be_a_folder(tmp_path, capsys):
    taken = tmp_path / "file"
    taken.write_text("mine")
    for command in (["verify", "--theorem", "theorem_4"], ["study"], ["demo"]):
        assert main([*command, "--out", str(taken)]) == 2
        assert "--out must be a folder" in capsys.readouterr().err
    assert taken.read_text() == "mine"


def test_hypotheses_are_told_from_what_can_be_measured():
    """Dropping a hypothesis must not be shown by instances that a route cannot measure."""
    theorem = THEOREMS["only_hidden_trained"]
    p = SETTINGS["fixed_unembeddings"](np.random.default_rng(0), 60)
    assert theorem.applies(p).all()
    assert not theorem.measurable(p).all()
