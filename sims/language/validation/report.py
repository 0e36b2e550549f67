"""The report of a validation, for a terminal: what a practitioner asks first, then the table, then the rule."""

from collections.abc import Iterator

import numpy as np

from sims.language.ranks import LEVEL
from sims.language.validation.record import DROPPED, LENGTH, PERCENTILES, PROBES, SCORES, WORTH, Finding, Validation

VERDICTS = {  # in more words
    "no better than length": "no better than the difference in response length",
    "misleading": "misleading (the higher it is, the less falls)",
}


def report(data: Validation) -> str:
    """All of it."""
    parts = (_answer(data), _together(data), _runs(data), _table(data), _percentiles(data), _rule(data), _next(data))
    return "\n\n".join("\n".join(lines) for part in parts if (lines := list(part)))


def sentence(data: Validation, f: Finding) -> str:
    """The verdict on one score in words."""
    verdict = _word(data, f)
    if f.needed is not None:
        unit = "pairs" if data.alone else "subsets"
        pairs = f.needed * data.parameters["subset_size"]
        verdict = f"undecided with {len(data.runs)} {unit}, --pairs {pairs} should decide"
    drop = f"; dropping {DROPPED[1]:.0%} by it removes {f.removed[1]:.0%} of the falls" if data.lifts else ""
    return f"rho = {f.rho}: {verdict}{drop}"


def _word(data: Validation, f: Finding) -> str:
    """The verdict; where nothing fell no score can be useful."""
    if f.verdict == "useful" and not (data.fall() > 0).any():
        return "ranks the rises"
    return VERDICTS.get(f.verdict, f.verdict)


def _named(f: Finding) -> str:
    """A score with the name of its column."""
    return f.label if f.name == LENGTH else f"{f.label} ({f.name})"


def _answer(data: Validation) -> Iterator[str]:
    unit = "pairs, each trained on alone" if data.alone else f"subsets of {data.parameters['subset_size']} pairs"
    fell, runs = int((data.fall() > 0).sum()), len(data.runs)
    yield (
        f"The chosen log-probability fell for {fell} of {runs} {unit}, by the time the margin had grown by "
        f"{np.median(data.margin()):.2g} nat (median)."
    )
    if fell:
        yield "Which score tells beforehand where it falls?"
    else:
        further = 10 * data.parameters.get("margin_gain", 1.0)
        yield f"So there is none to drop for what it does to itself; further on there may be: --margin_gain {further:g}"
        yield "Which score tells beforehand where it rises least?"
    best = data.findings[0]
    yield f"  best predictor: {_named(best)}, {sentence(data, best)}"
    free = next(f for f in data.findings if f.name not in PROBES)
    if free is not best:
        yield f"  best without backward passes: {_named(free)}, {sentence(data, free)}"
    for name in ("ches", LENGTH):
        if name not in (best.name, free.name):
            yield f"  {SCORES[name].label}: {sentence(data, data.finding(name))}"
    if data.lifts:
        best_order = data.lift(None, DROPPED[1])[0]
        yield f"(Dropping as many in the best order removes {best_order:.0%}, at random {DROPPED[1]:.0%}.)"


def _together(data: Validation) -> Iterator[str]:
    """What no score of single pairs sees."""
    if data.together is None or data.first is None:
        return
    fall, margin = data.together
    unit = "pair alone" if data.alone else "subset"
    yield (
        f"Trained on all {len(data.where)} pairs together, with as many steps, the mean chosen log-probability changed "
        f"by {-fall:+.2g} nat while the mean margin grew by {margin:+.2g} (each {unit}: {-data.fall().mean():+.2g} and "
        f"{data.margin().mean():+.2g})."
    )
    yield f"At first order {data.first}."
    if data.first.others < min(0.0, -data.first.own) or fall > 0 > data.fall().mean():
        yield "The pairs pull against each other more than each lifts itself: no score of single pairs sees that fall."


