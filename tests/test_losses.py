"""Losses: each against its paper retyped in mpmath, reductions between them, discovery, and losses defined on the spot."""

import dataclasses
import importlib
import math
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mpmath
import numpy as np
import oracles
import pytest
import sympy
from hypothesis import given
from hypothesis import strategies as st
from strategies import EXAMPLES, MARGIN, PAIRS, random_model

import theory.losses
from theory import ExactDescent, ExactFlow, UnconstrainedFeatures, check_loss
from theory.losses import LOSSES, POSITIVE, Claims, Loss, MarginForm, MarginLoss, Pair, TokenLoss, get, parameter
from theory.losses._base import slope_mpmath

NEAR = [-9.0, -2.3, -1e-3, 0.0, 0.41, 1.9, 7.7]
FAR = [-1e4, -745.3, 120.7, 3e3, 1e4]
REFERENCES = [0.0, -1.3]


def pair(u: float, u_ref: float) -> Pair:
    """A pair of log-probabilities (at most 0) with the given margins, everything generic."""
    return Pair(-0.8 + min(u, 0.0), -0.8 - max(u, 0.0), -1.3 + min(u_ref, 0.0), -1.3 - max(u_ref, 0.0), 3, 5)


def digits(loss: Any, m: float) -> int:
    """Enough decimal digits for the formula as printed and its difference quotient: 1 + e^-z alone needs |z|/ln 10."""
    return 70 + int(getattr(loss, "beta", 0.0) * abs(m) / math.log(10))


def paper_value(loss: Any, y: Pair) -> mpmath.mpf:
    return oracles.value_of(loss, Pair(*(mpmath.mpf(x) for x in y)))


def paper_slope(loss: Any, u: float, u_ref: float) -> mpmath.mpf:
    """-dl/da by central differences in many digits: relative error 1e-40 from the step, 1e-45 from the digits."""
    with mpmath.workdps(digits(loss, u - u_ref)):
        step = mpmath.mpf(10) ** -20
        y = Pair(*(mpmath.mpf(x) for x in pair(u, u_ref)))
        rise = paper_value(loss, y._replace(a=y.a + step)) - paper_value(loss, y._replace(a=y.a - step))
        return -rise / (2 * step)


def off_kinks(loss: MarginLoss, u: float, u_ref: float) -> bool:
    return all(abs(u - k) > 1e-6 for k in loss.kinks(u_ref))


def test_nothing_is_retyped_that_is_no_loss():
    """What is not retyped is skipped, with its reason; a table under an old name would never be read."""
    assert set(oracles.PAPER) <= set(LOSSES)
    assert set(oracles.SLOPE) <= {loss.name for loss in MARGIN} & set(oracles.PAPER)
    assert len(oracles.PAPER) > 40


@pytest.mark.parametrize("loss", EXAMPLES, ids=repr)
def test_the_whole_battery_holds(loss):
    report = check_loss(loss)
    assert report.ok, str(report)
    assert len(report.checks) >= 7


@pytest.mark.parametrize("cls", LOSSES.values(), ids=LOSSES)
def test_examples_include_a_generic_instance(cls):
    # At a special value (beta = 1, eps = 0) a misplaced parameter would not show.
    fields = dataclasses.fields(cls)
    generic = [e for e in cls.examples() if all(getattr(e, f.name) not in (0.0, 0.5, 1.0) for f in fields)]
    assert generic, f"{cls.__name__}.examples() holds special values only"


@pytest.mark.parametrize("u_ref", REFERENCES)
@pytest.mark.parametrize("loss", PAIRS, ids=repr)
def test_value_is_the_papers(loss, u_ref):
    seen = []
    for u in NEAR + FAR:
        with mpmath.workdps(digits(loss, u - u_ref)):
            exact = float(paper_value(loss, pair(u, u_ref)))
        value = float(loss.value(pair(u, u_ref)))
        # beta * m is itself rounded: the exponential loss loses |z| ulp.
        assert value == pytest.approx(exact, rel=1e-13 * (1 + abs(u)), abs=1e-14), f"u = {u}"
        seen.append(value)
    assert len(set(seen)) > 5


