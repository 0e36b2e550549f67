"""What pairs do to each other at first order, against steps really made on the network."""

import pytest
import torch

pytest.importorskip("transformers")

from sims.language.model import new_model
from sims.language.preferences import PreferencePair
from sims.language.responses import log_probs
from sims.language.scoring.probe import Probe
from sims.language.scoring.together import together

WORDS = [f"w{i}" for i in range(12)]


@pytest.fixture(scope="module")
def model():
    lm = new_model(WORDS, d=16, layers=1, heads=2, seed=3)
    lm.network.double()
    return lm


def pairs_of(*responses):
    return [PreferencePair((1, 4, 5 + i % 3), y, z) for i, (y, z) in enumerate(responses)]


# The chosen of one is the rejected of another: pairs pull against each other.
CONFLICT = pairs_of(((7, 8, 2), (9, 8, 2)), ((9, 10, 2), (7, 10, 2)), ((7, 8, 2), (9, 11, 2)), ((6, 2), (7, 8, 2)))
ALIKE = pairs_of(((7, 8, 2), (9, 10, 2)), ((7, 8, 2), (9, 10, 2)), ((7, 8, 2), (9, 10, 2)))


def measured(model, pairs, rate, by_sign):
    """Change of mean ln pi(y+) per nat of mean margin by a step on the mean margin, by automatic differentiation of it."""
    twin = model.copy()
    parameters = list(twin.network.parameters())
    u = 0
    for p in pairs:
        for y, weight in ((p.preferred, 1), (p.dispreferred, -1)):
            logits = twin.network(torch.tensor([[*p.prompt, *y]])).logits[0, len(p.prompt) - 1 : -1]
            u = u + weight * torch.log_softmax(logits, -1)[range(len(y)), list(y)].sum() / len(pairs)
    for p, g in zip(parameters, torch.autograd.grad(u, parameters), strict=True):
        p.data += rate * (g.sign() if by_sign else g)
    prompts = [p.prompt for p in pairs]
    plus, minus = (
        (log_probs(twin, prompts, own) - log_probs(model, prompts, own)).mean()
        for own in ([p.preferred for p in pairs], [p.dispreferred for p in pairs])
    )
    return plus / (plus - minus)


@pytest.mark.parametrize("pairs", [CONFLICT, ALIKE], ids=["conflict", "alike"])
def test_is_what_a_small_step_does(model, pairs):
    found = together(model, pairs)
    assert found.pairs == len(pairs)
    assert found.gradient == pytest.approx(measured(model, pairs, 1e-6, False), abs=1e-4)
    assert found.sign == pytest.approx(measured(model, pairs, 1e-7, True), abs=1e-3)
    assert found.own + found.others == pytest.approx(found.gradient, abs=1e-12)
    assert abs(found.gradient - found.own) > 0.02  # the parts are told apart


def test_pairs_that_pull_against_each_other_are_told(model):
    # The same pair again and again does to itself 1/n of what it does in all.
    one, three = together(model, ALIKE[:1]), together(model, ALIKE[:1] * 3)
    assert one.others == pytest.approx(0, abs=1e-12)
    assert three.gradient == pytest.approx(one.gradient)
    assert three.others == pytest.approx(2 / 3 * one.gradient)
    # In conflict, a nat of mean margin costs the chosen far more than each pair's own step does.
    assert together(model, CONFLICT).others < 0 < together(model, CONFLICT).own
    alone = Probe(model)(ALIKE[0])
    assert one.gradient == pytest.approx(alone["gradient_step_chosen"] / alone["gradient_step_margin"])
    assert one.sign == pytest.approx(alone["sign_step_chosen"] / alone["sign_step_margin"])


def test_bad_input(model):
    with pytest.raises(ValueError, match="at least one pair"):
        together(model, [])
    there_and_back = [PreferencePair((1, 4), (7, 2), (8, 2)), PreferencePair((1, 4), (8, 2), (7, 2))]
    with pytest.raises(ValueError, match="margins that a step changes"):
        together(model, there_and_back)
