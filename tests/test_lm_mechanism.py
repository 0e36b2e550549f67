"""The mechanism: products with the feature kernel, forecasts beside a network, probes, the experiment in small."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from scipy.special import log_softmax
from scipy.stats import spearmanr

from sims.cli import main
from sims.descent import SignSGD
from sims.language.forecast import Course, Point, continued, forecast, nystrom, rates, straight
from sims.language.kernel import Features, final_gain, moves, signs, stream
from sims.language.model import new_model, save
from sims.language.preferences import PreferencePair, Runs, train_preferences
from sims.language.probing import pairs_of_samples, probe, probed
from sims.language.studies.beside import estimate
from sims.language.studies.courses import QuietSign, Stepper, courses
from sims.language.studies.mechanism_record import Mechanism
from sims.language.worlds.persona import PersonaWorld
from sims.plots.mechanism import plot_mechanism_theories, plot_phase_of_runs
from theory.losses import get

DPO = get("dpo", beta=0.1)
PROMPTS = [(1, 5, 9, 7), (1, 8, 6, 11, 12, 4), (1, 30, 5)]
PLUS, MINUS = 20, 21


@pytest.fixture(scope="module")
def lm():
    """A tiny network with weights large enough for its features to move together."""
    model = new_model([f"w{i}" for i in range(40)], d=16, layers=2, heads=2, seed=3)
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.network.parameters():
            p += 0.15 * torch.randn(p.shape, generator=rng)
    return model


@pytest.fixture(scope="module")
def runs(lm):
    return Runs(lm, len(PROMPTS))


@pytest.fixture(scope="module")
def a(lm):
    return (lm.W[PLUS] - lm.W[MINUS])[None].repeat(len(PROMPTS), 1)


STEPPERS = {"kernel": Stepper("sgd", 0.005), "line": Stepper("sign", 2e-4)}


@pytest.fixture(scope="module", params=STEPPERS)
def followed(lm, request):
    """Body-only training in small steps, observed often; the theory that is its own."""
    how = (DPO, STEPPERS[request.param], 40, "body", range(0, 41, 2))
    return request.param, courses(lm, PROMPTS, PLUS, MINUS, *how)[0]


# ---- the kernel


def test_a_product_is_that_of_the_whole_kernel(runs, a):
    features = Features(runs, PROMPTS)
    K = features.kernel()
    product = features.product(a).double().numpy()
    expected = np.einsum("bij,bj->bi", K, a.double().numpy())
    np.testing.assert_allclose(product, expected, rtol=0, atol=2e-5 * abs(expected).max())
    assert abs(product - expected[[1, 2, 0]]).max() > 0.01 * abs(expected).max(), "prompts have kernels of their own"
    assert np.linalg.eigvalsh(K).min() > -1e-5 * K.max()
    scale = {name: torch.full_like(p, 3.0) for name, p in features.body.items()}
    np.testing.assert_allclose(features.product(a, scale), 3 * product, rtol=0, atol=1e-4 * abs(expected).max())
    with pytest.raises(ValueError, match="prompts must be one for each of 3 runs, got 2"):
        Features(runs, PROMPTS[:2])


def test_moves_are_the_kernel_on_a_and_on_h(runs, a):
    features = Features(runs, PROMPTS)
    K = features.kernel()
    h, found = moves(runs, PROMPTS, a)
    np.testing.assert_allclose(h, features.h.double().numpy(), atol=1e-6)
    for vector, product in ((a.double().numpy(), found[:, 0]), (h, found[:, 1])):
        expected = np.einsum("bij,bj->bi", K, vector)
        np.testing.assert_allclose(product, expected, rtol=0, atol=5e-5 * abs(expected).max())
    np.testing.assert_allclose(found[:, 2], features.sign_step(a).double().numpy(), rtol=1e-4, atol=1e-6)
    assert not moves(runs, PROMPTS, a, trained=False)[1].any()


@pytest.mark.parametrize("name", ["sgd", "sign"])
def test_a_training_step_moves_h_as_the_kernel_says(lm, runs, a, name):
    """The other route: a step of the optimiser itself on the loss."""
    pairs = [[PreferencePair(x, (PLUS,), (MINUS,))] for x in PROMPTS]
    lr = {"sgd": 1e-3, "sign": 1e-5}[name]
    trained = train_preferences(lm, pairs, DPO, Stepper(name, lr), 1, trained="body").runs
    moved = (trained.hidden(PROMPTS) - runs.hidden(PROMPTS)).double().numpy()
    features = Features(runs, PROMPTS)
    # At its own reference DPO's slope is beta / 2.
    expected = (features.product(a) * 0.05 if name == "sgd" else features.sign_step(a)).double().numpy() * lr
    np.testing.assert_allclose(moved, expected, rtol=0, atol=0.02 * abs(expected).max())
    other = (features.sign_step(a) if name == "sgd" else features.product(a)).double().numpy()
    cosine = (moved * other).sum() / np.linalg.norm(moved) / np.linalg.norm(other)
    assert cosine < 0.99, "a gradient step and a sign step differ"


def test_rounding_has_no_sign(lm):
    """The rows of all tokens but the pair have no gradient; plain sign descent moves them all the same."""
    pairs = [[PreferencePair(x, (PLUS,), (MINUS,))] for x in PROMPTS]

    class Plain(Stepper):
        def build(self, groups):
            return SignSGD([{"params": g["params"], "lr": self.lr} for g in groups], lr=self.lr)

    moved = {}
    for kind in (Stepper, Plain):
        after = train_preferences(lm, pairs, DPO, kind("sign", 1e-3), 3, trained="both").runs.W
        moved[kind] = set(np.nonzero((after - lm.W).abs().amax((0, 2)).numpy())[0])
    assert moved[Stepper] == {PLUS, MINUS}
    assert moved[Plain] > {PLUS, MINUS}
    assert signs(torch.tensor([[2.0, -1e-9, -0.5]])).tolist() == [[1.0, 0.0, -1.0]]
    assert isinstance(Stepper("sign", 1e-3).build([{"params": [torch.zeros(1, 2)], "rate": 1.0}]), QuietSign)


def test_the_stream_before_the_norm(lm, runs, a):
    x, K = stream(lm, PROMPTS[1])
    gain, h = final_gain(lm), runs.hidden(PROMPTS)[1].double().numpy()
    rms = np.sqrt(np.mean(x**2))
    np.testing.assert_allclose(gain * x / rms, h, atol=1e-5)
    # Kf = n' Kx n'^T + diag(x / rms)^2, the last from the norm's own weights.
    slope = gain[:, None] * (np.eye(len(x)) - np.outer(x, x) / rms**2 / len(x)) / rms
    whole = Features(runs, PROMPTS).kernel()[1]
    np.testing.assert_allclose(slope @ K @ slope.T + np.diag((x / rms) ** 2), whole, atol=1e-4 * abs(whole).max())


# ---- forecasts


def test_nystrom_is_exact_on_its_vectors():
    rng = np.random.default_rng(0)
    root = rng.standard_normal((7, 7))
    K, vectors = root @ root.T, rng.standard_normal((2, 7))
    found = nystrom(vectors, vectors @ K)
    np.testing.assert_allclose(found @ vectors.T, K @ vectors.T, atol=1e-10)
    assert np.linalg.matrix_rank(found) == 2
    assert np.linalg.eigvalsh(found).min() > -1e-10
    assert abs(found - K).max() > 0.1


def point(seed=0, V=9, d=6):
    rng = np.random.default_rng(seed)
    return Point(rng.standard_normal((V, d)), rng.standard_normal(d), 0, 1)


def test_a_straight_line_reaches_the_margin():
    p, rng = point(), np.random.default_rng(1)
    dh, dw = rng.standard_normal(6), rng.standard_normal(6)
    dh *= np.sign(p.a @ dh + 2 * dw @ p.h)
    u = float(p.a @ p.h + 0.1)
    there = straight(p, u, dh, dw)
    assert there.a @ there.h == pytest.approx(u)
    t = (there.h - p.h) @ dh / (dh @ dh)
    np.testing.assert_allclose(there.h - p.h, t * dh, atol=1e-12)
    np.testing.assert_allclose(there.W[0] - p.W[0], t * dw, atol=1e-12)
    np.testing.assert_allclose(there.W[2:], p.W[2:])
    with pytest.raises(ValueError, match="u must be a margin the line reaches"):
        straight(p, u, 0 * dh, 0 * dw)


def made_up(p, T=4, stream_kernel=None, head=True):
    """A course that stands at p, with margins made up by scaling W_+ and W_-; they rise where p's is positive."""
    rng = np.random.default_rng(2)
    w = np.stack([p.W[:2] * (1 + 0.2 * t) for t in range(T)])
    h = np.repeat(p.h[None], T, axis=0)
    body = rng.standard_normal((1, 3, len(p.h))).repeat(T, axis=0)
    body *= np.sign(body @ p.a)[..., None]  # a kernel raises the margin
    rows = np.array([[2 * p.h @ p.h, 2 * abs(p.h).sum()]]).repeat(T, axis=0) * head
    gain = rng.uniform(0.5, 1.5, len(p.h))
    x = 3.0 * p.h / gain
    scale = np.sqrt(np.mean((x / 3.0) ** 2))
    log_pi = np.stack([p.log_pi] * T)
    given = None if stream_kernel is None else (x, stream_kernel)
    return Course(p.W, h, w, log_pi, body, rows, 0, 1, gain * scale, given)


