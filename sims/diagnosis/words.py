"""A diagnosis in sentences."""

from typing import TYPE_CHECKING

from sims.diagnosis.change import CONFIDENCE, MINIMUM, amount

if TYPE_CHECKING:
    from sims.diagnosis.verdict import Diagnosis

UNKNOWN_BETA = (
    "beta is not in the log, so changes are in units of reward, beta times nats; give --beta to have nats "
    "(signs and shapes are right without; limits in nats are taken at beta = 0.1)"
)
NO_SEVERITY = "no severity: it compares the fall with ln pi(chosen) before, which takes "


def sentence(d: "Diagnosis") -> str:
    """The verdict in one sentence, without a full stop."""
    f, u = d.finding, d.scale.unit
    c = f.chosen
    m = 0.0 if f.margin is None else f.margin.end
    grew = f" while the margin {'grew' if m > 0 else 'fell'} by {abs(m):.3g}" if m else ""
    if c is None:
        said = f.cause or f"too few entries ({_count(d)}) to tell a change from noise"
        return f"{f.verdict}: {said}"
    if f.verdict == "undecided":
        return f"undecided: the chosen log-probability changed by {c} {u}: noise would hide a fall"
    if f.verdict == "no displacement":
        how = "did not fall" if c.end >= 0 else "hardly fell"
        return f"no displacement: the chosen log-probability {how} ({amount(c.end)} {u}){grew}"
    if f.verdict == "recovered":
        down = f"fell by {-c.lowest:.3g} {u}, lowest about {d.log.axis} {c.lowest_step:g},"
        return f"recovered: the chosen log-probability {down} and is back at {amount(c.end)}{grew}"
    fell = f"the chosen log-probability fell by {-c.end:.3g} {u}"
    if f.verdict == "displaced":
        both = f.rejected is not None and f.rejected.end < 0
        return f"displaced{_severity(f.severity)}: {fell}{grew}" + (
            "; probability went from both responses to others" if both else ""
        )
    return f"degenerate: {f.cause}" if f.diverged else f"degenerate: {fell}; {f.cause}"


def evidence(d: "Diagnosis") -> tuple[str, ...]:
    """The numbers behind the verdict."""
    f, u, out = d.finding, d.scale.unit, []
    for name, change in (("chosen", f.chosen), ("rejected", f.rejected)):
        if change is not None:
            out.append(f"{name} log-probability: {change} {u}")
    if f.margin is not None:
        out.append(f"margin: {f.margin} {u}")
    if f.chosen is None:
        return tuple(out)
    c = f.chosen
    if f.verdict in ("displaced", "degenerate"):
        if f.margin is not None and f.margin.end > 0:
            out.append(f"price: the chosen lost {-c.end / f.margin.end:.2g} for each 1 of margin gained")
        if f.relative is not None:
            before = c.end / f.relative
            out.append(
                f"depth: ln pi(chosen) went from {before:.4g} to {before + c.end:.4g} on average over these pairs"
            )
        if c.lowest < c.end - abs(c.end) / 10:
            out.append(f"lowest on the way: {amount(c.lowest)} {u} about {d.log.axis} {c.lowest_step:g}")
    before = c.values[-2 * c.window : -c.window]
    if len(before) == c.window and sum(before) / c.window - c.end > max(d.limit, (c.high - c.low) / 2):
        out.append(f"still falling: {amount(c.end - sum(before) / c.window)} {u} since the window before")
    if f.ranked is not None:
        out.append(f"pairs ranked right at the end: {f.ranked:.0%}")
    if all(x is None or max(abs(x.low), abs(x.high)) < d.limit for x in (c, f.rejected)):
        out.append(
            "hardly anything moved, the rejected neither: has the training begun, is the learning rate too small?"
        )
    m = c.window
    where = f"mean of the last {m} entries" if m > 1 else "last entry"
    what = "training batches of different pairs" if f.split == "train" else "the same pairs each time"
    since = "" if d.scale.reference else ", against the first entries: there is no reference"
    out.append(
        f"measured on {f.split} ({what}), {where}, up to {d.log.axis} {c.steps[-1]:g}{since}; {_interval(f.split)}"
    )
    return tuple(out)


def notes(d: "Diagnosis") -> tuple[str, ...]:
    """What a reader should know about the numbers."""
    out = [*d.log.notes, *d.scale.notes]
    for other in d.findings:
        if other is not d.finding and other.chosen and other.verdict != d.verdict:
            out.append(f"on {other.split}: {other.verdict}, chosen {other.chosen}")
    if d.finding.split == "train":
        out.append(
            "training batches hold other pairs each time; an evaluation set in the log would be exact for its pairs"
        )
    if not d.scale.nats:
        out.append(UNKNOWN_BETA)
    if d.severity == "unknown":
        logged = len(d.log.series("logp_chosen", d.finding.split)[0]) > 0
        out.append(
            NO_SEVERITY + " and ".join(["--beta"] * (not d.scale.nats) + ["logps/chosen in the log"] * (not logged))
        )
    return tuple(out)


def _severity(severity: str) -> str:
    return "" if severity == "unknown" else f" (severity {severity})"


def _interval(split: str) -> str:
    return f"{CONFIDENCE:.0%} interval in brackets" if split == "train" else "jitter in brackets"


def _count(d: "Diagnosis") -> str:
    points = len(d.log.series(f"{d.scale.metric}_chosen", d.finding.split)[0])
    return f"{points} of {d.finding.split}, where {MINIMUM if d.finding.split == 'train' else 2} are needed"
