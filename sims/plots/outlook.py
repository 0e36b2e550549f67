"""What training on one pair will do to a network: paths over the margin, and how far they are good."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes

from sims.figures import save_picture
from sims.language.outlook.record import THEORY, Outlook
from sims.palette import BLACK, BLUE, FAINT, GREY, ORANGE, PINK, RED, SKY, YELLOW, shown
from sims.plots._axes import in_row, styled

COLORS = (BLUE, RED, ORANGE, PINK, SKY)


@styled
def plot_outlook(record: Outlook, axes: Sequence[Axes] | None = None) -> list[Axes]:
    """Left: the change of ln pi of y+ and of what gains most, along the forecasts (solid: the network's own features,
    dashed: unconstrained ones) and measured on the network taken along its first step (dots); y- changes as y+ less the
    margin gained. The margins where the forecast holds are shaded. Right: first rates, through body and head.
    """
    axes = in_row(axes, (1.5, 1), 10.2, 4.6)
    _paths(axes[0], record)
    _rates(axes[1], record)
    return axes


def _paths(ax: Axes, record: Outlook) -> None:
    points, reach = record.checked.points, record.checked.reach
    rows = record.tokens or record.responses
    named = [record.pair[0], *(g for g in rows if g.role not in ("y+", "y-") and g.rate > 0)]
    far = max(2 * reach, *(p.gained for p in points))
    low = high = 0.0
    for told, style in zip(record.forecasts, ("-", "--"), strict=False):
        for i, (g, color, line) in enumerate(zip(named, COLORS, (told.preferred, *told.others), strict=False)):
            change = np.array(line) - line[0]
            label = shown(g.text) + ("" if i else "  ($y^+$)") if style == "-" else None
            ax.plot(told.gained, change, style, color=color, lw=1.3 if i else 2.2, label=label, zorder=3 if i else 4)
            seen = change[: int(np.searchsorted(told.gained, far)) + 1]
            low, high = min(low, seen.min()), max(high, seen.max())
    for i, (g, color) in enumerate(zip(named, COLORS, strict=False)):
        y = [p.others[i - 1] - g.log_prob if i else p.preferred for p in points]
        ax.plot([p.gained for p in points], y, "o", color=color, ms=4, mec="white", mew=0.4, zorder=5)
        low, high = min(low, *y), max(high, *y)
    ax.axvspan(0, reach, color=YELLOW, alpha=0.22, lw=0, zorder=0, label="where the forecast holds")
    ax.axhline(0, color=GREY, lw=0.8)
    for style, told in zip(("-", "--"), record.forecasts, strict=False):
        ax.plot([], [], style, color=BLACK, lw=1.3, label=THEORY[told.theory])
    ax.plot([], [], "o", color=BLACK, ms=4, label="measured along the first step")
    pad = 0.06 * (high - low) + 1e-6
    ax.set(xlim=(0, far), ylim=(low - pad, high + pad), xlabel="margin gained (nats)")
    ax.set_ylabel(r"change of $\ln\,\pi$  (nats)")
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=3)
    falls = {"at once": "falls at once", "later": "falls later", "no": "does not fall"}[record.falls]
    ax.set_title(f"{shown(record.preferred)} over {shown(record.dispreferred)}, {record.optimizer}: {falls}")


def _rates(ax: Axes, record: Outlook) -> None:
    rows = record.tokens or record.responses
    at = np.arange(len(rows))
    ax.barh(at - 0.2, [g.body for g in rows], height=0.36, color=SKY, label="through the body")
    ax.barh(at + 0.2, [g.head for g in rows], height=0.36, color=FAINT, label="through the head")
    ax.plot([g.rate for g in rows], at, "D", color=BLACK, ms=4, label="together", zorder=4)
    free = [g.unconstrained for g in rows if g.unconstrained is not None]
    if free:
        ax.plot(free, at, "x", color=RED, ms=5, label="unconstrained features", zorder=4)
    ax.axvline(0, color=GREY, lw=0.8)
    ax.set_yticks(at, [shown(g.text[:24]) for g in rows])
    ax.set(ylim=(len(at) - 0.4, -0.6), xlabel=r"first change of $\ln\,\pi$ per nat of margin")
    ax.legend(loc="upper center", bbox_to_anchor=(0.4, -0.14), ncols=2)


@styled
def save_outlook(record: Outlook, path: Path | str) -> Path:
    """`plot_outlook` as a .png, .svg or .pdf file, written atomically."""
    return save_picture(plot_outlook(record)[0].figure, Path(path))
