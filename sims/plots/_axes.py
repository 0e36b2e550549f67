"""What the figures share: style, new figures, rows of axes."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from sims.palette import BLACK, STYLE
from theory.displacement import Point

Array = NDArray[np.float64]
P = ParamSpec("P")
T = TypeVar("T")


def styled(draw: Callable[P, T]) -> Callable[P, T]:
    """Draw with STYLE and leave matplotlib's settings as they were."""

    @functools.wraps(draw)
    def inner(*args: P.args, **kwargs: P.kwargs) -> T:
        with mpl.rc_context(STYLE):
            return draw(*args, **kwargs)

    return inner


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of the given size (inches) outside pyplot."""
    return Figure(figsize=(width, height), layout="constrained", dpi=120)


def one(ax: Axes | None, width: float, height: float) -> Axes:
    return new_figure(width, height).subplots() if ax is None else ax


def figure_of(ax: Axes) -> Any:
    """The figure or subfigure of an axes, for colour bars and legends."""
    return ax.figure


def in_row(axes: Sequence[Axes] | None, ratios: Sequence[float], width: float, height: float, **kw: Any) -> list[Axes]:
    """The axes given, or a new row with widths in these ratios."""
    if axes is None:
        return list(new_figure(width, height).subplots(1, len(ratios), width_ratios=list(ratios), **kw))
    if len(axes) != len(ratios):
        raise ValueError(f"ax must hold {len(ratios)} axes, got {len(axes)}")
    return list(axes)


def mark(ax: Axes, point: Point | None, along: str, marker: str, text: str) -> None:
    """A trough or return on a curve over time or margin; nothing for another kind of point."""
    if point is None or point.kind not in ("trough", "return"):
        return
    x = np.exp(point.log_time) if along == "time" else point.margin
    ax.plot([x], [point.log_prob], marker, color=BLACK, ms=5.5, zorder=6, label=text, clip_on=False)
