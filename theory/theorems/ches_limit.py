"""CHES as a rate: when the alphas that it sets to 1 are 1."""

from dataclasses import replace

import numpy as np

from theory.ches import ches_scores
from theory.problem import Problem
from theory.theorems._base import Array, Mask, Route, Sharpness, Theorem, everywhere, relative


class ChesLimit(Theorem):
    """Every context expects one token that neither response holds: then the pull of hidden vectors is CHES itself.

    There alpha = 1 + 1[equal tokens], so tokens that recur within y+ or in both responses add their inner products once
    more. A single-token pair has CHES 0: its two sums are the same h.
    """

    name = "ches_limit"
    statement = (
        r"As $\pi(\cdot|x,y_{<k})\to e_c$ in every context, $c$ in neither response: $-\frac1{G\eta_W}\frac{d}{dt}"
        r"\ln\pi(y^+|x)|_{\eta_h=0}\to\mathrm{CHES}_x(y^+,y^-) + \sum_{y^+_k=y^-_{k'}}\langle h,h'\rangle"
        r" - \sum_{y^+_k=y^+_{k'}}\langle h,h'\rangle$"
    )
    source = "Razin et al. 2024, Definition 2; the limit is this project's"
    kind = "limit"
    settings = ("sequences", "shared_prefix", "single_token")
    knobs = ("CHES", "tokens in both", "tokens of y+")
    sharpness = (
        Sharpness("one sample", "sequence_data_set"),
        Sharpness("pi concentrated on a token of neither", None, "the study ches_truth measures what is left of it"),
    )

    def applies(self, problem: Problem) -> Mask:
        return everywhere(problem, len(problem.samples) == 1 and problem.has_margin_loss)

    def residual(self, problem: Problem, route: Route) -> Array:
        B, V, d = problem.W.shape
        # One more token and one more dimension, in which every context points at that token.
        W, H = np.zeros((B, V + 1, d + 1)), np.ones((B, problem.H.shape[1], d + 1))
        W[:, :V, :d], W[:, V, d], H[..., :d] = problem.W, 200.0, problem.H
        limit = replace(problem, W=W, H=H, lr_unembedding=1.0, lr_hidden=0.0)
        w, l = limit.pairs[0]
        h_w, h_l = H[:, w.rows], H[:, l.rows]
        inner = h_w @ h_l.transpose(0, 2, 1), h_w @ h_w.transpose(0, 2, 1)
        same = [np.equal.outer(w.tokens, y.tokens) for y in (l, w)]
        pull = self.k("CHES") * ches_scores(h_w, h_l)
        pull = pull + self.k("tokens in both") * (inner[0] * same[0]).sum((1, 2))
        pull = pull - self.k("tokens of y+") * (inner[1] * same[1]).sum((1, 2))
        G = limit.incentives[0][:, 0]
        size = limit.incentive_sizes[0][:, 0] * (abs(inner[0]).sum((1, 2)) + abs(inner[1]).sum((1, 2)))
        return relative(route.rate(limit, w) + G * pull, size)
