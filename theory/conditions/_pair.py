"""Conditions in the incentives d_w, d_l of a loss and the inner products of g+ = grad ln pi(y+), g- = grad ln pi(y-).

One sample moves by `d ln pi(y+)/dt = d_w |g+|^2 - d_l <g+, g->` and `d ln pi(y-)/dt = d_w <g+, g-> - d_l |g-|^2`, for
every loss of the two log-probabilities; norms and products are in the metric of the learning rates. In a data set this
is what the sample itself contributes (times 1/|D|). Everything is (B,), one entry per model of the problem.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from theory.conditions._record import Array, Mask, Record, pair_of
from theory.losses import Loss, Pair
from theory.losses._calibrated import calibration
from theory.problem import Problem

Kind = Literal["margin", "constant ratio", "two-likelihood", "at rest"]
# Where a ratio is tried again to see whether it varies: changes of ln pi(y+) and ln pi(y-), nats.
_ELSEWHERE = (
    (0.3, -0.4),
    (-0.7, 0.2),
    (-1.3, -2.1),
    (1.1, 0.9),
    (-3.0, -0.1),
    (-0.2, -4.0),
    (-6.0, -7.0),
    (-9.0, -2.0),
)


@dataclass(frozen=True)
class IncentiveRatio(Record):
    """How hard a loss pushes y+ up (d_w = -dL/da) against how hard it pushes y- down (d_l = dL/db).

    r = d_w/d_l; inf where only d_l vanishes, NaN where both do: the loss is at rest there.
    kind : of the loss with these references and lengths, as found at a few other log-probabilities (`ratio_kind`).
    """

    d_w: Array
    d_l: Array
    r: Array
    kind: Kind

    def __str__(self) -> str:
        return f"d_w = {_few(self.d_w)}, d_l = {_few(self.d_l)}, r = {_few(self.r)} ({self.kind})"


def _few(x: Any) -> str:
    x = np.atleast_1d(x).ravel()
    return ", ".join(f"{v:.4g}" for v in x[:4]) + (", ..." if x.size > 4 else "")


def _ratio(d_w: Array, d_l: Array) -> Array:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(d_w) / np.asarray(d_l)


def incentive_ratio(loss: Loss, pair: Pair) -> IncentiveRatio:
    """r = d_w/d_l of a loss at the given log-probabilities (scalars or arrays).

    The sign of d ln pi(y+)/dt depends on the loss through r alone: theory of arXiv 2604.18239; Razin et al., App. E.
    """
    d_w, d_l = loss.incentives(pair)
    found = []
    for move_a, move_b in _ELSEWHERE:
        for a, b in ((pair.a, pair.b), (pair.a_ref, pair.b_ref)):
            there = pair._replace(a=np.minimum(a + np.float64(move_a), 0.0), b=np.minimum(b + np.float64(move_b), 0.0))
            e_w, e_l = loss.incentives(there)
            # Slopes that have all but underflowed have lost the digits of their ratio.
            clear = np.isfinite(e_w) & np.isfinite(e_l) & (np.maximum(abs(e_w), abs(e_l)) > 1e-200)
            found.append(np.where(clear, _ratio(e_w, e_l), np.nan))
    rows = np.stack(np.broadcast_arrays(*found), axis=-1).reshape(-1, len(found))
    return IncentiveRatio(d_w, d_l, _ratio(d_w, d_l), ratio_kind(rows))


def ratio_kind(rows: Iterable[Array]) -> Kind:
    """What kind of loss has these incentive ratios: each row at several places for one set of references and lengths.

    "margin": r = 1 everywhere. "constant ratio": one number for each row, inf included (no push on y-).
    "two-likelihood": it moves with the probabilities. "at rest": no ratio at all (NaN is left out).
    """
    rows = [r[~np.isnan(r)] for r in rows]
    rows = [r for r in rows if r.size]
    if not rows:
        return "at rest"
    if not all(_same(r, r[0]) for r in rows):
        return "two-likelihood"
    return "margin" if all(_same(r, 1.0) for r in rows) else "constant ratio"


def _same(r: Array, value: float) -> bool:
    return bool(np.isclose(r, value, rtol=1e-9, atol=0).all())


@dataclass(frozen=True)
class Entanglement(Record):
    """How y+ and y- move together (Yuan et al. 2024, arXiv 2410.13828, condition 1, for any loss).

    rate_w, rate_l, rate_u : d/dt of ln pi(y+), ln pi(y-) and of the margin that this sample causes.
    case : "apart" (y+ does not fall, y- does not rise; their case 1), "both fall" (2), "both rise" (3), "reversed" (y+
        falls and y- rises, which takes a negative incentive), "at rest".
    """

    d_w: Array
    d_l: Array
    own_w: Array  # |g+|^2
    own_l: Array  # |g-|^2
    common: Array  # <g+, g->
    rate_w: Array
    rate_l: Array
    rate_u: Array
    case: tuple[str, ...]

    @property
    def rho(self) -> Array:
        """cos of the angle between g+ and g-; 0 where one of them vanishes."""
        size = np.sqrt(self.own_w * self.own_l)
        return np.clip(np.where(size > 0, self.common / np.where(size > 0, size, 1.0), 0.0), -1.0, 1.0)

    @property
    def r_star(self) -> Array:
        """|g-|/|g+|; inf where only g+ vanishes, NaN where both do."""
        return _ratio(np.sqrt(self.own_l), np.sqrt(self.own_w))

    def __str__(self) -> str:
        return (
            f"{', '.join(self.case[:4])}: |g+|^2 = {_few(self.own_w)}, |g-|^2 = {_few(self.own_l)},"
            f" <g+, g-> = {_few(self.common)}"
        )


def gradient_entanglement(problem: Problem, sample: int = 0) -> Entanglement:
    """Whether y+ rises, d_w |g+|^2 >= d_l <g+, g->, and y- falls, d_w <g+, g-> <= d_l |g-|^2, from the incentives."""
    w, l = pair_of(problem, sample)
    d_w, d_l = (d[:, sample] for d in problem.incentives)
    own_w, own_l, common = problem.inner(w, w), problem.inner(l, l), problem.inner(w, l)
    rate_w, rate_l = d_w * own_w - d_l * common, d_w * common - d_l * own_l
    names = {(True, True): "apart", (False, True): "both fall", (True, False): "both rise", (False, False): "reversed"}
    case = tuple(
        "at rest" if up == down == 0 else names[bool(up >= 0), bool(down <= 0)]
        for up, down in zip(rate_w, rate_l, strict=True)
    )
    return Entanglement(d_w, d_l, own_w, own_l, common, rate_w, rate_l, rate_w - rate_l, case)


@dataclass(frozen=True)
class Band(Record):
    """The disentanglement band of incentive ratios (arXiv 2604.18239): lower <= r <= upper.

    winner_safe : r >= rho r*, y+ is not suppressed. loser_suppressed : r <= r*/rho, y- does not rise. Both are decided
        without dividing, so that incentives of any sign and vanishing gradients are covered.
    lower, upper : rho r* and r*/rho; 0 and inf for rho <= 0, where every r > 0 will do.
    position : (ln r - ln r*)/(-ln rho), -1 and 1 at the edges, 0 at the centre r = r*; 0 for rho <= 0. For incentives
        that are not both positive: -inf if d_w <= 0, else inf; NaN where a gradient vanishes.
    calibration : c of `theory.losses.Calibrated`, which takes r to the centre; 1 where there is nothing to calibrate.
    """

    rho: Array
    r: Array
    r_star: Array
    lower: Array
    upper: Array
    winner_safe: Mask
    loser_suppressed: Mask
    position: Array
    calibration: Array

    def __str__(self) -> str:
        return f"[{_few(self.lower)}, {_few(self.upper)}], r = {_few(self.r)} at {_few(self.position)}"


def disentanglement_band(problem: Problem, sample: int = 0) -> Band:
    """Where the loss's incentive ratio lies in the band that the model's gradients leave it."""
    e = gradient_entanglement(problem, sample)
    rho, r_star, r = e.rho, e.r_star, _ratio(e.d_w, e.d_l)
    norm_w, norm_l = np.sqrt(e.own_w), np.sqrt(e.own_l)
    # |g+| d_w >= rho |g-| d_l and rho |g+| d_w <= |g-| d_l; a vanishing gradient does not move its response.
    winner_safe = (norm_w == 0) | (e.d_w * norm_w >= rho * e.d_l * norm_l)
    loser_suppressed = (norm_l == 0) | (rho * e.d_w * norm_w <= e.d_l * norm_l)
    with np.errstate(divide="ignore", invalid="ignore"):
        lower = np.where(rho > 0, rho * r_star, 0.0)
        upper = np.where(rho > 0, r_star / rho, np.inf)
        away = np.log(r) - np.log(r_star)
        # At rho = 1 the band is a point: on it, or infinitely far from it.
        position = np.where(away == 0, 0.0, away / abs(np.log(np.maximum(rho, 0.0))))
    positive = (e.d_w > 0) & (e.d_l > 0)
    position = np.where(positive, position, np.where(e.d_w <= 0, -np.inf, np.inf))
    position = np.where((norm_w > 0) & (norm_l > 0), position, np.nan)
    c = calibration(e.d_w, e.d_l, r_star)
    return Band(rho, r, r_star, lower, upper, winner_safe, loser_suppressed, position, c)


def displacement_signs(problem: Problem, sample: int = 0) -> tuple[Array, Array, Array]:
    """Signs of d/dt of ln pi(y+), ln pi(y-) and the margin: by the band for one sample, by rates for a data set."""
    w, l = pair_of(problem, sample, whole=True)
    if len(problem.samples) > 1:
        up, down = problem.rate(w), problem.rate(l)
        return np.sign(up), np.sign(down), np.sign(up - down)
    e, r = gradient_entanglement(problem), disentanglement_band(problem)
    norm_w, norm_l = np.sqrt(e.own_w), np.sqrt(e.own_l)
    up = np.where(norm_w == 0, 0.0, e.d_w * norm_w - r.rho * e.d_l * norm_l)
    down = np.where(norm_l == 0, 0.0, r.rho * e.d_w * norm_w - e.d_l * norm_l)
    margin = e.d_w * (e.own_w - e.common) + e.d_l * (e.own_l - e.common)
    return np.sign(up), np.sign(down), np.sign(margin)


@dataclass(frozen=True)
class Thresholds(Record):
    """The smallest remedy with which this sample does not push its own y+ down; 0 (or 1) where none is needed.

    sft : weight lambda of -lambda ln pi(y+), summed over tokens: d_l <g+, g->/|g+|^2 - d_w, for a margin loss
        -l'(u) (rho r* - 1) (Razin et al., Prop. 1). sft_per_token : the weight if it is a mean over tokens, times |y+|.
    weight_ratio : lambda+/lambda- of a margin loss of lambda+ ln pi(y+) - lambda- ln pi(y-), rho r* (Prop. 2); 0: any.
    boost : factor on d_w, rho r*/r where d_w > 0; inf where no factor is enough.
    Where g+ vanishes, y+ does not move, and none is needed.
    """

    sft: Array
    sft_per_token: Array
    weight_ratio: Array
    boost: Array

    def __str__(self) -> str:
        return (
            f"SFT weight {_few(self.sft)} ({_few(self.sft_per_token)} per token), weight ratio"
            f" {_few(self.weight_ratio)}, factor on d_w {_few(self.boost)}"
        )


def thresholds(problem: Problem, sample: int = 0) -> Thresholds:
    """Smallest SFT weight, weight ratio and factor on d_w that stop y+ from falling at these parameters."""
    e, n_w = gradient_entanglement(problem, sample), len(pair_of(problem, sample)[0].tokens)
    moves = e.own_w > 0
    pull = np.where(moves, e.common / np.where(moves, e.own_w, 1.0), 0.0)  # rho r*, the lower edge
    needed = e.d_l * pull  # the smallest d_w
    sft = np.maximum(needed - e.d_w, 0.0)
    boost = np.where(needed <= e.d_w, 1.0, np.where(e.d_w > 0, needed / np.where(e.d_w > 0, e.d_w, 1.0), np.inf))
    return Thresholds(sft, n_w * sft, np.maximum(pull, 0.0), boost)
