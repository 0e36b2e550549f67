"""What claims about whole paths share: how long to run, and the vectors that move."""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from theory.losses import SFT, MarginForm, MarginLoss, Weighted, get
from theory.problem import Problem
from theory.theorems._base import Mask, Run, Sharpness, everywhere, is_single_token
from theory.theorems._single import Branch, dot

Array = NDArray[np.floating[Any]]
# What most claims about a single-token pair need, and where it fails.
SINGLE_PAIR = (Sharpness("one-token responses", "sequences"), Sharpness("one sample", "data_set"))
# Slope 1 at any margin: its time is loss-time, and by path universality what it shows holds for every margin loss.
UNIT_SLOPE = get("slic", delta=1e9)
FLOW_TOLERANCE = 1e-8  # of a path integrated at rtol 1e-11, relative to its own size


class Start(NamedTuple):
    """Of every instance: h, a (B, d); K0, omega, u0 (B,); G at the start (B,)."""

    h: Array
    a: Array
    K0: Array
    omega: float
    u0: Array
    G: Array


def start_of(problem: Problem) -> Start:
    """The single-token start."""
    x = Branch(problem)
    eta_W, eta_h = problem.lr_unembedding, problem.lr_hidden
    K0 = 2 * eta_W * x.hh + eta_h * dot(x.a, x.a)
    return Start(x.h, x.a, K0, float(np.sqrt(2 * eta_W * eta_h)), dot(x.h, x.a), x.G)


def speed_of(problem: Problem) -> Array:
    """(B,) how fast things change, 1/time: |d_w| and |d_l| times squared gradients, summed over the samples."""
    total = np.zeros(len(problem))
    for i, pair in enumerate(problem.pairs):
        for y, d in zip(pair, problem.incentives, strict=True):
            total += abs(d[:, i]) * (problem.inner(y, y) + problem.lr_unembedding + problem.lr_hidden)
    return total / len(problem.pairs)


def times_for(problem: Problem, points: int = 4) -> Array:
    """(points,) times over which the faster half of the instances moves a good deal."""
    end = 2.0 / max(float(np.median(speed_of(problem))), 1e-6)
    return np.linspace(end / points, end, points)


def tame(problem: Problem) -> Mask:
    """(B,) instances that those times do not carry out of all proportion (constant slopes grow exponentially).

    None where a kink of the loss can be a place to stay: several samples, or another term, may push back and forth
    across it, and an integrator would chatter there.
    """
    if not smooth(problem) and not (len(problem.samples) == 1 and problem.has_margin_loss):
        return everywhere(problem, False)
    return speed_of(problem) * times_for(problem)[-1] < 20


def is_single_margin(problem: Problem) -> Mask:
    """One single-token pair and a loss of the margin."""
    return everywhere(problem, is_single_token(problem) and problem.has_margin_loss)


def moving(problem: Problem, run: Run) -> tuple[Array, Array, Array]:
    """h and a = W_+ - W_- (T, B, d), and the margin u (T, B), along a single-token run."""
    x = Branch(problem)
    h, a = run.H[:, :, x.row], run.W[:, :, x.plus] - run.W[:, :, x.minus]
    return h, a, (h * a).sum(-1)


def smooth(problem: Problem) -> bool:
    """A loss whose margin form has no kinks, which an adaptive integrator follows to its tolerance."""
    loss = problem.loss.base if isinstance(problem.loss, SFT | Weighted) else problem.loss
    return isinstance(loss, MarginLoss) and not loss.kinks(0.0)


def form_of(problem: Problem, i: int) -> MarginForm:
    """The one-dimensional form of the i-th instance's loss."""
    assert isinstance(problem.loss, MarginLoss)
    return MarginForm(problem.loss, np.float64(problem.reference_margin[i]))


def worst(x: Array, scale: Array) -> Array:
    """(B,) largest |x| over points and coordinates (T, B, ...), relative to `scale` (B,) or (T, B)."""
    size = np.abs(x).reshape(*x.shape[:2], -1).max(-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(size == 0, 0.0, size / scale).max(0)
