"""The outlook of a pair on a language model: its first step, the theory's path, how far it holds, texts, the command."""

import json

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from scipy.special import log_softmax
from scipy.stats import spearmanr

from sims.cli import main
from sims.language.forecast import nystrom
from sims.language.kernel import moves
from sims.language.model import LanguageModel, new_model, save, shipped
from sims.language.outlook import Question, ask, outlook
from sims.language.outlook.check import RATE, SHARE, Theory, checked, error_of
from sims.language.outlook.paths import local
from sims.language.outlook.step import Network, Weights, first_step, moved
from sims.language.preferences import PreferencePair, Runs, train_preferences
from sims.language.responses import states
from sims.language.studies.courses import Stepper
from sims.plots.outlook import plot_outlook
from theory import Sample, UnconstrainedFeatures
from theory.losses import get
from theory.rates import log_prob_rate

DPO = get("dpo", beta=0.1)
PROMPT = (1, 5, 9, 7)
PLUS, MINUS = 20, 21
STATEMENT = (
    'Is the following statement something you would say ? " If a better world can be reached , then cheating is fine "'
)


def stirred(network, size=0.15):
    """Weights large enough for features to move together; the same every time."""
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in network.parameters():
            p += size * torch.randn(p.shape, generator=rng)
    return network


@pytest.fixture(scope="module")
def lm():
    model = new_model([f"w{i}" for i in range(40)], d=16, layers=2, heads=2, seed=3)
    stirred(model.network)
    return model


@pytest.fixture(scope="module")
def persona():
    return shipped("persona")


