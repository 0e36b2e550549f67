"""A filter over a whole data set: scores are read in one pass, rows written in a second."""

import json
import math
import re
from array import array
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm.auto import tqdm

from sims.files import to_json, write_atomically
from sims.language.data.filter_record import QUANTILES, Filtered
from sims.language.data.filtering import (
    FURTHER,
    SCORES,
    Array,
    Rule,
    Weights,
    choose,
    keep_fraction,
    order_of,
    score_of,
    soft_weights,
    take,
)
from sims.language.data.joined import RAW
from sims.language.data.layouts import Layout
from sims.language.data.rows import Row, Table
from sims.language.data.table import open_table
from sims.language.data.writing import kind_of, write_table
from sims.language.ranks import correlations
from theory import __version__

EXAMPLES = 5
REASONS = 8  # kinds that are told apart in a report
SHOWN = 70  # letters of a response


def filter_table(
    path: str | Path,
    table: Table,
    by: str = "ches",
    *,
    keep: float | None = None,
    threshold: float | None = None,
    weights: tuple[float, float] | None = None,
    one_of_several: bool = False,
    order: str | None = None,
    layout: Layout | None = None,
    keep_unusable: bool = False,
    drop: Collection[str] = (),
    progress: bool = False,
) -> Filtered:
    """Write the rows of a scored table that a rule keeps, or all with weights; a manifest goes beside them.

    by : a column of numbers. order : the end of it that is kept (default: the one known for the score, else "low").
    keep : the fraction kept of the rows with a score, or threshold : the score up to which they are kept, or weights :
        (target, percentile), see `filtering.soft_weights`.
    one_of_several : of several rejected responses take the one with the best score.
    layout : where rows hold their responses; needed to take one of several, else for the examples in the report.
    keep_unusable : keep rows without a score (their weight is 1); a row with several rejected ones and no score leaves.
    drop : columns to leave out.

    Raises ValueError: no such column, no number in it, more than one rule or none, lists of scores without
    `one_of_several`, nothing would be left, the path is the data's own. Then nothing is written.
    """
    rules = [x is not None for x in (keep, threshold, weights)]
    if sum(rules) > 1 or not (any(rules) or one_of_several):
        raise ValueError("say what to do: one of keep, threshold and weights, or choose, with or without one of these")
    if one_of_several and layout is None:
        raise ValueError("one_of_several needs the layout of the rows")
    if threshold is not None and math.isnan(threshold):
        raise ValueError("threshold must be a number, got nan")
    target = Path(path)
    _check_names(target, table, by)
    seen = _Seen(table, by, order_of(by, order), one_of_several, progress)
    if not np.isfinite(seen.scores).any():
        why = "; ".join(f"{count} x {reason}" for reason, count in _few(seen.reasons).items())
        raise ValueError(f"column {by!r} holds no finite number in any of {len(seen.scores)} rows: {why}")
    rule = weigh = None
    if keep is not None:
        rule = keep_fraction(seen.scores, keep, by, seen.order, keep_unusable)
    elif threshold is not None:
        rule = Rule(by, float(threshold), seen.order, keep_unusable)
    elif weights is not None:
        weigh = soft_weights(seen.scores, by, *weights, seen.order)
    scored = np.isfinite(seen.scores)
    stays = rule.keeps(seen.scores) if rule else scored | keep_unusable
    stays &= scored | ~seen.hopeless
    if not stays.any():
        s = seen.scores[scored]
        raise ValueError(f"nothing would be left: {by} is in [{s.min():g}, {s.max():g}], threshold {threshold:g}")
    writing = _Writing(seen, stays, rule, weigh, layout, progress)
    write_table(target, table, writing.added(), overwrite=writing.names, drop=drop)
    done = writing.record(str(target), keep_unusable)
    _write_manifest(target, table, done)
    return done


