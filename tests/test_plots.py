"""Figures: what is drawn equals the exact data, the data equal independent routes, files are complete or absent."""

import ast
import csv
import itertools
import json
import subprocess
import sys
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.quiver import Quiver

import sims
from sims import gradient_flow
from sims.figures import COSINES, RATIOS, figure_data, save_picture
from sims.palette import BLACK, ROLE_COLORS, WORD_COLORS, shown, token_color
from sims.plots import (
    barycentric,
    panels,
    plot_gains,
    plot_law,
    plot_ledger,
    plot_log_probs,
    plot_losses,
    plot_phase,
    plot_prediction,
    plot_simplex,
    plot_simplex_moments,
    plot_story,
    plot_terms,
    save_figures,
    save_prediction,
)
from sims.scenarios.curves import forecast, gains, loss_marks, role, story
from sims.scenarios.no_never_yes import BETA, KAPPA, TOKENS, geometry, model, no_never_yes
from sims.scenarios.phase import hidden_at, phase_diagram, simplex_field, simplex_grid, simplex_path, turned
from sims.verify import Ledger, Row, Tried
from theory import ExactFlow, UnconstrainedFeatures
from theory.losses import get

TRIO = [TOKENS.index(t) for t in ("No", "Never", "Yes")]


@pytest.fixture(scope="module")
def study():
    return no_never_yes(draws=5)


@pytest.fixture(scope="module")
def flow():
    return ExactFlow(model(), get("dpo", beta=BETA), 1.0, KAPPA)


@pytest.fixture(scope="module")
def data(study):
    return figure_data(study)


def new_axes(count: int = 1) -> list[Axes]:
    return list(np.atleast_1d(Figure(figsize=(4 * count, 3), layout="constrained").subplots(1, count)))


def lines(ax: Axes) -> dict[str, list]:
    """The drawn lines by label; legend-only entries (without points) left out."""
    out: dict[str, list] = {}
    for line in ax.lines:
        if len(line.get_xdata()):
            out.setdefault(str(line.get_label()), []).append(line)
    return out


# ---- (a) curves


@pytest.mark.parametrize("along", ["time", "margin"])
def test_curves_are_the_exact_log_probabilities(study, flow, along):
    data = story(flow, study.main, study.curves[1:], points=80)
    (given,) = new_axes()
    assert plot_log_probs(data, along, given) is given
    drawn = lines(given)
    assert plot_log_probs(data, along).figure is not given.figure
    for name in ("No", "Never", "Yes"):
        (line,) = drawn[name]
        x = np.exp(data.log_times) if along == "time" else data.margin
        np.testing.assert_array_equal(line.get_xdata(), x)
        np.testing.assert_array_equal(line.get_ydata(), data.log_probs[:, TOKENS.index(name)])
        assert line.get_color() == WORD_COLORS[name]
    # The data themselves: by time (the loss's clock) and by margin (no clock at all), one curve.
    np.testing.assert_allclose(data.log_probs, flow.log_probs_at_margin(data.margin), rtol=1e-9, atol=1e-9)
    assert given.get_xscale() == ("log" if along == "time" else "linear")
    assert data.log_probs[:, 0].min() < data.log_probs[0, 0] - 10, "something must move"


def test_simulated_points_lie_on_the_curves_and_trough_and_return_are_marked(study, flow):
    data = story(flow, study.main, study.curves[1:])
    ax = plot_log_probs(data, "margin")
    points = [p for p in lines(ax).items() if p[0].startswith("_child")]
    circles = [p for _, group in points for p in group if p.get_marker() in "ox"]
    assert len(circles) == 6, "three words by two routes"
    for line in circles:
        exact = flow.log_probs_at_margin(line.get_xdata())[:, TRIO]
        routes = {"o": 1e-8, "x": 0.2}  # gradient descent with a finite step is only near the flow
        miss = np.abs(exact - np.asarray(line.get_ydata())[:, None]).max(axis=0).min()
        assert miss < routes[line.get_marker()]
        assert np.diff(line.get_xdata()).min() > 0
    marks = {label: line[0].get_xydata()[0] for label, line in lines(ax).items() if line[0].get_marker() in "vD"}
    assert len(marks) == 2
    trough, back = study.main.trough, study.main.last_return
    np.testing.assert_allclose(marks["back at its start"], [back.margin, back.log_prob])
    (label,) = set(marks) - {"back at its start"}
    np.testing.assert_allclose(marks[label], [trough.margin, trough.log_prob])
    assert f"\N{MINUS SIGN}{-study.main.depth:.1f} nats" in label
    in_time = lines(plot_log_probs(data, "time"))["back at its start"][0].get_xydata()[0]
    np.testing.assert_allclose(in_time, [np.exp(back.log_time), back.log_prob])


