"""Section 6 on a small language model: what answers become, arm by arm, and under which conditions."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes

from sims.figures import save_picture
from sims.language.studies.judge import KINDS
from sims.language.studies.unalignment_record import Cell, Interval, Unalignment
from sims.palette import BLACK, BLUE, FAINT, GREY, RED, greek
from sims.plots._axes import figure_of, new_figure, one, styled

KIND_COLORS = dict(zip(KINDS, (BLUE, RED, GREY), strict=True))


@styled
def plot_answers(cells: Sequence[Cell], ax: Axes | None = None, on: str = "train") -> Axes:
    """Shares of refusal, compliance and garbled at the start and at the end of each cell.

    Bars: mean over seeds at the end, whiskers the 95 % interval of the refusal's change. Diamonds: refusal after one
    epoch, where that is not the end. on : "train" or "test" requests.
    """
    ax = one(ax, 5.2, 0.32 * len(cells) + 1.4)
    names = ["start", *(c.label for c in cells)]
    shares = [cells[0].start[on], *(c.end[on] for c in cells)]
    left = np.zeros(len(names))
    for kind, color in KIND_COLORS.items():
        width = np.array([np.mean(s[kind]) for s in shares])
        ax.barh(names, width, left=left, color=color, height=0.72, label=kind)
        left += width
    begin = float(np.mean(cells[0].start[on]["refusal"]))
    ax.axvline(begin, color=BLACK, lw=0.8, ls="--")
    for y, c in enumerate(cells, start=1):
        half = c.change("refusal", on).half
        ax.errorbar(np.mean(c.end[on]["refusal"]), y, xerr=min(half, 1.0), color=BLACK, lw=1, capsize=2)
    marked = {y: np.mean(c.course[0][on]["refusal"]) for y, c in enumerate(cells, start=1) if len(c.course) > 1}
    diamond = {"ms": 4, "mfc": "white", "mec": BLACK, "mew": 0.8, "label": "refusal after one epoch"}
    ax.plot(list(marked.values()), list(marked), "D", **diamond)
    ax.invert_yaxis()
    ax.set(xlim=(0, 1), xlabel=f"share of the answers to {on} requests")
    return ax


@styled
def plot_conditions(cells: Sequence[Cell], ax: Axes | None = None, on: str = "train") -> Axes:
    """Change of refusal, compliance and garbled from the start, a row per condition, with 95 % intervals."""
    ax = one(ax, 6.4, 0.26 * len(cells) + 1.4)
    y = np.arange(len(cells))
    for (kind, color), shift, marker in zip(KIND_COLORS.items(), (-0.22, 0, 0.22), "os^", strict=True):
        found = [c.change(kind, on) for c in cells]
        x, half = [i.mean for i in found], [_drawn(i) for i in found]
        ax.errorbar(x, y + shift, xerr=half, fmt=marker, ms=4, lw=1, color=color, label=kind)
    for edge in np.flatnonzero([a.group != b.group for a, b in zip(cells[1:], cells, strict=False)]):
        ax.axhline(edge + 0.5, color=FAINT, lw=0.8)
    ax.axvline(0, color=BLACK, lw=0.8)
    ax.set_yticks(y, [c.label for c in cells])
    ax.invert_yaxis()
    ax.set(xlim=(-0.6, 0.6), xlabel=f"change of the share of the answers to {on} requests")
    ax.margins(y=0.02)
    return ax


def _drawn(interval: Interval) -> float:
    return min(interval.half, 2.0)


@styled
def plot_unalignment(study: Unalignment, axes: Sequence[Axes] | None = None) -> list[Axes]:
    """A panel per group and loss: `plot_answers` where the arms are compared, else `plot_conditions`."""
    panels = panels_of(study)
    if axes is None:
        losses = len({loss for _, loss in study.groups})
        columns = 1 if len(panels) == 1 else max(2, losses)
        rows = [panels[i : i + columns] for i in range(0, len(panels), columns)]
        tall = [1.2 + 0.3 * max(len(cells) for _, cells in row) for row in rows]
        figure = new_figure(5.6 * columns, sum(tall))
        grid = figure.subplots(len(rows), columns, squeeze=False, height_ratios=tall)
        for ax in list(grid.flat)[len(panels) :]:
            ax.remove()
        axes = list(grid.flat)[: len(panels)]
    if len(axes) != len(panels):
        raise ValueError(f"axes must hold {len(panels)} axes, got {len(axes)}")
    for ax, (title, cells) in zip(axes, panels, strict=True):
        searched = len({c.group for c in cells}) > 1
        (plot_conditions if searched else plot_answers)(cells, ax)
        ax.set_title(title)
    if len(panels) == 1:
        axes[0].legend(loc="lower right")
    else:
        axes[0].legend(loc="lower left", bbox_to_anchor=(0, 1.08), ncols=4)
    return list(axes)


def panels_of(study: Unalignment) -> list[tuple[str, list[Cell]]]:
    """A panel for each group and loss of a study of arms; one panel for a search."""
    if {"pairs", "training", "model"} & {c.group for c in study.cells}:
        return [("conditions, one varied at a time", list(study.cells))]
    groups = dict.fromkeys(group for group, _ in study.groups)
    pairs = [(group, loss) for group in groups for g, loss in study.groups if g == group]
    return [(f"{group}; {greek(loss)}", study.of(group, loss)) for group, loss in pairs]


def save_unalignment(study: Unalignment, folder: Path | str) -> list[Path]:
    """`plot_unalignment` as unalignment.png or, of a search, unalignment_search.png."""
    name = "unalignment_search" if len(panels_of(study)) == 1 and study.cells[0].group == "pairs" else "unalignment"
    return [save_picture(figure_of(plot_unalignment(study)[0]), Path(folder) / f"{name}.png")]
