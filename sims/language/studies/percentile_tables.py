"""The tables of the study of similarity scores, for a terminal."""

from collections.abc import Iterator

import numpy as np
from scipy.stats import spearmanr

from sims.language.ranks import Estimate
from sims.language.scores import SCORES
from sims.language.studies.percentile_record import OWN, Percentiles, Setting

EXTRA = {"probe": "fall by the first step alone", "length": "length difference n- - n+"}


def report(data: Percentiles) -> str:
    """All tables."""
    lines = [
        "Which score of a preference pair foretells the fall of ln pi(y+)? Rank correlations; +1: higher, deeper.",
        "{seeds} draws of {pairs} pairs of a kind, {alone} of them trained on alone; ".format(**data.parameters)
        + "mean over draws [95 % bootstrap over pairs]",
    ]
    for kind in data.kinds:
        for loss in data.losses:
            lines += ["", f"=== {kind} pairs ({data.describe(kind)}), {loss} ===", ""]
            own = [s for s in data.settings if s.loss == loss]
            parts = [_ranking, _steps, _partial] if own else []
            for part in parts:
                lines += [*part(data, kind, own), ""]
            lines += _finer(data, kind, loss)
            for setting in (s for s in data.subset_settings if s.loss == loss):
                lines += ["", *_subsets(data, kind, setting)]
        lines += ["", *_anatomy(data, kind)]
    return "\n".join(lines)


def ends(settings: list[Setting]) -> list[Setting]:
    """The smallest and the largest steps of every optimiser."""
    found = []
    for name in dict.fromkeys(s.optimizer for s in settings):
        of = [s for s in settings if s.optimizer == name]
        found += [of[0], of[-1]] if len(of) > 1 else of
    return found


def smallest(settings: list[Setting]) -> list[Setting]:
    """The smallest steps of every optimiser."""
    return [next(s for s in settings if s.optimizer == name) for name in dict.fromkeys(s.optimizer for s in settings)]


def _ranking(data: Percentiles, kind: str, settings: list[Setting]) -> Iterator[str]:
    """Rows in the order of the mean correlation at the smallest steps."""
    columns = ends(settings)
    table = {name: [data.correlation(kind, s, name) for s in columns] for name in (*SCORES, *EXTRA)}
    small = [columns.index(s) for s in smallest(columns)]
    yield "  each pair alone    " + " " * 14 + "".join(f"{s.short:>22}" for s in columns)
    for name, row in sorted(table.items(), key=lambda item: -sum(item[1][i].value for i in small)):
        yield f"  {(SCORES | EXTRA)[name]:32}" + "".join(f"{e!s:>22}" for e in row)


def _steps(data: Percentiles, kind: str, settings: list[Setting]) -> Iterator[str]:
    head = "  from small to large steps   margin    mean   fell  fall to       own predictor     CHES ln-CHES"
    yield head + "    edit   probe"
    yield "                              gained  change        1st order"
    for s in settings:
        _, alone = data.runs(kind, s)
        margin, change = (np.concatenate([getattr(a, name) for a in alone]) for name in ("margin", "change"))
        predicted, fell = data.falls(kind, s)
        cells = "".join(
            f"{data.correlation(kind, s, name).value:+8.2f}" for name in ("ches", "ln_ches", "edit", "probe")
        )
        yield (
            f"  {s.short:24} {np.median(margin):9.3g} {change.mean():+8.3g} {fell:6.0%} {predicted:8.0%}   "
            f"{data.correlation(kind, s, OWN[s.optimizer])!s:>20}{cells}"
        )


def _partial(data: Percentiles, kind: str, settings: list[Setting]) -> Iterator[str]:
    """At the smallest steps."""
    columns = smallest(settings)
    given = ((), ("length",), ("norm",), ("length", "norm"))
    yield (
        "  beside n- - n+ and |S+|^2"
        + " " * 9
        + "".join(f"{s.short:>16}{'|length':>9}{'||S+|^2':>9}{'|both':>9}" for s in columns)
    )
    for name, label in SCORES.items():
        cells = (f"{data.correlation(kind, s, name, g).value:+{9 if g else 16}.2f}" for s in columns for g in given)
        yield f"  {label:33}" + "".join(cells)


def _finer(data: Percentiles, kind: str, loss: str) -> Iterator[str]:
    found = [s for s in dict.fromkeys(a.setting for a in data.finer) if s.loss == loss]
    if not found:
        return
    yield "  large steps, and as far in many small ones    margin   mean change    fell"
    for s in found:
        alone = [a for a in data.finer if a.kind == kind and a.setting == s]
        margin, change = (np.concatenate([getattr(a, name) for a in alone]) for name in ("margin", "change"))
        yield f"  {s.short:42} {np.median(margin):9.3g} {change.mean():+13.3g} {(change < 0).mean():7.0%}"


def _subsets(data: Percentiles, kind: str, setting: Setting) -> Iterator[str]:
    size = data.parameters["size"]
    yield f"  subsets of {size} pairs, {setting.short}: mean change of ln pi(y+) at percentiles 0 / 25 / 50 / 75 / 100;"
    yield "  others: of as many pairs held out; falling: rank correlation with the percentile, how often strict"
    yield f"  {'':32}{'trained on':>44}{'others, 0 / 100':>18}{'falling':>20}"
    for score in data.subset_scores(kind, setting):
        trained, held = data.by_percentile(kind, setting, score)
        order = [-float(spearmanr(range(5), row).statistic) for row in trained]  # type: ignore[union-attr]
        strict = sum(bool((np.diff(row) < 0).all()) for row in trained)
        means, others = (" ".join(f"{x:+8.2g}" for x in v) for v in (trained.mean(0), held.mean(0)[[0, -1]]))
        spread = f"{np.mean(order):+.2f} ({min(order):+.1f} to {max(order):+.1f})"
        yield f"  {SCORES[score]:32}{means:>44}{others:>18}  {spread:>20} {strict}/{len(order)}"


def _anatomy(data: Percentiles, kind: str) -> Iterator[str]:
    yield f"  why CHES does or does not follow ({kind} pairs; a ~ b: rank correlation)"
    for label, value in data.anatomy(kind).items():
        yield f"  {label:42} {value if isinstance(value, Estimate) else f'{value:.3f}'}"