def test_story_of_a_flow_without_trough_or_simulation():
    flow = ExactFlow(model(), get("dpo", beta=BETA), 1.0, 1e-3)
    record = flow.displacement()
    assert record.status == "none"
    data = story(flow, record, points=50)
    for ax in plot_story(data):
        assert not any(line.get_marker() in "vDox" for line in ax.lines)
    given = new_axes(2)
    assert plot_story(data, given) == given
    assert given[0].get_legend() is not None
    with pytest.raises(ValueError, match="2 axes, got 1"):
        plot_story(data, given[:1])
    with pytest.raises(ValueError, match="'time' or 'margin', got 'steps'"):
        plot_log_probs(data, "steps")


# ---- (b) the simplex


def three(log_probs):
    """Probabilities among the three tokens."""
    q = np.exp(log_probs[:, TRIO] - log_probs[:, TRIO].max(axis=1, keepdims=True))
    return q / q.sum(axis=1, keepdims=True)


def finite_difference(m: UnconstrainedFeatures, flow_of, dt: float = 1e-5):
    """Second-order one-sided derivative at t = 0 of the probabilities among the three."""
    f = three(flow_of(m, np.array([0.0, dt, 2 * dt])))
    return (-3 * f[0] + 4 * f[1] - f[2]) / (2 * dt)


@pytest.mark.parametrize("moment", [0, 1])
def test_field_is_the_flow_from_each_point(study, flow, moment):
    margin = (flow.start_margin, study.main.trough.margin)[moment]
    m = flow.model_at_margin(margin)
    field = simplex_field(m, flow.loss, TRIO, KAPPA, divisions=5)
    routes = {
        "exact": lambda here, t: ExactFlow(here, flow.loss, 1.0, KAPPA).log_probs(t),
        "integrated": lambda here, t: gradient_flow(here, flow.loss, t, 1.0, KAPPA, rtol=1e-13, atol=1e-14)
        .next_token_log_probs(),
    }  # fmt: skip
    hidden = hidden_at(m, TRIO, field.points)
    scale = np.linalg.norm(field.velocity, axis=1).max()
    for route, of in routes.items():
        every = 1 if route == "exact" else 5
        for h, q, v in list(zip(hidden, field.points, field.velocity, strict=True))[::every]:
            here = m.with_parameters(m.W, h[None])
            np.testing.assert_allclose(three(here.next_token_log_probs()[None])[0], q, atol=1e-12)
            np.testing.assert_allclose(finite_difference(here, of), v, atol=2e-5 * scale)
    # The same comparison refutes a field with another ratio of rates.
    wrong = simplex_field(m, flow.loss, TRIO, 2 * KAPPA, divisions=5)
    assert np.abs(wrong.velocity - field.velocity).max() > 0.05 * scale


def test_hidden_vectors_of_the_field_are_the_nearest(flow):
    m, q = flow.model, simplex_grid(3)
    h = hidden_at(m, TRIO, q)
    differences = m.W[TRIO[:2]] - m.W[TRIO[2]]
    away = h - m.h
    # Least-norm: the change lies in the span of the two differences of rows.
    inside = away @ np.linalg.pinv(differences) @ differences
    np.testing.assert_allclose(away, inside, atol=1e-12)
    assert np.abs(away).max() > 0.1
    np.testing.assert_allclose(q.sum(axis=1), 1)
    assert (q > 0).all()
    np.testing.assert_allclose(hidden_at(m, TRIO, simplex_path(flow, TRIO, [flow.start_margin])), m.h[None], atol=1e-9)