@pytest.mark.parametrize("u_ref", REFERENCES)
@pytest.mark.parametrize("loss", MARGIN, ids=repr)
def test_slope_and_log_slope_are_the_papers(loss, u_ref):
    form = MarginForm(loss, u_ref)
    compared = 0
    for u in NEAR + FAR:
        if not off_kinks(loss, u, u_ref):
            continue
        exact = paper_slope(loss, u, u_ref)
        slope, log_slope = float(form.slope(u)), float(form.log_slope(u))
        assert slope == pytest.approx(float(exact), rel=1e-12 * (1 + abs(u)), abs=1e-13), f"G at u = {u}"
        if exact == 0:
            assert log_slope == -math.inf
        else:
            assert log_slope == pytest.approx(float(mpmath.log(abs(exact))), rel=1e-12, abs=1e-11), f"ln G at u = {u}"
        compared += 1
    assert compared >= len(NEAR + FAR) - 1


@pytest.mark.parametrize("u_ref", REFERENCES)
@pytest.mark.parametrize("loss", MARGIN, ids=repr)
def test_hand_derived_slopes_are_derivatives_of_the_papers_formulas(loss, u_ref):
    """The oracle that integrations use, against the retyped formula."""
    for u in NEAR:
        if off_kinks(loss, u, u_ref):
            exact = float(paper_slope(loss, u, u_ref))
            assert oracles.slope_of(loss, u_ref)(u) == pytest.approx(exact, rel=1e-12, abs=1e-13)


@pytest.mark.parametrize("loss", [l for l in MARGIN if not l.claims.differentiable], ids=repr)
def test_slope_at_a_kink_is_that_of_the_flat_side(loss):
    kink = loss.kinks(0.0)[0]
    form = MarginForm(loss, 0.0)
    assert form.slope(kink) == 0
    assert form.slope(np.nextafter(kink, -np.inf)) > 0.05
    assert loss.incentives(Pair.of_margin(kink))[0] == 0


@pytest.mark.parametrize("loss", [l for l in MARGIN if l.zeros(0.0)], ids=repr)
def test_landmarks_of_a_batch_are_those_of_its_rows(loss):
    refs = np.array([-1.3, 0.0, 4.0])
    landmarks_of = [loss.zeros, loss.kinks]
    least = loss.minimiser(refs)
    if least is not None:
        landmarks_of.append(lambda r: (loss.minimiser(r),))
    for landmarks in landmarks_of:
        assert len(landmarks(refs)) == len(landmarks(0.0))
        for together, *alone in zip(landmarks(refs), *(landmarks(r) for r in refs), strict=True):
            assert np.shape(together) == refs.shape
            np.testing.assert_array_equal(together, alone)
    if least is None:
        return
    # Where it is least: no lower value beside it.
    form = MarginForm(loss, refs)
    assert (form.value(least) <= np.minimum(form.value(least - 0.01), form.value(least + 0.01))).all()
    assert (form.value(least) < form.value(least - 0.01)).all()  # the smallest such margin


def test_without_wrong_labels_cdpo_has_dpos_law_and_otherwise_none():
    assert get("cdpo", beta=0.3, eps=0.0).law(0.7) == get("dpo", beta=0.3).law(0.7) is not None
    assert get("cdpo", beta=0.3, eps=0.1).law(0.7) is None


def test_a_pair_without_reference_or_lengths():
    """No reference: margin 0; no lengths: one token each."""
    y = Pair(-1.0, -3.0)
    assert (y.u, y.u_ref, y.m, y.n_w, y.n_l) == (2.0, 0.0, 2.0, 1, 1)
    assert Pair(-1.0, -3.0, -2.0, -2.5).m == 1.5


@dataclass(frozen=True)
class Linear(MarginLoss):
    """-2 m, whose closed slopes are numbers, not arrays."""

    name = "linear"
    reference = "tests"

    def formula(self, ops: Any, y: Pair) -> Any:
        return -2 * y.m

    def closed_slope(self, ops: Any, y: Pair) -> Any:
        return 2.0

    def closed_log_slope(self, ops: Any, y: Pair) -> Any:
        return math.log(2)


