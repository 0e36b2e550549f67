"""Losses of whole responses made token-level: surplus tokens weighted down (LD), samples weighted by confidence (WPO).

They are no entries of the registry: each is an operation on entries, any loss of the two log-probabilities.
"""

from dataclasses import dataclass, replace
from typing import Any

from theory._check import Interval, check_number
from theory.losses._base import Claims, Loss, MarginForm, TokenLoss
from theory.losses._combine import _check_base
from theory.losses._data import Group, Pair, Tokens
from theory.model import Sample
from theory.ops import Ops

FRACTION = Interval(0.0, 1.0, open_low=False, open_high=False, typical=(0.1, 0.9))


def _check_single(base: Any) -> None:
    _check_base(base)
    if base.coupled:
        raise ValueError(f"base must be a loss of one sample by itself, got {base!r}, which couples its batch")


@dataclass(frozen=True)
class LD(TokenLoss):
    """`base` with the tokens beyond the shorter length weighted by alpha, in both responses and their references.

    ln pi(y) -> sum_{t <= n} ln pi(y_t) + alpha sum_{t > n} ln pi(y_t), n = min(|y+|, |y-|). alpha = 1 is `base`;
    alpha = 0 sees n tokens of each. Lengths that `base` divides by stay the full ones (TRL's choice).
    """

    base: Loss
    alpha: float

    name = "ld"
    reference = "Liu et al. 2024 (arXiv 2409.06411); TRL's ld_alpha"

    def __post_init__(self) -> None:
        _check_single(self.base)
        object.__setattr__(self, "alpha", check_number(self.alpha, "alpha", FRACTION))

    @property
    def claims(self) -> Claims:  # type: ignore[override]
        return self.base.claims

    def formula(self, ops: Ops, y: Group) -> Any:  # type: ignore[override]
        w, l = y.responses[:2]
        n = min(w.n, l.n)

        def total(x: Any) -> Any:
            return x[..., :n].sum(-1) + self.alpha * x[..., n:].sum(-1)

        pair = Pair(total(w.log_prob), total(l.log_prob), total(w.ref), total(l.ref), w.n, l.n)
        return self.base.formula(ops, pair)

    def margin(self, sample: Sample) -> MarginForm | None:
        whole = self.alpha == 1 or len(sample.preferred) == len(sample.dispreferred)
        return self.base.margin(sample) if whole else None

    def latex(self) -> str:
        weighted = r"\ln\pi(y) := \sum_{t\le n}\ln\pi(y_t) + \alpha\sum_{t>n}\ln\pi(y_t),\quad n = \min(|y^+|,|y^-|)"
        return rf"{self.base.latex()},\quad {weighted}"


@dataclass(frozen=True)
class WPOWeighted(TokenLoss):
    """`base` times w(y+) w(y-), a constant for the gradient: w(y) = exp(mean_t [ln pi(y_t) - ln sum_v pi(v)^2]).

    w(y) is 1 where each token is as likely as the model expects of its own samples, and can exceed 1.
    """

    base: Loss

    name = "wpo_weighted"
    reference = "Zhou et al. 2024 (arXiv 2406.11827); TRL's use_weighting"

    def __post_init__(self) -> None:
        _check_single(self.base)

    @property
    def claims(self) -> Claims:  # type: ignore[override]
        return replace(self.base.claims, convex=False)

    def formula(self, ops: Ops, y: Group) -> Any:  # type: ignore[override]
        w, l = y.responses[:2]
        return ops.detach(ops.exp(_log_weight(w) + _log_weight(l))) * self.base.formula(ops, y.pair)

    def latex(self) -> str:
        weight = r"w(y) = \exp \frac{1}{|y|}\sum_t \Big[\ln\pi(y_t) - \ln\sum_v \pi(v \mid y_{<t})^2\Big]"
        return rf"\mathrm{{sg}}\big[w(y^+)\,w(y^-)\big] \Big({self.base.latex()}\Big),\quad {weight}"


def _log_weight(y: Tokens) -> Any:
    return (y.log_prob - y.log_sum_sq).sum(-1) / y.n
