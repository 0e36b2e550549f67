"""Theorem 6 for responses that share their first tokens."""

from theory.model import Response
from theory.problem import Positions, Problem
from theory.theorems._base import Array, Mask, RateTheorem, Sharpness, everywhere
from theory.theorems._single import Branch


def common_prefix(v: Response, w: Response) -> Response:
    """The tokens on which two responses agree from the start."""
    n = next((i for i, (a, b) in enumerate(zip(v, w, strict=False)) if a != b), min(len(v), len(w)))
    return v[:n]


class SharedPrefix(RateTheorem):
    """A shared first token adds no branching term: only the context where the responses part trains against y+."""

    name = "shared_prefix"
    statement = (
        r"With a common prefix of $b-1$ tokens, neither response a prefix of the other:"
        r" $\frac{d}{dt}\ln\pi(y^+|x) = G\,[\langle W_{y^+_b}-\bar W_b,"
        r"W_{y^+_b}-W_{y^-_b}\rangle + \sum_{k>b}|W_{y^+_k}-\bar W_k|^2"
        r" - \sum_{k,\,k'\ge b}\alpha^-_{kk'}\langle h_{y^+_{<k}},h_{y^-_{<k'}}\rangle"
        r" + \sum_{k,\,k'\ge b}\alpha^+_{kk'}\langle h_{y^+_{<k}},h_{y^+_{<k'}}\rangle]$"
    )
    source = "this project; Theorem 6 is the case b = 1"
    settings = ("shared_prefix", "sequences")
    knobs = ("branching", "later tokens of y+", "hidden vectors of y-", "hidden vectors of y+")
    sharpness = (
        Sharpness("one sample", "sequence_data_set"),
        Sharpness("a loss of the margin alone", "weighted"),
    )

    def applies(self, problem: Problem) -> Mask:
        w, l = problem.samples[0].responses[:2]
        parts = len(common_prefix(w, l)) < min(len(w), len(l))  # neither is a prefix of the other
        return everywhere(problem, len(problem.samples) == 1 and parts and problem.has_margin_loss)

    def terms(self, problem: Problem, z: Positions) -> dict[str, Array]:
        (w, l), sample = problem.pairs[0], problem.samples[0]
        b = len(common_prefix(*sample.responses[:2]))
        b = min(b, len(w.tokens) - 1, len(l.tokens) - 1)  # has a value, if a wrong one, where one is a prefix
        x = Branch(problem, prefix=w.tokens[:b])
        after_w, after_l = (Positions(y.rows[b:], y.tokens[b:]) for y in (w, l))
        later = Positions(w.rows[b + 1 :], w.tokens[b + 1 :])
        body, head = x.G * problem.lr_hidden, x.G * problem.lr_unembedding
        return {
            "branching": body * (x.along[:, x.plus] - x.mean_along),
            "later tokens of y+": body * (problem.embeddings(later) ** 2).sum((1, 2)),
            "hidden vectors of y-": -head * problem.overlap(w, after_l).through_W(1.0),
            "hidden vectors of y+": head * problem.overlap(w, after_w).through_W(1.0),
        }