def test_simplex_draws_path_arrows_and_moment(data):
    moment = data.simplex[1]
    (given,) = new_axes()
    assert plot_simplex(moment.field, moment.walked, moment.ahead, given) is given
    drawn = lines(given)
    np.testing.assert_allclose(drawn["path walked"][0].get_xydata(), barycentric(moment.walked))
    np.testing.assert_allclose(drawn["path ahead"][0].get_xydata(), barycentric(moment.ahead))
    np.testing.assert_allclose(
        drawn["the moment of this W"][0].get_xydata()[0], barycentric(moment.walked[-1]), atol=1e-9
    )
    (arrows,) = [c for c in given.collections if isinstance(c, Quiver)]
    np.testing.assert_allclose(arrows.XY, barycentric(moment.field.points))
    direction = np.stack([arrows.U, arrows.V], axis=1)
    velocity = barycentric(moment.field.velocity)
    np.testing.assert_allclose(np.linalg.norm(direction, axis=1), 1)
    np.testing.assert_allclose((direction * velocity).sum(axis=1), np.linalg.norm(velocity, axis=1))
    np.testing.assert_allclose(arrows.get_array(), np.log10(np.linalg.norm(velocity, axis=1)))
    assert {t.get_text() for t in given.texts} == {"No", "Never", "Yes"}
    assert len(plot_simplex(moment.field, bar=False).lines) == 1, "no path, no lines but the moment"


def test_simplex_moments_share_one_scale_and_the_path(data, flow, study):
    assert [m.title for m in data.simplex] == ["at the start", "at the trough", "back at its start"]
    given = new_axes(3)
    assert plot_simplex_moments(data.simplex, given) == given
    norms = {(c.norm.vmin, c.norm.vmax) for ax in given for c in ax.collections if isinstance(c, Quiver)}
    assert len(norms) == 1
    for m, u in zip(
        data.simplex, (flow.start_margin, study.main.trough.margin, study.main.last_return.margin), strict=True
    ):
        np.testing.assert_allclose(m.field.here, simplex_path(flow, TRIO, [u])[0], atol=1e-9)
        np.testing.assert_array_equal(m.walked[-1], m.ahead[0])
        assert m.field.margin == pytest.approx(u)


def test_simplex_field_refuses_other_tokens(flow):
    for tokens in ([1, 0, 2], [0, 1, 1], [0, 1]):
        with pytest.raises(ValueError, match="tokens must be y"):
            simplex_field(flow.model, flow.loss, tokens)
    with pytest.raises(ValueError, match="divisions must be at least 2, got 1"):
        simplex_grid(1)


# ---- (c) phase diagram


def exact_at(W, kappa):
    m = model()
    turned_model = UnconstrainedFeatures.single_token(W, m.h, *m.single_pair)
    return ExactFlow(turned_model, get("dpo", beta=BETA), 1.0, float(kappa)).displacement()


def test_phase_diagram_against_exact_flows_at_random_cells(data):
    phase, W = data.phase, turned(model(), COSINES)
    rng = np.random.default_rng(1)
    fallen = 0
    for a, k in zip(rng.integers(len(COSINES), size=60), rng.integers(len(RATIOS), size=60), strict=True):
        record = exact_at(W[a], RATIOS[k])
        # The grid of 241 points per path: 0.2 % of the depth + 1e-4 nats, 5e-4 of the probability.
        assert phase.depth[a, k] == pytest.approx(record.depth, rel=2e-3, abs=1e-4)
        assert phase.largest_drop[a, k] == pytest.approx(record.largest_drop, abs=5e-4)
        fallen += record.depth < -0.1
    assert 15 < fallen < 55, "both sides of the boundary must be met"


