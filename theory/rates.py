"""Instantaneous rates of log-probabilities, term by term as the paper names them.

`log_prob_rate` gives d/dt ln pi(z | x) under gradient flow for any response, trained or not, any loss and any number
of samples. All of it is one formula (`theory.problem`); where a theorem of Razin et al. (arXiv 2410.08847) covers the
case, its terms are the ones reported: Theorems 4 and 5 for a single-token pair, 6 and 7 for sequences, 8 and 9 for data
sets of single-token pairs, Propositions 1 and 2 for an SFT term and for weighted log-probabilities. Terms that come
from moving hidden vectors carry eta_h, those from moving W carry eta_W.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from theory.losses import Loss, TokenLoss
from theory.model import UnconstrainedFeatures, token_index
from theory.problem import Positions, Problem
from theory.theorems import THEOREMS
from theory.theorems._base import RateTheorem
from theory.theorems._single import Branch

Array = NDArray[np.float64]

# In order: the first whose hypotheses hold, and whose response it is, names the terms.
_OF_PREFERRED = ("theorem_4", "theorem_6", "shared_prefix", "theorem_8", "proposition_1", "proposition_2")
_OF_OTHERS = ("theorem_5", "theorem_7", "theorem_9")


@dataclass(frozen=True, repr=False)
class Rate:
    """d/dt ln pi(response), in nats per unit of time, as a sum of named terms (each already times G and its rate).

    theorem : name of the claim whose terms these are (`theory.theorems.THEOREMS`).
    samples (S,): what each sample of the data contributes; their sum is the rate, too.
    sensitivity : single-token pairs only. Derivative of the rate in one inner product with everything else
        (probabilities included) held fixed, of other tokens the 20 likeliest: the sign of each is what Theorems 1 and 2
        state in words.
    """

    response: str
    terms: dict[str, float]
    theorem: str
    samples: tuple[float, ...]
    sensitivity: dict[str, float]

    @property
    def total(self) -> float:
        return float(sum(self.terms.values()))

    def to_dict(self) -> dict[str, Any]:
        return {
            "response": self.response,
            "total": self.total,
            "theorem": self.theorem,
            "terms": self.terms,
            "samples": list(self.samples),
            "sensitivity": self.sensitivity,
        }

    def __repr__(self) -> str:
        return str(self)  # a notebook or a prompt shows the table

    def __str__(self) -> str:
        rows = "\n".join(f"  {name:30} {value:+.6g}" for name, value in self.terms.items())
        return f"d/dt ln pi({self.response}) = {self.total:+.6g}    [{self.theorem}]\n{rows}"


def log_prob_rate(
    model: UnconstrainedFeatures,
    loss: Loss,
    response: int | str | Iterable[int | str] | None = None,
    sample: int = 0,
    *,
    lr_unembedding: float = 1.0,
    lr_hidden: float = 1.0,
) -> Rate:
    """The rate of ln pi(response | prompt of `sample`) under gradient flow of the mean loss, at the model's parameters.

    Parameters
    ----------
    response : a token, or a sequence of tokens (indices or names); default y+ of `sample`. It need not be trained, but
        each of its contexts must have a hidden vector in the model.
    sample : which sample's prompt is meant.
    lr_unembedding, lr_hidden : learning rates eta_W, eta_h >= 0.

    Raises
    ------
    ValueError : a token or sample out of range, an empty response, a context missing from the model, bad rates or loss.
    """
    problem = Problem.of(model, loss, lr_unembedding, lr_hidden)
    count = len(model.samples)
    if isinstance(sample, bool) or not isinstance(sample, int | np.integer) or not 0 <= sample < count:
        raise ValueError(f"sample must be an index in [0, {count}) of the model's {count} sample(s), got {sample!r}")
    chosen = model.samples[sample]
    y = chosen.preferred if response is None else _tokens(response, model)
    z = problem.positions(y, chosen.prompt)
    theorem = _naming(problem, z, sample)
    terms = {name: float(value[0]) for name, value in theorem.terms(problem, z).items()}
    parts = problem.rate_by_sample(z)[0] if count > 1 else [sum(terms.values())]
    single = theorem.name in ("theorem_4", "theorem_5")
    return Rate(
        "+".join(model.name(t) for t in y),
        terms,
        theorem.name,
        tuple(map(float, parts)),
        _sensitivity(model, Branch(problem), z.tokens[0], problem) if single else {},
    )


def _tokens(response: Any, model: UnconstrainedFeatures) -> tuple[int, ...]:
    if isinstance(response, str | int | np.integer) or not isinstance(response, Iterable):
        response = (response,)
    return tuple(token_index(t, model.tokens, "response") for t in response)


def _naming(problem: Problem, z: Positions, sample: int) -> RateTheorem:
    """The claim that names the terms of this rate."""
    probed = replace(problem, probe=(problem.samples[sample].prompt, z.tokens))
    if isinstance(problem.loss, TokenLoss):
        return _rate_theorem("token_rate")
    names = _OF_PREFERRED if z == problem.pairs[sample][0] else _OF_OTHERS
    for name in names:
        theorem = _rate_theorem(name)
        if theorem.applies(probed).all():
            return theorem
    return _rate_theorem("general_rate")


def _rate_theorem(name: str) -> RateTheorem:
    theorem = THEOREMS[name]
    assert isinstance(theorem, RateTheorem)
    return theorem


def _sensitivity(model: UnconstrainedFeatures, x: Branch, z: int, problem: Problem) -> dict[str, float]:
    """Derivatives of Theorems 4 and 5 in their inner products."""
    p, rest, mass = x.p[0], float(x.rest[0]), float(x.mass[0])
    body, head = float(x.G[0]) * problem.lr_hidden, float(x.G[0]) * problem.lr_unembedding
    if z != x.plus:
        name = model.name(z)
        return {
            f"<W_{name}, W_+ - W_->": body * float(1 - p[z]),
            "|h|^2": head * float(p[x.minus] - p[x.plus] - (z == x.minus)),
        }
    others = np.nonzero(x.others)[0]
    return {
        "<W_+, W_->": -body * mass,
        "|W_+|^2": body * rest,
        "|W_-|^2": body * float(p[x.minus]),
        "|h|^2": head * mass,
    } | {f"<W_{model.name(int(v))}, W_+ - W_->": -body * float(p[v]) for v in others[np.argsort(-p[others])][:20]}