@pytest.mark.parametrize("trained", [False, True])
def test_the_stream_follows_the_gradient_of_the_margin(trained):
    """Against automatic differentiation of u in (x, g, W), with time in place of the margin."""
    rng = np.random.default_rng(4)
    root = rng.standard_normal((6, 6))
    course = made_up(next(p for p in map(point, range(20)) if p.a @ p.h > 0.2), 4, root @ root.T, trained)
    found = forecast(course, "stream", range(4))
    assert course.stream is not None
    x, K = course.stream
    x, g, W = (torch.tensor(v, requires_grad=True) for v in (x, course.gain, course.W))
    metric = torch.tensor(K)

    def slopes(_, y):
        parts = [torch.tensor(v, requires_grad=True) for v in (y[:6], y[6:12], y[12:].reshape(9, 6))]
        h = parts[1] * parts[0] / parts[0].square().mean().sqrt()
        u = (parts[2][0] - parts[2][1]) @ h
        dx, dg, dW = torch.autograd.grad(u, parts)
        return np.concatenate([(metric @ dx).numpy(), dg.numpy(), trained * dW.numpy().ravel()])

    start = np.concatenate([v.detach().numpy().ravel() for v in (x, g, W)])

    def margin_and_log_pi(y):
        h = y[6:12] * y[:6] / np.sqrt(np.mean(y[:6] ** 2))
        rows = y[12:].reshape(9, 6)
        return (rows[0] - rows[1]) @ h, log_softmax(rows @ h)

    for k in range(1, 4):
        event = lambda _, y, u=course.margin[k]: margin_and_log_pi(y)[0] - u  # noqa: E731
        event.terminal = True
        done = solve_ivp(slopes, (0, 50), start, events=event, rtol=1e-9, atol=1e-11)
        assert done.t_events[0].size
        np.testing.assert_allclose(found[k], margin_and_log_pi(done.y_events[0][0])[1], atol=1e-5)


