"""What a scored data set says: which pairs stand out, how the scores spread, what could not be used."""

import heapq
import math
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sims.files import plain
from sims.language.scoring.words import counted, from_zero, share_of

NEARLY_ALIKE = 0.1  # normalised edit distance up to which two responses count as nearly identical
SHOWN = 10  # pairs with the highest score
FIRST = 3  # unusable rows that are named, of each kind
KINDS = 20  # kinds of reasons that are told apart
QUANTILES = {"min": 0.0, "5%": 0.05, "25%": 0.25, "50%": 0.5, "75%": 0.75, "95%": 0.95, "max": 1.0}
# The first of these that was computed ranks the pairs: the probe knows more than any score of the states. The sign says
# which end is the bad one.
RANKED = {"sign_step_chosen": -1, "gradient_step_chosen": -1, "ln_ches": 1, "ches": 1, "last_hidden": 1}
NOTES = {"boundary", "truncated"}
STEPS = {"gradient_step_chosen": "gradient step", "sign_step_chosen": "sign step (Adam's first ones)"}


class Thinned:
    """Values of a stream for its quantiles: all of them up to `most`, then every second, every fourth, ..."""

    def __init__(self, most: int = 1 << 17) -> None:
        self.most, self.stride, self.count = most, 1, 0
        self.kept: list[float] = []

    def add(self, value: float) -> None:
        if self.count % self.stride == 0:
            if len(self.kept) == self.most:
                self.kept, self.stride = self.kept[::2], 2 * self.stride
            if self.count % self.stride == 0:
                self.kept.append(value)
        self.count += 1


@dataclass
class Column:
    """What is kept of a column of numbers."""

    sample: Thinned = field(default_factory=Thinned)
    low: float = math.inf
    high: float = -math.inf

    def add(self, value: float) -> None:
        self.sample.add(value)
        self.low, self.high = min(self.low, value), max(self.high, value)

    def quantiles(self) -> dict[str, float]:
        middle = np.quantile(self.sample.kept, list(QUANTILES.values())).tolist()
        return dict(zip(QUANTILES, middle, strict=True)) | {"min": self.low, "max": self.high}


@dataclass(frozen=True)
class Summary:
    """A finished run.

    output, dataset, model : where the result is, what was scored, by what.
    rows, pairs : rows of the data set; pairs that have scores (a row with several rejected responses holds several).
    unusable, reasons : pairs without scores, and by the kind of reason {"count", "where" (the first), "example"}.
    notes : pairs by what happened to their tokens ("boundary", "truncated").
    nearly_identical : pairs with an edit distance up to NEARLY_ALIKE; None if it was not computed.
    falls : per kind of step of the probe the pairs whose own step lowers ln pi(y+).
    several : whether rows hold several rejected responses, of which a filter must choose.
    ranked_by, highest : the score that ranks, and the pairs where it expects the deepest fall: where, score, the two
        responses from where they part.
    quantiles : per score {"min", "5%", ..., "max"}.
    warnings : what to know before the scores are used.
    """

    output: str
    dataset: str
    model: str
    rows: int
    pairs: int
    unusable: int
    reasons: dict[str, dict[str, Any]]
    notes: dict[str, int]
    nearly_identical: int | None
    falls: dict[str, int]
    several: bool
    ranked_by: str
    highest: tuple[dict[str, Any], ...]
    quantiles: dict[str, dict[str, float]]
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        return plain(self.__dict__)

    def __str__(self) -> str:
        parts = [self._answer(), self._unusable(), self._table(), self._spread(), self._next()]
        return "\n\n".join(part for part in parts if part)

    def _answer(self) -> str:
        lines = [
            f"Which pairs may lower the chosen log-probability: {counted(self.pairs, 'pair')} of {self.dataset}, "
            f"{self.model}"
        ]
        for name, count in self.falls.items():
            lines.append(
                f"  {count} ({share_of(count, self.pairs)}) lower their own at first order, by a {STEPS[name]}"
            )
        if self.falls:
            lines.append("  (in training the steps of other pairs move it, too: `displacement validate` measures that)")
        if self.nearly_identical is not None:
            share = share_of(self.nearly_identical, self.pairs)
            lines.append(
                f"  {self.nearly_identical} ({share}) have nearly identical responses (edit distance <= {NEARLY_ALIKE})"
            )
        return "\n".join([*lines, f"  all rows with their scores: {self.output}"])

    def _unusable(self) -> str:
        if not self.unusable:
            return ""
        pairs = self.pairs + self.unusable
        share = share_of(self.unusable, pairs)
        lines = [f"Not scored: {self.unusable} of {counted(pairs, 'pair')} ({share}), see column `reason`"]
        for kind, found in self.reasons.items():
            where = ", ".join(found["where"]) + (", ..." if found["count"] > len(found["where"]) else "")
            such = "" if found["count"] == 1 or kind == found["example"] else "such as: "
            lines.append(f"  {found['count']} x {such}{found['example']} ({where}{from_zero(where)})")
        return "\n".join(lines)

    def _table(self) -> str:
        if not self.highest:
            return ""
        low = RANKED[self.ranked_by] < 0
        end, more = ("Lowest", "; above 0 it rises") if low else ("Highest", "")
        said = f"the deepest fall expected first{more}" if self._drops else "none is below 0, so none falls"
        lines = [f"{end} {self.ranked_by}: {said}{from_zero(self.highest[0]['where'])}"]
        width = max(len(row["where"]) for row in self.highest)
        for row in self.highest:
            texts = f"{row['chosen']!r} | {row['rejected']!r}"
            lines.append(f"  {row['where']:>{width}}  {row['score']:>10.4g}  {texts}")
        return "\n".join(lines)

    def _spread(self) -> str:
        if not self.quantiles:
            return ""
        width = max(map(len, self.quantiles))
        lines = [" " * (width + 2) + "".join(f"{name:>11}" for name in QUANTILES)]
        for name, values in self.quantiles.items():
            lines.append(f"  {name:{width}}" + "".join(f"{values[q]:>11.4g}" for q in QUANTILES))
        return "\n".join(lines)

    def _next(self) -> str:
        lines = [f"Note: {warning}" for warning in self.warnings]
        validate = f"  displacement validate --model_name_or_path {self.model} --dataset {self.dataset}"
        if self.ranked_by and self._drops:
            choose = " --choose" if self.several else ""
            lines += [
                "How much a score is worth depends on model and data. Measure it on yours before dropping pairs:",
                validate,
                f"  displacement filter {self.output} --by {self.ranked_by}{choose} --keep 0.95",
            ]
        elif self.ranked_by:
            lines += [
                f"By this probe there is nothing to drop: no pair lowers its own by a {STEPS[self.ranked_by]}.",
                "If the chosen log-probability falls in training, the steps of other pairs do it. Measure that:",
                validate,
            ]
        return "\n".join(lines)

    @property
    def _drops(self) -> bool:
        """Whether the score that ranks says of any pair that it falls; one of the states says so of the highest."""
        return bool(self.falls.get(self.ranked_by, True))


