"""Conditions that look at tokens: squeezing, the suffix after an edit, and the first step of sign-like optimisers."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import log_softmax, logsumexp

from theory._check import POSITIVE, check_array, check_number
from theory.conditions._record import Array, Mask, Record, pair_of
from theory.losses import TokenLoss
from theory.problem import Positions, Problem


@dataclass(frozen=True)
class Squeezing(Record):
    """Which tokens of one context gain when another is pushed down with fixed features (arXiv 2407.10490).

    threshold : |pi|^2 - pi_y: to first order a token other than y gains iff its probability is above it.
    first_order (V,) : d ln pi_i per unit of eta' = eta |h|^2 (step of W times the loss's push on y).
    change (V,) : of ln pi_i after one whole step, nats. gains : tokens whose change is positive, largest first.
    """

    threshold: float
    first_order: Array
    change: Array
    gains: tuple[int, ...]

    def __str__(self) -> str:
        return (
            f"gaining: {', '.join(map(str, self.gains[:8])) or 'none'}; to first order those above {self.threshold:.4g}"
        )


def squeezing(log_pi: ArrayLike, pushed: int, step: float = 1.0) -> Squeezing:
    """One gradient step on +ln pi(pushed) with fixed features: logits move by eta' (pi - e_pushed).

    log_pi : (V,) next-token log-probabilities (or logits) of the context. step : eta' > 0.
    The pushed token falls and the likeliest other one rises, whatever the step.
    """
    start: Array = log_softmax(check_array(log_pi, "log_pi", (None,)).astype(np.float64))
    if isinstance(pushed, bool) or not isinstance(pushed, int | np.integer) or not 0 <= pushed < len(start):
        raise ValueError(f"pushed must be a token index in [0, {len(start)}), got {pushed!r}")
    pi, eta = np.exp(start), check_number(step, "step", POSITIVE)
    push = pi.copy()
    others = np.arange(len(pi)) != pushed
    push[pushed] = -pi[others].sum()  # pi_y - 1, with its digits
    # sum_j pi_j push_j, the mean that softmax takes off.
    first_order = push - pi @ push
    total: Any = logsumexp(start + eta * push)
    change = eta * push - total
    gains = np.nonzero(change > 0)[0]
    order = gains[np.argsort(-change[gains], kind="stable")]
    return Squeezing(float(pi @ pi - pi[pushed]), first_order, change, tuple(int(i) for i in order))


@dataclass(frozen=True)
class Suffix(Record):
    """The tokens that y+ and y- share after they differ (Smaug, arXiv 2402.13228), K of them.

    position (K,) : k, from 1. token (K,). probability_w, probability_l (B, K) : of the token, in y+ and in y-.
    lowered (B, K) : pi(v|c-) < pi(v|c+): were the logits of the two contexts shared, pushing the margin up would push
        the shared token down, by pi(v|c-) - pi(v|c+).
    alpha (B, K) : <e_v - pi(.|c+), e_v - pi(.|c-)> = (1 - pi_v)(1 - pi'_v) + sum_{i != v} pi_i pi'_i >= 0.
    coupling (B, K) : eta_W alpha <h_c+, h_c->, what the position adds to <g+, g->: y- going down takes y+ along by it.
    share (B,) : sum of the couplings over <g+, g->; 0 where that vanishes.
    """

    position: tuple[int, ...]
    token: tuple[int, ...]
    probability_w: Array
    probability_l: Array
    lowered: Mask
    alpha: Array
    coupling: Array
    share: Array

    def __str__(self) -> str:
        if not self.position:
            return "no token is shared after the responses differ"
        return (
            f"{len(self.position)} shared token(s) after the responses differ, share of <g+, g->"
            f" {', '.join(f'{s:.3g}' for s in self.share[:4])}, lowered in shared logits at"
            f" {int(self.lowered[0].sum())} of them"
        )


def suffix_condition(problem: Problem, sample: int = 0) -> Suffix:
    """Positions k at which y+ and y- have the same token after different prefixes, and what each adds to <g+, g->."""
    w, l = pair_of(problem, sample, whole=True)
    shared = [
        k
        for k, (v, z) in enumerate(zip(w.tokens, l.tokens, strict=False))
        if v == z and w.rows[k] != l.rows[k]  # the same context would be the same prefix
    ]
    rows_w, rows_l = [w.rows[k] for k in shared], [l.rows[k] for k in shared]
    tokens = [w.tokens[k] for k in shared]
    p, q = problem.pi[:, rows_w, tokens], problem.pi[:, rows_l, tokens]
    here, there = (Positions(tuple(rows), tuple(tokens)) for rows in (rows_w, rows_l))
    alpha = (problem.errors(here) * problem.errors(there)).sum(-1)
    hidden = np.einsum("bkd,bkd->bk", problem.H[:, rows_w], problem.H[:, rows_l])
    coupling, common = problem.lr_unembedding * alpha * hidden, problem.inner(w, l)
    share = np.where(common != 0, coupling.sum(1) / np.where(common != 0, common, 1.0), 0.0)
    return Suffix(tuple(k + 1 for k in shared), tuple(tokens), p, q, q < p, alpha, coupling, share)


@dataclass(frozen=True)
class SignStep(Record):
    """The first step of sign descent, which Adam's and RMSprop's first steps are (RMSprop's times 10).

    Change per unit of step, to first order, of ln pi(y+), ln pi(y-) and the margin: <grad, -sgn(dL)> (B,) each.
    """

    change_w: Array
    change_l: Array
    change_u: Array

    def __str__(self) -> str:
        return ", ".join(
            f"{name} {float(x[0]):+.4g}"
            for name, x in (("ln pi(y+)", self.change_w), ("ln pi(y-)", self.change_l), ("margin", self.change_u))
        )


def sign_first_step(problem: Problem, sample: int = 0) -> SignStep:
    """What -eta sgn(gradient) does to the responses of a sample, for any loss and data set, to first order in eta.

    W moves with eta eta_W, hidden vectors with eta eta_h. For one single-token pair and a margin loss with G > 0
    (this project, E6): d ln pi_+ = eta_W (1 - pi_+ + pi_-) |h|_1 + eta_h <W_+ - Wbar, sgn(W_+ - W_-)>.
    """
    pulls = logit_pulls(problem)
    rows = np.nonzero((pulls != 0).any((0, 1)))[0]  # of a margin loss in one context those of y+ and y- alone
    move_W = problem.lr_unembedding * np.sign(pulls[:, :, rows].transpose(0, 2, 1) @ problem.H)  # (B, rows, d)
    move_H = problem.lr_hidden * np.sign(problem.through_rows(pulls))  # (B, n, d)

    def change(y: Positions) -> Array:
        through_W = np.einsum("bkr,brd,bkd->b", problem.errors(y)[:, :, rows], move_W, problem.H[:, y.rows])
        return through_W + (problem.embeddings(y) * move_H[:, y.rows]).sum((1, 2))

    w, l = (change(y) for y in pair_of(problem, sample, whole=True))
    return SignStep(w, l, w - l)


def logit_pulls(problem: Problem) -> Array:
    """(B, n, V) -dL/dlogits of the objective. Where incentives cancel in a context, so do they here, exactly."""
    if isinstance(problem.loss, TokenLoss):
        return problem.pulls.mean(1)
    out, weights = np.zeros(problem.logits.shape), np.zeros(problem.logits.shape[:2])
    for i, pair in enumerate(problem.pairs):
        for y, d in zip(pair, (problem.incentives[0][:, i], -problem.incentives[1][:, i]), strict=True):
            for row, token in zip(y.rows, y.tokens, strict=True):
                out[:, row, token] += d
                weights[:, row] += d
    return (out - weights[..., None] * problem.pi) / len(problem.pairs)