def test_boundaries_separate_what_they_say(data):
    phase, W = data.phase, turned(model(), COSINES)
    later = 0
    for a in range(0, len(COSINES), 6):
        if np.isfinite(phase.kappa_any[a]):
            assert exact_at(W[a], 0.99 * phase.kappa_any[a]).status == "none"
            assert exact_at(W[a], 1.01 * phase.kappa_any[a]).status == "transient"
        later += 1
    assert later >= 8
    at_once = 0
    for i in range(0, len(phase.curve_cosine), 30):
        (w,) = turned(model(), [phase.curve_cosine[i]])
        star = phase.kappa_star[i]
        if np.isfinite(star):
            assert exact_at(w, 0.999 * star).initial_rate > 0 > exact_at(w, 1.001 * star).initial_rate
            at_once += 1
        else:
            assert exact_at(w, 1e6).initial_rate > 0
        assert phase.r_max[i] == pytest.approx(exact_at(w, 1.0).r_max)
    assert at_once >= 4


def test_turned_keeps_length_and_plane():
    m = model()
    W = turned(m, [-0.5, 0.3, 0.9])
    plus, minus = m.single_pair
    for c, w in zip([-0.5, 0.3, 0.9], W, strict=True):
        assert np.linalg.norm(w[minus]) == pytest.approx(np.linalg.norm(m.W[minus]))
        assert w[minus] @ w[plus] == pytest.approx(c * np.linalg.norm(w[minus]) * np.linalg.norm(w[plus]))
        assert np.linalg.matrix_rank(np.stack([w[minus], m.W[minus], m.W[plus]]), tol=1e-9) == 2
        np.testing.assert_array_equal(np.delete(w, minus, axis=0), np.delete(m.W, minus, axis=0))
    own = float(W[0][plus] @ m.W[minus] / np.linalg.norm(m.W[plus]) / np.linalg.norm(m.W[minus]))
    np.testing.assert_allclose(turned(m, [own])[0], m.W, atol=1e-12)
    with pytest.raises(ValueError, match=r"cosines must be .* in \[-1, 1\]"):
        turned(m, [1.2])
    parallel = geometry()
    parallel[1] = 2 * parallel[0]
    with pytest.raises(ValueError, match="must span a plane"):
        turned(UnconstrainedFeatures.single_token(parallel, m.h, 0, 1), [0.5])


def test_phase_figure(data):
    (given,) = new_axes()
    assert plot_phase(data.phase, given) is given
    drawn = lines(given)
    m = model()
    own = m.W[0] @ m.W[1] / np.linalg.norm(m.W[0]) / np.linalg.norm(m.W[1])
    np.testing.assert_allclose(drawn["the scenario"][0].get_xydata()[0], [own, KAPPA])
    (star,) = [line for label, group in drawn.items() for line in group if "kappa^*" in label]
    finite = np.isfinite(data.phase.kappa_star)
    assert finite.any()
    assert not finite.all()
    np.testing.assert_array_equal(star.get_ydata()[finite], data.phase.kappa_star[finite])
    (dashed,) = [line for label, group in drawn.items() for line in group if "sooner or later" in label]
    np.testing.assert_array_equal(dashed.get_ydata(), data.phase.kappa_any)
    assert given.get_yscale() == "log"
    # The line r_max = 1 appears where the diagram reaches it.
    assert not any("r_{" in label for label in drawn)
    wide = plot_phase(phase_diagram(m, [0.1, 1.0, 10.0], np.linspace(-0.9, 0.9, 5), KAPPA))
    (line,) = [line for label, group in lines(wide).items() for line in group if "r_{" in label]
    x = float(line.get_xdata()[0])
    assert exact_at(turned(m, [x - 0.02])[0], 1.0).r_max <= 1 + 1e-9 < exact_at(turned(m, [x])[0], 1.0).r_max


# ---- (d) who gains


def test_roles_are_a_matter_of_meaning():
    assert [role(t, "No", "Never") for t in ("No", "Never", " No", "yes", "Maybe")] == [
        "preferred", "dispreferred", "benign", "catastrophic", "neutral",
    ]  # fmt: skip
    assert [role(t, "Yes", "No") for t in (" Yes", "Nope")] == ["benign", "catastrophic"]
    assert role("Yes", "Maybe", "Never") == "neutral"
    assert {token_color(t) for t in TOKENS} >= set(WORD_COLORS.values())