def test_the_sphere_is_the_stream_that_moves_freely():
    """With Kx a multiple of the identity that drowns the norm's weights, the path is a great circle; it ends."""
    course = made_up(next(p for p in map(point, range(20)) if p.a @ p.h > 0.2), 4, 1e9 * np.eye(6), False)
    sphere = forecast(course, "sphere", range(4))
    np.testing.assert_allclose(sphere, forecast(course, "stream", range(4)), atol=1e-4)  # 100 times the solver's
    margins = sphere[:, 0] - sphere[:, 1]
    np.testing.assert_allclose(margins, course.margin, atol=1e-9)
    assert abs(sphere - forecast(course, "unconstrained", range(4))).max() > 1e-3
    beyond = replace(course, w=course.w * 1e3)
    goal = course.gain * (course.W[0] - course.W[1])
    pole = course.gain * goal / np.linalg.norm(goal) * np.linalg.norm(course.h[0] / course.gain)
    np.testing.assert_allclose(
        forecast(replace(beyond, w=np.concatenate([course.w[:1], beyond.w[1:]])), "sphere", [3])[0],
        log_softmax(course.W @ pole),
        atol=1e-6,
    )


def test_unconstrained_features_share_the_margin_as_measured():
    course = made_up(next(p for p in map(point, range(20)) if p.a @ p.h > 0.2))
    kappa = course.speed(False)[0] / float(course.a[0] @ course.a[0])
    expected = continued(course.at(0), float(course.margin[2]), 1.0, kappa).log_pi
    np.testing.assert_allclose(forecast(course, "unconstrained", [2])[0], expected, atol=1e-12)
    with pytest.raises(ValueError, match="theory must be one of"):
        forecast(course, "guess", [1])
    with pytest.raises(ValueError, match="knots must begin with 0"):
        forecast(course, "line", [1], knots=[1])
    with pytest.raises(ValueError, match="held must be"):
        forecast(course, "line", [1], held="h")
    with pytest.raises(ValueError, match="stream and gain must have been measured"):
        forecast(course, "stream", [1])
    with pytest.raises(ValueError, match="gain must be known"):
        forecast(replace(course, gain=None), "sphere", [1])


