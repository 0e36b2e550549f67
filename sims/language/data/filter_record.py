"""What a filter did, and how it is told."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sims.language.data.filtering import SCORES, Rule, Weights

QUANTILES = (0.0, 0.25, 0.5, 0.75, 0.95, 1.0)
MOSTLY_LENGTH = 0.7  # rank correlation from which a score says little that lengths do not


@dataclass(frozen=True)
class Filtered:
    """One run of a filter. Sequences over QUANTILES are None where there is nothing to take them of.

    rows, kept : numbers of rows read and written. dropped : by their score. unusable : rows without one, which are
        kept if `kept_unusable`; reasons : why, with how many of each.
    taken : rows in which one of several rejected responses was taken.
    before, after : quantiles of the score of what was read and of what was kept.
    tied : kept rows whose score is the threshold.
    lengths : (mean chosen, mean rejected) tokens of the pairs kept and dropped, where the data say them.
    with_length : Spearman's correlation of the score with len_rejected - len_chosen.
    weight : mean weight, number of weights 0, of weights 1, and (sum w)^2 / sum w^2, what the data are worth in pairs.
    examples : the worst scores: {"where", "score", "chosen", "rejected"}.
    """

    source: str
    target: str
    by: str
    order: str
    rows: int
    kept: int
    dropped: int
    unusable: int
    kept_unusable: bool
    taken: int
    reasons: Mapping[str, int]
    rule: Rule | None
    weights: Weights | None
    before: Sequence[float] | None
    after: Sequence[float] | None
    tied: int
    lengths: Mapping[str, tuple[float, float]]
    with_length: float | None
    weight: Mapping[str, float] | None
    examples: Sequence[Mapping[str, Any]]

    @property
    def warnings(self) -> tuple[str, ...]:
        """What to think of before training on the result."""
        out = []
        others = " or ".join(name for name in ("ln_ches", "edit_distance") if name != self.by)
        if self.with_length is not None and abs(self.with_length) >= MOSTLY_LENGTH:
            out.append(
                f"{self.by} is mostly length: Spearman {self.with_length:+.2f} with rejected less chosen "
                f"length; compare {others}"
            )
        if self.rule is not None and self.tied > max(1, 0.05 * self.kept):
            out.append(f"{self.tied} of the kept pairs tie at the threshold: a fraction cannot be met exactly")
        return tuple(out)

    def to_dict(self) -> dict[str, Any]:
        out = {name: getattr(self, name) for name in self.__dataclass_fields__}
        out["rule"] = self.rule and self.rule.to_dict()
        out["weights"] = self.weights and self.weights.to_dict()
        return {**out, "quantiles": QUANTILES, "warnings": self.warnings}

    def __str__(self) -> str:
        parts = [self._headline(), self._table(), self._lengths()]
        parts += [f"warning: {text}" for text in self.warnings]
        parts += [self._examples()]
        return "\n".join(part for part in parts if part)

    def _headline(self) -> str:
        lines = [f"kept {self.kept} of {self.rows} pairs, in {self.target}"]
        if self.taken:
            best = "lowest" if self.order == "low" else "highest"
            lines.append(f"in {self.taken} rows the rejected response with the {best} {self.by} was taken of several")
        if self.weights is not None and self.weight is not None:
            w = self.weight
            lines.append(f"{self.weights}: {w['zero']} weigh 0, {w['one']} weigh 1, mean {w['mean']:.3g}")
            lines.append(f"the weighted pairs are worth {w['worth']:.0f} equal ones")
        if self.rule is not None:
            expected = SCORES.get(self.by, ("", False))[0] == self.order
            why = " whose chosen log-probability is expected to fall most" if expected else ""
            sign = ">" if self.order == "low" else "<"
            lines.append(f"dropped {self.dropped} pairs{why} ({self.by} {sign} {self.rule.threshold:.6g})")
        if self.unusable:
            verb = "kept where there is a pair" if self.kept_unusable else "dropped"
            lines.append(f"{self.unusable} rows have no score, {verb}:")
            lines += [f"  {count} x {reason}" for reason, count in self.reasons.items()]
        return "\n".join(lines)

    def _table(self) -> str:
        if self.before is None:
            return ""
        heads = ("least", "25 %", "median", "75 %", "95 %", "most")
        rows = [("before", self.before)] + ([("kept", self.after)] if self.rule is not None and self.after else [])
        lines = [f"{self.by:24s}" + "".join(f"{head:>12s}" for head in heads)]
        lines += [f"  {name:22s}" + "".join(f"{value:12.4g}" for value in values) for name, values in rows]
        return "\n".join(lines)

    def _lengths(self) -> str:
        if not self.lengths:
            return ""
        texts = [f"{what} {a:.1f} and {b:.1f}" for what, (a, b) in self.lengths.items()]
        return f"mean tokens, chosen and rejected: {'; '.join(texts)}"

    def _examples(self) -> str:
        if not self.examples:
            return ""
        rows = ", rows counted from 0" if str(self.examples[0]["where"]).startswith("row") else ""
        lines = [f"the worst{' of what was dropped' if self.rule is not None else ''} (in {self.source}{rows}):"]
        for x in self.examples:
            lines.append(f"  {x['where']}, {self.by} {x['score']:.4g}")
            lines += [f"    {name:9s}{x[name]}" for name in ("chosen", "rejected") if x.get(name)]
        return "\n".join(lines)