def test_gains_bars(study, flow):
    record = gains(flow, study.main)
    given = new_axes(3)
    assert plot_gains(record, given) == given
    bars = [p.get_width() for p in given[1].patches]
    np.testing.assert_allclose(bars, record.log_change)
    dots = given[0].collections[-1].get_offsets()
    np.testing.assert_allclose(dots[:, 0], record.alignment)
    assert (np.diff(record.alignment) <= 0).all()
    assert [t.get_text() for t in given[0].get_yticklabels()] == [shown(t) for t in record.tokens]
    W = model().W
    for i, name in enumerate(record.tokens):
        z = TOKENS.index(name)
        assert record.alignment[i] == pytest.approx(W[z] @ (W[0] - W[1]))
        assert record.start[i] == pytest.approx(model().next_token_log_probs()[z])
    widths = np.array([p.get_width() for p in given[2].patches])
    np.testing.assert_allclose(widths[: len(TOKENS)], np.exp(record.trough) - np.exp(record.start))
    np.testing.assert_allclose(widths[len(TOKENS) :], np.exp(record.end) - np.exp(record.start))
    assert given[1].patches[0].get_facecolor() == mpl.colors.to_rgba(ROLE_COLORS[record.roles[0]])
    # The trough's gainers in the summary are those of the bars.
    rise = np.exp(record.trough) - np.exp(record.start)
    assert record.tokens[int(rise.argmax())] == study.main.gainers_at_trough[0].name == "Yes"
    assert record.roles[0] == "catastrophic"
    assert 0.9 < record.rank_correlation <= 1
    assert len(plot_gains(record)) == 3


# ---- (f) losses


def test_stops_of_losses_lie_on_the_common_path(study, flow):
    record = loss_marks(flow, study.main, study.losses, points=50)
    (given,) = new_axes()
    assert plot_losses(record, given) is given
    curve = given.lines[0]
    np.testing.assert_array_equal(curve.get_xdata(), record.margin)
    np.testing.assert_array_equal(curve.get_ydata(), record.log_prob)
    stops = given.lines[2:]
    assert len(stops) == len(study.losses)
    for line, row in zip(stops, study.losses, strict=True):
        x, y = line.get_xydata()[0]
        # Each row was computed by a flow of its own loss, the curve by DPO's.
        assert y == pytest.approx(flow.log_probs_at_margin([x])[0, 0], abs=1e-9)
        if np.isfinite(row.stop_margin):
            assert (x, y) == (row.stop_margin, row.log_prob_at_end)
        else:
            assert x == record.margin[-1]
            assert "never stops" in line.get_label()
    assert plot_losses(record).get_legend() is not None


# ---- (e) predictions


def flows_of_every_status() -> dict[str, ExactFlow]:
    m = model()
    beyond = m.with_parameters(m.W, 3 * m.H)  # its margin lies beyond IPO's minimiser
    return {
        "transient": ExactFlow(m, get("dpo"), 1.0, KAPPA),
        "none": ExactFlow(m, get("dpo"), 1.0, 1e-3),
        "permanent": ExactFlow(m, get("ipo", tau=0.1), 1.0, KAPPA),
        "frozen": ExactFlow(m, get("dpo"), 0.0, 1.0),
        "backwards": ExactFlow(beyond, get("ipo", tau=2.0), 1.0, 1.0),
        "stationary": ExactFlow(m, get("slic", delta=0.5), 1.0, 1.0),
    }