def test_shares_are_the_parts_of_the_margin_s_growth():
    course = made_up(point(0))
    for by_sign in (False, True):
        through_body = (course.a * course.body[:, 2 if by_sign else 0]).sum(axis=1)
        expected = through_body / (through_body + course.head[:, int(by_sign)])
        np.testing.assert_allclose(course.share(by_sign), expected, rtol=1e-12)


def test_without_a_trained_head_only_the_direction_matters(followed):
    theory, (course, *_) = followed
    how = {"signs": theory == "line", "knots": course.knots(8)}
    anew = forecast(course, theory, [20], **how)
    np.testing.assert_allclose(forecast(course, theory, [20], **how, held="share"), anew, atol=1e-9)
    assert abs(forecast(course, theory, [20], **how, held="direction") - anew).max() > 1e-3


def test_head_and_body_share_the_margin_as_the_network_does(lm):
    """Both trained: with the body's part of the margin's growth doubled or halved the forecast is clearly worse."""
    for course in courses(lm, PROMPTS, PLUS, MINUS, DPO, STEPPERS["kernel"], 40, "both", range(0, 41, 2))[0]:
        happened = course.log_pi[-1] - course.log_pi[0]

        def error(course, happened=happened):
            told = forecast(course, "kernel", [20], knots=course.knots(20))[0] - course.log_pi[0]
            return abs(told - happened).max() / abs(happened).max()

        assert error(course) < 0.6 * min(error(replace(course, body=course.body * f)) for f in (2.0, 0.5))


def test_what_is_measured_anew_follows_the_network(followed):
    """The experiment in small: the error falls with the pieces, and another prompt's kernel or step does not do."""
    theory, found = followed
    how = {"moments": [20], "signs": theory == "line"}
    errors = {n: [] for n in (1, 4, 20)}
    for course, stranger in zip(found, found[1:] + found[:1], strict=True):
        assert course.margin[-1] - course.margin[0] > 0.5
        happened = course.log_pi[-1] - course.log_pi[0]
        size = abs(happened).max()
        for n, kept in errors.items():
            told = forecast(course, theory, knots=course.knots(n), **how)[0] - course.log_pi[0]
            kept.append(abs(told - happened).max() / size)
        others = np.delete(np.arange(len(happened)), [PLUS, MINUS])
        assert spearmanr(told[others], happened[others])[0] > 0.99
        wrong = replace(course, body=stranger.body)
        told = forecast(wrong, theory, knots=course.knots(20), **how)[0] - course.log_pi[0]
        assert abs(told - happened).max() / size > 3 * errors[20][-1]
    assert max(errors[20]) < max(errors[4]) < max(errors[1])
    assert max(errors[20]) < max(errors[1]) / 5  # of first order in the pieces it would be a twentieth