def _check_names(target: Path, table: Table, by: str) -> None:
    kind_of(target, table)
    # Where the data are, and the folder of each file of a data set in folders.
    places = [Path(table.path), *(x for file in table.files for x in (file, file.parent) if table.kind == "folder")]
    if any(x.exists() and target.exists() and target.samefile(x) for x in places):
        raise ValueError(f"the filtered data must go to another place than {str(target)!r}, where they are from")
    if table.columns and by not in table.columns:
        scores = ", ".join(name for name in SCORES if name in table.columns)
        first = f": score the pairs first, displacement score --model_name_or_path M --dataset {table.path}"
        hint = f"; of the scores there are {scores}: --by" if scores else first if by in SCORES else ""
        raise ValueError(f"there is no column {by!r} to filter by, there are {', '.join(table.columns)}{hint}")


class _Seen:
    """What a first pass over the rows finds.

    scores : (N,) NaN where there is none. lengths : (N, 2) of chosen and rejected, NaN where they are not known.
    hopeless : (N,) no pair to keep without a score: rows that cannot be read, or hold several rejected responses.
    reasons : why there is no score, with digits as N. taken : number of rows with several rejected responses.
    """

    def __init__(self, table: Table, by: str, order: str, one_of_several: bool, progress: bool) -> None:
        self.table, self.by, self.order = table, by, order
        scores, lengths, hopeless = array("d"), array("d"), bytearray()
        self.reasons: Counter[str] = Counter()
        self.taken = 0
        for row in tqdm(table.rows(), "reading scores", disable=not progress, unit=" rows", leave=False):
            score, which, count = self.score(row, one_of_several)
            scores.append(score)
            cells = take({} if row.problem else row.values, which, count, ("len_chosen", "len_rejected", "reason"))
            lengths.extend((_length(cells["len_chosen"]), _length(cells["len_rejected"])))
            hopeless.append(bool(row.problem or row.values.get(RAW) or count))
            self.taken += count > 0
            if math.isnan(score):
                self.reasons[re.sub(r"\d+", "N", str(row.problem or cells["reason"] or "no score"))] += 1
        self.scores: Array = np.array(scores)
        self.lengths: Array = np.array(lengths).reshape(-1, 2)
        self.hopeless: NDArray[np.bool_] = np.frombuffer(hopeless, dtype=np.bool_)

    def score(self, row: Row, one_of_several: bool) -> tuple[float, int, int]:
        """(score, which response it is of, how many there are: 0 if not a list)."""
        if row.problem:
            return math.nan, 0, 0
        try:
            score = score_of(row.values, self.by) if self.by in row.values else math.nan
        except ValueError as error:
            raise ValueError(f"{row.where}: {error}") from None
        if not isinstance(score, list):
            return score, 0, 0
        if not one_of_several:
            raise ValueError(
                f"{row.where}: column {self.by!r} holds one score for each of {len(score)} rejected responses: choose "
                "one of them (--choose)"
            )
        which = choose(score, self.order)
        return (math.nan, 0, len(score)) if which is None else (score[which], which, len(score))

    def changes(self, row: Row, names: tuple[str, ...]) -> dict[str, Any]:
        """The columns of a row in which one response is taken."""
        _, which, count = self.score(row, True)
        return take(row.values, which, count, names)


def _length(cell: Any) -> float:
    try:
        return float(cell)
    except (TypeError, ValueError):
        return math.nan


