"""Preference training of stacked networks against plain loops over transformers' own networks, one run at a time."""

import copy

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

from sims.descent import Optimizer
from sims.language.model import LanguageModel, new_model
from sims.language.preferences import Objective, PreferencePair, Runs, batches, train_preferences
from sims.language.responses import log_probs, next_log_probs, states
from theory import SolverError
from theory.losses import DPO, LOSSES, SFT, Calibrated, Group, Pair, TokenLoss, Tokens, get

# transformers' Llama normalises and attends in float32 even where its weights are float64: rounding is float32's.
ROUNDING = 32 * 2.0**-23
CLOSE = {"rtol": ROUNDING, "atol": ROUNDING}

WORDS = "No Never Yes Maybe cat dog eats sleeps apples fish . ?".split()


def double(seed):
    """A tiny model; what of it can be is in float64."""
    lm = new_model(WORDS, d=16, layers=1, heads=2, max_length=16, seed=seed)
    network = lm.network.double()
    with torch.no_grad():  # louder than at its initialisation, so that gradients reach everything
        for p in network.parameters():
            p.mul_(5.0 if p.ndim == 2 else 1.0)
    return lm


@pytest.fixture(scope="module")
def models():
    return [double(0), double(1)]


@pytest.fixture(scope="module")
def pairs(models):
    """Two runs with three pairs each: lengths differ, prompts and prefixes are shared."""
    lm = models[0]

    def pair(prompt, preferred, dispreferred):
        return PreferencePair(lm.prompt(prompt), lm.encode(preferred), lm.response(dispreferred))

    first = [
        pair("cat eats ?", "No", "Never"),
        pair("dog", "Yes cat sleeps", "Yes cat"),
        pair("dog", "fish .", "Maybe"),
    ]
    second = [pair("cat", "Yes", "No ."), pair("dog eats apples ?", "No . No", "Never"), pair("", "Maybe", "Maybe Yes")]
    return [first, second]


# ---- the plain route: one network, one sequence, transformers' own forward


def rows(network, x, y):
    """(n, V) ln pi(. | x, y before) and (n, d) states."""
    out = network(input_ids=torch.tensor([[*x, *y]]), output_hidden_states=True)
    place = slice(len(x) - 1, len(x) + len(y) - 1)
    return torch.log_softmax(out.logits[0, place], -1), out.hidden_states[-1][0, place]


def said(network, x, y):
    """(n,) ln pi of the tokens of y."""
    return rows(network, x, y)[0][range(len(y)), list(y)]


def plain_pair(network, reference, own):
    """The Pair of log-probabilities of some pairs, with gradients."""
    a, b = (torch.stack([said(network, p[0], p[k]).sum() for p in own]) for k in (1, 2))
    with torch.no_grad():
        a_ref, b_ref = (torch.stack([said(reference, p[0], p[k]).sum() for p in own]) for k in (1, 2))
    n_w, n_l = (torch.tensor([float(len(p[k])) for p in own], dtype=torch.float64) for k in (1, 2))
    return Pair(a, b, a_ref, b_ref, n_w, n_l, torch.ones(len(own)))


def norm_ratios(network, own, head=1.0, body=1.0):
    """|grad ln pi(y-)| / |grad ln pi(y+)|, squares weighted by the rates of head and body."""
    norms = []
    for p in own:
        for y in p[1:]:
            network.zero_grad()
            said(network, p[0], y).sum().backward()
            squares = {n: float(q.grad.square().sum()) for n, q in network.named_parameters()}
            norms.append(sum((head if n == "lm_head.weight" else body) * x for n, x in squares.items()) ** 0.5)
    return torch.tensor(norms[1::2]).double() / torch.tensor(norms[::2]).double()


def group(network, reference, p):
    tokens = []
    for y in p[1:]:
        log_pi, _ = rows(network, p[0], y)
        with torch.no_grad():
            log_ref, hidden = rows(reference, p[0], y)
        at = range(len(y)), list(y)
        kl = torch.nn.functional.kl_div(log_pi, log_ref, log_target=True, reduction="none").sum(-1)
        tokens.append(Tokens(log_pi[at], log_ref[at], kl, log_pi.exp().square().sum(-1).log(), hidden))
    return Group(tuple(tokens), (1.0, 0.0))


