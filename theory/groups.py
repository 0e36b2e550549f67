"""Scores of a group of responses: which correct ones a GRPO step fails to raise, and which wrong tokens are to blame.

Deng et al. (arXiv 2505.18830). With rewards 0 and 1 and success rate p, GRPO at its old policy raises every correct
response with weight p+ = sqrt((1-p)/p) and lowers every other with p- = sqrt(p/(1-p)) (Lemma 4.2: the advantages). In
the unconstrained-features model, moving W alone then changes a correct response y+_i at the rate

    d/dt ln pi(y+_i) = -(eta_W / G) GWHES_i                  (GRPO with length_power = 0, at the reference; G responses)
    GWHES_i = p- sum_{wrong j} <y+_i, y-_j> - p+ sum_{correct i'} <y+_i, y+_i'>
    <v, w>  = sum_{k,l} <e_{v_k} - pi(. | x, v_<k), e_{w_l} - pi(. | x, w_<l)> <h_{x,v<k}, h_{x,w<l}>

(Theorem 4.4, whose proof leaves out the length normalisation, as here). The sum over correct responses, y+_i itself
included, enters with a minus: it is what raises y+_i. Moving hidden vectors adds a term of the contexts that responses
share.

Other rewards are read through their advantages A: a response is correct if its reward is above the group's mean, wrong
if below, and |A| of each takes the place of p+ and p-. A group of equal rewards has no advantages and is refused.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from theory._check import Interval, check_number
from theory.losses import Group, TokenLoss
from theory.losses.grpo import GRPO, advantages
from theory.model import UnconstrainedFeatures
from theory.ops import Ops
from theory.problem import Problem

Array = NDArray[np.float64]
_RATE = Interval(low=0.0, high=1.0)
_FRACTION = Interval(low=0.0, high=1.0, open_low=False, open_high=False)
_FROM_ZERO = Interval(low=0.0, open_low=False)


def preference_weights(p: float) -> tuple[float, float]:
    """(p+, p-) of a group with success rate p in (0, 1), Lemma 4.2: (1-p)/sqrt(p(1-p)) and p/sqrt(p(1-p))."""
    p = check_number(p, "p", _RATE)
    return float(np.sqrt((1 - p) / p)), float(np.sqrt(p / (1 - p)))


@dataclass(frozen=True, repr=False)
class GWHES:
    """Group weighted hidden embedding score of each correct response: the larger, the less a GRPO step raises it.

    correct : which of the sample's responses they are.
    negative : the part of the wrong responses, p- sum_j <y+_i, y-_j>. positive : p+ sum_i' <y+_i, y+_i'>.
    """

    correct: tuple[int, ...]
    negative: tuple[float, ...]
    positive: tuple[float, ...]

    @property
    def scores(self) -> tuple[float, ...]:
        """negative - positive, one per correct response."""
        return tuple(n - p for n, p in zip(self.negative, self.positive, strict=True))

    def to_dict(self) -> dict[str, Any]:
        return {"correct": self.correct, "scores": self.scores, "negative": self.negative, "positive": self.positive}

    def __repr__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        rows = zip(self.correct, self.scores, self.negative, self.positive, strict=True)
        return "\n".join(
            ["GWHES (larger: raised less)"]
            + [f"  response {i}: {s:+.6g} = {n:+.6g} (wrong) - {p:.6g} (correct)" for i, s, n, p in rows]
        )


def gwhes(model: UnconstrainedFeatures, sample: int = 0) -> GWHES:
    """GWHES of the correct responses of one sample, by its rewards (Deng et al., eq. 5)."""
    group = _Members.of(model, sample)
    parts = {
        side: tuple(sum(abs(group.A[j]) * float(group.influence(i, j).sum()) for j in members) for i in group.correct)
        for side, members in (("negative", group.wrong), ("positive", group.correct))
    }
    return GWHES(tuple(group.correct), **parts)


@dataclass(frozen=True, eq=False, repr=False)
class NTHR:
    """Negative token hidden rewards: how much each token of a wrong response drags the correct ones down with it.

    wrong : which of the sample's responses they are. scores : s per token of each of them, arrays (|y-_j|,).
    anchors : mean over its tokens of the same score, of each correct response. threshold : beta_n min(anchors).
    lengths : of all responses.
    """

    wrong: tuple[int, ...]
    scores: tuple[Array, ...]
    anchors: tuple[float, ...]
    threshold: float
    lengths: tuple[int, ...]

    @property
    def flagged(self) -> tuple[NDArray[np.bool_], ...]:
        """Tokens of the wrong responses above the threshold, whose penalty is to be eased."""
        return tuple(s > self.threshold for s in self.scores)

    def weights(self, eta: float = 0.0) -> tuple[tuple[float, ...], ...]:
        """Factors of the advantage of every token of every response: eta in [0, 1] where flagged, else 1.

        The paper: 0 in its analysis (Section 5.3), 2 |p - 1/2| in training (Appendix 7.3).
        """
        eta = check_number(eta, "eta", _FRACTION)
        marks = dict(zip(self.wrong, self.flagged, strict=True))
        return tuple(
            tuple(np.where(marks[i], eta, 1.0).tolist()) if i in marks else (1.0,) * n
            for i, n in enumerate(self.lengths)
        )

    def loss(self, base: GRPO | None = None, eta: float = 0.0) -> "WeightedGRPO":
        """GRPO on this group with the penalty of the flagged tokens times eta."""
        return WeightedGRPO(GRPO() if base is None else base, self.weights(eta))

    def to_dict(self) -> dict[str, Any]:
        return {
            "wrong": self.wrong,
            "scores": [s.tolist() for s in self.scores],
            "flagged": [f.tolist() for f in self.flagged],
            "anchors": self.anchors,
            "threshold": self.threshold,
        }

    def __repr__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        rows = [f"NTHR (threshold {self.threshold:+.6g}; * above it)"]
        for j, scores, flags in zip(self.wrong, self.scores, self.flagged, strict=True):
            marks = ", ".join(f"{s:+.4g}{'*' if f else ''}" for s, f in zip(scores, flags, strict=True))
            rows.append(f"  response {j}: {marks}")
        return "\n".join(rows)


def nthr(model: UnconstrainedFeatures, sample: int = 0, beta_n: float = 1.0) -> NTHR:
    """Scores of the tokens of wrong responses and their threshold (Deng et al., eq. 7 and 8).

    s_{j,k'} = sum over correct i, k of alpha^-_{k,k'} <h_{x,y+_i<k}, h_{x,y-_j<k'}>. The same sum for a token of a
    correct response, averaged over its tokens, is that response's anchor; it runs over all correct responses, itself
    included, as in known implementations (the paper's text speaks of the "other" ones).

    With rewards 0 and 1 the scores of all wrong tokens sum to that of GWHES's negative parts over p-: easing a token of
    score s by 1 - eta raises the sum of ln pi(y+_i) by (1 - eta) p- s eta_W / G, to first order and through W.
    """
    beta_n = check_number(beta_n, "beta_n", _FROM_ZERO)
    group = _Members.of(model, sample)

    def score(j: int) -> Array:
        return np.sum([group.influence(i, j).sum(0) for i in group.correct], axis=0)

    anchors = tuple(float(score(i).mean()) for i in group.correct)
    lengths = tuple(len(y) for y in model.samples[sample].responses)
    return NTHR(tuple(group.wrong), tuple(map(score, group.wrong)), anchors, beta_n * min(anchors), lengths)


@dataclass(frozen=True)
class WeightedGRPO(TokenLoss):
    """`base` with the advantage of token k of response i times `weights[i][k]`: fixed during the step, as NTHR's are.

    For a problem of one sample, whose responses `weights` describes.
    """

    base: GRPO
    weights: tuple[tuple[float, ...], ...]

    name = "grpo_nthr"
    reference = "Deng et al. 2025 (arXiv 2505.18830), Algorithm 1"
    tex = GRPO.tex.replace("A_i", r"w_{i,t}A_i")

    def __post_init__(self) -> None:
        if not isinstance(self.base, GRPO):
            raise ValueError(f"base must be a GRPO loss, got {self.base!r}")
        rows = tuple(tuple(check_number(f, "weights", _FROM_ZERO) for f in row) for row in self.weights)
        object.__setattr__(self, "weights", rows)

    @property
    def claims(self) -> Any:  # type: ignore[override]
        return self.base.claims

    def formula(self, ops: Ops, y: Group) -> Any:  # type: ignore[override]
        lengths = [z.n for z in y.responses]
        if [len(row) for row in self.weights] != lengths:
            raise ValueError(f"weights must hold a number per token of each response {lengths}, got {self.weights}")
        return self.base.weighted(ops, y, self.weights)


@dataclass(frozen=True, repr=False)
class LikelihoodChange:
    """Change of ln pi (nats) of each correct response from one model to another, and which of them were lazy.

    `lazy`: the change is below eps (Definition 4.1, for training that lowered its loss). `mean`: Delta(x), eq. 2.
    """

    correct: tuple[int, ...]
    changes: tuple[float, ...]
    eps: float

    @property
    def lazy(self) -> tuple[bool, ...]:
        return tuple(c < self.eps for c in self.changes)

    @property
    def mean(self) -> float:
        return float(np.mean(self.changes))

    def to_dict(self) -> dict[str, Any]:
        return {
            "correct": self.correct,
            "changes": self.changes,
            "eps": self.eps,
            "lazy": self.lazy,
            "mean": self.mean,
        }

    def __repr__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        rows = [
            f"  response {i}: {c:+.6g}{' lazy' if lazy else ''}"
            for i, c, lazy in zip(self.correct, self.changes, self.lazy, strict=True)
        ]
        return "\n".join([f"change of ln pi of correct responses, mean {self.mean:+.6g} (eps = {self.eps:g})", *rows])


def likelihood_change(
    before: UnconstrainedFeatures, after: UnconstrainedFeatures, sample: int = 0, eps: float = 0.0
) -> LikelihoodChange:
    """Lazy likelihood displacement between two models of the same samples; eps >= 0 in nats."""
    eps = check_number(eps, "eps", _FROM_ZERO)
    group = _Members.of(before, sample)
    s = before.samples[sample]
    other = after.samples[sample] if sample < len(after.samples) else None
    if other is None or (s.prompt, s.responses) != (other.prompt, other.responses):
        raise ValueError(f"after must hold the same responses as before in sample {sample}, got {other}")
    log_prob = [[m.log_prob(s.responses[i], s.prompt) for i in group.correct] for m in (before, after)]
    return LikelihoodChange(tuple(group.correct), tuple(b - a for a, b in zip(*log_prob, strict=True)), eps)


@dataclass(frozen=True, eq=False)
class _Members:
    """A sample's responses by advantage, and how they bear on one another."""

    problem: Problem
    sample: int
    A: tuple[float, ...]
    correct: list[int]
    wrong: list[int]

    @classmethod
    def of(cls, model: UnconstrainedFeatures, sample: int) -> "_Members":
        if not 0 <= sample < len(model.samples):
            raise ValueError(f"sample must be in [0, {len(model.samples)}), got {sample}")
        rewards = model.samples[sample].rewards
        assert rewards is not None
        A = advantages(rewards)
        if not any(A):
            raise ValueError(f"rewards of sample {sample} must not all be equal, got {rewards}")
        correct, wrong = ([i for i, a in enumerate(A) if sign * a > 0] for sign in (1, -1))
        return cls(Problem.of(model, GRPO()), sample, A, correct, wrong)

    def influence(self, i: int, j: int) -> Array:
        """(|y_i|, |y_j|) alpha_{k,l} <h_k, h_l> of responses i and j."""
        s = self.problem.samples[self.sample]
        v, w = (self.problem.positions(s.responses[r], s.prompt) for r in (i, j))
        parts = self.problem.overlap(v, w)
        return (parts.alpha * parts.hidden)[0]
