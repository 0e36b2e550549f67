"""Figures. The only module that draws.

Every function takes data and optional axes and returns the axes; none touches pyplot's global state, so all work
without a display. Probabilities are drawn as ln pi (nats): negative changes of ln pi(y+) are displacement.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Polygon
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from numpy.typing import ArrayLike, NDArray

from sims.figures import Moment, figure_data, save_all, save_picture
from sims.palette import (
    BLACK,
    BLUE,
    FAINT,
    GREEN,
    GREY,
    LOG_LABEL,
    MARGIN_LABEL,
    ORANGE,
    PINK,
    RED,
    ROLE_COLORS,
    SKY,
    STYLE,
    WORD_COLORS,
    YELLOW,
    greek,
    number,
    shown,
    signed,
    token_color,
)
from sims.scenarios.ches_truth import PERCENTILES, REGIMES, SCORES, ChesTruth
from sims.scenarios.curves import AFFIRMATIONS, DENIALS, Forecast, Gains, LossMarks, Role, Story, forecast
from sims.scenarios.no_never_yes import NoNeverYes
from sims.scenarios.phase import PhaseDiagram, SimplexField
from sims.verify import Ledger
from theory import Displacement, ExactFlow
from theory.displacement import Point
from theory.losses import Loss

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


def _one(ax: Axes | None, width: float, height: float) -> Axes:
    return new_figure(width, height).subplots() if ax is None else ax


def _figure(ax: Axes) -> Any:
    """The figure or subfigure of an axes, for colour bars and legends."""
    return ax.figure


def _row(axes: Sequence[Axes] | None, ratios: Sequence[float], width: float, height: float, **kw: Any) -> list[Axes]:
    """The axes given, or a new row with widths in these ratios."""
    if axes is None:
        return list(new_figure(width, height).subplots(1, len(ratios), width_ratios=list(ratios), **kw))
    if len(axes) != len(ratios):
        raise ValueError(f"ax must hold {len(ratios)} axes, got {len(axes)}")
    return list(axes)


# ---- (a) curves


@styled
def plot_log_probs(data: Story, along: str = "time", ax: Axes | None = None, legend: bool = True) -> Axes:
    """ln pi of every token along the exact flow, over t (log axis) or over the margin, with simulated points on it.

    Simulated routes are drawn for the words with a colour of their own, thinned where points would cover each other.
    """
    if along not in ("time", "margin"):
        raise ValueError(f"along must be 'time' or 'margin', got {along!r}")
    ax = _one(ax, 5.2, 3.8)
    x = np.exp(data.log_times) if along == "time" else data.margin
    words = [z for z, name in enumerate(data.tokens) if name in WORD_COLORS or z in (data.preferred, data.dispreferred)]
    for z, name in enumerate(data.tokens):
        family = token_color(name)
        if z in words:
            ax.plot(x, data.log_probs[:, z], color=family, label=shown(name), zorder=3)
        else:
            ax.plot(x, data.log_probs[:, z], color=FAINT if family == GREY else family, lw=0.9, zorder=1)
    _spelling_handles(ax, data.tokens)
    for curve, marker in zip(data.simulated[-2:], "ox", strict=False):
        at = curve.margin if along == "margin" else curve.times
        keep = _apart(np.log(np.maximum(at, 1e-2)) if along == "time" else at, 0.07)
        size = {"o": 5.0, "x": 3.4}[marker]
        for z in words:
            ax.plot(at[keep], curve.log_probs[keep, z], marker, ms=size, mfc="none", mec="black", mew=0.7, zorder=4)
        ax.plot([], [], marker, ms=size, mfc="none", mec="black", mew=0.7, label=curve.method)
    start = data.log_probs[0, data.preferred]
    _mark(ax, data.trough, along, "v", f"trough ({signed(data.trough.log_prob - start)} nats)")
    _mark(ax, data.last_return, along, "D", "back at its start")
    _limits(ax, data, along)
    if legend:
        ax.legend(loc="lower left", ncols=1, borderaxespad=0.2)
    return ax


def _apart(x: Array, share: float) -> NDArray[np.intp]:
    """Indices of non-decreasing x at least `share` of its range apart, so that markers do not cover each other."""
    keep = [0]
    for i in range(1, len(x)):
        if x[i] - x[keep[-1]] >= share * (x[-1] - x[0]):
            keep.append(i)
    return np.array(keep, dtype=np.intp)


def _spelling_handles(ax: Axes, tokens: Sequence[str]) -> None:
    """Legend entries for the light curves."""
    for family, color in ((DENIALS, SKY), (AFFIRMATIONS, ORANGE)):
        others = [shown(t) for t in tokens if t in family and t not in WORD_COLORS]
        if others:
            ax.plot([], [], color=color, lw=0.9, label=", ".join(others))
    if any(token_color(t) == GREY for t in tokens):
        ax.plot([], [], color=FAINT, lw=0.9, label="other tokens")


def _mark(ax: Axes, point: Point | None, along: str, marker: str, text: str) -> None:
    if point is None or point.kind not in ("trough", "return"):
        return
    x = np.exp(point.log_time) if along == "time" else point.margin
    ax.plot([x], [point.log_prob], marker, color=BLACK, ms=5.5, zorder=6, label=text, clip_on=False)


def _limits(ax: Axes, data: Story, along: str) -> None:
    low = float(data.log_probs[:, data.preferred].min())
    ax.set_ylim(min(1.55 * low - 3, -8), 0.8)
    ax.set_ylabel(LOG_LABEL)
    if along == "time":
        ax.set_xscale("log")
        ax.xaxis.set_major_locator(LogLocator(numticks=9))
        ax.xaxis.set_minor_locator(NullLocator())
        ax.set_xlim(0.1, float(np.exp(data.log_times[-1])))
        ax.set_xlabel(r"time $t$  (units of $1/\eta_W$, log axis)")
    else:
        ax.set_xlim(float(data.margin[0]) - 2, float(data.margin[-1]))
        ax.set_xlabel(MARGIN_LABEL)


@styled
def plot_story(data: Story, axes: Sequence[Axes] | None = None) -> list[Axes]:
    """`plot_log_probs` over time and over the margin, side by side."""
    own = axes is None
    axes = _row(axes, (1, 1), 9.6, 4.2, sharey=True)
    plot_log_probs(data, "time", axes[0], legend=not own)
    plot_log_probs(data, "margin", axes[1], legend=False)
    if own:
        axes[0].figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    axes[1].set_ylabel("")
    axes[0].set_title("(a) over time")
    axes[1].set_title("(b) over the margin: the same curve for every margin loss")
    return axes


# ---- (b) the simplex

CORNERS = np.array([[0.0, 0.0], [1.0, 0.0], [0.5, np.sqrt(0.75)]])  # of y+, y- and the third token
PATH_STYLES: tuple[dict[str, Any], ...] = (
    {"marker": "o", "ms": 8, "mfc": YELLOW, "mec": BLACK, "mew": 0.9, "ls": "none", "label": "the moment of this W"},
    {"color": BLACK, "lw": 2.2, "label": "path walked"},
    {"color": BLACK, "lw": 1.4, "ls": (0, (1, 1.6)), "label": "path ahead"},
)
ARROWS: dict[str, Any] = {"width": 0.0065, "headwidth": 4.2, "headlength": 4.6, "zorder": 2}
SPEED = LinearSegmentedColormap.from_list("speed", ["#C4CFDE", "#5B7FB0", "#0B2A5B"])


def barycentric(q: Array) -> Array:
    """(N, 2) positions in the plane of probabilities (N, 3), or of their velocities."""
    return q @ CORNERS


@styled
def plot_simplex(
    field: SimplexField,
    walked: Array | None = None,
    ahead: Array | None = None,
    ax: Axes | None = None,
    norm: Normalize | None = None,
    bar: bool = True,
) -> Axes:
    """Directions of the flow on the simplex of three tokens at one W: unit arrows coloured by speed, and the path.

    The field is the instantaneous one at the W of `field`, while the path moves W too: it follows the arrows only at
    the yellow dot, the moment at which it has this W. `walked` and `ahead` (T, 3): the path before and after it, as
    probabilities among the three. `norm` (of log10 speed) makes panels comparable; `bar` adds the colour bar.
    """
    ax = _one(ax, 4.4, 3.6)
    ax.add_patch(Polygon(CORNERS, closed=True, fc="#FBFBFB", ec=BLACK, lw=0.9, zorder=0))
    xy, v = barycentric(field.points), barycentric(field.velocity)
    speed = np.hypot(v[:, 0], v[:, 1])
    moving = speed > 0
    arrows = ax.quiver(
        *xy[moving].T,
        *(v[moving] / speed[moving, None]).T,
        np.log10(speed[moving]),
        angles="xy",
        scale_units="xy",
        scale=1.25 * np.sqrt(len(xy)),
        pivot="mid",
        cmap=SPEED,
        norm=norm,
        **ARROWS,
    )
    if bar:
        _figure(ax).colorbar(arrows, ax=ax, label=r"$\log_{10}$ speed (1/time)", shrink=0.7, aspect=22, pad=0.02)
    for path, style in zip((field.here[None], walked, ahead), PATH_STYLES, strict=True):
        if path is not None and len(path):
            ax.plot(*barycentric(path).T, zorder=6 if len(path) == 1 else 4, clip_on=False, **style)
    places = zip(field.names, CORNERS, ((-3, -9), (3, -9), (0, 8)), ("left", "right", "center"), strict=True)
    for name, corner, shift, side in places:
        text = ax.annotate(shown(name), corner, xytext=shift, textcoords="offset points", ha=side)
        text.set(color=token_color(name), fontweight="bold", va="center")
    ax.set(xlim=(-0.04, 1.04), ylim=(-0.03, 0.9), aspect="equal")
    ax.axis("off")
    return ax


@styled
def plot_simplex_moments(moments: Sequence[Moment], axes: Sequence[Axes] | None = None) -> list[Axes]:
    """`plot_simplex` at several moments of one flow, side by side, with one scale of speeds."""
    own = axes is None
    axes = _row(axes, [1] * len(moments), 3.2 * len(moments) + 0.6, 3.45)
    speeds = np.concatenate([np.linalg.norm(barycentric(m.field.velocity), axis=1) for m in moments])
    norm = Normalize(*np.log10(np.quantile(speeds[speeds > 0], [0.02, 1.0])))
    for ax, moment in zip(axes, moments, strict=True):
        plot_simplex(moment.field, moment.walked, moment.ahead, ax, norm, bar=False)
        ax.set_title(moment.title, loc="center", pad=16)
    label = r"$\log_{10}$ speed (1/time)"
    _figure(axes[0]).colorbar(axes[-1].collections[0], ax=axes, label=label, shrink=0.75, aspect=24, pad=0.01)
    if own:
        handles = [axes[0].plot([], [], **style)[0] for style in PATH_STYLES]
        _figure(axes[0]).legend(handles=handles, loc="outside lower center", ncols=3)
    return axes


# ---- (c) phase diagram


@styled
def plot_phase(data: PhaseDiagram, ax: Axes | None = None) -> Axes:
    """How deep ln pi(y+) falls, over kappa and the alignment of y+ and y-; the boundaries of the regions over it."""
    ax = _one(ax, 6.2, 4.2)
    low, high = -2.0, np.ceil(4 * np.log10(max(1.0, -data.depth.min()))) / 4
    log_depth = np.log10(np.maximum(-data.depth.T, 10**low))  # (K, A)
    filled = ax.contourf(
        data.cosine, data.kappa, log_depth, levels=np.arange(low, high + 0.01, 0.125), cmap="viridis_r"
    )
    filled.set_edgecolor("face")
    # Below the boundary nothing falls: white, up to the boundary rather than to the nearest cells.
    never = np.clip(data.kappa_any, data.kappa[0], 2 * data.kappa[-1])
    ax.fill_between(data.cosine, data.kappa[0], never, color="white", lw=0)
    bar = _figure(ax).colorbar(filled, ax=ax, pad=0.02, format=FuncFormatter(lambda x, _: f"{10.0**x:g}"))
    bar.set_ticks([t for t in np.arange(low, high + 0.01) if t <= high])
    bar.set_label(r"depth: fall of $\ln\,\pi(y^+)$ below its start (nats)")
    # An infinite kappa* beside a finite one is drawn far above the picture, so that the curve leaves it.
    finite = np.isfinite(data.kappa_star)
    beside = ~finite & (np.convolve(finite, [1, 1, 1], "same") > 0)
    star = np.where(beside, 1e6 * data.kappa[-1], data.kappa_star)
    ax.plot(data.curve_cosine, star, color=RED, lw=2.2, label=r"$\kappa^*$: falls at once above it (closed form)")
    ax.plot(
        data.cosine,
        data.kappa_any,
        color=BLACK,
        lw=1.2,
        ls="--",
        label="falls below its start, sooner or later, above it",
    )
    turns = data.curve_cosine[data.r_max > 1 + 1e-9]
    if turns.size and turns[0] > data.curve_cosine[0]:
        ax.axvline(
            turns[0], color=GREY, lw=1.2, ls=":", label=r"$r_{\max}=1$: to its left no hidden vector falls at once"
        )
    kappa, cos = data.here
    ax.plot([cos], [kappa], "*", ms=14, mfc=YELLOW, mec=BLACK, mew=0.9, zorder=5, label="the scenario", ls="none")
    ax.set(yscale="log", xlim=(data.cosine[0], data.cosine[-1]), ylim=(data.kappa[0], data.kappa[-1]))
    ax.set_xlabel(r"alignment $\cos(W_{y^+}, W_{y^-})$")
    ax.set_ylabel(r"$\kappa=\eta_h/\eta_W$  (log axis)")
    ax.legend(loc="lower left", frameon=True, framealpha=0.9, edgecolor="none", borderaxespad=0.3)
    return ax


# ---- (d) who gains


@styled
def plot_gains(data: Gains, axes: Sequence[Axes] | None = None) -> list[Axes]:
    """Prediction <W_z, W_+ - W_-> (dots); change of ln pi at the trough, of pi at the trough and the end (bars)."""
    axes = _row(axes, (1, 1.25, 1.25), 9.6, 4.5, sharey=True)
    y, colors = np.arange(len(data.tokens)), [ROLE_COLORS[r] for r in data.roles]
    axes[0].hlines(y, 0, data.alignment, color=colors, lw=1.2)
    axes[0].scatter(data.alignment, y, c=colors, s=28, zorder=3)
    axes[0].set_yticks(y, [shown(t) for t in data.tokens])
    axes[1].barh(y, data.log_change, color=colors, height=0.72)
    for z in np.nonzero(data.log_change > 0.05)[0]:
        axes[1].annotate(
            f"+{data.log_change[z]:.1f}",
            (data.log_change[z], y[z]),
            xytext=(3, 0),
            textcoords="offset points",
            va="center",
        )
    start, trough, end = (np.exp(x) for x in (data.start, data.trough, data.end))
    axes[2].barh(y - 0.19, trough - start, color=colors, height=0.36)
    axes[2].barh(y + 0.19, end - start, color="white", edgecolor=colors, height=0.36, lw=0.9, hatch="////")
    axes[1].margins(x=0.1)
    heads = (
        ("(a) predicted before training", r"$\langle W_z,\,W_{y^+}-W_{y^-}\rangle$"),
        (f"(b) at the trough (rank correlation {data.rank_correlation:.2f})", r"change of $\ln\,\pi$ (nats)"),
        ("(c) as probability", r"change of $\pi$"),
    )
    for ax, (title, label) in zip(axes, heads, strict=True):
        ax.set_title(title)
        ax.set_xlabel(label)
        ax.axvline(0, color=BLACK, lw=0.8)
        ax.grid(axis="y", color="#EEEEEE", zorder=0)
        ax.set_axisbelow(True)
        ax.tick_params(axis="y", length=0)
    axes[0].set_ylim(len(y) - 0.4, -0.6)
    names = {"preferred": "$y^+$", "dispreferred": "$y^-$"}
    kinds: list[Role] = [r for r in ROLE_COLORS if r in data.roles]
    axes[0].legend(handles=[Patch(color=ROLE_COLORS[r], label=names.get(r, r)) for r in kinds], loc="lower right")
    when = [Patch(fc=GREY, label="at the trough"), Patch(fc="white", ec=GREY, hatch="////", label="at the end")]
    axes[2].legend(handles=when, loc="lower right")
    return axes


# ---- (f) losses


STOP: dict[str, Any] = {"ms": 8, "mec": BLACK, "mew": 0.7, "ls": "none", "zorder": 4, "clip_on": False}


@styled
def plot_losses(data: LossMarks, ax: Axes | None = None) -> Axes:
    """ln pi(y+) over the margin, one curve for every margin loss, and where each of them stops."""
    ax = _one(ax, 6.4, 3.9)
    ax.plot(data.margin, data.log_prob, color=token_color(data.preferred), zorder=2)
    ax.axhline(float(data.log_prob[0]), color=GREY, lw=0.8, ls=":", zorder=1, label="start")
    styles = zip("osD^vPX*", [BLACK, SKY, RED, PINK, GREEN, YELLOW, ORANGE, GREY], strict=True)
    for row, (marker, color) in zip(data.rows, [*styles] * (len(data.rows) // 8 + 1), strict=False):
        forever = not np.isfinite(row.stop_margin)
        x, y = (data.margin[-1], data.log_prob[-1]) if forever else (row.stop_margin, row.log_prob_at_end)
        where = "never stops" if forever else f"stops at u = {row.stop_margin:.3g}"
        label = f"{greek(row.loss)}: {where}"
        ax.plot([x], [y], ">" if forever else marker, color=color, label=label, **STOP)
    ax.set_xlabel(MARGIN_LABEL)
    ax.set_ylabel(rf"$\ln\,\pi$({shown(data.preferred)})  (nats)")
    ax.legend(loc="upper center", bbox_to_anchor=(0.45, 0.96))
    return ax


# ---- (e) a prediction on a real matrix


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
    axes = _row(axes, (1.6, 1), 9.6, 4.0)
    data = forecast(flow, displacement, names, top)
    palette = [RED, ORANGE, PINK, SKY, YELLOW, BLACK]
    colors = [BLUE, GREEN] + [palette[i % len(palette)] for i in range(len(data.tokens) - 2)]
    point = "o" if flow.direction == 0 else ""  # a path of one point would not be seen
    for i, (name, color) in enumerate(zip(data.tokens, colors, strict=True)):
        label = shown(name) + ("  ($y^+$)", "  ($y^-$)", "")[min(i, 2)]
        width, front = (2.2, 4) if i < 2 else (1.4, 3)
        axes[0].plot(data.margin, data.log_probs[:, i], marker=point, color=color, lw=width, label=label, zorder=front)
    _mark(axes[0], displacement.trough, "margin", "v", f"trough ({signed(displacement.depth)} nats)")
    _mark(axes[0], displacement.last_return, "margin", "D", "back at its start")
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


# ---- files


@styled
def save_prediction(flow: ExactFlow, displacement: Displacement, path: Path | str) -> Path:
    """`plot_prediction` as a .png, .svg or .pdf file, written atomically."""
    return save_picture(plot_prediction(flow, displacement)[0].figure, Path(path))


@styled
def save_figures(study: NoNeverYes, out_dir: Path | str, loss: Loss | None = None) -> list[Path]:
    """Write every figure of the study as PNG and SVG, the data behind it as CSV, and figures.json with the captions and
    what produced them. `loss` must be the study's, if that is not the default. Returns the paths.
    """
    data = figure_data(study, loss)
    drawn = {
        "log_probs": plot_story(data.log_probs)[0],
        "simplex": plot_simplex_moments(data.simplex)[0],
        "phase": plot_phase(data.phase),
        "gains": plot_gains(data.gains)[0],
        "losses": plot_losses(data.losses),
    }
    return save_all({name: ax.figure for name, ax in drawn.items()}, data, study, Path(out_dir))


# ---- CHES against truth


SCORE_COLORS = dict(zip(SCORES, (BLACK, BLUE, SKY, ORANGE, PINK), strict=True))
REGIME_COLORS = dict(zip(REGIMES, (GREY, BLUE, ORANGE, GREEN), strict=True))


@styled
def plot_ches_truth(data: ChesTruth, axes: Sequence[Axes] | None = None) -> list[Axes]:
    """Mean change of ln pi(y+) over percentile subsets of each score, a panel per data set; alphas; rank correlations.

    axes : one per data set and two more; default a new figure of two rows.
    """
    own = axes is None
    axes = list(new_figure(10.4, 6.2).subplots(2, 3).flat) if axes is None else list(axes)
    if len(axes) != len(data.regimes) + 2:
        raise ValueError(f"ax must hold {len(data.regimes) + 2} axes, got {len(axes)}")
    at = np.arange(len(PERCENTILES))
    for ax, r, letter in zip(axes, data.regimes, "abcd", strict=False):
        for key, label in SCORES.items():
            ax.plot(at, r.by_percentile(key), "o-", ms=3.5, color=SCORE_COLORS[key], lw=1.4, label=label)
        ax.axhline(0, color=BLACK, lw=0.8)
        ax.set_xticks(at, [str(p) for p in PERCENTILES])
        ax.set(xlabel="percentile of the score", ylabel=r"mean change of $\ln\,\pi(y^+)$  (nats)")
        ax.set_title(f"({letter}) {r.name}: " + REGIMES[r.name].replace(", ", ",\n"))
    edges = np.linspace(-2, 2, 41)
    for r in data.regimes:
        share = f"{r.name}: {(r.alphas > 0).mean():.0%} > 0"
        weights = np.full(r.alphas.size, 1 / r.alphas.size)
        kind: Any = {"histtype": "step", "lw": 1.4, "color": REGIME_COLORS[r.name], "label": share}
        axes[-2].hist(r.alphas, list(edges), weights=weights, **kind)
    axes[-2].axvline(1, color=RED, lw=1, ls="--", label="CHES: 1")
    axes[-2].set(yscale="log", xlim=(-2, 2), xlabel=r"$\alpha$", ylabel="share of all alphas (log axis)")
    axes[-2].set_title("(e) the alphas, which CHES replaces by 1")
    axes[-2].legend(loc="upper left", fontsize=7.5, borderaxespad=0)
    width = 0.8 / len(SCORES)
    for i, (key, color) in enumerate(SCORE_COLORS.items()):
        x = np.arange(len(data.regimes)) + (i - (len(SCORES) - 1) / 2) * width
        axes[-1].bar(x, [r.correlation(key) for r in data.regimes], width, color=color)
    axes[-1].axhline(0, color=BLACK, lw=0.8)
    axes[-1].set_xticks(np.arange(len(data.regimes)), [r.name for r in data.regimes])
    axes[-1].set(ylim=(-1.05, 0.3), ylabel="Spearman correlation")
    axes[-1].set_title("(f) rank correlation with that change")
    if own:
        _figure(axes[0]).legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(SCORES))
    return axes


# ---- theorems

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
    ax = _one(ax, 4.6, 3.3)
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
    ax = _one(ax, 5.6, 3.3)
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
    ax = _one(ax, 7.2, 0.27 * len(ledger.rows) + 1.0)
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
