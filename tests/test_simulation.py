"""The exact solution against simulation: automatic differentiation of the loss value, and torch's own optimisers."""

import numpy as np
import pytest

from sims import Optimizer, gradient_descent, gradient_flow, gradient_flow_batch
from theory import ExactDescent, ExactFlow, Sample, SolverError, UnconstrainedFeatures
from theory.losses import LOSSES, MarginLoss, get

# The generic example of every margin loss (theory.losses finds new ones by itself), without and with a kink.
GENERIC = [cls.examples()[min(1, len(cls.examples()) - 1)] for cls in LOSSES.values() if issubclass(cls, MarginLoss)]
SMOOTH = [e for e in GENERIC if not e.kinks(0.0)]
KINKED = [e for e in GENERIC if e.kinks(0.0)]
REGIMES = {"both": (1.0, 1.0), "W frozen": (0.0, 1.0), "h frozen": (1.0, 0.0), "any two rates": (0.3, 2.0)}
TIMES = np.array([0.0, 0.3, 1.0, 4.0])


def random_models(count: int, seed: int, V: int = 6, d: int = 3) -> list[UnconstrainedFeatures]:
    rng = np.random.default_rng(seed)
    return [
        UnconstrainedFeatures.single_token(rng.standard_normal((V, d)), rng.standard_normal(d), 0, 1)
        for _ in range(count)
    ]


def worst_difference(models, loss, rates, exact_rates=None, times=TIMES) -> tuple[float, float]:
    """Largest |exact - integrated| ln pi, and the largest change of ln pi (so that something moved)."""
    runs = gradient_flow_batch(models, loss, times, *rates, rtol=1e-13, atol=1e-14)
    worst = moved = 0.0
    for m, run in zip(models, runs, strict=True):
        integrated = run.next_token_log_probs()
        exact = ExactFlow(m, loss, *(exact_rates or rates)).log_probs(times)
        worst = max(worst, float(np.abs(exact - integrated).max()))
        moved = max(moved, float(np.abs(integrated[-1] - integrated[0]).max()))
    return worst, moved


@pytest.mark.parametrize("rates", REGIMES.values(), ids=REGIMES.keys())
@pytest.mark.parametrize("loss", SMOOTH, ids=repr)
def test_exact_against_integrated_on_200_models(loss, rates):
    worst, moved = worst_difference(random_models(200, seed=11), loss, rates)
    assert worst <= 1e-9
    assert moved > 0.05


@pytest.mark.parametrize("loss", KINKED, ids=repr)
def test_exact_against_integrated_before_the_kink(loss):
    models = random_models(20, seed=5)
    start = max(float(ExactFlow(m, loss).start_margin) for m in models)
    kept = [m for m in models if ExactFlow(m, loss).direction == 1]
    assert len(kept) >= 3, f"starts lie beyond the kink (largest {start:g})"
    for m in kept:
        flow = ExactFlow(m, loss)
        hit = flow.time_at_margin([flow.stop_margin - 0.02])[0]
        times = np.linspace(0, min(hit, 4.0), 4)
        run = gradient_flow(m, loss, times, rtol=1e-12, atol=1e-13)
        assert np.abs(run.next_token_log_probs() - flow.log_probs(times)).max() < 1e-9


def test_the_comparison_fails_on_a_wrong_rate_and_a_wrong_loss():
    models = random_models(3, seed=2)
    assert worst_difference(models, get("dpo"), (1.0, 1.0), exact_rates=(1.0, 1.001))[0] > 1e-6
    runs = gradient_flow_batch(models, get("dpo", beta=0.1), TIMES)
    wrong = ExactFlow(models[0], get("dpo", beta=0.1001)).log_probs(TIMES)
    assert np.abs(runs[0].next_token_log_probs() - wrong).max() > 1e-7


def test_a_start_away_from_the_reference():
    rng = np.random.default_rng(3)
    reference = (-0.4, -2.9)
    m = UnconstrainedFeatures.single_token(
        rng.standard_normal((6, 3)), rng.standard_normal(3), 0, 1, reference=reference
    )
    for loss in (get("dpo", beta=0.7), get("ipo", tau=0.3)):
        run = gradient_flow(m, loss, TIMES, rtol=1e-12, atol=1e-13)
        assert np.abs(run.next_token_log_probs() - ExactFlow(m, loss).log_probs(TIMES)).max() < 1e-9
        assert np.abs(run.log_probs()[-1] - run.log_probs()[0]) > 1e-2


@pytest.mark.parametrize(
    ("method", "momentum", "nesterov"),
    [("gradient", 0.0, False), ("heavy_ball", 0.9, False), ("nesterov", 0.9, True)],
)
@pytest.mark.parametrize("name", ["dpo", "ipo", "cdpo", "slic", "gpo_exponential"])
@pytest.mark.parametrize("rates", [(1.0, 1.0), (0.2, 3.0), (0.0, 1.0), (1.0, 0.0)])
def test_exact_descent_against_torch_sgd(method, momentum, nesterov, name, rates):
    loss = get(name)
    step = 0.002 if name == "ipo" else 0.02  # a stable step: an unstable iteration amplifies rounding
    for m in random_models(2, seed=7):
        run = gradient_descent(m, loss, Optimizer("sgd", step, momentum, nesterov), 200, *rates)
        exact = ExactDescent(m, loss, step, 200, method, momentum, *rates)
        assert np.abs(run.next_token_log_probs() - exact.log_probs()).max() <= 1e-10
        assert np.abs(run.margin()[-1] - run.margin()[0]) > 1e-4