@pytest.mark.parametrize(("name", "trained"), [("sgd", "both"), ("sign", "both"), ("sgd", "head"), ("sign", "body")])
def test_first_order_speeds_are_gradient_inner_products(lm, runs, name, trained):
    """Against <grad ln pi(z), step> over all parameters of the network."""
    course = courses(lm, PROMPTS[:1], PLUS, MINUS, DPO, Stepper(name, 1e-3), 1, trained, [0])[0][0]
    by_sign = name == "sign"
    body, head, through_body, through_head = rates(course, 0, "kernel", by_sign)
    one = Runs(lm, 1, trained=trained)

    def gradient(z):
        return one.gradient(one.say([[PROMPTS[0]]], [[(z,)]]).total[:, 0])

    step = {k: g - gradient(MINUS)[k] for k, g in gradient(PLUS).items()}
    step = {k: signs(s) if by_sign else s for k, s in step.items()}
    for z in (PLUS, MINUS, 5):
        expected = sum(float((g * step[k]).double().sum()) for k, g in gradient(z).items())
        assert body[z] + head[z] == pytest.approx(expected, rel=1e-3, abs=1e-4 * (through_body + through_head))
    growth = through_body + through_head
    assert growth == pytest.approx(float(course.speed(by_sign)[0] + course.head[0, int(by_sign)]), rel=1e-6)
    assert (through_body == 0) == (trained == "head")
    assert (through_head == 0) == (trained == "body")


@pytest.mark.parametrize("name", ["sgd", "sign"])
def test_a_first_fall_is_foretold(lm, name):
    """A likely token far along W_+ - W_- is planted: then y+ falls at once."""
    planted = lm.copy()
    with torch.no_grad():
        W = planted.network.get_output_embeddings().weight
        W[25] = W[PLUS] + 4 * (W[PLUS] - W[MINUS])
    fell = []
    for model in (lm, planted):
        how = (DPO, Stepper(name, {"sgd": 1e-3, "sign": 1e-6}[name]), 1, "body", [0])
        found, log_pi, _ = courses(model, PROMPTS, PLUS, MINUS, *how)
        for course, ln in zip(found, log_pi[:, :, PLUS], strict=True):
            fell.append(ln[1] < ln[0])
            assert (rates(course, 0, "kernel", name == "sign")[0][PLUS] < 0) == fell[-1]
    assert len(set(fell)) == 2
    assert sum(fell[3:]) > sum(fell[:3])


# ---- probes


@pytest.mark.parametrize("by_sign", [False, True])
def test_a_probe_is_the_first_order_change_per_nat(lm, by_sign):
    before = lm.fingerprint
    pairs = [PreferencePair(x, (PLUS,), (MINUS,)) for x in PROMPTS]
    found = probe(Runs(lm, 3), pairs, [[(z,) for z in range(4, 30)]] * 3, by_sign)
    observed = courses(lm, PROMPTS, PLUS, MINUS, DPO, Stepper("sgd", 1e-3), 1, "both", [0])[0]
    for course, row in zip(observed, found, strict=True):
        body, head, through_body, through_head = rates(course, 0, "kernel", by_sign)
        expected = ((body + head) / (through_body + through_head))[4:30]
        np.testing.assert_allclose(row, expected, rtol=0, atol=0.03 * abs(expected).max())
    assert lm.fingerprint == before


def test_probes_of_responses_of_several_tokens(lm):
    prompts = [lm.prompt("w1 w2"), lm.prompt("w7 w3 w4")]
    rng = np.random.default_rng(0)
    responses = [[(*map(int, rng.integers(4, 40, n)), lm.end) for n in (1, 2, 3, 2, 3, 4, 2, 3)] for _ in prompts]
    pairs = [PreferencePair(x, own[0], own[1]) for x, own in zip(prompts, responses, strict=True)]
    asked = [own[2:] for own in responses]
    how = (DPO, Stepper("sgd", 0.02), 20, "both", range(21), (0.5, 1.0, 1e9), (1, 10))
    for run in probed(lm, pairs, asked, *how):
        once, often = run["theories"]["probe x 1"], run["theories"]["probe x 10"]
        assert run["happened"][2] is None
        assert once[2] is None
        assert run["end"] > 1
        told, happened = often[-1][1], run["happened"][-1][0]
        assert abs(told - happened) < 0.1 * abs(happened)
        assert abs(told - happened) <= abs(once[-1][1] - happened)
        assert often[-1][0] > 0.9
    drawn, others = pairs_of_samples(lm, prompts, 2, 5, 6, seed=1)
    assert all(len({p.preferred, p.dispreferred, *own}) == 5 for p, own in zip(drawn, others, strict=True))
    with pytest.raises(ValueError, match="prompts must hold 1 that yield 30 different responses, got 0"):
        pairs_of_samples(lm, prompts[:1], 1, 30, 1, seed=1)


