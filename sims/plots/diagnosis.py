"""A training log: how far the log-probabilities of chosen and rejected responses have moved."""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from sims.diagnosis.change import Change
from sims.diagnosis.verdict import Diagnosis, Finding
from sims.palette import BLACK, BLUE, FAINT, GREEN, GREY, shown
from sims.plots._axes import in_row, new_figure, one, styled

SIDES = {"chosen": BLUE, "rejected": GREEN}


@styled
def plot_course(d: Diagnosis, ax: Axes | None = None) -> Axes:
    """Changes of ln pi(chosen) and ln pi(rejected) over the run; below 0 is displacement.

    Evaluation sets as lines with marks, training batches as faint points with their running mean; the bar at the end is
    the interval of the verdict.
    """
    ax = one(ax, 6.4, 3.6)
    ax.axhline(0, color=BLACK, lw=0.8)
    for side, color in SIDES.items():
        for f in d.findings:
            change = getattr(f, side)
            if change is not None:
                _line(ax, f, change, side, color)
    chosen = d.finding.chosen
    if chosen is not None and chosen.high > chosen.low:
        ax.plot([chosen.steps[-1]] * 2, [chosen.low, chosen.high], color=BLUE, lw=6, alpha=0.3, solid_capstyle="butt")
    ax.set(
        xlabel=d.log.axis, ylabel=rf"change of $\ln\,\pi$  ({d.scale.unit})", title="Chosen and rejected over the run"
    )
    if any(getattr(f, side) for f in d.findings for side in SIDES):
        ax.legend(loc="best")
    return ax


def _line(ax: Axes, f: Finding, change: Change, side: str, color: str) -> None:
    steps, values, m = np.array(change.steps), np.array(change.values), change.window
    name = f"{side}, {shown(f.split)}"
    if f.split != "train":
        ax.plot(steps, values, "o-", color=color, ms=3.5, label=name, zorder=4)
        return
    ax.plot(steps, values, ".", color=color, ms=3, alpha=0.35, zorder=2)
    mean = np.convolve(values, np.ones(m) / m, mode="valid")
    middle = np.convolve(steps, np.ones(m) / m, mode="valid")
    ax.plot(middle, mean, "--", color=color, lw=1.3, label=f"{name} (mean of {m})", zorder=3)


@styled
def plot_price(d: Diagnosis, ax: Axes | None = None) -> Axes:
    """Change of ln pi(chosen) against the margin gained, from dark (early) to light (late).

    Flat at 0: the margin came from the rejected alone. Below 0: both fell, and this much was paid for it.
    """
    ax = one(ax, 4.4, 3.6)
    f = d.finding
    ax.axhline(0, color=BLACK, lw=0.8)
    if f.chosen is not None and f.margin is not None:
        x, y = _together(f.chosen, f.margin)
        ax.plot(x, y, "-", color=FAINT, lw=1.2, zorder=2)
        ax.scatter(x, y, c=np.arange(len(x)), cmap="cividis", s=16, zorder=3)
        ax.plot(x[-1:], y[-1:], "o", mfc="none", mec=BLACK, ms=8, label="end", zorder=4)
        ax.legend(loc="best")
    else:
        ax.text(0.5, 0.5, "no margin in the log", ha="center", transform=ax.transAxes, color=GREY)
    ax.set(
        xlabel=f"margin gained  ({d.scale.unit})",
        ylabel=rf"change of $\ln\,\pi$(chosen)  ({d.scale.unit})",
        title=f"The price of the margin ({shown(f.split)})",
    )
    return ax


def _together(chosen: Change, margin: Change) -> tuple[Any, Any]:
    """(margin, chosen) at the steps of both, training batches as running means."""
    common = sorted(set(chosen.steps) & set(margin.steps))
    by_step = [dict(zip(c.steps, c.values, strict=True)) for c in (margin, chosen)]
    m = min(chosen.window, len(common))
    return tuple(np.convolve([b[s] for s in common], np.ones(m) / m, mode="valid") for b in by_step)  # type: ignore[return-value]


@styled
def plot_diagnosis(d: Diagnosis, axes: Sequence[Axes] | None = None) -> list[Axes]:
    """`plot_course` and `plot_price` side by side."""
    axes = in_row(axes, (1.5, 1), 10.4, 3.8)
    return [plot_course(d, axes[0]), plot_price(d, axes[1])]


@styled
def svg_figures(d: Diagnosis) -> tuple[str, str]:
    """Both figures as SVG elements for a page: no declaration, no date, nothing fetched."""
    out = []
    for draw, width in ((plot_course, 6.4), (plot_price, 4.8)):
        figure = new_figure(width, 3.6)
        draw(d, figure.subplots())
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
        out.append(text.getvalue()[text.getvalue().index("<svg") :])
    return out[0], out[1]
