"""What training on one pair will do to a network: paths over the margin, and how far they are good."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes

from sims.figures import save_picture
from sims.language.outlook.record import THEORY, Gainer, Outlook
from sims.palette import BLACK, BLUE, FAINT, GREEN, GREY, LOG_LABEL, ORANGE, PINK, RED, SKY, YELLOW, shown
from sims.plots._axes import in_row, styled

OTHERS = (RED, ORANGE, PINK, SKY)


@styled
def plot_outlook(record: Outlook, axes: Sequence[Axes] | None = None) -> list[Axes]:
    """Left: ln pi of y+, y- and what gains most along the forecasts (solid: the network's own features, dashed:
    unconstrained ones), and measured on the network taken along its first step (dots); the margins where the forecast
    holds are shaded. Right: first rates, through body and head.
    """
    axes = in_row(axes, (1.5, 1), 10.2, 4.2)
    _paths(axes[0], record)
    _rates(axes[1], record)
    return axes


def _named(record: Outlook) -> list[tuple[Gainer, str]]:
    """y+, y-, and what gains, with colours; in the order of `Foretold.others`."""
    if record.tokens:
        others = [g for g in record.tokens if g.role not in ("y+", "y-")]
    else:
        others = [g for g in record.responses if g.role not in ("y+", "y-") and g.rate > 0]
    return list(zip([*record.pair, *others], (BLUE, GREEN, *OTHERS), strict=False))


def _paths(ax: Axes, record: Outlook) -> None:
    reach, points = record.checked.reach, record.checked.points
    named = _named(record)
    for told, style in zip(record.forecasts, ("-", "--"), strict=False):
        lines = [told.preferred, told.dispreferred, *told.others]
        for i, ((gainer, color), line) in enumerate(zip(named, lines, strict=False)):
            label = shown(gainer.text) + ("  ($y^+$)", "  ($y^-$)", "")[min(i, 2)] if style == "-" else None
            ax.plot(told.gained, line, style, color=color, lw=(1.3, 2.2)[style == "-" and i < 2], label=label)
    start = record.pair[0].log_prob, record.pair[1].log_prob
    for i, (_, color) in enumerate(named):
        y = [(start[0] + p.preferred, start[1] + p.dispreferred, *p.others)[i] for p in points]
        ax.plot([p.gained for p in points], y, "o", color=color, ms=3.5, mec="white", mew=0.4, zorder=5)
    ax.axvspan(0, reach, color=YELLOW, alpha=0.22, lw=0, zorder=0, label="where the forecast holds")
    ax.axhline(start[0], color=BLUE, lw=0.7, ls=":")
    for style, told in zip(("-", "--"), record.forecasts, strict=False):
        ax.plot([], [], style, color=BLACK, lw=1.3, label=THEORY[told.theory])
    ax.plot([], [], "o", color=BLACK, ms=3.5, label="measured along the first step")
    far = max([reach * 2, *(p.gained for p in points)])
    shown_lines = [line for told in record.forecasts for line in (told.preferred, told.dispreferred, *told.others)]
    low = min(np.interp(far, record.forecasts[0].gained, line) for line in shown_lines[: len(named)])
    low = min(low, *(line[0] for line in shown_lines[: len(named)]))
    ax.set(xlim=(0, max(far, 1e-3)), ylim=(1.1 * low, 0.05 * abs(low)), xlabel="margin gained (nats)", ylabel=LOG_LABEL)
    ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
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
    ax.legend(loc="best")


@styled
def save_outlook(record: Outlook, path: Path | str) -> Path:
    """`plot_outlook` as a .png, .svg or .pdf file, written atomically."""
    return save_picture(plot_outlook(record)[0].figure, Path(path))
