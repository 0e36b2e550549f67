"""A prediction on a real matrix."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes

from sims.figures import save_picture
from sims.palette import (
    BLACK,
    BLUE,
    FAINT,
    GREEN,
    LOG_LABEL,
    MARGIN_LABEL,
    ORANGE,
    PINK,
    RED,
    SKY,
    YELLOW,
    number,
    shown,
    signed,
)
from sims.plots._axes import in_row, mark, styled
from sims.scenarios.curves import Forecast, forecast
from theory import Displacement, ExactFlow


@styled
def plot_prediction(
    flow: ExactFlow,
    displacement: Displacement,
    names: Sequence[str] | None = None,
    axes: Sequence[Axes] | None = None,
    top: int = 5,
) -> list[Axes]:
    """What the theory says of a pair before training: ln pi along the exact path, and who is aligned with W_+ - W_-.

    names : (V,) labels of the tokens; default those of the model. Left: y+, y- and the `top` tokens that gain most at
    the trough or are most aligned. Right: the largest and the smallest alignments, with those of y+ and y-.
    """
    axes = in_row(axes, (1.6, 1), 9.6, 4.0)
    data = forecast(flow, displacement, names, top)
    palette = [RED, ORANGE, PINK, SKY, YELLOW, BLACK]
    colors = [BLUE, GREEN] + [palette[i % len(palette)] for i in range(len(data.tokens) - 2)]
    point = "o" if flow.direction == 0 else ""  # a path of one point would not be seen
    for i, (name, color) in enumerate(zip(data.tokens, colors, strict=True)):
        label = shown(name) + ("  ($y^+$)", "  ($y^-$)", "")[min(i, 2)]
        width, front = (2.2, 4) if i < 2 else (1.4, 3)
        axes[0].plot(data.margin, data.log_probs[:, i], marker=point, color=color, lw=width, label=label, zorder=front)
    mark(axes[0], displacement.trough, "margin", "v", f"trough ({signed(displacement.depth)} nats)")
    mark(axes[0], displacement.last_return, "margin", "D", "back at its start")
    floor = min(float(data.log_probs[:, 0].min()), float(data.log_probs[0].min()))
    direction = ", falling" if flow.direction < 0 else ""
    axes[0].set(ylim=(1.3 * floor - 1, 0.02 * abs(floor) + 0.3), xlabel=MARGIN_LABEL + direction, ylabel=LOG_LABEL)
    axes[0].legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    never = np.isinf(displacement.kappa_star)
    star = r"no $\kappa$ falls at once" if never else rf"$\kappa^*={number(displacement.kappa_star)}$"
    status = {"none": "no displacement", "stationary": "nothing moves"}.get(displacement.status, displacement.status)
    axes[0].set_title(
        rf"{shown(data.tokens[0])} over {shown(data.tokens[1])}: {status}; "
        rf"$\kappa={number(displacement.kappa)}$, {star}, $r_{{\max}}={number(displacement.r_max)}$"
    )
    _alignment_bars(axes[1], data, dict(zip(data.tokens, colors, strict=True)))
    return axes


def _alignment_bars(ax: Axes, data: Forecast, colors: dict[str, str]) -> None:
    at = np.arange(len(data.bars))
    ax.barh(at, data.alignment, color=[colors.get(name, FAINT) for name in data.bars], height=0.72)
    ax.set_yticks(at, [shown(name) for name in data.bars])
    ax.set(ylim=(len(at) - 0.4, -0.6), xlabel=r"$\langle W_z,\,W_{y^+}-W_{y^-}\rangle$")
    ax.axvline(0, color=BLACK, lw=0.8)
    ax.set_title("predicted order (Theorem 2)")


@styled
def save_prediction(flow: ExactFlow, displacement: Displacement, path: Path | str) -> Path:
    """`plot_prediction` as a .png, .svg or .pdf file, written atomically."""
    return save_picture(plot_prediction(flow, displacement)[0].figure, Path(path))
