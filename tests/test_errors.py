"""A table of bad calls: each raises a ValueError that names the argument, its value and what was expected."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from theory import ExactDescent, ExactFlow, Sample, UnconstrainedFeatures, batch_log_probs
from theory.losses import POSITIVE, Loss, get, parameter
from theory.losses.cdpo import CDPO
from theory.losses.dpo import DPO
from theory.losses.ipo import IPO

W = np.arange(12.0).reshape(4, 3) / 7 - 0.5
h = np.array([0.4, -1.0, 0.3])
NAMES = ["no", "never", "yes", "maybe"]
single = UnconstrainedFeatures.single_token


def model(**changes: Any) -> UnconstrainedFeatures:
    return single(**({"W": W, "h": h, "preferred": 0, "dispreferred": 1, "tokens": NAMES} | changes))


def flow(**changes: Any) -> ExactFlow:
    return ExactFlow(**({"model": model(), "loss": DPO()} | changes))


def spoiled(array: np.ndarray, value: float) -> np.ndarray:
    out = array.copy()
    out.flat[1] = value
    return out


@dataclass(frozen=True)
class NoMargin(Loss):
    beta: float = parameter(0.1, POSITIVE)

    def formula(self, ops, y):
        return -ops.log_sigmoid(self.beta * (y.a - y.a_ref)) - ops.log_sigmoid(-self.beta * (y.b - y.b_ref))


SEQUENCES = UnconstrainedFeatures.from_samples(np.eye(3), np.ones((2, 3)), (Sample("p", ((0, 1), (2,))),))
ASYMMETRIC = np.array([[1.0, 0.5, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])

BAD: dict[str, tuple[Callable[[], Any], str]] = {
    # the model
    "NaN in W": (lambda: model(W=spoiled(W, np.nan)), r"W must be finite, got nan at \(0, 1\)"),
    "inf in W": (lambda: model(W=spoiled(W, -np.inf)), r"W must be finite, got -inf at \(0, 1\)"),
    "NaN in float32 W": (lambda: model(W=spoiled(W, np.nan).astype(np.float32)), r"W must be finite, got nan"),
    "inf in h": (lambda: model(h=spoiled(h, np.inf)), r"h must be finite, got inf at \(1,\)"),
    "W of one dimension": (lambda: model(W=W[0]), r"W must have shape \(any, any\), got \(3,\)"),
    "W without rows": (lambda: model(W=W[:0]), r"W must have shape \(any, any\), got \(0, 3\)"),
    "W with one row": (lambda: model(W=W[:1], tokens=None), "preferred|dispreferred|at least 2 rows"),
    "W of text": (lambda: model(W=[["a", "b", "c"]] * 4), "W must hold real numbers"),
    "W complex": (lambda: model(W=W + 1j), "W must hold real numbers, got dtype complex128"),
    "h too short": (lambda: model(h=h[:2]), r"h must have shape \(3,\), got \(2,\)"),
    "h as a matrix": (lambda: model(h=h[None]), r"h must have shape \(3,\), got \(1, 3\)"),
    "token too large": (lambda: model(preferred=4), r"preferred must be a token index in \[0, 4\), got 4"),
    "token negative": (lambda: model(dispreferred=-1), r"dispreferred must be a token index in \[0, 4\), got -1"),
    "token a float": (lambda: model(preferred=0.0), "preferred must be a token index or name, got 0.0"),
    "token a bool": (lambda: model(preferred=True), "preferred must be a token index or name, got True"),
    "token misspelt": (lambda: model(preferred="nevr"), "preferred: unknown token 'nevr'; did you mean 'never'"),
    "token by name without names": (lambda: model(preferred="no", tokens=None), "tokens was not given"),
    "name twice": (
        lambda: model(preferred="no", tokens=["no", "no", "a", "b"]),
        r"names several rows of W \(\[0, 1\]\)",
    ),
    "y+ = y-": (lambda: model(dispreferred="no"), "preferred and dispreferred must differ, both are 0"),
    "too few names": (lambda: model(tokens=NAMES[:3]), "tokens must name all 4 rows of W, got 3 names"),
    "infinite reference": (lambda: model(reference=(0.0, -np.inf)), "reference must hold a finite log-probability"),
    "short reference": (lambda: model(reference=(0.0,)), "reference must hold a finite log-probability per response"),
    # samples
    "one response": (lambda: Sample("x", ((0,),)), r"responses must hold y\+ and y- at least, got 1"),
    "empty response": (lambda: Sample("x", ((0,), ())), r"responses\[1\] must not be empty"),
    "equal responses": (lambda: Sample("x", ((0, 1), (0, 1))), r"y\+ and y- must differ, both are \(0, 1\)"),
    "response of text": (lambda: Sample("x", ("no", (1,))), r"responses\[0\] must be a sequence of token indices"),
    "response of floats": (
        lambda: Sample("x", ((0.5,), (1,))),
        r"responses\[0\] must hold integer token indices, got 0.5",
    ),
    "reference unset": (lambda: Sample("x", ((0,), (1,))).reference_margin, "reference is not set"),
    "no samples": (lambda: UnconstrainedFeatures(W, h[None], ()), "samples must not be empty"),
    "sample out of vocabulary": (
        lambda: UnconstrainedFeatures(W, h[None], (Sample("x", ((9,), (1,))),)),
        r"token index in samples\[0\] must be in \[0, 4\), got 9",
    ),
    "context without a row": (
        lambda: UnconstrainedFeatures(W, h[None], (Sample("x", ((0, 1), (1,))),), (("x", ()),)),
        r"context \('x', \(0,\)\) of a sample has no row in H",
    ),
    "context not in the model": (
        lambda: model().next_token_log_probs("z"),
        r"context \('z', \(\)\) is not in the model",
    ),
    "unknown response": (lambda: model().log_prob((7,)), r"response must hold token indices in \[0, 4\), got \(7,\)"),
    # losses
    "unknown loss": (lambda: get("dop"), "unknown loss 'dop'; did you mean 'dpop', 'dpo'"),
    "unknown parameter": (lambda: get("dpo", bta=1.0), "loss 'dpo': unknown parameter 'bta'; did you mean 'beta'"),
    "beta zero": (lambda: DPO(beta=0), r"DPO.beta must be in \(0, inf\), got 0"),
    "beta negative": (lambda: DPO(beta=-0.1), r"DPO.beta must be in \(0, inf\), got -0.1"),
    "beta NaN": (lambda: DPO(beta=float("nan")), r"DPO.beta must be in \(0, inf\), got nan"),
    "beta inf": (lambda: DPO(beta=float("inf")), r"DPO.beta must be in \(0, inf\), got inf"),
    "beta bool": (lambda: DPO(beta=True), "DPO.beta must be a real number .* got True"),
    "beta text": (lambda: DPO(beta="0.1"), "DPO.beta must be a real number .* got '0.1'"),  # type: ignore[arg-type]
    "eps one half": (lambda: CDPO(eps=0.5), r"CDPO.eps must be in \[0, 0.5\), got 0.5"),
    "tau zero": (lambda: IPO(tau=0.0), r"IPO.tau must be in \(0, inf\), got 0"),
    # the flow
    "loss class": (lambda: flow(loss=DPO), "loss must be a theory.losses.Loss instance, got <class"),
    "loss name": (lambda: flow(loss="dpo"), "loss must be a theory.losses.Loss instance, got 'dpo'"),
    "no margin form": (lambda: flow(loss=NoMargin()), "is not a function of the margin for this sample"),
    "sequences": (lambda: flow(model=SEQUENCES), "one sample with two single-token responses"),
    "rate negative": (lambda: flow(lr_unembedding=-1.0), r"lr_unembedding must be in \[0, inf\), got -1"),
    "rate NaN": (lambda: flow(lr_hidden=np.nan), r"lr_hidden must be in \[0, inf\), got nan"),
    "kernel shape": (lambda: flow(lr_hidden=np.eye(2)), r"lr_hidden must be a number or have shape \(3, 3\), got"),
    "kernel NaN": (lambda: flow(lr_hidden=spoiled(np.eye(3), np.nan)), "lr_hidden must be finite"),
    "kernel asymmetric": (lambda: flow(lr_hidden=ASYMMETRIC), "lr_hidden must be symmetric, largest asymmetry is 0.5"),
    "kernel indefinite": (lambda: flow(lr_hidden=np.diag([1.0, -1, 1])), "positive semidefinite, smallest .* -1"),
    "times fall": (lambda: flow().log_probs([0.0, 2.0, 1.0]), "times must not decrease, got 2 followed by 1 at 2"),
    "times negative": (lambda: flow().margin([-1.0]), "times must be >= 0, got -1"),
    "times NaN": (lambda: flow().margin([0.0, np.nan]), "times must not hold NaN"),
    "times empty": (lambda: flow().margin([]), "times must be one-dimensional and not empty"),
    "times a matrix": (lambda: flow().margin([[0.0, 1.0]]), r"times must be one-dimensional .* \(1, 2\)"),
    "both times": (lambda: flow().margin([0.0], log_times=[0.0]), "give times or log_times, one of the two"),
    "no times": (lambda: flow().log_probs(), "give times or log_times, one of the two"),
    "margin NaN": (lambda: flow().log_probs_at_margin([np.nan]), "u must be a one-dimensional array without NaN"),
    "margin out of reach": (
        lambda: ExactFlow(single(np.array([[1.0], [-1.0], [0.5]]), np.array([-2.0]), 0, 1), DPO(), 0.5).time_at_margin(
            0.5
        ),
        r"u must be a margin the path reaches, in \[-inf, 0\], got 0.5",
    ),
    "top zero": (lambda: flow().displacement(top=0), "top must be an integer >= 1, got 0"),
    # batches
    "batch of wrong shape": (
        lambda: batch_log_probs(W[None], h, [0], [1], DPO(), [0.0]),
        r"h must have shape \(1, 3\), got \(3,\)",
    ),
    "batch token": (
        lambda: batch_log_probs(W[None], h[None], [0], [4], DPO(), [0.0]),
        "dispreferred must hold 1 token",
    ),
    "batch y+ = y-": (lambda: batch_log_probs(W[None], h[None], [1], [1], DPO(), [0.0]), "must differ, both are 1"),
    "batch loss": (lambda: batch_log_probs(W[None], h[None], [0], [1], "dpo", [0.0]), "loss must be"),
    # descent
    "method": (lambda: ExactDescent(model(), DPO(), 0.1, 5, "adam"), "method must be .* got 'adam'"),  # type: ignore
    "step": (lambda: ExactDescent(model(), DPO(), 0.0, 5), r"step must be in \(0, inf\), got 0"),
    "steps": (lambda: ExactDescent(model(), DPO(), 0.1, 2.5), "steps must be an integer >= 0, got 2.5"),  # type: ignore
    "momentum one": (lambda: ExactDescent(model(), DPO(), 0.1, 5, "heavy_ball", 1.0), r"momentum must be in \[0, 1\)"),
    "momentum unused": (lambda: ExactDescent(model(), DPO(), 0.1, 5, momentum=0.9), "momentum is for heavy_ball"),
    "kernel with sign": (lambda: ExactDescent(model(), DPO(), 0.1, 5, "sign", lr_hidden=np.eye(3)), "method 'sign'"),
    "step out of range": (lambda: ExactDescent(model(), DPO(), 0.1, 5).log_probs([6]), r"step numbers in \[0, 5\]"),
}


@pytest.mark.parametrize(("call", "message"), BAD.values(), ids=BAD.keys())
def test_bad_calls_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_the_same_calls_without_the_fault_succeed():
    """So that the table cannot pass because everything raises."""
    assert model().single_pair == (0, 1)
    assert flow(lr_hidden=np.eye(3)).log_probs([0.0, 1.0]).shape == (2, 4)
    assert flow().margin(log_times=[-np.inf, 0.0, 700.0]).shape == (3,)
    assert batch_log_probs(W[None], h[None], [0], [1], DPO(), [0.0]).shape == (1, 1, 4)
    assert ExactDescent(model(), DPO(), 0.1, 5, "heavy_ball", 0.9).log_probs([5]).shape == (1, 4)
