"""The verdict on a log: has ln pi of the chosen responses fallen, while the margin grew, and did it come back?"""

import math
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np

from sims.diagnosis.change import Change, measure
from sims.diagnosis.logs import Log
from sims.diagnosis.scale import Scale, scale_of

Name = Literal["no displacement", "displaced", "recovered", "degenerate", "undecided"]
Severity = Literal["none", "low", "medium", "high", "unknown"]  # unknown: displaced, but of what depth is not logged

THRESHOLD = 0.1  # nats per response, a tenth less probable: a smaller fall is none
SHARE = 0.05  # of the margin gained: a fall that noise may still hide where "no displacement" is said
LEARNED = 0.1  # margin gained over the fall of the chosen, below which nothing was learned for it
RETURN = 0.9  # share of the deepest fall that must be made up to have recovered
FLOOR = 1.0  # nats: at most so much of a reward at step 0 counts as noise of the reference
DEEP, SHALLOW = 0.5, 0.1  # fall relative to |ln pi(chosen)| of the reference: severity high, low
HALF, RISE, RISE_NATS, DROP = 0.5, 2.0, 1.0, 0.1  # collapse: of token accuracy; of entropy upwards, downwards

# The first that holds. "Noise included": the whole interval of the change is beyond the limit, which is filled in.
RULES: dict[Name, str] = {
    "degenerate": "the last loss or reward is not finite; or the chosen fell as under 'displaced' and the margin grew "
    f"by less than {LEARNED:.0%} of that fall (also on the training batches); or it fell "
    f"and the token accuracy of the chosen is at most {HALF:.0%} of its start, or the entropy per token at least "
    f"{RISE:g} times its start (and {RISE_NATS:g} nat above) or at most {DROP:.0%} of it",
    "displaced": "at the end the chosen log-probability is below its start by more than {limit}, noise "
    f"included, while the margin grew; severity low below {SHALLOW:.0%}, high from {DEEP:.0%} of "
    "-ln pi(chosen) before, where known",
    "recovered": f"on the way the chosen log-probability was below its start by more than {{limit}}, noise "
    f"included, and at the end {RETURN:.0%} of that is made up and no fall is seen",
    "no displacement": f"at the end a fall of the chosen log-probability by more than {{limit}} or "
    f"{SHARE:.0%} of the margin gained, whichever is more, is excluded",
    "undecided": "none of the others: too few entries, or a fall that matters would be hidden in the noise",
}
ORDER: tuple[Name, ...] = ("undecided", "no displacement", "recovered", "displaced", "degenerate")  # ever worse