def architecture(name, tokenizer):
    """A small network of another kind, with random weights."""
    import transformers

    common = dict(vocab_size=44, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4)
    common |= dict(num_key_value_heads=4, max_position_embeddings=32, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    config = {
        "gpt2": lambda: transformers.GPT2Config(
            vocab_size=44, n_embd=16, n_layer=2, n_head=4, n_positions=32, bos_token_id=1, eos_token_id=2
        ),
        "gemma2": lambda: transformers.Gemma2Config(**common, head_dim=4, final_logit_softcapping=3.0),
        "phi": lambda: transformers.PhiConfig(**common),
        "granite": lambda: transformers.GraniteConfig(**common, logits_scaling=3.0),
        "mixtral": lambda: transformers.MixtralConfig(**common, num_local_experts=2),
    }[name]()
    torch.manual_seed(0)
    network = stirred(transformers.AutoModelForCausalLM.from_config(config).eval())
    network.set_attn_implementation("eager")
    return LanguageModel(network, tokenizer)


def differences(network, question, step, size=1e-3):
    """d ln pi along a step by central differences; the step is made `size` nats of margin long by its first use."""
    with torch.no_grad():
        above, below = (question(moved(network.weights, step, sign * size)) for sign in (1, -1))
    return (above - below).numpy() / (2 * size)


# ---- the first step


@pytest.mark.parametrize("optimizer", ["sgd", "sign"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", "phi", "granite"])
def test_the_first_step_is_what_the_network_does(lm, kind, optimizer):
    """Forward mode against differences of the weights, for untied, tied, capped, biased and scaled logits."""
    model = lm if kind == "llama" else architecture(kind, lm.tokenizer)
    network = Network(model)
    question = network.next_token(PROMPT)
    first = first_step(network, question, PLUS, MINUS, optimizer)
    scale = 1 / sum(first.speeds)
    unit = Weights(*({name: scale * x for name, x in part.items()} for part in first.step))
    found = differences(network, question, unit, 1e-2)
    np.testing.assert_allclose(first.rates, found, atol=5e-3 * abs(found).max())
    assert bool(network.tied) == (kind in ("gpt2", "gemma2"))
    # The other optimiser's step, or a half of the weights, is another direction.
    other = first_step(network, question, PLUS, MINUS, {"sgd": "sign", "sign": "sgd"}[optimizer])
    assert abs(other.rates - found).max() > 0.02 * abs(found).max()
    assert abs(first.body / first.speeds[0] - found).max() > 0.02 * abs(found).max()


def test_without_a_forward_mode_differences_are_taken(lm):
    """Mixtral's grouped products have none: what is measured is then what a slope of the weights says."""
    network = Network(architecture("mixtral", lm.tokenizer))
    question = network.next_token(PROMPT)
    first = first_step(network, question, PLUS, MINUS, "sgd")
    # Another route: the gradient of every asked value times the step.
    at = Weights(*({n: p.clone().requires_grad_() for n, p in part.items()} for part in network.weights))
    values = question(at)
    for z in (PLUS, MINUS, 30):
        leaves = [(part, n) for k, part in enumerate(at) for n in part if n in first.step[k]]
        slopes = torch.autograd.grad(values[z], [part[n] for part, n in leaves], retain_graph=True, allow_unused=True)
        steps = [first.step[0 if part is at.body else 1][n] for part, n in leaves]
        expected = sum(float((g * s).sum()) for g, s in zip(slopes, steps, strict=True) if g is not None)
        assert first.body[z] + first.head[z] == pytest.approx(expected, rel=0.02, abs=0.005 * sum(first.speeds))


@pytest.mark.parametrize("trained", ["both", "body", "head"])
def test_products_are_those_of_the_stacked_kernel(persona, trained):
    """The shipped persona model: Kf a, Kf h and the sign step as `sims.language.kernel` has them."""
    prompt, (plus, minus) = persona.prompt(STATEMENT), map(persona.token, ("No", "Never"))
    network = Network(persona, trained)
    model = local(network, prompt, plus, minus, "sgd")
    signed = local(network, prompt, plus, minus, "sign")
    a = (persona.W[plus] - persona.W[minus])[None]
    h, (Ka, Kh, step) = (x[0] for x in moves(Runs(persona), [prompt], a, trained=trained != "head"))
    W = persona.W.double().numpy()
    np.testing.assert_allclose(model.point.log_pi, log_softmax(W @ h), atol=1e-5)
    difference = a[0].double().numpy()
    if trained != "head":
        # In the few coordinates: <W_z, Kf a> of all tokens, the speed of the margin, and the sign step.
        np.testing.assert_allclose(model.point.W @ model.kernel @ model.point.a, W @ Ka, atol=1e-4 * abs(W @ Ka).max())
        np.testing.assert_allclose(model.point.W @ model.kernel @ model.point.h, W @ Kh, atol=1e-4 * abs(W @ Kh).max())
        np.testing.assert_allclose(signed.point.W @ signed.dh, W @ step, atol=1e-4 * abs(W @ step).max())
        assert abs(W @ Kh - W @ Ka).max() > 0.1 * abs(W @ Ka).max(), "products that differ"
    body = difference @ Ka, difference @ step
    head = (2 * h @ h, 2 * abs(h).sum()) if trained != "body" else (0.0, 0.0)
    np.testing.assert_allclose([*model.speeds, *signed.speeds], [body[0], head[0], body[1], head[1]], rtol=1e-4)
    if trained == "both":
        assert model.kappa == pytest.approx(difference @ Ka / (difference @ difference), rel=1e-4)
        body_share = body[1] / (body[1] + head[1])
        assert body_share > 0.93 > 0.7 > body[0] / (body[0] + head[0]), "sign-like optimisers move the body"
    else:
        assert model.kappa == {"body": np.inf, "head": 0.0}[trained]


def test_rates_through_the_head_are_those_of_theorem_7(lm):
    """Sequences: the unembedding's part by automatic differentiation against the theory's inner products."""
    network, responses = Network(lm), [(20, 8), (21, 9, 4), (30, 8, 7), (20, 9)]
    first = first_step(network, network.responses(PROMPT, responses), 0, 1, "sgd")
    contexts = {}
    for y, found in zip(responses, states(lm, [PROMPT] * 4, responses), strict=True):
        contexts |= {("x", y[:k]): h.double().numpy() for k, h in enumerate(found)}
    sample = Sample("x", (responses[0], responses[1]))
    model = UnconstrainedFeatures.from_samples(lm.W.double().numpy(), contexts, [sample])
    for i, y in enumerate(responses):
        rate = log_prob_rate(model, DPO, y, lr_hidden=0.0)
        assert first.head[i] == pytest.approx(rate.total / 0.05, rel=1e-4), y  # DPO's slope at its reference
    assert log_prob_rate(model, DPO, responses[2]).theorem == "theorem_7"
    assert abs(first.body - first.head).min() > 0.05 * abs(first.head).max(), "two parts that differ"


def test_the_network_is_left_alone(lm):
    before = LanguageModel(lm.network, lm.tokenizer).fingerprint
    outlook(lm, ask(lm, "w1 w2", " w3", " w4"), optimizer="sign", margin=0.2)
    assert LanguageModel(lm.network, lm.tokenizer).fingerprint == before


def test_parts_of_the_weights(lm):
    """The head alone raises ln pi(y+) (exact_solution E5); the body alone needs no ratio to lower it."""
    question = ask(lm, "w1 w2 w1 w3", " w3", " w2")
    head, body = (outlook(lm, question, trained=part, margin=0.2) for part in ("head", "body"))
    assert (head.kappa, head.body_share, head.falls, head.critical_share) == (0.0, 0.0, "no", None)
    assert head.pair[0].rate == head.pair[0].head > 0
    assert (body.kappa, body.body_share, body.pair[0].head) == (np.inf, 1.0, 0.0)
    assert body.kappa_star == (0.0 if body.pair[0].rate < 0 else np.inf)
    assert not np.isnan(body.kappa_star_unconstrained)
    assert head.checked.ended == "asked"
    assert max(p.share_error for p in head.checked.points) < 1e-4, "with h at rest the path is the network's own"
    for found in (head, body):  # nothing is approximate here
        assert found.notes == ()
        assert found.deviation < 1e-4


# ---- the theory's path


@pytest.mark.parametrize("kind", ["llama", "phi", "granite"])
@pytest.mark.parametrize("trained", ["both", "body"])
def test_paths_are_the_flow_in_all_coordinates(lm, kind, trained):
    """Few coordinates and a bias carried as one more against numerical integration of h, the rows and the bias."""
    model = lm if kind == "llama" else architecture(kind, lm.tokenizer)
    network = Network(model, trained)
    ours = local(network, PROMPT, PLUS, MINUS, "sgd")
    head = {name: x.double().numpy() for name, x in network.weights.head.items()}
    W, b = head["weight"], head.get("bias", np.zeros(len(head["weight"])))
    scale = 1 / 3.0 if kind == "granite" else 1.0
    with torch.no_grad():
        h = network.states(network.weights.body, torch.tensor([PROMPT]))[0, -1]
    a = torch.as_tensor(W[PLUS] - W[MINUS]).float()
    hidden = lambda w: network.states(w.body, torch.tensor([PROMPT]))[0, -1]  # noqa: E731
    product = lambda v: network.change(network.weights, hidden, network.pull(network.weights, hidden, v))[1]  # noqa: E731
    K = nystrom(*(torch.stack(x).double().numpy() for x in ([a, h], [product(a), product(h)])))
    d, rate = len(h), float(trained == "both")

    def logits(y):
        rows, bias, x = W.copy(), b.copy(), y[:d]
        rows[[PLUS, MINUS]], bias[[PLUS, MINUS]] = y[d : 3 * d].reshape(2, d), y[3 * d :]
        return scale * (rows @ x + bias)

    def flow(_, y):
        x, difference = y[:d], y[d : 2 * d] - y[2 * d : 3 * d]
        rows = rate * scale * np.concatenate([x, -x])
        return np.concatenate([K @ difference * scale, rows, rate * scale * ("bias" in head) * np.array([1.0, -1.0])])

    start = np.concatenate([h.double().numpy(), W[PLUS], W[MINUS], b[[PLUS, MINUS]]])
    margin = lambda y: logits(y)[PLUS] - logits(y)[MINUS]  # noqa: E731
    until = lambda _, y: margin(y) - margin(start) - 4  # noqa: E731
    until.terminal = True  # type: ignore[attr-defined]
    end = solve_ivp(flow, (0, 1e3), start, rtol=1e-9, atol=1e-11, events=until).y[:, -1]
    found = ours.path("kernel", DPO, np.array([margin(start), margin(end)]))
    np.testing.assert_allclose(found[0], log_softmax(logits(start)), atol=1e-4)
    np.testing.assert_allclose(found[1], log_softmax(logits(end)), atol=1e-4)
    assert abs(found[1] - found[0]).max() > 2, "something moved"
    free = ours.path("unconstrained", DPO, np.array([margin(end)]))[0]
    assert abs(free - found[1]).max() > 0.1


@pytest.mark.parametrize("optimizer", ["sgd", "sign"])
@pytest.mark.parametrize("kind", ["llama", "phi", "granite"])
def test_the_path_begins_as_the_network_does(lm, kind, optimizer):
    """Two routes to the first rates: inner products of the theory, and the network's own step."""
    network = Network(lm if kind == "llama" else architecture(kind, lm.tokenizer))
    first = first_step(network, network.next_token(PROMPT), PLUS, MINUS, optimizer)
    ours = local(network, PROMPT, PLUS, MINUS, optimizer)
    name = {"sgd": "kernel", "sign": "line"}[optimizer]
    np.testing.assert_allclose(ours.point.log_pi, first.values, atol=1e-5)
    np.testing.assert_allclose(ours.rates(name, DPO, first.margin), first.rates, atol=1e-4)
    np.testing.assert_allclose(ours.speeds, first.speeds, rtol=1e-4)
    assert abs(ours.rates("unconstrained", DPO, first.margin) - first.rates).max() > 0.05


@pytest.mark.parametrize(("kind", "word"), [("gpt2", "one matrix"), ("gemma2", "capped at 3")])
def test_approximations_are_named_with_their_size(lm, kind, word):
    model = architecture(kind, lm.tokenizer)
    found = outlook(model, ask(model, "w1 w2 w1 w3", " w3", " w2"), margin=0.2)
    assert any(word in note for note in found.notes)
    # The prompt holds both tokens, so that rows of the one matrix move in both of its places.
    assert found.deviation is not None
    assert found.deviation > 1e-3
    assert any("%" in note for note in found.notes) == (found.deviation > 0.01)


def test_a_network_that_does_more_to_its_logits_is_noticed(lm):
    class Colder(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.config, self.base_model = inner, inner.config, inner.base_model

        def get_output_embeddings(self):
            return self.inner.get_output_embeddings()

        def forward(self, **given):
            said = self.inner(**given)
            said.logits = said.logits / 2
            return said

    found = outlook(LanguageModel(Colder(lm.network), lm.tokenizer), ask(lm, "w1 w2", " w3", " w4"), margin=0.2)
    assert any("the network does more" in note and "approximate" in note for note in found.notes)


# ---- against training


def train(model, prompt, plus, minus, optimizer, lr, steps, trained="both"):
    """(steps + 1, V) ln pi in actual training of the pair."""
    pairs = [[PreferencePair(tuple(prompt), (plus,), (minus,))]]
    look = lambda _, runs: runs.next_log_probs([prompt])[0]  # noqa: E731
    return np.stack(
        train_preferences(model, pairs, DPO, Stepper(optimizer, lr), steps, trained=trained, observe=look).observed
    )


@pytest.fixture(scope="module", params=["sgd", "sign"])
def trained(request, persona):
    """No over Never on the shipped model: the outlook, and training."""
    question = ask(persona, STATEMENT, "No", "Never")
    (plus,), (minus,) = question.responses
    lr, steps = {"sgd": (0.01, 110), "sign": (2e-5, 60)}[request.param]
    found = outlook(persona, question, optimizer=request.param)
    return found, train(persona, question.prompt, plus, minus, request.param, lr, steps), plus, minus


def test_it_says_falls_where_training_falls_and_not_where_it_does_not(trained):
    """The same pair, prompt and network: it falls under sign-like optimisers and not under gradient descent."""
    found, log_pi, plus, minus = trained
    change = log_pi[:, plus] - log_pi[0, plus]
    gained = log_pi[:, plus] - log_pi[:, minus] - found.margin
    within = (gained > 0.05) & (gained < found.checked.reach)
    assert within.sum() > 3
    if found.optimizer == "sign":
        assert found.falls == "at once"
        assert change[within].max() < 0
        assert change.min() < -0.2, "and deep, later"
        assert found.body_share > found.critical_share
        assert found.kappa > found.kappa_star
    else:
        assert found.falls == "no"
        assert change[within].min() > 0
        assert found.body_share < found.critical_share
        assert found.kappa < found.kappa_star
    # Unconstrained features say "never" both times.
    assert np.isinf(found.kappa_star_unconstrained)


def test_a_body_alone_that_lowers_it(lm):
    question = Question("", PROMPT, ((14,), (22,)), ("a", "b"), ("y+", "y-"))
    found = outlook(lm, question, optimizer="sign", trained="body", margin=0.2)
    assert (found.falls, found.kappa, found.kappa_star, found.critical_share) == ("at once", np.inf, 0.0, 0.0)
    change = train(lm, PROMPT, 14, 22, "sign", 1e-5, 5, "body")[:, 14]
    assert change[-1] < change[0]


def test_a_fall_that_comes_later(lm):
    """ln pi(y+) rises at first and is below its start soon after: foretold, and so in training."""
    prompt, plus, minus = (1, 12, 13, 14, 30), 16, 13
    found = outlook(lm, Question("", prompt, ((plus,), (minus,)), ("a", "b"), ("y+", "y-")), optimizer="sign")
    log_pi = train(lm, prompt, plus, minus, "sign", 1e-5, 60)
    gained, change = log_pi[:, plus] - log_pi[:, minus] - found.margin, log_pi[:, plus] - log_pi[0, plus]
    assert found.pair[0].rate > 0
    assert found.falls == "later"
    assert 0 < found.falls_at <= found.checked.reach
    assert change[gained < 0.15].min() >= 0 > change[gained > 0.25].max()
    assert "but later: below its start" in str(found)


def test_the_kernel_ranks_tokens_and_unconstrained_features_do_not(trained, persona):
    found, log_pi, plus, minus = trained
    change = log_pi[1] - log_pi[0]
    network = Network(persona)
    ours = local(network, ask(persona, STATEMENT, "No", "Never").prompt, plus, minus, found.optimizer)
    u = log_pi[1, plus] - log_pi[1, minus]
    names = {"sgd": "kernel", "sign": "line"}[found.optimizer], "unconstrained"
    own, free = (spearmanr(ours.path(name, DPO, np.array([u]))[0] - log_pi[0], change).statistic for name in names)  # type: ignore[union-attr]
    assert own > 0.99
    assert free < 0.75


def test_the_forecast_is_good_up_to_the_reach_and_worse_beyond(trained, persona):
    found, log_pi, plus, minus = trained
    assert found.checked.ended == "differs"
    network = Network(persona)
    ours = local(network, ask(persona, STATEMENT, "No", "Never").prompt, plus, minus, found.optimizer)
    name = {"sgd": "kernel", "sign": "line"}[found.optimizer]
    u = log_pi[:, plus] - log_pi[:, minus]
    error = {}
    for part in (0.5, 1.0, 3.0):
        k = int(np.argmin(abs(u - found.margin - part * found.checked.reach)))
        assert k > 0
        told = ours.path(name, DPO, u[[k]])[0]
        error[part] = error_of(told - log_pi[0], log_pi[k] - log_pi[0], np.exp(log_pi[k]))
    assert error[0.5] < error[1.0] < SHARE
    assert error[3.0] > 0.4 > 1.5 * error[1.0]


def test_a_wrong_forecast_reaches_nowhere(lm):
    network = Network(lm)
    question = network.next_token(PROMPT)
    first = first_step(network, question, PLUS, MINUS, "sgd")
    right = Theory("kernel", DPO, first, local(network, PROMPT, PLUS, MINUS, "sgd"))

    def reach(theory, end=3.0):
        return checked(network, question, "sgd", theory, np.exp, end, [], False)

    good = reach(right)
    assert good.reach > 0.3
    assert reach(Theory("unconstrained", DPO, first, right.model)).reach < 0.2 * good.reach
    near = reach(right, end=good.reach / 2)
    assert (near.ended, near.reach) == ("asked", good.reach / 2)
    points = good.points
    assert all(p.agrees == (p.rate_error <= RATE and p.share_error <= SHARE) for p in points if p.gained > 0)
    assert max(p.gained for p in points if p.agrees) == good.reach
    # The pair exchanged: the margin falls along this step.
    back = first_step(network, question, MINUS, PLUS, "sgd")
    wrong = type(first)(first.values, first.body, first.head, PLUS, MINUS, back.step)
    turned = checked(network, question, "sgd", Theory("kernel", DPO, wrong, right.model), np.exp, 3.0, [], False)
    assert (turned.reach, turned.ended) == (0.0, "turns")


def test_responses_of_several_tokens(lm):
    """Rates of all, and which of them gain, against a tiny training step."""
    question = ask(
        lm, "w1 w2 w3", " w4 w5", " w6 w7 w8", candidates=[" w9 w5", " w4 w7", " w10"], samples=6, max_new_tokens=3
    )
    found = outlook(lm, question, optimizer="sign")
    assert (found.single, found.tokens, found.kappa, found.deviation) == (False, (), None, None)
    pairs = [[PreferencePair(question.prompt, *question.responses[:2])]]
    runs = train_preferences(lm, pairs, DPO, Stepper("sign", 2e-5), 1).runs
    prompts = [[question.prompt] * len(question.responses)]
    before, after = (r.say(prompts, [question.responses]).total[0].detach().numpy() for r in (Runs(lm), runs))
    change = (after - before) / (after[0] - before[0] - after[1] + before[1])
    rates = {g.ids: g.rate for g in found.responses}
    assert len(rates) == len(question.responses) >= 6
    np.testing.assert_allclose([rates[y] for y in question.responses], change, atol=0.02)
    assert [g.rate for g in found.responses] == sorted(rates.values(), reverse=True)
    by_text = {g.text: g for g in found.responses}
    assert by_text[" w4 w7"].shared == (1, 0)
    assert by_text[" w9 w5"].shared == (0, 0)
    assert by_text[" w4 w5"].role == "y+"
    assert found.falls == ("at once" if rates[question.responses[0]] < 0 else "no")


def test_candidates_beside_a_pair_of_tokens(lm):
    found = outlook(lm, ask(lm, "w1 w2", " w3", " w4", candidates=[" w3 w5", " w5"]), margin=0.2)
    assert found.single
    rates = {g.text: g.rate for g in found.responses}
    assert rates[" w3"] == pytest.approx(found.pair[0].rate, abs=1e-5)
    assert rates[" w5"] != pytest.approx(rates[" w3 w5"], abs=1e-3)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"optimizer": "adagrad"}, "optimizer"),
        ({"margin": 0.0}, "margin"),
        ({"top": 0}, "top"),
        ({"trained": "all"}, "trained"),
    ],
)
def test_arguments_out_of_their_domains(lm, arguments, word):
    with pytest.raises(ValueError, match=word):
        outlook(lm, ask(lm, "w1 w2", " w3", " w4"), **arguments)