class Tally:
    """Collects a summary from the shards, in memory that does not depend on their number."""

    def __init__(self) -> None:
        self.rows = self.pairs = self.unusable = self.alike = 0
        self.reasons: dict[str, dict[str, Any]] = {}
        self.notes: Counter[str] = Counter()
        self.falls: Counter[str] = Counter()
        self.columns: dict[str, Column] = {}
        self.highest: list[dict[str, Any]] = []
        self.several = False

    def add(self, shard: dict[str, Any]) -> None:
        """A shard as `run` stores it."""
        columns = shard["columns"]
        self.rows += len(columns["reason"])
        self.several |= any(isinstance(x, list) for x in columns["reason"])
        for reason in (text for row in columns["reason"] for text in _flat(row)):
            self.pairs += not reason
            self.unusable += bool(reason)
            if reason:
                self._reason(reason)["count"] += 1
        for where, reason in shard["bad"]:
            named = self._reason(reason)["where"]
            named += [where] * (len(named) < FIRST)
        for note in (text for row in columns["note"] for text in _flat(row)):
            self.notes.update({part.partition(":")[0] for part in note.split("; ")} & NOTES)
        self.highest = highest([*self.highest, *shard["highest"]])
        for name, column in columns.items():
            if name not in ("reason", "note"):
                self._numbers(name, [x for row in column for x in _flat(row)])

    def _reason(self, reason: str) -> dict[str, Any]:
        """What is known of reasons of this kind."""
        kind = _kind(reason)
        kind = kind if kind in self.reasons or len(self.reasons) < KINDS else "others"
        return self.reasons.setdefault(kind, {"count": 0, "where": [], "example": reason})

    def _numbers(self, name: str, values: list[Any]) -> None:
        known = [x for x in values if isinstance(x, int | float) and not math.isnan(x)]
        column = self.columns.setdefault(name, Column())
        for x in known:
            column.add(x)
        if name == "edit_distance":
            self.alike += sum(x <= NEARLY_ALIKE for x in known)
        if name in STEPS:
            self.falls[name] += sum(x < 0 for x in known)

    def summary(self, output: str, dataset: str, model: str, warnings: tuple[str, ...]) -> Summary:
        return Summary(
            output=output,
            dataset=dataset,
            model=model,
            rows=self.rows,
            pairs=self.pairs,
            unusable=self.unusable,
            reasons=dict(sorted(self.reasons.items(), key=lambda item: -item[1]["count"])),
            notes=dict(sorted(self.notes.items())),
            nearly_identical=self.alike if "edit_distance" in self.columns else None,
            falls=dict(self.falls),
            several=self.several,
            ranked_by=ranking(self.columns),
            highest=tuple({k: v for k, v in row.items() if k != "fall"} for row in self.highest),
            quantiles={name: c.quantiles() for name, c in self.columns.items() if c.sample.count},
            warnings=warnings,
        )


def ranking(columns: Any) -> str:
    """The column that ranks the pairs, "" if there is none."""
    return next((name for name in RANKED if name in columns), "")


def first_bad(where: list[str], reasons: list[Any]) -> list[tuple[str, str]]:
    """(where, reason) of the first rows of each kind of reason."""
    seen: Counter[str] = Counter()
    found = []
    for place, reason in ((place, text) for place, own in zip(where, reasons, strict=True) for text in _flat(own)):
        if reason:
            seen[_kind(reason)] += 1
            if seen[_kind(reason)] <= FIRST:
                found.append((place, reason))
    return found


def highest(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those with the deepest fall expected, the deepest first; among equals the earlier row."""
    return heapq.nlargest(SHOWN, rows, key=lambda row: row["fall"])


def _kind(reason: str) -> str:
    """A reason without the numbers and quotations of its row."""
    return re.sub(r"\d+", "N", re.sub(r"'[^']*'|\"[^\"]*\"", "'...'", reason))


def _flat(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