@pytest.mark.parametrize("kind", flows_of_every_status())
def test_prediction_of_every_status(kind, tmp_path):
    flow = flows_of_every_status()[kind]
    record = flow.displacement()
    data = forecast(flow, record)
    given = new_axes(2)
    assert plot_prediction(flow, record, axes=given) == given
    curves = given[0].lines[: len(data.tokens)]
    for i, (line, name) in enumerate(zip(curves, data.tokens, strict=True)):
        z = TOKENS.index(name)
        np.testing.assert_allclose(line.get_ydata(), flow.log_probs_at_margin(data.margin)[:, z], atol=1e-9)
        assert i > 1 or z == flow.model.single_pair[i]
    assert data.margin[0] == flow.start_margin
    assert kind == "stationary" or data.margin[-1] != data.margin[0]
    np.testing.assert_allclose([p.get_width() for p in given[1].patches], data.alignment)
    np.testing.assert_allclose(data.alignment, flow.alignment[[TOKENS.index(t) for t in data.bars]])
    assert (np.diff(data.alignment) <= 0).all()
    assert {"No", "Never"} < set(data.bars)
    title = given[0].get_title("left")
    assert rf"$\kappa={record.kappa:.3g}$".replace("inf", r"\infty") in title
    assert {"none": "no displacement", "stationary": "nothing moves"}.get(record.status, record.status) in title
    assert given[0].get_xlabel().endswith("falling") == (kind == "backwards")
    path = save_prediction(flow, record, tmp_path / f"{kind}.png")
    assert imread(path).shape[2] == 4


def test_prediction_names_and_formats(tmp_path):
    flow = ExactFlow(model(), get("dpo"), 1.0, KAPPA)
    record = flow.displacement()
    named = plot_prediction(flow, record, [f"${z}_" for z in range(len(TOKENS))])
    labels = [t.get_text() for t in named[1].get_yticklabels()]
    assert r"\$0_" in labels, "a token's dollar sign is not mathematics"
    with pytest.raises(ValueError, match="names must label all 16 tokens, got 2"):
        plot_prediction(flow, record, ["a", "b"])
    for suffix, magic in (("svg", b"<?xml"), ("pdf", b"%PDF")):
        assert save_prediction(flow, record, tmp_path / f"x.{suffix}").read_bytes().startswith(magic)
    with pytest.raises(ValueError, match=r"must end in \.png, \.svg or \.pdf, got .*x\.gif"):
        save_prediction(flow, record, tmp_path / "x.gif")
    assert not (tmp_path / "x.gif").exists()


def test_shown_names_are_visible_and_plain():
    assert shown(" No") == "\N{OPEN BOX}No"
    assert shown("a$b$") == r"a\$b\$"
    assert shown("\n") == "\N{REPLACEMENT CHARACTER}"
    assert shown("") == "\N{EMPTY SET}"


# ---- files


def test_save_figures_writes_pictures_tables_and_a_record(study, data, tmp_path):
    before = dict(mpl.rcParams)
    paths = save_figures(study, tmp_path / "out")
    assert dict(mpl.rcParams) == before, "drawing must leave matplotlib's settings alone"
    names = {p.name for p in paths}
    assert {p.name for p in (tmp_path / "out").iterdir()} == names, "nothing temporary is left"
    for stem in ("log_probs", "simplex", "phase", "gains", "losses"):
        image = imread(tmp_path / "out" / f"{stem}.png")
        assert image.shape[1] >= 1200
        assert 0.001 < (image[..., :3].mean(axis=2) < 0.95).mean() < 0.9, "neither empty nor full"
        assert (tmp_path / "out" / f"{stem}.svg").read_text().rstrip().endswith("</svg>")
    tables = data.tables()
    assert {f"{t}.csv" for t in tables} < names
    for stem, table in tables.items():
        with (tmp_path / "out" / f"{stem}.csv").open(newline="") as f:
            header, *rows = csv.reader(f)
        assert header == list(table)
        for column, (key, values) in zip(zip(*rows, strict=True), table.items(), strict=True):
            if isinstance(values[0], str):
                assert list(column) == values
            else:
                np.testing.assert_array_equal(np.array(column, dtype=float), values, err_msg=f"{stem}: {key}")
    about = json.loads((tmp_path / "out" / "figures.json").read_text())
    assert about["parameters"]["kappa"] == KAPPA
    assert set(about["files"]) | {"figures.json"} == names
    assert set(about["captions"]) == {"log_probs", "simplex", "phase", "gains", "losses"}