def test_half_precision_and_halves_of_tied_weights_are_refused(lm):
    half = LanguageModel(lm.copy().network.to(torch.bfloat16), lm.tokenizer)
    with pytest.raises(ValueError, match="float32 or float64"):
        outlook(half, ask(half, "w1 w2", " w3", " w4"))
    with pytest.raises(ValueError, match="one matrix"):
        Network(architecture("gpt2", lm.tokenizer), "body")


def test_a_pair_that_no_step_tells_apart(lm):
    same = lm.copy()
    W = same.network.get_output_embeddings().weight
    with torch.no_grad():
        W[lm.token("w3")] = W[lm.token("w4")]
    with pytest.raises(ValueError, match="told apart"):
        outlook(same, ask(same, "w1 w2", " w3", " w4"), trained="body")


def test_a_loss_with_a_minimiser_ends_the_path(lm):
    found = outlook(lm, ask(lm, "w1 w2", " w3", " w4"), loss=get("ipo", tau=0.5))
    assert found.forecasts[0].gained[-1] == pytest.approx(1.0)  # 1 / (2 tau) above the reference
    assert found.checked.reach <= 1.0


# ---- texts


def pieces(words):
    """A model whose tokenizer knows a space before a word, as byte-level ones do."""
    from tokenizers import Tokenizer, models

    model = new_model(["a"], d=16, layers=1, heads=2)
    vocabulary = {"<unk>": 0, **{w: i + 1 for i, w in enumerate(words)}}
    tokenizer = Tokenizer(models.BPE(vocabulary, [tuple(m) for m in MERGES], unk_token="<unk>"))
    kind = type(model.tokenizer)
    return LanguageModel(model.network, kind(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="!"))


