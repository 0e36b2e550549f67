"""What the claims say, and the ledger."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import ArrayLike

from sims.palette import (
    BLACK,
    BLUE,
    GREEN,
    ORANGE,
    PINK,
    RED,
    SKY,
)
from sims.plots._axes import Array, new_figure, one, styled
from sims.verify import Ledger

CYCLE = (BLUE, RED, GREEN, ORANGE, PINK, SKY, BLACK)
Series = Mapping[str, tuple[ArrayLike, ArrayLike]]


@styled
def panels(count: int, width: float = 3.5, height: float = 3.2, **kw: Any) -> list[Axes]:
    """A row of axes on a new figure, each of the given size (inches)."""
    figure = new_figure(width * count, height)
    figure.set_dpi(100)  # notebooks keep many of these
    return list(np.atleast_1d(figure.subplots(1, count, **kw)))


@styled
def plot_law(
    formula: Series,
    measured: Series,
    ax: Axes | None = None,
    title: str = "",
    labels: tuple[str, str] = ("", ""),
    legend: Any = "best",
    **axes_settings: Any,
) -> Axes:
    """What a theorem says (lines) and what a route that does not know it finds (circles), a colour for each name.

    formula, measured : name -> (x, y). Names that stand in one of them alone are drawn; "" is black and not in the
    legend. `labels` of x and y; `legend`: its place; `axes_settings` are passed to `ax.set`.
    """
    ax = one(ax, 4.6, 3.3)
    names = list(dict.fromkeys([*formula, *measured]))
    colors = dict(zip(filter(None, names), CYCLE * len(names), strict=False)) | {"": BLACK}
    for name in names:
        if name in formula:
            ax.plot(*map(np.asarray, formula[name]), color=colors[name], lw=1.4, label=name or "_formula", zorder=2)
        if name in measured:
            label = "_measured" if not name or name in formula else name
            look: Any = {"ms": 4.2, "mfc": "none", "mec": colors[name], "mew": 0.9, "ls": "none"}
            ax.plot(*map(np.asarray, measured[name]), "o", label=label, zorder=3, **look)
    ax.set(xlabel=labels[0], ylabel=labels[1], title=title, **axes_settings)
    low, high = ax.get_ylim()
    if low < 0 < high and ax.get_yscale() == "linear":
        ax.axhline(0, color=BLACK, lw=0.8, zorder=1)
    if ax.get_legend_handles_labels()[1]:
        ax.legend(loc=legend)
    return ax


@styled
def plot_terms(
    terms: Mapping[str, Array],
    measured: Array,
    ticks: Sequence[str],
    ax: Axes | None = None,
    title: str = "",
    labels: tuple[str, str] = ("", ""),
) -> Axes:
    """The named terms of a rate as stacked bars, what is positive upwards from 0 and what is negative downwards.

    terms : name -> (N,); measured (N,): their sum by another route, drawn as dots; `ticks`: what each bar stands for.
    """
    ax = one(ax, 5.6, 3.3)
    at = np.arange(len(ticks))
    top, bottom = np.zeros(len(ticks)), np.zeros(len(ticks))
    for (name, values), color in zip(terms.items(), CYCLE * len(terms), strict=False):
        base = np.where(values > 0, top, bottom)
        ax.bar(at, values, 0.8, bottom=base, color=color, label=name, alpha=0.85)
        top, bottom = top + np.maximum(values, 0), bottom + np.minimum(values, 0)
    ax.plot(at, measured, "o", color="white", mec=BLACK, ms=5, mew=1.2, label="measured sum", zorder=4)
    ax.axhline(0, color=BLACK, lw=0.8)
    ax.set_xticks(at, list(ticks))
    ax.set(xlabel=labels[0], ylabel=labels[1], title=title)
    ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return ax


@styled
def plot_ledger(ledger: Ledger, wrong: Mapping[str, Sequence[float]] | None = None, ax: Axes | None = None) -> Axes:
    """Worst residual of each claim by route, against its tolerance; of wrong copies and without a hypothesis.

    wrong : residuals of deliberately wrong copies by claim. Residuals below 1e-18, 0 among them, are drawn there.
    """
    ax = one(ax, 7.2, 0.27 * len(ledger.rows) + 1.0)
    found: dict[str, list[tuple[float, int]]] = {}
    for i, row in enumerate(ledger.rows):
        for route, tried in row.routes.items():
            found.setdefault(f"true, {route}", []).append((tried.residual, i))
        for residual in (wrong or {}).get(row.name, ()):
            found.setdefault("wrong copies", []).append((residual, i))
        for s in row.sharpness:
            if s["broken_in"]:
                found.setdefault("a hypothesis dropped", []).append((s["residual"], i))
    looks = {"wrong copies": ("x", RED), "a hypothesis dropped": ("^", ORANGE)}
    routes = zip([n for n in found if n not in looks], zip("osD", (BLUE, SKY, GREEN), strict=True), strict=False)
    for name, (marker, color) in (*routes, *looks.items()):
        if name in found:
            x, y = np.transpose(found[name])
            ax.plot(np.maximum(x, 1e-18), y, marker, color=color, ms=4.5, mfc="none", label=name)
    tolerances = [row.tolerance for row in ledger.rows]
    ax.plot(tolerances, np.arange(len(tolerances)), "|", color=BLACK, ms=11, mew=1.6, label="allowed")
    ax.set_yticks(np.arange(len(ledger.rows)), [row.name for row in ledger.rows])
    ax.set(xscale="log", xlabel="residual (log axis)", ylim=(len(ledger.rows) - 0.4, -0.6))
    ax.grid(axis="y", color="#EEEEEE", zorder=0)
    ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return ax