def test_a_constant_slope_has_the_shape_of_the_margins():
    form = MarginForm(Linear(), 0.3)
    u = np.array([[-1.0, 0.0, 2.0]])
    assert form.slope(u).tolist() == [[2.0, 2.0, 2.0]]
    assert form.log_slope(u).tolist() == [[math.log(2)] * 3]
    assert form.sign(u).tolist() == [[1.0, 1.0, 1.0]]


@dataclass(frozen=True)
class OneSided(Loss):
    """-ln pi of y+, or +ln pi of y-: the other response plays no part."""

    preferred: bool = True
    name = "one_sided"
    reference = "tests"

    def __post_init__(self) -> None: ...

    def formula(self, ops: Any, y: Pair) -> Any:
        return -3 * y.a if self.preferred else 2 * y.b


def test_incentives_of_a_loss_that_ignores_one_response():
    y = Pair(np.array([-1.0, -2.0]), -3.0)
    for loss, expected in ((OneSided(), (3.0, 0.0)), (OneSided(False), (0.0, 2.0))):
        d_w, d_l = loss.incentives(y)
        assert (d_w.tolist(), d_l.tolist()) == ([expected[0]] * 2, [expected[1]] * 2)


SCALES = [1e-3, 0.1, 1.0, 30.0, 1e3]


def scaled(cls: type, scale: float) -> Any:
    """The class with its first parameter (beta, tau, eta, delta) at `scale`."""
    return cls(**{dataclasses.fields(cls)[0].name: scale})


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("cls", [type(l) for l in {l.name: l for l in MARGIN}.values()], ids=lambda c: c.name)
def test_nothing_is_nan_far_out(cls, scale):
    loss = scaled(cls, scale)
    form = MarginForm(loss, 0.0)
    u = np.concatenate([-np.geomspace(1e4, 1e-8, 60), [0.0], np.geomspace(1e-8, 1e4, 60)])
    value, G, log_G = form.value(u), form.slope(u), form.log_slope(u)
    assert not np.isnan(value).any()
    assert not np.isnan(G).any()
    assert not np.isnan(log_G).any()
    assert (log_G < np.inf).all()
    # ln G is a number wherever the slope is not exactly zero, even where G itself underflows.
    exact_zero = np.array([paper_slope_is_zero(loss, x) for x in u])
    assert (np.isneginf(log_G) == exact_zero).all()


def paper_slope_is_zero(loss: MarginLoss, u: float) -> bool:
    """Where the loss is flat or at its minimiser, by its declared landmarks (which check_loss holds it to)."""
    least = loss.minimiser(0.0)
    if least is None:
        return False
    flat = loss.claims.decreasing  # non-increasing with a minimiser: constant from there on
    return u >= least if flat else float(MarginForm(loss, 0.0).sign(u)) == 0


@pytest.mark.parametrize("u", [-1e4, -37.0, 12.0, 800.0, 1e4])
@pytest.mark.parametrize("beta", [1e-3, 0.1, 20.0, 1e3])
@pytest.mark.parametrize("name", ["dpo", "gpo_logistic", "gpo_exponential", "gpo_savage"])
def test_log_slope_over_the_whole_range(name, beta, u):
    """ln G against closed forms worked out by hand in 60 digits: no underflow up to beta |u| = 1e7."""
    z = mpmath.mpf(beta) * mpmath.mpf(u)
    with mpmath.workdps(60):
        tail = mpmath.log1p(mpmath.exp(-abs(z)))
        log_minus, log_plus = -max(z, 0) - tail, -max(-z, 0) - tail  # ln sigmoid(-z), ln sigmoid(z)
        exact = (
            mpmath.log(beta)
            + {
                "dpo": log_minus,
                "gpo_logistic": log_minus,
                "gpo_exponential": -z,
                "gpo_savage": mpmath.log(2) + 2 * log_minus + log_plus,
            }[name]
        )
        assert float(MarginForm(get(name, beta=beta), 0.0).log_slope(u)) == pytest.approx(float(exact), rel=1e-13)