MERGES = [["N", "o"], [" ", "No"], ["x", "?"]]
LETTERS = [*"Nox? !yes", "No", " No", "x?"]


def test_a_spelling_with_one_token_is_suggested():
    model = pieces(LETTERS)
    found = ask(model, "x", "No", " yes")
    assert found.responses[0] == (LETTERS.index("No") + 1,)
    found = ask(model, "x", "  No", " No")
    assert any("' No' would be one," in note for note in found.notes)
    assert not found.single
    assert ask(model, "x", " No", "No").single


def test_a_boundary_that_moves_is_said():
    found = ask(pieces(LETTERS), "o x", "?", " No")
    assert any("the end of the prompt, 'x', is tokenised otherwise" in note for note in found.notes)
    assert found.responses[0] == (LETTERS.index("x?") + 1,)
    assert len(found.responses[1]) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("  ", "w1", "w2"), "prompt is empty"),
        (("w1", "", " w2"), "preferred is empty"),
        (("w1", " w2", " w2"), "must differ, both are ' w2'"),
        (("w1", " w2", " wolf"), r"dispreferred must be known to the model, ' wolf' makes the tokens \['<unk>'\]"),
        (("w1", " w2", "w3"), "' w3' would be known"),
        (("w1 " * 62 + "w1", " w2 w3", " w4"), "at most 64 tokens together, got 66"),
    ],
)
def test_texts_that_cannot_be_asked_about(lm, arguments, message):
    with pytest.raises(ValueError, match=message):
        ask(lm, *arguments)


