"""Losses made of losses: weighted sums, an SFT term, weighted, length-normalised or f-transformed log-probabilities.

They are no entries of the registry: each is an operation on entries.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

from theory._check import POSITIVE, REAL, check_number
from theory.losses._base import Claims, Loss, MarginForm, MarginLoss, Pair, TokenLoss
from theory.model import Sample
from theory.ops import Ops


class Combined(Loss):
    """A loss made of others, its fields; it is what all of them are."""

    @property
    def parts(self) -> tuple[Loss, ...]:
        """The losses within."""
        values = [getattr(self, f.name) for f in dataclasses.fields(self)]  # type: ignore[arg-type]
        return tuple(x for v in values for x in (v if isinstance(v, tuple) else (v,)) if isinstance(x, Loss))

    @property
    def claims(self) -> Claims:  # type: ignore[override]
        each = [dataclasses.asdict(part.claims) for part in self.parts]
        return Claims(**{claim: all(c[claim] for c in each) for claim in each[0]})

    @property
    def coupled(self) -> bool:  # type: ignore[override]
        return any(part.coupled for part in self.parts)

    @property
    def uses_norms(self) -> bool:  # type: ignore[override]
        return any(part.uses_norms for part in self.parts)


NORMALISATIONS = ("sequence", "token", "batch_token")


@dataclass(frozen=True)
class SFT(Combined):
    """`base` plus `lam` times the negative log-likelihood of y+: the paper's form (4), as in CPO, RPO and BoNBoN.

    per : what the likelihood is counted by. Trainers differ, by factors of |y+|:
        "sequence": -lam ln pi(y+), a sum over tokens (Razin et al.; RPO of Liu et al.; BoNBoN);
        "token": -lam ln pi(y+) / |y+|, a mean per sequence (IRPO of Pang et al.; ORPO);
        "batch_token": the sum over the batch over its number of tokens (TRL's `sft`, CPO's NLL): couples the batch.
    """

    base: Loss
    lam: float
    per: str = "sequence"

    name = "sft"
    reference = "Razin et al. 2024 (arXiv 2410.08847), App. E, eq. 4"

    def __post_init__(self) -> None:
        _check_base(self.base)
        object.__setattr__(self, "lam", check_number(self.lam, "lam", POSITIVE))
        if self.per not in NORMALISATIONS:
            raise ValueError(f"per must be one of {', '.join(NORMALISATIONS)}, got {self.per!r}")

    @property
    def coupled(self) -> bool:  # type: ignore[override]
        return self.base.coupled or self.per == "batch_token"

    def formula(self, ops: Ops, y: Pair) -> Any:
        return self.base.formula(ops, y) + self.lam * negative_log_likelihood(ops, y, self.per)


def negative_log_likelihood(ops: Ops, y: Pair, per: str) -> Any:
    """-ln pi(y+), counted as `SFT.per` says."""
    if per == "sequence":
        return -y.a
    return -y.a / (y.n_w if per == "token" else ops.mean(y.n_w))


@dataclass(frozen=True)
class Weighted(Combined):
    """`base` of the margin `lam_w ln pi(y+) - lam_l ln pi(y-)`, and of the references weighted alike.

    The paper's form (5), which covers DPO-Shift (weights 1 and lambda) and DPOP (an extra factor on y+).
    """

    base: Loss
    lam_w: float
    lam_l: float

    name = "weighted"
    reference = "Razin et al. 2024 (arXiv 2410.08847), App. E, eq. 5"

    def __post_init__(self) -> None:
        _check_base(self.base)
        for name in ("lam_w", "lam_l"):
            object.__setattr__(self, name, check_number(getattr(self, name), name, POSITIVE))

    def pair(self, y: Pair) -> Pair:
        """The weighted log-probabilities that `base` sees."""
        return weighted_pair(y, self.lam_w, self.lam_l)

    def formula(self, ops: Ops, y: Pair) -> Any:
        return self.base.formula(ops, self.pair(y))

    def margin(self, sample: Sample) -> MarginForm | None:
        return scaled_margin(self.base, sample, self.lam_w) if self.lam_w == self.lam_l else None


@dataclass(frozen=True)
class PerToken(Combined):
    """`base` of log-probabilities per token, ln pi(y)/|y|, references alike: r = |y-|/|y+| if it is a margin loss."""

    base: Loss

    name = "per_token"
    reference = "TRL's ipo and sigmoid_norm; Razin et al. 2024 (arXiv 2410.08847), App. E, eq. 5"

    def __post_init__(self) -> None:
        _check_base(self.base)

    def formula(self, ops: Ops, y: Pair) -> Any:
        return self.base.formula(ops, weighted_pair(y, 1 / y.n_w, 1 / y.n_l))

    def margin(self, sample: Sample) -> MarginForm | None:
        n_w, n_l = len(sample.preferred), len(sample.dispreferred)
        return scaled_margin(self.base, sample, 1 / n_w) if n_w == n_l else None


def weighted_pair(y: Pair, lam_w: Any, lam_l: Any) -> Pair:
    """Log-probabilities and references of y+ times lam_w, of y- times lam_l."""
    return y._replace(a=lam_w * y.a, b=lam_l * y.b, a_ref=lam_w * y.a_ref, b_ref=lam_l * y.b_ref)


@dataclass(frozen=True)
class Sum(Combined):
    """`weights[0] losses[0] + weights[1] losses[1] + ...`, for trainers that mix several losses."""

    losses: tuple[Loss, ...]
    weights: tuple[float, ...]

    name = "sum"
    reference = "TRL's loss_weights (MPO: Wang et al. 2024, arXiv 2411.10442)"

    def __post_init__(self) -> None:
        object.__setattr__(self, "losses", tuple(self.losses))
        for loss in self.losses:
            _check_base(loss)
        weights = tuple(check_number(w, "weights", REAL) for w in self.weights)
        if not self.losses or len(weights) != len(self.losses):
            raise ValueError(f"weights must hold a number per loss ({len(self.losses)}, not 0), got {self.weights!r}")
        object.__setattr__(self, "weights", weights)

    @property
    def claims(self) -> Claims:  # type: ignore[override]
        each = [(w, loss.claims) for w, loss in zip(self.weights, self.losses, strict=True) if w]
        upright = all(w > 0 for w, _ in each)  # a negative weight turns a loss over
        return Claims(
            convex=upright and all(c.convex for _, c in each),
            decreasing=upright and all(c.decreasing for _, c in each),
            differentiable=all(c.differentiable for _, c in each),
            reference_free=all(c.reference_free for _, c in each),
            nonnegative=upright and all(c.nonnegative for _, c in each),
        )

    def formula(self, ops: Ops, y: Pair) -> Any:
        first, *rest = (w * loss.formula(ops, y) for w, loss in zip(self.weights, self.losses, strict=True))
        return sum(rest, start=first)


@dataclass(frozen=True)
class _Scaled(MarginLoss):
    """`base` of c times the margin and c times its reference: how a length-normalised loss sees equal lengths."""

    base: MarginLoss
    c: float

    name = "scaled"
    reference = "a change of the margin's unit"

    def __post_init__(self) -> None: ...

    @property
    def claims(self) -> Claims:  # type: ignore[override]
        return self.base.claims

    def _inner(self, y: Pair) -> Pair:
        return weighted_pair(y, self.c, self.c)

    def formula(self, ops: Ops, y: Pair) -> Any:
        return self.base.formula(ops, self._inner(y))

    # The base's closed slopes, where it has them, in the new unit.

    @property
    def closed_slope(self) -> Any:  # type: ignore[override]
        inner = self.base.closed_slope
        return None if inner is None else lambda ops, y: self.c * inner(ops, self._inner(y))

    @property
    def closed_log_slope(self) -> Any:  # type: ignore[override]
        inner = self.base.closed_log_slope
        return None if inner is None else lambda ops, y: ops.log(self.c) + inner(ops, self._inner(y))

    def minimiser(self, u_ref: Any) -> Any:
        least = self.base.minimiser(self.c * u_ref)
        return None if least is None else least / self.c

    def zeros(self, u_ref: Any) -> tuple[Any, ...]:
        return tuple(z / self.c for z in self.base.zeros(self.c * u_ref))

    def kinks(self, u_ref: Any) -> tuple[Any, ...]:
        return tuple(z / self.c for z in self.base.kinks(self.c * u_ref))


def scaled_margin(base: Loss, sample: Sample, c: float, u_ref: float | None = None) -> MarginForm | None:
    """The margin form of `base` when both log-probabilities are multiplied by c; u_ref: default the sample's."""
    if not isinstance(base, MarginLoss):
        return None
    return MarginForm(_Scaled(base, c), sample.reference_margin if u_ref is None else u_ref)


def _check_base(base: Any) -> None:
    if not isinstance(base, Loss) or isinstance(base, TokenLoss):
        raise ValueError(f"base must be a loss of the two log-probabilities (theory.losses.Loss), got {base!r}")