@dataclass(frozen=True)
class Finding:
    """The verdict on one split: evaluation sets and training batches are judged apart.

    chosen, rejected, margin : changes in the unit of the diagnosis, None where not logged or too few entries.
    cause : of a degenerate verdict, what decided it. relative : fall over |ln pi(chosen)| of the reference on the same
        pairs, None where unknown or nothing fell. ranked : share of pairs ranked right at last.
    """

    split: str
    verdict: Name
    severity: Severity
    chosen: Change | None
    rejected: Change | None
    margin: Change | None
    cause: str = ""
    relative: float | None = None
    ranked: float | None = None

    @property
    def diverged(self) -> bool:
        """The last loss or reward is no number."""
        return "diverged" in self.cause

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Diagnosis:
    """What a log says.

    verdict, severity : of the evaluation sets where they decide (the worst of them), else of the training batches.
    findings : one per split, evaluation sets first. scale : the unit of all changes. limit : a smaller fall is none.
    """

    findings: tuple[Finding, ...]
    scale: Scale
    limit: float
    log: Log

    @property
    def finding(self) -> Finding:
        """The one that decides."""
        decided = [f for f in self.findings if f.verdict != "undecided"]
        fixed = [f for f in decided if f.split != "train"]
        return max(fixed or decided or self.findings[:1], key=lambda f: ORDER.index(f.verdict))

    @property
    def verdict(self) -> Name:
        return self.finding.verdict

    @property
    def severity(self) -> Severity:
        return self.finding.severity

    @property
    def sentence(self) -> str:
        """The verdict in one sentence."""
        from sims.diagnosis.words import sentence

        return sentence(self)

    @property
    def rule(self) -> str:
        """What the verdict means, in numbers."""
        return RULES[self.verdict].format(limit=f"{self.limit:.3g} {self.scale.unit}")

    @property
    def evidence(self) -> tuple[str, ...]:
        """Sentences with the numbers behind the verdict."""
        from sims.diagnosis.words import evidence

        return evidence(self)

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader should know about the numbers."""
        from sims.diagnosis.words import notes

        return notes(self)

    def to_dict(self) -> dict[str, Any]:
        return {
            "verdict": self.verdict,
            "severity": self.severity,
            "sentence": self.sentence,
            "evidence": list(self.evidence),
            "rule": self.rule,
            "notes": list(self.notes),
            "unit": self.scale.unit,
            "beta": self.scale.beta,
            "beta_source": self.scale.source,
            "log": {"path": self.log.path, "kind": self.log.kind, "axis": self.log.axis},
            "findings": [f.to_dict() for f in self.findings],
        }

    def __str__(self) -> str:
        lines = [self.sentence[0].upper() + self.sentence[1:] + ".", *(f"  {e}" for e in self.evidence)]
        lines += [f"Rule: {self.rule}.", *(f"Note: {n}." for n in self.notes)]
        beta = "unknown" if self.scale.beta is None else f"{self.scale.beta:.4g} ({self.scale.source})"
        return "\n".join([*lines, f"Read: {self.log}; beta {beta}."])


def diagnose(
    log: Log,
    *,
    beta: float | None = None,
    loss: str | None = None,
    per_token: bool = False,
    threshold: float = THRESHOLD,
) -> Diagnosis:
    """Has the log-probability of the chosen responses fallen?

    beta : of the trainer; default what the log or the arguments beside it say, exact where an evaluation set was logged
        twice. loss : the trainer's name of it; matters for simpo, orpo, cpo (no reference) and ipo (per token in
        LLaMA-Factory and in TRL before 0.29). per_token : the logged log-probabilities are means per token.
    threshold : nats by which the chosen must fall to be called fallen.

    Raises ValueError for a beta or threshold that is not positive.
    """
    if not (threshold > 0 and math.isfinite(threshold)):
        raise ValueError(f"threshold must be a finite number of nats > 0, got {threshold:g}")
    scale = scale_of(log, beta, loss, per_token)
    limit = scale.limit(threshold)
    train = _change(log, scale, "train", "margin")
    findings = tuple(_judge(log, scale, split, limit, train) for split in log.splits)
    if loss is not None:
        log = replace(log, settings={**log.settings, "loss": loss})
    return Diagnosis(findings, scale, limit, log)


# ---- one split


def _judge(log: Log, scale: Scale, split: str, limit: float, train_margin: Change | None) -> Finding:
    chosen, rejected, margin = (_change(log, scale, split, name) for name in ("chosen", "rejected", "margin"))
    ranked = log.together(split, "accuracy")[-(chosen.window if chosen else 1) :, 1]
    finding = Finding(split, "undecided", "none", chosen, rejected, margin)
    finding = replace(finding, ranked=float(ranked.mean()) if len(ranked) else None)
    broken = _not_finite(log, split)
    if broken:
        return replace(finding, verdict="degenerate", severity="high", cause=broken)
    if chosen is None:
        return finding
    gained = 0.0 if margin is None else max(0.0, margin.end)
    cause, relative = "", None
    if chosen.high < -limit:
        # Held-out pairs may learn less than those trained on: both margins count.
        margins = [m for m in (margin, train_margin) if m is not None]
        if margins and all(m.end < LEARNED * -chosen.end for m in margins):
            cause = "the margin hardly grew" if margins[0].end > 0 else "the margin did not grow"
        cause = cause or _collapse(log, split)
        verdict: Name = "degenerate" if cause else "displaced"
        relative = _relative(log, scale, split, chosen)
    elif chosen.lowest_high < -limit and chosen.low > chosen.lowest_high and chosen.end > (1 - RETURN) * chosen.lowest:
        verdict = "recovered"
    elif chosen.low >= -max(limit, SHARE * gained):
        verdict = "no displacement"
    else:
        verdict = "undecided"
    return replace(finding, verdict=verdict, severity=_severity(verdict, relative), cause=cause, relative=relative)


def _change(log: Log, scale: Scale, split: str, name: str) -> Change | None:
    """The change of ln pi(chosen), ln pi(rejected) or their difference, in the scale's unit."""
    metrics = [f"{scale.metric}_{side}" for side in ("chosen", "rejected")]
    table = log.together(split, *(metrics if name == "margin" else [f"{scale.metric}_{name}"]))
    if name == "margin" and scale.metric == "reward" and not len(table):
        table = log.together(split, "margin")
    if not len(table):
        return None
    values = (table[:, 1] - table[:, 2] if table.shape[1] > 2 else table[:, 1]) * scale.factor
    steps, fixed = table[:, 0], split != "train"
    if not scale.reference:
        return measure(steps, values, fixed, None)
    # Against the reference the start is 0; a value of the untrained model tells how well.
    first = steps[0] <= 0 if fixed else log.axis == "step" and steps[0] <= 1
    floor = float(min(abs(values[0]), scale.limit(FLOOR))) if first else 0.0
    if first and fixed:
        return measure(steps[1:], values[1:], True, float(values[0]), floor)
    return measure(steps, values, fixed, 0.0, floor)


