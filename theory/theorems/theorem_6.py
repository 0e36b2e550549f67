"""Theorem 6: one sample of sequences that differ from the first token on, the rate of the preferred one."""

import numpy as np

from theory.problem import Positions, Problem
from theory.theorems._base import Array, Mask, RateTheorem, Sharpness, everywhere, first_tokens
from theory.theorems._single import Branch


class Theorem6(RateTheorem):
    """Besides the first tokens' terms (Theorem 4), hidden vectors of y+ against those of y-, weighted by alphas."""

    name = "theorem_6"
    statement = (
        r"$\frac{d}{dt}\ln\pi(y^+|x) = G\,[(1-\pi(y^+_1))|W_{y^+_1}|^2 + \pi(y^-_1)|W_{y^-_1}|^2"
        r" + \sum_{k\ge2}|W_{y^+_k}-\bar W_k|^2 + S_{y^+_1,y^-_1}"
        r" - \sum_{k,k'}\alpha^-_{kk'}\langle h_{y^+_{<k}},h_{y^-_{<k'}}\rangle"
        r" + \sum_{k,k'}\alpha^+_{kk'}\langle h_{y^+_{<k}},h_{y^+_{<k'}}\rangle]$ if $y^+_1\neq y^-_1$"
    )
    source = "Razin et al. 2024, Theorems 3 and 6"
    settings = ("sequences", "single_token")
    knobs = (
        "norms of the first tokens",
        "later tokens of y+",
        "alignment of the first tokens",
        "other first tokens, weighted",
        "hidden vectors of y-",
        "hidden vectors of y+",
    )
    sharpness = (
        Sharpness("y+ and y- differ at the first token", "shared_prefix"),
        Sharpness("one sample", "sequence_data_set"),
        Sharpness("a loss of the margin alone", "weighted"),
    )

    def applies(self, problem: Problem) -> Mask:
        plus, minus = first_tokens(problem)
        return everywhere(problem, len(problem.samples) == 1 and plus != minus and problem.has_margin_loss)

    def terms(self, problem: Problem, z: Positions) -> dict[str, Array]:
        x = Branch(problem)
        (w, l), body, head = problem.pairs[0], x.G * problem.lr_hidden, x.G * problem.lr_unembedding
        later = Positions(w.rows[1:], w.tokens[1:])
        minus, plus = problem.overlap(w, l), problem.overlap(w, w)
        return {
            "norms of the first tokens": body * x.norms,
            "later tokens of y+": body * (problem.embeddings(later) ** 2).sum((1, 2)),
            "alignment of the first tokens": -body * x.mass * x.WW(x.plus, x.minus),
            "other first tokens, weighted": -body * x.weighted_others,
            "hidden vectors of y-": -head * minus.through_W(1.0),
            "hidden vectors of y+": head * plus.through_W(1.0),
        }


def alphas(problem: Problem) -> tuple[Array, Array]:
    """alpha^- (B, |y+|, |y-|) and alpha^+ (B, |y+|, |y+|), as the paper prints them."""
    w, l = problem.pairs[0]
    p, q = problem.pi[:, w.rows], problem.pi[:, l.rows]
    out = []
    for tokens, r in ((l.tokens, q), (w.tokens, p)):
        same = np.equal.outer(w.tokens, tokens)
        at = p[:, :, tokens], r[:, :, w.tokens].transpose(0, 2, 1)
        out.append(same - at[0] - at[1] + p @ r.transpose(0, 2, 1))
    return out[0], out[1]