def plain_loss(loss, network, reference, own):
    if isinstance(loss, TokenLoss):
        return torch.stack([loss.torch_value(group(network, reference, p)) for p in own]).mean()
    y = plain_pair(network, reference, own)
    return loss.torch_value(y).mean()


def dpo_by_hand(network, reference, own, beta=0.3):
    y = plain_pair(network, reference, own)
    return torch.log1p(torch.exp(-beta * ((y.a - y.a_ref) - (y.b - y.b_ref)))).mean()


def moved(networks, scale=0.05):
    """Copies with the same noise for the same seed: a place where the model is not its reference."""
    out = [copy.deepcopy(n) for n in networks]
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for network in out:
            for p in network.parameters():
                p.add_(scale * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return out


def objective_at(models, pairs, loss, networks, trained="both"):
    """The objective whose reference is the models, evaluated at other networks."""
    runs = Runs(models, trained=trained)
    objective = Objective(runs, pairs, loss)
    with torch.no_grad():
        for name, p in runs.parameters.items():
            p.copy_(torch.stack([dict(n.named_parameters())[name] for n in networks]))
    return runs, objective


# ---- what stacked runs say


def test_runs_say_what_their_models_say(models, pairs):
    runs = Runs(models)
    found = runs.log_probs(pairs)
    prompts = [own[1].prompt for own in pairs]
    for b, (lm, own) in enumerate(zip(models, pairs, strict=True)):
        for r in (1, 2):
            here = log_probs(lm, [p.prompt for p in own], [p[r] for p in own])
            np.testing.assert_allclose(found[b, :, r - 1], here, rtol=ROUNDING)
        np.testing.assert_allclose(runs.next_log_probs(prompts)[b], next_log_probs(lm, [prompts[b]])[0], rtol=ROUNDING)
        torch.testing.assert_close(runs.hidden(prompts)[b], states(lm, [prompts[b]], [(4,)])[0][0], **CLOSE)
        assert torch.equal(runs.W[b], lm.W)
        assert runs.model(b).fingerprint == lm.fingerprint
    assert abs(found[0] - found[1]).max() > 1, "the runs differ"


@pytest.mark.parametrize("name", list(LOSSES))
def test_every_loss_has_the_gradient_of_a_plain_pass(models, pairs, name):
    networks = moved([lm.network for lm in models])
    for loss in LOSSES[name].examples():
        runs, objective = objective_at(models, pairs, loss, networks)
        values = objective()
        gradient = runs.gradient(values)
        for b, (network, lm) in enumerate(zip(networks, models, strict=True)):
            expected = plain_loss(loss, network, lm.network, pairs[b])
            assert float(values[b].detach()) == pytest.approx(float(expected.detach()), rel=ROUNDING, abs=ROUNDING)
            network.zero_grad()
            expected.backward()
            scale = max(float(p.grad.abs().max()) for p in network.parameters())
            for parameter, p in network.named_parameters():
                torch.testing.assert_close(gradient[parameter][b], p.grad, rtol=ROUNDING, atol=ROUNDING * scale)
        if not (name == "grpo" and loss.eps < 1):
            assert max(float(g.abs().max()) for g in gradient.values()) > 1e-8


@pytest.mark.parametrize(("trained", "rates"), [("both", (1, 1)), ("head", (1, 0)), ((0.5, 2.0), (0.5, 2.0))])
def test_a_calibrated_loss_knows_the_norms_of_the_trained_gradients(models, pairs, trained, rates):
    networks = moved([lm.network for lm in models])
    runs, objective = objective_at(models, pairs, Calibrated(DPO(0.4)), networks, trained)
    gradient = runs.gradient(objective())
    for b, (network, lm) in enumerate(zip(networks, models, strict=True)):
        ratio = norm_ratios(network, pairs[b], *rates)
        y = plain_pair(network, lm.network, pairs[b])
        slope = 0.4 * torch.sigmoid(-0.4 * (y.a - y.b - y.a_ref + y.b_ref)).detach()  # d_w = d_l of DPO
        value = (-(ratio**0.5) * slope * y.a + slope * y.b / ratio**0.5).mean()
        network.zero_grad()
        value.backward()
        scale = max(float(p.grad.abs().max()) for p in network.parameters())
        for parameter, p in network.named_parameters():
            if parameter in gradient:
                torch.testing.assert_close(gradient[parameter][b], p.grad, rtol=ROUNDING, atol=ROUNDING * scale)
        assert float(ratio.log().abs().max()) > 0.05
    assert (set(gradient) == {"lm_head.weight"}) == (trained == "head")


HAND = {
    "ipo": (get("ipo", tau=0.3), lambda y: ((y.a - y.b - y.a_ref + y.b_ref) - 1 / 0.6) ** 2),
    "simpo": (
        get("simpo", beta=2.0, gamma=0.5),
        lambda y: torch.log1p(torch.exp(-(2.0 * (y.a / y.n_w - y.b / y.n_l) - 0.5))),
    ),
    "slic": (get("slic", delta=5.0), lambda y: torch.clamp(5.0 - (y.a - y.b), min=0)),
    "dpo+sft": (
        SFT(DPO(0.2), 0.5),
        lambda y: torch.log1p(torch.exp(-0.2 * (y.a - y.b - y.a_ref + y.b_ref))) - 0.5 * y.a,
    ),
}


@pytest.mark.parametrize("name", list(HAND))
def test_losses_written_by_hand(models, pairs, name):
    loss, formula = HAND[name]
    networks = moved([lm.network for lm in models])
    values = objective_at(models, pairs, loss, networks)[1]().detach()
    for b, (network, lm) in enumerate(zip(networks, models, strict=True)):
        expected = float(formula(plain_pair(network, lm.network, pairs[b])).mean().detach())
        assert float(values[b]) == pytest.approx(expected, rel=ROUNDING)


# ---- training


def plain_training(lm, own, name, lr, steps, trained, choices=None):
    """Log-probabilities (steps + 1, P, 2) and the network after training it alone by torch's optimiser."""
    network = copy.deepcopy(lm.network)
    ours = [
        p for n, p in network.named_parameters() if trained == "both" or (n == "lm_head.weight") == (trained == "head")
    ]
    kind = {"sgd": torch.optim.SGD, "rmsprop": torch.optim.RMSprop, "adam": torch.optim.Adam}.get(name)
    optimizer = kind(ours, lr=lr) if kind else None
    course = []
    for step in range(steps + 1):
        with torch.no_grad():
            course.append([[float(said(network, p[0], p[k]).sum()) for k in (1, 2)] for p in own])
        if step == steps:
            return np.array(course), network
        network.zero_grad()
        dpo_by_hand(network, lm.network, own if choices is None else [own[i] for i in choices[step]]).backward()
        if optimizer is None:
            with torch.no_grad():
                for p in ours:
                    p -= lr * p.grad.sign()
        else:
            optimizer.step()


RATES = {"sgd": 0.05, "sign": 1e-3, "rmsprop": 1e-4, "adam": 1e-3}


@pytest.mark.parametrize("trained", ["both", "head", "body"])
@pytest.mark.parametrize("name", list(RATES))
def test_stacked_training_is_that_of_plain_loops(models, pairs, name, trained):
    start = [lm.fingerprint for lm in models]
    found = train_preferences(
        models,
        pairs,
        DPO(0.3),
        Optimizer(name, RATES[name]),
        4,
        trained=trained,
        observe=lambda k, r: r.log_probs(pairs),
    )
    assert found.losses.shape == (4, 2)
    assert len(found.observed) == 5
    for b, lm in enumerate(models):
        course, network = plain_training(lm, pairs[b], name, RATES[name], 4, trained)
        np.testing.assert_allclose(np.array(found.observed)[:, b], course, rtol=ROUNDING)
        assert abs(course[-1] - course[0]).max() > 1e-3
        assert found.losses[0, b] == pytest.approx(np.log(2)), "the reference is the start"
        ours = dict(found.runs.model(b).network.named_parameters())
        for parameter, p in network.named_parameters():
            # Adaptive steps are as long as the rate, however small (and however rounded) a gradient is.
            torch.testing.assert_close(ours[parameter], p, rtol=ROUNDING, atol=1e-3 * RATES[name])
            still = torch.equal(ours[parameter], dict(lm.network.named_parameters())[parameter])
            assert still == (trained != "both" and (parameter == "lm_head.weight") != (trained == "head"))
    assert [LanguageModel(lm.network, lm.tokenizer).fingerprint for lm in models] == start, "the models are left alone"


def test_one_run_alone_and_one_model_for_all(models, pairs):
    both = train_preferences(models[0], pairs, DPO(0.3), Optimizer("adam", 1e-3), 3)
    alone = train_preferences(models[0], pairs[1:], DPO(0.3), Optimizer("adam", 1e-3), 3)
    np.testing.assert_allclose(both.losses[:, 1:], alone.losses, rtol=ROUNDING)
    for name, p in alone.runs.parameters.items():
        torch.testing.assert_close(both.runs.parameters[name][1], p[0], rtol=ROUNDING, atol=1e-6)


def test_factors_of_the_rate(models, pairs):
    """Under plain gradient descent a factor on the rate is a factor on the first step."""
    train = [
        train_preferences(models, pairs, DPO(0.3), Optimizer("sgd", 0.05), 1, trained=trained).runs
        for trained in ("both", (0.5, 2.0), (1.0, 0.0), "head")
    ]
    start = Runs(models).parameters
    full, half, factors, head = ({n: (p - start[n]).detach() for n, p in runs.parameters.items()} for runs in train)
    for name, step in full.items():
        factor = 0.5 if name == "lm_head.weight" else 2.0
        torch.testing.assert_close(half[name], factor * step, rtol=1e-6, atol=1e-12)
        assert torch.equal(factors[name], head[name])


def test_batches_are_epochs_in_an_order_of_the_seed():
    found = batches(7, 3, 9, seed=4)
    assert [len(c) for c in found] == [3, 3, 1] * 3
    epochs = [[k for c in found[i : i + 3] for k in c] for i in (0, 3, 6)]
    assert all(sorted(e) == list(range(7)) for e in epochs)
    assert len({tuple(e) for e in epochs}) == 3
    assert found == batches(7, 3, 9, seed=4) != batches(7, 3, 9, seed=5)
    assert batches(3, None, 2, 0) == [[0, 1, 2]] * 2


def test_training_in_batches_is_a_plain_loop_over_them(models, pairs):
    found = train_preferences(models, pairs, DPO(0.3), Optimizer("sgd", 0.05), 4, batch=2, seed=9)
    for b, lm in enumerate(models):
        course, _ = plain_training(lm, pairs[b], "sgd", 0.05, 4, "both", batches(3, 2, 4, 9))
        np.testing.assert_allclose(found.runs.log_probs(pairs)[b], course[-1], rtol=ROUNDING)


def test_a_run_that_diverges_is_an_error(models, pairs):
    with pytest.raises(SolverError, match="left float range at step"):
        train_preferences(models, pairs, get("ipo"), Optimizer("sgd", 1e300), 6)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m, p: {"pairs": p[:1]}, "pairs must hold equally many"),
        (lambda m, p: {"pairs": [p[0], p[1][:2]]}, r"got \[3, 2\]"),
        (lambda m, p: {"pairs": [[], []]}, "pairs must hold"),
        (lambda m, p: {"pairs": [[PreferencePair((1,), (4,), (4,))]] * 2}, "must differ"),
        (lambda m, p: {"pairs": [[PreferencePair((1,), (), (4,))]] * 2}, "preferred of a pair must hold"),
        (lambda m, p: {"pairs": [[PreferencePair((), (5,), (4,))]] * 2}, "prompt of a pair must hold"),
        (lambda m, p: {"pairs": [[PreferencePair((1,) * 20, (5,), (4,))]] * 2}, "16 tokens"),
        (lambda m, p: {"pairs": [[PreferencePair((1,), (999,), (4,))]] * 2}, "999"),
        (lambda m, p: {"trained": "tail"}, "tail"),
        (lambda m, p: {"trained": (1.0, -1.0)}, "trained"),
        (lambda m, p: {"trained": (0.0, 0.0)}, "trained"),
        (lambda m, p: {"steps": -1}, "steps"),
        (lambda m, p: {"batch": 0}, "batch"),
        (lambda m, p: {"models": []}, "models"),
        (lambda m, p: {"models": [m[0], new_model(WORDS, d=32, layers=1, heads=2)]}, "same shapes, number 1"),
    ],
)
def test_bad_arguments(models, pairs, change, words):
    given = {"models": models, "pairs": pairs, "loss": DPO(0.3), "optimizer": Optimizer("sgd", 0.1), "steps": 1}
    with pytest.raises(ValueError, match=words):
        train_preferences(**{**given, **change(models, pairs)})
