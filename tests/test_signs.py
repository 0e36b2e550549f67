"""The conditions' signs against integrated flows, and wrong conditions, which must be caught."""

import dataclasses
import json

import numpy as np
import pytest

from sims.scenarios import signs
from sims.scenarios.signs import SIGNS, conditions_signs, sign_agreement
from theory.conditions import displacement_signs, gradient_entanglement
from theory.losses import LOSSES, TokenLoss

FLOW = SIGNS[:3]


def test_conditions_and_flows_agree():
    found = sign_agreement(2000, seed=5)
    assert found.ok, found
    assert found.first == ()
    for sign in SIGNS:
        assert found.compared[sign] > 1600, found
        assert found.compared[sign] + found.inside[sign] + found.resting + found.undefined == 2000
    drawn = {name for name, cls in LOSSES.items() if not issubclass(cls, TokenLoss)}
    assert drawn | {"sft", "weighted", "per_token", "calibrated"} == set(found.losses)
    assert min(found.losses.values()) > 0
    assert json.loads(json.dumps(found.to_dict()))["instances"] == 2000
    assert "disagree" in str(found)


def test_a_seed_is_a_seed():
    one = sign_agreement(60, seed=3)
    assert one == sign_agreement(60, seed=3)
    assert one != sign_agreement(60, seed=4)


def one_sample(wrong):
    """A predictor that is `wrong` where there is one sample, given its entanglement; its sign steps are right."""

    def predict(problem):
        if len(problem.samples) > 1:
            return conditions_signs(problem)
        return (*wrong(problem, gradient_entanglement(problem)), *conditions_signs(problem)[3:])

    return predict


def inverted(problem, e):
    up, down = e.d_l * e.own_w - e.d_w * e.common, e.d_l * e.common - e.d_w * e.own_l
    return np.sign(up), np.sign(down), np.sign(up - down)


def turned(problem, e):
    up, down = e.d_w * e.own_w + e.d_l * e.common, -e.d_w * e.common - e.d_l * e.own_l
    return np.sign(up), np.sign(down), np.sign(up - down)


def without_lengths(problem, e):
    """The edges rho and 1/rho in the place of rho r* and r*/rho."""
    up, down = e.d_w - e.d_l * e.rho, e.d_w * e.rho - e.d_l
    return np.sign(up), np.sign(down), displacement_signs(problem)[2]


@pytest.mark.parametrize("wrong", [inverted, turned, without_lengths])
def test_wrong_conditions_are_caught(wrong):
    found = sign_agreement(600, seed=1, predict=one_sample(wrong))
    assert not found.ok
    assert found.disagreements[FLOW[0]] > 15
    assert found.disagreements[FLOW[1]] > 15
    assert found.disagreements["sign step, y+"] == found.disagreements["sign step, y-"] == 0
    assert 1 <= len(found.first) <= 5
    assert "conditions say" in found.first[0]


def test_the_wrong_metric_is_caught():
    """Learning rates left out of the inner products."""

    def predict(problem):
        return conditions_signs(dataclasses.replace(problem, lr_unembedding=1.0, lr_hidden=1.0))

    assert sign_agreement(600, seed=1, predict=predict).disagreements[FLOW[0]] > 15


def test_gradient_flow_does_not_answer_for_sign_descent():
    def predict(problem):
        flow = displacement_signs(problem)
        return (*flow, *flow[:2])

    found = sign_agreement(600, seed=1, predict=predict)
    assert not any(found.disagreements[s] for s in FLOW)
    assert found.disagreements["sign step, y+"] > 15


def test_nan_is_no_agreement():
    def predict(problem):
        return tuple(np.full(len(problem), np.nan) for _ in SIGNS)

    found = sign_agreement(40, seed=1, predict=predict)
    assert found.disagreements == found.compared


def test_the_margin_is_small():
    """No hiding behind the margin: it is a small part of the change nearly everywhere."""
    rng = np.random.default_rng(2)
    classes = [c for c in LOSSES.values() if not issubclass(c, TokenLoss)]
    shares = []
    for cls in classes:
        with np.errstate(all="ignore"):
            m = signs._measured(signs._draw(rng, "sequences", 20, cls))
            shares.append((m.margins / abs(m.changes))[:3][:, m.moving])
    share = np.concatenate([s.ravel() for s in shares])
    assert np.median(share) < 1e-4
    assert (share < 0.1).mean() > 0.9


@pytest.mark.parametrize(("bad", "message"), [({"instances": 0}, "instances must be"), ({"seed": -1}, "seed must be")])
def test_bad_arguments(bad, message):
    with pytest.raises(ValueError, match=message):
        sign_agreement(**({"instances": 10} | bad))