def test_cdpo_slope_keeps_its_digits_near_the_minimiser():
    loss = get("cdpo", beta=0.6, eps=0.27)
    least = loss.minimiser(0.0)
    for gap in (1e-3, 1e-6, 1e-9, -1e-6):
        u = least + gap
        with mpmath.workdps(50):
            exact = float(
                mpmath.log(abs(loss.beta * (oracles._sigma(-loss.beta * mpmath.mpf(u)) - mpmath.mpf(loss.eps))))
            )
        # u* itself is a rounded number: a relative error of eps/gap in the slope cannot be avoided.
        assert float(MarginForm(loss, 0.0).log_slope(u)) == pytest.approx(exact, abs=1e-13 + 1e-15 / abs(gap))


# ---- reductions


def equal(first: MarginLoss, second: MarginLoss, factor: float = 1.0, below: float = math.inf) -> None:
    """first = factor * second in value and slope, at every margin below `below`."""
    for u_ref in REFERENCES:
        u = np.array([x for x in NEAR + FAR if x < below + u_ref])
        assert u.size > 3
        a, b = MarginForm(first, u_ref), MarginForm(second, u_ref)
        np.testing.assert_allclose(a.value(u), factor * b.value(u), rtol=1e-13, atol=1e-14)
        np.testing.assert_allclose(a.slope(u), factor * b.slope(u), rtol=1e-13, atol=1e-14)
        np.testing.assert_allclose(a.log_slope(u), math.log(factor) + b.log_slope(u), rtol=1e-13, atol=1e-13)


@given(beta=st.floats(1e-2, 3))
def test_reductions(beta):
    dpo = get("dpo", beta=beta)
    equal(get("cdpo", beta=beta, eps=0.0), dpo)
    equal(get("gpo_logistic", beta=beta), dpo)
    equal(get("gpo_squared", beta=beta), get("ipo", tau=beta / 2), factor=beta**2)
    equal(get("gpo_truncated_quadratic", beta=beta), get("gpo_squared", beta=beta), below=1 / beta)
    equal(get("rebel", eta=1.0, reward_gap=1 / (2 * beta)), get("ipo", tau=beta))
    # GPO's hinge in its own scale is SLiC, when the reference margin is 0: SLiC has no reference.
    hinge, slic = MarginForm(get("gpo_hinge", beta=beta), 0.0), MarginForm(get("slic", delta=1 / beta), 0.0)
    u = np.array(NEAR)
    np.testing.assert_allclose(hinge.value(u), beta * slic.value(u), rtol=1e-13, atol=1e-14)


def test_reductions_can_fail():
    with pytest.raises(AssertionError):
        equal(get("cdpo", beta=0.3, eps=1e-6), get("dpo", beta=0.3))
    with pytest.raises(AssertionError):
        equal(get("gpo_squared", beta=0.3), get("ipo", tau=0.3), factor=0.09)
    with pytest.raises(AssertionError):
        equal(get("gpo_truncated_quadratic", beta=0.3), get("gpo_squared", beta=0.3))  # not beyond the kink


# ---- LaTeX


SYMBOLS = {
    "dpo": [r"\log{\left(\sigma\left(\beta \left(u - u_{\mathrm{ref}}\right)\right) \right)}"],
    "cdpo": [r"\sigma", r"\beta", "eps", r"\log"],
    "ipo": [r"\tau", "u", "2"],
    "slic": [r"\max", r"\delta", "u"],
    "rebel": [r"\eta", "u", "reward"],
    "gpo_logistic": [r"\log", r"\beta", "e^"],
    "gpo_exponential": ["e^", r"\beta"],
    "gpo_squared": [r"\beta", "^{2}"],
    "gpo_hinge": [r"\max", r"\beta"],
    "gpo_truncated_quadratic": [r"\max", r"\beta", "^{2}"],
    "gpo_savage": [r"\sigma^{2}", r"\beta"],
}