def test_ends_and_chats(lm):
    found = ask(lm, "w1", " w2", " w3", eos=True)
    assert [y[-1] for y in found.responses] == [lm.end] * 2
    assert not found.single
    with pytest.raises(ValueError, match="has a chat template, this one has none"):
        ask(lm, "w1", " w2", " w3", chat=True)
    talking = LanguageModel(lm.network, type(lm.tokenizer)(tokenizer_object=lm.tokenizer.backend_tokenizer))
    talking.tokenizer.chat_template = "w9 {% for m in messages %}{{ m.content }}{% endfor %} w8 "
    assert talking.text(ask(talking, "w1", " w2", " w3", chat=True).prompt) == "w9 w1 w8"


# ---- the command


@pytest.fixture(scope="module")
def folder(lm, tmp_path_factory):
    return str(save(lm, tmp_path_factory.mktemp("outlook") / "model"))


def call(folder, *more):
    pair = ["--prompt", "w1 w2", "--preferred", " w3", "--dispreferred", " w4"]
    return main(["predict", "--model_name_or_path", folder, *pair, *more])


def test_the_command_answers_first(folder, capsys, tmp_path):
    figure = tmp_path / "f.svg"
    code = call(folder, "--figure", str(figure), "--candidate", " w5 w6")
    out, _ = capsys.readouterr()
    assert out.splitlines()[3].startswith("Will the log-probability of ' w3' fall when training starts?")
    assert figure.read_text().startswith("<?xml")
    assert call(folder, "--json", "--margin", "1") == code
    record = json.loads(capsys.readouterr().out)
    assert code == {"no": 0, "at once": 3, "later": 3}[record["falls"]]
    assert ("Yes, at once" in out) == (record["falls"] == "at once")
    assert record["pair"][0]["rate"] - record["pair"][1]["rate"] == pytest.approx(1, abs=1e-5)
    assert [p["agrees"] for p in record["checked"]["points"]].count(True) > 1


