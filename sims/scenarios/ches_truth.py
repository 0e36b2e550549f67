"""CHES against truth: which similarity score foretells the change of ln pi(y+), and when.

A data set is one W and many prompts, each with a pair of responses of 3 to 5 tokens. Every pair is scored at the start,
then trained on alone by DPO gradient flow, and the scores are ranked against the change of ln pi(y+) that was found.
CHES replaces the alphas of Theorem 6,

    alpha_kk' = 1[y_k = y_k'] - pi_k(y_k') - pi_k'(y_k) + <pi_k, pi_k'>,

by 1. They are near 1 only where the contexts expect the same token and the responses contain other ones: then
<pi_k, pi_k'> is near 1 and alpha near 1 + 1[y_k = y_k']. If each context expects its own next token, e_{y_k} - pi_k is
small and alphas of different tokens vanish; if pi is flat, alpha is near 1 for equal tokens and near 0 for others. Four
data sets show the difference:

    random    Gaussian hidden vectors; inner products have either sign
    shared    hidden vectors share a mean, along which one frequent token lies: every context expects it
    flat      the same hidden vectors without the frequent token: every context expects anything
    fitted    the same, each hidden vector tilted to its own next token, as after fine-tuning on both responses
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import spearmanr

from sims.flow import gradient_flow, gradient_flow_batch
from theory._check import check_count
from theory.ches import SequenceTerms, ches_score, edit_similarity, last_hidden_inner_product, sample_terms
from theory.losses import get
from theory.model import Response, Sample, UnconstrainedFeatures, contexts_of

Array = NDArray[np.float64]

V, D = 24, 32
FREQUENT = V - 1  # the token that every context of "shared" expects; no response contains it
W_NORM, H_NORM = 1.0, 6.0  # hidden vectors are the longer ones, as in language models
MEAN = 0.9  # cosine of a hidden vector with the mean
FIT = 0.8  # length of the tilt to the next token, before the vector is brought back to its length
BETA, T_END = 0.1, 1.0
PERCENTILES = (0, 25, 50, 75, 100)
JOINT = 8  # pairs trained together
SCORES = {
    "alpha_weighted": "exact term, alphas kept",
    "ches": "CHES",
    "ln_ches": "length-normalised CHES",
    "edit": "edit similarity",
    "last_hidden": "last-hidden inner product",
}
REGIMES = {
    "random": "Gaussian hidden vectors",
    "shared": "shared mean, every context expects the same frequent token",
    "flat": "shared mean, every context expects anything",
    "fitted": "shared mean, every context expects its own next token",
}
# (n+, n-, positions at which y- repeats the token of y+)
PATTERNS: tuple[tuple[int, int, tuple[int, ...]], ...] = (
    (4, 4, ()),
    (4, 4, (1, 2)),
    (4, 4, (1, 2, 3)),
    (4, 4, (0, 1)),
    (3, 5, ()),
    (3, 5, (1, 2)),
    (5, 3, ()),
    (5, 3, (0, 2)),
)


def data_set(regime: str, pairs: int, seed: int = 0) -> UnconstrainedFeatures:
    """`pairs` prompts with a pair each, every pattern equally often in random order, one W for all."""
    rng = np.random.default_rng([seed, list(REGIMES).index(regime)])
    W = W_NORM * unit(rng.standard_normal((V, D)))
    mean = unit(rng.standard_normal(D))
    if regime != "random":  # no token but the frequent one lies along the mean
        W = W_NORM * unit(W - np.outer(W @ mean, mean))
    if regime == "shared":
        W[FREQUENT] = W_NORM * mean
    samples, hidden = [], {}
    for i in rng.permutation(pairs):
        sample = Sample(f"x{i}", _responses(rng, *PATTERNS[i % len(PATTERNS)]))
        alike = rng.uniform()  # cosine, beyond the mean, of the hidden vectors at equal positions of y+ and y-
        own = unit(rng.standard_normal((6, D)))
        for context in contexts_of([sample]):
            k = len(context[1])
            noise = unit(alike * own[k] + np.sqrt(1 - alike**2) * unit(rng.standard_normal(D)))
            direction = noise if regime == "random" else MEAN * mean + np.sqrt(1 - MEAN**2) * noise
            if regime == "fitted":
                after = [y[k] for y in sample.responses if y[:k] == context[1] and len(y) > k]
                direction = unit(direction + FIT * unit(W[after].sum(axis=0)))
            hidden[context] = H_NORM * direction
        samples.append(sample)
    return UnconstrainedFeatures.from_samples(W, hidden, samples)


def _responses(rng: np.random.Generator, n_plus: int, n_minus: int, equal: Sequence[int]) -> tuple[Response, Response]:
    tokens = [int(t) for t in rng.permutation(V - 1)[: n_plus + n_minus]]
    plus, minus = tokens[:n_plus], tokens[n_plus:]
    for k in equal:
        minus[k] = plus[k]
    return tuple(plus), tuple(minus)


def unit(x: Array) -> Array:
    """Rows of length 1."""
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


@dataclass(frozen=True, eq=False, repr=False)
class Regime:
    """One data set of N pairs: scores at the start against what training each pair alone does.

    joint (5,) : mean change of ln pi(y+) where the JOINT pairs at each percentile of CHES are trained together.
    """

    name: str
    scores: dict[str, Array]  # each (N,)
    change: Array  # (N,) of ln pi(y+) by T_END, nats
    equal_length: NDArray[np.bool_]  # (N,) n+ = n-
    alphas: Array  # all alphas of all pairs
    positive_inner_products: float  # share among <h+, h->
    token_probability: float  # geometric mean over the tokens of y+, at the start
    joint: Array

    def correlation(self, score: str, equal_length: bool = False) -> float:
        """Spearman correlation with the change of ln pi(y+): -1 for a score that ranks all falls rightly."""
        use = self.equal_length if equal_length else np.ones(len(self.change), dtype=bool)
        return float(spearmanr(self.scores[score][use], self.change[use]).statistic)  # type: ignore[union-attr]

    def by_percentile(self, score: str, size: int | None = None) -> Array:
        """(5,) mean change over the `size` pairs around each percentile of the score, by default a tenth of all."""
        size = max(1, len(self.change) // 10) if size is None else size
        return np.array([self.change[subset(self.scores[score], p, size)].mean() for p in PERCENTILES])

    def to_dict(self) -> dict[str, Any]:
        """Plain values: the arrays as lists, and what is derived from them."""
        out = {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in asdict(self).items()}
        return out | {
            "scores": {k: v.tolist() for k, v in self.scores.items()},
            "correlation": {k: self.correlation(k) for k in SCORES},
            "correlation_equal_length": {k: self.correlation(k, True) for k in SCORES},
            "by_percentile": {k: self.by_percentile(k).tolist() for k in SCORES},
            "share_of_positive_alphas": float((self.alphas > 0).mean()),
            "mean_alpha": float(self.alphas.mean()),
        }


@dataclass(frozen=True, repr=False)
class ChesTruth:
    """The study; `report()` is its text, `sims.plots.plot_ches_truth` its figure."""

    regimes: tuple[Regime, ...]
    parameters: dict[str, Any]

    def __getitem__(self, name: str) -> Regime:
        return next(r for r in self.regimes if r.name == name)

    def to_dict(self) -> dict[str, Any]:
        return {"parameters": self.parameters, "regimes": [r.to_dict() for r in self.regimes]}

    def __str__(self) -> str:
        return self.report()

    def report(self) -> str:
        """Tables for a terminal."""
        N = len(self.regimes[0].change)
        lines = [
            f"CHES against the change of ln pi(y+) under DPO gradient flow: {N} pairs a data set, each trained alone",
            "",
            f"  {'':8} {'alphas > 0':>10} {'mean':>6} {'<h+,h-> > 0':>11} {'pi a token':>10} {'pairs that fall':>15}  "
            "change of ln pi(y+), min / median / max",
        ]
        for r in self.regimes:
            low, middle, high = np.quantile(r.change, [0, 0.5, 1])
            lines.append(
                f"  {r.name:8} {(r.alphas > 0).mean():10.0%} {r.alphas.mean():6.2f} {r.positive_inner_products:11.0%} "
                f"{r.token_probability:10.3f} {(r.change < 0).mean():15.0%}  {low:+.2f} / {middle:+.2f} / {high:+.2f}"
            )
        lines += [
            "",
            "  Spearman correlation of each score with that change, -1 ranks all rightly (pairs of equal lengths)",
        ]
        lines.append(f"  {'':26}" + "".join(f"{r.name:>16}" for r in self.regimes))
        for key, label in SCORES.items():
            cells = (f"{r.correlation(key):+.2f} ({r.correlation(key, True):+.2f})" for r in self.regimes)
            lines.append(f"  {label:26}" + "".join(f"{cell:>16}" for cell in cells))
        lines += [
            "",
            f"  mean change of {JOINT} pairs at percentiles {PERCENTILES} of CHES: each trained alone; together",
        ]
        for r in self.regimes:
            rows = (r.by_percentile("ches", JOINT), r.joint)
            one, all_ = (" ".join(f"{x:+6.2f}" for x in row) for row in rows)
            lines.append(f"  {r.name:8} {one};  {all_}")
        return "\n".join(lines)


def ches_truth(pairs: int = 320, seed: int = 0) -> ChesTruth:
    """Run the study on `pairs` pairs a data set (at least 16)."""
    check_count(pairs, "pairs", low=2 * len(PATTERNS))
    parameters = {"pairs": pairs, "seed": seed, "beta": BETA, "t_end": T_END, "V": V, "d": D, "joint": JOINT}
    return ChesTruth(tuple(run(name, data_set(name, pairs, seed)) for name in REGIMES), parameters)


def run(name: str, model: UnconstrainedFeatures) -> Regime:
    """Score every pair of the data set, train each alone, and some together."""
    terms = [sample_terms(model, i) for i in range(len(model.samples))]
    scores = score(model, terms)
    lengths = [(len(s.preferred), len(s.dispreferred)) for s in model.samples]
    starts = [model.log_prob(s.preferred, s.prompt) / len(s.preferred) for s in model.samples]
    subsets = [subset(scores["ches"], p, JOINT) for p in PERCENTILES]
    return Regime(
        name=name,
        scores=scores,
        change=trained_alone(model),
        equal_length=np.array([n == m for n, m in lengths]),
        alphas=np.concatenate([a.ravel() for t in terms for a in (t.alpha_minus, t.alpha_plus)]),
        positive_inner_products=float(np.mean(np.concatenate([t.inner_minus.ravel() for t in terms]) > 0)),
        token_probability=float(np.exp(np.mean(starts))),
        joint=np.array([trained_together(model, rows).mean() for rows in subsets]),
    )


def score(model: UnconstrainedFeatures, terms: Sequence[SequenceTerms]) -> dict[str, Array]:
    """Every score of every pair, each (N,); larger is expected to mean a deeper fall."""
    rows = []
    for s, term in zip(model.samples, terms, strict=True):
        plus, minus = (
            model.H[[model.context_row(s.prompt, y[:k]) for k in range(len(y))]] for y in (s.preferred, s.dispreferred)
        )
        row = (
            term.alpha_weighted,
            ches_score(plus, minus),
            ches_score(plus, minus, length_normalize=True),
            edit_similarity(s.preferred, s.dispreferred),
            last_hidden_inner_product(plus[-1], minus[-1]),
        )
        rows.append(row)
    return dict(zip(SCORES, np.array(rows).T, strict=True))


def subset(values: Array, percentile: float, size: int) -> NDArray[np.intp]:
    """The `size` indices around a percentile of the values; ties in the order of the data, which is random."""
    start = round((len(values) - size) * percentile / 100)
    return np.argsort(values, kind="stable")[start : start + size]


def trained_alone(model: UnconstrainedFeatures) -> Array:
    """(N,) change of ln pi(y+) by T_END where each pair is a data set of its own, from the common W."""
    groups: dict[Any, list[tuple[int, UnconstrainedFeatures]]] = {}
    for i in range(len(model.samples)):
        one = alone(model, i)
        groups.setdefault(one.samples[0].responses, []).append((i, one))
    change = np.empty(len(model.samples))
    for group in groups.values():
        flows = gradient_flow_batch([m for _, m in group], get("dpo", beta=BETA), [0.0, T_END], rtol=1e-6, atol=1e-7)
        for (i, _), flow in zip(group, flows, strict=True):
            change[i] = np.diff(flow.log_probs())[0]
    return change


def trained_together(model: UnconstrainedFeatures, rows: Sequence[int] | NDArray[np.intp]) -> Array:
    """Change of ln pi(y+) of the pairs in `rows`, trained as one data set with one W.

    The loss is a mean over pairs: time is stretched by their number, so that each pair alone would move as before.
    """
    samples = [model.samples[i] for i in rows]
    where = [model.context_row(*c) for c in contexts_of(samples)]
    together = UnconstrainedFeatures.from_samples(model.W, model.H[where], samples)
    times = [0.0, len(samples) * T_END]
    flow = gradient_flow(together, get("dpo", beta=BETA), times, rtol=1e-6, atol=1e-7)
    return np.array([np.diff(flow.log_probs(s.preferred, s.prompt))[0] for s in samples])


def alone(model: UnconstrainedFeatures, sample: int) -> UnconstrainedFeatures:
    """The model of one pair, tokens renamed in order of appearance: pairs of one pattern get the same responses."""
    s = model.samples[sample]
    order = list(dict.fromkeys([*s.preferred, *s.dispreferred]))
    order += [z for z in range(model.V) if z not in order]
    name = {z: i for i, z in enumerate(order)}
    renamed = Sample("x", tuple(tuple(name[z] for z in y) for y in s.responses))
    rows = [model.context_row(*c) for c in contexts_of([s])]
    return UnconstrainedFeatures.from_samples(model.W[order], model.H[rows], [renamed])