@pytest.mark.parametrize("cls", LOSSES.values(), ids=LOSSES)
def test_latex_shows_the_formula(cls):
    loss = cls()
    text = loss.latex()
    for symbol in SYMBOLS.get(cls.name, []):
        assert symbol in text
    if not issubclass(cls, TokenLoss):
        assert re.search(r"\bu\b" if issubclass(cls, MarginLoss) else r"\b[ab]\b", text)
    # Every parameter shows under its name, none as its value, and printing does not disturb the instance.
    for f in dataclasses.fields(cls):
        symbol = sympy.latex(sympy.Symbol(f.name.replace("lam", "lambda").replace("eps", "varepsilon")))
        switch = not isinstance(f.default, float)
        assert symbol in text or switch or issubclass(cls, TokenLoss), f.name
    assert "0.1" not in text
    assert loss._repr_latex_() == rf"$\ell = {text}$"
    assert loss == cls()


def test_a_loss_that_is_no_margin_loss_is_printed_in_log_probabilities():
    assert OneSided().latex() == "- 3 a"


def test_slic_is_reference_free_and_says_so_in_latex():
    assert "ref" not in LOSSES["slic"]().latex()
    assert r"u_{\mathrm{ref}}" in LOSSES["dpo"]().latex()


# ---- registry


# What a call without arguments means: the papers' and TRL's defaults (beta = 0.1; TRL passes it to IPO as tau).
DEFAULTS = {
    "dpo": {"beta": 0.1},
    "cdpo": {"beta": 0.1, "eps": 0.1},
    "ipo": {"tau": 0.1},
    "slic": {"delta": 1.0},
    "rebel": {"eta": 1.0, "reward_gap": 1.0},
} | {f"gpo_{f}": {"beta": 0.1} for f in "logistic exponential squared hinge truncated_quadratic savage".split()}


def test_defaults_are_the_papers():
    assert {name: dataclasses.asdict(get(name)) for name in LOSSES if name in DEFAULTS} == DEFAULTS


def test_classes_are_attributes_of_the_package():
    for cls in LOSSES.values():
        assert getattr(theory.losses, cls.__name__) is cls
    with pytest.raises(AttributeError, match="no attribute 'NoSuchLoss'"):
        _ = theory.losses.NoSuchLoss


def test_get_builds_and_registers_by_name():
    assert get("dpo", beta=0.3) == LOSSES["dpo"](beta=0.3)
    assert all(cls.name == name for name, cls in LOSSES.items())
    assert get("rebel", eta=2, reward_gap=-1).reward_gap == -1.0  # integers become floats


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("dop", {}, "unknown loss 'dop'; did you mean 'dpop', 'dpo'"),
        ("cdop", {}, "'cdpo'"),
        ("gpo_logstic", {}, "'gpo_logistic'"),
        ("simmpo", {}, "'simpo'"),
        ("dpo", {"betta": 0.1}, "loss 'dpo': unknown parameter 'betta'; did you mean 'beta'"),
        ("ipo", {"beta": 0.1}, "loss 'ipo': unknown parameter 'beta'"),
    ],
)
def test_misspelt_names_suggest_the_nearest(name, parameters, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        get(name, **parameters)


def test_an_unknown_name_lists_what_is_known():
    with pytest.raises(ValueError, match=r"known: .*dpo.*rebel") as caught:
        get("zzzzzzzz")
    assert all(name in str(caught.value) for name in LOSSES)


@pytest.fixture
def registry(tmp_path, monkeypatch):
    """A function that puts extra files into a copy of theory.losses and discovers it anew."""
    home = tmp_path / "copied_losses"
    shutil.copytree(Path(theory.losses.__file__).parent, home, ignore=shutil.ignore_patterns("__pycache__"))
    source = (home / "__init__.py").read_text()
    monkeypatch.syspath_prepend(str(tmp_path))

    def discover(**files: str) -> dict[str, type]:
        for stem, text in files.items():
            (home / f"{stem}.py").write_text(text)
        for name in [n for n in sys.modules if n.split(".")[0] == "copied_losses"]:
            monkeypatch.delitem(sys.modules, name)
        (home / "__init__.py").write_text(source)
        importlib.invalidate_caches()
        return importlib.import_module("copied_losses").LOSSES

    yield discover
    for name in [n for n in sys.modules if n.split(".")[0] == "copied_losses"]:
        del sys.modules[name]


NEW = """
from dataclasses import dataclass
from theory.losses._base import MarginLoss

@dataclass(frozen=True)
class New(MarginLoss):
    name = {name!r}
    reference = {reference!r}

    def formula(self, ops, y):
        return ops.exp(-y.m)
"""


def test_a_new_file_is_found_without_an_edit(registry):
    found = registry(aaa_new=NEW.format(name="new", reference="here"))
    assert list(found) == ["new", *LOSSES]
    assert found["new"].__name__ == "New"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (NEW.format(name="dpo", reference="here"), "two losses are named 'dpo'"),
        (NEW.format(name="", reference="here"), "must set name and reference"),
        (NEW.format(name="new", reference=""), "must set name and reference"),
        ("", "newest.py defines no loss"),
        # An imported class is not defined here.
        ("from theory.losses.dpo import DPO", "newest.py defines no loss"),
        ("import no_such_module", "no_such_module"),
    ],
)
def test_a_bad_file_stops_the_import(registry, text, message):
    with pytest.raises(ImportError, match=re.escape(message)):
        registry(newest=text)