def test_tables_hold_the_arrays(data, study):
    tables = data.tables()
    exact = [i for i, m in enumerate(tables["log_probs"]["method"]) if m == "exact"]
    np.testing.assert_array_equal(np.array(tables["log_probs"]["ln pi(Yes)"])[exact], data.log_probs.log_probs[:, 2])
    simulated = [tables["log_probs"]["method"].count(c.method) for c in study.curves[1:]]
    assert simulated == [len(c.times) for c in study.curves[1:]]
    np.testing.assert_array_equal(
        np.reshape(tables["phase"]["depth_nats"], (len(COSINES), len(RATIOS))), data.phase.depth
    )
    assert tables["phase"]["cosine"][: len(RATIOS)] == [COSINES[0]] * len(RATIOS)


def test_save_figures_wants_the_loss_of_the_study(study, tmp_path):
    with pytest.raises(ValueError, match=r"loss must be the study's, DPO\(beta=0\.1\), got DPO\(beta=0\.2\)"):
        save_figures(study, tmp_path, get("dpo", beta=0.2))
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_the_old_file(tmp_path):
    class Broken(Figure):
        def savefig(self, *args, **kwargs):
            super().savefig(*args, **kwargs)
            raise OSError("disk full")

    path = tmp_path / "x.png"
    path.write_text("old")
    with pytest.raises(OSError, match="disk full"):
        save_picture(Broken(), path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_equal_data_give_equal_files(tmp_path):
    flow = ExactFlow(model(), get("dpo"), 1.0, KAPPA)
    record = flow.displacement()
    for suffix in ("png", "svg"):
        first, second = (save_prediction(flow, record, tmp_path / f"{i}.{suffix}").read_bytes() for i in (1, 2))
        assert first == second


def test_plots_is_the_only_module_that_draws_and_needs_no_display():
    folder = Path(sims.__file__).parent
    drawing = set()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            imported = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            imported += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if any(name.split(".")[0] == "matplotlib" for name in imported):
                drawing.add(path.relative_to(folder).as_posix())
    assert drawing >= {f"plots/{name}.py" for name in ("_axes", "ches", "compare", "no_never_yes", "theorems")}
    assert all(path.startswith("plots/") for path in drawing)
    code = "import sys, sims.plots; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-W", "error", "-c", code], check=False).returncode == 0


def test_colours_can_be_told_apart():
    """Okabe and Ito's colours stay distinct without red-green vision (a deuteranope's confusion line, Vienot 1999)."""
    to_lms = np.array([[17.8824, 43.5161, 4.11935], [3.45565, 27.1554, 3.86714], [0.0299566, 0.184309, 1.46709]])
    deutan = np.array([[1, 0, 0], [0.494207, 0, 1.24827], [0, 0, 1]])
    seen = {}
    for name, colour in {**WORD_COLORS, **ROLE_COLORS}.items():
        rgb = np.array(mpl.colors.to_rgb(colour)) ** 2.2
        seen[colour] = (name, np.linalg.inv(to_lms) @ deutan @ to_lms @ rgb)
    assert len(seen) >= 5
    for (a, x), (b, y) in itertools.combinations(seen.values(), 2):
        assert np.linalg.norm(x - y) > 0.06, f"{a} and {b} look alike"


# ---- theorems


def test_panels_are_new_axes_of_one_figure():
    axes = panels(3, 2.0, 1.5, sharey=True)
    assert len({id(ax.figure) for ax in axes}) == 1
    assert len(axes) == 3
    np.testing.assert_allclose(axes[0].figure.get_size_inches(), (6.0, 1.5))
    axes[0].set_ylim(-3, 4)
    assert axes[2].get_ylim() == (-3, 4), "settings reach the axes"
    (one,) = panels(1)
    assert one.figure is not axes[0].figure