class _Writing:
    """The second pass: what becomes of each row, and the account of it."""

    def __init__(
        self,
        seen: _Seen,
        stays: NDArray[np.bool_],
        rule: Rule | None,
        weigh: Weights | None,
        layout: Layout | None,
        progress: bool,
    ) -> None:
        self.seen, self.stays, self.rule, self.weigh = seen, stays, rule, weigh
        self.layout, self.progress = layout, progress
        self.weight = weigh.of(seen.scores) if weigh else None
        scored = np.isfinite(seen.scores)
        bad = scored & ~stays if rule else scored & bool(weigh)
        badness = np.where(bad, seen.scores if seen.order == "low" else -seen.scores, -np.inf)
        self.worst = [int(i) for i in np.argsort(-badness, kind="stable")[:EXAMPLES] if bad[i]]
        self.examples: dict[int, dict[str, Any]] = {}
        columns = (layout.columns["rejected"], seen.by, *SCORES, *FURTHER) if layout and seen.taken else ()
        self.names = tuple(x for x in dict.fromkeys(columns) if x in seen.table.columns)

    def added(self) -> Iterator[dict[str, Any] | None]:
        rows = tqdm(
            self.seen.table.rows(), "writing", len(self.stays), disable=not self.progress, unit=" rows", leave=False
        )
        for row in rows:
            if row.index >= len(self.stays):
                raise ValueError(f"{self.seen.table.path!r} has grown while it was read: {row.where} is new")
            if row.index in self.worst:
                self.examples[row.index] = self._example(row)
            if not self.stays[row.index]:
                yield None
                continue
            changed = self.seen.changes(row, self.names) if self.names else {}
            yield {**changed, **({} if self.weight is None else {"weight": float(self.weight[row.index])})}

    def _example(self, row: Row) -> dict[str, Any]:
        out = {"where": row.where, "score": float(self.seen.scores[row.index])}
        try:
            said = self.layout.example(row.values) if self.layout else None
        except ValueError:
            said = None
        if said:
            _, which, _ = self.seen.score(row, True)
            out |= {"chosen": _beginning(said.chosen), "rejected": _beginning(said.rejected[which])}
        return out

    def record(self, target: str, keep_unusable: bool) -> Filtered:
        seen, stays = self.seen, self.stays
        scored = np.isfinite(seen.scores)
        known = scored & np.isfinite(seen.lengths).all(1)
        parts = {"kept": known & stays, "dropped": known & ~stays}
        difference = seen.lengths[known] @ [-1, 1]
        return Filtered(
            source=seen.table.path,
            target=target,
            by=seen.by,
            order=seen.order,
            rows=len(stays),
            kept=int(stays.sum()),
            dropped=int((scored & ~stays).sum()),
            unusable=int((~scored).sum()),
            kept_unusable=keep_unusable,
            taken=seen.taken,
            reasons=_few(seen.reasons),
            rule=self.rule,
            weights=self.weigh,
            before=_quantiles(seen.scores[scored]),
            after=_quantiles(seen.scores[scored & stays]),
            tied=int((seen.scores[stays] == self.rule.threshold).sum()) if self.rule else 0,
            lengths={name: _mean(seen.lengths[which]) for name, which in parts.items() if which.any()},
            with_length=float(correlations(seen.scores[known], difference)[0]) if known.sum() > 2 else None,
            weight=None if self.weight is None else _worth(self.weight[stays]),
            examples=[self.examples[i] for i in self.worst],
        )


def _beginning(said: Any) -> str:
    """The first letters of a response, of its last message, or its first token ids."""
    if isinstance(said, str):
        text = said
    elif said and isinstance(said[-1], Mapping):
        text = str(said[-1].get("content") or said[-1])
    else:
        text = " ".join(map(str, said[:SHOWN]))
    text = " ".join(text.split())
    return text if len(text) <= SHOWN else text[: SHOWN - 3] + "..."


def _few(reasons: Counter[str]) -> dict[str, int]:
    """The commonest, the others as one."""
    out = dict(reasons.most_common(REASONS))
    rest = reasons.total() - sum(out.values())
    return {**out, **({"other reasons": rest} if rest else {})}


def _quantiles(scores: Array) -> list[float] | None:
    return [float(x) for x in np.quantile(scores, QUANTILES)] if scores.size else None


def _mean(lengths: Array) -> tuple[float, float]:
    return float(lengths[:, 0].mean()), float(lengths[:, 1].mean())


def _worth(w: Array) -> dict[str, float]:
    square = float((w**2).sum())
    return {
        "mean": float(w.mean()),
        "zero": int((w == 0).sum()),
        "one": int((w == 1).sum()),
        "worth": float(w.sum() ** 2 / square) if square else 0.0,
    }


def _write_manifest(target: Path, table: Table, done: Filtered) -> None:
    """What made the file, beside it; and what made the scores, if that is known."""
    before = Path(f"{table.path}.manifest.json")
    manifest = {
        "made_by": f"likelihood-displacement {__version__}, displacement filter",
        "input": {"path": table.path, "kind": table.kind, "sha256": table.sha256},
        "output": {"path": str(target), "sha256": open_table(target).sha256},
        "filter": done.to_dict(),
        "scores": json.loads(before.read_text()) if before.is_file() else None,
    }
    write_atomically(Path(f"{target}.manifest.json"), to_json(manifest))