def test_private_modules_and_classes_are_no_losses(registry):
    assert list(
        registry(
            _helper="",
        )
    ) == list(LOSSES)
    hidden = NEW.format(name="hidden", reference="here").replace("class New", "class _New")
    with pytest.raises(ImportError, match="defines no loss"):
        registry(newest=hidden)


# ---- a loss defined on the spot, as in a notebook cell, without closed slopes


@dataclass(frozen=True)
class MyDPO(MarginLoss):
    """DPO retyped: nothing but the formula."""

    beta: float = parameter(0.1, POSITIVE)
    name = "my_dpo"
    reference = "tests"

    def formula(self, ops: Any, y: Pair) -> Any:
        return ops.softplus(-self.beta * y.m)


def same_model(u_ref: float | None) -> UnconstrainedFeatures:
    return random_model(np.random.default_rng(5), V=5, d=3, u_ref=u_ref)


def test_a_loss_without_closed_slopes_passes_the_battery_unregistered():
    assert "my_dpo" not in LOSSES
    report = check_loss(MyDPO(0.7))
    assert report.ok, str(report)


@pytest.mark.parametrize("rates", [(1.0, 1.0), (0.0, 1.3), (0.4, 0.0)])
def test_a_loss_without_closed_slopes_has_the_same_flow(rates):
    model = same_model(-1.1)
    times = np.array([0.0, 0.3, 2.0, 30.0, 1e4])
    ours, theirs = (ExactFlow(model, loss, *rates) for loss in (MyDPO(0.7), get("dpo", beta=0.7)))
    np.testing.assert_allclose(ours.log_probs(times), theirs.log_probs(times), rtol=1e-10, atol=1e-11)
    moved = np.abs(ours.log_probs(times)[-1] - ours.log_probs(times)[0]).max()
    assert moved > 1
    other = ExactFlow(model, get("dpo", beta=0.71), *rates).log_probs(times)
    assert np.abs(other - ours.log_probs(times)).max() > 1e-4


def test_a_loss_without_closed_slopes_where_autodiff_underflows():
    """Far out float64 slopes are 0: the many-digit fallback carries on, in the slope and in the flow."""
    ours, theirs = MarginForm(MyDPO(1.0), 0.0), MarginForm(get("dpo", beta=1.0), 0.0)
    u = np.array([-3e3, 600.0, 800.0, 3e3, 1e4])
    assert ours.slope(u)[-1] == 0
    np.testing.assert_allclose(ours.log_slope(u), theirs.log_slope(u), rtol=1e-12, atol=1e-12)
    # A scalar, too; and at infinity the slope is zero, without a search for its digits.
    assert float(ours.log_slope(3e3)) == pytest.approx(-3e3, rel=1e-12)
    assert ours.log_slope(np.array([np.inf, 0.0])).tolist() == [-np.inf, pytest.approx(math.log(0.5))]
    model = same_model(None)
    margins = np.array([5.0, 300.0, 900.0])
    ours, theirs = (ExactFlow(model, loss) for loss in (MyDPO(1.0), get("dpo", beta=1.0)))
    np.testing.assert_allclose(ours.log_time_at_margin(margins), theirs.log_time_at_margin(margins), rtol=1e-10)
    log_times = np.array([1.0, 800.0])
    np.testing.assert_allclose(ours.margin(log_times=log_times), theirs.margin(log_times=log_times), rtol=1e-9)


