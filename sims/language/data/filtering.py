"""Which pairs a score lets stay, how much they weigh, and which of several rejected responses is taken.

A rule keeps all pairs up to a score. Weights fall linearly from 1: with the scores s turned so that high is bad, c
where they begin and p the score at a percentile,

    weight = clip(1 - (1 - target) (s - c) / (p - c), 0, 1),

so the pair at that percentile weighs `target`. c is 0 for scores whose sign says something, if p > 0 (then the weight
is clip(1 - alpha s, 0, 1) with alpha = (1 - target) / p), else the median: the weights never increase with s, and
with c the median they stay the same when s is stretched or shifted.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]

# What is kept of each score, the low or the high end, and whether its sign says something. High ches: a deeper fall of
# the chosen log-probability; a high edit distance: less alike; a step's negative change of it is the fall itself.
SCORES = {
    "ches": ("low", True),
    "ln_ches": ("low", True),
    "alpha": ("low", True),
    "last_hidden": ("low", False),
    "shared_prefix": ("low", False),
    "edit_distance": ("high", False),
    "gradient_step_chosen": ("high", True),
    "sign_step_chosen": ("high", True),
}
# Further columns that scoring adds.
FURTHER = (
    "len_chosen", "len_rejected", "ref_chosen_logps", "ref_rejected_logps", "gradient_step_margin", "sign_step_margin",
    "reason", "note",
)  # fmt: skip


def order_of(by: str, order: str | None = None) -> str:
    """Which end of a score is kept, "low" or "high"; low for a column nobody knows."""
    if order not in (None, "low", "high"):
        raise ValueError(f"order must be low or high, the end that is kept, got {order!r}")
    return order or SCORES.get(by, ("low", False))[0]


@dataclass(frozen=True)
class Rule:
    """Keeps the pairs whose score is at most (order "low") or at least ("high") a threshold.

    Called with a row it says whether the row stays: `dataset.filter(rule)` of `datasets`. A row without a score stays
    if `keep_unusable`.
    """

    by: str
    threshold: float
    order: str = "low"
    keep_unusable: bool = False

    def __call__(self, row: Mapping[str, Any]) -> bool:
        return bool(self.keeps([_single(row, self.by)])[0])

    def keeps(self, scores: ArrayLike) -> NDArray[np.bool_]:
        """(N,) whether each stays, of scores (N,) with NaN where there is none."""
        s = np.asarray(scores, dtype=np.float64)
        good = s <= self.threshold if self.order == "low" else s >= self.threshold
        return np.where(np.isfinite(s), good, self.keep_unusable)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def keep_fraction(
    scores: ArrayLike, keep: float, by: str = "ches", order: str | None = None, keep_unusable: bool = False
) -> Rule:
    """The rule that keeps the best fraction `keep` in (0, 1] of the pairs with a score, and what ties with the last."""
    if not 0 < keep <= 1:
        hint = f": {keep:g} % is {keep / 100:g}" if 1 < keep <= 100 else ""
        raise ValueError(f"keep must be a fraction in (0, 1], got {keep:g}{hint}")
    order = order_of(by, order)
    s = np.sort(finite(scores, by))
    count = math.ceil(keep * len(s) - 1e-9)  # 0.95 of 100 is 95
    return Rule(by, float(s[count - 1] if order == "low" else s[len(s) - count]), order, keep_unusable)


@dataclass(frozen=True)
class Weights:
    """The weight of a pair by its score, see the module. Called with a row it gives {"weight": ...}: `dataset.map(w)`.

    begin, at : scores where weights begin to fall and where they reach `target`. No score: weight 1.
    """

    by: str
    begin: float
    at: float
    target: float
    order: str = "low"
    name: str = "weight"

    def __call__(self, row: Mapping[str, Any]) -> dict[str, float]:
        return {self.name: float(self.of([_single(row, self.by)])[0])}

    def of(self, scores: ArrayLike) -> Array:
        """(N,) weights in [0, 1] of scores (N,)."""
        s = np.asarray(scores, dtype=np.float64)
        fall = (1 - self.target) * (s - self.begin) / (self.at - self.begin)
        return np.where(np.isfinite(s), np.clip(1 - fall, 0, 1), 1.0)

    def __str__(self) -> str:
        slope = (1 - self.target) / (self.at - self.begin)
        difference = self.by if not self.begin else f"({self.by} - {self.begin:.4g})".replace("- -", "+ ")
        return f"{self.name} = clip(1 - {slope:.4g} {difference}, 0, 1)".replace("- -", "+ ")

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "formula": str(self)}


def soft_weights(
    scores: ArrayLike, by: str = "ln_ches", target: float = 0.5, at: float = 0.95, order: str | None = None
) -> Weights:
    """The weights under which the pair at the percentile `at` in (0, 1), counted from the good end, weighs `target`."""
    if not 0 <= target < 1:
        raise ValueError(f"weight_target must be in [0, 1), got {target:g}")
    if not 0 < at < 1:
        raise ValueError(f"weight_at must be a percentile as a fraction in (0, 1), got {at:g}")
    order = order_of(by, order)
    sign = 1.0 if order == "low" else -1.0
    s = sign * finite(scores, by)
    p = float(np.quantile(s, at))
    # A sign says something only in the direction it is known for.
    signed = SCORES.get(by) == (order, True)
    begin = 0.0 if signed and p > 0 else float(np.median(s))
    if not p > begin:
        raise ValueError(
            f"column {by!r} is {sign * p:g} from the median to percentile {at:g}: no weights tell it apart"
        )
    return Weights(by, sign * begin, sign * p, target, order)


def finite(scores: ArrayLike, by: str) -> Array:
    """The scores that are numbers; a ValueError if there is none."""
    s = np.asarray(scores, dtype=np.float64)
    if not np.isfinite(s).any():
        raise ValueError(f"column {by!r} holds no finite number in any of {s.size} rows")
    return s[np.isfinite(s)]


def score_of(row: Mapping[str, Any], by: str) -> float | list[float]:
    """The score in a row, NaN where there is none, or the list of scores where a row has several rejected responses."""
    if by not in row:
        raise ValueError(f"there is no column {by!r}, there are {', '.join(row) or 'none'}")
    cell = row[by]
    if isinstance(cell, str) and cell.lstrip().startswith("["):
        cell = _numbers(cell, by)
    return [_number(x, by) for x in cell] if isinstance(cell, list) else _number(cell, by)


def _numbers(cell: str, by: str) -> Any:
    try:
        return json.loads(cell)
    except ValueError:
        raise ValueError(f"column {by!r} must hold numbers, got {cell[:40]!r}") from None


def _number(cell: Any, by: str) -> float:
    if cell is None or cell == "":
        return math.nan
    try:
        value = float(cell) if not isinstance(cell, bool) else None
    except (TypeError, ValueError, OverflowError):
        value = None
    if value is None:
        raise ValueError(f"column {by!r} must hold numbers, got {str(cell)[:40]!r}")
    return value if math.isfinite(value) else math.nan


def _single(row: Mapping[str, Any], by: str) -> float:
    score = score_of(row, by)
    if isinstance(score, list):
        raise ValueError(f"column {by!r} holds a list, one score per rejected response: choose one of them first")
    return score


def choose(scores: Sequence[float], order: str = "low") -> int | None:
    """Which of several has the best score, the first of equal ones; None where none has one."""
    there = [i for i, s in enumerate(scores) if math.isfinite(s)]
    best = min if order == "low" else max
    return best(there, key=lambda i: scores[i], default=None)


def take(row: Mapping[str, Any], which: int, count: int, names: Sequence[str]) -> dict[str, Any]:
    """Columns by name, with one of `count` rejected responses taken: its item of each list that has one for each."""
    out = {}
    for name in names:
        cell = row.get(name)
        several = _list(cell) if isinstance(cell, str) and cell.lstrip().startswith("[") else cell
        out[name] = several[which] if isinstance(several, list) and len(several) == count else cell
    return out


def _list(cell: str) -> Any:
    try:
        return json.loads(cell)
    except ValueError:
        return cell
