"""The zoo on one page: margin gained against change of ln pi(y+), a panel per scenario."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from sims.figures import save_picture
from sims.palette import BLACK, GREEN, GREY, ORANGE, PINK, SKY, greek
from sims.plots._axes import Array, figure_of, new_figure, styled
from sims.scenarios.compare import SCENARIOS, Comparison, Course

KIND_STYLES: dict[str, dict[str, Any]] = {
    "margin": {"color": BLACK, "ls": "-"},
    "constant ratio": {"color": SKY, "ls": (0, (5, 1.5))},
    "two-likelihood": {"color": ORANGE, "ls": "-"},
    "token": {"color": GREEN, "ls": (0, (3, 1, 1, 1))},
    "group": {"color": PINK, "ls": (0, (1, 1))},
}
LINEAR = 0.3  # nats around 0 that are drawn linearly; beyond them the axis is logarithmic
SAME = 1e-5  # nats: losses of the margin this close to the common curve are drawn by it
COLUMNS = 7


@styled
def plot_comparison(data: Comparison, axes: Sequence[Axes] | None = None) -> list[Axes]:
    """Every loss as a curve from the origin, coloured by its kind; numbers name the ends, below is what they stand for.

    The bold line is the common curve of the losses of the margin (where there is one pair); a circle on it is where one
    of them comes to rest. axes : one per scenario, without the key; default a new figure with it.
    """
    names = data.scenarios
    losses = list(dict.fromkeys(c.loss for c in data.courses))
    numbers = {loss: str(i + 1) for i, loss in enumerate(losses)}
    if axes is None:
        axes = _page(data, numbers)
    if len(axes) != len(names):
        raise ValueError(f"axes must hold one per scenario ({len(names)}), got {len(axes)}")
    for ax, name, letter in zip(axes, names, "abcdefgh", strict=False):
        _panel(ax, data, name, numbers)
        ax.set_title(f"({letter}) {SCENARIOS[name].title}")
    for ax, name in zip(axes, names, strict=True):
        _number_ends(ax, [c for c in data.of(name) if _finite(c)], numbers)
    return list(axes)


def _panel(ax: Axes, data: Comparison, name: str, numbers: dict[str, str]) -> None:
    common = next((c for c in data.common if c.scenario == name), None)
    for c in data.of(name):
        style = KIND_STYLES[c.kind]
        if _on_common(c):
            if c.status != "stationary" and c.end != "margin":
                ax.plot(c.final_margin, c.final_change, "o", ms=5, mfc="white", mec=BLACK, mew=1, zorder=5)
            continue
        ax.plot(c.margin, c.change, **style, lw=1.1, zorder=3)
        ax.plot(c.final_margin, c.final_change, "o", ms=3, color=style["color"], zorder=4)
    if common is not None:
        margin, change = np.array(common.margin), np.array(common.change)
        reached = min([0.0, *(min(c.margin) for c in data.of(name) if _on_common(c))])
        ahead = margin >= reached
        ax.plot(margin[ahead], change[ahead], color=BLACK, lw=3, zorder=2, solid_capstyle="round")
        if name == data.common[0].scenario:
            i = int(np.searchsorted(margin, 0.7 * margin[-1]))
            place: Any = {"ha": "center", "va": "bottom", "textcoords": "offset points", "fontweight": "bold"}
            ax.annotate("every loss of the margin walks here", (margin[i], change[i]), (0, 12), **place)
    ax.axhline(0, color=GREY, lw=0.8, zorder=1)
    ax.set_yscale("symlog", linthresh=LINEAR, linscale=0.6)
    low = min((min(c.change) for c in data.of(name) if _finite(c)), default=-1.0)
    high = max((max(c.change) for c in data.of(name) if _finite(c)), default=1.0)
    ticks = [t for t in (-100, -30, -10, -3, -1, -0.3, 0, 0.3, 1, 3) if 1.6 * low <= t <= max(1.6 * high, 0.3)]
    ax.set_yticks(ticks, [f"{t:g}".replace("-", "\N{MINUS SIGN}") for t in ticks])
    ax.minorticks_off()
    ax.set_ylim(1.4 * min(low, -0.1), 1.6 * max(high, 0.2))
    last = data.parameters["margin"][name]
    first = min((min(c.margin) for c in data.of(name) if _finite(c)), default=0.0)
    ax.set_xlim(1.1 * min(first, 0) - 0.02 * last, 1.19 * last)
    ax.set_xlabel("margin gained (nats)")
    ax.set_ylabel(r"change of $\ln\,\pi(y^+)$ (nats, log beyond $\pm$0.3); below 0: displacement")


def _on_common(c: Course) -> bool:
    return c.off_curve is not None and c.off_curve <= SAME


def _finite(c: Course) -> bool:
    return bool(np.isfinite([*c.margin, *c.change]).all())


def _number_ends(ax: Axes, courses: Sequence[Course], numbers: dict[str, str]) -> None:
    """A number at every end, one label for ends that coincide; labels move until none lies over another (points).

    Losses that walk the common curve to its end have none: they are that curve.
    """
    courses = [c for c in courses if not (_on_common(c) and c.end == "margin")]
    points = 72 / figure_of(ax).dpi
    box = ax.bbox.x0 * points, ax.bbox.x1 * points, ax.bbox.y0 * points, ax.bbox.y1 * points
    ends = np.array([ax.transData.transform((c.final_margin, c.final_change)) for c in courses]).reshape(-1, 2) * points
    clusters: list[list[int]] = []
    for i in np.lexsort((ends[:, 1], ends[:, 0])):
        near = next((k for k in clusters if np.abs(ends[k[0]] - ends[i]).max() < 5), None)
        clusters.append([int(i)]) if near is None else near.append(int(i))
    placed: list[tuple[float, float, float, float]] = []
    for k in sorted(clusters, key=lambda k: -len(k)):
        lines, end = _wrapped([numbers[courses[i].loss] for i in sorted(k)]), ends[k].mean(0)
        wide, high = 3.7 * max(map(len, lines)), 7.4 * len(lines)
        at = _free_place(end, wide, high, placed, ends, box)
        placed.append((*at, wide, high))
        kinds = {courses[i].kind for i in k}
        color = KIND_STYLES[kinds.pop()]["color"] if len(kinds) == 1 else GREY
        ax.annotate(
            "\n".join(lines),
            (courses[k[0]].final_margin, courses[k[0]].final_change),
            xytext=tuple(at - ends[k[0]]),
            textcoords="offset points",
            ha="left",
            va="bottom",
            fontsize=6.2,
            linespacing=1.0,
            zorder=6,
            annotation_clip=False,
            bbox={"boxstyle": "square,pad=0.05", "fc": "white", "ec": "none", "alpha": 0.8},
            arrowprops={"arrowstyle": "-", "lw": 0.5, "color": color, "shrinkA": 0, "shrinkB": 1},
        )


def _wrapped(labels: Sequence[str], width: int = 12) -> list[str]:
    lines = [labels[0]]
    for label in labels[1:]:
        if len(lines[-1]) + 1 + len(label) > width:
            lines.append(label)
        else:
            lines[-1] += " " + label
    return lines


def _free_place(end: Array, wide: float, high: float, placed: Sequence[Any], ends: Array, box: Any) -> Array:
    """Lower left corner of a label near `end`, inside the panel, over no other label and no other end."""
    blocks = [*placed, *((x - 2, y - 2, 4.0, 4.0) for x, y in ends)]
    free = lambda x, y: all(  # noqa: E731
        x > q[0] + q[2] or q[0] > x + wide or y > q[1] + q[3] or q[1] > y + high for q in blocks
    )
    spots = [
        (end[0] + side, end[1] + up - high / 2)
        for r in range(0, 120, 3)
        for up in (r, -r)
        for side in (5 + r / 6, -wide - 5 - r / 6, -wide / 2)
    ]
    inside = [(x, y) for x, y in spots if box[0] < x < box[1] - wide and box[2] < y < box[3] - high]
    return np.array(next((s for s in inside if free(*s)), spots[0]))


def _page(data: Comparison, numbers: dict[str, str]) -> list[Axes]:
    """A new figure: a legend of kinds, a panel per scenario, and the key of the numbers below; sizes in inches."""
    panel, names = (4.7, 4.6), data.scenarios
    shown = {loss: greek(loss) if "(" in loss else loss for loss in numbers}
    shown = {loss: text if len(text) < 45 else text[:43] + "\N{HORIZONTAL ELLIPSIS}" for loss, text in shown.items()}
    columns = max(1, min(COLUMNS, 22 * COLUMNS // max(map(len, shown.values()))))
    rows = -(-len(numbers) // columns)
    width, key = max(10.0, (panel[0] + 0.75) * len(names) + 0.2), 0.165 * rows
    height = 0.75 + panel[1] + 0.65 + key + 0.1
    figure = new_figure(width, height)
    figure.set_layout_engine("none")
    axes = []
    for i in range(len(names)):
        left = 0.65 + i * (width - 0.3) / len(names)
        size = (width - 0.3) / len(names) - 0.75
        axes.append(figure.add_axes((left / width, (key + 0.75) / height, size / width, panel[1] / height)))
    ax = figure.add_axes((0.3 / width, 0.05 / height, 1 - 0.5 / width, key / height))
    ax.axis("off")
    ax.set(xlim=(0, 1), ylim=(0, 1))
    kinds = {c.loss: c.kind for c in data.courses}  # that on the last scenario, the most general
    for i, (loss, number) in enumerate(numbers.items()):
        x, y = (i // rows) / columns, 1 - (i % rows + 0.5) / rows
        ax.plot([x, x + 0.018], [y, y], **KIND_STYLES[kinds[loss]], lw=2, clip_on=False)
        ax.text(x + 0.023, y, f"{number}  {shown[loss]}", fontsize=7.5, va="center")
    handles = [Line2D([], [], **style, lw=2, label=k) for k, style in KIND_STYLES.items() if k in kinds.values()]
    handles.append(Line2D([], [], color=BLACK, lw=3.5, label="common curve of all losses of the margin (one pair)"))
    figure.legend(handles=handles, loc="upper center", ncols=len(handles), handlelength=2.6)
    return axes


@styled
def save_comparison(data: Comparison, path: Path | str) -> Path:
    """`plot_comparison` as a .png, .svg or .pdf file, written atomically."""
    return save_picture(figure_of(plot_comparison(data)[0]), Path(path))