@dataclass(frozen=True)
class Bare(MarginLoss):
    """Nothing but a formula, one of three."""

    kind: float = 0.0
    name = "bare"
    reference = "tests"

    def formula(self, ops: Any, y: Pair) -> Any:
        if self.kind == 0:
            return ops.exp(y.m)  # pushes the margin down
        if self.kind == 1:
            return ops.relu(1 - y.m)  # flat from 1 on
        # -2 m, one of which is hidden: 1 + e^-90 is 1 in 30 digits, and is not in 90.
        tiny = ops.exp(0 * y.m - 90)
        return -y.m - ((1 + tiny) - 1) * ops.exp(0 * y.m + 90) * y.m


def test_the_sign_of_a_slope_that_underflows():
    """In many digits, by the closed logarithm or without: up, down, and exactly zero."""
    far = np.array([[-2e3, 0.3, 2e3]])
    for loss, expected in (
        (MyDPO(1.0), [1, 1, 1]),
        (get("dpo", beta=1.0), [1, 1, 1]),
        (Bare(0), [-1, -1, -1]),
        (Bare(1), [1, 1, 0]),
        (get("gpo_hinge", beta=1.0), [1, 1, 0]),
        (get("ipo", tau=0.5), [1, 1, -1]),
    ):
        assert MarginForm(loss, 0.0).sign(far).tolist() == [expected]
    assert MarginForm(Bare(0), 0.0).slope(far)[0, 0] == 0
    assert MarginForm(Bare(0), 0.0).sign(-2e3) == -1
    # Each row has its own reference.
    refs = np.array([[3e3], [0.0], [-3e3]])
    each = np.repeat(far, 3, axis=0)
    assert MarginForm(Bare(1), refs).sign(each).tolist() == [[1, 1, 1], [1, 1, 0], [0, 0, 0]]
    assert MarginForm(Bare(1), 0.0).log_slope(far).tolist() == [[0.0, 0.0, -math.inf]]
    refs = np.array([[3e3], [2e3], [1.5e3]])
    np.testing.assert_allclose(MarginForm(Bare(0), refs).log_slope(each), each - refs, rtol=1e-12)
    # Beyond the largest float, too.
    assert MarginForm(Bare(0), 0.0).slope(2e3) == -math.inf
    assert float(MarginForm(Bare(0), 0.0).log_slope(2e3)) == pytest.approx(2e3, rel=1e-12)


def test_digits_are_added_until_the_slope_stands():
    with mpmath.workdps(60):
        assert abs(slope_mpmath(Bare(2), 0.3, 0.1) - 2) < 1e-30
        # With too few digits allowed, there is no second opinion and so no slope.
        assert slope_mpmath(Bare(2), 0.3, 0.1, max_digits=40) == 0


@pytest.mark.parametrize("method", ["gradient", "nesterov", "sign"])
def test_a_loss_without_closed_slopes_has_the_same_descent(method):
    model = same_model(-0.4)
    momentum = 0.9 if method == "nesterov" else 0.0
    ours, theirs = (
        ExactDescent(model, loss, step=0.05, steps=30, method=method, momentum=momentum).log_probs()
        for loss in (MyDPO(0.7), get("dpo", beta=0.7))
    )
    np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-12)
    assert np.abs(ours[-1] - ours[0]).max() > 0.1


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf, True, "0.1", None, [0.1], 1j])
def test_parameters_are_validated(value):
    with pytest.raises(ValueError, match=r"DPO\.beta must be") as caught:
        get("dpo", beta=value)
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize("record", [*EXAMPLES, Claims(), MarginForm(get("dpo"), 0.0)], ids=repr)  # type: ignore[arg-type]
def test_records_are_frozen(record):
    with pytest.raises(dataclasses.FrozenInstanceError):
        record.beta = 0.3
