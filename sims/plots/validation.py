"""Scores of preference pairs against the measured change of the chosen log-probability."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes

from sims.figures import save_picture
from sims.language.validation.record import LENGTH, SCORES, WORTH, Validation
from sims.palette import BLACK, BLUE, FAINT, GREEN, GREY, ORANGE, PINK, RED, SKY
from sims.plots._axes import figure_of, new_figure, styled

COLORS = dict(zip(SCORES, (BLUE, SKY, PINK, ORANGE, GREEN, BLACK, RED, GREY), strict=True))


@styled
def plot_validation(data: Validation, axes: Sequence[Axes] | None = None) -> list[Axes]:
    """Correlations with their intervals; change against the best score and against CHES; what dropping pairs removes.

    axes : four, default a new figure.
    """
    axes = list(new_figure(10.5, 7.4).subplots(2, 2).flat) if axes is None else list(axes)
    if len(axes) != 4:
        raise ValueError(f"axes must hold 4 axes, got {len(axes)}")
    best = data.findings[0].name
    plot_correlations(data, axes[0])
    plot_change(data, best, axes[1])
    plot_change(data, "ches" if best != "ches" else data.findings[1].name, axes[2])
    (plot_lift if data.lifts else plot_course)(data, axes[3])
    titles = ("which score foretells the fall", "the best predictor", "CHES" if best != "ches" else "the second")
    last = "what dropping pairs would have removed" if data.lifts else "from the first step to the last"
    for ax, letter, title in zip(axes, "abcd", (*titles, last), strict=True):
        ax.set_title(f"({letter}) {title}")
    return axes


@styled
def plot_correlations(data: Validation, ax: Axes | None = None) -> Axes:
    """Every score's rank correlation with the fall at the end and after one step; intervals hold together."""
    ax = new_figure(5.5, 3.7).subplots() if ax is None else ax
    found = data.findings
    y = np.arange(len(found))
    ax.axvspan(-WORTH, WORTH, color=FAINT, alpha=0.4, lw=0)
    ax.axvline(0, color=BLACK, lw=0.8)
    for part, shift, marker, color in (("rho", -0.14, "o", BLUE), ("early", 0.18, "D", ORANGE)):
        values = [getattr(f, part) for f in found]
        value = np.array([r.value for r in values])
        error = np.abs([[r.low, r.high] for r in values] - value[:, None]).T
        label = "at the end" if part == "rho" else "after one step"
        ax.errorbar(value, y + shift, xerr=error, fmt=marker, ms=4.5, lw=1.2, color=color, label=label)
    ax.set_yticks(y, [f.label for f in found])
    ax.invert_yaxis()
    ax.set(xlim=(-1.05, 1.05), xlabel=r"rank correlation with the fall of $\ln\,\pi(y^+)$")
    ax.legend(loc="upper left", fontsize=7)
    return ax


@styled
def plot_change(data: Validation, name: str, ax: Axes | None = None) -> Axes:
    """Change of ln pi(y+) of every run against the ranks of a score."""
    ax = new_figure(5.0, 3.7).subplots() if ax is None else ax
    score, change = data.of_runs(name), -data.fall()
    rank = np.argsort(np.argsort(score, kind="stable"), kind="stable") + 1
    for fell, color, marker in ((False, BLUE, "o"), (True, RED, "v")):
        own = (change < 0) == fell
        ax.plot(rank[own], change[own], marker, ms=4.5, color=color, alpha=0.8, label="fell" if fell else "rose")
    ax.axhline(0, color=BLACK, lw=0.8)
    f = data.finding(name)
    ax.margins(y=0.15)
    ax.set(xlabel=f"rank by {f.label} (right: a fall is expected)", ylabel=r"change of $\ln\,\pi(y^+)$  (nats)")
    ax.text(0.98, 0.97, f"ρ = {f.rho}", transform=ax.transAxes, ha="right", va="top", fontsize=8)
    ax.legend(fontsize=7, loc="lower left")
    return ax


@styled
def plot_lift(data: Validation, ax: Axes | None = None) -> Axes:
    """Share of all falls removed over the share of pairs dropped, by score; the best order, and dropping at random."""
    ax = new_figure(5.0, 3.7).subplots() if ax is None else ax
    n = len(data.runs)
    shares = np.arange(1, n + 1) / n
    for name in _shown(data):
        removed = [data.lift(name, s)[0] for s in shares]
        ax.plot([0, *shares], [0, *removed], lw=1.5, color=COLORS[name], label=SCORES[name].label)
    ax.plot(
        [0, *shares], [0, *(data.lift(None, s)[0] for s in shares)], ":", lw=1.4, color=BLACK, label="best possible"
    )
    ax.plot([0, 1], [0, 1], "--", lw=1, color=GREY, label="at random")
    ax.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="share of pairs dropped, highest score first")
    ax.set_ylabel("share of all falls removed")
    ax.legend(fontsize=7, loc="lower right")
    return ax


@styled
def plot_course(data: Validation, ax: Axes | None = None) -> Axes:
    """Rank correlations with the fall after every step."""
    from sims.language.ranks import correlations

    ax = new_figure(5.0, 3.7).subplots() if ax is None else ax
    steps = range(1, data.chosen.shape[1])
    for name in _shown(data):
        rho = [float(correlations(data.of_runs(name), data.fall(s))[0]) for s in steps]
        ax.plot(steps, rho, "o-", ms=3.5, lw=1.4, color=COLORS[name], label=SCORES[name].label)
    ax.axhline(0, color=BLACK, lw=0.8)
    ax.set(ylim=(-1.05, 1.05), xlabel="step", ylabel=r"rank correlation with the fall of $\ln\,\pi(y^+)$")
    ax.legend(fontsize=7, loc="lower left")
    return ax


def _shown(data: Validation) -> list[str]:
    """The best score, the best that needs no backward pass, CHES, edit similarity and length."""
    free = next(f.name for f in data.findings if f.name in ("ches", "ln_ches", "last_hidden", "alpha", "edit_distance"))
    return list(dict.fromkeys((data.findings[0].name, free, "ches", "edit_distance", LENGTH)))


def save_validation(data: Validation, folder: Path | str) -> list[Path]:
    """The figure, written atomically; its path."""
    return [save_picture(figure_of(plot_validation(data)[0]), Path(folder) / "validate.png")]