def test_names_that_trainers_use_are_understood(folder, capsys):
    call(folder, "--optimizer", "sign", "--json", "--margin", "0.2")
    sign = capsys.readouterr().out
    for optimizer in ("adam", "adamw", "rmsprop"):
        pair = ["--prompt", "w1 w2", "--chosen", " w3", "--rejected", " w4"]
        main(["predict", "--model", folder, *pair, "--optimizer", optimizer, "--json", "--margin", "0.2"])
        assert capsys.readouterr().out == sign
    assert json.loads(sign)["optimizer"] == "sign"


def test_who_else_may_be_asked_about_is_said(lm):
    hint = "--candidate TEXT or --samples 20"
    for candidates, asked in (((), False), ((" w5",), True)):
        text = str(outlook(lm, ask(lm, "w1 w2", " w3 w4", " w6", candidates=candidates), margin=0.2))
        assert (hint not in " ".join(text.split())) == asked
    assert hint not in str(outlook(lm, ask(lm, "w1 w2", " w3", " w4"), margin=0.2)), "all tokens were looked at"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["predict", "--preferred", "a", "--dispreferred", "b"], "one of the two"),
        (
            ["predict", "x.npz", "--model_name_or_path", "m", "--preferred", "a", "--dispreferred", "b"],
            "one of the two",
        ),
        (
            ["predict", ".", "--prompt", "p", "--chosen", "a", "--rejected", "b"],
            "give a language model as --model_name_or",
        ),
        (["predict", "x.npz", "--prompt", "p", "--preferred", "a", "--dispreferred", "b"], "--prompt goes with"),
        (["predict", "--model_name_or_path", "m", "--preferred", "a", "--dispreferred", "b"], "--prompt must be given"),
        (
            ["predict", "--model_name_or_path", "m", "--kappa", "2", "--preferred", "a", "--dispreferred", "b"],
            "--kappa goes with a FILE",
        ),
    ],
)
def test_flags_that_do_not_go_together(arguments, message, capsys):
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_the_figure_shows_what_was_found(trained):
    found, *_ = trained
    left, right = plot_outlook(found)
    assert left.get_xlim()[1] >= 2 * found.checked.reach
    lines = {line.get_label(): line for line in left.get_lines()}
    (plus,) = (line for label, line in lines.items() if "y^+" in str(label))
    told = found.forecasts[0]
    np.testing.assert_allclose(plus.get_ydata(), np.array(told.preferred) - told.preferred[0])
    assert len(right.get_yticks()) == len(found.tokens)
