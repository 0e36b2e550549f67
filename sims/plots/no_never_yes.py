"""The study of one pair: curves, simplex, phase diagram, gains, losses."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.patches import Patch, Polygon
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from numpy.typing import NDArray

from sims.figures import Moment, figure_data, save_all
from sims.palette import (
    BLACK,
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
    WORD_COLORS,
    YELLOW,
    greek,
    shown,
    signed,
    token_color,
)
from sims.plots._axes import Array, figure_of, in_row, mark, one, styled
from sims.scenarios.curves import AFFIRMATIONS, DENIALS, Gains, LossMarks, Role, Story
from sims.scenarios.no_never_yes import NoNeverYes
from sims.scenarios.phase import PhaseDiagram, SimplexField
from theory.losses import Loss


@styled
def plot_log_probs(data: Story, along: str = "time", ax: Axes | None = None, legend: bool = True) -> Axes:
    """ln pi of every token along the exact flow, over t (log axis) or over the margin, with simulated points on it.

    Simulated routes are drawn for the words with a colour of their own, thinned where points would cover each other.
    """
    if along not in ("time", "margin"):
        raise ValueError(f"along must be 'time' or 'margin', got {along!r}")
    ax = one(ax, 5.2, 3.8)
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
    mark(ax, data.trough, along, "v", f"trough ({signed(data.trough.log_prob - start)} nats)")
    mark(ax, data.last_return, along, "D", "back at its start")
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
    axes = in_row(axes, (1, 1), 9.6, 4.2, sharey=True)
    plot_log_probs(data, "time", axes[0], legend=not own)
    plot_log_probs(data, "margin", axes[1], legend=False)
    if own:
        axes[0].figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    axes[1].set_ylabel("")
    axes[0].set_title("(a) over time")
    axes[1].set_title("(b) over the margin: the same curve for every margin loss")
    return axes


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
    ax = one(ax, 4.4, 3.6)
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
        figure_of(ax).colorbar(arrows, ax=ax, label=r"$\log_{10}$ speed (1/time)", shrink=0.7, aspect=22, pad=0.02)
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
    axes = in_row(axes, [1] * len(moments), 3.2 * len(moments) + 0.6, 3.45)
    speeds = np.concatenate([np.linalg.norm(barycentric(m.field.velocity), axis=1) for m in moments])
    norm = Normalize(*np.log10(np.quantile(speeds[speeds > 0], [0.02, 1.0])))
    for ax, moment in zip(axes, moments, strict=True):
        plot_simplex(moment.field, moment.walked, moment.ahead, ax, norm, bar=False)
        ax.set_title(moment.title, loc="center", pad=16)
    label = r"$\log_{10}$ speed (1/time)"
    figure_of(axes[0]).colorbar(axes[-1].collections[0], ax=axes, label=label, shrink=0.75, aspect=24, pad=0.01)
    if own:
        handles = [axes[0].plot([], [], **style)[0] for style in PATH_STYLES]
        figure_of(axes[0]).legend(handles=handles, loc="outside lower center", ncols=3)
    return axes


@styled
def plot_phase(data: PhaseDiagram, ax: Axes | None = None) -> Axes:
    """How deep ln pi(y+) falls, over kappa and the alignment of y+ and y-; the boundaries of the regions over it."""
    ax = one(ax, 6.2, 4.2)
    low, high = -2.0, np.ceil(4 * np.log10(max(1.0, -data.depth.min()))) / 4
    log_depth = np.log10(np.maximum(-data.depth.T, 10**low))  # (K, A)
    filled = ax.contourf(
        data.cosine, data.kappa, log_depth, levels=np.arange(low, high + 0.01, 0.125), cmap="viridis_r"
    )
    filled.set_edgecolor("face")
    # Below the boundary nothing falls: white, up to the boundary rather than to the nearest cells.
    never = np.clip(data.kappa_any, data.kappa[0], 2 * data.kappa[-1])
    ax.fill_between(data.cosine, data.kappa[0], never, color="white", lw=0)
    bar = figure_of(ax).colorbar(filled, ax=ax, pad=0.02, format=FuncFormatter(lambda x, _: f"{10.0**x:g}"))
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


@styled
def plot_gains(data: Gains, axes: Sequence[Axes] | None = None) -> list[Axes]:
    """Prediction <W_z, W_+ - W_-> (dots); change of ln pi at the trough, of pi at the trough and the end (bars)."""
    axes = in_row(axes, (1, 1.25, 1.25), 9.6, 4.5, sharey=True)
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


STOP: dict[str, Any] = {"ms": 8, "mec": BLACK, "mew": 0.7, "ls": "none", "zorder": 4, "clip_on": False}


@styled
def plot_losses(data: LossMarks, ax: Axes | None = None) -> Axes:
    """ln pi(y+) over the margin, one curve for every margin loss, and where each of them stops."""
    ax = one(ax, 6.4, 3.9)
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
