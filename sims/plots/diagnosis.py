"""A training log: how far the log-probabilities of chosen and rejected responses have moved."""

import io
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

from sims.diagnosis.change import Change
from sims.diagnosis.verdict import Diagnosis, Finding
from sims.palette import BLACK, BLUE, FAINT, GREEN, shown
from sims.plots._axes import in_row, new_figure, one, styled

Array = NDArray[np.float64]

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
    if ax.get_legend_handles_labels()[0]:
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
    if f.chosen and f.margin:
        x, y = _together(f.chosen, f.margin)
        if d.scale.reference:
            x, y = np.append(0.0, x), np.append(0.0, y)
        ax.plot(x, y, "-", color=FAINT, lw=1.2, zorder=2)
        ax.scatter(x, y, c=np.arange(len(x)), cmap="cividis", s=16, zorder=3)
        ax.plot(x[-1:], y[-1:], "o", mfc="none", mec=BLACK, ms=8, label="end", zorder=4)
        ax.legend(loc="best")
    ax.set(
        xlabel=f"margin gained  ({d.scale.unit})",
        ylabel=rf"change of $\ln\,\pi$(chosen)  ({d.scale.unit})",
        title=f"The price of the margin ({shown(f.split)})",
    )
    return ax


def _together(chosen: Change, margin: Change) -> tuple[Array, Array]:
    """(margin, chosen) at the steps of both, training batches as running means."""
    steps = sorted(set(chosen.steps) & set(margin.steps))
    x, y = (dict(zip(c.steps, c.values, strict=True)) for c in (margin, chosen))
    mean = np.ones(m := min(chosen.window, len(steps))) / m
    return np.convolve([x[s] for s in steps], mean, "valid"), np.convolve([y[s] for s in steps], mean, "valid")


@styled
def plot_diagnosis(d: Diagnosis, axes: Sequence[Axes] | None = None) -> list[Axes]:
    """`plot_course` and `plot_price` side by side."""
    axes = in_row(axes, (1.5, 1), 10.4, 3.8)
    return [plot_course(d, axes[0]), plot_price(d, axes[1])]


@styled
def svg_figures(d: Diagnosis) -> tuple[str, ...]:
    """The figures as SVG elements for a page, without declaration and date; none where nothing was measured."""
    f, out = d.finding, []
    for draw, width, there in ((plot_course, 6.4, f.chosen), (plot_price, 4.8, f.chosen and f.margin)):
        if there:
            figure, text = new_figure(width, 3.6), io.StringIO()
            draw(d, figure.subplots())
            figure.savefig(text, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
            out.append(text.getvalue()[text.getvalue().index("<svg") :])
    return tuple(out)