@pytest.mark.parametrize("name", ["dpo", "ipo", "gpo_savage"])
def test_exact_sign_descent_against_autodiff(name):
    for m in random_models(3, seed=8):
        run = gradient_descent(m, get(name), Optimizer("sign", 0.01), 400)
        exact = ExactDescent(m, get(name), 0.01, 400, "sign")
        assert np.abs(run.next_token_log_probs() - exact.log_probs()).max() <= 1e-10
        assert np.abs(run.margin()[-1] - run.margin()[0]) > 1


def test_gradient_descent_converges_to_the_flow_at_order_one():
    (m,) = random_models(1, seed=9)
    flow = ExactFlow(m, get("dpo", beta=1.0)).log_probs([2.0])[0]
    steps = np.array([50, 100, 200, 400])
    errors = [
        np.abs(
            gradient_descent(m, get("dpo", beta=1.0), Optimizer("sgd", 2.0 / n), int(n)).next_token_log_probs()[-1]
            - flow
        ).max()
        for n in steps
    ]
    order = -np.polyfit(np.log(steps), np.log(errors), 1)[0]
    assert 0.95 < order < 1.05


def test_sequences_and_data_sets_share_prefixes_and_average_samples():
    """The general model, with a hand-made gradient step: central differences of the objective in every parameter."""
    rng = np.random.default_rng(4)
    samples = (Sample("p", ((0, 1, 2), (0, 3))), Sample("q", ((2,), (1, 1))))
    contexts = 6  # p: (), (0,), (0,1); q: (), (1,)
    W = rng.standard_normal((4, 3))
    H = {c: rng.standard_normal(3) for c in UnconstrainedFeatures.from_samples(W, np.ones((5, 3)), samples).contexts}
    m = UnconstrainedFeatures.from_samples(W, H, samples)
    assert len(m.contexts) == contexts - 1
    loss = get("ipo", tau=0.4)

    def objective(W, H):
        here = m.with_parameters(W, H)
        total = 0.0
        for s in here.samples:
            u = here.log_prob(s.preferred, s.prompt) - here.log_prob(s.dispreferred, s.prompt)
            total += (u - s.reference_margin - 1 / 0.8) ** 2
        return total / 2

    step = gradient_descent(m, loss, Optimizer("sgd", 1.0), 1)
    for name, x, moved in (("W", m.W, step.W[1]), ("H", m.H, step.H[1])):
        numeric = np.zeros_like(x)
        for i in np.ndindex(x.shape):
            d = np.zeros_like(x)
            d[i] = 1e-6
            up, down = ((x + d, m.H), (x - d, m.H)) if name == "W" else ((m.W, x + d), (m.W, x - d))
            numeric[i] = (objective(*up) - objective(*down)) / 2e-6
        assert np.abs(x - numeric - moved).max() < 1e-8
        assert np.abs(numeric).max() > 0.1


def test_the_batch_equals_one_by_one():
    models = random_models(4, seed=12)
    together = gradient_flow_batch(models, get("dpo", beta=0.5), TIMES, rtol=1e-12, atol=1e-13)
    for m, run in zip(models, together, strict=True):
        alone = gradient_flow(m, get("dpo", beta=0.5), TIMES, rtol=1e-12, atol=1e-13)
        assert np.abs(alone.W - run.W).max() < 1e-10
        assert np.abs(alone.H - run.H).max() < 1e-10


def test_optimisers_move_as_torch_moves():
    (m,) = random_models(1, seed=1)
    first = {o: gradient_descent(m, get("dpo"), Optimizer(o, 0.01), 1) for o in ("sgd", "sign", "rmsprop", "adam")}
    g_W, g_h = m.W - first["sgd"].W[1], m.H - first["sgd"].H[1]
    g_W, g_h = g_W / 0.01, g_h / 0.01
    # RMSprop's first step is lr g / (sqrt(0.01) |g| + 1e-8); Adam's is lr g/(|g| + 1e-8).
    for name, factor in (("sign", 1.0), ("rmsprop", 10.0), ("adam", 1.0)):
        for g, moved in ((g_W, first[name].W[1] - m.W), (g_h, first[name].H[1] - m.H)):
            large = np.abs(g) > 1e-6
            assert np.allclose(moved[large], -0.01 * factor * np.sign(g[large]), rtol=1e-3)
            assert large.any()


def test_failures_raise_instead_of_returning_less():
    (m,) = random_models(1, seed=6)
    with pytest.raises(SolverError, match="left float range at step"):
        gradient_descent(m, get("ipo"), Optimizer("sgd", 1e3), 500)
    with pytest.raises(ValueError, match="times must be finite, got inf"):
        gradient_flow(m, get("dpo"), [0.0, np.inf])
    with pytest.raises(ValueError, match="times must not decrease, got 2 followed by 1"):
        gradient_flow(m, get("dpo"), [0.0, 2.0, 1.0])
    with pytest.raises(ValueError, match="did you mean 'rmsprop'"):
        Optimizer("rmspop", 0.1)
    with pytest.raises(ValueError, match=r"lr must be in \(0, inf\), got 0"):
        Optimizer("sgd", 0)
    with pytest.raises(ValueError, match="model 1 differs from model 0"):
        gradient_flow_batch([m, random_models(1, seed=6, V=7)[0]], get("dpo"), [1.0])
    with pytest.raises(ValueError, match="lr_hidden"):
        gradient_flow(m, get("dpo"), [1.0], lr_hidden=-1.0)