def _not_finite(log: Log, split: str) -> str:
    """From which step on the last values are NaN or infinite, if they are."""
    for metric in ("reward_chosen", "reward_rejected", "logp_chosen", "loss"):
        steps, values = log.series(metric, split)
        if len(values) and not np.isfinite(values[-1]):
            good = np.flatnonzero(np.isfinite(values))
            first = steps[good[-1] + 1] if len(good) else steps[0]
            return (
                f"{metric.replace('_', ' ')} is {values[-1]:g} from {log.axis} {first:g} on: the training has diverged"
            )
    return ""


def _collapse(log: Log, split: str) -> str:
    """What says, beside the fall, that the model no longer writes: token accuracy of the chosen, or entropy."""
    out = []
    for metric, name in (("token_accuracy", "token accuracy of the chosen"), ("entropy", "entropy per token")):
        table = log.together(split, metric)
        change = measure(table[:, 0], table[:, 1], split != "train", None) if len(table) else None
        if change is None:
            continue
        start = float(table[0, 1] - change.values[0])
        low, high = start + change.low, start + change.high
        if metric == "token_accuracy":
            bad = start > 0 and high <= HALF * start
        else:
            bad = low >= max(RISE * start, start + RISE_NATS) or high <= DROP * start
        if bad:
            out.append(f"{name} went from {start:.3g} to {max(0.0, start + change.end):.3g}")
    return "; ".join(out)


def _relative(log: Log, scale: Scale, split: str, chosen: Change) -> float | None:
    """Fall over |ln pi_ref(chosen)|, both of the same pairs: those of the last window."""
    if scale.metric == "reward" and scale.beta is None:
        return None
    names = ("logp_chosen",) if scale.metric == "logp" else ("reward_chosen", "logp_chosen")
    table = log.together(split, *names)[-chosen.window :]
    before = float(table[:, -1].mean() - chosen.end) if len(table) else 0.0
    return chosen.end / before if before < 0 else None


def _severity(verdict: Name, relative: float | None) -> Severity:
    if verdict == "displaced" and relative is not None:
        return "high" if relative >= DEEP else "low" if relative < SHALLOW else "medium"
    known: dict[Name, Severity] = {"degenerate": "high", "displaced": "unknown", "recovered": "low"}
    return known.get(verdict, "none")