def test_a_law_draws_lines_and_circles_of_one_colour():
    x = np.linspace(-1, 1, 5)
    formula = {"first": (x, 2 * x), "": (x, -x)}
    measured = {"first": (x[::2], 2 * x[::2]), "alone": (x, x**2)}
    (given,) = new_axes()
    assert plot_law(formula, measured, given, "title", ("across", "up"), xlim=(-2, 2)) is given
    curves = {line.get_linestyle() + line.get_label(): line for line in given.lines}
    line, circles = curves["-first"], next(v for k, v in curves.items() if k == "None_measured")
    np.testing.assert_array_equal(line.get_ydata(), 2 * x)
    np.testing.assert_array_equal(circles.get_xydata(), np.transpose([x[::2], 2 * x[::2]]))
    assert line.get_color() == circles.get_markeredgecolor()
    assert circles.get_marker() == "o"
    alone = curves["Nonealone"]
    np.testing.assert_array_equal(alone.get_ydata(), x**2)
    assert alone.get_markeredgecolor() != line.get_color()
    assert curves["-_formula"].get_color() == BLACK, "the unnamed series"
    assert [t.get_text() for t in given.get_legend().get_texts()] == ["first", "alone"]
    assert (given.get_xlabel(), given.get_ylabel(), given.get_xlim()) == ("across", "up", (-2, 2))
    zero = [line for line in given.lines if set(line.get_ydata()) == {0}]
    assert len(zero) == 1, "the boundary of displacement"
    above = plot_law({}, {"": (x, x**2 + 1)})
    assert not [line for line in above.lines if set(line.get_ydata()) == {0}]
    assert above.get_legend() is None


def test_terms_stack_from_zero_to_their_sum():
    terms = {"up": np.array([2.0, 1.0]), "down": np.array([-3.0, -0.5]), "mixed": np.array([1.0, -2.0])}
    measured = np.array([0.0, -1.5])
    (given,) = new_axes()
    assert plot_terms(terms, measured, ["a", "b"], given, "title", ("x", "y")) is given
    spans = [sorted((p.get_y(), p.get_y() + p.get_height())) for p in given.patches]
    assert spans == [[0, 2], [0, 1], [-3, 0], [-0.5, 0], [2, 3], [-2.5, -0.5]]
    for i in range(2):  # what is above and what is below zero add up to the terms' sum
        ends = spans[i::2]
        assert max(e[1] for e in ends) + min(e[0] for e in ends) == pytest.approx(sum(t[i] for t in terms.values()))
    (dots,) = [line for line in given.lines if line.get_label() == "measured sum"]
    np.testing.assert_array_equal(dots.get_ydata(), measured)
    assert [t.get_text() for t in given.get_xticklabels()] == ["a", "b"]
    assert len({p.get_facecolor() for p in given.patches}) == 3
    assert plot_terms(terms, measured, ["a", "b"]).figure is not given.figure


def test_ledger_shows_every_residual():
    tried = {"autodiff": Tried(10, 1e-16, ""), "integrated": Tried(2, 0.0, "")}
    broken = {"hypothesis": "one", "broken_in": "data_set", "residual": 0.3, "shown": True, "reason": ""}
    reason = {"hypothesis": "none", "broken_in": None, "residual": 0.0, "shown": False, "reason": "always"}
    rows = (
        Row("first", "", "", "identity", 1e-12, tried, 2, (), (broken, reason), None),
        Row("second", "", "", "identity", 1e-8, {"simulated": Tried(5, 2e-9, "")}, 1, (), (), None),
    )
    (given,) = new_axes()
    assert plot_ledger(Ledger(rows, {}), {"first": [0.1, 0.2], "second": [0.5]}, given) is given
    drawn = {label: sorted(map(tuple, line[0].get_xydata())) for label, line in lines(given).items()}
    assert drawn == {
        "true, autodiff": [(1e-16, 0)],
        "true, integrated": [(1e-18, 0)],  # an exact zero, on a log axis
        "true, simulated": [(2e-9, 1)],
        "wrong copies": [(0.1, 0), (0.2, 0), (0.5, 1)],
        "a hypothesis dropped": [(0.3, 0)],
        "allowed": [(1e-12, 0), (1e-8, 1)],
    }
    assert [t.get_text() for t in given.get_yticklabels()] == ["first", "second"]
    assert given.get_xscale() == "log"
    assert "wrong copies" not in lines(plot_ledger(Ledger(rows, {})))