# ---- the experiment


@pytest.fixture(scope="module")
def call(tmp_path_factory):
    """The command's arguments, on an untrained model of the persona's vocabulary; the folder it writes to."""
    world, place = PersonaWorld(), tmp_path_factory.mktemp("mechanism")
    model = new_model(world.words(), d=16, layers=1, heads=2, max_length=64, seed=1)
    model.training.update({"what": {"world": "persona", **world.to_dict()}, "recipe": {"seed": 5}})
    path, out = str(save(model, place / "tiny")), place / "out"
    small = ["--prompts", "2", "--forecasts", "2", "--workers", "1"]
    return ["lm", "mechanism", "--fast", *small, "--model", path, "--out", str(out)], out


@pytest.fixture(scope="module")
def study(call):
    assert main(call[0]) == 0
    return Mechanism.from_dict(json.loads((call[1] / "mechanism.json").read_text())["result"])


def test_the_experiment(study):
    assert [(g.trained, g.optimizer) for g in study.groups] == [
        (part, name) for part in ("head", "body", "both") for name in ("sgd", "rmsprop")
    ]
    for g in study.groups:
        body = np.array(g.share)[:, 0]
        inside = {"head": body == 0, "body": body == 1, "both": (body > 0) & (body < 1)}
        assert inside[g.trained].all()
        if g.trained == "head":  # E5: never falls
            assert not g.displaced
            assert min(g.change) > 0
            assert min(g.points["slope"]) > 0
        assert g.foretold("measured_kernel") == 2
        assert len(g.r_max) == 2
    moments, agree, _ = study.phase()
    assert agree >= 0.9 * moments
    for name, counts in study.first.items():
        assert counts["fell"] + counts["rose"] == counts["fell, kernel"] + counts["rose, kernel"] == 2 * 2, name
    tokens, responses = study.beside
    rank = {k: places[-1]["rank"][0] for k, places in tokens.theories.items()}
    assert rank["kernel x 16"] > 0.97
    assert rank["kernel x 16"] > max(rank["unconstrained"], rank["kernel x 1"])
    assert responses.what == "responses"
    assert responses.theories["probe x 16"][-1]["rank"][0] > 0.9


def test_the_command_prints_writes_and_resumes(call, study, capsys, monkeypatch):
    monkeypatch.setattr("sims.language.studies.mechanism.courses", None)
    monkeypatch.setattr("sims.language.studies.mechanism.probed", None)
    before = (call[1] / "mechanism.json").read_text()
    assert main(call[0]) == 0, "nothing is computed twice"
    assert (call[1] / "mechanism.json").read_text() == before
    printed = capsys.readouterr().out
    assert all(words in printed for words in (str(study), "phase diagram", "r_max", "probe x 16"))
    assert {f.name for f in call[1].glob("*.png")} == {"mechanism.png", "mechanism_theories.png"}
    again = Mechanism.from_dict(json.loads(json.dumps(study.to_dict())))
    assert again.to_dict() == study.to_dict()
    assert main([*call[0], "--bases", "1"]) == 2
    assert main([*call[0], "--prompts", "0"]) == 2
    assert "--prompts must be at least 1, got 0" in capsys.readouterr().err


def test_figures_show_the_data(study):
    axes = plot_mechanism_theories(study)
    drawn = next(line for line in axes[0].lines if line.get_label() == "the network")
    happened = [h[0] for h, n in zip(study.beside[0].happened[:-1], study.beside[0].runs, strict=False) if n > 1]
    np.testing.assert_allclose(np.asarray(drawn.get_ydata(), dtype=float), happened)
    ax = plot_phase_of_runs(study)
    offsets = [np.asarray(c.get_offsets()) for c in ax.collections]
    assert sum(map(len, offsets)) == study.phase()[0]


def test_intervals():
    one, other = np.zeros(50), np.ones(50)
    wide, narrow = estimate([one, other]), estimate([np.concatenate([one, other])] * 2)
    assert wide.value == narrow.value == 0.5
    assert wide.high - wide.low > 0.9
    assert narrow.high - narrow.low < 0.3
    assert np.isnan(estimate([np.array([np.nan])]).value)