def _runs(data: Validation) -> Iterator[str]:
    p = data.parameters
    if unusable := p.get("unusable"):
        yield f"{len(unusable)} rows that were drawn cannot be used: " + "; ".join(unusable[:5])
    if p.get("asked", 0) > p["pairs"]:
        yield f"{p['asked']} pairs were asked for, {p['pairs']} could be used."
    found = "sought" if p["sought"] else "given"
    yield (
        f"Trained with {p['loss']}, {p['optimizer']}, {p['steps']} steps, learning rate {p['learning_rate']:g} "
        f"({found}), {p['dtype']}; {data.seconds['run']:.2g} s a run."
    )
    if p["moved"] < 0.99:
        yield (
            f"Attention: {1 - p['moved']:.0%} of the gradient met weights that the first step did not change: the step "
            f"is too small for {p['dtype']} (--dtype float32)."
        )
    if p["left_out"]:
        yield f"Left out, for want of a finite score: {', '.join(p['left_out'])}."
    if not p["exact"]:
        yield "This loss is no function of the margin alone: the probes are not its exact first-order changes."


def _table(data: Validation) -> Iterator[str]:
    lifts = data.lifts
    drop = "drop " + "/".join(f"{100 * q:.0f}" for q in DROPPED) + " %"
    heads = ("rho, at the end", "at equal length", "after 1 step")
    yield f"  {'':27}" + "".join(f"{x:>21}" for x in heads) + (f"{drop:>16}" if lifts else "") + "   verdict"
    for f in data.findings:
        cells = "".join(f"{x!s:>21}" for x in (f.rho, f.beyond or "", f.early))
        removed = f"{' '.join(f'{x:4.0%}' for x in f.removed):>16}" if lifts else ""
        cost = f"{SCORES[f.name].cost}, {_seconds(data, f.name):.1g} s"
        yield f"  {f.label:27}{cells}{removed}   {_word(data, f)} ({cost})"
    if lifts:
        yield f"  {'the best order':90}{' '.join(f'{data.lift(None, q)[0]:4.0%}' for q in DROPPED):>16}"


def _seconds(data: Validation, name: str) -> float:
    cost = SCORES[name].cost
    for part in ("backward", "logits", "forward"):
        if part in cost:
            return data.seconds[part]
    return data.seconds["no model"]


def _percentiles(data: Validation) -> Iterator[str]:
    if not data.percentiles:
        return
    size = data.parameters["subset_size"]
    yield f"  {size} pairs around a percentile of a score, trained on together: mean change of ln pi(chosen), nats"
    yield f"  {'':27}" + " ".join(f"{p:>8}%" for p in PERCENTILES)
    for name, change in data.percentiles.items():
        yield f"  {SCORES[name].label:27}" + " ".join(f"{x:+9.2g}" for x in change)


def _rule(data: Validation) -> Iterator[str]:
    yield "rho: Spearman correlation with the measured fall, of the score so signed that higher means a deeper fall is"
    yield f"expected; +1 ranks all rightly. The intervals of a column pair hold together with {LEVEL:.0%} (bootstrap)."
    yield f"useless: interval below {WORTH:g}; useful: above 0, also at equal length difference; no better than length:"
    yield f"above 0, but at equal length below {WORTH:g}; else undecided. In brackets the cost per pair."
    if len(data.runs) < 24:
        yield f"With {len(data.runs)} runs the intervals are too narrow (87% at 8 runs); from 24 on they hold."
    if data.lifts:
        yield "drop: share of all falls (their sum) removed by dropping the highest-scored pairs. It counts what a pair"
        yield "does to itself; for what pairs do to each other, measure subsets (--subset_size 8)."


def _next(data: Validation) -> Iterator[str]:
    """The commands that drop pairs by the best score, where it is worth it."""
    p, best = data.parameters, data.findings[0]
    if not data.lifts or best.verdict != "useful" or best.name == LENGTH or "dataset" not in p:
        return
    more = " --probe" if best.name in PROBES else " --alpha" if best.name == "alpha" else ""
    yield f"To drop the tenth that {best.label} ranks highest:"
    yield f"  displacement score --model_name_or_path {p['model']} --dataset {p['dataset']} --output scored.jsonl{more}"
    yield f"  displacement filter scored.jsonl --by {best.name} --keep 0.9"
